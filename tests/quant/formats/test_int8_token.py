"""Rounding of inputs to int8: golden values, an independent computation, and extreme rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.quant.errors import FormatError
from fewbit.quant.formats import int8_token
from fewbit.quant.formats.int8_token import ACTIVATION

BF16 = torch.bfloat16


def by_hand(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales in numpy's fp32, rounding half to even, with the clamp."""
    amax = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(2.0**-100))
    codes = np.clip(np.rint(x * (np.float32(127) / amax)), -127, 127).astype(np.int8)
    return codes, amax / np.float32(127)


def test_golden_row() -> None:
    rows = ACTIVATION.round(torch.tensor([[254.0, -254.0, 1.0, 3.0, 5.0, 0.0, -127.0]]))
    assert rows.codes.tolist() == [[127, -127, 0, 2, 2, 0, -64]]  # halves go to the even code
    assert rows.codes.dtype == torch.int8 and rows.scale.dtype == torch.float32
    assert rows.scale.tolist() == [[2.0]]
    assert rows.decode(torch.float32).tolist() == [[254, -254, 0, 4, 4, 0, -128]]
    assert rows.sums().tolist() == [[2.0 * (127 - 127 + 2 + 2 - 64)]]


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40)
)
@settings(max_examples=300, deadline=None)
def test_any_finite_row_agrees_with_numpy(values: list[float]) -> None:
    x = np.array([values], dtype=np.float32)
    codes, scale = by_hand(x)
    rows = ACTIVATION.round(torch.from_numpy(x))
    assert np.array_equal(rows.codes.numpy(), codes)
    assert np.array_equal(rows.scale.numpy(), scale)
    assert torch.isfinite(rows.scale).all() and float(rows.scale) > 0


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_a_million_values_agree_with_numpy(dtype: torch.dtype) -> None:
    """One rounding in 127 / amax: 127 · (1 / amax) shifts codes of one row in ten."""
    torch.manual_seed(3)
    x = torch.randn(256, 4096).to(dtype)
    codes, scale = by_hand(x.float().numpy())
    rows = ACTIVATION.round(x)
    assert np.array_equal(rows.codes.numpy(), codes)
    assert np.array_equal(rows.scale.numpy(), scale)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_and_cpu_round_alike() -> None:
    torch.manual_seed(4)
    x = torch.randn(256, 4096).to(BF16)
    here, there = ACTIVATION.round(x), ACTIVATION.round(x.cuda())
    assert torch.equal(there.codes.cpu(), here.codes)
    assert torch.equal(there.scale.cpu(), here.scale)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16, torch.float64])
def test_error_is_at_most_half_a_step(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 300).to(dtype)
    x[:, 5] *= 30
    rows = ACTIVATION.round(x)
    error = (rows.codes.double() * rows.scale.double() - x.double()).abs()
    assert bool((error <= 0.5001 * rows.scale.double()).all())
    assert bool((rows.codes.abs().amax(-1) == 127).all())


def test_extreme_rows() -> None:
    x = torch.zeros(4, 8)
    x[1], x[2, 3], x[3] = 65504, -65504, 1e-35
    for dtype in (torch.float32, torch.float16):
        rows = ACTIVATION.round(x.to(dtype))
        assert torch.isfinite(rows.scale).all()
        assert rows.codes[0].eq(0).all() and rows.codes[1].eq(127).all()
        assert rows.codes[2].tolist() == [0, 0, 0, -127, 0, 0, 0, 0]
        decoded = rows.decode(dtype)
        assert torch.isfinite(decoded).all() and decoded[0].eq(0).all()
        assert float(decoded[1, 0]) == pytest.approx(65504, rel=1e-3)
    assert torch.isfinite(ACTIVATION.round(torch.full((1, 4), 3e38)).decode(torch.float32)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_damaged_row_is_not_hidden_and_stays_alone(bad: float) -> None:
    x = torch.ones(3, 16)
    x[1, 7] = bad
    rows = ACTIVATION.round(x)
    assert not torch.isfinite(rows.scale[1]).any()
    assert torch.isfinite(rows.scale[[0, 2]]).all() and rows.codes[[0, 2]].eq(127).all()


def test_rows_are_independent_of_blocks_and_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 7, 40).to(BF16)
    whole = ACTIVATION.round(x)
    assert whole.codes.shape == x.shape and whole.scale.shape == (3, 7, 1)
    monkeypatch.setattr(int8_token, "_BLOCK", 100)
    cut = ACTIVATION.round(x)
    assert torch.equal(whole.codes, cut.codes) and torch.equal(whole.scale, cut.scale)
    alone = ACTIVATION.round(x[2, 5])
    assert torch.equal(alone.codes, whole.codes[2, 5])
    assert torch.equal(alone.scale, whole.scale[2, 5])


def test_strided_inputs_give_contiguous_codes() -> None:
    x = torch.randn(12, 9).T
    rows = ACTIVATION.round(x)
    assert rows.codes.is_contiguous()
    assert torch.equal(rows.codes, ACTIVATION.round(x.contiguous()).codes)


def test_inputs_are_left_alone_and_empty_ones_are_fine() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    before = x.detach().clone()
    rows = ACTIVATION.round(x)
    assert torch.equal(x.detach(), before)
    assert not rows.scale.requires_grad
    empty = ACTIVATION.round(torch.empty(0, 8))
    assert empty.codes.shape == (0, 8) and empty.scale.shape == (0, 1)


def test_integers_are_refused() -> None:
    with pytest.raises(FormatError, match=r"got torch\.int64"):
        ACTIVATION.round(torch.ones(2, 8, dtype=torch.int64))
