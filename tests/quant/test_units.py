"""Data-free units: slabs give the bytes of the whole, and no more than a slab is ever read."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fewbit.calibrate.edits import EditedSource
from fewbit.calibrate.protocol import plan_passes
from fewbit.quant import units
from fewbit.quant.block import Block
from fewbit.quant.errors import FormatError
from fewbit.quant.format import dequantize
from fewbit.quant.layout import plan_tensors, unit_of
from fewbit.quant.recipe import load_recipe
from fewbit.quant.transform import Transformed
from fewbit.quant.units import (
    SLAB_BYTES,
    DataFreeUnits,
    Job,
    make_weight,
    packed_of,
    report_row,
    squared_error,
)


@dataclass(frozen=True)
class Info:
    shape: tuple[int, ...]
    dtype: torch.dtype
    n_bytes: int


class MemoryCheckpoint:
    """Tensors in memory behind the interface of a checkpoint; notes how much is read at once."""

    def __init__(self, tensors, config=None):
        self._values = tensors
        self.config = config or {}
        self.tensors = {
            key: Info(tuple(t.shape), t.dtype, t.numel() * t.element_size())
            for key, t in tensors.items()
        }
        self.reads = []

    def read(self, name, start=0, stop=None):
        value = self._values[name]
        value = value if value.dim() == 0 else value[start:stop]
        self.reads.append((name, value.numel() * value.element_size()))
        return value.clone()


def job_of(checkpoint, recipe="w4a16-rtn", settings=()):
    loaded = load_recipe(recipe, settings)
    steps = plan_passes([(use.name, use.keys) for use in loaded.passes])
    plan = plan_tensors(loaded, checkpoint.config, checkpoint.tensors)
    cpu, model = torch.device("cpu"), Transformed(EditedSource(checkpoint), checkpoint.config)
    return Job(checkpoint, loaded, steps.passes, plan, Path("unused"), 0, cpu, None, (), model, "")


def stored(job):
    """Everything that the units of a job yield: {name: tensor}, and the report rows."""
    source, found, rows = DataFreeUnits(job), {}, []
    for index, (name, keys) in enumerate(source.members):
        planned = unit_of(name, keys, job.plan).tensors
        given = {n: torch.cat(c) if len(c := list(chunks)) > 1 else c[0]
                 for n, chunks in source.tensors(index, rows)}  # fmt: skip
        assert list(given) == list(planned)
        for part, spec in planned.items():
            assert (given[part].dtype, tuple(given[part].shape)) == (spec.dtype, spec.shape), part
        found.update(given)
    return found, rows


def mixed(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.0.up.weight": torch.randn(300, 160, generator=generator).bfloat16(),
        "layers.0.up.bias": torch.randn(300, generator=generator),
        "layers.0.mlp.experts.gate_up_proj": torch.randn(5, 48, 64, generator=generator),
        "counts": torch.arange(7),
        "scalar": torch.tensor(2.5),
        "nothing": torch.empty(0, 4),
        "void": torch.empty(3, 0),
        "flags": torch.tensor([True, False]),
    }


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
@pytest.mark.parametrize("slab", [1, 1000, 33_333])
def test_slabs_give_the_bytes_of_the_whole(monkeypatch, model_type, slab):
    checkpoint = MemoryCheckpoint(mixed(), {"model_type": model_type})
    whole, whole_rows = stored(job_of(checkpoint))
    monkeypatch.setattr(units, "SLAB_BYTES", slab)
    cut, rows = stored(job_of(checkpoint))
    assert cut.keys() == whole.keys()
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    for row, other in zip(rows, whole_rows, strict=True):
        assert row["relative_error"] == pytest.approx(other["relative_error"], rel=1e-5)


def test_kept_tensors_are_copied_bit_for_bit():
    tensors = mixed()
    found, rows = stored(job_of(MemoryCheckpoint(tensors)))
    kept = [name for name in tensors if name in found]
    assert len(kept) == 6
    assert all(torch.equal(found[name], tensors[name]) for name in kept)
    assert all(found[name].dtype == tensors[name].dtype for name in kept)
    assert [row["name"] for row in rows] == ["layers.0.up", "layers.0.mlp.experts.gate_up_proj"]


def test_a_large_tensor_is_never_read_whole():
    rows, columns = 3 * SLAB_BYTES // (2 * 1024), 1024  # three slabs of bf16
    weight = torch.zeros(1, columns, dtype=torch.bfloat16).expand(rows, columns)
    checkpoint = MemoryCheckpoint({"a.weight": weight, "embed.weight": weight})
    job = job_of(checkpoint)
    source = DataFreeUnits(job)
    for index in range(len(source.members)):
        for _, chunks in source.tensors(index, []):
            for _ in chunks:
                pass
    assert max(size for _, size in checkpoint.reads) <= SLAB_BYTES
    for name in ("a.weight", "embed.weight"):
        assert sum(size for read, size in checkpoint.reads if read == name) == rows * columns * 2


def test_codes_are_handed_on_slab_by_slab(monkeypatch):
    monkeypatch.setattr(units, "SLAB_BYTES", 3 * 64 * 64 * 4)
    stack = torch.randn(30, 64, 64, generator=torch.Generator().manual_seed(0))
    checkpoint = MemoryCheckpoint({"x.experts.w": stack})
    source = DataFreeUnits(job_of(checkpoint))
    _, chunks = next(source.tensors(0, []))
    assert checkpoint.reads == []
    for index, chunk in enumerate(chunks):
        assert chunk.shape[0] == 3
        assert len(checkpoint.reads) == index + 1
    assert index == 9


def test_rows_of_the_report_hold_what_was_stored():
    tensors = mixed()
    job = job_of(MemoryCheckpoint(tensors), settings=["weights.symmetric=false"])
    found, rows = stored(job)
    for row in rows:
        tensor = next(item for item in job.plan.values() if item.module == row["name"])
        parts = {name: part for name, part in found.items() if name.startswith(row["name"] + ".")}
        assert row["n_bytes"] == sum(part.numel() * part.element_size() for name, part in
                                     parts.items() if name in tensor.specs())  # fmt: skip
        assert row["n_weights"] == math.prod(tensor.shape)
        assert row["bits_per_weight"] == 8 * row["n_bytes"] / row["n_weights"]
        assert row["options"]["symmetric"] is False
        assert row["fallbacks"] == [] and row["output_error"] is None


@pytest.mark.parametrize("shape", [(37, 80), (3, 10, 48)])
def test_squared_error_is_that_of_the_stored_weight(shape):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    key = "x.experts.w" if len(shape) == 3 else "x.weight"
    job = job_of(MemoryCheckpoint({key: value}))
    weight = make_weight(job.plan[key], value)
    for item in job.passes:
        item.step.run(Block("b", [weight]), {}, item.options)
    packed = packed_of(weight)
    error, energy = squared_error(value, packed)
    assert error == pytest.approx(float((value - dequantize(packed)).square().sum()), rel=1e-5)
    assert energy == pytest.approx(float(value.square().sum()), rel=1e-5)
    assert 0.05 < (error / energy) ** 0.5 < 0.12


def test_zeros_have_no_relative_error():
    key = "x.weight"
    job = job_of(MemoryCheckpoint({key: torch.zeros(4, 32)}))
    row = report_row(job.plan[key], "u", 0.0, 0.0, None, [])
    assert row["relative_error"] == 0.0


def test_misuse_is_a_programming_error():
    job = job_of(MemoryCheckpoint({"norm.weight": torch.ones(8), "x.weight": torch.ones(4, 32)}))
    with pytest.raises(RuntimeError, match="not to be quantized"):
        make_weight(job.plan["norm.weight"], torch.ones(8))
    with pytest.raises(RuntimeError, match="no pass has rounded it"):
        packed_of(make_weight(job.plan["x.weight"], torch.ones(4, 32)))


def test_calibrated_is_what_asks_for_statistics():
    job = job_of(MemoryCheckpoint({"x.weight": torch.ones(4, 32)}))
    assert not job.calibrated
    assert replace(job, passes=plan_passes([("gptq", {})]).passes).calibrated
    assert not replace(
        job, passes=plan_passes([("clip_search", {"data_free": True})]).passes
    ).calibrated


def test_a_tensor_that_its_format_refuses_is_named():
    def fail(block, stats, options):
        raise FormatError("a scale overflows fp16")

    job = job_of(MemoryCheckpoint(mixed(), {}))
    step = replace(job.passes[-1].step, run=fail)
    job = replace(job, passes=(replace(job.passes[-1], step=step),))
    name = next(tensor.module for tensor in job.plan.values() if tensor.rule)
    with pytest.raises(FormatError, match=rf"^{re.escape(name)}: a scale overflows fp16$"):
        stored(job)
