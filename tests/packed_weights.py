"""Packed weights with outliers, and inputs whose surroundings are NaN, for tests of kernels."""

from typing import Any

import torch

from fewbit.quant.format import find_format
from fewbit.quant.packed import PackedTensor, Term


def pack(weight: torch.Tensor, name: str, options: Any) -> PackedTensor:
    """`weight` fp32 [N, K] rounded to nearest."""
    known = find_format(name)
    extra = known.padded_k(weight.shape[-1], options) - weight.shape[-1]
    full = torch.nn.functional.pad(weight, (0, extra))
    scales = known.fit(full, options)
    codes, _ = known.round(full, scales, 0, options)
    parts = known.pack(codes, scales, options)
    return PackedTensor(tuple(weight.shape), (Term(name, options, parts),))


def outlier_weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Normal, with a mean and columns that are 8 times as large."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05 + 0.01
    weight[:, ::37] *= 8
    return weight


def poisoned(m: int, k: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    """x [m, k] with outliers, a view into memory that is NaN before, between and after its rows."""
    around = torch.full((m + 2, k + 19), float("nan"), dtype=dtype, device=device)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    x[:, ::13] *= 20
    view = around[1 : m + 1, 3 : k + 3]
    view.copy_(x)
    return view


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """|y − exact| / |exact|, in float64."""
    exact = exact.double()
    return float((y.to(exact.device).double() - exact).norm() / exact.norm())
