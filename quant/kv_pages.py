"""Where cached vectors lie: pages of 64 tokens × all heads, shared between rows that agree.

    storage of a part   [pages, heads, 64, *part]        one tensor, allocated ahead
    table               int64 [rows, columns]            page that holds tokens 64·c … 64·c + 63
    references          int64 [pages]                    rows that use a page; 0 is free

A page is written once per token, in place, and never copied as long as one row owns it. Rows that
continue the same text (beams) share their pages: reordering them copies rows of the table, and only
when two rows go on from the same half-full page does one of them get a copy of it. Keys and values
lie in the same pages, so one table serves both.

Room is reserved exactly when the caller knows how long a text gets, up to a bound; beyond what was
reserved it grows by half, which moves all pages once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from .format import Parts
from .kv_policy import PageUse
from .page_format import find_page_format

PAGE = 64  # tokens
_MOST_RESERVED = 1 << 15  # tokens of a row that are reserved on request; longer texts grow
_GROWTH = 1.5


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


class PageArena:
    """Pages of one layer. All rows hold the same number of tokens, `n_tokens`.

    sides: keys and values. reserve: tokens that a row is going to have, 0 if nobody knows.
    """

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

    @property
    def n_rows(self) -> int:
        """Rows of the table, the batch."""
        return self._table.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the storage is."""
        return self._on_device.device

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
        positions = torch.arange(self.n_tokens, self.n_tokens + n_new, device=self.device)
        self._own_last_page()
        self._extend(-(-(self.n_tokens + n_new) // PAGE))
        pages = self._on_device[:, positions // PAGE]
        slots = positions % PAGE
        for side, parts, vectors in zip(self.sides, self.storage, (keys, values), strict=True):
            for name, part in side.encode(vectors).items():
                parts[name][pages, :, slots] = part.transpose(1, 2)
        self.n_tokens += n_new

    def read(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [rows, heads, stop − start, D] of stored tokens."""
        pages = self._on_device[:, start // PAGE : -(-stop // PAGE)]
        first = start - start % PAGE
        keys, values = (
            side.decode(
                {
                    # [rows, pages, heads, 64, …] → [rows, heads, tokens, …], while it is small
                    name: part[pages]
                    .transpose(1, 2)
                    .flatten(2, 3)[:, :, start - first : stop - first]
                    for name, part in parts.items()
                },
                dtype,
            )
            for side, parts in zip(self.sides, self.storage, strict=True)
        )
        return keys, values

    def truncate(self, n_tokens: int) -> None:
        """Forget all tokens from `n_tokens` on; their pages become free."""
        if n_tokens >= self.n_tokens:
            return
        columns = -(-n_tokens // PAGE)
        self._count(self._table[:, columns : self._n_columns], -1)
        self._n_columns, self.n_tokens = columns, n_tokens

    def select(self, rows: torch.Tensor) -> None:
        """Row i becomes what row `rows[i]` was; int64 [new rows], repeats and omissions allowed."""
        rows = rows.to(self._table.device)
        self._table = self._table[rows]
        self._references.zero_()
        self._count(self._table[:, : self._n_columns], 1)
        self._upload()

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
        self._on_device = self._table.to(self.device)

    def _extend(self, columns: int) -> None:
        """Give every row pages for `columns` columns."""
        n_more = columns - self._n_columns
        if n_more <= 0:
            return
        if columns > self._table.shape[1]:
            room = max(columns, int(self._table.shape[1] * _GROWTH))
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
        old = self._references.numel()
        new = max(old + n_missing, int(old * _GROWTH))
        self._references = torch.cat([self._references, self._references.new_zeros(new - old)])
        larger = tuple(side.storage(new, self.device) for side in self.sides)
        for parts, copies in zip(self.storage, larger, strict=True):
            for name, part in parts.items():
                copies[name][:old] = part
        self.storage = larger
