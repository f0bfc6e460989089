"""Symbols from codes and back: every code, every guess, against a slow oracle in whole numbers."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.quant.errors import FormatError
from fewbit.quant.kv_stream_codes import BINS, centre, n_symbols
from fewbit.quant.kv_stream_predict import (
    ONE,
    Predictor,
    from_runs,
    residuals,
    restore,
    to_runs,
)
from fewbit.quant.native import compiler


def random_case(seed: int, bins: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, Predictor]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, n_symbols(bins), shape).astype(np.uint8)
    mean, correlation = (rng.integers(-ONE, ONE + 1, shape[2]).astype(np.int16) for _ in range(2))
    return codes, Predictor(mean, correlation)


def oracle(codes: np.ndarray, predictor: Predictor, bins: int) -> np.ndarray:
    """The module's formula, number by number."""
    c = centre(bins)
    found = np.empty_like(codes)
    for row, token, channel in np.ndindex(*codes.shape):
        mean = int(predictor.mean[channel]) * c
        value = mean
        if token:
            beyond = ONE * (int(codes[row, token - 1, channel]) - c) - mean
            value += int(predictor.correlation[channel]) * beyond >> 10
        guess = max(-c, min(c, (value + 512) >> 10))
        symbol = (int(codes[row, token, channel]) - c - guess + c) % (2 * c + 1)
        found[row, token, channel] = symbol
    return found


@pytest.mark.parametrize("bins", BINS)
def test_symbols_equal_the_oracle(bins: int) -> None:
    codes, predictor = random_case(0, bins, (2, 9, 50))
    assert np.array_equal(residuals(codes, predictor, bins), oracle(codes, predictor, bins))
    plain = predictor.unconditional()
    assert np.array_equal(residuals(codes, plain, bins), oracle(codes, plain, bins))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), bins=st.sampled_from(BINS), rows=st.integers(1, 3),
    tokens=st.integers(1, 20), channels=st.integers(1, 70), follows=st.booleans(),
)  # fmt: skip
def test_restoring_is_the_inverse(
    seed: int, bins: int, rows: int, tokens: int, channels: int, follows: bool
) -> None:
    codes, predictor = random_case(seed, bins, (rows, tokens, channels))
    predictor = predictor if follows else predictor.unconditional()
    symbols = residuals(codes, predictor, bins)
    assert symbols.dtype == np.uint8 and int(symbols.max()) < n_symbols(bins)
    found = restore(symbols, predictor, bins)
    assert found.dtype == np.uint8 and np.array_equal(found, codes)


@pytest.mark.parametrize("bins", BINS)
def test_any_symbols_restore_to_codes_that_exist(bins: int) -> None:
    symbols, predictor = random_case(3, bins, (2, 30, 40))
    codes = restore(symbols, predictor, bins)
    assert int(codes.max()) < n_symbols(bins)
    assert np.array_equal(residuals(codes, predictor, bins), symbols)


def test_restoring_takes_memory_of_a_piece_and_keeps_none() -> None:
    """A table of what follows would take 8 · 961 bytes a channel, and was once kept for ever."""
    codes, predictor = random_case(5, 32, (1, 4, 1024))
    symbols = residuals(codes, predictor, 32)
    tracemalloc.start()
    try:
        found = restore(symbols, predictor, 32)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(found, codes)
    assert kept < 3 * codes.size and peak < 1.5e6, (kept, peak)


def test_a_right_guess_is_the_centre() -> None:
    codes = np.full((1, 10, 3), 12, np.uint8)
    constant = Predictor(np.zeros(3, np.int16), np.full(3, ONE, np.int16))
    assert (residuals(codes, constant, 32)[:, 1:] == centre(32)).all()
    mean = Predictor(np.full(3, round(ONE * (12 - 15) / 15), np.int16), np.zeros(3, np.int16))
    assert (residuals(codes, mean, 32) == centre(32)).all()


def runs_case(
    seed: int, bins: int, shape: tuple[int, int, int], edges: list[int]
) -> tuple[np.ndarray, Predictor, np.ndarray, np.ndarray]:
    codes, predictor = random_case(seed, bins, shape)
    order = np.random.default_rng(seed).permutation(shape[2]).astype(np.uint32)
    return codes, predictor, order, np.array(edges, np.int64)


@pytest.fixture(params=["native", "numpy"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(compiler, "library", lambda: None)
    elif compiler.library() is None:
        pytest.skip(str(compiler.why_not()))
    return str(request.param)


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize(
    ("shape", "edges"),
    [((1, 1, 1), [0, 1]), ((2, 9, 50), [0, 50]), ((3, 7, 700), [0, 64, 400, 700])],
)
def test_runs_are_the_residuals_in_the_order_of_coding(
    engine: str, bins: int, isa: str, shape: tuple[int, int, int], edges: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("FEWBIT_NATIVE_ISA", isa)
    codes, predictor, order, ends = runs_case(1, bins, shape, edges)
    for chosen in (predictor, predictor.unconditional()):
        found = to_runs(codes, chosen, order, ends, bins)
        symbols = residuals(codes, chosen, bins)[:, :, order]
        expected = [symbols[:, :, a:b].ravel() for a, b in pairwise(edges)]
        assert np.array_equal(found, np.concatenate(expected))
        assert np.array_equal(from_runs(found, shape, chosen, order, ends, bins), codes)


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    if compiler.library() is None:
        pytest.skip(str(compiler.why_not()))
    codes, predictor, order, ends = runs_case(0, 16, (1, 4, 10), [0, 10])
    symbols = to_runs(codes, predictor, order, ends, 16)
    for shape, edges in (((1, 5, 10), ends), ((1, 4, 10), ends[:1])):
        with pytest.raises(FormatError, match="do not fit the order"):
            from_runs(symbols, shape, predictor, order, edges, 16)


def test_places_that_are_outside_are_refused() -> None:
    """C would write there."""
    if compiler.library() is None:
        pytest.skip(str(compiler.why_not()))
    codes, predictor, order, ends = runs_case(0, 16, (1, 4, 10), [0, 4, 10])
    symbols = to_runs(codes, predictor, order, ends, 16)
    outside = order.copy()
    outside[3] = 10
    for wrong, edges in ((outside, ends), (order, np.array([0, 11, 10])), (order, ends * 0)):
        with pytest.raises(FormatError, match="do not fit the order"):
            from_runs(symbols, (1, 4, 10), predictor, wrong, edges, 16)
    for value in (ONE + 1, -ONE - 1):
        steep = Predictor(predictor.mean, predictor.correlation.copy())
        steep.correlation[9] = value
        with pytest.raises(FormatError, match="10 numbers from -1024 to 1024"):
            from_runs(symbols, (1, 4, 10), steep, order, ends, 16)
