"""The main job: every architecture, any folder of tensors, low-bit sources, and resuming."""

import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from fewbit.export.decode import decode_mxfp4
from fewbit.quant import layout, pipeline
from fewbit.quant.format import dequantize
from fewbit.quant.pipeline import quantize
from fewbit.quant.stored import open_stored
from fewbit.quant.verify import packed_of, verify_checkpoint
from tiny_tokenizer import save_tokenizer

SMALL = {"samples": 4, "length": 16, "device": "cpu"}
FINE = ["weights.group=16", "pass.gptq.min_tokens=1"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("We hold these tokens to be self-evident: all men are created equal. " * 30)
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """folder(arch, dtype): a tiny model with a tokenizer, made once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(arch, dtype=torch.float32):
        if (arch, dtype) not in made:
            made[arch, dtype] = save_tokenizer(
                tiny_models.save(arch, root / f"{arch}-{dtype}", dtype)
            )
        return made[arch, dtype]

    return folder


def tensors_of(folder):
    return {
        n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()
    }


def same_bits(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)


def output_files(out):
    return {p.name: p.read_bytes() for p in out.iterdir() if not p.name.startswith("report.")}


def expected_modules(tensors):
    """Linears and experts of the decoder blocks, by the names that published files use."""
    kept = ("norm", "embed", "lm_head", "conv1d", ".gate.weight", ".router.", "shared_expert_gate")
    return {
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if tensor.dim() >= 2 and not any(part in name for part in kept) and "bias" not in name
    }


# --- architectures ------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", tiny_models.ARCHITECTURES)
def test_eight_bits_without_data(model, tmp_path, arch):
    source, out = model(arch, torch.bfloat16), tmp_path / "out"
    report = quantize(source, out, recipe="w8a16", device="cpu")
    stored = verify_checkpoint(out)
    dense, found = tensors_of(source), tensors_of(out)
    assert set(stored.modules) == expected_modules(dense)
    assert {row.name for row in report.tensors} == set(stored.modules)
    assert report.fallbacks == () and all(row.tokens is None for row in report.tensors)
    for row in report.tensors:
        key = row.name + ".weight" if row.name + ".weight" in dense else row.name
        packed = packed_of(stored.modules[row.name], found)
        weight = dense[key].float()
        weight = weight.mT if packed.transposed else weight
        error = float((weight - dequantize(packed)).norm() / weight.norm())
        assert error == pytest.approx(row.relative_error, rel=1e-3)
        assert error < 0.01
    kept = dense.keys() - {key for key in dense if key.removesuffix(".weight") in stored.modules}
    assert all(same_bits(dense[key], found[key]) for key in kept)
    assert {row.name for row in report.kept} == kept


@pytest.mark.parametrize("arch", tiny_models.ARCHITECTURES)
def test_four_bits_with_data(model, text, tmp_path, arch):
    source, out = model(arch), tmp_path / "out"
    report = quantize(source, out, recipe="w4a16", calib=text, settings=FINE, **SMALL)
    stored = verify_checkpoint(out)
    assert set(stored.modules) == expected_modules(tensors_of(source))
    assert {row.name for row in report.tensors} == set(stored.modules)
    experts = [row for row in report.tensors if "experts" in row.name]
    for row in report.tensors:
        counted = row.tokens if isinstance(row.tokens, tuple) else (row.tokens,)
        starved = sum(count == 0 for count in counted)
        assert len(row.fallbacks) == starved, row.name
        assert starved == 0 or "saw no calibration tokens" in row.fallbacks[0]
        if row not in experts or "shared_expert" in row.name:
            assert counted == (64,), row.name
        assert row.relative_error < 0.6  # what compensates for drift may move far from W
        assert counted == (0,) or row.output_error < 0.2
    for counts in report.experts.values():
        assert sum(counts) == 64 * 2
    assert bool(experts) == bool(report.experts)


@pytest.mark.parametrize("arch", ["llama_tied", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_is_bit_equal(model, tmp_path, arch, dtype):
    source, out = model(arch, dtype), tmp_path / "out"
    report = quantize(source, out, recipe="identity", device="cpu")
    dense, found = tensors_of(source), tensors_of(out)
    assert dense.keys() == found.keys()
    assert all(same_bits(dense[name], found[name]) for name in dense)
    assert report.tensors == () and report.bits_per_weight == 0
    verify_checkpoint(out)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


# --- any folder of tensors ----------------------------------------------------------------------


@pytest.fixture
def odd_folder(tmp_path):
    """No config.json, every dtype, shapes without elements, and names of all kinds."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    tensors = {
        "a.weight": random(48, 100), "b.weight": random(48, 64).half(),
        "c.weight": random(33, 64).bfloat16(), "wide": random(3, 5, 7).double(),
        "scalar": torch.tensor(3.5), "count": torch.tensor(7), "void": torch.empty(0, 5),
        "hollow": torch.empty(4, 0, dtype=torch.bfloat16), "bool": torch.tensor([True, False]),
        "i8": torch.arange(-5, 5, dtype=torch.int8), "i16": torch.arange(5, dtype=torch.int16),
        "i64": torch.arange(3), "u8": torch.arange(9, dtype=torch.uint8),
        "u16": torch.tensor([1, 65535], dtype=torch.uint16),
        "u32": torch.tensor([1, 2**32 - 1], dtype=torch.uint32),
        "u64": torch.tensor([2**63], dtype=torch.uint64),
        "complex": torch.complex(random(4), random(4)), "名前.weight": random(16, 32),
        "one": random(1, 1), "signs": torch.tensor([0.0, -0.0]),
        "subnormal": torch.tensor([1e-40, -1e-45]),
    }  # fmt: skip
    folder = tmp_path / "tensors"
    folder.mkdir()
    save_file(tensors, folder / "anything.safetensors")
    return folder, tensors


def test_a_copy_of_anything_is_bit_equal(odd_folder, tmp_path):
    folder, tensors = odd_folder
    quantize(folder, tmp_path / "out", recipe="identity", device="cpu")
    found = tensors_of(tmp_path / "out")
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensors[name]) for name in tensors)
    verify_checkpoint(tmp_path / "out")


def test_matrices_of_any_folder_are_quantized(odd_folder, tmp_path):
    folder, tensors = odd_folder
    report = quantize(folder, tmp_path / "out", recipe="w4a16-rtn", device="cpu")
    assert {row.name for row in report.tensors} == {"a", "b", "c", "名前"}
    found = tensors_of(tmp_path / "out")
    kept = tensors.keys() - {"a.weight", "b.weight", "c.weight", "名前.weight"}
    assert all(same_bits(found[name], tensors[name]) for name in kept)
    verify_checkpoint(tmp_path / "out")


def test_overrides_decide_alone_where_there_are_no_weights(odd_folder, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[override]]\nmatch = "a"\nweights = { format = "int_group", bits = 5 }\n')
    report = quantize(odd_folder[0], tmp_path / "out", recipe=str(recipe), device="cpu")
    assert [(row.name, row.options["bits"]) for row in report.tensors] == [("a", 5)]
    verify_checkpoint(tmp_path / "out")


def test_mixed_formats(model, tmp_path):
    recipe = tmp_path / "mixed.toml"
    recipe.write_text(
        '[weights]\nformat = "int_group"\nbits = 4\ngroup = 32\n'
        "[[override]]\nmatch = 're:.*\\.layers\\.0\\..*'\nweights = false\n"
        "[[override]]\nmatch = 'down_proj'\nweights = { bits = 8, symmetric = false }\n"
    )
    report = quantize(model("llama"), tmp_path / "out", recipe=str(recipe), device="cpu")
    bits = {row.name: (row.options["bits"], row.options["symmetric"]) for row in report.tensors}
    layer = "model.layers.1."
    assert len(bits) == 7 and bits[layer + "mlp.down_proj"] == (8, False)
    assert bits[layer + "mlp.up_proj"] == (4, True)
    stored = verify_checkpoint(tmp_path / "out")
    assert set(stored.modules) == set(bits)


# --- low-bit sources ----------------------------------------------------------------------------


def as_fp8(source, target):
    """The same model with 2-D projections in FP8 and a scale for each 32 x 32 block."""
    tensors = {}
    for name, value in tensors_of(source).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = value
            continue
        n, k = -(-value.shape[0] // 32), -(-value.shape[1] // 32)
        padded = torch.zeros(n * 32, k * 32)
        padded[: value.shape[0], : value.shape[1]] = value
        blocks = padded.unflatten(0, (n, 32)).unflatten(2, (k, 32))
        scale = blocks.abs().amax((1, 3)) / 448
        coded = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).flatten(2).flatten(0, 1)
        tensors[name] = coded[: value.shape[0], : value.shape[1]].contiguous()
        tensors[name + "_scale_inv"] = scale
    return write_source(source, target, tensors, "fp8", {"weight_block_size": [32, 32]})


def as_mxfp4(source, target):
    """The same gpt-oss model with random MXFP4 experts. K is a multiple of 32 where K = hidden."""
    generator, tensors = np.random.default_rng(0), {}
    for name, value in tensors_of(source).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = value
            continue
        e, k, n = value.shape
        blocks = generator.integers(0, 256, (e, n, k // 32, 16), dtype=np.uint8)
        tensors[name + "_blocks"] = torch.from_numpy(blocks)
        scales = generator.integers(123, 126, (e, n, k // 32), dtype=np.uint8)
        tensors[name + "_scales"] = torch.from_numpy(scales)
    return write_source(source, target, tensors, "mxfp4", {"modules_to_not_convert": ["lm_head"]})


def write_source(source, target, tensors, method, keys):
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **keys}
    config["dtype"] = "bfloat16"
    (target / "config.json").write_text(json.dumps(config))
    save_tokenizer(target)
    return target


@pytest.fixture(scope="module")
def low_bit(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("low-bit")
    gpt_oss = tiny_models.make_config("gpt_oss")
    gpt_oss.intermediate_size = 64
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(gpt_oss)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.1)
    made.to(torch.bfloat16).save_pretrained(root / "gpt_oss")
    return {
        "fp8": as_fp8(model("qwen3_moe"), root / "fp8"),
        "mxfp4": as_mxfp4(root / "gpt_oss", root / "mxfp4"),
    }


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
@pytest.mark.parametrize("recipe", ["w4a16-rtn", "w4a16", "identity"])
def test_low_bit_sources(low_bit, text, tmp_path, kind, recipe):
    out = tmp_path / "out"
    fine = {"w4a16": FINE, "w4a16-rtn": FINE[:1], "identity": []}[recipe]
    report = quantize(low_bit[kind], out, recipe=recipe, calib=text, settings=fine, **SMALL)
    config = json.loads((out / "config.json").read_text())
    method = config.get("quantization_config", {}).get("quant_method")
    assert method == (None if recipe == "identity" else "fewbit")
    found, stored = tensors_of(out), verify_checkpoint(out)
    assert not any(name.endswith(("_scale_inv", "_blocks", "_scales")) for name in found)
    assert not any(tensor.dtype == torch.float8_e4m3fn for tensor in found.values())
    experts = [name for name in stored.modules if "experts" in name]
    assert bool(experts) == (recipe != "identity")
    raw = load_file(low_bit[kind] / "model.safetensors")
    if kind == "mxfp4":
        name = "model.layers.1.mlp.experts.gate_up_proj"
        dense = decode_mxfp4(raw[name + "_blocks"], raw[name + "_scales"])
        key = name
    else:
        key = "model.layers.1.mlp.experts.2.up_proj.weight"
        name = key.removesuffix(".weight")
        scale = raw[key + "_scale_inv"].repeat_interleave(32, 0).repeat_interleave(32, 1)
        dense = raw[key].float() * scale[: raw[key].shape[0], : raw[key].shape[1]]
        dense = dense.bfloat16()
    if recipe == "identity":
        assert same_bits(found[key], dense)
        return
    packed = packed_of(stored.modules[name], found)
    weight = dense.float().mT if packed.transposed else dense.float()
    row = next(row for row in report.tensors if row.name == name)
    error = float((weight - dequantize(packed)).norm() / weight.norm())
    assert error == pytest.approx(row.relative_error, rel=1e-3)
    assert error < 0.2


# --- resuming -----------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run from inside. No handler of the library catches it."""


@pytest.fixture
def durable_calls(monkeypatch):
    """Counts fsync, replace, unlink and truncate; raises at the one whose number is set."""
    state = {"count": 0, "stop": None}

    def counted(real):
        def call(*arguments, **keys):
            state["count"] += 1
            if state["count"] == state["stop"]:
                raise Killed
            return real(*arguments, **keys)

        return call

    for name in ("fsync", "replace", "unlink", "truncate"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return state


def test_stopped_at_every_durable_step(durable_calls, monkeypatch, model, tmp_path):
    """Before each call that makes something durable, in a run of several shards."""
    monkeypatch.setattr(layout, "UNIT_BYTES", 30_000)
    monkeypatch.setattr(pipeline, "MAX_SHARD_BYTES", 60_000)
    source = model("llama", torch.bfloat16)

    def run(out):
        quantize(source, out, recipe="w4a16-rtn", device="cpu")

    durable_calls["count"] = 0
    run(tmp_path / "whole")
    total, expected = durable_calls["count"], output_files(tmp_path / "whole")
    assert total > 25 and len(list((tmp_path / "whole").glob("*.safetensors"))) > 1
    reached = Counter()
    for stop in range(1, total + 1):
        out = tmp_path / str(stop)
        durable_calls.update(count=0, stop=stop)
        with pytest.raises(Killed):
            run(out)
        reached[(out / "config.json").exists()] += 1
        durable_calls["stop"] = None
        if (out / "config.json").exists() and not (out / "fewbit.journal").exists():
            assert stop == total
        else:
            run(out)
        assert output_files(out) == expected, stop
    assert reached[False] > reached[True] > 0


def test_stopped_twice_in_a_row_and_after_each_unit(model, text, tmp_path):
    source = model("mixtral")
    keys = {"recipe": "w4a16", "calib": text, "settings": FINE, **SMALL}
    quantize(source, tmp_path / "whole", **keys)
    expected, out = output_files(tmp_path / "whole"), tmp_path / "out"
    units = []

    def stop(state):
        units.append(state.unit)
        raise Killed

    for _ in range(5):
        try:
            quantize(source, out, progress=stop, **keys)
        except Killed:
            continue
        break
    assert units == ["outside the blocks 1", "model.layers.0", "model.layers.1"]
    assert output_files(out) == expected


def test_seed_decides_the_windows_and_nothing_else_does(model, text, tmp_path):
    keys = {"recipe": "w4a16", "calib": text, "settings": FINE, **SMALL}
    shards = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(shards))  # the global state has no say
        quantize(model("llama"), tmp_path / name, seed=seed, **keys)
        shards.append(output_files(tmp_path / name))
    assert shards[0] == shards[1]
    assert shards[0]["model.safetensors"] != shards[2]["model.safetensors"]


def test_sizes_of_shards_and_units_change_no_tensor(monkeypatch, model, tmp_path):
    quantize(model("gpt_oss"), tmp_path / "one", recipe="w4a16-rtn", device="cpu")
    monkeypatch.setattr(layout, "UNIT_BYTES", 1)
    monkeypatch.setattr(pipeline, "MAX_SHARD_BYTES", 1)
    quantize(model("gpt_oss"), tmp_path / "many", recipe="w4a16-rtn", device="cpu")
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(same_bits(one[name], many[name]) for name in one)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 20
    verify_checkpoint(tmp_path / "many")


# --- what is told on the way --------------------------------------------------------------------


def test_progress_and_outlook(monkeypatch, model, tmp_path):
    monkeypatch.setattr(layout, "UNIT_BYTES", 60_000)
    states, lines = [], []
    report = quantize(
        model("llama"), tmp_path / "out", recipe="w4a16-rtn", device="cpu",
        progress=states.append, announce=lines.append,
    )  # fmt: skip
    assert [state.done for state in states] == list(range(1, states[-1].total + 1))
    assert len(states) > 3 and states[-1].seconds_left == 0
    assert states[-1].bits_per_weight == pytest.approx(report.bits_per_weight)
    worst = max(report.tensors, key=lambda row: row.relative_error)
    assert states[-1].worst == (worst.name, worst.relative_error)
    assert len(lines) == 1 and "memory about" in lines[0]


def test_time_left_follows_the_weights_that_are_left(model, text, tmp_path):
    states = []
    quantize(
        model("llama"), tmp_path / "out", recipe="w4a16", calib=text, settings=FINE,
        progress=states.append, **SMALL,
    )  # fmt: skip
    assert [state.unit for state in states] == [
        "outside the blocks 1", "model.layers.0", "model.layers.1",
    ]  # fmt: skip
    assert states[0].seconds_left is None
    assert states[1].seconds_left > 0 and states[2].seconds_left == 0


def test_report_adds_up(model, tmp_path):
    out = tmp_path / "out"
    report = quantize(model("mixtral"), out, recipe="w8a16", device="cpu")
    stored = open_stored(out)
    written = json.loads((out / "report.json").read_text())
    assert written["totals"]["bits_per_weight"] == report.bits_per_weight
    assert report.quantized_bytes == sum(module.n_bytes for module in stored.modules.values())
    total = sum(tensor.n_bytes for tensor in stored.tensors.values())
    assert written["totals"]["bytes"] == total
    assert written["wall_seconds"] > 0 and written["peak_resident_bytes"] > 10**7
    assert "<html" in (out / "report.html").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_blocks_stream_through_the_gpu(tmp_path):
    """Peak GPU memory is that of two blocks, their statistics and one batch, not of the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    source = tmp_path / "source"
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=24, vocab_size=131,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(source)
    save_tokenizer(source)
    block = sum(p.numel() for p in model.model.layers[0].parameters()) * 2
    torch.cuda.reset_peak_memory_stats()
    on_gpu = quantize(source, tmp_path / "gpu", samples=8, length=64, device="cuda")
    assert torch.cuda.max_memory_allocated() < 2 * block + 8 * 4 * 1536**2 + (128 << 20)
    assert not on_gpu.fallbacks
    on_cpu = quantize(source, tmp_path / "cpu", samples=8, length=64, device="cpu")
    for a, b in zip(on_gpu.tensors, on_cpu.tensors, strict=True):
        assert a.output_error == pytest.approx(b.output_error, rel=0.1)


def test_the_report_says_how_to_repeat_the_run(tmp_path):
    source = tiny_models.save("llama", tmp_path / "source")
    report = quantize(source, tmp_path / "out", recipe="w8a16", settings=["weights.bits=6"], seed=3)
    expected = "fewbit quantize source -o out --recipe w8a16 --set weights.bits=6 --seed 3"
    assert report.provenance.command == expected
