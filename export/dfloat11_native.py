"""DFloat11's streams in C (quant/native/dfloat11.c), as the same engine as `dfloat11_numpy.NUMPY`.

ctypes releases the GIL while C runs, so threads code slices and decode ranges at the same time. Arrays
are passed as addresses: they must be contiguous, which `_address` checks.

Not here: compiling (quant/native/compiler.py).
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np

from ..quant.native.compiler import library
from .dfloat11_code import Bytes, Code, Longs, Shorts
from .dfloat11_numpy import Engine, Slice, Stream, Target


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
        count(_address(weights), len(weights), _address(counts))
        return counts

    def encode_slice(part: Slice, code: Code, target: Target) -> None:
        encode(
            *(_address(part.weights), len(part.weights), part.first, part.start_bit),
            *(_address(code.upper), _address(code.length), _address(part.sign_mantissa)),
            *(_address(target.words), _address(target.gaps), _address(target.positions)),
        )

    def pack_gaps(gaps: Bytes) -> Bytes:
        packed = np.empty(len(gaps) // 8 * 5, np.uint8)
        pack(_address(gaps), len(gaps) // 8, _address(packed))
        return packed

    def decode_blocks(stream: Stream, begin: int, end: int, out: Shorts) -> tuple[int, int]:
        where = np.zeros(1, np.int64)
        status = decode(
            *(_address(stream.encoded), len(stream.encoded), _address(stream.gaps)),
            *(len(stream.gaps), _address(stream.positions), begin, end),
            *(_address(stream.lookup.many), _address(stream.lookup.one)),
            *(_address(stream.lookup.cells), _address(stream.sign_mantissa)),
            *(_address(out), _address(where)),
        )
        return int(status), int(where[0])

    return Engine("native", True, count_of, encode_slice, pack_gaps, decode_blocks)


def _function(found: Any, result: Any, arguments: str) -> Any:
    """p: an address, l: an int64."""
    kinds = {"p": ctypes.c_void_p, "l": ctypes.c_int64}
    found.argtypes = [kinds[kind] for kind in arguments.split()]
    found.restype = result
    return found


def _address(array: np.ndarray[Any, Any]) -> int:
    assert array.flags.c_contiguous, f"a contiguous array is needed, strides are {array.strides}"
    return int(array.ctypes.data)
