"""What an attention call over cached keys and values gets: a view of a layer's cache, and its masks.

A query at position p with limit c(p) reads key k as stored if k < c(p), and dense if k ≥ c(p):

    c(p) = max(p − residual + 1, first token that is still at hand dense)

so one call may read a token in both forms, for different queries. `KVView` says where both forms are:
`read` decodes a run of stored tokens; `pages` are the tensors that it decodes, for kernels that read
those themselves. Both are of one moment and valid until the next update of the layer.

Deliberately not here: any arithmetic.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .kv_policy import PageUse

Pair = tuple[torch.Tensor, torch.Tensor]
Read = Callable[[int, int], Pair]


@dataclass(frozen=True, eq=False)
class Paged:
    """Stored tokens where they lie, without copies.

    key, value: page formats. keys, values: their parts [pages, heads, 64, *part]. table: int64 [rows,
    columns], the page of tokens 64·c … 64·c + 63 of each row, on the same device.
    sink: keys and values [rows, heads, count, D] that replace the stored tokens `starts` … starts +
    count − 1 of each row. starts: int64 [rows], on the same device. Both None if there are none.
    """

    key: PageUse
    value: PageUse
    keys: Mapping[str, torch.Tensor]
    values: Mapping[str, torch.Tensor]
    table: torch.Tensor
    sink: Pair | None = None
    starts: torch.Tensor | None = None


@dataclass(frozen=True)
class KVView:
    """What one call may attend to; valid until the next update of its layer.

    n_tokens: keys, the call's own included. n_queries: the newest n_queries of them ask.
    stored: the first `stored` keys can be read back with `read(start, stop)`, keys and values fp32
    [B, heads, stop − start, D]. band: keys and values [B, heads, n_tokens − band_start, D] as they
    were computed. residual: tokens that a query reads dense; None if each key has one form only,
    stored before band_start and dense from there on. pages: what `read` reads; None if only it can.
    """

    n_tokens: int
    n_queries: int
    stored: int
    read: Read
    band: Pair | None
    band_start: int
    residual: int | None
    shapes: tuple[torch.Size, torch.Size]
    dtype: torch.dtype
    device: torch.device
    pages: Paged | None = None

    @property
    def first_limit(self) -> int | None:
        """p − residual + 1 of the first query; None if each key has one form."""
        if self.residual is None:
            return None
        return self.n_tokens - self.n_queries - self.residual + 1

    def limits(self) -> torch.Tensor | None:
        """c(p) for each query, int64 [n_queries]; None if each key has one form."""
        first = self.first_limit
        if first is None:
            return None
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
