"""The mended interpreter: loops bounded by an argument, and bfloat16 rounded as GPUs round it."""

import numpy as np
import pytest
import torch

from fewbit.kernels_triton import _interpreter, _triton
from fewbit.kernels_triton._triton import jit, tl

pytestmark = pytest.mark.skipif(
    not _triton.interpreted(), reason="kernels do not run in Triton's interpreter here"
)


@jit
def counted(y, n):
    total = 0
    for step in range(tl.minimum(n, 5)):
        total += step
    tl.store(y, total)


@jit
def narrowed(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


def test_an_argument_bounds_a_loop() -> None:
    for n, total in ((0, 0), (3, 3), (9, 10)):
        y = torch.full((1,), -1, dtype=torch.int32)
        counted[(1,)](y, n)
        assert y.item() == total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_round_to_nearest_even(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.cat(
        (
            torch.randn(1000) * 10.0 ** torch.randint(-7, 5, (1000,)),
            torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(2 - 2**-9), 3.4e38, 1e-40, -0.0]),
            torch.tensor([float("inf"), -float("inf"), 255.5, 65519.0]),
        )
    )
    x = torch.nn.functional.pad(x, (0, 1024 - x.numel()))
    y = torch.empty(1024, dtype=dtype)
    narrowed[(1,)](x, y, 1024)
    assert torch.equal(y, x.to(dtype))


@jit
def multiplied(x, y):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    values = tl.load(x + at)
    tl.store(y + at, tl.dot(values, tl.trans(values)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_those_of_the_values(dtype: torch.dtype) -> None:
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.empty(16, 16)
    multiplied[(1,)](x, y)
    torch.testing.assert_close(y, x.float() @ x.float().T)


def test_not_a_number_stays_one() -> None:
    bits = _interpreter.round_to_bfloat16(np.array([[np.nan, 1.0]], dtype=np.float32))
    values = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    assert bits.shape == (1, 2) and values[0, 0].isnan() and values[0, 1] == 1


def test_mending_twice_changes_nothing() -> None:
    from triton.runtime import interpreter

    before = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.cast_impl
    _interpreter.mend()
    assert (interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.cast_impl) == before
