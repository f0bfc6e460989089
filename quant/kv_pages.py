"""Where cached vectors lie: pages of 64 tokens × all heads, shared between rows that agree.

    storage of a part   [pages, heads, 64, *part]        one tensor, allocated ahead
    table               int64 [rows, columns]            page that holds tokens 64·c … 64·c + 63
    references          int64 [pages]                    rows that use a page; 0 is free

A page is written once per token, in place, and never copied as long as one row owns it. Rows that
continue the same text (beams) share their pages: reordering them copies rows of the table, and only
when two rows go on from the same half-full page does one of them get a copy of it. Keys and values
lie in the same pages, so one table serves both.

Room is reserved exactly when the caller knows how long a text gets, up to a bound: for each row on
its own, because the rows of beams compute their prompts apart before any of them share. Beyond what
was reserved it grows by a sixteenth, but whole pages of each row: a token is moved 16 times at most
on average, one part of the storage after the other, and 1/16 of the room at most stands empty.

As long as no row was selected, pages lie in the order of their columns, and runs of them are read
and written as slices. What lives as long as the cache is allocated outside of inference mode, so
that a cache filled there can go on elsewhere.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import dispatch, kv_write
from .format import Parts
from .kernel import M_BUCKETS, RowsProblem, bucket_of
from .kv_policy import PageUse
from .kv_view import Paged, Pair
from .kv_write import PAGE, AppendOptions
from .machine import this_device
from .page_format import find_page_format
from .policy import context_rules

_DEVICES = ("cuda",)  # where kernels are asked to write
_MOST_RESERVED = 1 << 15  # tokens of a row that are reserved on request; longer texts grow
_GROWTH = 16  # storage grows by one part in so many


@contextmanager
def lasting() -> Iterator[None]:
    """Tensors made inside can be written in any mode later, and have no history."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@dataclass(frozen=True)
class Side:
    """Keys, or values: how vectors [rows, n_heads, tokens, head_dim] of `dtype` are stored."""

    use: PageUse
    n_heads: int
    head_dim: int
    dtype: torch.dtype

    def encode(self, vectors: torch.Tensor) -> Parts:
        """Parts [..., *part] of vectors [..., D]."""
        return find_page_format(self.use.format).encode(vectors, self.use.options)

    def decode(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Vectors [..., D] in `dtype`."""
        return find_page_format(self.use.format).decode(parts, dtype, self.use.options)

    def storage(self, n_pages: int, device: torch.device) -> Parts:
        """Empty pages of every part."""
        form = find_page_format(self.use.format)
        specs = form.part_specs(self.head_dim, self.dtype, self.use.options)
        return {
            name: torch.zeros(
                (n_pages, self.n_heads, PAGE, *spec.shape), dtype=spec.dtype, device=device
            )
            for name, spec in specs.items()
        }


Write = Callable[[Paged, torch.Tensor, torch.Tensor, int], None]


def chosen_write(problem: RowsProblem) -> Write | None:
    """The launch of the kernel and config that the dispatcher chooses; None if it is plain torch's,
    which has a shorter way here."""
    chosen = dispatch.choice(problem)
    kernel = dispatch.kernels()[chosen.kernel]
    if kernel is kv_write.KERNEL:
        return None
    return partial(kernel.launch, config=chosen.config) if kernel.configs else kernel.launch


class PageArena:
    """Pages of one layer. All rows hold the same number of tokens, `n_tokens`.

    sides: keys and values. reserve: tokens that a row is going to have, 0 if nobody knows.
    """

    @lasting()
    def __init__(
        self, sides: tuple[Side, Side], n_rows: int, device: torch.device, reserve: int = 0
    ) -> None:
        self.sides = sides
        self.n_tokens = 0
        columns = -(-min(reserve, _MOST_RESERVED) // PAGE)
        self.storage = tuple(side.storage(n_rows * columns, device) for side in sides)
        # Pages are handed out on the host, so the table lives there, with a copy where it is read.
        self._table = torch.zeros((n_rows, columns), dtype=torch.int64)
        self._references = torch.zeros(n_rows * columns, dtype=torch.int64)
        self._on_device = self._table.to(device)
        self._n_columns = 0  # columns of the table in use
        self._in_order = True  # row r has page c · rows + r in column c
        self._kernels: dict[tuple[Any, ...], Write | None] = {}

    @property
    def n_rows(self) -> int:
        """Rows of the table, the batch."""
        return self._table.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the storage is."""
        return self._on_device.device

    def paged(self, sink: Pair | None = None, starts: torch.Tensor | None = None) -> Paged:
        """What is stored, for kernels that read it themselves; valid until the next change."""
        (keys, values), (key_parts, value_parts) = self.sides, self.storage
        return Paged(keys.use, values.use, key_parts, value_parts, self._on_device, sink, starts)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Everything that is allocated."""
        for parts in self.storage:
            yield from parts.values()
        yield self._table
        yield self._references
        if self._on_device.data_ptr() != self._table.data_ptr():
            yield self._on_device

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store vectors [rows, heads, n, D], the next n tokens of each row."""
        n_new = keys.shape[2]
        if n_new == 0:
            return
        self._own_last_page()
        self._extend(-(-(self.n_tokens + n_new) // PAGE))
        slot = self.n_tokens % PAGE
        write = self._kernel(keys) if self.device.type in _DEVICES else None
        if write is None and self._in_order and slot + n_new <= PAGE:
            self._fill(keys, values, slot)
        else:
            (write or kv_write.append)(self.paged(), keys, values, self.n_tokens)
        self.n_tokens += n_new

    def _fill(self, keys: torch.Tensor, values: torch.Tensor, slot: int) -> None:
        """Write from `slot` on within the last column, whose pages are a slice of the storage."""
        first = self.n_tokens // PAGE * self.n_rows
        for side, parts, vectors in zip(self.sides, self.storage, (keys, values), strict=True):
            for name, part in side.encode(vectors).items():
                pages = parts[name][first : first + self.n_rows]
                pages[:, :, slot : slot + vectors.shape[2]] = part

    def _kernel(self, keys: torch.Tensor) -> Write | None:
        """What writes keys like these, unless plain torch does."""
        if self.sides[0].n_heads != self.sides[1].n_heads:
            return None
        size = bucket_of(keys.shape[0] * keys.shape[2], M_BUCKETS)
        key = (size, keys.dtype, keys.device.type, context_rules())
        if key not in self._kernels:
            self._kernels[key] = chosen_write(self._problem(*key[:3]))
        return self._kernels[key]

    def _problem(self, size: int, dtype: torch.dtype, device: str) -> RowsProblem:
        keys, values = self.sides
        options = AppendOptions(
            keys.use.format,
            keys.use.options,
            values.use.format,
            values.use.options,
            keys.n_heads,
            keys.head_dim,
            values.head_dim,
        )
        numbers = keys.n_heads * keys.head_dim + values.n_heads * values.head_dim
        machine = this_device(device)
        return RowsProblem("append_kv", options, size, numbers, dtype, device, machine)

    def read(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [rows, heads, stop − start, D] of stored tokens, as new tensors."""
        first, last = start // PAGE, -(-stop // PAGE)
        tokens = slice(start - first * PAGE, stop - first * PAGE)
        keys, values = (
            self._decode(side, parts, first, last, tokens, dtype)
            for side, parts in zip(self.sides, self.storage, strict=True)
        )
        return keys, values

    def _decode(
        self, side: Side, parts: Parts, first: int, last: int, tokens: slice, dtype: torch.dtype
    ) -> torch.Tensor:
        """Vectors of `tokens`, counted from the beginning of column `first`."""
        # [rows, pages, heads, 64, …] → [rows, heads, tokens, …], while it is small
        runs = {
            name: self._columns(part, first, last).transpose(1, 2).flatten(2, 3)[:, :, tokens]
            for name, part in parts.items()
        }
        vectors = side.decode(runs, dtype)
        kept = {part.untyped_storage().data_ptr() for part in parts.values()}
        return vectors.clone() if vectors.untyped_storage().data_ptr() in kept else vectors

    def _columns(self, part: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Pages [rows, columns, heads, 64, …] of some columns, a view if they are in order."""
        if not self._in_order:
            return part[self._on_device[:, first:last]]
        run = part[first * self.n_rows : last * self.n_rows]
        return run.unflatten(0, (last - first, self.n_rows)).transpose(0, 1)

    def truncate(self, n_tokens: int) -> None:
        """Forget all tokens from `n_tokens` on; their pages become free."""
        if n_tokens >= self.n_tokens:
            return
        columns = -(-n_tokens // PAGE)
        self._count(self._table[:, columns : self._n_columns], -1)
        self._n_columns, self.n_tokens = columns, n_tokens

    @lasting()
    def select(self, rows: torch.Tensor) -> None:
        """Row i becomes what row `rows[i]` was; int64 [new rows], repeats and omissions allowed."""
        rows = rows.to(self._table.device)
        self._table = self._table[rows]
        self._references.zero_()
        self._count(self._table[:, : self._n_columns], 1)
        self._upload()

    @lasting()
    def to(self, device: torch.device) -> None:
        """Move the storage; what is on `device` already stays."""
        self.storage = tuple(
            {name: part.to(device) for name, part in parts.items()} for parts in self.storage
        )
        self._on_device = self._table.to(device)

    def _count(self, pages: torch.Tensor, change: int) -> None:
        pages = pages.flatten()
        self._references.index_add_(0, pages, torch.full_like(pages, change))

    def _upload(self) -> None:
        """Carry a change of the table to where it is read."""
        self._on_device = self._table.to(self.device)
        used = self._table[:, : self._n_columns].T.flatten()
        self._in_order = torch.equal(used, torch.arange(used.numel()))

    @lasting()
    def _extend(self, columns: int) -> None:
        """Give every row pages for `columns` columns."""
        n_more = columns - self._n_columns
        if n_more <= 0:
            return
        if columns > self._table.shape[1]:
            room = max(columns, self._table.shape[1] + self._table.shape[1] // _GROWTH)
            wider = self._table.new_zeros((self.n_rows, room))
            wider[:, : self._n_columns] = self._table[:, : self._n_columns]
            self._table = wider
        fresh = self._take(self.n_rows * n_more).view(n_more, self.n_rows)
        self._table[:, self._n_columns : columns] = fresh.T
        self._n_columns = columns
        self._upload()

    def _own_last_page(self) -> None:
        """Rows that share a page that is about to be written get copies, all but the last."""
        if self.n_tokens % PAGE == 0:
            return
        column = self._table[:, self._n_columns - 1]
        if not bool((self._references[column] > 1).any()):
            return
        self._part(column)

    @lasting()
    def _part(self, column: torch.Tensor) -> None:
        """Give each page of the last column to its last row, the other rows copies."""
        owner = {page: row for row, page in enumerate(column.tolist())}
        rows = [row for row, page in enumerate(column.tolist()) if owner[page] != row]
        shared, fresh = column[rows], self._take(len(rows))
        for parts in self.storage:
            for part in parts.values():
                part[fresh.to(self.device)] = part[shared.to(self.device)]
        self._count(shared, -1)
        self._table[rows, self._n_columns - 1] = fresh
        self._upload()

    def _take(self, n_pages: int) -> torch.Tensor:
        """Free pages int64 [n_pages], counted as used once; grows the storage if need be."""
        free = (self._references == 0).nonzero().flatten()
        if free.numel() < n_pages:
            self._grow(n_pages - free.numel())
            free = (self._references == 0).nonzero().flatten()
        self._count(free[:n_pages], 1)
        return free[:n_pages]

    def _grow(self, n_missing: int) -> None:
        """Add free pages. One part is moved after the other, so that one at most is there twice."""
        old = self._references.numel()
        new = max(old + n_missing, old + old // _GROWTH)
        self._references = torch.cat([self._references, self._references.new_zeros(new - old)])
        for parts in self.storage:
            for name, part in parts.items():
                parts[name] = part.new_zeros((new, *part.shape[1:]))
                parts[name][:old] = part
