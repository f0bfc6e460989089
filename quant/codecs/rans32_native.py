"""`rans32` in C: the calls of quant/native/rans32.c, with the arguments of `rans32_numpy`.

The structs mirror quant/native/native.h. Arrays are made contiguous and aligned where they are not
(small ones; elements and words are used where they lie).

A call costs tens of microseconds, as much as coding a hundred kilobytes: here only shapes and dtypes
are checked, which pointers do not tell. The C code checks layouts and frequencies; if it refuses them,
Python finds the words.
"""

import ctypes
from typing import ClassVar

import numpy as np

from ..native import compiler
from . import frequencies
from .chunks import CHUNK, LANES, Damage, Group, Layout, raw_bytes
from .planes import Kind

_REASONS = {
    1: "the index ends behind the words",
    2: "its index entry is impossible",
    3: "a CONSTANT or RAW stream of wrong length",
    4: "the state of a CONSTANT stream is no symbol",
    5: "a RAW stream has a state or a padding that is not zero",
    6: "the decoder does not end where it must",
    7: "the checksum of its elements differs",
}
_SMALL = 1 << 18  # bytes of words that are not worth an estimate
_REFUSED = 8
_NO_MEMORY = 9
_NO_ROOM = 10


class _Chunks(ctypes.Structure):
    """struct fewbit_chunks."""

    _fields_: ClassVar = [
        ("data", ctypes.c_void_p), ("n_bytes", ctypes.c_uint64), ("starts", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p), ("n_chunks", ctypes.c_uint64), ("piece", ctypes.c_uint64),
        ("stride", ctypes.c_uint64), ("kind", ctypes.c_int32), ("isa", ctypes.c_int32),
    ]  # fmt: skip


class _Group(ctypes.Structure):
    """struct fewbit_group."""

    _fields_: ClassVar = [
        ("raw", ctypes.c_void_p), ("raw_bytes", ctypes.c_uint64), ("words", ctypes.c_void_p),
        ("words_bytes", ctypes.c_uint64), ("index", ctypes.c_void_p), ("state", ctypes.c_void_p),
        ("crc", ctypes.c_void_p),
    ]  # fmt: skip


def engine_name() -> str:
    """scalar, avx2 or avx512: what this processor runs, at most what the environment allows."""
    return compiler.ISA_NAMES[_library().fewbit_isa(compiler.isa_cap())]


def count(data: np.ndarray, kind: Kind, layout: Layout) -> np.ndarray:
    """As `rans32_numpy.count`."""
    layout.check_arrays()
    counts = np.zeros((kind.n_planes, 256), np.int64)
    kept = _plain(layout)
    chunks = _chunks(data, kind, kept)
    code = _library().fewbit_rans32_count(ctypes.byref(chunks), _pointer(counts))
    if code == _REFUSED:
        layout.check(data.size, kind)
    _raise(code)
    return counts


def encode(data: np.ndarray, kind: Kind, layout: Layout, freq: np.ndarray) -> Group:
    """As `rans32_numpy.encode`."""
    layout.check_arrays()
    frequencies.check_array(freq, kind.n_planes)
    n_coded = int(np.count_nonzero(freq.any(axis=1)))
    n_chunks, n = len(layout.sizes), max(layout.n_elements, 0)
    most = n_coded * (n + n_chunks) + 1
    rooms = [most]
    if most > _SMALL:
        likely = _likely_bytes(freq, n) + 64 * n_coded * n_chunks
        rooms = sorted({min(likely, most), most})
    for room in rooms:
        group = Group(
            np.empty(max(raw_bytes(layout.sizes, n_coded, kind.n_planes - n_coded), 0), np.uint8),
            np.empty(room, np.uint8),
            np.empty(n_chunks * n_coded + 1, np.uint64),
            np.empty((n_chunks * n_coded, LANES), np.uint32),
            np.empty(n_chunks, np.uint32),
        )
        if _encoded(data, kind, layout, freq, group):
            break
    words = group.words[: int(group.index[-1])]
    return Group(group.raw, words, group.index, group.state, group.crc)


def _likely_bytes(freq: np.ndarray, n: int) -> int:
    """Words of n symbols of each plane that occur as often as the frequencies say, and a tenth."""
    used = freq[freq > 0] / frequencies.TOTAL
    return int(-(used * np.log2(used)).sum() * n / 8 * 1.1)


def _encoded(data: np.ndarray, kind: Kind, layout: Layout, freq: np.ndarray, group: Group) -> bool:
    """Fills the group; False if its words have too little room."""
    kept, freq = _plain(layout), _aligned(freq)
    chunks, target = _chunks(data, kind, kept), _group(group)
    code = _library().fewbit_rans32_encode(
        ctypes.byref(chunks), _pointer(freq), ctypes.byref(target)
    )
    if code == _NO_ROOM:
        return False
    if code == _REFUSED:
        layout.check(data.size, kind)
        frequencies.check(freq, kind.n_planes)
    _raise(code)
    return True


def decode(group: Group, out: np.ndarray, kind: Kind, layout: Layout, freq: np.ndarray) -> None:
    """As `rans32_numpy.decode`."""
    layout.check_arrays()
    frequencies.check_array(freq, kind.n_planes)
    n_coded = int(np.count_nonzero(freq.any(axis=1)))
    group.check(layout, n_coded, kind.n_planes - n_coded)
    kept, freq = _plain(layout), _aligned(freq)
    group = Group(*map(_aligned, (group.raw, group.words, group.index, group.state, group.crc)))
    chunks, source = _chunks(out, kind, kept), _group(group)
    bad = ctypes.c_int64(-1)
    code = _library().fewbit_rans32_decode(
        ctypes.byref(chunks), _pointer(freq), ctypes.byref(source), ctypes.byref(bad)
    )
    if code == _REFUSED:
        layout.check(out.size, kind)
        frequencies.check(freq, kind.n_planes)
    _raise(code, bad.value)


def _library() -> ctypes.CDLL:
    found = compiler.library()
    if found is None:
        raise RuntimeError(f"native code was called without a library: {compiler.why_not()}")
    return found


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _aligned(array: np.ndarray) -> np.ndarray:
    flags = array.flags
    plain = flags.c_contiguous and flags.aligned
    return array if plain else np.require(array, requirements=["C", "A"])


def _plain(layout: Layout) -> Layout:
    starts, sizes = _aligned(layout.starts), _aligned(layout.sizes)
    if starts is layout.starts and sizes is layout.sizes:
        return layout
    return Layout(starts, sizes, layout.piece, layout.stride)


def _chunks(data: np.ndarray, kind: Kind, layout: Layout) -> _Chunks:
    """The struct; its arrays must outlive it. A piece longer than a chunk is a chunk."""
    isa = _library().fewbit_isa(compiler.isa_cap())
    piece = min(layout.piece, CHUNK)
    return _Chunks(
        data.ctypes.data, data.size, layout.starts.ctypes.data, layout.sizes.ctypes.data,
        len(layout.sizes), piece, layout.stride, int(kind), isa,
    )  # fmt: skip


def _group(group: Group) -> _Group:
    return _Group(
        group.raw.ctypes.data, group.raw.size, group.words.ctypes.data, group.words.size,
        group.index.ctypes.data, group.state.ctypes.data, group.crc.ctypes.data,
    )  # fmt: skip


def _raise(code: int, chunk: int = -1) -> None:
    """Turns what a call answers into errors."""
    if code in _REASONS:
        raise Damage(chunk, _REASONS[code])
    if code == _NO_MEMORY:
        raise MemoryError("no memory for the working buffers of the coder")
    if code:
        raise ValueError(f"the native coder refuses its arguments (code {code})")
