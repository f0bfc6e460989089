"""Errors, inputs with outliers, and memory that must not be read."""

from math import inf, nan

import pytest
import torch

from bench.oracle_check import (
    Place,
    bit_error,
    pick_config,
    planted_rows,
    poison_free_memory,
    poisoned,
    poisoned_parts,
    row_error,
)
from fewbit.quant.kernel import Kernel
from fewbit.quant.machine import load_device
from fewbit.quant.packed import PackedTensor, Term


def test_the_worst_row_counts():
    wanted = torch.tensor([[1000.0, 0.0], [0.0, 1.0]])
    found = torch.tensor([[1000.0, 0.0], [0.0, 1.5]])
    assert row_error(found, wanted) == pytest.approx(0.5)
    assert row_error(wanted, wanted) == 0.0


def test_rows_of_zeros_must_be_zeros():
    zero = torch.zeros(2, 3)
    assert row_error(zero, zero) == 0.0
    assert row_error(zero + 0.01, zero) == pytest.approx(0.01 * 3**0.5)


@pytest.mark.parametrize("bad", [nan, inf])
def test_what_is_not_finite_is_infinitely_wrong(bad):
    wanted = torch.ones(2, 2)
    found = wanted.clone()
    found[1, 1] = bad
    assert row_error(found, wanted) == inf
    assert row_error(torch.ones(2, 3), wanted) == inf


def test_no_rows_are_right():
    assert row_error(torch.zeros(0, 5), torch.zeros(0, 5)) == 0.0
    assert row_error(torch.zeros(0, 4), torch.zeros(0, 5)) == inf
    assert bit_error(torch.zeros(0, 5), torch.zeros(0, 5)) == 0.0


def test_bits_must_be_equal():
    wanted = torch.arange(4)
    assert bit_error(wanted, wanted.clone()) == 0.0
    assert bit_error(torch.tensor([0, 1, 2, 4]), wanted) == 0.25
    assert bit_error(wanted.int(), wanted) == inf
    assert bit_error(torch.tensor([nan]), torch.tensor([nan])) == 1.0


def test_rows_have_outliers_a_zero_row_and_a_small_one():
    x = planted_rows(16, 1024, torch.float16, seed=3)
    assert x.dtype == torch.float16 and float(x.abs().max()) > 30
    assert not x[1].any() and float(x[2].abs().max()) < 0.2
    assert torch.equal(x, planted_rows(16, 1024, torch.float16, seed=3))
    assert planted_rows(0, 8, torch.float16, 0).shape == (0, 8)


def test_a_view_lies_in_nan():
    x = torch.ones(3, 5)
    found = poisoned(x, "cpu", 7)
    assert torch.equal(found, x) and found.stride() == (12, 1)
    around = found.as_strided((5, 12), (12, 1))
    assert int(torch.isnan(around).sum()) == 5 * 12 - 15


def test_stored_parts_lie_before_bytes_of_ones():
    parts = {
        "codes": torch.arange(6, dtype=torch.uint8).view(2, 3),
        "scale": torch.ones(2, 1).half(),
    }
    packed = PackedTensor((2, 3), (Term("int_group", None, parts),))
    (term,) = poisoned_parts(packed, "cpu").terms
    for name, part in parts.items():
        found = term.parts[name]
        assert torch.equal(found, part) and found.is_contiguous()
    behind = term.parts["scale"].as_strided((64,), (1,), 2)
    assert torch.isnan(behind).all()
    assert (term.parts["codes"].as_strided((64,), (1,), 6) == 255).all()


def test_free_memory_of_a_cpu_is_left_alone():
    poison_free_memory("cpu")


def kernel(configs):
    return Kernel(
        "k", lambda p: (), lambda p, d: None, lambda x, y: x, lambda p: 1.0, configs=configs
    )


def test_configs_are_the_first_the_last_and_others():
    found = tuple((("block", i),) for i in range(50))
    some = kernel(lambda problem: found)
    picked = [pick_config(some, None, i) for i in range(60)]
    assert picked[0] == found[0] and picked[1] == found[-1]
    assert set(picked) <= set(found) and len(set(picked)) > 12
    assert picked == [pick_config(some, None, i) for i in range(60)]
    assert pick_config(kernel(None), None, 5) == ()


def test_a_place_is_a_device_and_facts():
    assert not Place("cuda", load_device("h100")).reduced
