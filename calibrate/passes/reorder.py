"""Orders channels so that those of one size share a group of the weight's format.

    down_proj   rows of gate and up [order]     columns of down [order]
    o_proj      rows of v [order]               columns of o [order], within a head, one per KV head

An order puts channels of a key together: largest or mean square of the activation, size of the
weight's columns, or the product of the latter two. The order of least output error is taken, with
inputs and weights rounded as the recipe says, and only if it errs less than the order of the file.

Nothing is done where a group holds all channels that could change places: rows as groups, or heads
no longer than a group. Experts that saw too few tokens are left alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...quant.format import find_format
from ..edges import AttentionEdge, MlpEdge, ModelEdges
from ..edits import Edit, Permute, Side
from ..protocol import BlockTransform, BlockView
from ..search import largest, make_probe, rms
from ._edges import missing_edge, read_beside, seen_mlps, wanted_edges

EDGES = ("down_proj", "o_proj")
_GAIN = 0.99  # an order must err less than this share of what the file's order errs


@dataclass(frozen=True)
class ReorderOptions:
    """edges: some of down_proj, o_proj."""

    edges: Any = ("down_proj",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", wanted_edges("reorder", self.edges, EDGES))


def refuse(edges: ModelEdges, options: ReorderOptions) -> str | None:
    """What is missing for the wanted edges."""
    sentences = (missing_edge(block, options.edges) for block in edges.blocks)
    return next((sentence for sentence in sentences if sentence), None)


def edits(view: BlockView, options: ReorderOptions) -> list[Edit]:
    """Permutations of the wanted edges that lower the error."""
    found: list[Edit] = []
    if "down_proj" in options.edges:
        for mlp, x in seen_mlps(view):
            found += _mlp_edits(view, mlp, x)
    if "o_proj" in options.edges and view.edges.attention is not None:
        found += _value_edits(view, view.edges.attention)
    return found


def _mlp_edits(view: BlockView, mlp: MlpEdge, x: torch.Tensor) -> list[Edit]:
    if not _worth(view, mlp.down, x.shape[1]):
        return []
    orders = [key.argsort(stable=True) for key in _keys(view, mlp.down, x)]
    order = _best(view, mlp.down, x, orders, len(view.edges.mlps))
    if order is None:
        return []
    return [Edit(side, Permute(order.cpu())) for side in (*mlp.gate, *mlp.up, mlp.down)]


def _value_edits(view: BlockView, edge: AttentionEdge) -> list[Edit]:
    x = view.seen.rows.get(edge.o.key)
    if x is None or not _worth(view, edge.o, edge.head_dim):
        return []
    group = edge.heads // edge.kv_heads

    def within(key: torch.Tensor) -> torch.Tensor:
        heads = key.view(edge.kv_heads, group, edge.head_dim).amax(1)
        return heads.argsort(stable=True, dim=-1)

    orders = [within(key) for key in _keys(view, edge.o, x)]
    flat = [_flattened(order.repeat_interleave(group, 0)) for order in orders]
    best = _best(view, edge.o, x, flat, 1)
    if best is None:
        return []
    by_value = _flattened((best.view(edge.heads, -1) % edge.head_dim)[::group])
    return [
        *(Edit(side, Permute(by_value.cpu())) for side in edge.v),
        Edit(edge.o, Permute(best.cpu())),
    ]


def _flattened(orders: torch.Tensor) -> torch.Tensor:
    """Orders [n, D] within heads -> one order of n · D channels."""
    n, size = orders.shape
    return (orders + torch.arange(n, device=orders.device).unsqueeze(1) * size).flatten()


def _worth(view: BlockView, side: Side, free: int) -> bool:
    """Whether `free` neighbouring channels fall into several groups; where nothing is rounded at
    all, orders are tried for their own sake (`_best`)."""
    if not view.rules:
        return True
    rule = view.rules.get(side.key)
    if rule is None:
        return False
    size = find_format(rule[0]).group_size(view.read(side.key).shape[-1], rule[1])
    return free > size or size % free != 0


def _keys(view: BlockView, side: Side, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """What channels can be ordered by, each [K]."""
    weight = read_beside(view, side, x)
    columns = rms(weight, 0)
    yield rms(x, 0) * columns
    yield largest(x, 0)
    yield rms(x, 0)
    yield columns
    yield largest(weight, 0)


def _best(
    view: BlockView, side: Side, x: torch.Tensor, orders: list[torch.Tensor], n: int
) -> torch.Tensor | None:
    """The order of least error, None for the file's; the first one if nothing is rounded (that is
    the trial that shows whether these channels may be permuted at all)."""
    if not view.rules:
        return orders[0]
    weight = read_beside(view, side, x)
    probe = make_probe(x, weight, view.rules[side.key], view.activation, n)
    errors = [probe.ordered(order) for order in orders]
    least = min(range(len(orders)), key=errors.__getitem__)
    return orders[least] if errors[least] < _GAIN * probe.ordered(None) else None


PASS = BlockTransform(
    name="reorder",
    Options=ReorderOptions,
    refuse=refuse,
    edits=edits,
)
