"""Aims each weight at the output that the *original* model has, not at that of the shifted input.

Later blocks see inputs x̂ that the quantized blocks before them have changed. A weight W that is only
rounded reproduces W x̂; what is wanted is W x. With H = E[x̂ᵀx̂] and D = E[(x − x̂)ᵀ x̂] over the
calibration tokens (rows are tokens), the weight that comes closest to W x on the inputs x̂ is

    T = W + share · W · D · (H + λ)⁻¹             λ = damping · mean(diag H)
                                                  share = strength · max(0, 1 − 2 K / tokens)

(least squares; the asymmetric calibration of Li et al., "GPTAQ", 2025). K coefficients estimated from a
number of tokens that is not much larger follow the noise of these tokens, which the share takes into
account. T takes the place of W in all
later passes: ranges are searched and columns are rounded for T. A weight without drift statistics
(experts: the two models may route a token differently) or whose H cannot be factorised keeps W.

Nothing is rounded here, and W itself stays in `Weight.value`.
"""

from dataclasses import dataclass

import torch

from ...quant.block import Block
from ...quant.errors import RecipeError
from ..matrices import Matrix, MatrixBatch, batches, matrices
from ..protocol import Pass, Stats


@dataclass(frozen=True)
class CompensateOptions:
    """strength: 1 repays all of the drift that can be trusted. damping: share of mean(diag H)."""

    strength: float = 1.0
    damping: float = 0.01

    def __post_init__(self) -> None:
        for key, top in (("strength", 1.0), ("damping", 1.0)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, float) or not 0 < value <= top:
                raise RecipeError(f"compensate: {key} must be in (0, {top}], got {value!r}")


def run(block: Block, stats: Stats, options: CompensateOptions) -> Block:
    """Leave T in each weight's `target` where the statistics allow it."""
    usable = [matrix for matrix in matrices(block, stats) if _has_drift(matrix)]
    for batch in batches(usable):
        for matrix, target in zip(batch.matrices, _targets(batch, options), strict=True):
            if bool(torch.isfinite(target).all()):
                _put(matrix, target)
    return block


def _has_drift(matrix: Matrix) -> bool:
    return matrix.moments is not None and matrix.moments.drift is not None


def _targets(batch: MatrixBatch, options: CompensateOptions) -> torch.Tensor:
    """T fp32 [B, N, padded K]; NaN where H cannot be factorised."""
    values, hessian, drift = batch.values(), batch.hessians(), batch.drifts()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    extra = (options.damping * diagonal.mean(-1, keepdim=True)).clamp_min(1e-30)
    damped = hessian.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(extra)
    lower, failed = torch.linalg.cholesky_ex(damped)
    owed = values @ drift
    step = torch.cholesky_solve(owed.mT, lower).mT
    step[failed != 0] = float("nan")
    tokens = [float(m.moments.tokens) if m.moments else 0.0 for m in batch.matrices]
    trusted = 1 - 2 * batch.matrices[0].k / torch.tensor(tokens, device=step.device).clamp_min(1)
    return values + options.strength * trusted.clamp_min(0).view(-1, 1, 1) * step


def _put(matrix: Matrix, target: torch.Tensor) -> None:
    for piece in matrix.pieces:
        weight, rows = piece.weight, target[piece.start : piece.stop, : matrix.k]
        if piece.expert is None:
            weight.target = rows
            continue
        if weight.target is None:
            weight.target = weight.value.float().clone()
        weight.target[piece.expert] = rows


PASS = Pass(
    name="compensate",
    kind="tune",
    Options=CompensateOptions,
    needs=lambda options: ("moments", "drift"),
    refuse=lambda architecture, options: None,
    run=run,
)
