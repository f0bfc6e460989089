"""Hessian-guided rounding: each column's rounding error is repaid by the columns not yet rounded.

For a weight W [N, K] with calibration inputs X [tokens, K] and H = XᵀX / tokens, the output error is
tr((W − Ŵ) H (W − Ŵ)ᵀ). With U the upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU), rounding the tile of
columns T to Q_T and setting, for the columns R that follow,

    W_R ← W_R − (W_T − Q_T) · U_TT⁻¹ · U_TR

is the exact minimiser over W_R (Frantar et al., "GPTQ", 2022; the tile form is the block LDL of
Chee et al., "QuIP", 2023). Updates are applied at once inside a panel of columns and as one matrix
product to the rest.

Order: columns with the largest H_kk first, scales fixed beforehand on the original groups, so that
no index of groups is stored. A column that no input ever excites (H_kk = 0) is rounded to nearest.

Refinement (`sweeps`): with all codes known, the error is a quadratic in each tile given the others;
re-rounding tile by tile to W_T + (error of the others) · H_RT · H_TT⁻¹ never raises it.

H is damped by `damping` · mean(diag H); if the factorisation fails, damping is raised tenfold, up to
`retries` times; then this tensor is rounded to nearest and says so (`fallbacks`).
"""

from dataclasses import dataclass

import torch

from ...quant.block import Block
from ...quant.errors import RecipeError
from ...quant.format import Format, Parts
from ..matrices import Matrix, MatrixBatch, Rounded, batches, matrices
from ..protocol import Pass, Stats

PANEL = 64  # columns whose updates are applied one by one; the rest gets one matrix product


@dataclass(frozen=True)
class GptqOptions:
    """damping: share of mean(diag H) added to the diagonal. retries: tenfold raises of it.
    activation_order: large H_kk first. sweeps: refinement rounds over all columns.
    min_tokens: an input (an expert's, usually) with fewer calibration tokens is not trusted: its
    weights are rounded to nearest, which is reported as a fallback."""

    damping: float = 0.01
    retries: int = 3
    activation_order: bool = True
    sweeps: int = 1
    min_tokens: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.damping, float) or not 0 < self.damping < 1:
            raise RecipeError(f"gptq: damping must be between 0 and 1, got {self.damping!r}")
        for key in ("retries", "sweeps", "min_tokens"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise RecipeError(f"gptq: {key} must be a whole number ≥ 0, got {value!r}")
        if not isinstance(self.activation_order, bool):
            raise RecipeError(
                f"gptq: activation_order must be true or false, got {self.activation_order!r}"
            )


@dataclass(frozen=True)
class Problem:
    """A batch ready to sweep: fp32 weights [B, N, K], damped H and U [B, K, K], fixed scales, and
    `order` int64 [B, K / tile], the tiles in the order in which they are rounded."""

    weights: torch.Tensor
    hessian: torch.Tensor
    factor: torch.Tensor
    order: torch.Tensor
    scales: Parts
    format: Format
    options: object


def run(block: Block, stats: Stats, options: GptqOptions) -> Block:
    """Round all weights; those that cannot be swept are rounded to nearest and say why."""
    rounded = Rounded()
    trusted: list[Matrix] = []
    refused: list[Matrix] = []
    for matrix in matrices(block, stats):
        reason = _refusal(matrix, options)
        (trusted if reason is None else refused).append(matrix)
        _note(matrix, reason)
    for batch in batches(trusted):
        _round_batch(batch, options, rounded)
    for batch in batches(refused):
        values = batch.values()
        scales = batch.scales(values)
        codes, _ = batch.format.round(values, scales, 0, batch.options)
        rounded.put(batch, codes, scales)
    for weight in block.weights:
        weight.packed = rounded.pack(weight)
    return block


def _refusal(matrix: Matrix, options: GptqOptions) -> str | None:
    """Why the matrix's statistics cannot guide rounding, or None."""
    moments = matrix.moments
    if moments is None or moments.tokens == 0:
        return "saw no calibration tokens"
    if moments.tokens < options.min_tokens:
        return f"saw {moments.tokens} calibration tokens, {options.min_tokens} are needed"
    if not bool(torch.isfinite(moments.hessian).all()):
        return "its calibration statistics hold NaN or Inf"
    return None


def _note(matrix: Matrix, reason: str | None) -> None:
    if reason is None:
        return
    for piece in matrix.pieces:
        where = "" if piece.expert is None else f"expert {piece.expert}: "
        piece.weight.fallbacks.append(f"{where}rounded to nearest: {reason}")


def _round_batch(batch: MatrixBatch, options: GptqOptions, rounded: Rounded) -> None:
    """Sweep a batch; a failed factorisation is isolated by trying its matrices one by one."""
    weights, hessian = batch.values(), batch.hessians()
    scales = batch.scales(weights)
    problem = prepare(weights, hessian, scales, batch.format, batch.options, options)
    if problem is not None:
        rounded.put(batch, sweep(problem, options), scales)
        return
    if len(batch.matrices) > 1:
        for matrix in batch.matrices:
            _round_batch(MatrixBatch((matrix,), batch.format, batch.options), options, rounded)
        return
    _note(batch.matrices[0], "its Hessian could not be factorised at any damping")
    codes, _ = batch.format.round(weights, scales, 0, batch.options)
    rounded.put(batch, codes, scales)


def prepare(
    weights: torch.Tensor,
    hessian: torch.Tensor,
    scales: Parts,
    store: Format,
    store_options: object,
    options: GptqOptions,
) -> Problem | None:
    """Damp, order and factorise; None if no damping makes the factorisation succeed."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    order = _tile_order(diagonal, store.tile, options.activation_order)
    columns = _columns(order, store.tile)
    for attempt in range(options.retries + 1):
        damped = hessian.clone()
        extra = (options.damping * 10**attempt * mean).clamp_min(torch.finfo(torch.float32).tiny)
        damped.diagonal(dim1=-2, dim2=-1).add_(extra)
        damped.diagonal(dim1=-2, dim2=-1).masked_fill_(diagonal == 0, 1.0)
        factor = _inverse_factor(_permute(damped, columns))
        if factor is not None:
            return Problem(weights, damped, factor, order, scales, store, store_options)
    return None


def _tile_order(diagonal: torch.Tensor, tile: int, by_activation: bool) -> torch.Tensor:
    """Tiles [B, K / tile] in rounding order; equal energies keep their place."""
    energy = diagonal.unflatten(-1, (-1, tile)).sum(-1)
    if by_activation:
        return torch.argsort(energy, dim=-1, descending=True, stable=True)
    return torch.arange(energy.shape[-1], device=diagonal.device).expand_as(energy)


def _columns(order: torch.Tensor, tile: int) -> torch.Tensor:
    """Column indices [B, K] of tiles in `order`."""
    inside = torch.arange(tile, device=order.device)
    return (order.unsqueeze(-1) * tile + inside).flatten(-2)


def _permute(hessian: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    rows = columns.unsqueeze(-1).expand_as(hessian)
    return hessian.gather(-2, rows).gather(-1, rows.mT)


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor | None:
    """Upper U with H⁻¹ = UᵀU for each matrix of the batch, None if any fails."""
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if bool(failed.any()):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if bool(failed.any()) or not bool(torch.isfinite(upper).all()):
        return None
    return upper


def sweep(problem: Problem, options: GptqOptions) -> torch.Tensor:
    """Codes uint8 [B, N, K] by one error-repaying pass and `options.sweeps` refinements."""
    columns = _columns(problem.order, problem.format.tile)
    index = columns.unsqueeze(-1).expand(-1, -1, problem.weights.shape[-2])
    dense = problem.weights.mT.gather(-2, index)
    codes, values = _repay(problem, dense)
    if options.sweeps:
        hessian = _permute(problem.hessian, columns)
        for _ in range(options.sweeps):
            codes, values = _refine(problem, hessian, dense, codes, values)
    return torch.empty_like(codes).scatter_(-2, index, codes).mT


# Both passes below work on transposed matrices [B, K, N] in rounding order: a column of the weight
# is then contiguous, and the update of its panel is an outer product of two contiguous vectors.


def _round_tile(
    problem: Problem, target: torch.Tensor, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and values [B, tile, N] of `target` [B, tile, N], the `tile`-th in order."""
    start = problem.order[:, tile] * problem.format.tile
    code, value = problem.format.round(target.mT, problem.scales, start, problem.options)
    return code.mT, value.mT


def _panels(n_columns: int, tile: int) -> list[tuple[int, int]]:
    size = -(-PANEL // tile) * tile
    return [(first, min(first + size, n_columns)) for first in range(0, n_columns, size)]


def _repay(problem: Problem, dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The GPTQ pass over `dense` [B, K, N], tile by tile. Returns codes and values [B, K, N]."""
    tile, work = problem.format.tile, dense.clone()
    values, codes = torch.empty_like(work), torch.empty_like(work, dtype=torch.uint8)
    for first, last in _panels(work.shape[-2], tile):
        upper = problem.factor[:, first:last].mT.contiguous()  # row k: what column k is owed
        errors = torch.empty_like(work[:, first:last])
        for start in range(first, last, tile):
            stop, begin, end = start + tile, start - first, start + tile - first
            code, value = _round_tile(problem, work[:, start:stop], start // tile)
            codes[:, start:stop], values[:, start:stop] = code, value
            error = _divided(work[:, start:stop] - value, problem.factor[:, start:stop, start:stop])
            errors[:, begin:end] = error
            work[:, stop:last].baddbmm_(upper[:, stop:last, begin:end], error, alpha=-1)
        work[:, last:].baddbmm_(upper[:, last:], errors, alpha=-1)
    return codes, values


def _divided(error: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """U_TT⁻ᵀ · error, for error [B, tile, N]."""
    if factor.shape[-1] == 1:
        return error / factor
    return torch.linalg.solve_triangular(factor.mT, error, upper=False)


def _refine(
    problem: Problem,
    hessian: torch.Tensor,
    dense: torch.Tensor,
    codes: torch.Tensor,
    values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinate descent: each tile re-rounded to its optimum given all others. All [B, K, N]."""
    tile = problem.format.tile
    codes, values = codes.clone(), values.clone()
    gradient = hessian @ (dense - values)
    for first, last in _panels(dense.shape[-2], tile):
        local = gradient[:, first:last].clone()
        changes = torch.empty_like(local)
        for start in range(first, last, tile):
            stop, begin, end = start + tile, start - first, start + tile - first
            old = values[:, start:stop].clone()
            step = _solved(hessian[:, start:stop, start:stop], local[:, begin:end])
            code, value = _round_tile(problem, old + step, start // tile)
            codes[:, start:stop], values[:, start:stop] = code, value
            changes[:, begin:end] = change = value - old
            local[:, end:].baddbmm_(hessian[:, stop:last, start:stop], change, alpha=-1)
        gradient.baddbmm_(hessian[:, :, first:last], changes, alpha=-1)
    return codes, values


def _solved(block: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """H_TT⁻¹ · gradient, for gradient [B, tile, N]."""
    if block.shape[-1] == 1:
        return gradient / block
    return torch.linalg.solve(block, gradient)


PASS = Pass(
    name="gptq",
    kind="round",
    Options=GptqOptions,
    needs=lambda options: ("moments",),
    refuse=lambda architecture, options: None,
    run=run,
)
