"""What the kernels of `fle4` and `fle3` weights share: the layout, words of a tile, refusals.

The layout is the stored parts themselves (`quant/formats/fle.py` draws them), without a copy: these
weights are there to save memory. A program works on tiles of 64 x 64 and makes of each

    fle4   two halves of 32 columns, [64, 32] each: one byte of codes is a column of both, so that
           nothing changes lanes between reading and writing; escapes are put in afterwards
    fle3   [64, 8, 8]: eight columns for each byte of a plane; the escapes before a weight are counted
           along the rows of the tile, which says where its exponent is in the list

A word is the bits of bf16 in 32-bit lanes; shifted up by 16 it is the same number in fp32.
Deliberately not here: what is done with the words.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..quant.errors import NoKernelError
from ..quant.formats.fle import FleOptions
from ..quant.kernel import Problem, Reason
from ..quant.packed import PackedTensor
from ._triton import jit, off_gpu, tl

TILE = 64  # rows and columns

# Instructions of a thread for each weight: loads, the code, the word. A guess, not counted.
DECODE_INSTRUCTIONS = {4: 5.0, 3: 14.0}
_BITS = {"fle4": 4, "fle3": 3}

# ---- device code ----------------------------------------------------------------------------


@jit
def word(low, exponent):
    """Bits of bf16, int32, from sign and mantissa (int32, a byte) and exponent."""
    return ((low & 128) << 8) | (exponent << 7) | (low & 127)


@jit
def number(bits):
    """fp32 of a word."""
    return (bits << 16).to(tl.float32, bitcast=True)


@jit
def inside(code, base, width):
    """Exponent of a code that is no escape; of an escape, any number."""
    return tl.where(code > width, 0, base + code - 1)


@jit
def nibbles(codes, row, tile, columns, n):
    """int32 [64, 32]: codes of columns 0 … 31 in bits 3..0, of columns 32 … 63 in bits 7..4. row
    int64 [64]; rows from n on are escapes nowhere."""
    column = tile * 32 + tl.arange(0, 32)
    at = codes + row[:, None] * (columns // 2) + column[None, :]
    return tl.load(at, mask=(row < n)[:, None], other=17).to(tl.int32)


@jit
def half(sign, row, tile, part, columns, n):
    """int32 [64, 32]: signs and mantissas of columns 0 … 31 (part 0) or 32 … 63 (1) of a tile."""
    column = tile * 64 + part * 32 + tl.arange(0, 32)
    at = sign + row[:, None] * columns + column[None, :]
    return tl.load(at, mask=(row < n)[:, None], other=0).to(tl.int32)


@jit
def words_of_planes(sign, codes, exponents, row, tile, first, base, width, columns, n):
    """Words int32 [64, 8, 8] of a tile of fle3. first: of the tile's entries in `exponents`."""
    byte, bit = tl.arange(0, 8), tl.arange(0, 8)
    live = (row < n)[:, None]
    at = codes + row[:, None] * (columns // 8) + (tile * 8 + byte)[None, :]
    plane = n.to(tl.int64) * (columns // 8)
    p0 = tl.load(at, mask=live, other=255).to(tl.int32)[:, :, None]
    p1 = tl.load(at + plane, mask=live, other=0).to(tl.int32)[:, :, None]
    p2 = tl.load(at + 2 * plane, mask=live, other=0).to(tl.int32)[:, :, None]
    shift = bit[None, None, :]
    code = ((p0 >> shift) & 1) | (((p1 >> shift) & 1) << 1) | (((p2 >> shift) & 1) << 2)

    # Escapes before each weight: in the rows above, in the bytes before, in the byte.
    is_escape = (code == 0).to(tl.int32)
    of_byte = tl.sum(is_escape, 2)
    of_row = tl.sum(of_byte, 1)
    before = (tl.cumsum(of_row, 0) - of_row)[:, None] + tl.cumsum(of_byte, 1) - of_byte
    entry = first + before[:, :, None] + tl.cumsum(is_escape, 2) - is_escape
    listed = tl.load(exponents + entry, mask=code == 0, other=0).to(tl.int32)

    column = (tile * 64 + byte * 8)[:, None] + bit[None, :]
    place = sign + row[:, None, None] * columns + column[None, :, :]
    low = tl.load(place, mask=live[:, :, None], other=0).to(tl.int32)
    return word(low, tl.where(code == 0, listed, inside(code, base, width)))


# ---- layout ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlePlanes:
    """Stored parts of one matrix [n, k]: see `quant/formats/fle.py`. position is `offset` in fle3,
    which has none; the lists of a weight without escapes are `offset`, too, and never read."""

    window: torch.Tensor
    sign_mantissa: torch.Tensor
    codes: torch.Tensor
    offset: torch.Tensor
    position: torch.Tensor
    exponent: torch.Tensor
    n: int
    k: int
    bits: int

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The parts in the order in which kernels take them."""
        return [
            self.sign_mantissa, self.codes, self.window, self.offset, self.position, self.exponent
        ]  # fmt: skip


def prepare(packed: PackedTensor, dtype: torch.dtype) -> FlePlanes:
    """The layout of a weight [N, K] of one term, whatever the dtype of x: its parts, not copied."""
    term = packed.terms[0]
    if len(packed.terms) != 1 or term.format not in _BITS or len(packed.shape) != 2:
        told = " + ".join(term.format for term in packed.terms)
        raise NoKernelError(
            f"these kernels hold one term of fle4 or fle3 of a weight [N, K], got {told} "
            f"{list(packed.shape)}"
        )
    parts = {name: part.contiguous() for name, part in term.parts.items()}
    n, k = packed.shape
    empty = not parts["exponent"].numel()
    return FlePlanes(
        window=parts["window"],
        sign_mantissa=parts["sign_mantissa"],
        codes=parts["codes"],
        offset=parts["offset"],
        position=parts["offset"].view(torch.int16)
        if empty
        else parts.get("position", parts["offset"]),
        exponent=parts["window"] if empty else parts["exponent"],
        n=n,
        k=k,
        bits=_BITS[term.format],
    )


def bits_of(problem: Problem) -> int:
    """4 or 3: bits of a code."""
    return _BITS[problem.format]


def refusals(problem: Problem) -> Iterator[Reason]:
    """Reasons against other devices, dtypes of x, formats, and weights of several terms."""
    yield from off_gpu(problem)
    if problem.dtype != torch.bfloat16:
        yield Reason(
            "DTYPE",
            f"multiplies bfloat16, got {str(problem.dtype).removeprefix('torch.')}",
            "load the model with dtype=torch.bfloat16",
        )
    if problem.n_terms != 1:
        yield Reason("TERMS", f"holds one term, got {problem.n_terms}", "use reference")
    if problem.format not in _BITS or not isinstance(problem.options, FleOptions):
        yield Reason("FORMAT", f"reads fle4 and fle3, got {problem.format}", "use triton_expand")


def tiles_of(problem: Problem) -> tuple[int, int]:
    """Tiles along N and along K."""
    return -(-problem.n // TILE), -(-problem.k // TILE)


def packed_bytes(problem: Problem) -> float:
    """Of the planes and offsets, without the lists."""
    down, across = tiles_of(problem)
    return problem.n * across * TILE * (1 + bits_of(problem) / 8) + 4 * down * across


# ---- compilation ----------------------------------------------------------------------------

TYPES = {"sign": "*u8", "codes": "*u8", "window": "*u8", "offset": "*i32"}


def list_types(bits: int) -> dict[str, str]:
    """Types of all pointers to parts, in the order in which kernels take them."""
    return TYPES | {"position": "*i16" if bits == 4 else "*i32", "exponent": "*u8"}
