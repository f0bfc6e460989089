"""Checks of products: which there are, and that wrong kernels fail them."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional

from bench import oracle_linear
from bench.oracle_check import Place
from bench.oracle_linear import ROWS, SHAPES, has_integer_form, lanes, layers, planted_weight
from fewbit.quant import reference
from fewbit.quant.format import dequantize
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.formats.int_two_level import IntTwoLevelOptions
from fewbit.quant.kernel import Kernel, Reason
from fewbit.quant.machine import load_device

PLACE = Place("cpu", load_device("h100"))
FEW = replace(PLACE, reduced=True)


def kernel(launch, activation=None, refuse=lambda problem: ()):
    """A stand-in for a GPU's kernel."""
    return Kernel(
        "stand_in", refuse, lambda packed, dtype: (packed, dtype), launch, lambda p: 1.0,
        activation=activation,
    )  # fmt: skip


def right(x, layout):
    packed, dtype = layout
    return functional.linear(x.float(), dequantize(packed)).to(dtype)


def exact(x, layout):
    return reference.linear(x, layout[0], "int8_token")


def found(stand_in, n=12, place=FEW):
    steps = [step for lane in lanes(stand_in, place) for step in lane]
    return [check for step in steps[:n] if (check := step()) is not None]


def test_every_width_group_and_dialect_is_there():
    every = layers(reduced=False)
    assert len(set(every)) == len(every) >= 7 * 5 * 2 * 2 + 4 * 2
    assert every[0] == ("int_group", IntGroupOptions(4, 128))
    assert set(layers(reduced=True)) <= set(every)


def test_a_lane_goes_through_every_shape_once():
    for place in (PLACE, FEW):
        for lane in lanes(kernel(right), place)[:3]:
            cases = [step().case for step in lane]
            assert len(set(cases)) == len(lane)
    assert len(lanes(kernel(right), PLACE)[0]) == len(ROWS) * len(SHAPES)


def test_a_right_kernel_passes():
    checks = found(kernel(right))
    assert len(checks) == 12 and {check.tolerance for check in checks} == {8e-3, 2e-3}
    assert all(check.error() <= check.tolerance for check in checks)


def test_an_integer_kernel_must_be_equal_bit_by_bit():
    checks = found(kernel(exact, activation="int8_token"), 40)
    exact_ones = [check for check in checks if check.tolerance == 0.0]
    assert exact_ones and all(check.error() == 0.0 for check in exact_ones[:6])

    def nearly(x, layout):
        return exact(x, layout) * 1.004

    (check, *_) = [c for c in found(kernel(nearly, "int8_token"), 40)
                   if c.tolerance == 0.0 and "M=33" in c.case]  # fmt: skip
    assert check.error() > 0


def wrong_row(x, layout):
    y = right(x, layout)
    y[-1:] *= 1.05
    return y


def reads_beyond(x, layout):
    wide = x.as_strided((x.shape[0], x.shape[1] + 1), x.stride())
    return right(x, layout) + wide[:, -1:]


def other_dtype(x, layout):
    return right(x, layout).float()


def transposed(x, layout):
    return right(x, layout).T


@pytest.mark.parametrize("launch", [wrong_row, reads_beyond, other_dtype, transposed])
def test_a_wrong_kernel_fails(launch):
    checks = [check for check in found(kernel(launch), 40) if "M=33" in check.case]
    assert checks and all(check.error() > check.tolerance for check in checks[:4])


def test_what_a_kernel_refuses_is_not_checked():
    def refuse(problem):
        return (Reason("DTYPE", "no", "no"),) if problem.dtype == torch.float16 else ()

    cases = [check.case for check in found(kernel(right, refuse=refuse), 100)]
    assert cases and not any("float16" in case.split() for case in cases)


def test_a_reason_of_memory_is_none():
    def refuse(problem):
        return (Reason("MEMORY", "full", "wait"),)

    assert found(kernel(right, refuse=refuse))


def test_weights_have_outliers_and_a_zero_row():
    packed = planted_weight("int_group", IntGroupOptions(4, 32), 100, 328)
    weight = dequantize(packed)
    assert weight.shape == (100, 328) and not weight[0].any()
    assert float(weight.abs().max()) > 8 * float(weight.std())


def test_integer_forms_are_known():
    assert has_integer_form("int_two_level", IntTwoLevelOptions(4, 128))
    assert has_integer_form("int_group", IntGroupOptions(8, "row"))
    assert not has_integer_form("int_group", IntGroupOptions(4, 128))


def test_the_config_is_given_to_the_launch():
    seen = []

    def launch(x, layout, config):
        seen.append(config)
        return right(x, layout)

    configs = tuple((("block", i),) for i in range(8))
    stand_in = replace(kernel(launch), configs=lambda problem: configs)
    for check in found(stand_in, 6):
        check.error()
        assert seen[-1] == check.config and check.config in configs
    assert len(set(seen)) > 2


def test_small_and_odd_sizes_are_all_used():
    spots = partial(_spots, kernel(right))
    assert spots(PLACE) == {(m, n, k) for m in ROWS for n, k in SHAPES}


def _spots(stand_in, place):
    return {step.args[3] for step in lanes(stand_in, place)[0]}


def test_module_keeps_its_strides_coprime():
    for place in (PLACE, FEW):
        lane = lanes(kernel(right), place)[5]
        assert len({step.args[3] for step in lane}) == len(lane)
    assert oracle_linear.ROWS[0] == 0
