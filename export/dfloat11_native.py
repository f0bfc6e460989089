"""DFloat11's streams in C (quant/native/dfloat11.c), as the same engine as `dfloat11_numpy.NUMPY`.

ctypes releases the GIL while C runs, so threads code slices and decode ranges at the same time. Arrays
are passed as addresses: they must be contiguous, of the dtype that C reads, and as long as it takes
them for, which `_address` and the calls check (FormatError), whatever options Python runs with. What
a stream holds, C distrusts itself.

Not here: compiling (quant/native/compiler.py).
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np

from ..quant.errors import FormatError
from ..quant.native.compiler import library
from .dfloat11_code import Bytes, Code, Longs, Shorts
from .dfloat11_numpy import (
    BLOCK_BITS,
    BLOCK_BYTES,
    BLOCK_WINDOWS,
    WINDOW_BITS,
    Engine,
    Slice,
    Stream,
    Target,
)


@cache
def native() -> Engine | None:
    """The C engine; None where there is no compiled library."""
    found = library()
    return None if found is None else engine_of(found)


def engine_of(found: ctypes.CDLL) -> Engine:
    """The engine of a library that has the functions of dfloat11.c."""
    count = _function(found.fewbit_df11_count, None, "p l p")
    encode = _function(found.fewbit_df11_encode, ctypes.c_int64, "p l l l p p p p p p")
    pack = _function(found.fewbit_df11_pack, None, "p l p")
    decode = _function(found.fewbit_df11_decode, ctypes.c_int, "p l p l p l l p p p p p p")

    def count_of(weights: Shorts) -> Longs:
        counts = np.zeros(256, np.int64)
        count(_address(weights, np.uint16), len(weights), _address(counts, np.int64))
        return counts

    def encode_slice(part: Slice, code: Code, target: Target) -> None:
        n = len(part.weights)
        _check(part.sign_mantissa, n, n, "signs and mantissas")
        _check(code.upper, 256, 256, "codes")
        _check(code.length, 256, 256, "lengths of codes")
        if part.start_bit + n * 32 >= 64 * len(target.words):  # most slices lie far from the end
            n_bits = int(count_of(part.weights) @ code.length.astype(np.int64))
            _check_room(part, n_bits, target)
        encode(
            *(_address(part.weights, np.uint16), n, part.first, part.start_bit),
            *(_address(code.upper, np.uint64), _address(code.length, np.uint8)),
            *(_address(part.sign_mantissa, np.uint8), _address(target.words, ">u8")),
            *(_address(target.gaps, np.uint8), _address(target.positions, np.uint32)),
        )

    def pack_gaps(gaps: Bytes) -> Bytes:
        packed = np.empty(len(gaps) // 8 * 5, np.uint8)
        pack(_address(gaps, np.uint8), len(gaps) // 8, _address(packed, np.uint8))
        return packed

    def decode_blocks(stream: Stream, begin: int, end: int, out: Shorts) -> tuple[int, int]:
        _check_range(stream, begin, end, out)
        where, lookup = np.zeros(1, np.int64), stream.lookup
        status = decode(
            *(_address(stream.encoded, np.uint8), len(stream.encoded)),
            *(_address(stream.gaps, np.uint8), len(stream.gaps)),
            *(_address(stream.positions, np.int64), begin, end),
            *(_address(lookup.many, np.uint64), _address(lookup.one, np.uint16)),
            *(_address(lookup.cells, np.uint16), _address(stream.sign_mantissa, np.uint8)),
            *(_address(out, np.uint16), _address(where, np.int64)),
        )
        return int(status), int(where[0])

    return Engine("native", True, count_of, encode_slice, pack_gaps, decode_blocks)


def _function(found: Any, result: Any, arguments: str) -> Any:
    """p: an address, l: an int64."""
    kinds = {"p": ctypes.c_void_p, "l": ctypes.c_int64}
    found.argtypes = [kinds[kind] for kind in arguments.split()]
    found.restype = result
    return found


def _check_room(part: Slice, n_bits: int, target: Target) -> None:
    """Another reading of the weights may find others than were counted, with longer codes."""
    last = int(part.start_bit + n_bits) // WINDOW_BITS
    n_windows = min(len(target.words), len(target.gaps), len(target.positions) * BLOCK_WINDOWS)
    if part.start_bit < 0 or last >= n_windows:
        raise FormatError(
            f"codes of elements {part.first} to {part.first + len(part.weights) - 1} end in window "
            f"{last}, there is room for {n_windows}; the source changed while it was read: export again"
        )


def _check_range(stream: Stream, begin: int, end: int, out: Shorts) -> None:
    """What C takes for granted of the sizes; `open_unit` sees to the same for a whole unit."""
    n_blocks = len(stream.positions) - 1
    if not 0 <= begin < end <= n_blocks:
        raise FormatError(f"blocks {begin} to {end} were asked for, 0 to {n_blocks} are there")
    wanted = stream.positions[begin : end + 1]
    steps = np.diff(wanted)
    if wanted[0] < 0 or steps.min() < 0 or steps.max() > BLOCK_BITS:
        raise FormatError(
            f"blocks {begin} to {end} start at elements that do not ascend by at most {BLOCK_BITS}; "
            f"open a unit with open_unit, which names the damage"
        )
    n = int(wanted[-1] - wanted[0])
    _check(out, n, n, "decoded elements")
    _check(stream.sign_mantissa, int(wanted[-1]), None, "signs and mantissas")
    _check(stream.gaps, n_blocks * BLOCK_WINDOWS * 5 // 8, None, "gaps")
    _check(stream.encoded, (n_blocks - 1) * BLOCK_BYTES + 1, n_blocks * BLOCK_BYTES, "codes")


def _check(array: np.ndarray[Any, Any], least: int, most: int | None, what: str) -> None:
    if len(array) < least or (most is not None and len(array) > most):
        allowed = (
            f"{least}" if most == least else f"{least} to {'any number' if most is None else most}"
        )
        raise FormatError(f"an array of {what} has {len(array)} entries, {allowed} are needed")


def _address(array: np.ndarray[Any, Any], dtype: Any) -> int:
    if not array.flags.c_contiguous or array.dtype != np.dtype(dtype):
        raise FormatError(
            f"a contiguous array of {np.dtype(dtype)} is needed, this one is {array.dtype} "
            f"{list(array.shape)} with strides {array.strides}; copy it with np.ascontiguousarray"
        )
    return int(array.ctypes.data)
