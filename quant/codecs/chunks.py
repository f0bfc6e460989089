"""Where chunks of a buffer lie, what a coded group of them holds, and what damage is called.

A chunk has 16384 elements, the last of a tensor perhaps fewer. In flat order a chunk is contiguous;
as a tile of 64 rows and 256 columns it is 64 pieces of 256 elements, one row apart:

    starts[c] ─► piece 0   piece · element bytes, contiguous
                 piece 1   `stride` bytes after the start of piece 0
                 ...       ceil(sizes[c] / piece) pieces, the last perhaps shorter

A group is C chunks in that order. J of its planes are coded, each chunk's plane by itself, and R are
stored as they are:

    raw     u8  [bytes]       raw planes, chunk after chunk, planes inside; less what is carried
    words   u8  [bytes]       the streams, chunk after chunk, planes inside, each of even length
    index   u64 [C·J + 1]     bits 63..62 mode, bits 61..0 offset into `words`; the last: where all end
    state   u32 [C·J, 32]     what a stream begins or ends with, below
    crc     u32 [C]           CRC32C of a chunk's element bytes, as they were before coding

A coder may begin with any state in [2^16, 2^17), so that 16 bits in each of 32 lanes are free. Where
there is a coded plane (J >= 1) and a raw one (R >= 1), a chunk of n >= 64 elements carries the first 64
bytes of its first raw plane there, in the states of its first coded plane:

    element      0      1    ..     31     32     33   ..     63     64  ..  n-1     first raw plane
               b[0]   b[1]   ..  b[31]   b[32]  b[33]  ..  b[63]   b[64] ..
               └──────────── in the states, not in `raw` ──────────┘└─ in `raw`, before the next plane

    half[l] = b[l] | b[l + 32] << 8        l = 0..31; 0 in all other streams, and if nothing is carried

    state      31..................16 15...................0
    RANS        where the encoder ended that began with 1 << 16 | half, to which decoding leads back
    CONSTANT    the symbol           | half                   in all lanes
    RAW         0                    | half

If chunks carry, a full one has R · 16384 - 64 bytes in `raw`: any chunk can be found there.

Nothing is coded here.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from .planes import Kind

CHUNK = 16384
LANES = 32
CARRIED = 2 * LANES  # bytes of a raw plane that states hold
MODE_SHIFT = 62
OFFSET_MASK = (1 << MODE_SHIFT) - 1


class Mode(IntEnum):
    """How a stream is stored: bits 63..62 of its entry in the index."""

    RANS = 0
    CONSTANT = 1
    RAW = 2


class Damage(ValueError):
    """A coded group does not decode to what was coded; `chunk` counts in the group, -1: all of it."""

    def __init__(self, chunk: int, reason: str) -> None:
        super().__init__(f"chunk {chunk}: {reason}" if chunk >= 0 else reason)
        self.chunk = chunk
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return type(self), (self.chunk, self.reason)


@dataclass(frozen=True)
class Layout:
    """Where the chunks lie in a buffer of elements."""

    starts: np.ndarray  # int64 [n_chunks], bytes
    sizes: np.ndarray  # int32 [n_chunks], elements
    piece: int  # elements that are contiguous
    stride: int  # bytes from one piece to the next

    @property
    def n_elements(self) -> int:
        """Of all chunks."""
        return int(self.sizes.sum())

    def check(self, n_bytes: int, kind: Kind) -> None:
        """`ValueError` unless every element lies in a buffer of this many bytes."""
        self.check_arrays()
        starts, sizes = self.starts, self.sizes
        if not sizes.size:
            return
        if sizes.min() < 1 or sizes.max() > CHUNK:
            raise ValueError(f"chunks have 1 to {CHUNK} elements, got {sizes.min()}..{sizes.max()}")
        last = (sizes.astype(np.int64) - 1) // self.piece
        ends = last * self.stride + (sizes - last * self.piece) * kind.n_planes
        if starts.min() < 0 or starts.max() > n_bytes or (starts + ends).max() > n_bytes:
            raise ValueError(
                f"a chunk ends behind the buffer's {n_bytes} bytes, or starts before it"
            )

    def check_arrays(self) -> None:
        """`ValueError` for other shapes or dtypes, or an impossible piece or stride; no look inside."""
        starts, sizes = self.starts, self.sizes
        if starts.ndim != 1 or starts.shape != sizes.shape:
            raise ValueError(f"starts {starts.shape} and sizes {sizes.shape} must be [n_chunks]")
        if starts.dtype != np.int64 or sizes.dtype != np.int32:
            raise ValueError(f"starts {starts.dtype}, sizes {sizes.dtype}: must be int64 and int32")
        if self.piece < 1 or self.stride < 0 or self.stride >> 48:
            raise ValueError(f"piece {self.piece} must be >= 1 and stride {self.stride} >= 0")


def flat_layout(n_elements: int, kind: Kind) -> Layout:
    """Contiguous chunks in the order of memory."""
    first = np.arange(0, n_elements, CHUNK, dtype=np.int64)
    sizes = np.minimum(n_elements - first, CHUNK).astype(np.int32)
    return Layout(first * kind.n_planes, sizes, CHUNK, 0)


def carried(size: int, n_coded: int, n_raw: int) -> int:
    """Bytes of its first raw plane that a chunk of this size has in its states: 64 or 0."""
    return CARRIED if n_coded and n_raw and size >= CARRIED else 0


def raw_bytes(sizes: np.ndarray, n_coded: int, n_raw: int) -> int:
    """Bytes of `raw` of chunks of these sizes."""
    n_carrying = int(np.count_nonzero(sizes >= CARRIED)) if n_coded and n_raw else 0
    return n_raw * int(sizes.sum()) - CARRIED * n_carrying if n_raw else 0


def raw_offsets(sizes: np.ndarray, n_coded: int, n_raw: int) -> np.ndarray:
    """int64 [C + 1]: where in `raw` the bytes of each chunk begin, and where all end."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    if n_raw:
        stored = sizes.astype(np.int64) * n_raw
        if n_coded:
            stored -= CARRIED * (sizes >= CARRIED)
        np.cumsum(stored, out=offsets[1:])
    return offsets


@dataclass(frozen=True)
class Group:
    """Coded chunks; the arrays are drawn above."""

    raw: np.ndarray
    words: np.ndarray
    index: np.ndarray
    state: np.ndarray
    crc: np.ndarray

    def check(self, layout: Layout, n_coded: int, n_raw: int) -> None:
        """`Damage` unless the arrays have the dtypes and shapes of this many planes."""
        n_chunks = len(layout.sizes)
        wanted = {
            "raw": (np.uint8, (raw_bytes(layout.sizes, n_coded, n_raw),)),
            "words": (np.uint8, (self.words.size,)),
            "index": (np.uint64, (n_chunks * n_coded + 1,)),
            "state": (np.uint32, (n_chunks * n_coded, LANES)),
            "crc": (np.uint32, (n_chunks,)),
        }
        for name, (dtype, shape) in wanted.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != shape:
                raise Damage(
                    -1,
                    f"{name} is {array.dtype} {array.shape}, must be {np.dtype(dtype)} {shape}",
                )
