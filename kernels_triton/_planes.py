"""Codes of 2 to 8 bits as bit planes that a dot operand is made of without a shuffle; host and device.

A code is cut into *planes* of 4, 2 and 1 bits, lowest bits first:

    bits     8      7        6      5      4    3      2
    planes   4 + 4  4 + 2 + 1  4 + 2  4 + 1  4    2 + 1  2

Columns come in *spans* of 128. Within a span, column k is

    k = 32·q + 16·u + 8·v + 2·t + h          q = 0..3 (quarter)   u, v, h = 0, 1   t = 0..3

A thread of a tensor-core instruction holds, of the rows it works on, the columns 2t, 2t+1, 2t+8, 2t+9
of every 16. So all columns of one t lie together, in order of v, then u:

    plane   a word is  words of a row and span   word          h = 1 in bits    h = 0 in bits
    4 bits  int32      16                        4t + 2v + u   16 + 4q ...      4q ...
    2 bits  int32       8                        2t + v        16 + 4q + 2u ..  4q + 2u ..
    1 bit   int16       8                        2t + v         8 + 2q + u       2q + u

    4 bits  bit 31..28 27..24 23..20 19..16 15..12 11..8 7..4 3..0          of word 4t + 2v + u
            q,h 3,1    2,1    1,1    0,1    3,0    2,0   1,0  0,0
            t = v = u = 0: columns 97 65 33 1 96 64 32 0

    2 bits  bit 31,30 29,28 27,26 25,24 23,22 21,20 19,18 17,16 | 15,14 ... 1,0  of word 2t + v
            q,u 3,1   3,0   2,1   2,0   1,1   1,0   0,1   0,0   | the same
            h   1     1     1     1     1     1     1     1     | 0

    1 bit   bit 15  14  13  12  11  10  9   8   | 7 ... 0                   of word 2t + v
            q,u 3,1 3,0 2,1 2,0 1,1 1,0 0,1 0,0 | the same
            h   1   1   1   1   1   1   1   1   | 0

One shift and one mask yield a *pair*: the same field of both halves of a register, columns k and k + 1,
where a packed 16-bit instruction and the dot operand want them. Words of 1 bit are spread first, to
w | w << 8. In memory a plane is [spans, rows, words]: a block of rows reads one contiguous piece.
Rows are padded to 128, columns to spans; what pads holds code 0 and scale 0.

A code c becomes a float by being the mantissa of one:

    fp16        0x6400 | c        = 1024 + c              − (1024 + zero)
    bf16        0x4300 | c        = 128 + c, c < 128      − (128 + zero)
    bf16, 8 bit c, subnormal      = c · 2^-133            · 2^127, · 2^6 − zero

Where the mantissa has room, a field stays where it is, which saves a shift:

    fp16, 4 bit 0x6400 | c << 4   = 1024 + 16c            · 1/16 − (64 + zero)     q odd
    fp16, 2 bit 0x6400 | c << 2   = 1024 + 4c             · 1/4 − (256 + zero)     u = 1
    bf16, 2 bit 0x4300 | c << 2   = 128 + 4c              · 1/4 − (32 + zero)      u = 1

each one fused multiply-add for a pair, and exact: c − zero has at most 9 bits and |c − zero| ≤ 255. The
two instructions that do the work are spelled in PTX, because compilers make two of the first and may
take pairs apart for the second. Triton's interpreter, which runs no PTX, gets the same steps in its
language (PTX = False).

Scales stay as stored, [groups + 1, rows]; zeros are int16 of the same shape: a load of one byte would
make Triton 3.6 choose another operand layout. The last group is there to be read ahead.
Deliberately not here: products, and what a scale does to a sum.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from ..quant.formats.int_group import unpack_bits
from ._triton import jit, tl

SPAN = 128  # columns
ROWS = 128  # rows are padded to a multiple
WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (4, 4)}
WORDS = {4: 16, 2: 8, 1: 8}  # of a row and span
WORD_DTYPES = {4: torch.int32, 2: torch.int32, 1: torch.int16}
ALIGNED = 16  # sizes of x and y in elements that launches promise to be multiples of this
_BLOCK_CODES = 1 << 21  # relaid at once: 8 MB of int32

# ---- device code: codes to floats -----------------------------------------------------------


@jit
def shifted(word, BY: tl.constexpr):
    """word >> BY, to the left if BY is negative."""
    if BY > 0:
        return word >> BY
    elif BY < 0:
        return word << -BY
    else:
        return word


@jit
def placed(word, base, MASK: tl.constexpr, PTX: tl.constexpr):
    """(word & MASK) | base, one instruction."""
    if PTX:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [word, MASK, base],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return (word & MASK) | base


@jit
def floats(pairs, DTYPE: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr):
    """[N, COLUMNS] of DTYPE: the low and the high halves of `pairs` in turn."""
    both = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    # Seen as floats last: Triton rewrites an operand that comes straight out of a reshape, for sm_100
    # into a shared memory layout that it then refuses.
    return tl.reshape(both, (N, COLUMNS)).to(DTYPE, bitcast=True)


@jit
def _widened(pairs, HALF: tl.constexpr, DTYPE: tl.constexpr):
    """fp32 of one half. Bits of bf16 are the upper ones of fp32; Triton's interpreter errs when it
    converts subnormal ones."""
    if tl.float16 == DTYPE:
        return (pairs >> (16 * HALF)).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    else:
        return (pairs >> (16 * HALF) << 16).to(tl.float32, bitcast=True)


@jit
def _plain_half(pairs, factor, term, HALF: tl.constexpr, DTYPE: tl.constexpr):
    product = _widened(pairs, HALF, DTYPE) * _widened(factor, HALF, DTYPE)
    total = (product + _widened(term, HALF, DTYPE)).to(DTYPE)
    return total.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@jit
def scaled(pairs, factor, term, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """pairs · factor + term in both halves, rounded once; all three are pairs in int32."""
    if PTX:
        if tl.float16 == DTYPE:
            return tl.inline_asm_elementwise(
                "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [pairs, factor, term],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [pairs, factor, term],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
    else:
        factor = tl.zeros_like(pairs) + factor
        term = tl.zeros_like(pairs) + term
        low = _plain_half(pairs, factor, term, 0, DTYPE)
        return low | (_plain_half(pairs, factor, term, 1, DTYPE) << 16)


@jit
def spread(word):
    """int32 of int16 words of the 1-bit plane, the bits of h = 1 sixteen above those of h = 0."""
    word = word.to(tl.int32) & 0xFFFF
    return word | (word << 8)


@jit
def fields(word, WIDTH: tl.constexpr, Q: tl.constexpr, AT: tl.constexpr, N: tl.constexpr):
    """[N, 16] in order of t, v, u: the field of quarter Q at bits AT and AT + 16, others beside it."""
    if WIDTH == 4:
        return shifted(word, 4 * Q - AT)
    elif WIDTH == 2:
        even, odd = shifted(word, 4 * Q - AT), shifted(word, 4 * Q + 2 - AT)
        return tl.reshape(tl.join(even, odd), (N, 16))
    else:
        even, odd = shifted(word, 2 * Q - AT), shifted(word, 2 * Q + 1 - AT)
        return tl.reshape(tl.join(even, odd), (N, 16))


@jit
def pairs_of_codes(
    first, second, third, base, Q: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """base | codes of quarter Q, int32 [N, 16]."""
    if BITS >= 4:
        pairs = placed(fields(first, 4, Q, 0, N), base, 0x000F000F, PTX)
    else:
        pairs = placed(fields(first, 2, Q, 0, N), base, 0x00030003, PTX)
    if BITS == 3:
        pairs = placed(fields(second, 1, Q, 2, N), pairs, 0x00040004, PTX)
    elif BITS == 5:
        pairs = placed(fields(second, 1, Q, 4, N), pairs, 0x00100010, PTX)
    elif BITS == 6 or BITS == 7:
        pairs = placed(fields(second, 2, Q, 4, N), pairs, 0x00300030, PTX)
    elif BITS == 8:
        pairs = placed(fields(second, 4, Q, 4, N), pairs, 0x00F000F0, PTX)
    if BITS == 7:
        pairs = placed(fields(third, 1, Q, 6, N), pairs, 0x00400040, PTX)
    return pairs


@jit
def terms(zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """What `pairs_of_values` adds for int32 zeros [N], as bits of negative numbers: for fields at bit
    0, and for those that stay where they are. Two columns of pairs, int32 [N, 1]."""
    if tl.bfloat16 == DTYPE and BITS == 8:
        value = (-zero).to(tl.float32).to(tl.bfloat16)
        term = value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        stay = term
    elif tl.bfloat16 == DTYPE:
        term, stay = 0xC300 + zero, 0xC200 + 4 * zero
    elif BITS == 2:
        term, stay = 0xE400 + zero, 0xDC00 + 4 * zero
    else:
        term, stay = 0xE400 + zero, 0xD400 + 16 * zero
    return (term | (term << 16))[:, None], (stay | (stay << 16))[:, None]


@jit
def fixed_terms(ZERO: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """`terms` of one zero for all rows, as constants."""
    BOTH: tl.constexpr = 0x10001
    WRAP: tl.constexpr = 1 << 32
    if tl.bfloat16 == DTYPE and BITS == 8:
        tl.static_assert(ZERO == 128)
        return 0xC300 * BOTH - WRAP, 0xC300 * BOTH - WRAP
    elif tl.bfloat16 == DTYPE:
        return (0xC300 + ZERO) * BOTH - WRAP, (0xC200 + 4 * ZERO) * BOTH - WRAP
    elif BITS == 2:
        return (0xE400 + ZERO) * BOTH - WRAP, (0xDC00 + 4 * ZERO) * BOTH - WRAP
    else:
        return (0xE400 + ZERO) * BOTH - WRAP, (0xD400 + 16 * ZERO) * BOTH - WRAP


@jit
def pairs_of_values(
    first, second, third, term, stay, Q: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
    N: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """code − zero of quarter Q as pairs of DTYPE, int32 [N, 16] in order of t, v, u."""
    BASE: tl.constexpr = 0x64006400 if tl.float16 == DTYPE else 0x43004300
    ONE: tl.constexpr = 0x3C003C00 if tl.float16 == DTYPE else 0x3F803F80
    if tl.bfloat16 == DTYPE and BITS == 8:
        pairs = pairs_of_codes(first, second, third, 0, Q, BITS, N, PTX)
        pairs = scaled(pairs, 0x7F007F00, 0, DTYPE, PTX)  # 2^127
        return scaled(pairs, 0x42804280, term, DTYPE, PTX)  # 2^6
    elif BITS == 2:
        FOURTH: tl.constexpr = 0x34003400 if tl.float16 == DTYPE else 0x3E803E80
        word = shifted(first, 4 * Q)
        even = scaled(placed(word, BASE, 0x00030003, PTX), ONE, term, DTYPE, PTX)
        uneven = scaled(placed(word, BASE, 0x000C000C, PTX), FOURTH, stay, DTYPE, PTX)
        return tl.reshape(tl.join(even, uneven), (N, 16))
    elif tl.float16 == DTYPE and BITS == 4 and Q % 2 == 1:
        pairs = placed(shifted(first, 4 * Q - 4), BASE, 0x00F000F0, PTX)
        return scaled(pairs, 0x2C002C00, stay, DTYPE, PTX)  # 1/16
    else:
        pairs = pairs_of_codes(first, second, third, BASE, Q, BITS, N, PTX)
        return scaled(pairs, ONE, term, DTYPE, PTX)


@jit
def in_order(pairs, QUARTERS: tl.constexpr, DTYPE: tl.constexpr, N: tl.constexpr):
    """[N, 32 · QUARTERS] of DTYPE in order of columns, from pairs [N, 16, QUARTERS]."""
    split = tl.reshape(pairs, (N, 4, 2, 2, QUARTERS))  # t, v, u, q
    pairs = tl.reshape(tl.permute(split, (0, 4, 3, 2, 1)), (N, 16 * QUARTERS))
    return floats(pairs, DTYPE, N, 32 * QUARTERS)


@jit
def values(
    first, second, third, term, stay, PIECE: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr,
    DTYPE: tl.constexpr, N: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """code − zero of columns SIZE · PIECE ... of a span, [N, SIZE] of DTYPE; SIZE 16, 32, 64 or 128.

    first, second, third: words of the planes [N, words], those of 1 bit spread; unused ones may be
    anything. term, stay: of `terms` or `fixed_terms`.
    """
    Q: tl.constexpr = SIZE * PIECE // 32
    a = pairs_of_values(first, second, third, term, stay, Q, BITS, DTYPE, N, PTX)
    if SIZE == 16:
        even, uneven = tl.split(tl.reshape(a, (N, 8, 2)))  # u = 0, 1
        a = even if PIECE % 2 == 0 else uneven
        a = tl.reshape(tl.permute(tl.reshape(a, (N, 4, 2)), (0, 2, 1)), (N, 8))
        return floats(a, DTYPE, N, 16)
    elif SIZE == 32:
        return in_order(a, 1, DTYPE, N)
    elif SIZE == 64:
        b = pairs_of_values(first, second, third, term, stay, Q + 1, BITS, DTYPE, N, PTX)
        return in_order(tl.join(a, b), 2, DTYPE, N)
    else:
        b = pairs_of_values(first, second, third, term, stay, 1, BITS, DTYPE, N, PTX)
        c = pairs_of_values(first, second, third, term, stay, 2, BITS, DTYPE, N, PTX)
        d = pairs_of_values(first, second, third, term, stay, 3, BITS, DTYPE, N, PTX)
        return in_order(tl.join(tl.join(a, c), tl.join(b, d)), 4, DTYPE, N)


@jit
def block_at(plane, span, rows, row, WORDS: tl.constexpr):
    """Pointer to the words of rows `row` ... in a span (int64) of a plane; they follow each other."""
    return plane + (span * rows + row) * WORDS


@jit
def block(WORDS: tl.constexpr, N: tl.constexpr):
    """Where the words of N rows lie from `block_at` on: [N, WORDS]."""
    return tl.arange(0, N)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]


# ---- layout ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Planes:
    """A weight [n, k] relaid; the module's text draws it.

    planes: [spans, rows, words] each. scale: as stored, [groups + 1, rows]; for group "row" [1, rows].
    zero: of the same shape; int16, or offsets in fp32, or None for symmetric codes. group: columns, 0
    for the whole row.
    """

    planes: tuple[torch.Tensor, ...]
    scale: torch.Tensor
    zero: torch.Tensor | None
    n: int
    k: int
    bits: int
    group: int


def by_group(part: torch.Tensor, n_groups: int) -> torch.Tensor:
    """[N, G] as [n_groups, rows], padded with zeros."""
    rows = -(-part.shape[0] // ROWS) * ROWS
    padding = (0, n_groups - part.shape[1], 0, rows - part.shape[0])
    return functional.pad(part, padding).T.contiguous()


def planes_of_codes(stream: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """Planes [spans, rows, words] of a stored bit stream [N, bytes], a block of rows at a time."""
    n, n_codes = stream.shape[0], stream.shape[1] * 8 // bits
    spans, rows = -(-n_codes // SPAN), -(-n // ROWS) * ROWS
    planes = tuple(
        torch.zeros(spans, rows, WORDS[width], dtype=WORD_DTYPES[width], device=stream.device)
        for width in WIDTHS[bits]
    )
    step = max(1, _BLOCK_CODES // (spans * SPAN))
    for start in range(0, n, step):
        codes = unpack_bits(stream[start : start + step], bits)
        codes = functional.pad(codes, (0, spans * SPAN - n_codes))
        low = 0
        for plane, width in zip(planes, WIDTHS[bits], strict=True):
            field = (codes >> low) & ((1 << width) - 1)
            plane[:, start : start + len(codes)] = _words(field, width).transpose(0, 1)
            low += width
    return planes


def _words(field: torch.Tensor, width: int) -> torch.Tensor:
    """Words [N, spans, words] of the bits uint8 [N, spans · 128] of one plane."""
    # [N, spans, q, u, v, t, h] -> [N, spans, t, v, u, q, h]
    axes = field.unflatten(1, (-1, 4, 2, 2, 4, 2)).permute(0, 1, 5, 4, 3, 2, 6).int()
    index = torch.arange(4, dtype=torch.int32, device=field.device)
    q, u, h = index.view(4, 1), index[:2].view(2, 1, 1), index[:2]
    at = {4: 4 * q + 16 * h, 2: 4 * q + 2 * u + 16 * h, 1: 2 * q + u + 8 * h}[width]
    words = (axes << at).flatten(-at.dim()).sum(-1)
    return words.to(WORD_DTYPES[width]).flatten(2)
