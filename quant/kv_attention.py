"""Attention over stored keys and values, a bounded run of tokens at a time, and its registration.

A query at position p with limit c(p) reads key k as stored if k < c(p), and dense if k ≥ c(p):

    c(p) = max(p − residual + 1, first token that is still at hand dense)

so one call may read a token in both forms, for different queries. Runs of keys are decoded, scored
and summed up with a running maximum (online softmax), all in fp32, with query heads of a group
sharing the decoded run:

    m' = max(m, max s)    l' = l·e^(m−m') + Σ e^(s−m')    o' = o·e^(m−m') + e^(s−m')·V

and o / l at the end; a query that may see nothing gets 0. What is decoded at once does not grow
with the length of the text. Logits may be soft-capped, and a learned sink logit per head may join
the denominator. There is no dropout here, and no gradient: a backward that reaches what a cache gave
out raises an error. An autocast region around a call does not change the arithmetic.

A bare forward without our cache reaches the same function with plain tensors; it then is the
library's own "sdpa", except for soft caps and sink logits, which that one ignores or refuses.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .errors import FewbitError

NAME = "fewbit_kv"
_RUN_ELEMENTS = 1 << 20  # decoded numbers of keys at once: 4 MB in fp32
_PROMPT_RUN = 256  # keys at once for a long call
_SCORES = 1 << 22  # scores at once: 16 MB

Read = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class KVView:
    """What one call may attend to; valid until the next update of its layer.

    n_tokens: keys, the call's own included. n_queries: the newest n_queries of them ask.
    stored: the first `stored` keys can be read back with `read(start, stop)`, keys and values fp32
    [B, heads, stop − start, D]. band: keys and values [B, heads, n_tokens − band_start, D] as they
    were computed. residual: tokens that a query reads dense; None if each key has one form only,
    stored before band_start and dense from there on.
    """

    n_tokens: int
    n_queries: int
    stored: int
    read: Read
    band: tuple[torch.Tensor, torch.Tensor] | None
    band_start: int
    residual: int | None
    shapes: tuple[torch.Size, torch.Size]
    dtype: torch.dtype
    device: torch.device

    def limits(self) -> torch.Tensor | None:
        """c(p) for each query, int64 [n_queries]; None if each key has one form."""
        if self.residual is None:
            return None
        first = self.n_tokens - self.n_queries - self.residual + 1
        positions = torch.arange(first, first + self.n_queries, device=self.device)
        return positions.clamp_min(self.band_start)


@dataclass(frozen=True)
class Handle:
    """Stands for the keys (side 0) or values (side 1) of a view in a model's attention layer."""

    view: KVView
    side: int

    @property
    def shape(self) -> torch.Size:
        """[B, heads, n_tokens, D]."""
        return self.view.shapes[self.side]

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the model's arithmetic."""
        return self.view.dtype

    @property
    def device(self) -> torch.device:
        """Where the cache is."""
        return self.view.device


@dataclass(frozen=True)
class Scoring:
    """How logits are made. mask [B or 1, H or 1, Q, T] boolean or additive. sinks: [H]."""

    scaling: float
    mask: torch.Tensor | None
    causal: bool
    softcap: float | None
    sinks: torch.Tensor | None


@dataclass(frozen=True)
class _Run:
    """Keys start … stop, decoded; `form` is "stored", "dense", or "only" if there is no other."""

    start: int
    keys: torch.Tensor
    values: torch.Tensor
    form: str

    @property
    def stop(self) -> int:
        return self.start + self.keys.shape[2]


class _Softmax:
    """Running softmax of queries [B, Hkv, G, Q, D]."""

    def __init__(self, queries: torch.Tensor, value_dim: int) -> None:
        shape = queries.shape[:-1]
        self.queries = queries
        self.top = queries.new_full((*shape, 1), -math.inf)
        self.total = queries.new_zeros((*shape, 1))
        self.output = queries.new_zeros((*shape, value_dim))

    def add(self, rows: slice, scores: torch.Tensor, values: torch.Tensor) -> None:
        """Scores [B, Hkv, G, q, n] of queries `rows` for values [B, Hkv, n, Dv]."""
        old = self.top[:, :, :, rows]
        top = torch.maximum(old, scores.amax(dim=-1, keepdim=True))
        base = top.masked_fill(top == -math.inf, 0.0)  # nothing seen so far: all weights are 0
        weights = (scores - base).exp_()
        fade = (old - base).exp_()
        summed = (weights.flatten(2, 3) @ values).view(*weights.shape[:-1], values.shape[-1])
        self.total[:, :, :, rows] = self.total[:, :, :, rows] * fade + weights.sum(-1, True)
        self.output[:, :, :, rows] = self.output[:, :, :, rows] * fade + summed
        self.top[:, :, :, rows] = top

    def finish(self, sinks: torch.Tensor | None) -> torch.Tensor:
        """Output [B, Hkv, G, Q, Dv]; sinks: logits [Hkv, G, 1, 1] that take weight, give nothing."""
        if sinks is None:
            return self.output / self.total.masked_fill(self.total == 0, 1.0)
        top = torch.maximum(self.top, sinks)
        fade = (self.top - top).exp_()
        return self.output * fade / (self.total * fade + (sinks - top).exp_())


class _NoBackward(torch.autograd.Function):
    """Hands a tensor on as if it depended on another, and refuses to differentiate it."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise FewbitError(
            "a packed KV cache takes no gradient, but backward() reached what it gave out; "
            "call the model with use_cache=False, or under torch.no_grad()"
        )


def forbid_backward(output: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """`output`, made without history; backward through it raises FewbitError if `source` has one."""
    if not (torch.is_grad_enabled() and source.requires_grad):
        return output
    found: torch.Tensor = _NoBackward.apply(output, source)
    return found


def attend(view: KVView, query: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Attention output [B, H, Q, Dv] in the query's dtype, for query [B, H, Q, D]."""
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        output = _attend(view, query, scoring)
    return forbid_backward(output, query)


def _attend(view: KVView, query: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    n_rows, n_heads, n_queries, head_dim = query.shape
    kv_heads = view.shapes[0][1]
    if n_queries != view.n_queries:
        raise FewbitError(
            f"attention got {n_queries} queries for {view.n_queries} new keys; "
            f"the packed KV cache serves self-attention only"
        )
    mask = _grouped_mask(scoring.mask, view, n_heads, kv_heads)
    grouped = query.float().view(n_rows, kv_heads, n_heads // kv_heads, n_queries, head_dim)
    state = _Softmax(grouped * scoring.scaling, view.shapes[1][-1])
    limits = view.limits()
    for run in _runs(view):
        for rows in _query_blocks(view, run, query, scoring):
            block = state.queries[:, :, :, rows]
            scores = (block.flatten(2, 3) @ run.keys.mT).view(*block.shape[:-1], -1)
            if scoring.softcap is not None:
                scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
            state.add(rows, _masked(scores, view, run, rows, mask, scoring, limits), run.values)
    sinks = scoring.sinks
    if sinks is not None:
        sinks = sinks.float().view(kv_heads, -1, 1, 1)
    return state.finish(sinks).view(n_rows, n_heads, n_queries, -1).to(query.dtype)


def _grouped_mask(
    mask: torch.Tensor | None, view: KVView, n_heads: int, kv_heads: int
) -> torch.Tensor | None:
    """[B or 1, Hkv or 1, G or 1, Q, T]."""
    if mask is None:
        return None
    wanted = (view.n_queries, view.n_tokens)
    if mask.dim() != 4 or tuple(mask.shape[2:]) != wanted or mask.shape[1] not in (1, n_heads):
        raise FewbitError(
            f"attention mask must be [batch, 1 or {n_heads}, {wanted[0]}, {wanted[1]}] "
            f"(queries, cached tokens), got {list(mask.shape)}"
        )
    heads = (1, 1) if mask.shape[1] == 1 else (kv_heads, n_heads // kv_heads)
    return mask.view(mask.shape[0], *heads, *wanted)


def _runs(view: KVView) -> Iterator[_Run]:
    """All keys, first the stored and then the dense ones, a bounded number at a time."""
    n_rows, kv_heads, _, head_dim = view.shapes[0]
    width = max(head_dim, view.shapes[1][-1])
    step = max(64, _RUN_ELEMENTS // (n_rows * kv_heads * width) // 64 * 64)
    if view.n_queries > _PROMPT_RUN:
        step = min(step, _PROMPT_RUN)  # so that queries before a run can skip it
    two_forms = view.residual is not None
    for start in range(0, view.stored, step):
        keys, values = view.read(start, min(start + step, view.stored))
        yield _Run(start, keys, values, "stored" if two_forms else "only")
    if view.band is None:
        return
    keys, values = view.band
    for start in range(0, keys.shape[2], step):
        part = slice(start, start + step)
        yield _Run(
            view.band_start + start,
            keys[:, :, part].float(),
            values[:, :, part].float(),
            "dense" if two_forms else "only",
        )


def _query_blocks(
    view: KVView, run: _Run, query: torch.Tensor, scoring: Scoring
) -> Iterator[slice]:
    """Queries that may see the run, a bounded number at a time."""
    n_rows, n_heads, n_queries, _ = query.shape
    offset = view.n_tokens - n_queries
    residual = view.residual or 0
    first, last = _seeing(scoring.mask, run, n_queries)
    if scoring.mask is None and scoring.causal:  # k ≤ p
        first = max(first, run.start - offset)
    if run.form == "stored" and run.start >= view.band_start:  # k ≤ p − residual
        first = max(first, run.start + residual - offset)
    if run.form == "dense":  # k ≥ p − residual + 1
        last = min(last, run.stop - 1 + residual - offset)
    step = max(1, _SCORES // (n_rows * n_heads * (run.stop - run.start)))
    for start in range(first, last, step):
        yield slice(start, min(start + step, last))


def _seeing(mask: torch.Tensor | None, run: _Run, n_queries: int) -> tuple[int, int]:
    """The first query of a long call that sees the run, and the one after the last.

    Masks are asked, because some let queries see later keys although the layer is causal.
    """
    if mask is None or mask.dtype != torch.bool or n_queries <= _PROMPT_RUN:
        return 0, n_queries
    seen = mask[..., run.start : run.stop].any(-1).flatten(0, -2).any(0).nonzero()
    return (int(seen[0]), int(seen[-1]) + 1) if seen.numel() else (0, 0)


def _masked(
    scores: torch.Tensor,
    view: KVView,
    run: _Run,
    rows: slice,
    mask: torch.Tensor | None,
    scoring: Scoring,
    limits: torch.Tensor | None,
) -> torch.Tensor:
    """Scores with −inf where a query may not see a key, or reads it in its other form."""
    offset = view.n_tokens - view.n_queries
    forbidden: torch.Tensor | None = None
    keys = torch.arange(run.start, run.stop, device=scores.device)
    if mask is not None:
        part = mask[:, :, :, rows, run.start : run.stop]
        if part.dtype == torch.bool:
            forbidden = ~part
        else:
            scores = scores + part.float()
    elif scoring.causal and run.stop - 1 > offset + rows.start:
        positions = torch.arange(offset + rows.start, offset + rows.stop, device=scores.device)
        forbidden = keys > positions.unsqueeze(1)
    if limits is not None:
        bound = limits[rows].unsqueeze(1)
        other = keys >= bound if run.form == "stored" else keys < bound
        forbidden = other if forbidden is None else forbidden | other
    return scores if forbidden is None else scores.masked_fill(forbidden, -math.inf)


def kv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | Handle,
    value: torch.Tensor | Handle,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The library's attention interface: ([B, Q, H, Dv], None) for query [B, H, Q, D].

    key, value: handles of our cache, or plain tensors [B, Hkv, T, D].
    """
    if not isinstance(key, Handle) and softcap is None and s_aux is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
        )  # fmt: skip
        return output, None
    if dropout:
        raise FewbitError(f"attention over a KV cache has no dropout, got {dropout}; use .eval()")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scoring = Scoring(
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        attention_mask,
        bool(causal),
        softcap,
        s_aux,
    )
    if isinstance(key, Handle):
        if not isinstance(value, Handle) or value.view is not key.view:
            raise FewbitError(
                "keys and values of an attention call must come from one cache update"
            )
        return attend(key.view, query, scoring).transpose(1, 2).contiguous(), None
    assert isinstance(value, torch.Tensor), "keys are a plain tensor, values are not"
    return _whole(query, key, value, scoring).transpose(1, 2).contiguous(), None


def _whole(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
) -> torch.Tensor:
    """As `attend`, for plain tensors at once, and differentiable."""
    n_rows, n_heads, n_queries, _ = query.shape
    kv_heads, n_tokens = key.shape[1], key.shape[2]
    grouped = query.reshape(n_rows, kv_heads, -1, query.shape[-1])
    scores = (grouped @ key.mT).float().view(n_rows, n_heads, n_queries, n_tokens) * scoring.scaling
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    mask = scoring.mask
    if mask is None and scoring.causal:
        # A single query sees all of its keys; with several, the newest ones ask.
        mask = scores.new_ones((n_queries, n_tokens), dtype=torch.bool).tril(n_tokens - n_queries)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask.float()
    if scoring.sinks is not None:
        column = scoring.sinks.float().view(1, -1, 1, 1).expand(n_rows, -1, n_queries, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :n_tokens].to(value.dtype)
    output = weights.reshape(n_rows, kv_heads, -1, n_tokens) @ value
    return output.view(n_rows, n_heads, n_queries, -1)


def register() -> None:
    """Make the library know the attention "fewbit_kv" and its masks; again changes nothing.

    Without the mask the library would drop padding silently.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, kv_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
