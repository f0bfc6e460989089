"""Every operation in plain torch: the oracle that kernels are tested against, and the last resort.

    y = x · Ŵᵀ        Ŵ = Σ unpack(terms) in fp32, rounded once to the dtype of x

With an activation format, x is rounded first: x̂ = Qx · s_x for each row. A weight that has an integer
form, Ŵ[n] = Qw[n] · s_w[n] + o[n], is then multiplied in integers. The order of fp32 operations is
part of the definition, and integer kernels are bit-equal to it:

    a[m, n] = fp32(Σ_k Qx[m, k] · Qw[n, k])        the sum is exact, one rounding to fp32
    y[m, n] = (a[m, n] · s_w[n]) · s_x[m]          two roundings
    y[m, n] = y[m, n] + o[n] · T[m]                with an offset: two roundings, no fused multiply-add
    T[m]    = s_x[m] · fp32(Σ_k Qx[m, k])          the sum of x̂, not of x
    result  = y rounded to the dtype of x

Any other weight (several terms, scales along K) is multiplied as above, by x̂ in the dtype of x.

Differentiable in x (not in the weight), so that adapters can be trained around a quantized layer.
The backward pass decodes the weight again instead of keeping it: a dense copy of every layer of
the model would be alive between forward and backward otherwise. Rounding passes gradients straight
through: x̂ has the gradient of x, though scale and codes are steps.

Deliberately not fast: the whole weight is decoded at every call, nothing is cached.
"""

from typing import Any

import torch
from torch.nn import functional

from .activation import RoundedRows, find_activation, integer_form
from .format import IntegerForm, dequantize
from .kernel import AnyProblem, Kernel, Problem, Reason, RowsProblem
from .machine import limit_of
from .packed import PackedTensor

# For ranking, and low on purpose: a kernel that does the same work must come first.
_DECODE_WEIGHTS_PER_SECOND = 3e8
_MACS_PER_SECOND = 5e9
_DECODED_BYTES = 64  # moved for each weight on a GPU: about 16 passes in fp32, a guess
_TURNED_BYTES = 40  # moved for each number of a Hadamard transform, and calls of torch; guesses
_TURN_CALLS = 6
_BLOCK_WEIGHTS = 1 << 22  # integers widened to fp64 at once: 32 MB


def dense(packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Weight [N, K] or [E, N, K] in `dtype`: decoded in fp32, rounded once."""
    return dequantize(packed).to(dtype)


def linear(x: torch.Tensor, packed: PackedTensor, activation: str | None = None) -> torch.Tensor:
    """x [..., K] times a weight [N, K]: y [..., N] in the dtype of x, differentiable in x.

    activation: name of the format that x is rounded to first; None leaves it as it is.
    """
    result: torch.Tensor = _Linear.apply(x, packed, activation)
    return result


def integer_linear(rows: RoundedRows, form: IntegerForm) -> torch.Tensor:
    """Rounded rows [..., K] times integers [N, K]: y fp32 [..., N] in the order of operations that
    the module's text fixes. The integer sum is done in fp64, which is exact: |Σ| ≤ K·2^14 < 2^53."""
    codes, scale = rows.codes.double(), form.scale.view(-1)
    step = max(1, _BLOCK_WEIGHTS // form.codes.shape[-1])
    sums = [codes @ block.double().T for block in form.codes.split(step)]
    y = torch.cat(sums, dim=-1).float() * scale * rows.scale
    return y if form.offset is None else y + form.offset.view(-1) * rows.sums()


class _Linear(torch.autograd.Function):
    """The product, whose backward decodes the weight again; see the module's text."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, packed: PackedTensor, activation: str | None
    ) -> torch.Tensor:
        ctx.packed = packed
        if activation is None:
            return functional.linear(x, dense(packed, x.dtype))
        rows, form = find_activation(activation).round(x), integer_form(packed)
        if form is None:
            return functional.linear(rows.decode(x.dtype), dense(packed, x.dtype))
        return integer_linear(rows, form).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grads
        return grad @ dense(ctx.packed, grad.dtype), None, None


def _refuse(problem: AnyProblem) -> tuple[Reason, ...]:
    return ()


def _prepare(packed: PackedTensor, dtype: torch.dtype) -> PackedTensor:
    return packed


def _seconds(problem: Problem) -> float:
    weights = problem.n * problem.k
    limit = limit_of(problem, 1.0) if problem.device != "cpu" else None
    if limit and problem.machine and problem.machine.bandwidth_bytes_per_second:
        moved = problem.n_terms * weights * _DECODED_BYTES
        return limit.seconds + moved / problem.machine.bandwidth_bytes_per_second
    decode = problem.n_terms * weights / _DECODE_WEIGHTS_PER_SECOND
    return decode + weights * problem.m_bucket / _MACS_PER_SECOND


def _turn(x: torch.Tensor, layout: Any) -> torch.Tensor:
    turned: torch.Tensor = layout.apply(x)
    return turned


def _turn_seconds(problem: RowsProblem) -> float:
    """By memory: in fp32, a few passes for each group of factors; 1 s for an unknown machine."""
    bandwidth = problem.machine.bandwidth_bytes_per_second if problem.machine else None
    if bandwidth is None:
        return 1.0
    return problem.m_bucket * problem.k * _TURNED_BYTES / bandwidth + _TURN_CALLS * 5e-6


HADAMARD = Kernel(
    name="hadamard_torch",
    refuse=_refuse,
    prepare=lambda transform, dtype: transform,
    launch=_turn,
    seconds=_turn_seconds,
    priority=-1,
    op="hadamard",
)

KERNEL = Kernel(
    name="reference",
    refuse=_refuse,
    prepare=_prepare,
    launch=linear,
    seconds=_seconds,
    priority=-1,
)
