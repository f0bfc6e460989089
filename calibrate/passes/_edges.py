"""What transforms along edges have in common: the recipe key `edges`, and what an edge must offer.

Which edges a transform knows, and what it does along them, is its own; this is no pass.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch

from ...quant.errors import RecipeError
from ..edges import BlockEdges, MlpEdge
from ..edits import Side
from ..protocol import BlockView

MIN_TOKENS = 32  # of an expert; with fewer, its inputs tell nothing


def wanted_edges(owner: str, edges: Any, known: Collection[str]) -> tuple[str, ...]:
    """`edges` as the recipe of pass `owner` has them; RecipeError unless some of `known`."""
    if not isinstance(edges, (list, tuple)) or not edges or set(edges) - set(known):
        raise RecipeError(
            f"{owner}: edges must be a list of some of {', '.join(known)}; got {edges!r}"
        )
    return tuple(edges)


def missing_edge(block: BlockEdges, edges: Collection[str]) -> str | None:
    """Why `block` lacks down_proj or o_proj, if they are among `edges`; else None."""
    if "down_proj" in edges and not block.mlps:
        return f"{block.name} has no gated MLP with separate gate, up and down projections"
    if "down_proj" in edges and any(mlp.turned for mlp in block.mlps):
        return "the pass rotate turns the input of down_proj at run time; choose one of the two"
    if "o_proj" in edges and block.attention is None:
        return f"{block.name} has no attention with separate projections q, k, v and o"
    return None


def seen_mlps(view: BlockView) -> Iterator[tuple[MlpEdge, torch.Tensor]]:
    """MLPs and experts with the sampled inputs [t, K] of down, if they are enough to judge by."""
    mlps = view.edges.mlps
    for mlp in mlps:
        x = view.seen.rows.get(mlp.down.key)
        if x is not None and (len(mlps) == 1 or x.shape[0] >= MIN_TOKENS):
            yield mlp, x


def read_beside(view: BlockView, side: Side, x: torch.Tensor) -> torch.Tensor:
    """The tensor of `side`, fp32, on the device of `x`."""
    return view.read(side.key).to(x.device, torch.float32)
