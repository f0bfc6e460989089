"""Searches the scales of each group of columns among those that its format offers.

A format knows which joint choices of step, shift and range are worth a try (`Format.candidates`); this
pass knows what they cost. For each candidate the weights are rounded to nearest, and each row keeps,
for each group g of columns, the candidate of least output error

    error(row, g) = d H_gg dᵀ          d = (w − ŵ)_g, H_gg the group's block of XᵀX / tokens

so that the parts which are stored once for each group are mixed from all candidates. Without statistics
(`data_free`, or an expert that saw no token) H is the identity: plain weight error.

The result is left in `Weight.scales`, which rounding passes use instead of fitting; nothing is rounded
here. Rows are worked through in chunks that fit the processor's cache.
"""

from dataclasses import dataclass

import torch

from ...quant.block import Block
from ...quant.errors import RecipeError
from ...quant.format import Parts
from ..matrices import MatrixBatch, batches, matrices
from ..protocol import Pass, Stats

CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class ScaleSearchOptions:
    """data_free: minimise the weight error instead of the output error."""

    data_free: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.data_free, bool):
            raise RecipeError(f"scale_search: data_free must be true or false: {self.data_free!r}")


def run(block: Block, stats: Stats, options: ScaleSearchOptions) -> Block:
    """Leave the best scales in each weight's `scales`."""
    found = list(matrices(block, {} if options.data_free else stats))
    with_data = [matrix for matrix in found if matrix.moments is not None]
    without = [matrix for matrix in found if matrix.moments is None]
    for part in (with_data, without):
        for batch in batches(part):
            batch.leave_scales(search(batch))
    return block


def search(batch: MatrixBatch) -> Parts:
    """Best scale parts [B, N, ...] of a batch."""
    values = batch.values()
    size = batch.format.group_size(values.shape[-1], batch.options)
    metric = _group_metric(batch, size)
    step = max(1, CHUNK_ELEMENTS // (values.shape[0] * values.shape[-1]))
    chunks = [
        _search_rows(batch, values[:, start : start + step], size, metric)
        for start in range(0, values.shape[1], step)
    ]
    return {name: torch.cat([chunk[name] for chunk in chunks], -2) for name in chunks[0]}


def _search_rows(
    batch: MatrixBatch, rows: torch.Tensor, size: int, metric: torch.Tensor | None
) -> Parts:
    """Best scale parts of `rows` [B, n, K]."""
    best: Parts = {}
    least = rows.new_full((*rows.shape[:-1], rows.shape[-1] // size), torch.inf)
    for scales in batch.format.candidates(rows, batch.options):
        _, rounded = batch.format.round(rows, scales, 0, batch.options)
        error = _group_error(rounded.sub_(rows).unflatten(-1, (-1, size)), metric)
        if not best:  # also what stays if statistics are NaN
            best, least = scales, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = {name: _mixed(better, part, best[name]) for name, part in scales.items()}
    return best


def _mixed(better: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Part of each group from the better candidate; parts of other shapes are equal in both."""
    return torch.where(better, new, old) if new.shape == better.shape else old


def _group_metric(batch: MatrixBatch, size: int) -> torch.Tensor | None:
    """Diagonal blocks of the Hessian, [B, groups, size, size]; None for the identity."""
    if any(matrix.moments is None for matrix in batch.matrices):
        return None
    hessian = batch.hessians()
    starts = range(0, hessian.shape[-1], size)
    return torch.stack([hessian[:, i : i + size, i : i + size] for i in starts], dim=1)


def _group_error(delta: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """d H_gg dᵀ for delta [B, n, groups, size]."""
    if metric is None:
        return delta.square().sum(-1)
    by_group = delta.transpose(1, 2)  # [B, groups, n, size]
    return ((by_group @ metric) * by_group).sum(-1).transpose(1, 2)


PASS = Pass(
    name="scale_search",
    kind="tune",
    Options=ScaleSearchOptions,
    needs=lambda options: () if options.data_free else ("moments",),
    refuse=lambda architecture, options: None,
    run=run,
)
