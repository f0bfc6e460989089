"""Tuned tables made up for tests: a problem on an H200, kernels that only have a name, rows."""

from dataclasses import replace

import torch

from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.kernel import Kernel, Problem
from fewbit.quant.machine import load_device
from fewbit.quant.tuned_table import Entry, Quarantined, Row, Table, fingerprint

H200 = replace(load_device("h200"), present=True)
TOOLS = (("torch", "2.13.0"), ("triton", "3.6.0"))
CONFIG = (("block_n", 128), ("split_k", 2))
BIG = (("block_n", 256), ("split_k", 1))


def kernel(name, source, configs=(CONFIG, BIG)):
    """A kernel that runs nothing."""
    return Kernel(
        name,
        refuse=lambda problem: (),
        prepare=lambda packed, dtype: packed,
        launch=lambda x, layout, config=None: x,
        seconds=lambda problem, config=None, compiled=None: 10e-6,
        configs=None if configs is None else lambda problem: configs,
        source=source,
    )


KNOWN = {k.name: k for k in (kernel("gemm", "g1"), kernel("gemv", "v1"))}


def problem(n=4096, k=4096, m=16, machine=H200, dtype=torch.bfloat16, **options):
    """A product of 4-bit weights."""
    device = "cuda" if machine is None else machine.backend
    weights = IntGroupOptions(**options)
    return Problem("int_group", weights, 1, m, n, k, dtype, device, None, machine)


def entry(size, **facts):
    """An entry of the kernel `gemm`, or of `gemv` up to size 8."""
    small = size <= 8
    found = Entry(
        size=size,
        kernel="gemv" if small else "gemm",
        config=CONFIG if size < 256 else BIG,
        us=size + 1.0,
        p10=float(size),
        p90=size + 2.0,
        ideal_us=8.0,
        model_us=5.0,
        runner_up="gemm {block_n 64} 10.2 us",
        source="v1" if small else "g1",
        digest="d" * 16,
        verified="rel 9.1e-04",
    )
    return replace(found, **facts)


def row(of=None, tuned_at="2026-11-02T10:00:00Z", toolchain=TOOLS, **facts):
    """A complete row of a problem; `facts` go into each entry."""
    of = of or problem()
    ladder = tuple(entry(size, **facts) for size in of.buckets)
    return Row(of.family, ladder, tuned_at, toolchain)


def table(*rows, machine=H200, quarantine=(), **facts):
    """A table of a machine."""
    device = fingerprint(machine)
    assert device is not None
    found = Table(device, rows or (row(),), quarantine, title="a GPU", driver="580.65")
    return replace(found, **facts)


FAULT = Quarantined("gemm", BIG, "g1", "TIMEOUT nothing heard for 2.0 s")
