"""Calibrated units: later weights see quantized ones, experts are counted, memory spills to disk."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from fewbit.calibrate import collect
from fewbit.calibrate.data import load_calibration
from fewbit.calibrate.skeleton import load_tokenizer
from fewbit.quant import blockwise, pipeline, preflight
from fewbit.quant.blockwise import Spill, stored_tensor
from fewbit.quant.errors import CalibrationError, CheckpointError
from fewbit.quant.format import dequantize
from fewbit.quant.pipeline import quantize
from fewbit.quant.stored import open_stored
from fewbit.quant.verify import packed_of
from tiny_tokenizer import save_tokenizer

SAMPLES, LENGTH = 4, 16
PLAIN = """
[[pass]]
name = "gptq"
min_tokens = 1
[weights]
format = "int_group"
bits = 3
group = 16
"""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """{architecture: folder} of fp32 models with a tokenizer and a short text beside them."""
    root = tmp_path_factory.mktemp("sources")
    found = {}
    for arch in ("llama", "mixtral", "gpt_oss"):
        found[arch] = save_tokenizer(tiny_models.save(arch, root / arch))
    (root / "text.txt").write_text("All men are created equal, and so are their tokens. " * 20)
    (root / "plain.toml").write_text(PLAIN)
    found["text"], found["recipe"] = root / "text.txt", root / "plain.toml"
    return found


def run(sources, arch, out, **more):
    more = {"recipe": str(sources["recipe"]), "samples": SAMPLES, "length": LENGTH,
            "calib": str(sources["text"]), "device": "cpu"} | more  # fmt: skip
    return quantize(sources[arch], out, **more)


def stored_weights(out):
    """{module: dequantized fp32 weight} of a result."""
    stored, tensors = open_stored(out), {}
    for path in out.glob("*.safetensors"):
        tensors.update(load_file(path))
    return {name: dequantize(packed_of(m, tensors)) for name, m in stored.modules.items()}


def tensor_bytes(out):
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def inputs_of(sources, names, replaced):
    """Inputs [tokens, K] of modules in a model of the library with some weights replaced."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sources["llama"], dtype=torch.float32)
    for name, value in replaced.items():
        model.get_submodule(name).weight.data.copy_(value)
    seen = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0].flatten(0, -2)})
        )
    windows = load_calibration(
        sources["text"], load_tokenizer(sources["llama"]), SAMPLES, LENGTH, 0
    ).windows
    with torch.no_grad():
        model(windows)
    return seen


def test_each_weight_is_measured_on_the_output_of_the_quantized_ones(sources, tmp_path):
    """Against the library's own forward: all that runs before a weight is quantized already."""
    report = run(sources, "llama", tmp_path / "out")
    rounded = stored_weights(tmp_path / "out")
    dense = load_file(sources["llama"] / "model.safetensors")
    rows = {row.name: row for row in report.tensors}
    layer = "model.layers.1."
    order = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
    stages = [order[:3], order[3:4], order[4:6], order[6:]]
    before = {name: value for name, value in rounded.items() if ".layers.0." in name}
    for stage in stages:
        names = [layer + short for short in stage]
        inputs = inputs_of(sources, names, before)
        for name in names:
            weight, x = dense[name + ".weight"], inputs[name]
            error = (x @ (weight - rounded[name]).T).norm() / (x @ weight.T).norm()
            assert rows[name].output_error == pytest.approx(float(error), rel=1e-3)
            assert rows[name].tokens == SAMPLES * LENGTH
            relative = (weight - rounded[name]).norm() / weight.norm()
            assert rows[name].relative_error == pytest.approx(float(relative), rel=1e-4)
        before.update({name: rounded[name] for name in names})


def test_guided_rounding_beats_nearest_on_the_calibration_inputs(sources, tmp_path):
    guided = run(sources, "llama", tmp_path / "guided")
    nearest = run(sources, "llama", tmp_path / "nearest", settings=["pass.gptq.min_tokens=9999"])
    assert len(nearest.fallbacks) == len(nearest.tensors)
    first = "model.layers.0.self_attn.q_proj"
    by_name = [{row.name: row for row in report.tensors} for report in (guided, nearest)]
    assert by_name[0][first].output_error < 0.8 * by_name[1][first].output_error
    assert by_name[0][first].relative_error > by_name[1][first].relative_error


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss"])
def test_every_token_of_every_expert_is_counted(sources, tmp_path, arch):
    report = run(sources, arch, tmp_path / "out")
    per_layer = [counts for name, counts in report.experts.items()]
    assert len(per_layer) == 2
    assert all(sum(counts) == SAMPLES * LENGTH * 2 for counts in per_layer)  # two for each token
    if arch == "mixtral":
        rows = {row.name: row for row in report.tensors}
        layer = "model.layers.1.block_sparse_moe.experts"
        for expert, count in enumerate(report.experts[layer]):
            assert {rows[f"{layer}.{expert}.{w}"].tokens for w in ("w1", "w2", "w3")} == {count}


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss"])
def test_experts_below_the_minimum_fall_back_one_by_one(sources, tmp_path, arch):
    counts = run(sources, arch, tmp_path / "all").experts
    limit = sorted(n for layer in counts.values() for n in layer)[3] + 1
    report = run(sources, arch, tmp_path / "some", settings=[f"pass.gptq.min_tokens={limit}"])
    starved = sum(n < limit for layer in report.experts.values() for n in layer)
    assert 0 < starved < 8
    assert len(report.fallbacks) == starved * (3 if arch == "mixtral" else 2)
    assert all(f"{limit} are needed" in text for text in report.fallbacks)


def test_experts_in_parts_give_the_same_bytes(monkeypatch, sources, tmp_path):
    run(sources, "mixtral", tmp_path / "whole")
    monkeypatch.setattr(collect, "MAX_STAGE_BYTES", 1)
    run(sources, "mixtral", tmp_path / "parts")
    assert tensor_bytes(tmp_path / "whole") == tensor_bytes(tmp_path / "parts")


@pytest.mark.parametrize("recipe", ["plain", "w4a16"])
def test_spilled_hidden_states_give_the_same_bytes(monkeypatch, sources, tmp_path, recipe):
    keys = {} if recipe == "plain" else {"recipe": recipe}
    monkeypatch.setattr(blockwise, "BATCH_TOKENS", LENGTH)
    run(sources, "llama", tmp_path / "resident", **keys)
    spilled = []
    real = Spill.take
    monkeypatch.setattr(Spill, "take", lambda self, h: spilled.append(h.shape) or real(self, h))
    for module in (blockwise, preflight):
        monkeypatch.setattr(module, "RESIDENT_BYTES", 10_000)
    run(sources, "llama", tmp_path / "spilled", **keys)
    assert len(spilled) in (SAMPLES, 2 * SAMPLES)
    assert tensor_bytes(tmp_path / "resident") == tensor_bytes(tmp_path / "spilled")
    assert not list((tmp_path / "spilled").glob("*.partial"))


def test_spill_fills_one_file_from_the_front(tmp_path):
    spill = Spill(tmp_path, 6)
    first, second = torch.ones(1, 4, 3), torch.full((1, 2, 3), 2.0)
    a, b = spill.take(first), spill.take(second)
    assert torch.equal(a, first) and torch.equal(b, second)
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    a.zero_()
    assert torch.equal(b, second)
    assert list(tmp_path.iterdir()) == []  # a kill leaves nothing behind


def test_spill_on_a_full_disk_is_named(monkeypatch, tmp_path):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(blockwise.os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        Spill(tmp_path, 4).take(torch.ones(1, 4, 3))


def test_the_head_has_no_statistics(sources, tmp_path):
    with pytest.raises(CalibrationError, match=r"lm_head\.weight lies outside the decoder blocks"):
        run(sources, "llama", tmp_path / "out", settings=["weights.ignore=[]"])
    assert not (tmp_path / "out").exists()


def test_a_weight_that_no_product_uses_is_named(monkeypatch, sources, tmp_path):
    real = blockwise.operands

    def blind(structure, parameters):
        return [item for item in real(structure, parameters) if "down_proj" not in item.parameter]

    monkeypatch.setattr(blockwise, "operands", blind)
    with pytest.raises(CalibrationError, match=r"down_proj.*add 'model.layers.0.mlp.down_proj'"):
        run(sources, "llama", tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_orientation_that_the_plan_got_wrong_is_named(sources, tmp_path):
    """As if gpt-oss's [E, K, N] stacks were taken for [E, N, K]."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fewbit.quant.layout._INPUT_FIRST", {})
        with pytest.raises(CalibrationError, match="the graph holds it K first"):
            run(sources, "gpt_oss", tmp_path / "out")


def test_extra_weights_are_carried_through(sources, tmp_path):
    folder = tmp_path / "source"
    tensors = load_file(sources["llama"] / "model.safetensors")
    extra = {
        "mtp.layers.0.mlp.up_proj.weight": torch.randn(96, 64),
        "model.layers.2.mlp.up_proj.weight": torch.randn(96, 64),
        "visual.blocks.0.attn.qkv.weight": torch.randn(96, 64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(12),
    }
    folder.mkdir()
    save_file(tensors | extra, folder / "model.safetensors")
    for path in sources["llama"].glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    report = run({**sources, "extra": folder}, "extra", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in extra.items())
    assert len(report.tensors) == 14


def test_stored_parts_are_checked_when_a_run_resumes(monkeypatch, sources, tmp_path):
    out = tmp_path / "out"

    def stop(state):
        if state.unit.endswith("layers.0"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(sources, "llama", out, progress=stop)
    journal = (out / "fewbit.journal").read_text().splitlines()
    unit = json.loads(journal[2].rpartition("\t")[0])
    name, _, _, begin, _, _ = next(t for t in unit["tensors"] if t[0].endswith(".codes"))
    partial = out / "model.safetensors.partial"
    data = bytearray(partial.read_bytes())
    read = []
    monkeypatch.setattr(
        blockwise, "stored_tensor", lambda t, w, u: read.append(t.module) or stored_tensor(t, w, u)
    )
    start = partial.stat().st_size - max(t[4] for t in unit["tensors"])
    data[start + begin] ^= 1
    partial.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        run(sources, "llama", out)
    assert read
    run(sources, "llama", out, restart=True)


def test_windows_of_gemma_open_with_its_start_token(tmp_path):
    folder = save_tokenizer(tiny_models.save("gemma2", tmp_path / "gemma2"))
    seen = []
    real = load_calibration

    def note(*arguments, **keys):
        seen.append(real(*arguments, **keys))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fewbit.calibrate.data.load_calibration", note)
        job = pipeline._prepare(
            folder, tmp_path / "out", "w4a16", ["calibration.length=16"], None, "cpu", 0, None
        )
    assert torch.equal(job.calibration.windows, seen[0].windows)
    assert set(job.calibration.windows[:, 0].tolist()) == {1}
