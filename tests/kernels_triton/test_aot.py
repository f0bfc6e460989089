"""Every config that a plan for a described GPU chooses compiles for it, without a spilled register.

What is shipped is what plans choose without tuning: over the recipes' formats, the layers of an 8B
model (and sizes that no tile divides), every bucket of M, and attention and row-wise functions. Each
compiles for the GPU that would run it, which covers capabilities 8.0, 8.9, 9.0, 10.0 and 12.0.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbit.kernels_triton import _triton
from fewbit.quant.compile_pool import CompileFailure, Job, compile_all
from fewbit.quant.dispatch import explain, kernels
from fewbit.quant.kernel import AnyProblem, AttentionProblem
from fewbit.quant.kernel_report import (
    attention_for,
    parse_layer,
    problem_for,
    recipe_layers,
    rows_for,
)
from fewbit.quant.machine import device_names, load_device

pytestmark = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")

SHAPES = ((6144, 4096), (28672, 4096), (4096, 14336), (1000, 1032))
ROWS = ("quantize_rows", "rmsnorm_quantize", "silu_mul_quantize", "hadamard")
GPUS = [device for device in map(load_device, device_names()) if device.cc is not None]


def problems() -> Iterator[AnyProblem]:
    """What is planned, at every size."""
    for gpu in GPUS:
        for layer in recipe_layers():
            for n, k in SHAPES:
                first = problem_for(layer, (1, n, k), torch.bfloat16, gpu)
                yield from (first.at(size) for size in first.buckets)
        for group in (1, 4, 8):
            shape = (8, 1, 8, group, 128, 64)
            attention = attention_for("int4_head", shape, torch.bfloat16, gpu)
            yield from (attention.at(size) for size in AttentionProblem.buckets)
        for op in ROWS:
            for shape in ((1, 4096), (256, 4096), (1, 14336), (256, 14336)):
                yield rows_for(op, shape, torch.bfloat16, gpu)


def odd_problems() -> Iterator[AnyProblem]:
    """Short groups in fp16, and attention of several queries under a mask, on one GPU."""
    h200 = load_device("h200")
    for layer in (
        parse_layer("int_group:group=16", "none"),
        parse_layer("int_group:bits=3,group=32", "none"),
    ):
        first = problem_for(layer, (1, 4096, 4096), torch.float16, h200)
        yield from (first.at(size) for size in first.buckets)
    attention = attention_for("int4_head", (2, 8, 8, 4, 64, 64), torch.float16, h200)
    masked = replace(attention, extras=("mask", "softcap"))
    yield from (masked.at(size) for size in (64, 4096, 65536))


def shipped() -> list[Job]:
    """The distinct choices."""
    found: dict[Job, None] = {}
    for problem in (*problems(), *odd_problems()):
        chosen = explain(problem)
        kernel = kernels()[chosen.chosen]
        if kernel.compile is not None:
            assert problem.machine is not None and problem.machine.cc is not None
            found[Job(kernel.name, problem, chosen.config, problem.machine.cc)] = None
    return list(found)


def test_what_plans_choose_compiles_without_spills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nothing is there already
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    jobs = shipped()
    assert {job.cc for job in jobs} == {(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)}
    assert {job.problem.op for job in jobs} >= {"linear", "attend", "rmsnorm_quantize", "hadamard"}
    start = time.monotonic()
    results = compile_all(jobs, n_jobs=min(2, os.cpu_count() or 1))
    seconds = time.monotonic() - start
    failed = [f"{job}: {r.text}" for job, r in results.items() if isinstance(r, CompileFailure)]
    assert not failed, "\n".join(failed)
    spilled = [
        f"{job}: {part.stack_bytes} bytes of stack at {part.registers} registers"
        for job, parts in results.items()
        if not isinstance(parts, CompileFailure)
        for part in parts
        if part.stack_bytes
    ]
    assert not spilled, "\n".join(spilled)
    print(f"{len(jobs)} choices in {seconds:.0f} s")
