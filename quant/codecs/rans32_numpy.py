"""The coder `rans32` in numpy: the definition of the format, and what runs without a compiler.

A stream is one plane of one chunk: n symbols, T = ceil(n / 32) steps of 32 lanes, element i at step
i div 32 in lane i mod 32. With L = 65536, frequencies f that sum to 4096, and c the sum of the
frequencies of smaller symbols, an encoder runs from the last step to the first, all lanes alike:

    x = L + half                              before the last step
    m = x >= f << 20                          a lane that would overflow
    W[t] = x & 0xffff, M[t] = m, x >>= 16     where m
    x = (x div f << 12) + x mod f + c

and the decoder undoes it from the first step to the last, with E = slots[x & 4095]:

    symbol = E.symbol
    x = E.f · (x >> 12) + E.bias              bias = slot - c
    x = x << 16 | next word                   where x < L; lanes in ascending order

The words of a stream are W where M, steps ascending, lanes ascending inside a step, u16 little-endian.
The end states of the encoder are the states that the decoder starts with. Lanes without an element in
the last step are coded with the most frequent symbol (the smallest of them). half is 16 bits a lane
that the first coded plane of a chunk carries for its first raw plane, else 0 (`chunks` draws it).
Damage shows at the end: x div L must be 1 in every lane, x mod L is half, and every word is used.

A stream in which all symbols are equal is CONSTANT: no words, state = symbol << 16 | half in all lanes.
A stream is RAW if its words are not fewer bytes than it has symbols, or if a symbol occurs that has no
frequency: the symbols, and one zero byte if n is odd; state = half.

All chunks of a length take their steps together, so that numpy works on vectors of chunks · 32 lanes.
"""

import google_crc32c
import numpy as np

from . import frequencies
from .chunks import (
    CHUNK,
    LANES,
    MODE_SHIFT,
    OFFSET_MASK,
    Damage,
    Group,
    Layout,
    Mode,
    carried,
    raw_offsets,
)  # fmt: skip
from .planes import Kind, merge, split

_BATCH = 128  # chunks that take steps together: their states fit the caches
_L = 1 << 16
_BAD_END = "the decoder does not end where it must"


def count(data: np.ndarray, kind: Kind, layout: Layout) -> np.ndarray:
    """int64 [n_planes, 256]: how often each symbol occurs in each plane."""
    layout.check(data.size, kind)
    counts = np.zeros((kind.n_planes, 256), np.int64)
    for chunk in range(len(layout.sizes)):
        for plane, symbols in enumerate(split(read_chunk(data, kind, layout, chunk), kind)):
            counts[plane] += np.bincount(symbols, minlength=256)
    return counts


def encode(data: np.ndarray, kind: Kind, layout: Layout, freq: np.ndarray) -> Group:
    """The group of all chunks; planes without frequencies are stored raw."""
    layout.check(data.size, kind)
    coded = frequencies.check(freq, kind.n_planes)
    n_chunks, n_coded = len(layout.sizes), int(coded.sum())
    n_raw = kind.n_planes - n_coded
    begins = raw_offsets(layout.sizes, n_coded, n_raw)
    raw = np.empty(int(begins[-1]), np.uint8)
    state = np.zeros((n_chunks * n_coded, LANES), np.uint32)
    crc = np.empty(n_chunks, np.uint32)
    modes = np.zeros(n_chunks * n_coded, np.uint64)
    streams: list[bytes] = [b""] * (n_chunks * n_coded)
    for chunks in _batches(layout.sizes):
        size = int(layout.sizes[chunks[0]])
        planes = np.empty((len(chunks), kind.n_planes, size), np.uint8)
        for row, chunk in enumerate(chunks):
            elements = read_chunk(data, kind, layout, chunk)
            crc[chunk] = google_crc32c.value(elements.tobytes())
            planes[row] = split(elements, kind)
        plain = planes[:, ~coded].reshape(len(chunks), n_raw * size)
        n_carried = carried(size, n_coded, n_raw)
        for row, chunk in enumerate(chunks):
            raw[begins[chunk] : begins[chunk + 1]] = plain[row, n_carried:]
        halves = _halves(plain) if n_carried else np.zeros((len(chunks), LANES), np.uint32)
        for place, plane in enumerate(np.flatnonzero(coded)):
            rows = chunks * n_coded + place
            found = _encode_streams(
                planes[:, plane], freq[plane], halves if place == 0 else halves * 0
            )
            for row, (mode, words, states) in zip(rows, found, strict=True):
                modes[row], streams[row], state[row] = mode, words, states
    lengths = np.array([0, *map(len, streams)], np.uint64)
    index = np.cumsum(lengths, dtype=np.uint64)
    index[:-1] |= modes << np.uint64(MODE_SHIFT)
    return Group(raw, np.frombuffer(bytearray().join(streams), np.uint8), index, state, crc)


def decode(group: Group, out: np.ndarray, kind: Kind, layout: Layout, freq: np.ndarray) -> None:
    """Writes the elements of all chunks into `out`; `Damage` if they are not what was coded."""
    layout.check(out.size, kind)
    coded = frequencies.check(freq, kind.n_planes)
    n_coded = int(coded.sum())
    n_raw = kind.n_planes - n_coded
    group.check(layout, n_coded, n_raw)
    begins = raw_offsets(layout.sizes, n_coded, n_raw)
    modes, offsets = _checked_index(group, layout, n_coded)
    for chunks in _batches(layout.sizes):
        size = int(layout.sizes[chunks[0]])
        planes = np.empty((len(chunks), kind.n_planes, size), np.uint8)
        plain = np.empty((len(chunks), n_raw * size), np.uint8)
        n_carried = carried(size, n_coded, n_raw)
        for row, chunk in enumerate(chunks):
            plain[row, n_carried:] = group.raw[begins[chunk] : begins[chunk + 1]]
        for place, plane in enumerate(np.flatnonzero(coded)):
            rows = chunks * n_coded + place
            halves = _decode_streams(
                group, planes[:, plane], rows, modes, offsets, freq[plane], chunks
            )
            if n_carried and place == 0:
                plain[:, :LANES], plain[:, LANES:n_carried] = halves & 255, halves >> 8
            elif (wrong := halves.any(axis=1)).any():
                raise Damage(int(chunks[wrong.argmax()]), _BAD_END)
        planes[:, ~coded] = plain.reshape(len(chunks), n_raw, size)
        for row, chunk in enumerate(chunks):
            elements = merge(planes[row], kind)
            if google_crc32c.value(elements.tobytes()) != group.crc[chunk]:
                raise Damage(int(chunk), "the checksum of its elements differs")
            write_chunk(elements, out, kind, layout, chunk)


def _halves(plain: np.ndarray) -> np.ndarray:
    """uint32 [C, 32] of 16 bits: what the states of chunks carry of u8 [C, 64 or more]."""
    low, high = plain[:, :LANES].astype(np.uint32), plain[:, LANES : 2 * LANES].astype(np.uint32)
    return low | high << np.uint32(8)


def read_chunk(data: np.ndarray, kind: Kind, layout: Layout, chunk: int) -> np.ndarray:
    """u8: the element bytes of one chunk, its pieces one after the other."""
    start, n_bytes = int(layout.starts[chunk]), int(layout.sizes[chunk]) * kind.n_planes
    piece = layout.piece * kind.n_planes
    if n_bytes <= piece:
        return data[start : start + n_bytes]
    places = [(start + i * layout.stride, done) for i, done in enumerate(range(0, n_bytes, piece))]
    return np.concatenate([data[at : at + min(piece, n_bytes - done)] for at, done in places])


def write_chunk(
    elements: np.ndarray, out: np.ndarray, kind: Kind, layout: Layout, chunk: int
) -> None:
    """The inverse of `read_chunk`."""
    start, piece = int(layout.starts[chunk]), layout.piece * kind.n_planes
    for i, done in enumerate(range(0, elements.size, piece)):
        part = elements[done : done + piece]
        out[start + i * layout.stride : start + i * layout.stride + part.size] = part


def _batches(sizes: np.ndarray) -> list[np.ndarray]:
    """Chunks of equal length, at most so many together."""
    found = []
    for size in np.unique(sizes):
        chunks = np.flatnonzero(sizes == size)
        found += np.split(chunks, range(_BATCH, len(chunks), _BATCH))
    return found


def _steps(symbols: np.ndarray, pad: int) -> np.ndarray:
    """u8 [C, n] -> u8 [T, C · 32], padded to whole steps."""
    n_chunks, n = symbols.shape
    padded = np.full((n_chunks, -(-n // LANES) * LANES), pad, np.uint8)
    padded[:, :n] = symbols
    steps = padded.reshape(n_chunks, -1, LANES).transpose(1, 0, 2)
    return np.ascontiguousarray(steps).reshape(-1, n_chunks * LANES)


def _encode_streams(
    symbols: np.ndarray, freq: np.ndarray, halves: np.ndarray
) -> list[tuple[Mode, bytes, np.ndarray]]:
    """(mode, bytes, states) of every row of u8 [C, n]; halves: uint32 [C, 32]."""
    n_chunks, n = symbols.shape
    steps = _steps(symbols, int(freq.argmax()))
    low = np.empty(steps.shape, np.uint16)
    overflow = np.empty(steps.shape, bool)
    f_of = np.maximum(freq, 1).astype(np.uint32)
    c_of = frequencies.starts(freq)
    x = halves.reshape(-1) + np.uint32(_L)
    for t in range(len(steps) - 1, -1, -1):
        f = f_of.take(steps[t])
        np.greater_equal(x >> np.uint32(20), f, out=overflow[t])
        low[t] = x.astype(np.uint16)
        x >>= overflow[t].astype(np.uint32) << np.uint32(4)
        quotient = x // f
        x += quotient * (np.uint32(4096) - f) + c_of.take(steps[t])
    shape = (len(steps), n_chunks, LANES)
    low_of, overflow_of = low.reshape(shape), overflow.reshape(shape)
    states = x.reshape(n_chunks, LANES)
    impossible = (freq[symbols] == 0).any(axis=1)
    found: list[tuple[Mode, bytes, np.ndarray]] = []
    for row in range(n_chunks):
        words = low_of[:, row][overflow_of[:, row]]
        if (symbols[row] == symbols[row, 0]).all():
            symbol = np.uint32(symbols[row, 0])
            found.append((Mode.CONSTANT, b"", symbol << np.uint32(16) | halves[row]))
        elif impossible[row] or 2 * words.size >= n:
            found.append((Mode.RAW, symbols[row].tobytes() + bytes(n % 2), halves[row]))
        else:
            found.append((Mode.RANS, words.astype("<u2").tobytes(), states[row]))
    return found


def _checked_index(group: Group, layout: Layout, n_coded: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 modes [C·J] and offsets [C·J + 1], ascending, even and inside the words."""
    modes = (group.index >> np.uint64(MODE_SHIFT)).astype(np.int64)
    offsets = group.index & np.uint64(OFFSET_MASK)
    if modes[-1] or offsets[-1] > group.words.size:
        raise Damage(-1, f"the index ends at {group.index[-1]}, the words at {group.words.size}")
    wrong = (offsets[1:] < offsets[:-1]) | (offsets[:-1] % 2 == 1) | (modes[:-1] > Mode.RAW)
    if wrong.any():
        raise Damage(int(wrong.argmax()) // n_coded, "its index entry is impossible")
    sizes = np.repeat(layout.sizes.astype(np.int64), n_coded)
    expected = {Mode.CONSTANT: 0 * sizes, Mode.RAW: sizes + sizes % 2}
    lengths = np.diff(offsets.astype(np.int64))
    for mode, length in expected.items():
        wrong = (modes[:-1] == mode) & (lengths != length)
        if wrong.any():
            raise Damage(int(wrong.argmax()) // n_coded, f"a {mode.name} stream of wrong length")
    return modes[:-1], offsets.astype(np.int64)


def _decode_streams(
    group: Group,
    out: np.ndarray,
    rows: np.ndarray,
    modes: np.ndarray,
    offsets: np.ndarray,
    freq: np.ndarray,
    chunks: np.ndarray,
) -> np.ndarray:
    """Fills u8 [C, n] from the streams `rows` of the index, which belong to `chunks`.

    Returns uint32 [C, 32]: the half of each state that may carry other bytes.
    """
    size = out.shape[1]
    states = group.state[rows]
    halves = states & np.uint32(_L - 1)
    for place, (row, chunk) in enumerate(zip(rows, chunks, strict=True)):
        high = states[place] >> np.uint32(16)
        if modes[row] == Mode.CONSTANT:
            if high[0] > 255 or (high != high[0]).any():
                raise Damage(int(chunk), "the state of a CONSTANT stream is no symbol")
            out[place] = high[0]
        elif modes[row] == Mode.RAW:
            stream = group.words[offsets[row] : offsets[row + 1]]
            if high.any() or stream[size:].any():
                raise Damage(int(chunk), "a RAW stream has a state or a padding that is not zero")
            out[place] = stream[:size]
    ours = np.flatnonzero(modes[rows] == Mode.RANS)
    if ours.size:
        out[ours], ends, wrong = _decode_rans(
            group.words, states[ours], offsets[rows[ours]], offsets[rows[ours] + 1], freq, size
        )
        wrong |= (ends >> np.uint32(16) != 1).any(axis=1)
        if wrong.any():
            raise Damage(int(chunks[ours[wrong.argmax()]]), _BAD_END)
        halves[ours] = ends & np.uint32(_L - 1)
    return halves


def _decode_rans(
    words: np.ndarray,
    state: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    freq: np.ndarray,
    size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u8 [C, size] of symbols, uint32 [C, 32] of end states, bool [C]: are words left or missing?"""
    n_chunks, n_steps = len(state), -(-size // LANES)
    low = int(begin.min())
    stream = words[low : int(end.max()) // 2 * 2 + low % 2].view("<u2")
    stream = stream if stream.size else np.zeros(1, "<u2")
    slots = frequencies.slots(freq)
    at, end = (begin - low) // 2, (end - low) // 2
    symbols = np.empty((n_steps, n_chunks * LANES), np.uint8)
    x = state.reshape(-1).copy()
    for t in range(n_steps):
        entry = slots.take(x & np.uint32(4095))
        symbols[t] = entry.astype(np.uint8)
        x >>= np.uint32(12)
        x *= entry >> np.uint32(20)
        x += (entry >> np.uint32(8)) & np.uint32(4095)
        lanes = np.flatnonzero(x < _L)
        chunk = lanes >> 5
        n_used = np.bincount(chunk, minlength=n_chunks)
        first = at - (np.cumsum(n_used) - n_used)
        word = stream.take(first[chunk] + np.arange(lanes.size), mode="clip")
        x[lanes] = (x[lanes] << np.uint32(16)) | word
        at += n_used
    rows = symbols.reshape(n_steps, n_chunks, LANES).transpose(1, 0, 2)
    found = np.ascontiguousarray(rows).reshape(n_chunks, -1)[:, :size]
    return found, x.reshape(n_chunks, LANES), at != end


__all__ = ["CHUNK", "count", "decode", "encode"]
