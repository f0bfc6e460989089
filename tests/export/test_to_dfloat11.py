"""A folder in the published layout: names, patterns, what stays dense, and what is refused."""

import json
import re
import weakref
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
from fewbit.export.to_dfloat11 import make_plan, write_dfloat11
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
    return SimpleNamespace(
        tensors=infos, config=config or {}, extra_files=extra_files, read=tensors.__getitem__
    )


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


PHI = ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")


@pytest.mark.parametrize(
    ("attributes", "prefix", "pattern", "expected"),
    [
        (LLAMA, "model.layers", r"model\.layers\.\d+", LLAMA),
        (LLAMA, "language_model.model.layers", r"language_model\.model\.layers\.\d+", LLAMA),
        (PHI, "model.layers", r"model\.layers\.\d+", PHI),
        (("attn.wo", "attn.wqkv", "mlp.w2"), "layers", r"layers\.\d+", None),
        (
            ("mlp.experts.0.up_proj", "mlp.gate", "mlp.experts.1.up_proj", "self_attn.q_norm"),
            "model.layers",
            r"model\.layers\.\d+",
            ("mlp.experts.0.up_proj", "mlp.experts.1.up_proj"),
        ),
    ],
)
def test_patterns_of_architectures(attributes, prefix, pattern, expected):
    """Published order where it is known, else that of the file; routers and norms are no linears."""
    tensors = small(attributes, n_layers=11, prefix=prefix, ends=False)
    plan = make_plan(source(tensors))
    assert plan.pattern_dict == {pattern: list(expected or attributes)}
    assert list(plan.units) == [f"{prefix}.{layer}" for layer in range(11)]
    for module in plan.units:
        assert re.fullmatch(pattern, module)


def test_layers_that_differ_get_patterns_of_their_own():
    tensors = small(("self_attn.q_proj", "mlp.up_proj"), n_layers=3, ends=False)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    plan = make_plan(source(tensors))
    assert plan.pattern_dict == {
        r"model\.layers\.(?:0|2)": ["self_attn.q_proj", "mlp.up_proj"],
        r"model\.layers\.(?:1)": ["self_attn.q_proj"],
    }


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


def test_tied_embeddings_without_a_head():
    tensors = small()
    del tensors["lm_head.weight"]
    plan = make_plan(source(tensors))
    assert plan.files["model"] == ["model.embed_tokens.weight", "model.norm.weight"]


def test_a_tie_that_is_none_is_refused():
    config = {"text_config": {"tie_word_embeddings": True}}
    with pytest.raises(
        CheckpointError, match=r"ties lm_head.weight to model.embed_tokens.weight, but"
    ):
        make_plan(source(small(), config))


def test_minus_zero_is_not_zero_in_a_tie():
    tensors = small()
    tensors["model.embed_tokens.weight"] = torch.zeros(50, 16).bfloat16()
    tensors["lm_head.weight"] = -torch.zeros(50, 16).bfloat16()
    with pytest.raises(CheckpointError, match="but they differ"):
        make_plan(source(tensors, {"tie_word_embeddings": True}))


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


def test_no_layers():
    with pytest.raises(CheckpointError, match="no decoder layers were found"):
        make_plan(source({"h.0.attn.c_attn.weight": random(4, 4)}))


# --- files ----------------------------------------------------------------------------------------


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    write_dfloat11(source(small()), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(
        CheckpointError, match="exists and is not an empty folder; choose a new one"
    ):
        write_dfloat11(source(small()), tmp_path / "out")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not an empty folder"):
        write_dfloat11(source(small()), tmp_path / "file")


def test_a_failure_leaves_whole_files_and_no_config(tmp_path):
    """The source breaks off while a layer's norm is read, behind its unit."""
    found = source(small())
    read = found.read

    def breaks_off(name):
        if name == "model.layers.1.input_layernorm.weight":
            raise CheckpointError("the source is gone")
        return read(name)

    found.read = breaks_off
    with pytest.raises(CheckpointError, match="the source is gone"):
        write_dfloat11(found, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "lm_head.safetensors", "model_embed_tokens.safetensors", "model_layers_0.safetensors",
    ]  # fmt: skip
    for name in names:
        load_file(tmp_path / "out" / name)


def test_one_unit_is_read_at_a_time(tmp_path, monkeypatch):
    """Tensors of the unit before are let go before the next is read."""
    alive, most = 0, 0
    tensors = small(n_layers=4)

    class Counted(np.ndarray):
        pass

    original = to_dfloat11.encode_unit

    def encode(weights):
        nonlocal alive, most
        parts = original(weights)
        alive += 1
        most = max(most, alive)
        counted = parts["sign_mantissa"].view(Counted)
        finalizers.append(weakref.finalize(counted, gone))
        return parts | {"sign_mantissa": counted}

    def gone():
        nonlocal alive
        alive -= 1

    finalizers = []
    monkeypatch.setattr(to_dfloat11, "encode_unit", encode)
    write_dfloat11(source(tensors), tmp_path / "out")
    assert len(finalizers) == 6 and most == 1, most


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
