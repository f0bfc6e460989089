"""A folder in the published layout: names, patterns, what stays dense, and what is refused."""

import json
import re
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dfloat11_oracle import kernel
from safetensors.torch import load_file

from fewbit.export import to_dfloat11
from fewbit.export.checkpoint import Checkpoint
from fewbit.export.decode import TensorInfo
from fewbit.export.dfloat11 import CODED
from fewbit.export.journal import Journal
from fewbit.export.to_dfloat11 import write_dfloat11
from fewbit.quant.errors import CheckpointError

BUNDLED = Path(str(files("fewbit.quant"))) / "data" / "tiny-llama"
LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def source(tensors, config=None, extra_files=()):
    """Anything with tensors, config, extra_files and read is a source."""
    infos = {
        name: TensorInfo(name, tuple(t.shape), t.dtype, t.nbytes, "plain")
        for name, t in tensors.items()
    }

    def read(name, start=0, stop=None):
        return tensors[name][start:stop] if tensors[name].ndim else tensors[name]

    return SimpleNamespace(tensors=infos, config=config or {}, extra_files=extra_files, read=read)


def random(*shape, dtype=torch.bfloat16):
    return (torch.randn(*shape) * 0.02).to(dtype)


def small(attributes=LLAMA, n_layers=2, prefix="model.layers", ends=True):
    """Tensors in the order of a file: names sorted, norms and a bias among them."""
    torch.manual_seed(0)
    tensors = {}
    for layer in range(n_layers):
        for attribute in attributes:
            tensors[f"{prefix}.{layer}.{attribute}.weight"] = random(24, 16)
        tensors[f"{prefix}.{layer}.input_layernorm.weight"] = torch.ones(16).bfloat16()
        tensors[f"{prefix}.{layer}.self_attn.q_proj.bias"] = random(24)
    tensors["model.norm.weight"] = torch.ones(16).bfloat16()
    if ends:
        tensors["model.embed_tokens.weight"] = random(50, 16)
        tensors["lm_head.weight"] = random(50, 16)
    return dict(sorted(tensors.items()))


def bits(tensor):
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16).reshape(-1)


def test_the_bundled_model(tmp_path):
    found = Checkpoint.open(BUNDLED)
    steps = []
    summary = write_dfloat11(found, tmp_path / "out", lambda *step: steps.append(step))
    out = tmp_path / "out"
    layers = [f"model_layers_{layer}.safetensors" for layer in range(6)]
    weights = [
        "lm_head.safetensors",
        "model_embed_tokens.safetensors",
        *layers,
        "model.safetensors",
    ]
    others = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in out.iterdir()) == sorted(weights + others)
    assert steps == [(name, done, 9) for done, name in enumerate(weights, 1)]
    config = json.loads((out / "config.json").read_text())
    assert config.pop("dfloat11_config") == {
        "version": "0.5.0",
        "threads_per_block": [512],
        "bytes_per_thread": 8,
        "pattern_dict": {
            "lm_head": [],
            r"model\.embed_tokens": [],
            r"model\.layers\.\d+": list(LLAMA),
        },
    }
    assert config == found.config
    assert (summary.coded_units, summary.raw_units, summary.dropped) == (8, {}, ())
    assert summary.coded_elements == 6_815_744
    assert 10.8 < summary.bits_per_weight < 10.9, "published on a real layer: 10.873"
    assert summary.stored_bytes == sum((out / name).stat().st_size for name in weights)
    assert summary.stored_bytes < 0.68 * summary.source_bytes
    norms = [f"model.layers.3.{kind}_layernorm.weight" for kind in ("input", "post_attention")]
    loaded = load_file(out / "model_layers_3.safetensors")
    for name in norms:
        assert torch.equal(loaded[name], found.read(name))
    parts = {name.removeprefix("model.layers.3."): loaded[name] for name in loaded}
    parts = {name: part.numpy() for name, part in parts.items() if not name.endswith("norm.weight")}
    assert sorted(parts) == sorted(CODED)
    expected = [bits(found.read(f"model.layers.3.{path}.weight")) for path in LLAMA]
    assert np.array_equal(kernel(parts), np.concatenate(expected))
    sizes = np.cumsum([len(part) for part in expected])
    assert parts["split_positions"].tolist() == sizes[:-1].tolist()
    assert list(load_file(out / "model.safetensors")) == ["model.norm.weight"]


# --- head and embedding ---------------------------------------------------------------------------


def test_tied_embeddings_stay_dense_and_the_head_is_not_stored(tmp_path):
    """A decoder that takes a tied embedding's weight away would leave the head without one."""
    tensors = small()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    summary = write_dfloat11(source(tensors, {"tie_word_embeddings": True}), tmp_path / "out")
    assert summary.dropped == ("lm_head.weight",)
    rest = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(rest) == ["model.embed_tokens.weight", "model.norm.weight"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(config["dfloat11_config"]["pattern_dict"]) == [r"model\.layers\.\d+"]


# --- what stays dense -----------------------------------------------------------------------------


def test_a_unit_with_huge_values_stays_dense_and_is_named(tmp_path):
    tensors = small()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 2.0**113
    tensors["lm_head.weight"][0, 0] = float("nan")
    summary = write_dfloat11(source(tensors), tmp_path / "out")
    assert set(summary.raw_units) == {"model.layers.1", "lm_head"}
    assert (
        "1 values have an exponent of 240 or more (the largest: 240"
        in (summary.raw_units["model.layers.1"])
    )
    assert summary.coded_units == 2
    stored = load_file(tmp_path / "out" / "model_layers_1.safetensors")
    expected = {name: t for name, t in tensors.items() if name.startswith("model.layers.1.")}
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(stored[name].view(torch.int16), tensor.view(torch.int16)), name


def test_a_unit_that_needs_too_much_shared_memory_stays_dense(tmp_path):
    """One-bit codes: 32,768 elements a block."""
    tensors = small(("self_attn.q_proj",), ends=False)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(200, 200).bfloat16()
    summary = write_dfloat11(source(tensors), tmp_path / "out")
    assert list(summary.raw_units) == ["model.layers.0"]
    assert (
        "holds 32768 elements, for which the published decoder needs 67588 bytes"
        in (summary.raw_units["model.layers.0"])
    )


def test_other_dtypes_stay_as_they_are_outside_of_units(tmp_path):
    tensors = small()
    tensors["model.layers.0.input_layernorm.weight"] = torch.rand(16)
    tensors["model.norm.weight"] = torch.tensor(3.5, dtype=torch.float64)
    tensors["model.layers.0.steps"] = torch.arange(3)
    write_dfloat11(source(tensors), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model_layers_0.safetensors")
    for name in ("model.layers.0.input_layernorm.weight", "model.layers.0.steps"):
        assert (
            torch.equal(stored[name], tensors[name]) and stored[name].dtype == tensors[name].dtype
        )
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].item() == 3.5


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float16, "float16"), (torch.float32, "float32")]
)
def test_other_dtypes_of_weights_are_refused_by_name(tmp_path, dtype, name):
    tensors = small()
    changed = "model.layers.1.mlp.down_proj.weight"
    tensors[changed] = tensors[changed].to(dtype)
    message = rf"{re.escape(changed)} is {name} \(1 of 16 weights are not bf16\)"
    with pytest.raises(CheckpointError, match=message):
        write_dfloat11(source(tensors), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- files ----------------------------------------------------------------------------------------


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    write_dfloat11(source(small()), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(
        CheckpointError, match="exists and is not empty; choose another output folder"
    ):
        write_dfloat11(source(small()), tmp_path / "out")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; the output must be a folder"):
        write_dfloat11(source(small()), tmp_path / "file")


def test_a_failure_leaves_whole_files_and_no_config(tmp_path):
    """The source breaks off while a layer's norm is read, behind its unit."""
    found = source(small())
    read = found.read

    def breaks_off(name, *rows):
        if name == "model.layers.1.input_layernorm.weight":
            raise CheckpointError("the source is gone")
        return read(name, *rows)

    found.read = breaks_off
    with pytest.raises(CheckpointError, match="the source is gone"):
        write_dfloat11(found, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("*[!l]"))
    assert names == [
        "lm_head.safetensors", "model_embed_tokens.safetensors", "model_layers_0.safetensors",
    ]  # fmt: skip
    for name in names:
        load_file(tmp_path / "out" / name)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stopped_at(found, name, n_reads):
    """The same source, interrupted at the n-th reading of a tensor."""
    left = n_reads

    def read(asked, *rows):
        nonlocal left
        left -= asked == name
        if left == 0:
            raise KeyboardInterrupt
        reads.append(asked)
        return found.read(asked, *rows)

    reads = []
    return SimpleNamespace(**vars(found) | {"read": read}), reads


@pytest.mark.parametrize("n_reads", [1, 2, 3])
def test_an_interrupted_export_goes_on(tmp_path, n_reads):
    """Interrupted while the second layer is counted, coded or compared."""
    found = source(small())
    whole = write_dfloat11(found, tmp_path / "whole")
    name = "model.layers.1.mlp.gate_proj.weight"
    stopped, _ = stopped_at(found, name, n_reads)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_dfloat11(stopped, out)
    assert sorted(contents(out)) == [
        "fewbit.journal", "lm_head.safetensors", "model_embed_tokens.safetensors",
        "model_layers_0.safetensors",
    ]  # fmt: skip
    before = (out / "model_layers_0.safetensors").stat().st_ino
    again, reads = stopped_at(found, "", 1)
    assert write_dfloat11(again, out) == whole
    assert not any("layers.0" in asked for asked in reads) and reads.count(name) == 3
    assert (out / "model_layers_0.safetensors").stat().st_ino == before
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_file_that_is_gone_or_short_is_written_again(tmp_path):
    found = source(small())
    write_dfloat11(found, tmp_path / "whole")
    stopped, _ = stopped_at(found, "model.norm.weight", 1)
    with pytest.raises(KeyboardInterrupt):
        write_dfloat11(stopped, tmp_path / "out")
    (tmp_path / "out" / "lm_head.safetensors").unlink()
    with open(tmp_path / "out" / "model_layers_0.safetensors", "r+b") as file:
        file.truncate(100)
    write_dfloat11(found, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_unfinished_export_of_something_else_is_refused(tmp_path):
    stopped, _ = stopped_at(source(small()), "model.norm.weight", 1)
    with pytest.raises(KeyboardInterrupt):
        write_dfloat11(stopped, tmp_path / "out", identity="a")
    before = contents(tmp_path / "out")
    for other, identity in [(source(small()), "b"), (source(small(n_layers=3)), "a")]:
        with pytest.raises(CheckpointError, match="unfinished run of something else"):
            write_dfloat11(other, tmp_path / "out", identity=identity)
    assert contents(tmp_path / "out") == before


def test_two_processes_in_one_folder(tmp_path):
    (tmp_path / "out").mkdir()
    first = Journal(tmp_path / "out" / "fewbit.journal")
    first.open()
    with pytest.raises(CheckpointError, match="another fewbit process"):
        write_dfloat11(source(small()), tmp_path / "out")
    first.close()
    write_dfloat11(source(small()), tmp_path / "out")


def test_weights_are_read_in_slabs(tmp_path, monkeypatch):
    """Whatever the slabs, the files are the same; none is larger than a band of rows needs."""
    tensors = small(n_layers=1)
    tensors["model.layers.0.mlp.up_proj.weight"] = random(1000, 16)
    found = source(tensors)
    write_dfloat11(found, tmp_path / "whole")
    sizes = []
    read = found.read

    def counted(name, start=0, stop=None):
        sizes.append(stop - start)
        return read(name, start, stop)

    found.read = counted
    monkeypatch.setattr(to_dfloat11, "SLAB_BYTES", 128 * 32)
    write_dfloat11(found, tmp_path / "out")
    assert max(sizes) == 128 and sizes.count(128) == 3 * 7
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_difference_is_found_before_the_file_gets_its_name(tmp_path, monkeypatch):
    """A bit that goes wrong on its way to the disk."""
    write_at = to_dfloat11._write_at

    def wrong(handle, data, at):
        data = bytearray(data)
        if len(data) == 24 * 16:  # signs and mantissas of one slab
            data[100] ^= 1
        write_at(handle, bytes(data), at)

    monkeypatch.setattr(to_dfloat11, "_write_at", wrong)
    with pytest.raises(CheckpointError, match="did not give the same bits"):
        write_dfloat11(source(small()), tmp_path / "out")
    assert not list((tmp_path / "out").glob("model_layers*"))


def test_other_encodings_of_the_source_leave_the_config(tmp_path):
    """Tensors of an FP8 source arrive decoded, so that its quantization_config is no longer true."""
    config = {
        "model_type": "llama",
        "quantization_config": {"quant_method": "fp8"},
        "dfloat11_config": 3,
    }
    write_dfloat11(source(small(), config), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["dfloat11_config"]["bytes_per_thread"] == 8
    assert found.keys() == {"model_type", "dfloat11_config"}
