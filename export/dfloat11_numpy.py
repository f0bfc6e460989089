"""DFloat11's streams in numpy: what runs where no C compiler is, and the oracle of the C code.

An engine codes slices of a unit's elements and decodes ranges of its blocks:

    window w      bit 0 ........................ 63 | window w+1  bit 0 ....
                      |gap|c0 |c1 |  ...   |c_last  ....|c_first ...

Encoding: code i starts at bit S[i] = sum of the lengths before it and gives `upper >> S[i]%64` to word
S[i]//64; words are the OR of theirs, found by `reduceat`, plus what spills from the word before (one
code at most, because codes have at most 32 bits). Decoding: all windows of a range go in lockstep, one
code a step, from where their gaps say; then each end must meet the next gap.

Bits run from the most significant down. Not here: codes and tables (`dfloat11_code.py`), the tensors of
a unit (`dfloat11.py`), threads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .dfloat11_code import Bytes, Code, Longs, Lookup, Shorts, Words

WINDOW_BYTES, WINDOW_BITS, BLOCK_WINDOWS = 8, 64, 512
BLOCK_BYTES, BLOCK_BITS = WINDOW_BYTES * BLOCK_WINDOWS, WINDOW_BITS * BLOCK_WINDOWS
FINE, BAD_GAP, BAD_CODE, BAD_COUNT = range(4)


@dataclass(frozen=True, eq=False)
class Slice:
    """Elements of a unit from `first` on: weights uint16 [m], whose codes start at `start_bit`.

    sign_mantissa uint8 [m] is filled.
    """

    weights: Shorts
    first: int
    start_bit: int
    sign_mantissa: Bytes


@dataclass(frozen=True, eq=False)
class Target:
    """Where slices are coded to. All is zero at first, and slices may come in any order.

    words '>u8': the stream. gaps uint8, one a window. positions uint32, one a block.
    """

    words: Words
    gaps: Bytes
    positions: np.ndarray[tuple[int], np.dtype[np.uint32]]


@dataclass(frozen=True, eq=False)
class Stream:
    """A unit to decode, its sizes checked. positions int64 [blocks + 1], differences ≤ 32768."""

    encoded: Bytes
    gaps: Bytes
    positions: Longs
    sign_mantissa: Bytes
    lookup: Lookup


@dataclass(frozen=True)
class Engine:
    """count: int64 [256] exponents of uint16 [m]. encode: one slice. pack: 5 bits of each gap.

    decode(stream, begin, end, out): blocks [begin, end) into uint16 `out`, the last two blocks of a
    unit in one call; FINE and the bit after the last code, or what is wrong and in which window.
    encodes_together: whether threads may encode slices that share a word.
    """

    name: str
    encodes_together: bool
    count: Callable[[Shorts], Longs]
    encode: Callable[[Slice, Code, Target], None]
    pack: Callable[[Bytes], Bytes]
    decode: Callable[[Stream, int, int, Shorts], tuple[int, int]]


# --- encoding -------------------------------------------------------------------------------------


def _count(weights: Shorts) -> Longs:
    return np.bincount(weights >> 7 & 255, minlength=256)


def _encode(part: Slice, code: Code, target: Target) -> None:
    exponents = (part.weights >> 7).astype(np.uint8)
    part.sign_mantissa[:] = part.weights >> 8 & 0x80 | part.weights & 0x7F
    ends = np.cumsum(code.length[exponents], dtype=np.int64) + part.start_bit
    starts = ends - code.length[exponents]
    window = starts // WINDOW_BITS
    upper = code.upper[exponents]
    used = (starts % WINDOW_BITS).astype(np.uint64)
    first = np.flatnonzero(np.diff(window, prepend=-1))
    target.words[window[first]] |= np.bitwise_or.reduceat(upper >> used, first)
    last = np.append(first[1:], len(window)) - 1
    last = last[ends[last] // WINDOW_BITS > window[last]]
    following = window[last] + 1
    # A code that ends with its window spills nothing: its shift leaves no bit.
    target.words[following] |= upper[last] << (np.uint64(WINDOW_BITS) - used[last])
    target.gaps[following] = ends[last] % WINDOW_BITS
    opens = following % BLOCK_WINDOWS == 0
    target.positions[following[opens] // BLOCK_WINDOWS] = part.first + last[opens] + 1


def pack_gaps(gaps: Bytes) -> Bytes:
    """5 bits of each of uint8 [8m], MSB first: uint8 [5m]."""
    shifts = np.arange(35, -1, -5, dtype=np.uint64)
    packed = np.bitwise_or.reduce(gaps.reshape(-1, 8).astype(np.uint64) << shifts, axis=1)
    return packed.astype(">u8").view(np.uint8).reshape(-1, 8)[:, 3:].reshape(-1)


def unpack_gaps(packed: Bytes) -> Bytes:
    """uint8 [8m] of uint8 [5m]."""
    wide = np.zeros((len(packed) // 5, 8), np.uint8)
    wide[:, 3:] = packed.reshape(-1, 5)
    shifts = np.arange(35, -1, -5, dtype=np.uint64)
    numbers = wide.view(">u8").astype(np.uint64)
    return (numbers >> shifts & np.uint64(31)).astype(np.uint8).reshape(-1)


# --- decoding -------------------------------------------------------------------------------------


def _decode(stream: Stream, begin: int, end: int, out: Shorts) -> tuple[int, int]:
    n_windows = -(-len(stream.encoded) // WINDOW_BYTES)
    first, stop = begin * BLOCK_WINDOWS, min(end * BLOCK_WINDOWS, n_windows)
    gaps = unpack_gaps(stream.gaps[begin * 320 : end * 320 + 5 * (stop < n_windows)])
    starts = gaps[: stop - first].astype(np.int64)
    hi, lo = _words(stream.encoded[first * WINDOW_BYTES : (stop + 1) * WINDOW_BYTES], len(starts))
    found, counts, ends = _lockstep(stream.lookup, hi, lo, starts)
    wanted = stream.positions[begin : end + 1] - stream.positions[begin]
    need = int(wanted[-1])
    total = np.concatenate([[0], np.cumsum(counts)])
    last = int(np.searchsorted(total, need)) - 1  # the window in which the last code starts
    joined = ends[:-1] == starts[1:] + WINDOW_BITS
    coded = ends[:-1] >= WINDOW_BITS
    torn = np.flatnonzero(~(joined & coded)[:last])
    if torn.size:
        window = int(torn[0])
        return (BAD_GAP, first + window + 1) if coded[window] else (BAD_CODE, first + window)
    if last >= len(counts) or (stop < n_windows and total[-1] != need):
        return BAD_COUNT, first
    kept = np.minimum(counts, np.maximum(need - total[:-1], 0))
    symbols = found.T[np.arange(len(found)) < kept[:, None]]
    ends[last] = starts[last] + stream.lookup.length[found[: kept[last], last]].sum()
    at_blocks = np.minimum(total[:-1], need)[::BLOCK_WINDOWS]
    if not np.array_equal(at_blocks, wanted[:-1]):
        wrong = int(np.flatnonzero(at_blocks != wanted[:-1])[0]) - 1
        return BAD_COUNT, first + wrong * BLOCK_WINDOWS
    bit = (first + last) * WINDOW_BITS + int(ends[last])
    if not _goes_on(
        gaps, last + 1, int(ends[last]), first + last + 1 == n_windows - 1, n_windows - first
    ):
        return BAD_GAP, first + last + 1
    part = stream.sign_mantissa[int(stream.positions[begin]) :][:need].astype(np.uint16)
    out[:] = (part & 0x80) << 8 | symbols.astype(np.uint16) << 7 | part & 0x7F
    return FINE, bit


def _goes_on(gaps: Bytes, window: int, end: int, is_final: bool, n_windows: int) -> bool:
    """Whether the window after the last code says where that ends, if it exists.

    No code starts in the unit's final window then, and at a whole byte no gap was recorded there.
    """
    if window >= n_windows:
        return True
    gap = int(gaps[window])
    return gap == end - WINDOW_BITS or (is_final and gap == 0 and end % 8 == 0)


def _words(encoded: Bytes, n: int) -> tuple[Words, Words]:
    """Each window and the one after it, zeros behind the end."""
    padded = np.zeros((n + 1) * WINDOW_BYTES, np.uint8)
    padded[: len(encoded)] = encoded
    words = padded.view(">u8").astype(np.uint64)
    return words[:-1], words[1:]


def _lockstep(lookup: Lookup, hi: Words, lo: Words, starts: Longs) -> tuple[Bytes, Longs, Longs]:
    """Symbols [steps, windows], how many each window has, and the bit after its last one (under 64
    if what follows is no code)."""
    n = len(hi)
    found = np.zeros((WINDOW_BITS, n), np.uint8)
    counts, ends, at = np.zeros(n, np.int64), starts.copy(), starts.copy()
    index, step = np.arange(n), 0
    while index.size:
        shift = at.astype(np.uint64)
        ahead = hi << shift | (lo >> np.uint64(1)) >> (np.uint64(63) - shift)
        cells = lookup.first[(ahead >> np.uint64(48)).astype(np.int64)]
        _long_codes(lookup.cells, ahead, cells)
        length = (cells >> 8).astype(np.int64)
        found[step, index] = cells & 255
        at += length
        going = (length > 0) & (at < WINDOW_BITS)
        step += 1
        if not going.all():
            done = index[~going]
            ends[done] = at[~going]
            counts[done] = step - (length[~going] == 0)
            index, hi, lo, at = index[going], hi[going], lo[going], at[going]
    return found[:step], counts, ends


def _long_codes(cells: Shorts, ahead: Words, found: Shorts) -> None:
    """Replace jumps in `found`, where two bytes of a code are read already."""
    for shift in (40, 32):
        where = np.flatnonzero(found & 0x8000)
        byte = (ahead[where] >> np.uint64(shift)).astype(np.int64) & 255
        found[where] = cells[found[where] & 0x7FFF, byte]
    found[found & 0x8000 > 0] = 0


NUMPY = Engine("numpy", False, _count, _encode, pack_gaps, _decode)
