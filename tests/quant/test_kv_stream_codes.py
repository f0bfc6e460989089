"""Levels, bins by depth, and codes against a float64 oracle; zeros, NaN, infinities, extremes."""

from itertools import pairwise

import pytest
import torch

from fewbit.quant.errors import FormatError
from fewbit.quant.kv_stream_codes import (
    BINS,
    LEVELS,
    as_decoded,
    bins_of,
    centre,
    dequantize,
    n_symbols,
    quantize,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def vectors(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(2, 3, 40, 8, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)


def test_bins_of_a_model_of_32_layers_are_those_of_the_rule() -> None:
    def runs(level: int, side: int) -> list[int]:
        return [bins_of(level, side, layer, 32) for layer in range(32)]

    assert runs(1, 0) == [16] * 20 + [12] * 12
    assert runs(2, 0) == [32] * 10 + [16] * 22
    assert runs(1, 1) == [16] * 2 + [12] * 30
    assert runs(2, 1) == [32] * 2 + [16] * 30
    assert runs(3, 0) == runs(3, 1) == [32] * 32


@pytest.mark.parametrize("n_layers", [1, 2, 6, 28, 33, 80])
def test_bins_fall_with_depth_and_rise_with_the_level(n_layers: int) -> None:
    for side in (0, 1):
        rows = [[bins_of(lv, side, i, n_layers) for i in range(n_layers)] for lv in LEVELS]
        for row in rows:
            assert row == sorted(row, reverse=True) and set(row) <= set(BINS)
        for worse, better in pairwise(rows):
            assert all(a <= b for a, b in zip(worse, better, strict=True))


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(FormatError, match=r"must be one of \(1, 2, 3\), got 4"):
        bins_of(4, 0, 0, 6)


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_the_nearest_to_x_times_c_over_the_maximum(bins: int, dtype: torch.dtype) -> None:
    x, c = vectors(dtype), centre(bins)
    codes, maxima = quantize(x, bins)
    assert codes.shape == (2, 40, 24) and maxima.shape == (2, 40)
    flat = x.double().transpose(1, 2).flatten(2)
    peak = flat.abs().amax(dim=2)
    assert ((maxima.double() - peak).abs() <= peak * 2**-8).all()
    exact = (flat * c / maxima.double().unsqueeze(2)).clamp(-c, c) + c
    assert (codes.double() - exact).abs().max() <= 0.5 + 1e-4
    assert int(codes.min()) == 0 and int(codes.max()) == n_symbols(bins) - 1


@pytest.mark.parametrize("bins", BINS)
def test_the_error_is_half_a_step_and_what_bf16_moves_the_ends(bins: int) -> None:
    x, c = vectors(), centre(bins)
    codes, maxima = quantize(x, bins)
    found = dequantize(codes, maxima, bins, 3, torch.float32)
    assert found.shape == x.shape and found.is_contiguous()
    bound = (maxima.float() / c * (0.5 + c * 2**-8 + 1e-4))[:, None, :, None]
    assert ((found - x).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_come_back_as_zeros(dtype: torch.dtype) -> None:
    codes, maxima = quantize(torch.zeros(1, 2, 5, 4, dtype=dtype), 16)
    assert (codes == centre(16)).all() and (maxima == 0).all()
    found = dequantize(codes, maxima, 16, 2, dtype)
    assert torch.equal(found, torch.zeros(1, 2, 5, 4, dtype=dtype))
    assert not found.signbit().any()


def test_a_maximum_whose_step_underflows_gives_zeros() -> None:
    x = torch.full((1, 1, 1, 4), 1e-45)
    codes, maxima = quantize(x, 32)
    assert torch.equal(dequantize(codes, maxima, 32, 1, torch.float32), torch.zeros(1, 1, 1, 4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_damage_makes_its_token_nan_and_no_other(bad: float) -> None:
    x = vectors()
    x[1, 2, 7, 3] = bad
    codes, maxima = quantize(x, 16)
    found = dequantize(codes, maxima, 16, 3, torch.float32)
    assert found[1, :, 7].isnan().all()
    assert int(found.isnan().sum()) == found[1, :, 7].numel()
    assert int(codes.max()) < n_symbols(16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_do_not_overflow(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    x = torch.tensor([top, -top, top / 2, 0.0], dtype=dtype).reshape(1, 1, 1, 4)
    found = dequantize(*quantize(x, 32), 32, 1, dtype)
    assert found.isfinite().all()
    torch.testing.assert_close(found[..., :2].double(), x[..., :2].double(), rtol=2**-7, atol=0)


def test_a_higher_level_is_nearer_and_level_0_is_exact() -> None:
    layers = [(vectors(), vectors(scale=3.0))] * 6
    errors = []
    for level in LEVELS:
        found = as_decoded(layers, level)
        errors.append(sum(
            float((a - b).square().sum())
            for got, pair in zip(found, layers, strict=True) for a, b in zip(got, pair, strict=True)
        ))  # fmt: skip
    assert errors[0] > errors[1] > errors[2] > 0
    assert all(torch.equal(a, b) for a, b in zip(as_decoded(layers, 0)[0], layers[0], strict=True))
