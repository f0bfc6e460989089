"""Data of a product that is timed, and its verification: on the CPU, with the CPU's kernels."""

from dataclasses import replace

import pytest
import torch

from fewbit.quant import reference, timed_case
from fewbit.quant.errors import NoKernelError, TuningError
from fewbit.quant.format import formats
from fewbit.quant.formats.fle import FleOptions
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.formats.int_two_level import IntTwoLevelOptions
from fewbit.quant.kernel import Kernel, Problem, RowsProblem
from fewbit.quant.machine import this_device
from fewbit.quant.runner import launch_of
from fewbit.quant.timed_case import (
    Case,
    Weights,
    copies_of,
    find_kernel,
    random_weight,
    relative_error,
    timed_problem,
    worst_line_error,
)
from fewbit.quant.timing import Candidate, Fault
from tuned_tables import H200

CPU = torch.device("cpu")
INT8 = {"format": "int_two_level", "options": IntTwoLevelOptions(), "activation": "int8_token"}


def problem(n=320, k=200, m=8, dtype=torch.bfloat16, **facts):
    made = Problem("int_group", IntGroupOptions(), 1, m, n, k, dtype, "cpu", None,
                   this_device("cpu"))  # fmt: skip
    return replace(made, **facts)


def case_of(of):
    return Case(of, Weights(of, CPU, None), CPU)


def test_a_rotation_passes_three_times_the_cache():
    mib = 1 << 20
    assert copies_of(8 * mib, 50 * mib) == 19
    assert copies_of(200 * mib, 50 * mib) == 1
    assert copies_of(150 * mib, 50 * mib) == 1
    assert copies_of(1, 50 * mib) == 512
    assert copies_of(8 * mib, None) == 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [5, 256, 320])
def test_random_weights_have_the_stored_form_and_real_codes(bits, n):
    of = problem(n=n, options=IntGroupOptions(bits, 64, bits % 2 == 0), n_terms=2)
    packed = random_weight(of, torch.Generator().manual_seed(0), CPU)
    assert packed.shape == (n, 200) and len(packed.terms) == 2
    for term in packed.terms:
        formats()["int_group"].check(term.parts, packed.shape, term.options)
    weight = reference.dense(packed, torch.float32)
    assert 0.02 < weight.std() < 0.04  # of a sum of two, with rounding noise
    rows = weight.unique(dim=0).shape[0]
    assert rows > 0.95 * n  # rows of two terms are drawn independently


@pytest.mark.parametrize("name", ["fle4", "fle3"])
def test_weights_that_are_not_rounded_verify(name):
    of = problem(70, 100, format=name, options=FleOptions())
    assert case_of(of).verify(Candidate("fle_scratch")) < 8e-3


def test_rows_are_drawn_from_256():
    packed = random_weight(problem(n=1024, k=64), torch.Generator().manual_seed(0), CPU)
    weight = reference.dense(packed, torch.float32)
    assert 200 < weight.unique(dim=0).shape[0] <= 256
    assert not torch.equal(weight[:256], weight[256:512])


def test_weights_of_a_rotation_differ_and_layouts_are_made_once(monkeypatch):
    of = problem(k=256)
    weights = Weights(of, CPU, 400_000)
    assert len(weights.packed) == copies_of(weights.packed[0].n_bytes, 400_000) > 10
    first, second = (reference.dense(p, torch.float32) for p in weights.packed[:2])
    assert not torch.equal(first, second)
    made = []

    def prepare(packed, dtype):
        made.append(dtype)
        return packed

    kernel = Kernel("counted", lambda p: (), prepare, reference.linear, lambda p: 1.0)
    assert weights.layouts(kernel, torch.bfloat16) == weights.packed
    assert weights.layouts(kernel, torch.bfloat16) is weights.layouts(kernel, torch.bfloat16)
    weights.layouts(kernel, torch.float16)
    assert len(made) == 2 * len(weights.packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", [None, "int8_token"])
def test_right_results_verify(dtype, activation):
    case = case_of(problem(dtype=dtype, activation=activation))
    error = case.verify(Candidate("dense_cached"))
    assert 0 <= error <= timed_case.TOLERANCE[dtype]
    assert (error > 0) or dtype == torch.float32


def test_integer_kernels_must_be_exact(monkeypatch):
    case = case_of(problem(**INT8))
    exact = reference.linear(case.x, case._weights.packed[0], "int8_token")
    off = exact.clone()
    off[3, 7] = off[3, 7].float() * 1.01
    results = {"right": exact, "wrong": off}
    kernels = {
        name: Kernel(name, lambda p: (), lambda packed, dtype: packed, lambda x, layout, y=y: y,
                     lambda p: 1.0, activation="int8_token")
        for name, y in results.items()
    }  # fmt: skip
    monkeypatch.setattr(timed_case, "kernels", lambda: kernels)
    assert case.verify(Candidate("right")) == 0.0
    with pytest.raises(Fault, match=r"wrong: WRONG 1 of 2560 results differ from the integer"):
        case.verify(Candidate("wrong"))


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda y: y * 1.02, r"relative error must be <= 0.008, got 2.\d+e-02"),
        (lambda y: y.index_fill(0, torch.tensor([2]), float("nan")), "got nan"),
        (lambda y: y[:, torch.randperm(y.shape[1])], r"must be <= 0.008, got 1"),
        (
            lambda y: (y + 0.09 * (torch.arange(320) == 7) * y.std()).to(y.dtype),
            r"of a row or column must be <= 0.08, got [89]",
        ),
        (lambda y: y[:, 1:], r"y must be torch.bfloat16 \[8, 320\], got torch.bfloat16 \[8, 319\]"),
        (lambda y: y.float(), "got torch.float32"),
    ],
)
def test_wrong_results_are_faults(monkeypatch, spoil, text):
    def launch(x, layout, config):
        assert config == (("block_n", 64),)
        return spoil(reference.linear(x, layout))

    kernel = Kernel("bad", lambda p: (), lambda packed, dtype: packed, launch, lambda p, c: 1.0,
                    configs=lambda p: ((("block_n", 64),),))  # fmt: skip
    monkeypatch.setattr(timed_case, "kernels", lambda: {"bad": kernel})
    case = case_of(problem())
    with pytest.raises(Fault, match=rf"bad \{{block_n 64\}}: WRONG .*{text}"):
        case.verify(Candidate("bad", (("block_n", 64),)))


def test_calls_run_over_the_rotation():
    of = problem(k=256)
    case = Case(of, Weights(of, CPU, 200_000), CPU)
    calls = case.calls(Candidate("dense_cached"))
    assert len(calls) == len(case._weights.packed) > 4
    results = [call() for call in calls]
    assert all(y.shape == (8, 320) for y in results)
    assert not torch.equal(results[0], results[1])


def test_inputs_are_rounded_for_kernels_that_do_not():
    seen = []
    plain = Kernel("plain", lambda p: (), lambda w, d: w, lambda x, layout: seen.append(x),
                   lambda p: 1.0)  # fmt: skip
    x = torch.randn(4, 64)
    launch_of(plain, (), None)(x, None)
    launch_of(plain, (), "int8_token")(x, None)
    launch_of(replace(plain, activation="int8_token"), (), "int8_token")(x, None)
    assert seen[0] is x and seen[2] is x
    assert not torch.equal(seen[1], x) and torch.allclose(seen[1], x, atol=0.05)


def test_what_cannot_be_timed():
    rows = RowsProblem("hadamard", None, 16, 64, torch.bfloat16, "cuda", H200)
    with pytest.raises(TuningError, match="op 'hadamard' cannot be timed yet, only 'linear'"):
        timed_problem(rows)
    assert timed_problem(problem()) == problem()
    with pytest.raises(NoKernelError, match=r"names no kernel \(did you mean 'dense_cached'"):
        find_kernel("dense_cache")


def test_a_wrong_line_among_thousands_is_seen():
    """Its share of the whole norm is 1 / sqrt(20000), within any tolerance."""
    expected = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(0))
    y = expected.clone()
    y[:, 11] = 0.0
    assert relative_error(y, expected) < 8e-3 < 0.5 < worst_line_error(y, expected)
    assert worst_line_error(y.T, expected.T) == pytest.approx(worst_line_error(y, expected))
    assert worst_line_error(torch.ones(2, 2), torch.zeros(2, 2)) == 0.0


def test_relative_error():
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected + torch.tensor([0.0, 0.5]), expected) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(1), torch.zeros(1)) == 1.0
