"""DFloat11: bf16 weights with Huffman-coded exponents, a *unit* at a time, as published to the byte.

A unit is a run of weights, flattened and concatenated. Its tensors, under one module path:

    luts              uint8 [k + 1, 256]       the code (`dfloat11_code.py`)
    encoded_exponent  uint8 [bytes]            codes of bits 14 … 7, MSB first, the last byte filled
                                               from the end mark's code
    sign_mantissa     uint8 [n]                bit 15 and bits 6 … 0
    gaps              uint8 [320·blocks]       5 bits a window, MSB first: where its first code starts
    output_positions  uint8 [4·(blocks + 1)]   uint32: first element of each block, and n
    split_positions   int64 [weights − 1]      where one weight ends and the next begins

    block = 512 windows of 8 bytes: what one GPU block decodes, a thread a window

A window or block gets its entry when a code starts in it, or at the end of a stream that ends inside
a byte: if the last code straddles into a new block and ends with a byte, that block has no entry of
its own and the array is one shorter.

Decoding treats the tensors as hostile: sizes, tables, gaps and positions must agree everywhere, or a
CheckpointError names the tensor and the block. The format has no checksums, so a changed sign or
mantissa, or a code that became another one of the same length, cannot be seen.

Not here: which weights make a unit (`to_dfloat11.py`), files, GPU kernels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from ..quant.errors import CheckpointError
from .dfloat11_code import Bytes, Longs, Shorts, read_luts
from .dfloat11_encoder import MAX_ELEMENTS, UnitEncoder, in_threads
from .dfloat11_native import native
from .dfloat11_numpy import (
    BAD_CODE,
    BAD_GAP,
    BLOCK_BITS,
    BLOCK_BYTES,
    BLOCK_WINDOWS,
    FINE,
    NUMPY,
    WINDOW_BITS,
    Engine,
    Stream,
    unpack_gaps,
)

CODED = (
    *("luts", "encoded_exponent", "sign_mantissa"),
    *("output_positions", "gaps", "split_positions"),
)
SLICE = 1 << 20  # elements coded by one task
RANGE = 64  # blocks decoded by one task
GAP_BYTES = BLOCK_WINDOWS * 5 // 8

Parts = Mapping[str, np.ndarray[Any, Any]]


def engine() -> Engine:
    """The C engine where there is a compiled library, numpy otherwise."""
    return native() or NUMPY


# --- encoding -------------------------------------------------------------------------------------


def encode_unit(weights: Sequence[Shorts], using: Engine | None = None) -> dict[str, Any]:
    """The six tensors, in the order of `CODED`, of bf16 weights as uint16 arrays.

    Unfit if the format has no place for them: no elements, 2³¹ or more, exponents from 240 on, a
    code of more than 17 tables.
    """
    flat = [np.ascontiguousarray(weight).reshape(-1) for weight in weights]
    pieces = [weight[at : at + SLICE] for weight in flat for at in range(0, len(weight), SLICE)]
    unit = UnitEncoder([len(piece) for piece in pieces], pieces.__getitem__, using or engine())
    sign_mantissa = np.empty(unit.n, np.uint8)

    def put(first: int, data: Bytes) -> None:
        sign_mantissa[first : first + len(data)] = data

    for _ in unit.encode(put):
        pass
    sizes = np.array([len(weight) for weight in flat], np.int64)
    found = unit.parts() | {
        "sign_mantissa": sign_mantissa,
        "split_positions": np.cumsum(sizes)[:-1],
    }
    return {name: found[name] for name in CODED}


# --- decoding -------------------------------------------------------------------------------------


def open_unit(parts: Parts, where: str) -> Stream:
    """A unit's tensors, checked as far as that goes without decoding. CheckpointError names the
    tensor as `where`.tensor."""
    for name in CODED:
        if name not in parts:
            raise CheckpointError(f"{where}.{name} is missing; download or export it again")
        shape, dtype = parts[name].shape, parts[name].dtype
        wanted = np.int64 if name == "split_positions" else np.uint8
        if dtype != wanted or len(shape) != (2 if name == "luts" else 1):
            _damaged(where, name, f"is {dtype} {list(shape)}, {np.dtype(wanted)} is needed")
    n, n_bytes = len(parts["sign_mantissa"]), len(parts["encoded_exponent"])
    if not 0 < n <= MAX_ELEMENTS or not n_bytes:
        _damaged(where, "sign_mantissa", f"has {n} elements, and {n_bytes} bytes of codes")
    n_blocks = -(-n_bytes // BLOCK_BYTES)
    positions = _positions(parts["output_positions"], n, n_blocks, where)
    _check_gaps(parts["gaps"], n_bytes, n_blocks, where)
    _check_split(parts["split_positions"], n, where)
    arrays = (parts[name] for name in ("encoded_exponent", "gaps", "sign_mantissa"))
    encoded, gaps, sign_mantissa = (np.ascontiguousarray(array) for array in arrays)
    lookup = read_luts(np.ascontiguousarray(parts["luts"]), f"{where}.luts")
    return Stream(encoded, gaps, positions, sign_mantissa, lookup)


def decode_range(
    stream: Stream, start: int, stop: int, where: str, using: Engine | None = None
) -> Shorts:
    """Elements [start, stop) of a unit as uint16; only blocks that hold them are decoded.

    CheckpointError names the tensor and the block in which gaps, positions and codes disagree.
    """
    using = using or engine()
    if start == stop:
        return np.empty(0, np.uint16)
    positions, n_blocks = stream.positions, len(stream.positions) - 1
    begin = int(np.searchsorted(positions, start, "right")) - 1
    end = int(np.searchsorted(positions, stop, "left"))
    if end >= n_blocks - 1:
        begin, end = min(begin, max(n_blocks - 2, 0)), n_blocks
    out = np.empty(int(positions[end] - positions[begin]), np.uint16)

    def one(blocks: tuple[int, int]) -> tuple[int, int]:
        first, last = (int(positions[block] - positions[begin]) for block in blocks)
        return using.decode(stream, *blocks, out[first:last])

    ranges = _ranges(begin, end, n_blocks)
    for (_, last), (status, bit) in zip(ranges, in_threads(one, ranges), strict=True):
        _check_range(status, bit, last == n_blocks, len(stream.encoded), where)
    return out[start - int(positions[begin]) : stop - int(positions[begin])]


def decode_unit(parts: Parts, where: str, using: Engine | None = None) -> Shorts:
    """All elements of a unit as uint16 [n]."""
    stream = open_unit(parts, where)
    return decode_range(stream, 0, len(stream.sign_mantissa), where, using)


def _ranges(begin: int, end: int, n_blocks: int) -> list[tuple[int, int]]:
    """Tasks; the unit's last two blocks are never torn apart."""
    starts = list(range(begin, end, RANGE))
    if end == n_blocks and len(starts) > 1 and end - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], end], strict=True))


def _check_range(status: int, bit: int, is_last: bool, n_bytes: int, where: str) -> None:
    if status != FINE:
        block = bit // BLOCK_WINDOWS
        if status == BAD_GAP:
            _damaged(where, "gaps", f"disagrees with the codes before window {bit}, block {block}")
        if status == BAD_CODE:
            _damaged(where, "encoded_exponent", f"has no code at window {bit}, block {block}")
        _damaged(where, "output_positions", f"miscounts the codes of block {block}")
    if is_last and -(-bit // 8) != n_bytes:
        block = bit // BLOCK_BITS
        _damaged(
            where, "encoded_exponent", f"has {n_bytes} bytes, codes end at bit {bit}, block {block}"
        )


def _positions(found: Bytes, n: int, n_blocks: int, where: str) -> Longs:
    """int64 [blocks + 1]. The last block has no entry of its own if no code starts in it."""
    if len(found) not in (4 * n_blocks, 4 * (n_blocks + 1)):
        allowed = f"{n_blocks} blocks need {4 * (n_blocks + 1)}"
        _damaged(where, "output_positions", f"has {len(found)} bytes, {allowed}")
    positions = np.ascontiguousarray(found).view("<u4").astype(np.int64)
    if len(positions) == n_blocks:
        positions = np.append(positions, positions[-1])
    steps = np.diff(positions)
    fine = (steps > 0) & (steps <= BLOCK_BITS)
    fine[-1] |= n_blocks > 1 and steps[-1] == 0
    if not fine.all():
        block = int(np.flatnonzero(~fine)[0])
        _damaged(where, "output_positions", f"gives block {block} {steps[block]} elements")
    if positions[0] != 0 or positions[-1] != n:
        ends = f"runs from {positions[0]} to {positions[-1]}"
        _damaged(where, "output_positions", f"{ends}, 0 to {n} is needed")
    return positions


def _check_gaps(gaps: Bytes, n_bytes: int, n_blocks: int, where: str) -> None:
    if len(gaps) != n_blocks * GAP_BYTES:
        _damaged(where, "gaps", f"has {len(gaps)} bytes, {n_blocks} blocks need {GAP_BYTES} each")
    n_windows = -(-n_bytes // (WINDOW_BITS // 8))
    last = unpack_gaps(np.ascontiguousarray(gaps[-GAP_BYTES:]))
    if last[n_windows - (n_blocks - 1) * BLOCK_WINDOWS :].any():
        _damaged(where, "gaps", f"has entries behind window {n_windows - 1}, block {n_blocks - 1}")
    if gaps[0] >> 3:
        _damaged(where, "gaps", "says that block 0 does not start with a code")


def _check_split(split: Longs, n: int, where: str) -> None:
    bounds = np.concatenate([[0], split.astype(np.int64), [n]])
    if (np.diff(bounds) < 0).any() or (split < 0).any() or (split > n).any():
        _damaged(where, "split_positions", f"does not ascend within 0 … {n}")


def _damaged(where: str, name: str, found: str) -> NoReturn:
    raise CheckpointError(
        f"{where}.{name} {found}; the file is damaged: download or export it again"
    )
