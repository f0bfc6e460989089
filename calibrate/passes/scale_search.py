"""Searches the scales of each group of columns among those that its format offers.

A format knows which joint choices of step, shift and range are worth a try (`Format.candidates`);
this pass knows what they cost. For each candidate the weights are rounded to nearest, d = w − ŵ, and
each row keeps, for each group g of columns, the candidate of least error; parts that are stored once
for each group are mixed from all candidates. H is XᵀX / tokens over the calibration inputs, λ is 1 %
of its mean diagonal.

    "conditional"   Σ d_k² / [(H + λ)⁻¹]_kk, k in g    what the error of a column costs once all other
                                                        columns have repaid what they can: for `gptq`
    "group"         d_g H_gg d_gᵀ                       the group's output error: for nearest rounding

Measured on the bundled model (18 linears, `int_two_level`, output error after `gptq` relative to fitted
scales): conditional 0.918, plain weight error 0.923, group 0.947. After nearest rounding, group is best
(0.65, plain weight error 0.85). Choosing again among neighbouring steps and shifts once `gptq` had
fixed the codes moved 1 % of the groups and gained less than one more sweep of `gptq` does.

Without statistics (`data_free`, or an expert that saw no token) the error is Σ d². Padding is free.
The result is left in `Weight.scales`, which rounding passes use instead of fitting; nothing is rounded
here. Rows are worked through in chunks that fit the processor's cache.
"""

from dataclasses import dataclass

import torch

from ...quant.block import Block
from ...quant.errors import RecipeError
from ...quant.format import Parts
from ..matrices import MatrixBatch, block_errors, searched_batches
from ..protocol import Pass, Stats

CHUNK_ELEMENTS = 1 << 19
DAMPING = 0.01  # share of the mean diagonal of H, as in `gptq`


@dataclass(frozen=True)
class ScaleSearchOptions:
    """metric: "conditional" when `gptq` rounds afterwards, "group" when nearest rounding does.
    data_free: minimise the weight error, needs no statistics."""

    metric: str = "conditional"
    data_free: bool = False

    def __post_init__(self) -> None:
        if self.metric not in ("conditional", "group"):
            raise RecipeError(
                f"scale_search: metric must be 'conditional' or 'group', got {self.metric!r}"
            )
        if not isinstance(self.data_free, bool):
            raise RecipeError(f"scale_search: data_free must be true or false: {self.data_free!r}")


def run(block: Block, stats: Stats, options: ScaleSearchOptions) -> Block:
    """Leave the best scales in each weight's `scales`."""
    for batch in searched_batches(block, {} if options.data_free else stats):
        batch.leave_scales(search(batch, options))
    return block


def search(batch: MatrixBatch, options: ScaleSearchOptions) -> Parts:
    """Best scale parts [B, N, ...] of a batch."""
    values = batch.values()
    size = batch.format.group_size(values.shape[-1], batch.options)
    if batch.has_moments and options.metric == "group":
        metric = batch.hessian_blocks(size)
    else:
        metric = _column_costs(batch).unflatten(-1, (-1, size))
    step = max(1, CHUNK_ELEMENTS // (values.shape[0] * values.shape[-1]))
    chunks = [
        _search_rows(batch, values[:, start : start + step], size, metric)
        for start in range(0, values.shape[1], step)
    ]
    return {name: torch.cat([chunk[name] for chunk in chunks], -2) for name in chunks[0]}


def _search_rows(batch: MatrixBatch, rows: torch.Tensor, size: int, metric: torch.Tensor) -> Parts:
    """Best scale parts of `rows` [B, n, K]."""
    best: Parts = {}
    least = rows.new_full((*rows.shape[:-1], rows.shape[-1] // size), torch.inf)
    for scales in batch.format.candidates(rows, batch.options):
        _, rounded = batch.format.round(rows, scales, 0, batch.options)
        error = _group_error(rounded.sub_(rows).unflatten(-1, (-1, size)), metric)
        error.clamp_(min=0)  # statistics that are not positive must not reward errors
        if not best:  # also what stays if statistics are NaN
            best, least = scales, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = {name: _mixed(better, part, best[name]) for name, part in scales.items()}
    return best


def _mixed(better: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Part of each group from the better candidate. A row that is one group may have parts of several
    numbers; parts of other shapes are equal in both."""
    return torch.where(better, new, old) if better.shape[-1] in (1, new.shape[-1]) else old


def _column_costs(batch: MatrixBatch) -> torch.Tensor:
    """Cost [B, padded K] of a unit error in each column; zero in the padding."""
    if batch.has_moments:
        costs = _conditional(batch.hessians())
    else:
        costs = batch.values().new_ones(len(batch.matrices), batch.padded_k)
    costs[:, batch.matrices[0].k :] = 0
    return costs


def _conditional(hessian: torch.Tensor) -> torch.Tensor:
    """1 / [(H + λ)⁻¹]_kk, [B, K]; the diagonal of H where that cannot be factorised."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    extra = (DAMPING * diagonal.mean(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    damped = hessian.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(extra)
    lower, failed = torch.linalg.cholesky_ex(damped)
    inverse = torch.cholesky_inverse(lower).diagonal(dim1=-2, dim2=-1)
    return torch.where((failed != 0).unsqueeze(-1), diagonal, inverse.reciprocal())


def _group_error(delta: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """Error [B, n, groups] of `delta` [B, n, groups, size], which is overwritten. `metric`: blocks
    [B, groups, size, size], or costs of columns [B, groups, size]."""
    if metric.dim() == 3:
        return delta.square_().mul_(metric.unsqueeze(1)).sum(-1)
    return block_errors(delta, metric)


PASS = Pass(
    name="scale_search",
    kind="tune",
    Options=ScaleSearchOptions,
    needs=lambda options: () if options.data_free else ("moments",),
    refuse=lambda architecture, options: None,
    run=run,
)
