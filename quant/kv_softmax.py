"""Attention over stored keys and values in plain torch, a bounded run of tokens at a time.

Runs of keys are decoded, scored and summed up with a running maximum (online softmax), all in fp32,
with query heads of a group sharing the decoded run:

    m' = max(m, max s)    l' = l·e^(m−m') + Σ e^(s−m')    o' = o·e^(m−m') + e^(s−m')·V

and o / l at the end; a query that may see nothing gets 0. What is decoded at once does not grow
with the length of the text. Which form of a token a query reads is in `kv_view.py`. Logits may be
soft-capped, and a learned sink logit per head may join the denominator.

It takes every page format, mask, device and number of queries, and is the oracle of kernels that read
pages themselves. Deliberately not here: dropout, gradients, any choice.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .errors import FewbitError, NoKernelError
from .kernel import AttentionProblem, Kernel, Reason
from .kv_view import KVView, Scoring
from .packed import PackedTensor

_RUN_ELEMENTS = 1 << 20  # decoded numbers of keys at once: 4 MB in fp32
_PROMPT_RUN = 256  # keys at once for a long call
_SCORES = 1 << 22  # scores at once: 16 MB
_TOUCHES = 60  # bytes that a decoded number moves on its way to a sum, as counted from the code
_CALLS = 40  # operators of torch for each run
_CALL_SECONDS = 5e-6  # of one, launched from Python (a guess)


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


def attend(view: KVView, query: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Attention output [B, H, Q, Dv] in the query's dtype, for query [B, H, Q, D]; `check_call` says
    whether they fit."""
    n_rows, n_heads, n_queries, head_dim = query.shape
    kv_heads = view.shapes[0][1]
    mask = _grouped_mask(scoring.mask, n_heads, kv_heads)
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


def check_call(view: KVView, query: torch.Tensor, mask: torch.Tensor | None) -> None:
    """FewbitError if the queries [B, H, Q, D] or the mask do not fit the view."""
    n_heads, n_queries = query.shape[1:3]
    if n_queries != view.n_queries:
        raise FewbitError(
            f"attention got {n_queries} queries for {view.n_queries} new keys; "
            f"the packed KV cache serves self-attention only"
        )
    wanted = (n_queries, view.n_tokens)
    if mask is None or (
        mask.dim() == 4 and tuple(mask.shape[2:]) == wanted and mask.shape[1] in (1, n_heads)
    ):
        return
    raise FewbitError(
        f"attention mask must be [batch, 1 or {n_heads}, {wanted[0]}, {wanted[1]}] "
        f"(queries, cached tokens), got {list(mask.shape)}"
    )


def _grouped_mask(mask: torch.Tensor | None, n_heads: int, kv_heads: int) -> torch.Tensor | None:
    """[B or 1, Hkv or 1, G or 1, Q, T]."""
    if mask is None:
        return None
    heads = (1, 1) if mask.shape[1] == 1 else (kv_heads, n_heads // kv_heads)
    return mask.view(mask.shape[0], *heads, *mask.shape[2:])


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


# ---- as a kernel ----------------------------------------------------------------------------


def _refuse(problem: AttentionProblem) -> tuple[Reason, ...]:
    return ()


def _prepare(packed: PackedTensor, dtype: torch.dtype) -> None:
    raise NoKernelError("attend_torch reads a cache as it is; there is no weight to prepare")


def _seconds(problem: AttentionProblem) -> float:
    """By memory alone; 1 s where the machine's rates are not known."""
    bandwidth = problem.machine.bandwidth_bytes_per_second if problem.machine else None
    if bandwidth is None:
        return 1.0
    vectors = problem.n_rows * problem.kv_heads * problem.t_bucket
    channels = problem.head_dim + problem.value_dim
    runs = max(1, vectors * max(problem.head_dim, problem.value_dim) // _RUN_ELEMENTS)
    return vectors * channels * _TOUCHES / bandwidth + runs * _CALLS * _CALL_SECONDS


KERNEL = Kernel(
    name="attend_torch",
    refuse=_refuse,
    prepare=_prepare,
    launch=attend,
    seconds=_seconds,
    priority=-1,
    op="attend",
)
