"""Lossless storage end to end: size, identity of every bit, other recipes, interruption, damage."""

import filecmp
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from fewbit import quant
from fewbit.export.safetensors_file import read_header
from fewbit.quant.cli import main
from fewbit.quant.codecs.coded import PLANES, CodedTensor, parse_head
from fewbit.quant.codecs.encoder import Encoder
from fewbit.quant.errors import CheckpointError, RecipeError
from fewbit.quant.export_command import export
from fewbit.quant.load import load
from fewbit.quant.pipeline import quantize
from fewbit.quant.stored import open_stored
from planted import bundled_model
from tiny_models import make_tokens, save


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def files_of(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def assert_same_files(a, b):
    assert files_of(a) == files_of(b)
    different = [name for name in files_of(a) if not filecmp.cmp(a / name, b / name, shallow=False)]
    assert different == []


# --- the bundled model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    out = tmp_path_factory.mktemp("lossless") / "out"
    report = quantize(bundled_model(), out, recipe="lossless")
    assert report.bits_per_weight <= 10.75
    return out


def test_progress_says_what_was_stored(tmp_path):
    states = []
    report = quantize(bundled_model(), tmp_path, recipe="lossless", progress=states.append)
    assert states[-1].bits_per_weight == pytest.approx(report.bits_per_weight)


def test_bits_per_weight_in_all(coded):
    found = quant.inspect(coded, verify=True)
    n = sum(np.prod(facts.shape) for facts in found.tensors.values())
    assert found.bits_per_weight <= 10.75
    assert 8 * found.bytes / n <= 10.75  # with the headers of the files
    assert found.verified and found.recipe == "lossless"
    report = json.loads((coded / "report.json").read_text())
    assert report["totals"]["bits_per_weight"] == pytest.approx(found.bits_per_weight)


def test_logits_are_those_of_the_original(coded):
    original = transformers.AutoModelForCausalLM.from_pretrained(bundled_model(), dtype="auto")
    tokens = torch.randint(0, 1000, (2, 80), generator=torch.Generator().manual_seed(0))
    found = load(coded, device="cpu")
    hooked = transformers.AutoModelForCausalLM.from_pretrained(coded, dtype="auto")
    with torch.no_grad():
        wanted = original(tokens).logits
        assert same(found(tokens).logits, wanted)
        assert same(hooked(tokens).logits, wanted)
    a = original.generate(tokens[:1, :8], max_new_tokens=8, do_sample=False)
    assert torch.equal(found.generate(tokens[:1, :8], max_new_tokens=8, do_sample=False), a)


def test_export_gives_the_files_back(coded, tmp_path, capsys):
    assert main(["export", str(coded), "-o", str(tmp_path / "dense"), "--to", "dense"]) == 0
    assert_same_files(tmp_path / "dense", bundled_model())
    assert "model.safetensors: 100%" in capsys.readouterr().err


def test_saved_again_it_is_an_ordinary_checkpoint(coded, tmp_path):
    model = load(coded, device="cpu")
    model.save_pretrained(tmp_path)
    again = load(tmp_path, device="cpu")
    for name, value in model.state_dict().items():
        assert same(again.state_dict()[name], value), name


# --- other architectures and dtypes -----------------------------------------------------------------


SIZES = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
}  # fmt: skip


def t5():
    config = transformers.T5Config(
        vocab_size=512, d_model=128, d_ff=256, d_kv=32, num_layers=2, num_heads=4
    )
    tokens = torch.randint(0, 500, (2, 9))
    inputs = {"input_ids": tokens, "decoder_input_ids": tokens[:, :5]}
    return transformers.T5ForConditionalGeneration(config), inputs


def vit():
    config = transformers.ViTConfig(**SIZES, image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config), {
        "pixel_values": torch.rand(2, 3, 32, 32)
    }


def bert():
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=512, **SIZES))
    return model, {"input_ids": torch.randint(0, 500, (2, 9))}


def cast(model, dtype):
    if dtype != "mixed":
        return model.to(dtype)
    for index, parameter in enumerate(model.parameters()):
        parameter.data = parameter.data.to(
            [torch.float16, torch.bfloat16, torch.float32][index % 3]
        )
    return model


@pytest.mark.parametrize("make", [t5, vit, bert])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, "mixed"], ids=str)
def test_any_architecture_and_dtype(make, dtype, tmp_path):
    torch.manual_seed(0)
    model, inputs = make()
    cast(model.eval(), dtype).save_pretrained(tmp_path / "src")
    report = quantize(tmp_path / "src", tmp_path / "out", recipe="lossless")
    width = 32 if dtype == torch.float32 else 16
    assert dtype == "mixed" or report.bits_per_weight < 0.88 * width
    original = type(model).from_pretrained(tmp_path / "src", dtype="auto").eval()
    found = load(tmp_path / "out", device="cpu")
    assert type(found) is type(original)
    inputs = {k: v.to(original.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        assert same(found(**inputs).logits, original(**inputs).logits)
    assert {k: v.dtype for k, v in found.state_dict().items()} == {
        k: v.dtype for k, v in original.state_dict().items()
    }
    export(tmp_path / "out", tmp_path / "back", "dense")
    assert_same_files(tmp_path / "src", tmp_path / "back")


def test_a_config_without_a_dtype_means_what_the_library_detects(tmp_path):
    torch.manual_seed(0)
    model, inputs = bert()
    cast(model.eval(), "mixed").save_pretrained(tmp_path / "src")
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    quantize(tmp_path / "src", tmp_path / "out", recipe="lossless")
    original = type(model).from_pretrained(tmp_path / "src", dtype="auto").eval()
    found = load(tmp_path / "out", device="cpu")
    assert found.dtype == original.dtype
    with torch.no_grad():
        assert same(found(**inputs).logits, original(**inputs).logits)


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss", "llama_tied", "phi3"])
def test_models_that_the_library_rearranges(arch, tmp_path):
    save(arch, tmp_path / "src", torch.bfloat16)
    quantize(tmp_path / "src", tmp_path / "out", recipe="lossless")
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "src", dtype="auto")
    found = load(tmp_path / "out", device="cpu")
    tokens = make_tokens()
    with torch.no_grad():
        assert same(found(tokens).logits, original(tokens).logits)
    assert found.all_tied_weights_keys == original.all_tied_weights_keys


def test_no_random_numbers_are_drawn_for_what_is_decoded(coded, monkeypatch):
    drawn = []
    plain = torch.Tensor.normal_

    def counted(self, *args, **kwargs):
        drawn.append(0 if self.is_meta else self.numel())
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "normal_", counted)
    load(coded, device="cpu")
    assert sum(drawn) == 0


@pytest.fixture
def foreign(tmp_path):
    """A folder of everything: another maker's quantization, every dtype, NaN, empty tensors, shards."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-(2**31), 2**31, (64, 512), dtype=torch.int64, generator=generator)
    patterns = torch.arange(65536).to(torch.int32).to(torch.uint16).view(torch.bfloat16)
    first = {
        "a.weight": torch.randn(300, 513, generator=generator).to(torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.rand(3, 5, generator=generator),
        "q.qweight": integers.int(),
        "nan": torch.full((64, 256), float("nan")).bfloat16(),
        "every": patterns.repeat(2)[torch.randperm(131072, generator=generator)].view(512, 256),
    }
    second = {
        "flags": torch.rand(5000, generator=generator) > 0.9,
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "counts": torch.arange(40000),
        "double": torch.randn(2000, dtype=torch.float64, generator=generator),
        "complex": torch.randn(3000, dtype=torch.complex64, generator=generator),
        "zeros": torch.zeros(200, 256, dtype=torch.float16),
        "four": torch.rand(100, 7, 3, 9, generator=generator),
    }
    names = {"x-00001-of-00002.safetensors": first, "x-00002-of-00002.safetensors": second}
    for name, tensors in names.items():
        save_file(tensors, folder / name, metadata={"made": "elsewhere"})
    weight_map = {tensor: name for name, tensors in names.items() for tensor in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "x.safetensors.index.json").write_text(json.dumps(index, indent=3))
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    return folder


def test_everything_comes_back(foreign, tmp_path):
    quantize(foreign, tmp_path / "out", recipe="lossless")
    facts = quant.inspect(tmp_path / "out", verify=True).tensors
    assert facts["a.weight"].bits_per_weight < 6.8 and facts["a.weight"].coded
    export(tmp_path / "out", tmp_path / "back", "dense")
    assert_same_files(foreign, tmp_path / "back")


def test_another_makers_weights_are_not_run(foreign, tmp_path):
    quantize(foreign, tmp_path / "out", recipe="lossless")
    with pytest.raises(CheckpointError, match=r"quant_method 'gptq', coded without loss.*export"):
        load(tmp_path / "out", device="cpu")
    with pytest.raises(RecipeError, match=r"quantized already"):
        quantize(foreign, tmp_path / "kv", recipe="kv4", settings=["lossless=true"])
    assert not (tmp_path / "kv").exists()


# --- lossless on top of other recipes ---------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w4a16-rtn", "w8a16", "w4a8kv4"])
def test_other_recipes_get_smaller_and_compute_the_same(recipe, tmp_path):
    keys = (
        {"recipe": recipe, "samples": 8, "length": 64}
        if recipe == "w4a8kv4"
        else {"recipe": recipe}
    )
    plain = quantize(bundled_model(), tmp_path / "plain", **keys)
    found = quantize(bundled_model(), tmp_path / "coded", settings=["lossless=true"], **keys)
    bound = {"w4a16-rtn": 0.92, "w8a16": 0.95, "w4a8kv4": 0.99}[recipe]
    assert found.bits_per_weight < bound * plain.bits_per_weight
    inspected = quant.inspect(tmp_path / "coded", verify=True)
    assert inspected.bits_per_weight == pytest.approx(found.bits_per_weight)
    assert inspected.bytes < quant.inspect(tmp_path / "plain").bytes
    tokens = torch.randint(0, 1000, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = load(tmp_path / "plain", device="cpu")(tokens).logits
        assert same(load(tmp_path / "coded", device="cpu")(tokens).logits, wanted)


def test_ternary_parts_take_the_smaller_of_two_codecs(tmp_path):
    """Few weights: the dictionary, which stores no tables. Many: rans32."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "src"
    folder.mkdir()
    tensors = {
        f"{name}.weight": torch.randn(rows, columns, generator=generator).bfloat16()
        for name, rows, columns in [("few", 16, 320), ("many", 512, 1024)]
    }
    save_file(tensors, folder / "model.safetensors")
    settings = ['weights={format="ternary"}']
    for name, more in [("plain", []), ("coded", ["lossless=true"])]:
        quantize(folder, tmp_path / name, recipe="w4a16-rtn", settings=[*settings, *more])
    names = read_header(tmp_path / "coded" / "model.safetensors").entries
    assert "few.codes.dictionary.codewords" in names and "many.codes.rans32.words" in names
    quant.inspect(tmp_path / "coded", verify=True)
    plain, found = open_stored(tmp_path / "plain"), open_stored(tmp_path / "coded")
    for name in plain.tensors:
        assert same(found.contents()[name], plain.contents()[name])
        assert found.tensors[name].n_bytes <= plain.tensors[name].n_bytes
    data = bytearray((tmp_path / "coded" / "model.safetensors").read_bytes())
    data[names["few.codes.dictionary.codewords"].begin + 9] ^= 1
    (tmp_path / "coded" / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"few\.codes: "):
        open_stored(tmp_path / "coded").contents()["few.codes"]


def test_a_calibrated_run_resumes_from_coded_blocks(tmp_path):
    keys = {"recipe": "w4a16", "samples": 8, "length": 64, "settings": ["lossless=true"]}

    class Stopped(Exception):
        pass

    def stop(progress):
        if progress.done == 4:
            raise Stopped

    quantize(bundled_model(), tmp_path / "whole", **keys)
    with pytest.raises(Stopped):
        quantize(bundled_model(), tmp_path / "resumed", progress=stop, **keys)
    quantize(bundled_model(), tmp_path / "resumed", **keys)
    for name in files_of(tmp_path / "whole"):
        if not name.startswith("report."):
            assert filecmp.cmp(tmp_path / "whole" / name, tmp_path / "resumed" / name, False), name


@pytest.mark.parametrize("moment", [1, 2])
def test_an_interrupted_lossless_run_resumes(tmp_path, monkeypatch, moment):
    monkeypatch.setattr("fewbit.quant.layout.UNIT_BYTES", 4 << 20)
    monkeypatch.setattr("fewbit.quant.pipeline.MAX_SHARD_BYTES", 6 << 20)

    class Stopped(Exception):
        pass

    def stop(progress):
        if progress.done == moment:
            raise Stopped

    quantize(bundled_model(), tmp_path / "whole", recipe="lossless")
    with pytest.raises(Stopped):
        quantize(bundled_model(), tmp_path / "resumed", recipe="lossless", progress=stop)
    quantize(bundled_model(), tmp_path / "resumed", recipe="lossless")
    assert len([n for n in files_of(tmp_path / "whole") if n.endswith(".safetensors")]) > 2
    for name in files_of(tmp_path / "whole"):
        if not name.startswith("report."):
            assert filecmp.cmp(tmp_path / "whole" / name, tmp_path / "resumed" / name, False), name
    export(tmp_path / "resumed", tmp_path / "back", "dense")
    assert_same_files(tmp_path / "back", bundled_model())


# --- damage -----------------------------------------------------------------------------------------


def small_tensors():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(128, 512, generator=generator) * 0.02
    return [
        normal.bfloat16(),
        normal.view(-1)[:40_000].half(),
        normal[:64].bfloat16().float(),
        (normal * 2000).clamp(-127, 127).to(torch.int8),
        torch.cat([normal[:64].bfloat16(), torch.zeros(64, 512, dtype=torch.bfloat16)]),
    ]


def planes_of(tensor):
    encoder = Encoder(tensor.dtype, tuple(tensor.shape))
    encoder.count(tensor)
    assert encoder.settle()
    nothing = torch.empty(0, dtype=torch.uint8)
    planes = {"raw": torch.cat([nothing, *encoder.encode(tensor)])}
    return planes | {name: torch.cat([nothing, *pieces]) for name, pieces in encoder.planes()}


def corrupt(planes, generator):
    """A copy with one thing wrong, and what it is."""
    planes = {name: value.clone() for name, value in planes.items()}
    held = [name for name in PLANES if planes[name].numel()]
    name = held[int(generator.integers(len(held)))]
    plane, n = planes[name], planes[name].numel()
    kind = int(generator.integers(6))
    a, b = sorted(int(x) for x in generator.integers(0, n, 2))
    if kind == 0:  # one bit
        plane[a] ^= 1 << int(generator.integers(8))
    elif kind == 1:  # a run of bytes
        plane[a : b + 1] ^= torch.from_numpy(generator.integers(0, 256, b + 1 - a).astype(np.uint8))
    elif kind == 2:  # cut off
        planes[name] = plane[:a]
    elif kind == 3:  # two stretches exchanged
        length = min(64, b - a, n - b)
        plane[a : a + length], plane[b : b + length] = (
            plane[b : b + length].clone(), plane[a : a + length].clone(),
        )  # fmt: skip
    elif kind == 4:  # an index that grows, but wrongly
        name = "index"
        numbers = planes[name].numpy().view("<u8")
        entry = int(generator.integers(len(numbers)))
        step = int(generator.integers(-40, 40)) * 2
        numbers[entry] = np.uint64((int(numbers[entry]) + step) % 2**64)
    else:  # states of two streams exchanged
        name = "state"
        states = planes[name].view(-1, 128)
        i, j = (int(x) for x in generator.integers(0, len(states), 2))
        states[i], states[j] = states[j].clone(), states[i].clone()
    return planes, f"{name}, {kind}"


def test_ten_thousand_corruptions_are_found_and_named():
    generator = np.random.default_rng(0)
    undetected, n_changed = [], 0
    for tensor in small_tensors():
        whole = planes_of(tensor)
        head = parse_head("t", whole["head"].numpy().tobytes())
        for _ in range(2000):
            planes, what = corrupt(whole, generator)
            if all(torch.equal(planes[name], whole[name]) for name in PLANES):
                continue
            n_changed += 1
            try:
                CodedTensor.open("layer.weight", planes).decode()
            except CheckpointError as error:
                assert str(error).startswith("layer.weight: ")
                assert f"of {head.n_chunks}: " in str(error) or "chunk" not in str(error)
            else:
                undetected.append(what)
    assert undetected == []
    assert n_changed > 9000


def test_a_damaged_file_is_named_with_tensor_and_chunk(coded, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(coded, folder)
    name = "model.layers.0.mlp.up_proj.weight"
    entry = read_header(folder / "model.safetensors").entries[f"{name}.rans32.words"]
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[entry.begin + 50] ^= 8
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"safetensors: {name}: chunk \d+ of \d+: "):
        load(folder, device="cpu")
    with pytest.raises(
        CheckpointError, match=rf"{name}: chunk \d+ of \d+: .*fetch or quantize again"
    ):
        load(folder, device="cpu", verify=False)
    with pytest.raises(CheckpointError, match=rf"{name}: chunk \d+ of \d+: "):
        export(folder, tmp_path / "dense", "dense")
    assert not (tmp_path / "dense" / "config.json").exists()


# --- bad input ----------------------------------------------------------------------------------------


def test_bad_targets_and_folders(coded, tmp_path):
    with pytest.raises(RecipeError, match=r"--to must be one of dense, dfloat11; got 'dens'"):
        export(coded, tmp_path / "x", "dens")
    with pytest.raises(RecipeError, match=r"so it is not coded"):
        export(bundled_model(), tmp_path / "x", "dense")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"exists and is not empty"):
        export(coded, tmp_path / "taken", "dense")
    quantize(bundled_model(), tmp_path / "w4", recipe="w4a16-rtn")
    with pytest.raises(RecipeError, match=r"holds 42 quantized weights .* not built yet"):
        export(tmp_path / "w4", tmp_path / "x", "dense")
    assert not (tmp_path / "x").exists()


def test_out_inside_the_checkpoint_is_refused(coded, tmp_path):
    with pytest.raises(CheckpointError, match=r"lies inside the checkpoint"):
        export(coded, coded / "sub", "dense")
    assert not (coded / "sub").exists()


def test_a_source_with_the_name_of_a_plane_is_refused(tmp_path):
    tensors = {"x.rans32.head": torch.zeros(3), "y": torch.zeros(3)}
    (tmp_path / "src").mkdir()
    save_file(tensors, tmp_path / "src" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'x\.rans32\.head' has the name of a coded tensor"):
        quantize(tmp_path / "src", tmp_path / "out", recipe="lossless")
    assert not (tmp_path / "out").exists()


def test_bad_settings(tmp_path):
    with pytest.raises(RecipeError, match=r"resident must be one of decoded, coded.*got 'code'"):
        quantize(bundled_model(), tmp_path / "x", recipe="lossless", settings=["resident=code"])
    with pytest.raises(RecipeError, match=r"'lossless' must be a bool"):
        quantize(bundled_model(), tmp_path / "x", recipe="w8a16", settings=["lossless=1"])
    with pytest.raises(RecipeError, match=r"add lossless = true"):
        quantize(bundled_model(), tmp_path / "x", recipe="w8a16", settings=["resident=coded"])


def test_names_that_lead_out_of_the_folder_are_refused(coded, tmp_path):
    from fewbit.export.to_dense import write_originals
    from fewbit.quant.stored import open_stored

    stored = open_stored(coded)
    shards = {"../evil.safetensors": next(iter(stored.manifest["original"]["shards"].values()))}
    manifest = {**stored.manifest, "original": {"texts": {}, "shards": shards}}
    with pytest.raises(CheckpointError, match=r"no file below the output folder"):
        write_originals(coded, stored.headers, stored.contents(), manifest, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_interrupted_export_goes_on(coded, tmp_path, monkeypatch):
    from fewbit.export import to_dense

    plain = to_dense.write_atomic

    def fail(path, data):
        if path.name == "config.json":
            raise KeyboardInterrupt
        plain(path, data)

    monkeypatch.setattr(to_dense, "write_atomic", fail)
    with pytest.raises(KeyboardInterrupt):
        export(coded, tmp_path / "dense", "dense")
    assert not (tmp_path / "dense" / "config.json").exists()
    monkeypatch.undo()
    before = (tmp_path / "dense" / "model.safetensors").stat().st_mtime_ns
    export(coded, tmp_path / "dense", "dense")
    assert (tmp_path / "dense" / "model.safetensors").stat().st_mtime_ns == before
    assert_same_files(tmp_path / "dense", bundled_model())
