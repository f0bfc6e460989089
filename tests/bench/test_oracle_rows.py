"""Checks of row-wise kernels: ours pass in the interpreter, wrong ones fail."""

from dataclasses import replace

import pytest
import torch

from bench.oracle import gpu_kernels, here, run_check
from bench.oracle_check import Place
from bench.oracle_rows import ORACLES, lanes
from fewbit.kernels_triton import _triton
from fewbit.quant.machine import load_device

PLACE = here() or Place("cpu", load_device("h100"), reduced=True)
FEW = replace(PLACE, reduced=True)
OURS = [kernel for kernel in gpu_kernels() if kernel.op in ORACLES]


def checks(kernel, place=FEW):
    found = [step() for lane in lanes(kernel, place) for step in lane]
    return [check for check in found if check is not None]


@pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
@pytest.mark.parametrize("kernel", OURS, ids=lambda kernel: kernel.name)
def test_ours_pass(kernel):
    found = checks(kernel)
    assert len(found) >= 4 and {"bfloat16", "float16"} <= set(
        " ".join(c.case for c in found).split()
    )
    for check in found[:6]:
        row = run_check(check)
        assert row["ok"], row


def spoiled(kernel, spoil):
    def launch(x, layout, config):
        return spoil(kernel.launch(x, layout, config))

    return replace(kernel, launch=launch)


def by_op(op):
    return next(kernel for kernel in OURS if kernel.op == op)


def failing(kernel):
    found = [check for check in checks(kernel) if "M=33" in check.case]
    return bool(found) and all(not run_check(check)["ok"] for check in found)


def test_a_wrong_code_scale_or_sum_fails():
    kernel = by_op("quantize_rows")
    for name in ("codes", "scale", "totals"):

        def spoil(rows, name=name):
            tensor = getattr(rows, name).clone()
            tensor[-1, -1] += 1
            return replace(rows, **{name: tensor})

        assert failing(spoiled(kernel, spoil)), name


@pytest.mark.parametrize("op", ["rmsnorm_quantize", "silu_mul_quantize"])
def test_a_wrong_value_fails(op):
    def spoil(found):
        return replace(found, rows=replace(found.rows, scale=found.rows.scale * 1.02))

    assert failing(spoiled(by_op(op), spoil))


def test_a_missing_sum_of_the_residual_fails():
    kernel = spoiled(by_op("rmsnorm_quantize"), lambda found: replace(found, total=None))
    found = [check for check in checks(kernel) if "residual=True" in check.case]
    assert found and all(not run_check(check)["ok"] for check in found)


def test_all_widths_and_rows_are_used_where_there_is_a_gpu():
    kernel = by_op("quantize_rows")
    full = lanes(kernel, Place("cuda", load_device("h100")))
    assert len({step.args[3] for step in full[0]}) == len(full[0]) == 28
    assert torch.bfloat16 in {lane[0].args[2] for lane in full}
