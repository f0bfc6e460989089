"""The bytes of a KV stream: a header, then one frame for each chunk of tokens. Little-endian.

    header  "fewbitKV"  u16 version 1  u8 dtype (0 bf16, 1 fp16, 2 fp32)  u8 packed (0, 1)
            u32 rows  u32 layers  u64 tokens  u32 chunk (tokens of every frame but the last)
            u64 stored  u64 tail      packed: tokens in pages, first token kept dense; else 0
            32 bytes  SHA-256 of the tables, zeros if no frame uses any
            per layer  u32 heads  u32 head_dim  of keys, then of values
            u32 length, text          packed: the cache's policy, else empty
            u32 CRC32C of all the above

    frame   "KVCH"  u32 CRC32C of the header  u32 chunk number  u8 level  3 × 0
            per piece  u32 bytes  u32 CRC32C        layer 0 keys, layer 0 values, layer 1 keys, …
            u32 CRC32C of all the above
            the pieces

A frame can be decoded as soon as it is there, without any other; frames of one stream may have
different levels. What a piece holds is said in `kv_stream_piece.py`.

Nothing is allocated from a size before the bytes that it promises are there or the checksum over it
was right, and no reading goes beyond what there is: every damage is a `StreamError` that names the
place.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import torch

from .errors import FewbitError

MAGIC, VERSION = b"fewbitKV", 1
FRAME_MAGIC = b"KVCH"
NO_TABLES = bytes(32)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIDES = ("keys", "values")
_FIXED = "<HBBIIQIQQ32s"
_FRAME = "<4sIIBxxx"
_READ = 1 << 20  # bytes asked of a source at once
# Bounds of what a header may say; beyond them it is damaged, whatever its checksum says.
_MOST = {"rows": 1 << 16, "layers": 1 << 12, "chunk": 1 << 20, "tokens": 1 << 40}
_MOST_CHANNELS = 1 << 20
_MOST_TEXT = 1 << 16

Read = Callable[[int], bytes]


class StreamError(FewbitError):
    """A KV stream or its tables are damaged, foreign, or do not belong together."""


class Reader:
    """Bytes in memory, taken from the front. where: what messages begin with."""

    def __init__(self, data: bytes | memoryview, where: str) -> None:
        self._data = memoryview(data)
        self._at = 0
        self.where = where

    @property
    def left(self) -> int:
        """Bytes not taken yet."""
        return len(self._data) - self._at

    def take(self, n_bytes: int) -> memoryview:
        """The next bytes; StreamError if there are fewer."""
        if n_bytes > self.left:
            raise StreamError(f"{self.where}: ends {n_bytes - self.left} bytes early (truncated?)")
        self._at += n_bytes
        return self._data[self._at - n_bytes : self._at]

    def unpack(self, form: str) -> tuple[Any, ...]:
        """The next fields."""
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def array(self, dtype: str, count: int) -> np.ndarray:
        """The next numbers [count], in the machine's order of bytes, read-only."""
        kind = np.dtype(dtype)
        found = np.frombuffer(self.take(kind.itemsize * count), kind)
        return found.astype(kind.newbyteorder("="), copy=False)

    def end(self) -> None:
        """StreamError unless everything was taken."""
        if self.left:
            raise StreamError(f"{self.where}: {self.left} bytes too many")


@dataclass(frozen=True)
class Header:
    """What all frames of a stream have in common. shapes: per layer, (heads, head_dim) of keys and
    of values."""

    dtype: torch.dtype
    rows: int
    tokens: int
    chunk: int
    shapes: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    tables: bytes = NO_TABLES
    policy: str = ""  # a packed cache's; "" is a dense one
    stored: int = 0
    tail: int = 0

    @property
    def packed(self) -> bool:
        """Whether the stream is of a packed cache."""
        return bool(self.policy)

    @property
    def n_chunks(self) -> int:
        """Frames."""
        return -(-self.tokens // self.chunk)

    def span(self, index: int) -> tuple[int, int]:
        """(first token, token behind the last) of a chunk."""
        return index * self.chunk, min((index + 1) * self.chunk, self.tokens)

    def to_bytes(self) -> bytes:
        """As drawn above."""
        text = self.policy.encode()
        fixed = struct.pack(
            _FIXED, VERSION, DTYPES.index(self.dtype), self.packed, self.rows, len(self.shapes),
            self.tokens, self.chunk, self.stored, self.tail, self.tables,
        )  # fmt: skip
        shapes = b"".join(struct.pack("<IIII", *key, *value) for key, value in self.shapes)
        body = MAGIC + fixed + shapes + struct.pack("<I", len(text)) + text
        return body + struct.pack("<I", google_crc32c.value(body))

    @property
    def crc(self) -> int:
        """What frames refer to."""
        return int.from_bytes(self.to_bytes()[-4:], "little")


def read_header(read: Read) -> Header:
    """The header at the front of a source."""
    where = "KV stream header"
    head = read_exactly(read, len(MAGIC) + struct.calcsize(_FIXED), where)
    if head[: len(MAGIC)] != MAGIC:
        raise StreamError(f"{where}: not a KV stream (it must begin with {MAGIC.decode()})")
    version, code, packed, rows, layers, tokens, chunk, stored, tail, tables = struct.unpack(
        _FIXED, head[len(MAGIC) :]
    )
    if version != VERSION:
        raise StreamError(f"{where}: version {version}, this fewbit reads {VERSION}; upgrade it")
    sizes = {"rows": rows, "layers": layers, "chunk": chunk, "tokens": tokens}
    for name, size in sizes.items():
        if not 0 < size <= _MOST[name]:
            raise StreamError(f"{where}: {size} {name}, must be 1 to {_MOST[name]} (damaged?)")
    rest = read_exactly(read, 16 * layers + 4, where)
    (length,) = struct.unpack("<I", rest[-4:])
    if length > _MOST_TEXT:
        raise StreamError(f"{where}: {length} bytes of policy, at most {_MOST_TEXT} (damaged?)")
    text = read_exactly(read, length, where)
    (crc,) = struct.unpack("<I", read_exactly(read, 4, where))
    if crc != google_crc32c.value(head + rest + text):
        raise StreamError(f"{where}: the checksum does not match")
    numbers = struct.unpack(f"<{4 * layers}I", rest[:-4])
    shapes = tuple(
        ((numbers[i], numbers[i + 1]), (numbers[i + 2], numbers[i + 3]))
        for i in range(0, len(numbers), 4)
    )
    try:
        policy = text.decode()
    except UnicodeDecodeError as error:
        raise StreamError(
            f"{where}: the policy is no UTF-8 at byte {error.start} (damaged?)"
        ) from error
    if code >= len(DTYPES) or packed != (length > 0) or max(stored, tail) > tokens:
        raise StreamError(f"{where}: dtype {code}, packed {packed}, {stored} stored: impossible")
    for layer, sides in enumerate(shapes):
        for name, (heads, head_dim) in zip(SIDES, sides, strict=True):
            if not 0 < heads * head_dim <= _MOST_CHANNELS:
                raise StreamError(
                    f"{where}: layer {layer} {name}: {heads} heads of {head_dim}, must be 1 to "
                    f"{_MOST_CHANNELS} channels (damaged?)"
                )
    return Header(DTYPES[code], rows, tokens, chunk, shapes, tables, policy, stored, tail)


def frame_bytes(header_crc: int, index: int, level: int, pieces: Sequence[bytes]) -> bytes:
    """One frame, as drawn above."""
    head = struct.pack(_FRAME, FRAME_MAGIC, header_crc, index, level)
    table = b"".join(struct.pack("<II", len(p), google_crc32c.value(p)) for p in pieces)
    crc = struct.pack("<I", google_crc32c.value(head + table))
    return b"".join((head, table, crc, *pieces))


@dataclass(frozen=True)
class Frame:
    """One chunk as it came: its number, its level, and its pieces with their names."""

    index: int
    level: int
    pieces: tuple[Reader, ...]


def read_frame(read: Read, header: Header, index: int) -> Frame:
    """The frame of chunk `index`, checked against its checksums."""
    where, n_pieces = f"KV stream chunk {index}", len(SIDES) * len(header.shapes)
    size = struct.calcsize(_FRAME) + 8 * n_pieces
    head = read_exactly(read, size + 4, f"{where} head")
    if head[:4] != FRAME_MAGIC or int.from_bytes(head[size:], "little") != google_crc32c.value(
        head[:size]
    ):
        raise StreamError(f"{where}: the checksum of its head does not match")
    _, owner, found, level = struct.unpack_from(_FRAME, head)
    if owner != header.crc:
        raise StreamError(f"{where}: it belongs to another stream")
    if found != index:
        raise StreamError(f"{where}: found chunk {found} in its place")
    lengths = struct.unpack_from(f"<{2 * n_pieces}I", head, struct.calcsize(_FRAME))
    pieces = []
    for piece in range(n_pieces):
        place = f"{where}, layer {piece // 2} {SIDES[piece % 2]}"
        data = read_exactly(read, lengths[2 * piece], place)
        if google_crc32c.value(data) != lengths[2 * piece + 1]:
            raise StreamError(f"{place}: the checksum does not match")
        pieces.append(Reader(data, place))
    return Frame(index, level, tuple(pieces))


def read_exactly(read: Read, n_bytes: int, where: str) -> bytes:
    """That many bytes of a source that may give fewer at a time."""
    blocks, missing = [], n_bytes
    while missing:
        block = read(min(missing, _READ))
        if not block:
            raise StreamError(f"{where}: ends {missing} bytes early (truncated?)")
        blocks.append(block)
        missing -= len(block)
    return b"".join(blocks)
