"""Coded tensors in files: found by name, described by their heads, read as if they were plain."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.export.coded_files import (
    DecodedTensors,
    logical_name,
    split_name,
    stored_tensors,
)
from fewbit.export.safetensors_file import read_header
from fewbit.export.shards import UnitPlan
from fewbit.export.writer import CheckpointWriter
from fewbit.quant.errors import CheckpointError
from fewbit.quant.format import PartSpec


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": (torch.randn(128, 512, generator=generator) * 0.02).bfloat16(),
        "b.weight": (torch.randn(70, 300, generator=generator) * 0.02).half(),
        "norm": torch.ones(64).bfloat16(),
    }


@pytest.fixture
def path(tensors, tmp_path):
    plan = UnitPlan("u", {n: PartSpec(t.dtype, tuple(t.shape)) for n, t in tensors.items()})
    writer = CheckpointWriter(tmp_path, [plan], {"seed": 0}, 1 << 30, lossless=True)
    writer.open()
    writer.write_unit(((name, [value]) for name, value in tensors.items()), [])
    writer.finish()
    return tmp_path / "model.safetensors"


def test_names():
    assert split_name("a.b.weight.rans32.words") == ("a.b.weight", "rans32", "words")
    assert split_name("a.codes.dictionary.row_off") == ("a.codes", "dictionary", "row_off")
    assert logical_name("a.codes.dictionary.head") == "a.codes"
    assert logical_name("a.codes") == "a.codes"
    for plain in ("a.weight", "rans32.words", ".rans32.words", "a.rans32.other", "a.words"):
        assert split_name(plain) is None


def test_contents(path, tensors):
    headers = (read_header(path),)
    stored = stored_tensors(headers)
    assert stored.keys() == tensors.keys()
    found = DecodedTensors(headers, stored)
    assert len(found) == 3
    for name, value in tensors.items():
        assert (stored[name].dtype, stored[name].shape) == (value.dtype, tuple(value.shape))
        assert stored[name].coded == (name != "norm")
        assert torch.equal(found[name], value)
    assert stored["a.weight"].n_bytes < 0.7 * 2 * 128 * 512
    total = sum(entry.end - entry.begin for entry in headers[0].entries.values())
    assert sum(tensor.n_bytes for tensor in stored.values()) == total


def test_a_missing_plane_is_named(path):
    raw = load_file(path)
    del raw["a.weight.rans32.index"]
    save_file(raw, path)
    with pytest.raises(CheckpointError, match=r"a\.weight\.rans32\.index is missing"):
        stored_tensors((read_header(path),))


def test_a_plane_of_another_dtype_is_named(path):
    raw = load_file(path)
    raw["a.weight.rans32.crc"] = raw["a.weight.rans32.crc"].view(torch.int32)
    save_file(raw, path)
    with pytest.raises(
        CheckpointError, match=r"a\.weight\.rans32\.crc must be uint8 with one axis"
    ):
        stored_tensors((read_header(path),))


def test_plain_and_coded_at_once(path):
    raw = load_file(path)
    raw["a.weight"] = torch.zeros(2, 2)
    save_file(raw, path)
    with pytest.raises(CheckpointError, match=r"a\.weight is stored twice, plainly or coded"):
        stored_tensors((read_header(path),))


def test_a_damaged_head_names_file_and_tensor(path):
    raw = load_file(path)
    raw["a.weight.rans32.head"][9] ^= 4
    save_file(raw, path)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: a\.weight: the head's checksum"
    ):
        stored_tensors((read_header(path),))
