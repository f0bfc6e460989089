"""Shards and headers are planned: exact for plain tensors, bounds for coded ones."""

import json
import struct

import pytest
import torch

from fewbit.export.shards import (
    Stored,
    UnitPlan,
    header_bytes,
    header_json,
    index_of,
    may_be_coded,
    plan_shards,
    planned_header_bytes,
    shard_names,
)  # fmt: skip
from fewbit.export.writer import CheckpointWriter
from fewbit.quant.format import PartSpec


def unit(name, rows, columns=512):
    return UnitPlan(name, {f"{name}.weight": PartSpec(torch.bfloat16, (rows, columns))})


def test_units_fill_shards_in_order():
    units = [unit("a", 10), unit("b", 10), unit("c", 30), unit("d", 1)]
    assert plan_shards(units, 20 * 1024) == [[0, 1], [2], [3]]
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2)[1] == "model-00002-of-00002.safetensors"


def test_a_header_is_padded_to_its_plan():
    stored = [Stored("w", "BF16", (2, 3), 0, 12, "00000000")]
    data = header_bytes(stored, 100)
    assert struct.unpack("<Q", data[:8])[0] == 100 and len(data) == 108
    assert json.loads(data[8:])["w"] == {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}
    assert len(header_json(stored)) <= 100


def test_small_tensors_and_unknown_dtypes_are_not_tried():
    assert may_be_coded(PartSpec(torch.bfloat16, (32, 32)))
    assert not may_be_coded(PartSpec(torch.bfloat16, (31, 33)))
    assert not may_be_coded(PartSpec(torch.complex128, (64, 64)))


@pytest.mark.parametrize("scale", [1e-3, 0.0], ids=["coded", "constant"])
def test_the_planned_header_holds_whatever_coding_makes(tmp_path, scale):
    units = [unit(f"model.layers.{i}.mlp.up_proj", 64 + i) for i in range(12)]
    writer = CheckpointWriter(tmp_path, units, {"seed": 0}, 1 << 30, lossless=True)
    writer.open()
    for i, plan in enumerate(units):
        value = (torch.randn(64 + i, 512) * scale).bfloat16()
        writer.write_unit([(name, [value]) for name in plan.tensors], [])
    writer.finish()
    planned = planned_header_bytes(units, lossless=True)
    used = len(header_json([item for _, item in writer.stored()]))
    assert used <= planned < 1.2 * used + 8


def test_index():
    stored = [("b", Stored("y", "U8", (4,), 0, 4, "")), ("a", Stored("x", "U8", (2,), 0, 2, ""))]
    assert index_of(stored) == {"metadata": {"total_size": 6}, "weight_map": {"x": "a", "y": "b"}}
