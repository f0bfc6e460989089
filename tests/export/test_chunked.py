"""Chunks on their way to a file: checked against the plan, and readable twice."""

import pytest
import torch

from fewbit.export import chunked
from fewbit.export.chunked import bytes_of, checked, crc32c, repeatable
from fewbit.quant.errors import CheckpointError
from fewbit.quant.format import PartSpec

SPEC = PartSpec(torch.float32, (4, 3))


def rows():
    return [torch.arange(6.0).view(2, 3), torch.arange(6.0, 12.0).view(2, 3)]


def read(chunks):
    return torch.cat([chunk.flatten() for chunk in chunks])


def test_crc32c_is_the_castagnoli_checksum_of_row_major_bytes():
    digits = torch.tensor(list(b"123456789"), dtype=torch.uint8)
    assert crc32c(digits) == "e3069283"  # the published check value
    square = torch.arange(4.0).view(2, 2)
    assert crc32c(square.mT) == crc32c(square.mT.contiguous()) != crc32c(square)
    assert bytes_of(square).shape == (16,)


def test_what_can_be_read_again_stays_so():
    chunks = checked("w", rows(), SPEC)
    assert torch.equal(read(chunks), read(chunks))
    assert torch.equal(read(chunks), torch.arange(12.0))


@pytest.mark.parametrize("kept", [0, 1 << 20], ids=["in a file", "in memory"])
def test_what_can_be_read_once_is_kept(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(chunked, "KEPT_BYTES", kept or 8)
    chunks = repeatable(checked("w", iter(rows()), SPEC), SPEC, tmp_path)
    assert torch.equal(read(chunks), torch.arange(12.0))
    assert torch.equal(read(chunks), torch.arange(12.0))
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_another_dtype_or_size_is_named():
    with pytest.raises(
        CheckpointError, match=r"w: planned torch\.float32, computed torch\.float16"
    ):
        read(checked("w", [rows()[0].half()], SPEC))
    with pytest.raises(CheckpointError, match=r"w: planned 48 bytes, computed 24"):
        read(checked("w", rows()[:1], SPEC))
