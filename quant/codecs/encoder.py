"""Entropy-codes a tensor that streams by twice: once to count symbols, once to encode.

    encoder = Encoder(dtype, shape)
    for rows in source: encoder.count(rows)
    if encoder.settle():                      # coding saves at least 3 %
        for rows in source: write(encoder.encode(rows))      # the plane `raw`, piece by piece
        for plane, pieces in encoder.planes(): ...            # the others

Rows come in slabs of any size, in order. Held in memory: what does not fill a band of chunks yet, 140
bytes a chunk and coded plane, and the words, which go to a file beyond `WORDS_BYTES`. The planes and
their layout are those of `coded.py`.

A plane is coded if its order-0 entropy, with states, index and table, is below 97 % of its size; a
tensor if that holds for all planes together.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import google_crc32c
import numpy as np
import torch

from ..native.threads import over_threads, runs_of
from .chunks import CARRIED
from .coded import (
    STREAM_BYTES,
    TILE,
    Bytes,
    Head,
    codable,
    head_of,
    pack_freq,
)
from .planes import kind_of
from .rans32 import CHUNK, Group, Layout, count, encode, normalize

WORTH = 0.97  # of the plain size: what saves less is stored plainly
MIN_ELEMENTS = 1024  # below, the table alone eats the saving
WORDS_BYTES = 64 << 20  # of words kept in memory
_PIECE_BYTES = 8 << 20
_GROUP_BYTES = 8 << 20  # encoded at a time, by all threads


class Encoder:
    """One tensor on its way into planes. folder: for words that do not fit into memory."""

    def __init__(
        self, dtype: torch.dtype, shape: tuple[int, ...], folder: Path | None = None
    ) -> None:
        self.dtype, self.shape = dtype, shape
        self._folder = folder
        self._head = head_of(dtype, shape, (True,) * kind_of(dtype).n_planes)
        self._counts = np.zeros((len(self._head.coded), 256), np.int64)
        self._freq = np.zeros((len(self._head.coded), 256), np.uint16)
        self.expected_bytes = 0.0  # of all planes but head, known once it has settled
        self._rest = np.empty(0, np.uint8)
        self._done = 0  # chunks
        self._words: list[Bytes] = []
        self._spilled: IO[bytes] | None = None  # words that came before `_words`
        self._n_words = self._n_held = 0  # bytes of all words, and of those in memory
        self._small: dict[str, list[Any]] = {"state": [], "index": [], "crc": []}

    def count(self, rows: torch.Tensor) -> None:
        """First pass: symbols of each plane. rows: the next of the leading axis."""
        data, layout = self._flat_layout(rows)
        runs = runs_of(len(layout.starts), 2 * torch.get_num_threads())

        def part(run: tuple[int, int]) -> Any:
            return count(data, self._head.kind, _sub(layout, *run))

        for found in over_threads(part, runs):
            self._counts += found

    def settle(self) -> bool:
        """Between the passes: which planes are coded. False if coding the tensor is not worth it."""
        n, streams = self._head.n_elements, self._head.n_chunks
        if n < MIN_ELEMENTS or not codable(self.dtype):
            return False
        if int(self._counts[0].sum()) != n:
            raise ValueError(f"counted {int(self._counts[0].sum())} of {n} elements")
        sizes = [
            _entropy_bytes(row) + streams * STREAM_BYTES + _table_bytes(row) for row in self._counts
        ]
        coded = tuple(size < WORTH * n for size in sizes)
        total = sum(size if use else n for size, use in zip(sizes, coded, strict=True))
        total -= 0 if all(coded) else n // CHUNK * CARRIED
        if not any(coded) or total + 4 * streams >= WORTH * n * self.dtype.itemsize:
            return False
        self.expected_bytes = total + 4 * streams
        self._head = head_of(self.dtype, self.shape, coded)
        for plane, use in enumerate(coded):
            if use:
                self._freq[plane] = normalize(self._counts[plane])
        return True

    def encode(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Second pass over the same rows: pieces of the plane `raw`, uint8."""
        data = _bytes_of(rows)
        if self._rest.size:
            data = np.concatenate([self._rest, data])
        last = (
            self._chunk_bytes(self._done) + data.size == self._head.n_elements * self.dtype.itemsize
        )
        band = self._band_bytes()
        whole = data.size if last else data.size // band * band
        step = max(band, _GROUP_BYTES // band * band)
        for start in range(0, whole, step):
            yield from self._encode_group(data[start : min(start + step, whole)])
        self._rest = data[whole:].copy()

    def planes(self) -> Iterator[tuple[str, Iterable[torch.Tensor]]]:
        """After the second pass: every plane but `raw`, in the order of writing."""
        if self._done != self._head.n_chunks:
            raise ValueError(f"encoded {self._done} of {self._head.n_chunks} chunks")
        index = np.concatenate([*self._small["index"], np.array([self._n_words], np.uint64)])
        index_bytes = index.astype("<u8").tobytes()
        freq = pack_freq(self._freq[list(self._head.coded)])
        yield "words", self._all_words()
        state = np.concatenate(self._small["state"]).astype("<u4").tobytes()
        crc = np.concatenate(self._small["crc"]).astype("<u4").tobytes()
        yield "state", [_tensor(state)]
        yield "index", [_tensor(index_bytes)]
        yield "crc", [_tensor(crc)]
        yield "freq", [_tensor(freq)]
        sums = (google_crc32c.value(plane) for plane in (freq, index_bytes, state, crc))
        head = Head(self.dtype, self.shape, self._head.tiled, self._head.coded, *sums)
        yield "head", [_tensor(head.to_bytes())]

    def _encode_group(self, data: Bytes) -> Iterator[torch.Tensor]:
        """Whole bands: their layout is that of a tensor which holds nothing else."""
        n = -(-data.size // (CHUNK * self.dtype.itemsize))
        inside = self._head.layout(self._done, self._done + n)
        starts = inside.starts - inside.starts[0]
        layout = Layout(starts, inside.sizes, inside.piece, inside.stride)

        def part(run: tuple[int, int]) -> Group:
            return encode(data, self._head.kind, _sub(layout, *run), self._freq)

        for group in over_threads(part, runs_of(n, 2 * torch.get_num_threads())):
            self._keep(group)
            if group.raw.size:
                yield torch.from_numpy(group.raw)
        self._done += n

    def _keep(self, group: Group) -> None:
        self._small["state"].append(group.state)
        self._small["index"].append(group.index[:-1] + np.uint64(self._n_words))
        self._small["crc"].append(group.crc)
        words, base = group.words, group.words.base
        if base is not None and base.nbytes > words.nbytes + words.nbytes // 4:
            words = words.copy()  # a view of room for the worst case
        self._words.append(words)
        self._n_words += group.words.size
        self._n_held += group.words.size
        if self._n_held > WORDS_BYTES:
            self._spill()

    def _spill(self) -> None:
        if self._spilled is None:
            self._spilled = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - nameless
        for words in self._words:
            self._spilled.write(words.data)
        self._words, self._n_held = [], 0

    def _all_words(self) -> Iterator[torch.Tensor]:
        if self._spilled is not None:
            self._spilled.seek(0)
            while data := self._spilled.read(_PIECE_BYTES):
                yield _tensor(data)
            self._spilled.close()
        yield from (torch.from_numpy(words) for words in self._words if words.size)

    def _flat_layout(self, rows: torch.Tensor) -> tuple[Bytes, Layout]:
        """Any division into chunks will do for counting."""
        data = _bytes_of(rows)
        width = self.dtype.itemsize
        n = data.size // width
        starts = np.arange(-(-n // CHUNK), dtype=np.int64) * (CHUNK * width)
        sizes = np.full(len(starts), CHUNK, np.int32)
        if n % CHUNK:
            sizes[-1] = n % CHUNK
        return data, Layout(starts, sizes, CHUNK, 0)

    def _band_bytes(self) -> int:
        """Bytes after which a chunk ends in memory."""
        width = self.dtype.itemsize
        return width * (TILE[0] * self.shape[-1] if self._head.tiled else CHUNK)

    def _chunk_bytes(self, chunks: int) -> int:
        return chunks * CHUNK * self.dtype.itemsize


def _sub(layout: Layout, start: int, stop: int) -> Layout:
    return Layout(layout.starts[start:stop], layout.sizes[start:stop], layout.piece, layout.stride)


def _table_bytes(counts: Any) -> int:
    """Of a plane's table in `freq`."""
    return 32 + 2 * int((counts > 0).sum())


def _entropy_bytes(counts: Any) -> float:
    """n · H / 8, H the entropy of a symbol in bits."""
    used = counts[counts > 0].astype(np.float64)
    total = used.sum()
    return float((used * np.log2(total / used)).sum() / 8) if total else 0.0


def _bytes_of(rows: torch.Tensor) -> Bytes:
    data: Bytes = rows.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return data


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else _NOTHING


_NOTHING = torch.empty(0, dtype=torch.uint8)
