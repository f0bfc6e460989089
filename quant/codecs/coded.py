"""A tensor as entropy-coded planes: what lies on disk, and any part of it back, bit for bit.

Elements are cut into byte planes (`planes.py`); a plane is coded by `rans32.py`, or stored as it is
where that would save too little. Tensor `T` becomes seven U8 tensors, all integers little-endian:

    T.rans32.head    u8  [..]        what this is, below
    T.rans32.raw     u8  [..]        the R planes that are not coded, chunk by chunk, planes in order,
                                     without the 64 bytes of each chunk that its states carry
    T.rans32.words   u8  [..]        streams of the J coded planes, chunk by chunk, planes in order
    T.rans32.state   u32 [C, J, 32]  states that decoding starts from
    T.rans32.index   u64 [C·J + 1]   bits 63..62: mode of the stream, 61..0: where it begins in words
    T.rans32.freq    u8  [..]        for each coded plane 32 bytes, bit s % 8 of byte s / 8 for a symbol
                                     that occurs, then u16 frequencies of those, 4096 in all
    T.rans32.crc     u32 [C]         CRC32C of a chunk's elements, in the order of the chunk

    head   0 "fbrn"   4 version u8   5 kind u8    6 order u8    7 axes u8
           8 dtype u8   9 coded planes, a bit each, u8   10 zero u16   12 elements of a chunk u32
          16 CRC32C of freq, of index, of state, of crc, u32 each   32 shape u64 [axes]
          then zlib's CRC-32 of the head u32 (with a CRC32C, every head would have the same CRC32C)

A chunk holds 16,384 elements, the last one what is left; C chunks hold n elements. Their order:

    flat   as they lie in memory
    tile   64 rows × 256 columns, row by row inside; tiles from left to right, then down. Used where
           the last axis divides by 256 and the product of the others by 64, so that rows and columns
           of a tensor can be had by decoding little more than them

Nothing depends on what precedes it but the index, so every chunk can be decoded alone. A damaged
byte anywhere is found: by the checksum of head, freq or index, by the coder's end states, by the
chunk's checksum, or (chunks exchanged) by those of state and crc; the error names tensor and chunk.
Encoding is in `encoder.py`. Source: fewbit's specification of lossless coding, section 4 (D1) and 7;
new are the bytes that states carry, the sparse tables and the checksums of planes.
"""

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import torch

from ..errors import CheckpointError
from ..native.threads import over_threads
from . import frequencies
from .chunks import CARRIED
from .planes import Kind, kind_of
from .rans32 import CHUNK, Damage, Group, Layout, decode

VERSION = 1
SUFFIX = ".rans32."
PLANES = ("raw", "words", "state", "index", "crc", "freq", "head")  # in the order of writing
TILE = (64, 256)  # rows, columns
STREAM_BYTES = 4 * 32 + 8  # states and index entry of one stream
_MAGIC = b"fbrn"
_FIXED = struct.Struct("<4sBBBBBBHIIIII")
_FLAT, _TILE = 0, 1
_RUN_CHUNKS = 64  # chunks that one thread decodes at a time: 2 MiB of bf16
_OFFSET = np.uint64((1 << 62) - 1)
_AGAIN = "it is damaged: fetch or quantize again"

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Table = np.ndarray[Any, np.dtype[np.uint16]]

# Codes of dtypes in a head. Never renumbered.
_DTYPES: dict[int, torch.dtype] = {
    1: torch.bool, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16,
    6: torch.uint32, 7: torch.int32, 8: torch.uint64, 9: torch.int64, 10: torch.float16,
    11: torch.bfloat16, 12: torch.float32, 13: torch.float64, 14: torch.float8_e4m3fn,
    15: torch.float8_e5m2, 16: torch.float8_e4m3fnuz, 17: torch.float8_e5m2fnuz,
    18: torch.complex64,
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):
    _DTYPES[19] = torch.float8_e8m0fnu
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Head:
    """What a coded tensor is.

    tiled: its order. coded: whether each plane of its kind is coded; the others are raw.
    freq_crc, ...: CRC32C of those planes' bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    tiled: bool
    coded: tuple[bool, ...]
    freq_crc: int = 0
    index_crc: int = 0
    state_crc: int = 0
    crc_crc: int = 0

    @property
    def kind(self) -> Kind:
        """How elements are cut into planes."""
        return kind_of(self.dtype)

    @property
    def n_elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def n_chunks(self) -> int:
        """Chunks of the tensor."""
        return -(-self.n_elements // CHUNK)

    @property
    def n_coded(self) -> int:
        """Coded planes."""
        return sum(self.coded)

    @property
    def n_raw(self) -> int:
        """Planes that are stored as they are."""
        return len(self.coded) - self.n_coded

    @property
    def chunks_across(self) -> int:
        """Chunks of one band of tiles; 1 in flat order."""
        return self.shape[-1] // TILE[1] if self.tiled else 1

    def raw_offset(self, chunk: int) -> int:
        """Where the raw bytes of a chunk begin; of the last one's successor: how many there are."""
        if not self.n_raw:
            return 0
        begun = min(chunk * CHUNK, self.n_elements)
        rest = begun % CHUNK
        carrying = begun // CHUNK + (rest >= CARRIED)
        return begun * self.n_raw - carrying * CARRIED

    def plane_bytes(self) -> dict[str, int]:
        """Bytes of every plane but `words` and `freq`, whose sizes depend on contents."""
        streams = self.n_chunks * self.n_coded
        return {
            "raw": self.raw_offset(self.n_chunks),
            "state": 128 * streams,
            "index": 8 * (streams + 1),
            "crc": 4 * self.n_chunks,
            "head": _FIXED.size + 8 * len(self.shape) + 4,
        }

    def layout(self, start: int, stop: int) -> Layout:
        """Where chunks [start, stop) lie in the tensor's memory."""
        width = self.dtype.itemsize
        chunks = np.arange(start, stop, dtype=np.int64)
        sizes = np.full(stop - start, CHUNK, np.int32)
        if stop == self.n_chunks and self.n_elements % CHUNK and stop > start:
            sizes[-1] = self.n_elements % CHUNK
        if not self.tiled:
            return Layout(chunks * (CHUNK * width), sizes, CHUNK, 0)
        band, across = np.divmod(chunks, self.chunks_across)
        columns = self.shape[-1]
        starts = (band * (TILE[0] * columns) + across * TILE[1]) * width
        return Layout(starts, sizes, TILE[1], columns * width)

    def to_bytes(self) -> bytes:
        """The plane `head`."""
        mask = sum(1 << plane for plane, coded in enumerate(self.coded) if coded)
        body = _FIXED.pack(
            _MAGIC, VERSION, self.kind, _TILE if self.tiled else _FLAT, len(self.shape),
            _CODES[self.dtype], mask, 0, CHUNK, self.freq_crc, self.index_crc, self.state_crc,
            self.crc_crc,
        ) + struct.pack(f"<{len(self.shape)}Q", *self.shape)  # fmt: skip
        return body + struct.pack("<I", zlib.crc32(body))


def head_of(dtype: torch.dtype, shape: tuple[int, ...], coded: tuple[bool, ...]) -> Head:
    """The head of a tensor in the order that its shape allows."""
    return Head(dtype, shape, _can_tile(shape), coded)


def codable(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype can be coded."""
    return dtype in _CODES


def _can_tile(shape: tuple[int, ...]) -> bool:
    if len(shape) < 2 or not math.prod(shape):
        return False
    return shape[-1] % TILE[1] == 0 and math.prod(shape[:-1]) % TILE[0] == 0


def parse_head(name: str, data: bytes) -> Head:
    """The head of tensor `name`; CheckpointError if it is damaged, of a newer version, or wrong."""
    if len(data) < _FIXED.size + 4 or data[:4] != _MAGIC:
        raise CheckpointError(f"{name}: no head of a coded tensor ({data[:8]!r}); {_AGAIN}")
    if data[4] != VERSION:
        raise CheckpointError(
            f"{name}: coded by version {data[4]} of rans32, this fewbit reads version {VERSION}; "
            f"upgrade with: pip install -U fewbit"
        )
    if struct.unpack("<I", data[-4:])[0] != zlib.crc32(data[:-4]):
        raise CheckpointError(f"{name}: the head's checksum differs; {_AGAIN}")
    _, _, kind, order, n_axes, code, mask, zero, chunk, *sums = _FIXED.unpack_from(data)
    dtype = _DTYPES.get(code)
    if dtype is None or len(data) != _FIXED.size + 8 * n_axes + 4 or chunk != CHUNK or zero:
        raise CheckpointError(f"{name}: the head holds values that do not exist; {_AGAIN}")
    shape = struct.unpack_from(f"<{n_axes}Q", data, _FIXED.size)
    planes = kind_of(dtype).n_planes
    coded = tuple(bool(mask >> plane & 1) for plane in range(planes))
    head = Head(dtype, shape, order == _TILE, coded, *sums)
    sound = kind == kind_of(dtype) and 0 < mask < 1 << planes and 0 < math.prod(shape) < 2**62
    if not sound or order != (_TILE if _can_tile(shape) else _FLAT):
        raise CheckpointError(f"{name}: the head contradicts itself; {_AGAIN}")
    return head


@dataclass(frozen=True)
class CodedTensor:
    """A coded tensor: its name (for errors), its head and its planes, uint8 each.

    Planes may be mapped from a file: only what is asked for is read. freq: tables of all planes, zero
    for raw ones, uint16 [planes, 256].
    """

    name: str
    head: Head
    planes: Mapping[str, torch.Tensor]
    freq: Table

    @classmethod
    def open(cls, name: str, planes: Mapping[str, torch.Tensor]) -> "CodedTensor":
        """From planes as they are stored. CheckpointError unless sizes, head and tables are sound."""
        missing = [plane for plane in PLANES if plane not in planes]
        if missing:
            raise CheckpointError(
                f"{name}: plane {SUFFIX}{missing[0]} is missing; fetch or quantize again"
            )
        head = parse_head(name, planes["head"].numpy().tobytes())
        for plane, wanted in head.plane_bytes().items():
            if planes[plane].numel() != wanted:
                raise CheckpointError(
                    f"{name}: plane {plane} has {planes[plane].numel()} bytes, {list(head.shape)} "
                    f"{head.dtype} needs {wanted}; {_AGAIN}"
                )
        found = cls(name, head, planes, np.zeros((len(head.coded), 256), np.uint16))
        found._check_plane("freq", head.freq_crc)
        found.freq[list(head.coded)] = unpack_freq(name, planes["freq"].numpy(), head.n_coded)
        return found

    def _check_order(self) -> None:
        """That each chunk stands where it was: its own checksum does not say."""
        self._check_plane("state", self.head.state_crc)
        self._check_plane("crc", self.head.crc_crc)

    def _check_plane(self, plane: str, wanted: int) -> None:
        if google_crc32c.value(self.planes[plane].numpy()) != wanted:
            raise CheckpointError(f"{self.name}: the checksum of plane {plane} differs; {_AGAIN}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self.head.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the decoded tensor."""
        return self.head.shape

    @property
    def n_bytes(self) -> int:
        """Stored bytes of all planes."""
        return sum(plane.numel() for plane in self.planes.values())

    def decode(self) -> torch.Tensor:
        """The tensor. CheckpointError naming the chunk that is damaged."""
        return self.decode_into(torch.empty(self.shape, dtype=self.dtype))

    def decode_into(self, out: torch.Tensor) -> torch.Tensor:
        """Decode into `out`, a contiguous CPU tensor of this dtype and shape, on several threads."""
        if out.shape != self.shape or out.dtype != self.dtype or not out.is_contiguous():
            raise ValueError(f"{self.name}: needs {self.dtype} {list(self.shape)}, contiguous")
        self._check_plane("index", self.head.index_crc)  # others read no more of it than they need
        target = out.reshape(-1).view(torch.uint8).numpy()
        runs = [(a, min(a + _RUN_CHUNKS, self.head.n_chunks))
                for a in range(0, self.head.n_chunks, _RUN_CHUNKS)]  # fmt: skip
        self._decode_runs(runs, lambda a, b: (target, self.head.layout(a, b)))
        self._check_order()
        return out

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the leading axis: only the chunks that hold them are decoded."""
        n_rows = self.shape[0] if self.shape else 0
        if not 0 <= start <= stop <= n_rows:
            raise IndexError(f"{self.name}: rows [{start}, {stop}) are outside [0, {n_rows})")
        per_row = self.head.n_elements // n_rows if n_rows else 0
        unit = CHUNK if not self.head.tiled else TILE[0] * self.shape[-1]  # elements
        first, last = start * per_row // unit, -(-(stop * per_row) // unit)
        base = first * unit
        n_held = min(last * unit, self.head.n_elements) - base
        held = torch.empty(max(n_held, 0), dtype=self.dtype)
        target = held.view(torch.uint8).numpy()
        across = self.head.chunks_across
        runs = [(a, min(a + _RUN_CHUNKS, last * across))
                for a in range(first * across, last * across, _RUN_CHUNKS)]  # fmt: skip

        def place(a: int, b: int) -> tuple[Bytes, Layout]:
            layout = self.head.layout(a, b)
            moved = layout.starts - base * self.dtype.itemsize
            return target, Layout(moved, layout.sizes, layout.piece, layout.stride)

        self._decode_runs(runs, place)
        begin = start * per_row - base
        return held[begin : begin + (stop - start) * per_row].view(stop - start, *self.shape[1:])

    def columns(self, start: int, stop: int) -> torch.Tensor:
        """Columns [start, stop) of the last axis, in memory of their own.

        Tiled tensors decode only the tiles that hold them; flat ones all.
        """
        n_columns = self.shape[-1] if self.shape else 0
        if not 0 <= start <= stop <= n_columns:
            raise IndexError(f"{self.name}: columns [{start}, {stop}) are outside [0, {n_columns})")
        if not self.head.tiled:
            return self.decode()[..., start:stop].clone()
        first, last = start // TILE[1], -(-stop // TILE[1])
        width, across = (last - first) * TILE[1], self.head.chunks_across
        held = torch.empty((*self.shape[:-1], width), dtype=self.dtype)
        target = held.reshape(-1).view(torch.uint8).numpy()
        item = self.dtype.itemsize
        runs = [(band + first, band + last) for band in range(0, self.head.n_chunks, across)]

        def place(a: int, b: int) -> tuple[Bytes, Layout]:
            starts = (a // across * TILE[0] * width + np.arange(b - a) * TILE[1]) * item
            sizes = np.full(b - a, CHUNK, np.int32)
            return target, Layout(starts.astype(np.int64), sizes, TILE[1], width * item)

        self._decode_runs(runs if width else [], place)
        begin = start - first * TILE[1]
        return held[..., begin : begin + stop - start].contiguous()

    def chunk(self, index: int) -> Bytes:
        """The element bytes of one chunk in its own order: touches some 40 KB of the planes."""
        if not 0 <= index < self.head.n_chunks:
            raise IndexError(f"{self.name}: no chunk {index} of {self.head.n_chunks}")
        size = int(self.head.layout(index, index + 1).sizes[0])
        out = np.empty(size * self.dtype.itemsize, np.uint8)
        flat = Layout(np.zeros(1, np.int64), np.array([size], np.int32), CHUNK, 0)
        self._decode_run(index, index + 1, out, flat)
        return out

    def verify(self) -> None:
        """Decode all, keep nothing. CheckpointError naming the damaged chunk."""
        self._check_plane("index", self.head.index_crc)
        span = _RUN_CHUNKS * CHUNK * self.dtype.itemsize
        for a in range(0, self.head.n_chunks, _RUN_CHUNKS):
            b = min(a + _RUN_CHUNKS, self.head.n_chunks)
            sizes = self.head.layout(a, b).sizes
            starts = np.arange(b - a, dtype=np.int64) * (CHUNK * self.dtype.itemsize)
            self._decode_run(a, b, np.empty(span, np.uint8), Layout(starts, sizes, CHUNK, 0))
        self._check_order()

    def _decode_runs(self, runs: list[tuple[int, int]], place: Any) -> None:
        def one(run: tuple[int, int]) -> None:
            out, layout = place(*run)
            self._decode_run(*run, out, layout)

        for _ in over_threads(one, runs):
            pass

    def _decode_run(self, start: int, stop: int, out: Bytes, layout: Layout) -> None:
        try:
            decode(self._group(start, stop), out, self.head.kind, layout, self.freq)
        except Damage as damage:
            raise CheckpointError(
                f"{self.name}: chunk {start + damage.chunk} of {self.head.n_chunks}: "
                f"{damage.reason}; {_AGAIN}"
            ) from damage

    def group(self) -> Group:
        """All chunks, for decoders of other devices."""
        return self._group(0, self.head.n_chunks)

    def _numbers(self, plane: str, dtype: str) -> Any:
        return self.planes[plane].numpy().view(dtype)

    def _group(self, start: int, stop: int) -> Group:
        """Chunks [start, stop); their index counts from the first word of the tensor."""
        head, streams = self.head, slice(start * self.head.n_coded, stop * self.head.n_coded)
        index = self._numbers("index", "<u8")[streams.start : streams.stop + 1].copy()
        index[-1] &= _OFFSET  # the mode there is that of the stream behind
        return Group(
            raw=self.planes["raw"].numpy()[head.raw_offset(start) : head.raw_offset(stop)],
            words=self.planes["words"].numpy(),
            index=index,
            state=self._numbers("state", "<u4").reshape(-1, 32)[streams],
            crc=self._numbers("crc", "<u4")[start:stop],
        )


def pack_freq(freq: Table) -> bytes:
    """The plane `freq` of tables [J, 256]."""
    rows = []
    for row in freq:
        used = row > 0
        rows.append(
            np.packbits(used, bitorder="little").tobytes() + row[used].astype("<u2").tobytes()
        )
    return b"".join(rows)


def unpack_freq(name: str, data: Bytes, n_coded: int) -> Table:
    """Tables [J, 256]; CheckpointError unless there are exactly as many."""
    table, at = np.zeros((n_coded, 256), np.uint16), 0
    for row in table:
        used = np.unpackbits(data[at : at + 32], bitorder="little").astype(bool)
        end = at + 32 + 2 * int(used.sum())
        if used.size != 256 or end > data.size:
            break
        row[used] = data[at + 32 : end].view("<u2")
        at = end
    try:
        frequencies.check(table, n_coded)
    except ValueError as error:
        raise CheckpointError(f"{name}: plane freq: {error}; {_AGAIN}") from error
    if at != data.size or not table.any(axis=1).all():
        raise CheckpointError(f"{name}: plane freq of {data.size} bytes is no table; {_AGAIN}")
    return table
