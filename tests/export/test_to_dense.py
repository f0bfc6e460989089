"""Originals are written from headers and slabs of coded tensors."""

import pytest
import torch

from fewbit.export import to_dense
from fewbit.export.coded_files import DecodedTensors, stored_tensors
from fewbit.export.safetensors_file import read_header
from fewbit.export.shards import UnitPlan
from fewbit.export.to_dense import slabs
from fewbit.export.writer import CheckpointWriter
from fewbit.quant.format import PartSpec


@pytest.mark.parametrize("shape", [(256, 512), (5, 64, 256), (70_000,), (300, 33)])
@pytest.mark.parametrize("slab_bytes", [3000, 40_000, 1 << 30])
def test_slabs_make_the_whole(tmp_path, monkeypatch, shape, slab_bytes):
    monkeypatch.setattr(to_dense, "SLAB_BYTES", slab_bytes)
    value = (torch.randn(shape) * 0.02).bfloat16()
    plan = UnitPlan("u", {"w": PartSpec(value.dtype, shape)})
    writer = CheckpointWriter(tmp_path, [plan], {"seed": 0}, 1 << 30, lossless=True)
    writer.open()
    writer.write_unit([("w", [value])], [])
    writer.finish()
    headers = (read_header(tmp_path / "model.safetensors"),)
    found = DecodedTensors(headers, stored_tensors(headers))
    assert found.stored("w").coded
    pieces = list(slabs(found, "w"))
    assert torch.equal(torch.cat(pieces), value)
    assert (len(pieces) > 1) == (2 * value.numel() > 2 * slab_bytes)
