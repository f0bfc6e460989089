"""Checksums: what was written passes, and no changed byte does."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.export.metadata import MANIFEST
from fewbit.quant.errors import CheckpointError
from fewbit.quant.load import load
from fewbit.quant.pipeline import quantize
from fewbit.quant.stored import open_stored
from fewbit.quant.verify import header_checksums, verify, verify_checkpoint
from tiny_models import save
from tiny_tokenizer import save_tokenizer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """As our writer leaves it, with a manifest."""
    folder = tmp_path_factory.mktemp("verify")
    source = save("mixtral", folder / "source")
    save_tokenizer(source)
    quantize(source, folder / "out", recipe="w8a16")
    return folder / "out"


@pytest.fixture(scope="module")
def saved(written, tmp_path_factory):
    """As `save_pretrained` leaves it, in two files, with checksums in their headers."""
    folder = tmp_path_factory.mktemp("saved") / "out"
    load(written).save_pretrained(folder, max_shard_size="200KB")
    assert not (folder / MANIFEST).exists()
    assert len(list(folder.glob("*.safetensors"))) >= 2
    return folder


@pytest.fixture
def copy(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "copy"))


def refuse(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(folder)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def flip(path, offset, bit=0):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(bytes(data))


def test_sound_checkpoints_pass(written, saved):
    assert len(verify_checkpoint(written).modules) == 32
    assert len(verify_checkpoint(saved).modules) == 32


@pytest.mark.parametrize("part", ["codes", "scale_group"])
def test_a_flipped_bit_names_the_tensor(copy, part):
    name = f"model.layers.1.block_sparse_moe.experts.2.w3.{part}"
    entry = open_stored(copy).headers[0].entries[name]
    flip(copy / "model.safetensors", entry.end - 1, bit=7)
    refuse(copy, f"tensor {name} has checksum", "model.safetensors")


def test_unquantized_tensors_are_checked_too(copy):
    entry = open_stored(copy).headers[0].entries["model.norm.weight"]
    flip(copy / "model.safetensors", entry.begin)
    refuse(copy, "tensor model.norm.weight")


def test_header_and_size(copy):
    path = copy / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    position = data.index(b"F32", 8, 8 + length)
    flip(path, position, bit=0)  # F32 -> G32
    refuse(copy, "dtype")
    path.write_bytes(data.replace(b'"F32"', b'"I32"', 1))  # same size, sound header
    refuse(copy, "its header has checksum")
    path.write_bytes(data[:-1])
    refuse(copy, "truncated")


def test_small_files(copy):
    verify(open_stored(copy))
    flip(copy / "tokenizer.json", 100)
    refuse(copy, "tokenizer.json", "crc32c")
    verify(open_stored(copy))  # a model is not made of its tokenizer
    (copy / "tokenizer.json").unlink()
    refuse(copy, "tokenizer.json", "cannot read")


def test_an_edited_config(copy):
    path = copy / "config.json"
    original = path.read_text()
    path.write_text(original.replace('"rope_theta": 1000000.0', '"rope_theta": 1000001.0'))
    refuse(copy, "config.json", "sha256", "verify=False")
    config = json.loads(original)
    config["quantization_config"]["recipe"] = "other"
    path.write_text(json.dumps(config))
    refuse(copy, "config.json")


def test_a_damaged_manifest(copy):
    flip(copy / MANIFEST, 500)
    refuse(copy, MANIFEST, "damaged")


def test_without_any_checksums(copy):
    (copy / MANIFEST).unlink()
    refuse(copy, MANIFEST, "carries no checksums", "verify=False")


def test_files_of_another_checkpoint(written, copy, tmp_path):
    quantize(save("mixtral", tmp_path / "other", seed=1), tmp_path / "other_out", recipe="w8a16")
    shutil.copy(tmp_path / "other_out" / "model.safetensors", copy / "model.safetensors")
    refuse(copy, "checksum")
    index = {
        "weight_map": dict.fromkeys(open_stored(copy).tensors, "model-00001-of-00001.safetensors")
    }
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(copy, "model-00001-of-00001.safetensors", "lists ['model.safetensors']")


def test_values_that_the_format_refuses(tmp_path, written):
    """Right checksums do not make a NaN a scale."""
    shutil.copytree(written, tmp_path / "bad")
    tensors = load_file(written / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.scale_group"][3] = torch.nan
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    (tmp_path / "bad" / MANIFEST).unlink()
    sums = header_checksums(tensors, config)
    save_file(tensors, tmp_path / "bad" / "model.safetensors", metadata=sums)
    refuse(tmp_path / "bad", name, "NaN")


def test_header_checksums_cover_dtype_shape_and_config(saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data.replace(b'"U8"', b'"I8"', 1) if b'"U8"' in data else data)
    refuse(folder, "torch.int8")
    folder = Path(shutil.copytree(saved, tmp_path / "second"))
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data.replace(b'"F32","shape":[131,64]', b'"I32","shape":[131,64]', 1))
    refuse(folder, "has checksum")
    folder = Path(shutil.copytree(saved, tmp_path / "third"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["recipe"] = "other"
    (folder / "config.json").write_text(json.dumps(config))
    refuse(folder, "quantization_config differs")


@pytest.mark.parametrize("kind", ["written", "saved"])
def test_random_damage_never_passes(kind, request, tmp_path):
    """Any flipped bit or truncation of what a model is made of: a named error, nothing else."""
    source = request.getfixturevalue(kind)
    generator = random.Random(0)
    names = [
        p.name for p in sorted(source.iterdir()) if "safetensors" in p.name or p.name == MANIFEST
    ]
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    for trial in range(120):
        path = folder / generator.choice(names)
        whole = path.read_bytes()
        # Every other time in the first bytes, where headers are: most of a file is numbers.
        limit = len(whole) if trial % 2 else min(len(whole), 4096)
        position = generator.randrange(limit)
        if trial % 5 == 0:
            path.write_bytes(whole[:position])
        else:
            flip(path, position, generator.randrange(8))
        try:
            verify_checkpoint(folder)
            assert kind == "saved" and _says_the_same(path, whole), (path.name, position)
        except CheckpointError:
            pass
        finally:
            path.write_bytes(whole)


def _says_the_same(path, whole):
    """What no checksum covers without a manifest: the index's totals, and the writer's mark."""
    if path.suffix == ".json":
        return json.loads(path.read_bytes())["weight_map"] == json.loads(whole)["weight_map"]
    headers = [
        data[8 : 8 + int.from_bytes(data[:8], "little")] for data in (path.read_bytes(), whole)
    ]
    first, second = (json.loads(header) for header in headers)
    for header in (first, second):
        header["__metadata__"] = {k: v for k, v in header["__metadata__"].items() if "fewbit" in k}
    return first == second


def test_random_damage_of_the_quantization_config(written, tmp_path):
    folder = Path(shutil.copytree(written, tmp_path / "copy"))
    path = folder / "config.json"
    whole = path.read_bytes()
    generator = random.Random(1)
    start = whole.index(b'"quantization_config"')
    for _ in range(150):
        flip(path, generator.randrange(start, len(whole)), generator.randrange(8))
        with pytest.raises(CheckpointError):
            verify_checkpoint(folder)
        path.write_bytes(whole)
