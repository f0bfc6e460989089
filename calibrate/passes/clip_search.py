"""Searches how much of each group's range its scale should cover.

Clipping a few large weights makes the step smaller for all others. For each group of columns g and
each factor c of a grid, the weights are rounded to nearest with range c · max|w|, and the factor of
least output error is kept:

    error(row, g, c) = d H_gg dᵀ          d = (w − ŵ)_g, H_gg the group's block of XᵀX / tokens

A row-wise scale has one group, so the same formula searches per row. Without statistics (`data_free`)
H is the identity: plain weight error. The factors are left in `Weight.clip`; nothing is rounded here.
"""

from dataclasses import dataclass

import torch

from ...quant.block import Block
from ...quant.errors import RecipeError
from ..matrices import Matrix, MatrixBatch, block_errors, searched_batches
from ..protocol import Pass, Stats


@dataclass(frozen=True)
class ClipSearchOptions:
    """lowest: smallest factor tried. steps: factors between it and 1.
    data_free: minimise the weight error instead of the output error."""

    lowest: float = 0.6
    steps: int = 8
    data_free: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.lowest, float) or not 0 < self.lowest < 1:
            raise RecipeError(f"clip_search: lowest must be between 0 and 1, got {self.lowest!r}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise RecipeError(f"clip_search: steps must be a whole number ≥ 1, got {self.steps!r}")
        if not isinstance(self.data_free, bool):
            raise RecipeError(f"clip_search: data_free must be true or false: {self.data_free!r}")


def run(block: Block, stats: Stats, options: ClipSearchOptions) -> Block:
    """Leave the best factors in each weight's `clip`, [..., N, groups]."""
    for batch in searched_batches(block, {} if options.data_free else stats):
        _put(batch, search(batch, options))
    return block


def search(batch: MatrixBatch, options: ClipSearchOptions) -> torch.Tensor:
    """Best factor of each group, fp32 [B, N, groups]."""
    values = batch.values()
    size = batch.format.group_size(values.shape[-1], batch.options)
    metric = batch.hessian_blocks(size) if batch.has_moments else None
    best_error = best = None
    for factor in torch.linspace(1.0, options.lowest, options.steps + 1).tolist():
        clip = torch.full((*values.shape[:-1], values.shape[-1] // size), factor)
        scales = batch.format.fit(values, batch.options, clip.to(values.device))
        _, rounded = batch.format.round(values, scales, 0, batch.options)
        delta = (values - rounded).unflatten(-1, (-1, size))
        error = delta.square().sum(-1) if metric is None else block_errors(delta, metric)
        if best_error is None or best is None:
            best_error, best = error, torch.full_like(error, factor)
        else:
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = best.masked_fill(better, factor)
    if best is None:
        raise RuntimeError("the grid of factors is empty")
    return best


def _put(batch: MatrixBatch, best: torch.Tensor) -> None:
    for index, matrix in enumerate(batch.matrices):
        _put_matrix(matrix, best[index])


def _put_matrix(matrix: Matrix, best: torch.Tensor) -> None:
    for piece in matrix.pieces:
        weight, rows = piece.weight, best[piece.start : piece.stop]
        if piece.expert is None:
            weight.clip = rows
            continue
        if weight.clip is None:
            weight.clip = rows.new_ones(*weight.value.shape[:-1], rows.shape[-1])
        weight.clip[piece.expert] = rows


PASS = Pass(
    name="clip_search",
    kind="tune",
    Options=ClipSearchOptions,
    needs=lambda options: () if options.data_free else ("moments",),
    refuse=lambda architecture, options: None,
    run=run,
)
