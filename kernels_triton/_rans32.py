"""Device code of `decode_rans32.py`: a stream is a warp, its lanes meet in a `redux`.

One program decodes one stream (a plane of a chunk of 16,384 elements) with 32 threads. Step t gives
elements 32·t … 32·t + 31, one a lane, from states x [32] and words of 16 bits that all lanes share:

    entry  = table[x & 4095]              symbol | (slot − first slot) << 8 | frequency << 20
    x      = frequency · (x >> 12) + (slot − first slot)
    need   = x < 65536                    ballot = Σ need << lane
    word   = words[p + popcount(ballot below this lane)]
    x      = need ? x << 16 | word : x    p += popcount(ballot)

and is done when every x >> 16 is 1 and p is the number of words. Some 50 instructions a step, on sm_90;
no shared memory, no barriers. The table (16 KiB) is read through the L1 cache. The symbol meets the
other planes of its element, if they are raw, in registers:

    BF16   s << 15 | e << 7 | m          raw plane: s << 7 | m
    HALF   e << 8 | low                  FP32   the upper 16 bits as BF16, then two bytes
    BYTE   e                             WORD, LONG   bytes from the most significant on

`merge_chunk` does that alone, for planes that are all decoded already. Element i of chunk c lies at
starts[c] + (i / piece) · stride + i mod piece. Offsets are 64-bit.

Lane l ends with x & 65535, two bytes that it carries of the first raw plane: those of elements l and
l + 32, which it has written in its first two steps. Until then these have any byte: that plane is read
as if it were whole, which is inside of `raw`, since 64 bytes lie in front of it. At the end each lane
reads its two elements again and puts the bytes into them, so that a step costs nothing more.

    raw     |  64 bytes  |  chunk 0: bytes 64 .. of its first plane, its other planes  |  chunk 1 ..
            ▲ byte 0 of chunk 0                                           ▲ byte 0 of chunk 1

Where the symbol meets no raw plane, `raw` is the first raw plane in the workspace and gets these bytes.

Whatever a stream holds, reads stay inside of it and writes inside of the chunk's own elements: an
index that runs backwards or beyond the words counts as an empty stream, words are read below its end.
Not yet run on a GPU. Deliberately not here: launches, and what makes the arguments fit each other.
"""

import torch

from ..quant.codecs.chunks import CARRIED, CHUNK
from ..quant.codecs.planes import Kind
from ._compile import Variant, pointer
from ._triton import jit, tl

BLOCK = 1024  # elements that a program of `merge_chunk` makes
MAX_REGISTERS = 64  # of a thread: as many warps as a multiprocessor takes blocks, 32
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # elements, by bytes
PAIRED = (Kind.BF16, Kind.FP32)  # whose first two planes share 16 bits
BAD_INDEX, BAD_END, BAD_MODE = 1, 2, 3  # flags of a stream; 0 is none
_CHUNK = tl.constexpr(CHUNK)
_CARRIED = tl.constexpr(CARRIED)
_OFFSET = tl.constexpr((1 << 62) - 1)


# ---- device code ----------------------------------------------------------------------------


@jit
def ones(bits, PTX: tl.constexpr):
    """How many bits of uint32 are set."""
    if PTX:
        count = tl.inline_asm_elementwise(
            "popc.b32 $0, $1;", "=r,r", [bits], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        pairs = bits - ((bits >> 1) & 0x55555555)
        fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
        eights = (fours + (fours >> 4)) & 0x0F0F0F0F
        count = ((eights * 0x01010101) >> 24).to(tl.int32)
    return count


@jit
def merged(value, raw, n, live, PLANES: tl.constexpr, PAIR: tl.constexpr):
    """Elements of which `value` (uint32) is the first plane. raw: where their second plane lies; the
    next ones follow, n bytes apart. PAIR: the first two planes are exponent, and sign and mantissa."""
    if PLANES == 8:
        value = value.to(tl.uint64)
    if PAIR:
        rest = tl.load(raw, mask=live, other=0).to(tl.uint32)
        value = ((rest & 128) << 8) | (value << 7) | (rest & 127)
    FIRST: tl.constexpr = 1 if PAIR else 0
    for plane in tl.static_range(FIRST, PLANES - 1):
        byte = tl.load(raw + plane * n, mask=live, other=0)
        value = (value << 8) | byte.to(value.dtype)
    return value


@jit
def amended(element, byte, PLANES: tl.constexpr, PAIR: tl.constexpr):
    """`element` (uint32 or uint64) with `byte` (uint32) as its second plane."""
    SHIFT: tl.constexpr = 8 * (PLANES - 2)
    mask = tl.full((1,), 0x807F if PAIR else 0xFF, element.dtype) << SHIFT
    if PAIR:
        byte = ((byte & 128) << 8) | (byte & 127)
    return (element ^ (element & mask)) | (byte.to(element.dtype) << SHIFT)


@jit(do_not_specialize=("n", "n_bytes", "stride", "coded", "plane", "carries"))
def decode_stream(
    words, index, state, table, raw, starts, out, flags,
    n, n_bytes, stride, coded, plane, carries,
    PLANES: tl.constexpr, PAIR: tl.constexpr, PIECE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Plane number `plane` of `coded` ones of a chunk. words: int16, n_bytes of them in bytes.
    carries: 1 if states of chunks of 64 elements and more carry bytes of a raw plane, else 0."""
    chunk = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 32)
    n, stride = n.to(tl.int64), stride.to(tl.int64)  # launches make small numbers 32-bit
    stream = chunk * coded + plane
    entry = tl.load(index + stream)
    mode, begin = (entry >> 62) & 3, entry & _OFFSET
    after = tl.load(index + stream + 1)
    end = after & _OFFSET
    closed = (after == end) | (stream + 1 < tl.num_programs(0).to(tl.int64) * coded)
    sound = (begin <= end) & (end <= n_bytes) & ((begin | end) % 2 == 0) & closed
    begin = tl.where(sound, begin, 0)
    span = tl.where(sound, tl.minimum(end - begin, 4 * _CHUNK), 0).to(tl.int32)
    size = tl.minimum(n - chunk * _CHUNK, _CHUNK).to(tl.int32)
    pieces = (size + PIECE - 1) // PIECE
    holds = (carries != 0) & (size >= _CARRIED)
    if PLANES > 1:
        raw += chunk * ((PLANES - 1) * _CHUNK - _CARRIED) + tl.where(holds, 0, _CARRIED) + lane
    else:
        raw += chunk * _CHUNK + lane
    out += tl.load(starts + chunk) + lane
    x = tl.load(state + stream * 32 + lane).to(tl.uint32, bitcast=True)
    source = words + begin // 2
    flag = 0
    if mode == 0:
        table += plane * 4096
        lower = (tl.full((32,), 1, tl.uint32) << lane.to(tl.uint32)) - 1
        p = 0
        for piece in range(pieces):
            left = tl.minimum(size - piece * PIECE, PIECE)
            row, rest = out + piece * stride, raw + piece * PIECE
            for step in range((left + 31) // 32):
                slot = tl.load(table + (x & 4095)).to(tl.uint32, bitcast=True)
                x = (slot >> 20) * (x >> 12) + ((slot >> 8) & 4095)
                need = x < 65536
                ballot = tl.sum(need.to(tl.uint32) << lane.to(tl.uint32), 0)
                at = p + ones(ballot & lower, PTX)
                word = tl.load(source + at, mask=need & (at < span // 2), other=0)
                x = tl.where(need, (x << 16) | (word.to(tl.uint32) & 65535), x)
                p += ones(ballot, PTX)
                live = step * 32 + lane < left
                value = merged(slot & 255, rest + step * 32, size, live, PLANES, PAIR)
                tl.store(row + step * 32, value.to(out.dtype.element_ty), mask=live)
        astray = tl.max(((x >> 16) != 1).to(tl.int32), 0)
        flag = tl.where((astray != 0) | (p != span // 2), 2, 0)
    else:
        # Raw symbols are the stream's bytes; a constant one is the upper half of every state.
        is_raw = mode == 2
        constant = tl.max(x >> 16, 0)
        for step in range((size + 31) // 32):
            at = step * 32 + lane
            both = tl.load(source + at // 2, mask=is_raw & (at < span), other=0).to(tl.uint32)
            byte = (both >> ((at & 1) * 8).to(tl.uint32)) & 255
            symbol = tl.where(is_raw, byte, constant & 255)
            value = merged(symbol, raw + step * 32, size, at < size, PLANES, PAIR)
            target = out + step * 32 // PIECE * stride + step * 32 % PIECE
            tl.store(target, value.to(out.dtype.element_ty), mask=at < size)
        odd = size % 2
        pad = tl.load(source + size // 2, mask=is_raw & (odd == 1) & (size < span), other=0)
        wanted = tl.where(is_raw, size + odd, 0)
        others = tl.max(((x >> 16) != constant).to(tl.int32), 0) != 0
        largest = tl.where(is_raw, 0, 255).to(tl.uint32)
        wrong = (span != wanted) | (mode == 3) | others | (constant > largest)
        flag = tl.where(wrong | (((pad >> 8) & 255) != 0), 3, 0)
    half = x & 65535
    if holds:
        for turn in tl.static_range(2):
            byte = (half >> (8 * turn)) & 255
            if PLANES > 1:
                target = out + turn * 32 // PIECE * stride + turn * 32 % PIECE
                element = tl.load(target).to(tl.uint64 if PLANES == 8 else tl.uint32)
                element = amended(element, byte, PLANES, PAIR)
                tl.store(target, element.to(out.dtype.element_ty))
            else:
                tl.store(raw + turn * 32, byte.to(tl.uint8))
    elif tl.max(half, 0) != 0:
        flag = tl.where(mode == 0, 2, 3)
    tl.store(flags + stream, tl.where(sound, flag, 1))


@jit(do_not_specialize=("n", "stride"))
def merge_chunk(
    planes, starts, out, n, stride,
    PLANES: tl.constexpr, PAIR: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elements of planes [PLANES, n], a block of a chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = n.to(tl.int64)
    live = at < n - chunk * _CHUNK
    source = planes + chunk * _CHUNK + at
    value = tl.load(source, mask=live, other=0).to(tl.uint32)
    value = merged(value, source + n, n, live, PLANES, PAIR)
    target = out + tl.load(starts + chunk) + (at // PIECE).to(tl.int64) * stride + at % PIECE
    tl.store(target, value.to(out.dtype.element_ty), mask=live)


# ---- compilation ----------------------------------------------------------------------------


def variants(kind: Kind, fused: bool, piece: int) -> tuple[Variant, ...]:
    """The kernel of streams as it is launched, and the one that merges where it is."""
    width = kind.n_planes
    element = pointer(INTEGERS[width])
    streams = {"words": "*i16", "index": "*i64", "state": "*i32", "table": "*i32", "raw": "*u8"}
    streams |= {"starts": "*i64", "out": element if fused else "*i8", "flags": "*i32"}
    sizes = {"n": "i64", "n_bytes": "i64", "stride": "i64", "coded": "i32", "plane": "i32"}
    sizes["carries"] = "i32"
    how = {"PLANES": width, "PAIR": kind in PAIRED, "PIECE": piece}
    alone = how if fused else {"PLANES": 1, "PAIR": False, "PIECE": CHUNK}
    first = Variant(
        decode_stream, streams | sizes, alone | {"PTX": True}, (), 1, 1, max_registers=MAX_REGISTERS
    )
    types = {"planes": "*u8", "starts": "*i64", "out": element, "n": "i64", "stride": "i64"}
    second = Variant(merge_chunk, types, how | {"BLOCK": BLOCK}, (), 4, 1)
    return (first,) if fused else (first, second)
