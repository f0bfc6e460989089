"""Checks of kernels for attention over packed pages.

    plain calls           against a softmax in fp64 over the decoded pages
    masks, soft caps,     against `kv_softmax.py` in fp32, which defines in which form a token is read
    sink logits, windows

Tokens: 1, 63, 64, 65, 300, 4097; query heads of a KV head: 1, 4, 8; and so on, see `CASES`. Slots of
the last page that hold no token yet are bytes of ones: NaN in scales, the largest code in codes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from bench.oracle_check import (
    DTYPES,
    Check,
    Lane,
    Place,
    pick_config,
    poison_free_memory,
    row_error,
)
from fewbit.quant import kv_softmax
from fewbit.quant.kernel import AttentionProblem, Config, Kernel
from fewbit.quant.kv_cache import PackedLayer
from fewbit.quant.kv_pages import PAGE
from fewbit.quant.kv_policy import KVPolicy, PageUse
from fewbit.quant.kv_view import Handle, KVView, Scoring
from fewbit.quant.page_format import page_formats
from fewbit.quant.timed_case import TOLERANCE

TOKENS = (1, 63, 64, 65, 300, 4097)
GROUPS = (1, 4, 8)
_FEW_TOKENS, _FEW_GROUPS = (1, 65, 300), (1, 4)
_FEW_CASES, _FEW_STEPS = 3, 2
_STRIDE = 7  # has no divisor in common with the spots
_SOFTCAP = 20.0


@dataclass(frozen=True)
class Case:
    """What a call has beyond tokens and groups. residual, sink: of the cache. extras: of a problem."""

    name: str
    n_rows: int = 2
    n_queries: int = 1
    kv_heads: int = 2
    head_dim: int = 128
    residual: int = 0
    sink: int = 0
    extras: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Are all tokens stored, and all of them seen?"""
        return not (self.residual or self.sink or self.extras)


CASES = (
    Case("plain"),
    Case("window", residual=64, sink=4),
    Case("queries", n_queries=4),
    Case("mask", extras=("mask",), n_rows=3),
    Case("softcap", extras=("softcap",), head_dim=64),
    Case("sinks", extras=("sinks",), head_dim=96),
    Case("many queries", n_queries=8, n_rows=1, residual=16),
    Case("wide", n_rows=1, head_dim=256, kv_heads=1),
    Case("one row", n_rows=1, kv_heads=8, head_dim=80),
)


def lanes(kernel: Kernel, place: Place) -> list[Lane]:
    """One lane for each page format, case and dtype."""
    tokens, groups = (_FEW_TOKENS, _FEW_GROUPS) if place.reduced else (TOKENS, GROUPS)
    cases = CASES[:_FEW_CASES] if place.reduced else CASES
    spots = [(t, g) for g in groups for t in tokens]
    n_steps = _FEW_STEPS if place.reduced else len(spots)
    kinds = [
        (name, case, dtype) for case in cases for dtype in DTYPES for name in sorted(page_formats())
    ]
    return [
        [
            partial(
                _check, kernel, name, case, dtype,
                spots[(at + _STRIDE * i) % len(spots)], at + i, place,
            )
            for i in range(n_steps)
        ]
        for at, (name, case, dtype) in enumerate(kinds)
    ]  # fmt: skip


def _check(
    kernel: Kernel,
    pages: str,
    case: Case,
    dtype: torch.dtype,
    spot: tuple[int, int],
    index: int,
    place: Place,
) -> Check | None:
    n_tokens, group = spot
    if n_tokens < case.n_queries:
        return None
    problem = attention_problem(pages, case, group, n_tokens, dtype, place)
    if kernel.refuse(problem):
        return None
    config = pick_config(kernel, problem, index)
    told = problem.family.replace(" * ", f" T={n_tokens} ")
    if not case.is_plain:
        told += f" ({case.name})"
    return Check(
        kernel.name,
        config,
        told,
        TOLERANCE[dtype],
        partial(_error, kernel, pages, case, group, n_tokens, dtype, config, place),
    )


def attention_problem(
    pages: str, case: Case, group: int, n_tokens: int, dtype: torch.dtype, place: Place
) -> AttentionProblem:
    """The problem that the call poses, without making a cache."""
    options = page_formats()[pages].Options()
    problem = AttentionProblem(
        key=pages,
        key_options=options,
        value=pages,
        value_options=options,
        n_rows=case.n_rows,
        n_queries=case.n_queries,
        kv_heads=case.kv_heads,
        group=group,
        head_dim=case.head_dim,
        value_dim=case.head_dim,
        t_bucket=AttentionProblem.buckets[0],
        dtype=dtype,
        device="cuda",
        extras=case.extras,
        machine=place.machine,
    )
    return problem.at(next(size for size in problem.buckets if n_tokens <= size))


def _error(
    kernel: Kernel,
    pages: str,
    case: Case,
    group: int,
    n_tokens: int,
    dtype: torch.dtype,
    config: Config,
    place: Place,
) -> float:
    view = filled_view(pages, case, n_tokens, dtype, place.device)
    generator = torch.Generator().manual_seed(group)
    shape = (case.n_rows, case.kv_heads * group, case.n_queries, case.head_dim)
    query = (2 * torch.randn(shape, generator=generator)).to(place.device, dtype)
    scoring = scoring_of(case, query.shape[1], n_tokens, dtype, place.device)
    poison_free_memory(place.device)
    with torch.no_grad():
        launch: Callable[..., Any] = kernel.launch
        found = (
            launch(view, query, scoring, config=config) if config else launch(view, query, scoring)
        )
        if case.is_plain:
            wanted = plain_attention(view, query, scoring.scaling)
        else:
            wanted = kv_softmax.attend(view, query.float(), scoring)
    return row_error(found, wanted)


# ---- calls ----------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def filled_view(pages: str, case: Case, n_tokens: int, dtype: torch.dtype, device: str) -> KVView:
    """A cache of `n_tokens` random tokens with an outlier channel, and what its newest call sees."""
    use = PageUse(pages, page_formats()[pages].Options())
    layer = PackedLayer(KVPolicy(use, use, case.residual, case.sink), reserve=n_tokens)
    shape = (case.n_rows, case.kv_heads, n_tokens, case.head_dim)
    generator = torch.Generator().manual_seed(n_tokens)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    keys[..., 3] *= 8
    keys, values = keys.to(device, dtype), values.to(device, dtype)
    before = n_tokens - case.n_queries
    if before:
        layer.update(keys[:, :, :before], values[:, :, :before])
    handle: Handle = layer.update(keys[:, :, before:], values[:, :, before:])[0]
    poison_slots(layer)
    return handle.view


def poison_slots(layer: PackedLayer) -> None:
    """Fill the slots of each row's last page that hold nothing with bytes of ones."""
    arena = layer.pages
    if arena is None or arena.n_tokens % PAGE == 0:
        return
    last = arena.paged().table[:, arena.n_tokens // PAGE]
    for parts in arena.storage:
        for part in parts.values():
            slots = part[last]
            slots[:, :, arena.n_tokens % PAGE :].view(torch.uint8).fill_(255)
            part[last] = slots


def scoring_of(case: Case, n_heads: int, n_tokens: int, dtype: torch.dtype, device: str) -> Scoring:
    """Causal; with a mask, the first tokens of each row but the first are padding."""
    mask = sinks = None
    if "mask" in case.extras:
        token = torch.arange(n_tokens)
        padding = torch.arange(case.n_rows) * min(7, (n_tokens - 1) // max(1, case.n_rows - 1))
        mask = (token >= padding.view(-1, 1, 1, 1)).expand(-1, 1, case.n_queries, -1)
        mask = mask.to(device)
    if "sinks" in case.extras:
        sinks = torch.linspace(-1, 2, n_heads).to(device, dtype)
    softcap = _SOFTCAP if "softcap" in case.extras else None
    return Scoring(case.head_dim**-0.5, mask, True, softcap, sinks)


def plain_attention(view: KVView, query: torch.Tensor, scaling: float) -> torch.Tensor:
    """fp64 [B, H, Q, Dv] on the CPU: causal attention over all stored tokens."""
    keys, values = (side.cpu().double() for side in view.read(0, view.n_tokens))
    n_rows, n_heads, n_queries, _ = query.shape
    grouped = query.cpu().double().unflatten(1, (keys.shape[1], -1))
    scores = scaling * torch.einsum("bhgqd,bhtd->bhgqt", grouped, keys)
    seen = torch.ones(n_queries, view.n_tokens, dtype=torch.bool).tril(view.n_tokens - n_queries)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out = torch.einsum("bhgqt,bhtd->bhgqd", weights, values)
    return out.reshape(n_rows, n_heads, n_queries, -1)
