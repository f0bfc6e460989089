"""Attention over a cache's handles: which kernel runs a call, and the library's interface.

A call of few queries over packed pages on a GPU goes to the kernel that the dispatcher chooses for it
(op "attend"); every other call is `kv_softmax.py`, which takes all. Both read each token in the form
that `kv_view.py` says. A choice is made once for each shape and bucket of tokens.

There is no dropout here, and no gradient: a backward that reaches what a cache gave out raises an
error. An autocast region around a call does not change the arithmetic.

A bare forward without our cache reaches the same function with plain tensors; it then is the
library's own "sdpa", except for soft caps and sink logits, which that one ignores or refuses.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from . import dispatch, kv_softmax
from .errors import FewbitError
from .kernel import T_BUCKETS, AttentionProblem, bucket_of
from .kv_softmax import check_call
from .kv_view import Handle, KVView, Paged, Scoring
from .machine import this_device
from .policy import context_rules

NAME = "fewbit_kv"
_DEVICES = ("cuda",)  # where kernels are asked
_MOST_QUERIES = 8  # of a call that they are asked about
_Launch = Callable[[KVView, torch.Tensor, Scoring], torch.Tensor]
_LAUNCHES: dict[tuple[Any, ...], _Launch] = {}


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
    """Attention output [B, H, Q, Dv] in the query's dtype, for query [B, H, Q, D].

    FewbitError if the queries or the mask do not fit the view.
    """
    check_call(view, query, scoring.mask)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        output = _launch(view, query, scoring)(view, query, scoring)
    return forbid_backward(output, query)


def _launch(view: KVView, query: torch.Tensor, scoring: Scoring) -> _Launch:
    """What runs this call."""
    pages, mask = view.pages, scoring.mask
    if pages is None or view.n_queries > _MOST_QUERIES or query.device.type not in _DEVICES:
        return kv_softmax.attend
    if mask is not None and mask.dtype != torch.bool:
        return kv_softmax.attend
    key = (pages.key, pages.value, query.shape, view.shapes[1][1:], bucket_of(view.n_tokens, T_BUCKETS),
           query.dtype, extras_of(scoring), context_rules())  # fmt: skip
    found = _LAUNCHES.get(key)
    if found is None:
        found = _LAUNCHES[key] = chosen_launch(problem_of(view, pages, query, scoring))
    return found


def chosen_launch(problem: AttentionProblem) -> _Launch:
    """The launch of the kernel and config that the dispatcher chooses."""
    chosen = dispatch.choice(problem)
    kernel = dispatch.kernels()[chosen.kernel]
    return partial(kernel.launch, config=chosen.config) if kernel.configs else kernel.launch


def extras_of(scoring: Scoring) -> tuple[str, ...]:
    """`AttentionProblem.extras` of a call."""
    found = {"mask": scoring.mask, "softcap": scoring.softcap, "sinks": scoring.sinks}
    return tuple(name for name, given in found.items() if given is not None)


def problem_of(
    view: KVView, pages: Paged, query: torch.Tensor, scoring: Scoring
) -> AttentionProblem:
    """The problem that a call poses on this machine."""
    n_rows, n_heads, n_queries, head_dim = query.shape
    kv_heads = view.shapes[0][1]
    return AttentionProblem(
        key=pages.key.format,
        key_options=pages.key.options,
        value=pages.value.format,
        value_options=pages.value.options,
        n_rows=n_rows,
        n_queries=n_queries,
        kv_heads=kv_heads,
        group=n_heads // kv_heads,
        head_dim=head_dim,
        value_dim=view.shapes[1][-1],
        t_bucket=bucket_of(view.n_tokens, T_BUCKETS),
        dtype=query.dtype,
        device=query.device.type,
        extras=extras_of(scoring),
        machine=this_device(query.device.type),
    )


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
