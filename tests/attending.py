"""Caches filled with random tokens, and attention over what they hold in float64."""

from typing import Any

import torch

from fewbit.quant.kv_cache import PackedLayer
from fewbit.quant.kv_policy import parse_kv
from fewbit.quant.kv_view import KVView, Scoring

INT4 = {"format": "int4_head"}


def layer_of(
    form: Any = INT4, residual: int = 0, sink: int = 0, starts: torch.Tensor | None = None
) -> PackedLayer:
    """An empty layer, keys and values in one format."""
    tree = {"key": form, "value": form, "residual": residual, "sink": sink}
    return PackedLayer(parse_kv(tree, "kv"), starts=starts)


def vectors(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> torch.Tensor:
    """Normal numbers; one channel is offset, as in keys of real models."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    made[..., 3] += 6
    return made.to(device, dtype)


def fill(layer: PackedLayer, keys: torch.Tensor, values: torch.Tensor, n_queries: int) -> KVView:
    """Feed keys and values [B, heads, T, D]; what the newest `n_queries` of them see."""
    before = keys.shape[2] - n_queries
    if before:
        layer.update(keys[:, :, :before], values[:, :, :before])
    handle = layer.update(keys[:, :, before:], values[:, :, before:])[0]
    view: KVView = handle.view
    return view


def poison(layer: PackedLayer) -> None:
    """Bytes of ones (NaN as fp16) in every slot that holds no token."""
    arena = layer.pages
    assert arena is not None, "the layer is empty"
    n_tokens, table = arena.n_tokens, arena.paged().table
    used = torch.zeros(*arena.storage[0]["scale"].shape[:1], 64, dtype=torch.bool)
    for column in range(-(-n_tokens // 64)):
        for page in table[:, column].tolist():
            used[page, : n_tokens - 64 * column] = True
    for parts in arena.storage:
        for part in parts.values():
            part.transpose(1, 2)[~used.to(part.device)] = (
                255 if part.dtype == torch.uint8 else float("nan")
            )


def exact(view: KVView, query: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Output fp64 [B, H, Q, Dv] of a boolean mask or none; each key read in the form that it should."""
    n_tokens, n_queries, device = view.n_tokens, view.n_queries, query.device
    stored = [torch.zeros(*shape, dtype=torch.float64, device=device) for shape in view.shapes]
    dense = [torch.zeros_like(side) for side in stored]
    if view.stored:
        for side, run in zip(stored, view.read(0, view.stored), strict=True):
            side[:, :, : view.stored] = run.double()
    if view.band is not None:
        for side, run in zip(dense, view.band, strict=True):
            side[:, :, view.band_start :] = run.double()
    limits = view.limits()
    if limits is None:
        limits = torch.full((n_queries,), view.band_start, device=device)
    position = torch.arange(n_tokens, device=device)
    is_dense = position >= limits.unsqueeze(1)
    group = query.shape[1] // view.shapes[0][1]
    keys, values, old_keys, old_values = (
        side.repeat_interleave(group, dim=1) for side in (*dense, *stored)
    )
    wide = query.double()
    scores = torch.where(is_dense, wide @ keys.mT, wide @ old_keys.mT) * scoring.scaling
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    asking = position[n_tokens - n_queries :].unsqueeze(1)
    seen = scoring.mask if scoring.mask is not None else position <= asking
    scores = scores.masked_fill(~seen, -torch.inf)
    if scoring.sinks is not None:
        column = scoring.sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.nan_to_num(torch.softmax(scores, dim=-1)[..., :n_tokens])
    return (weights * is_dense) @ values + (weights * ~is_dense) @ old_values


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found − wanted| / |wanted| in norms."""
    return float((found.double() - wanted).norm() / wanted.norm())
