"""Every operation in plain torch: the oracle that kernels are tested against, and the last resort.

    y = x · Ŵᵀ        Ŵ = Σ unpack(terms) in fp32, rounded once to the dtype of x

Differentiable in x (not in the weight), so that adapters can be trained around a quantized layer.
The backward pass decodes the weight again instead of keeping it: a dense copy of every layer of
the model would be alive between forward and backward otherwise.

Deliberately not fast: the whole weight is decoded at every call, nothing is cached.
"""

from typing import Any

import torch
from torch.nn import functional

from .format import dequantize
from .kernel import Kernel, Problem, Reason
from .packed import PackedTensor

# For ranking, and low on purpose: a kernel that does the same work must come first.
_DECODE_WEIGHTS_PER_SECOND = 3e8
_MACS_PER_SECOND = 5e9


def dense(packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Weight [N, K] or [E, N, K] in `dtype`: decoded in fp32, rounded once."""
    return dequantize(packed).to(dtype)


def linear(x: torch.Tensor, packed: PackedTensor) -> torch.Tensor:
    """x [..., K] times a weight [N, K]: y [..., N] in the dtype of x, differentiable in x."""
    result: torch.Tensor = _Linear.apply(x, packed)
    return result


class _Linear(torch.autograd.Function):
    """F.linear whose backward decodes the weight again; see the module's text."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: PackedTensor) -> torch.Tensor:
        ctx.packed = packed
        return functional.linear(x, dense(packed, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return grad @ dense(ctx.packed, grad.dtype), None


def _refuse(problem: Problem) -> tuple[Reason, ...]:
    return ()


def _prepare(packed: PackedTensor, dtype: torch.dtype) -> PackedTensor:
    return packed


def _seconds(problem: Problem) -> float:
    weights = problem.n * problem.k
    decode = problem.n_terms * weights / _DECODE_WEIGHTS_PER_SECOND
    return decode + weights * problem.m_bucket / _MACS_PER_SECOND


KERNEL = Kernel(
    name="reference",
    refuse=_refuse,
    prepare=_prepare,
    launch=linear,
    seconds=_seconds,
    priority=-1,
)
