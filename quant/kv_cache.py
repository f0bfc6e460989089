"""The packed KV cache: one transformers cache layer for each layer of full attention.

A layer of n tokens holds

    pages   every token but the newest `residual`, stored (`kv_pages.py`)
    tail    at least the newest residual + 64 tokens as they were computed, if residual > 0
    sink    the first `sink` tokens of each row as they were computed, laid over the pages when read

A token is stored once, before it leaves the residual window: whenever one is about to leave, up to
64 of the window are stored with it, which costs as much as one. In which form a query reads a token
depends on their distance alone. Tokens of the tail beyond the window are there for `crop`: cropping
up to 64 tokens and growing again equals never having gone on. A deeper crop leaves fewer dense
tokens than `residual`; the others are read as stored until new ones come.

`update` returns light handles, which only the attention function "fewbit_kv" understands; where the
model looks at keys and values itself it returns decoded tensors instead (`handles=False`), whose
ages count from the newest token of the call. Rows have one length; left padding is stored like any
token and masked by the model, and sinks begin after it.

Layers with a bound of their own (sliding windows, recurrent states) stay the library's.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from .errors import FewbitError
from .kv_attention import forbid_backward
from .kv_dense import SLACK, Sink, Tail
from .kv_pages import PageArena, Side
from .kv_policy import KVPolicy
from .kv_view import Handle, KVView, Paged

_AHEAD = 63  # tokens that are stored together with one that leaves the window
_RUN = 1024  # tokens decoded at once for a model that wants all of them


class PackedLayer(CacheLayerMixin):
    """One layer's keys and values under a policy; see the module's text.

    reserve: tokens that rows are going to have, 0 if unknown. starts: position of each row's first
    real token, int64 [B]; None if nothing is padded. handles: what `update` returns.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False  # keys and values may differ in shape, which only an update tells

    def __init__(
        self,
        policy: KVPolicy,
        reserve: int = 0,
        starts: torch.Tensor | None = None,
        handles: bool = True,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.reserve = reserve
        self.starts = starts if policy.sink else None
        self.handles = handles
        self.n_tokens = 0
        self.pages: PageArena | None = None
        self.tail: Tail | None = None
        self.sink: Sink | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for keys and values shaped like these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        keys, values = (
            Side(use, like.shape[1], like.shape[3], self.dtype)
            for use, like in (
                (self.policy.key, key_states),
                (self.policy.value, value_states),
            )
        )
        n_rows = key_states.shape[0]
        self.pages = PageArena((keys, values), n_rows, self.device, self.reserve)
        if self.policy.residual:
            self.tail = Tail(key_states, value_states, self.policy.residual + SLACK)
        if self.policy.sink:
            starts = torch.zeros(n_rows, dtype=torch.int64) if self.starts is None else self.starts
            if starts.shape != (n_rows,):
                raise FewbitError(
                    f"the KV cache was made for {starts.numel()} rows of padding, got {n_rows} rows"
                )
            self.sink = Sink(key_states, value_states, self.policy.sink, starts)
            self.starts = None  # the sink's are reordered with its rows
        self.is_initialized = True

    # The library's signature; what models pass beyond keys and values is for other caches.
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append keys and values [B, heads, n, D]; handles for all tokens, or the tokens decoded."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self._arena().n_rows:
            raise FewbitError(
                f"the KV cache holds {self._arena().n_rows} rows, got {key_states.shape[0]}"
            )
        with torch.no_grad(), torch.autocast(key_states.device.type, enabled=False):
            view = self._append(key_states.detach(), value_states.detach())
            if self.handles:
                return Handle(view, 0), Handle(view, 1)
            keys, values = self._decoded(view)
        return forbid_backward(keys, key_states), forbid_backward(values, value_states)

    def _arena(self) -> PageArena:
        if self.pages is None:
            raise FewbitError("the KV cache layer is empty; update() comes first")
        return self.pages

    def _append(self, keys: torch.Tensor, values: torch.Tensor) -> KVView:
        pages, residual, before = self._arena(), self.policy.residual, self.n_tokens
        new: tuple[torch.Tensor, ...] = (keys, values)
        self.n_tokens = before + keys.shape[2]
        if self.sink is not None:
            self.sink.fill(new, before)
        band_start, band = before, new
        if self.tail is not None:
            self.tail.crop(before)
            band_start = max(before - residual, self.tail.start)
            band = self.tail.push(new, band_start)
        if pages.n_tokens < self.n_tokens - residual:
            stored = min(self.n_tokens - residual + _AHEAD, self.n_tokens)
            ripe = slice(pages.n_tokens - band_start, stored - band_start)
            pages.append(band[0][:, :, ripe], band[1][:, :, ripe])
        return self._view(band, band_start, keys, values)

    def _view(
        self,
        band: tuple[torch.Tensor, ...],
        band_start: int,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> KVView:
        n_tokens, n_new, residual = self.n_tokens, keys.shape[2], self.policy.residual
        window: int | None = None
        if self.policy.prefill == "exact" and n_tokens == n_new:
            stored, band, band_start = 0, (keys, values), 0
        elif residual == 0:
            stored, band, band_start = n_tokens, (), n_tokens
        elif n_new == 1:
            stored = max(n_tokens - residual, band_start)
            band = tuple(vectors[:, :, stored - band_start :] for vectors in band)
            band_start = stored
        else:
            stored, window = max(n_tokens - residual, band_start), residual
        shapes = (_length(keys, n_tokens), _length(values, n_tokens))
        return KVView(
            n_tokens,
            n_new,
            stored,
            self._read,
            (band[0], band[1]) if band else None,
            band_start,
            window,
            shapes,
            self.dtype,
            keys.device,
            self._paged(),
        )

    def _paged(self) -> Paged:
        if self.sink is None:
            return self._arena().paged()
        keys, values = self.sink.buffers
        return self._arena().paged((keys, values), self.sink.starts_on_device)

    def _read(
        self, start: int, stop: int, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        run = self._arena().read(start, stop, dtype)
        if self.sink is not None:
            self.sink.lay_over(run, start)
        return run

    def _decoded(self, view: KVView) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens in the model's dtype; the newest `residual` dense, whoever asks."""
        if view.stored == 0 and view.band is not None:
            return view.band
        device = self._arena().device
        keys, values = (torch.empty(s, dtype=self.dtype, device=device) for s in view.shapes)
        for start in range(0, view.stored, _RUN):
            stop = min(start + _RUN, view.stored)
            keys[:, :, start:stop], values[:, :, start:stop] = self._read(start, stop, self.dtype)
        if view.band is not None:
            first = view.stored - view.band_start
            keys[:, :, view.stored :] = view.band[0][:, :, first:]
            values[:, :, view.stored :] = view.band[1][:, :, first:]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that the next call of `query_length` tokens sees, offset of the first)."""
        return self.n_tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.n_tokens

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest −n tokens; a positive n is the library's older form, the length left."""
        if not self.is_initialized:
            return
        left = tokens_to_remove if tokens_to_remove > 0 else self.n_tokens + tokens_to_remove
        self.n_tokens = max(0, min(left, self.n_tokens))
        self._arena().truncate(self.n_tokens)
        if self.tail is not None:
            self.tail.crop(self.n_tokens)

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.crop(-self.n_tokens)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; pages are shared, not copied."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (int64, or a boolean mask), in this order."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        if not self.is_initialized:
            return
        self._arena().select(indices)
        for part in (self.tail, self.sink):
            if part is not None:
                part.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        if self.is_initialized:
            rows = torch.arange(self._arena().n_rows)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move everything back to where the model computes."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        for part in (self.pages, self.tail, self.sink):
            if part is not None:
                part.to(device)

    @property
    def n_bytes(self) -> int:
        """Bytes allocated: pages, used or not, their table, tail, sinks and where they begin."""
        tensors = [] if self.pages is None else list(self.pages.tensors())
        tensors += [] if self.tail is None else self.tail.buffers
        tensors += [] if self.sink is None else self.sink.tensors()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _length(like: torch.Tensor, n_tokens: int) -> torch.Size:
    return torch.Size((like.shape[0], like.shape[1], n_tokens, like.shape[3]))


class KVCache(Cache):
    """A transformers cache in which every layer of full attention is a `PackedLayer`.

    config: the model's (or its text part's). max_tokens: reserved for each row; 0 grows as needed.
    starts: position of each row's first real token in a left-padded batch, int64 [B].
    handles: see the module's text; only for models whose attention is "fewbit_kv".
    """

    def __init__(
        self,
        config: Any,
        policy: KVPolicy,
        max_tokens: int = 0,
        starts: torch.Tensor | None = None,
        handles: bool = True,
    ) -> None:
        layers = [
            PackedLayer(policy, max_tokens, starts, handles) if is_packed(layer) else layer
            for layer in DynamicCache(config=config).layers
        ]
        super().__init__(layers=layers)
        self.policy = policy

    @property
    def n_bytes(self) -> int:
        """Bytes allocated by all layers, the library's own included."""
        return sum(
            layer.n_bytes if isinstance(layer, PackedLayer) else _stock_bytes(layer)
            for layer in self.layers
        )


def is_packed(layer: Any) -> bool:
    """Whether a layer of the library's dynamic cache is one that a `PackedLayer` replaces."""
    return type(layer) is DynamicLayer


def _stock_bytes(layer: Any) -> int:
    tensors = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    for states in ("conv_states", "recurrent_states"):
        tensors += getattr(layer, states, {}).values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
