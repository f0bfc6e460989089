"""Checkpoints as headers describe them, and every way in which a folder is not one of ours."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.export.metadata import (
    MANIFEST,
    ModuleSpec,
    QuantizationConfig,
    build_quantization_config,
)
from fewbit.quant.errors import CheckpointError
from fewbit.quant.format import find_format
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.pipeline import quantize
from fewbit.quant.stored import open_stored, part_owner
from tiny_models import save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    quantize(save("llama", folder / "source"), folder / "out", recipe="w8a16")
    return folder / "out"


@pytest.fixture
def copy(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_by_hand(folder, modules, dense):
    """A checkpoint without manifest; modules: name -> (spec, parts of each term)."""
    folder.mkdir()
    tensors = dict(dense)
    for name, (_, terms) in modules.items():
        for index, parts in enumerate(terms):
            prefix = f"{name}.term{index}." if index else f"{name}."
            tensors.update({prefix + part: tensor for part, tensor in parts.items()})
    specs = {name: spec for name, (spec, _) in modules.items()}
    config = {"quantization_config": build_quantization_config("by hand", specs)}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def parts_of(weight, options):
    store = find_format("int_group")
    k = weight.shape[-1]
    padded = torch.nn.functional.pad(weight, (0, store.padded_k(k, options) - k))
    scales = store.fit(padded, options)
    return store.pack(store.round(padded, scales, 0, options)[0], scales, options)


def test_modules_and_dense_tensors(checkpoint):
    stored = open_stored(checkpoint)
    assert len(stored.modules) == 14  # seven linear layers in each of two decoder layers
    module = stored.modules["model.layers.1.mlp.down_proj"]
    assert module.shape == (64, 96)
    assert module.parts["codes"] == "model.layers.1.mlp.down_proj.codes"
    assert module.n_bytes == 64 * 96 + 64 * 2
    assert module.bits_per_weight == pytest.approx(8 + 16 / 96)
    assert "lm_head.weight" in stored.dense() and not set(stored.dense()) & set(
        module.parts.values()
    )
    assert len(stored.dense()) + 2 * 14 == len(stored.tensors)


def test_the_manifest_is_not_needed_for_shapes(copy):
    with_manifest = open_stored(copy)
    (copy / MANIFEST).unlink()
    without = open_stored(copy)
    assert without.manifest is None
    assert {n: m.shape for n, m in without.modules.items()} == {
        n: m.shape for n, m in with_manifest.modules.items()
    }


def test_columns_and_further_terms(tmp_path):
    first, second = IntGroupOptions(bits=4, group=32), IntGroupOptions(bits=2, group=16)
    weight = torch.randn(6, 40)
    spec = ModuleSpec((("int_group", first), ("int_group", second)), columns=40)
    terms = [parts_of(weight, first), parts_of(weight / 16, second)]
    dense = {"norm.weight": torch.ones(3), "x.term1.weight": torch.ones(2)}
    stored = open_stored(write_by_hand(tmp_path / "out", {"a.b": (spec, terms)}, dense))
    (module,) = stored.modules.values()
    assert module.shape == (6, 40)
    assert set(module.parts) == {"codes", "scale_group", "term1.codes", "term1.scale_group"}
    assert module.n_bytes == 6 * (64 // 2 + 2 * 2) + 6 * (48 // 4 + 2 * 3)
    assert set(stored.dense()) == set(dense)


def test_part_owner_follows_the_spec():
    options = IntGroupOptions()
    spec = ModuleSpec((("int_group", options),))
    config = QuantizationConfig("r", spec, {}, ())
    assert part_owner("a.b.codes", config) == ("a.b", "codes")
    assert part_owner("a.term1.codes", config) == ("a.term1", "codes")  # there is no second term
    for name in ("a.b.zero_group", "codes", "a.b.weight", "a.b.codes.x"):
        assert part_owner(name, config) is None, name
    asymmetric = replace(spec, terms=(("int_group", IntGroupOptions(symmetric=False)),) * 2)
    config = QuantizationConfig("r", asymmetric, {}, ())
    assert part_owner("a.b.term1.zero_group", config) == ("a.b", "term1.zero_group")


def refuse(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        open_stored(folder)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_not_a_folder_of_ours(copy, tmp_path):
    refuse(tmp_path / "absent", "absent does not exist")
    refuse(copy / "model.safetensors", "is a file")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "has no config.json", "fewbit quantize")
    (tmp_path / "empty" / "fewbit.journal").touch()
    refuse(tmp_path / "empty", "unfinished", "same quantize command again")


def test_of_another_kind(copy, tmp_path):
    refuse(save("llama", tmp_path / "dense"), "unquantized", "'llama'", "fewbit quantize")
    edit_config(copy, lambda c: c["quantization_config"].update(quant_method="gptq"))
    refuse(copy, "quant_method 'gptq'", "fewbit quantize")
    edit_config(copy, lambda c: c.update(quantization_config=[]))
    refuse(copy, "not one of fewbit's")


def test_of_a_newer_version(copy):
    edit_config(copy, lambda c: c["quantization_config"].update(version=7))
    refuse(copy, "version 7", "reads up to 1", "pip install -U fewbit")
    edit_config(copy, lambda c: c["quantization_config"].update(version=1, sparsity=2))
    refuse(copy, "sparsity")


def test_config_that_is_no_json(copy):
    (copy / "config.json").write_bytes(b'{"model_type": "lla')
    refuse(copy, "config.json", "not valid JSON")
    (copy / "config.json").write_bytes(b"[]")
    refuse(copy, "config.json", "list")


def test_a_missing_part_is_named(copy):
    edit_tensors(copy, lambda t: t.pop("model.layers.0.mlp.up_proj.scale_group"))
    refuse(copy, "model.layers.0.mlp.up_proj.scale_group is missing")
    edit_tensors(copy, lambda t: t.pop("model.layers.0.mlp.up_proj.codes"))
    refuse(copy, "no part of quantized module model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_part_of_another_shape_or_dtype_is_named(copy, with_manifest):
    name = "model.layers.0.mlp.up_proj.scale_group"
    if not with_manifest:
        (copy / MANIFEST).unlink()
    edit_tensors(copy, lambda t: t.update({name: t[name].bfloat16()}))
    refuse(copy, name, "torch.float16 [96, 1]", "torch.bfloat16")
    edit_tensors(copy, lambda t: t.update({name: t[name].half()[:-1]}))
    refuse(copy, name, "[95, 1]")


def shard(folder):
    """Split into two files with an index, as published files are."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards_and_their_index(copy):
    expected = open_stored(copy).modules
    index = shard(copy)
    found = open_stored(copy)
    assert found.modules == expected and len(found.headers) == 2
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "model-00002-of-00002.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(copy, first, "model-00001-of-00002.safetensors")
    (copy / "model-00002-of-00002.safetensors").unlink()
    refuse(copy, "model-00002-of-00002.safetensors", "missing")


def test_no_weights_at_all(copy):
    (copy / "model.safetensors").unlink()
    refuse(copy, "neither model.safetensors nor", "weights are missing")


def test_a_tensor_in_two_files(copy):
    index = shard(copy)
    second = copy / "model-00002-of-00002.safetensors"
    name = next(k for k, v in index["weight_map"].items() if v.startswith("model-00001"))
    save_file({**load_file(second), name: torch.zeros(1)}, second)
    refuse(copy, name, "in another file")


def test_nothing_quantized_is_ours_by_its_manifest(tmp_path):
    quantize(save("llama", tmp_path / "source"), tmp_path / "out", recipe="identity")
    stored = open_stored(tmp_path / "out")
    assert stored.quantization is None and not stored.modules and len(stored.dense()) > 10
