"""Rotated queries are those of plain torch, bit for bit."""

from dataclasses import replace

import pytest
import torch

from fewbit.kernels_triton import _triton
from fewbit.kernels_triton.rope import KERNEL, RopeOptions, rotate
from fewbit.quant.dispatch import explain
from fewbit.quant.kernel import RowsProblem
from fewbit.quant.kv_write import Rope
from fewbit.quant.kv_write import rotate as rotate_torch
from fewbit.quant.machine import load_device

pytestmark = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBLEM = RowsProblem(
    "rope", RopeOptions(32, 128, 128), 16, 4096, torch.bfloat16, "cuda", load_device("h200")
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("style", ["half", "pairs"])
@pytest.mark.parametrize(
    ("shape", "size", "config"),
    [
        ((1, 4, 1, 64), 64, (1, 1)),
        ((2, 5, 3, 80), 40, (4, 1)),
        ((1, 3, 2, 96), 96, (16, 4)),
        ((2, 1, 1, 6), 4, (4, 1)),
        ((0, 2, 1, 64), 64, (1, 1)),
    ],
)
def test_equal_to_torch(
    shape: tuple[int, int, int, int],
    size: int,
    config: tuple[int, int],
    style: str,
    dtype: torch.dtype,
) -> None:
    n_rows, n_heads, n_tokens, head_dim = shape
    torch.manual_seed(0)
    wide = torch.randn(n_rows, n_tokens, n_heads * head_dim + 7, device=DEVICE).to(dtype)
    x = wide[..., : n_heads * head_dim].unflatten(-1, (n_heads, head_dim)).transpose(1, 2)
    angle = torch.randn(max(1, n_rows), n_tokens, size, device=DEVICE)
    rope = Rope(angle.cos(), angle.sin(), style)
    chosen = tuple(zip(("heads", "warps"), config, strict=True))
    y = rotate(x, rope, chosen)
    assert y.is_contiguous() and y.dtype == dtype
    assert torch.equal(y, rotate_torch(x, rope))
    shared = Rope(rope.cos[:1], rope.sin[:1], style)
    assert torch.equal(rotate(x, shared, chosen), rotate_torch(x, shared))


def test_the_operator_keeps_the_contract_of_operators() -> None:
    x, table = torch.randn(1, 2, 3, 8, device=DEVICE), torch.randn(1, 3, 8, device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    arguments = (x, table, table, "half", [1, 1])
    torch.library.opcheck(torch.ops.fewbit.triton_rope, arguments, test_utils=checks)


def test_choice_and_refusals() -> None:
    found = explain(PROBLEM)
    assert found.chosen == "triton_rope" and len(KERNEL.configs(PROBLEM)) == 8
    wide = replace(PROBLEM, options=RopeOptions(2, 2048, 2048), dtype=torch.float64)
    assert {reason.code for reason in KERNEL.refuse(wide)} == {"DTYPE", "SHAPE_K"}
