"""Tokens of a cache layer that stay as they were computed: its newest ones, and its first ones.

    Tail   the newest `kept` tokens of all rows, in buffers with room for 64 more
    Sink   the first tokens of each row after its padding, laid over stored tokens when those are read

Both are allocated once and written in place. The layer (`kv_cache.py`) says how many tokens each holds
and when they are read.
"""

from collections.abc import Iterator

import torch

from .kv_pages import lasting

SLACK = 64  # tokens that `crop` can take back from the tail without a trace


class Tail:
    """The newest `kept` tokens or more as they were computed, first to last, from `start` on."""

    @lasting()
    def __init__(self, keys: torch.Tensor, values: torch.Tensor, kept: int) -> None:
        self.kept = kept
        self.start = self.stop = 0
        self.buffers = tuple(
            like.new_empty((*like.shape[:2], kept + SLACK, like.shape[3]))
            for like in (keys, values)
        )

    def push(self, new: tuple[torch.Tensor, ...], first: int) -> tuple[torch.Tensor, ...]:
        """Add keys and values [B, heads, n, D]; all tokens from `first` on, which must be held.

        What comes back may be a view, valid until the next push.
        """
        n_new, room = new[0].shape[2], self.buffers[0].shape[2]
        old = tuple(b[:, :, first - self.start : self.stop - self.start] for b in self.buffers)
        if n_new > SLACK:  # a prompt: what it asks for does not fit the buffers
            band = tuple(torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
            self._refill(new)
            return band
        if self.stop - self.start + n_new > room:
            self._shift(self.kept)
        at = self.stop - self.start
        for buffer, vectors in zip(self.buffers, new, strict=True):
            buffer[:, :, at : at + n_new] = vectors
        self.stop += n_new
        return tuple(b[:, :, first - self.start : self.stop - self.start] for b in self.buffers)

    def _refill(self, new: tuple[torch.Tensor, ...]) -> None:
        """Keep the newest `kept` tokens of the buffers and `new` together."""
        n_new = new[0].shape[2]
        n_old = min(self.stop - self.start, max(0, self.kept - n_new))
        self._shift(n_old)
        n_taken = min(n_new, self.kept)
        for buffer, vectors in zip(self.buffers, new, strict=True):
            buffer[:, :, n_old : n_old + n_taken] = vectors[:, :, n_new - n_taken :]
        self.stop += n_new
        self.start = self.stop - n_old - n_taken

    def _shift(self, n_kept: int) -> None:
        """Move the newest tokens to the front."""
        n_held = self.stop - self.start
        n_kept = min(n_kept, n_held)
        for buffer in self.buffers:
            buffer[:, :, :n_kept] = buffer[:, :, n_held - n_kept : n_held].clone()
        self.start = self.stop - n_kept

    def crop(self, n_tokens: int) -> None:
        """Forget what lies at `n_tokens` and behind."""
        self.stop = min(self.stop, n_tokens)
        self.start = min(self.start, self.stop)

    @lasting()
    def select(self, rows: torch.Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        self.buffers = tuple(b.index_select(0, rows.to(b.device)) for b in self.buffers)

    @lasting()
    def to(self, device: torch.device) -> None:
        """Move the buffers."""
        self.buffers = tuple(buffer.to(device) for buffer in self.buffers)


class Sink:
    """The first `count` tokens of each row after its padding, `starts` int64 [B] on the host."""

    @lasting()
    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, count: int, starts: torch.Tensor
    ) -> None:
        self.count = count
        self.buffers = tuple(
            like.new_zeros((*like.shape[:2], count, like.shape[3])) for like in (keys, values)
        )
        self._begin(starts.cpu().clone())

    def _begin(self, starts: torch.Tensor) -> None:
        self.starts = starts
        self.starts_on_device = starts.to(self.buffers[0].device)  # for kernels
        self._first, self._last = int(starts.min()), int(starts.max())
        self._found: tuple[tuple[int, int], tuple[torch.Tensor, ...]] | None = None

    def tensors(self) -> Iterator[torch.Tensor]:
        """Everything that is allocated."""
        yield from self.buffers
        yield self.starts
        if self.starts_on_device.data_ptr() != self.starts.data_ptr():
            yield self.starts_on_device
        if self._found is not None:
            yield from self._found[1]

    def _overlap(self, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        """(row, sink index, index in the run) of each sink token within start … stop.

        The last answer is remembered: the same run is read at every step.
        """
        key = (start, min(stop, self._last + self.count))
        if self._found is None or self._found[0] != key:
            with lasting():
                indices = self.starts.unsqueeze(1) + torch.arange(self.count) - start
                rows, slots = ((indices >= 0) & (indices < stop - start)).nonzero(as_tuple=True)
                found = (rows, slots, indices[rows, slots])
                self._found = key, tuple(i.to(self.buffers[0].device) for i in found)
        return self._found[1]

    def _parts(
        self, start: int, stop: int
    ) -> tuple[tuple[slice | torch.Tensor, ...], tuple[slice | torch.Tensor, ...]] | None:
        """Where the sink tokens within start … stop are, in the buffers and in the run."""
        if start >= self._last + self.count or self._first >= stop:
            return None
        everything = slice(None)
        if self._first == self._last:  # rows begin together
            first, last = max(start, self._first), min(stop, self._first + self.count)
            here, there = (slice(first - at, last - at) for at in (self._first, start))
            return (everything, everything, here), (everything, everything, there)
        rows, slots, indices = self._overlap(start, stop)
        return (rows, everything, slots), (rows, everything, indices)

    def fill(self, new: tuple[torch.Tensor, ...], start: int) -> None:
        """Take the sink tokens among keys and values [B, heads, n, D] of positions from `start`."""
        parts = self._parts(start, start + new[0].shape[2])
        if parts is not None:
            for buffer, vectors in zip(self.buffers, new, strict=True):
                buffer[parts[0]] = vectors[parts[1]]

    def lay_over(self, run: tuple[torch.Tensor, ...], start: int) -> None:
        """Replace the sink tokens among decoded keys and values [B, heads, n, D], in place."""
        parts = self._parts(start, start + run[0].shape[2])
        if parts is not None:
            for buffer, vectors in zip(self.buffers, run, strict=True):
                vectors[parts[1]] = buffer[parts[0]].to(vectors.dtype)

    @lasting()
    def select(self, rows: torch.Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        self.buffers = tuple(b.index_select(0, rows.to(b.device)) for b in self.buffers)
        self._begin(self.starts[rows.to(self.starts.device)])

    @lasting()
    def to(self, device: torch.device) -> None:
        """Move the buffers."""
        self.buffers = tuple(buffer.to(device) for buffer in self.buffers)
        self._begin(self.starts)
