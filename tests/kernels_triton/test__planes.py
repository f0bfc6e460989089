"""Bit planes: golden words, identity over many shapes, and every code through both ways of decoding."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.kernels_triton import _planes, _triton
from fewbit.kernels_triton._triton import jit, tl
from fewbit.quant.formats.int_group import pack_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
interpreted = pytest.mark.skipif(
    not _triton.interpreted(), reason="PTX is evaluated in place of the interpreter's language"
)


def planes_of(codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    return _planes.planes_of_codes(pack_bits(codes.to(torch.uint8), bits), bits)


def codes_of(planes: tuple[torch.Tensor, ...], bits: int, n: int, k: int) -> torch.Tensor:
    """What the module's text says, column by column: bit of a word -> code."""
    column = torch.arange(k)
    span, q, u = column // 128, column // 32 % 4, column // 16 % 2
    v, t, h = column // 8 % 2, column // 2 % 4, column % 2
    word = {4: 4 * t + 2 * v + u, 2: 2 * t + v, 1: 2 * t + v}
    bit = {4: 16 * h + 4 * q, 2: 16 * h + 4 * q + 2 * u, 1: 8 * h + 2 * q + u}
    found, low = torch.zeros(n, k, dtype=torch.int64), 0
    for plane, width in zip(planes, _planes.WIDTHS[bits], strict=True):
        words = plane[span, :n, word[width]].T.long()
        found |= ((words >> bit[width]) & ((1 << width) - 1)) << low
        low += width
    return found


# ---- layout ---------------------------------------------------------------------------------


def test_golden_words_of_4_bits() -> None:
    """Codes k // 8 mod 16 of 128 columns; word 0 holds columns 97 65 33 1 96 64 32 0."""
    (plane,) = planes_of((torch.arange(128) // 8 % 16).view(1, -1), 4)
    assert (plane.dtype, tuple(plane.shape)) == (torch.int32, (1, 128, 16))
    words = [f"{word & 0xFFFFFFFF:08X}" for word in plane[0, 0].tolist()]
    assert words == ["C840C840", "EA62EA62", "D951D951", "FB73FB73"] * 4  # of t = 0, 1, 2, 3
    assert plane[0, 1:].eq(0).all()


def test_golden_words_of_2_bits() -> None:
    """Codes k // 16 mod 4: q, u = 0, 0 → 0; 0, 1 → 1; 1, 0 → 2; 1, 1 → 3; again for q = 2, 3."""
    (plane,) = planes_of((torch.arange(128) // 16 % 4).view(1, -1), 2)
    assert (plane.dtype, tuple(plane.shape)) == (torch.int32, (1, 128, 8))
    assert {word & 0xFFFFFFFF for word in plane[0, 0].tolist()} == {0xE4E4E4E4}


def test_golden_words_of_1_bit() -> None:
    """The third bit of codes 4·(k mod 2) + 1: odd columns are the high bytes."""
    low, high = planes_of((torch.arange(128) % 2 * 4 + 1).view(1, -1), 3)
    assert (high.dtype, tuple(high.shape)) == (torch.int16, (1, 128, 8))
    assert {word & 0xFFFF for word in high[0, 0].tolist()} == {0xFF00}
    assert {word & 0xFFFFFFFF for word in low[0, 0].tolist()} == {0x55555555}


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_code_is_cut_into_planes_lowest_bits_first(bits: int) -> None:
    code = 0b10110101 & ((1 << bits) - 1)
    planes = planes_of(torch.full((1, 128), code), bits)
    expected = {2: (1,), 3: (1, 1), 4: (5,), 5: (5, 1), 6: (5, 3), 7: (5, 3, 0), 8: (5, 11)}[bits]
    for plane, field, width in zip(planes, expected, _planes.WIDTHS[bits], strict=True):
        size = 8 * plane.element_size()
        repeated = sum(field << at for at in range(0, size, width))
        assert {word % (1 << size) for word in plane[0, 0].tolist()} == {repeated}


@settings(max_examples=200, deadline=None)
@given(
    bits=st.integers(2, 8), n=st.integers(1, 150), k=st.integers(1, 300), seed=st.integers(0, 99)
)
def test_codes_survive(bits: int, n: int, k: int, seed: int) -> None:
    """200 shapes, whatever N and K are multiples of."""
    columns = -(-k // 8) * 8
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, columns), generator=generator)
    planes = planes_of(codes, bits)
    rows = -(-n // 128) * 128
    assert all(plane.shape[:2] == (-(-columns // 128), rows) for plane in planes)
    assert all(plane.is_contiguous() for plane in planes)
    assert torch.equal(codes_of(planes, bits, n, columns), codes)
    assert all(plane[:, n:].eq(0).all() for plane in planes)


def test_parts_are_turned_and_padded() -> None:
    part = torch.arange(1, 7, dtype=torch.bfloat16).view(2, 3)
    turned = _planes.by_group(part, 5)
    assert (turned.dtype, tuple(turned.shape)) == (torch.bfloat16, (5, 128))
    assert turned.is_contiguous() and turned[:3, :2].tolist() == [[1, 4], [2, 5], [3, 6]]
    assert turned[3:].eq(0).all() and turned[:, 2:].eq(0).all()


def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 128, (67, 264), dtype=torch.uint8)
    whole = planes_of(codes, 7)
    monkeypatch.setattr(_planes, "_BLOCK_CODES", 5 * 384)
    assert all(map(torch.equal, planes_of(codes, 7), whole))


# ---- decoding -------------------------------------------------------------------------------


@jit
def decode(
    first, second, third, zero, out, rows,
    SIZE: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr, PTX: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """code − zero of one span of N rows, and of one zero a row, or of the fixed one."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    FIRST: tl.constexpr = 16 if BITS >= 4 else 8
    span = tl.program_id(0).to(tl.int64)
    a = tl.load(_planes.block_at(first, span, rows, 0, FIRST) + _planes.block(FIRST, N))
    b, c = a, a
    if BITS == 3 or BITS == 5:
        b = _planes.spread(
            tl.load(_planes.block_at(second, span, rows, 0, 8) + _planes.block(8, N))
        )
    elif BITS == 6 or BITS == 7:
        b = tl.load(_planes.block_at(second, span, rows, 0, 8) + _planes.block(8, N))
    elif BITS == 8:
        b = tl.load(_planes.block_at(second, span, rows, 0, 16) + _planes.block(16, N))
    if BITS == 7:
        c = _planes.spread(tl.load(_planes.block_at(third, span, rows, 0, 8) + _planes.block(8, N)))
    row, column = tl.arange(0, N), tl.arange(0, SIZE)
    for piece in tl.static_range(128 // SIZE):
        if FIXED:
            term, stay = _planes.fixed_terms(1 << (BITS - 1), BITS, DTYPE)
        else:
            term, stay = _planes.terms(tl.load(zero + row), BITS, DTYPE)
        values = _planes.values(a, b, c, term, stay, piece, SIZE, BITS, DTYPE, N, PTX)
        at = span * 128 + piece * SIZE + column
        tl.store(out + row[:, None] * 256 + at[None, :], values)


def decoded(
    bits: int, dtype: torch.dtype, size: int, fixed: bool, ptx: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the kernel makes of, what is) every code minus every zero: row z has zero z."""
    n = 1 << bits
    codes = (torch.arange(256) % n).expand(n, 256)
    planes = [plane.to(DEVICE) for plane in planes_of(codes, bits)]
    zeros = torch.arange(n, dtype=torch.int32, device=DEVICE)
    out = torch.empty(n, 256, dtype=dtype, device=DEVICE)
    second, third = planes[min(1, len(planes) - 1)], planes[-1]
    decode[(2,)](
        planes[0], second, third, zeros, out, planes[0].shape[1],
        SIZE=size, BITS=bits, N=n, PTX=ptx, FIXED=fixed,
    )  # fmt: skip
    shift = torch.full((n, 1), n // 2) if fixed else torch.arange(n).view(-1, 1)
    return out.cpu(), (codes - shift).to(dtype)


@needs_triton
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_and_zero_is_exact(bits: int, dtype: torch.dtype, fixed: bool) -> None:
    found, expected = decoded(bits, dtype, 128, fixed, ptx=not _triton.interpreted())
    assert torch.equal(found, expected)


@needs_triton
@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("bits", [3, 4])
def test_pieces_of_a_span(bits: int, size: int) -> None:
    found, expected = decoded(bits, torch.float16, size, False, ptx=not _triton.interpreted())
    assert torch.equal(found, expected)


# ---- PTX ------------------------------------------------------------------------------------


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Bit i of the table is the result for the bits a, b, c of i = 4a + 2b + c."""
    result = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            term = np.full_like(a, 0xFFFFFFFF)
            for operand, chosen in zip((a, b, c), (i >> 2 & 1, i >> 1 & 1, i & 1), strict=True):
                term &= operand if chosen else ~operand
            result |= term
    return result


def fused(to_double: Callable[..., Any], from_double: Callable[..., Any]) -> Callable[..., Any]:
    """a · b + c in both halves, rounded once."""

    def run(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        halves = []
        for shift in (0, 16):
            x, y, z = (to_double((o >> shift & 0xFFFF).astype(np.uint16)) for o in (a, b, c))
            halves.append(from_double(x * y + z).astype(np.uint32))
        return halves[0] | halves[1] << 16

    return run


def bf16_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


INSTRUCTIONS: dict[str, Callable[..., Any]] = {
    "lop3.b32": lop3,
    "fma.rn.f16x2": fused(
        lambda bits: bits.view(np.float16).astype(np.float64),
        lambda values: values.astype(np.float16).view(np.uint16),
    ),
    "fma.rn.bf16x2": fused(
        lambda bits: (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64), bf16_bits
    ),
}
seen: set[str] = set()


def evaluate(text: str, constraints: str, args: list[Any], **_: Any) -> Any:
    """One PTX instruction on 32-bit words, in place of `tl.inline_asm_elementwise`."""
    name, operands = re.fullmatch(r"(\S+) (.*);", text).groups()
    target, *sources = operands.split(", ")
    assert target == "$0" and constraints == "=r" + ",r" * len(args)
    seen.add(name)
    words = [np.asarray(data(arg)).astype(np.int64).astype(np.uint32) for arg in args]
    words = np.broadcast_arrays(*words)
    values = [words[int(s[1:]) - 1] if s[0] == "$" else int(s, 16) for s in sources]
    from triton.runtime.interpreter import TensorHandle

    result = INSTRUCTIONS[name](*values).astype(np.uint32).view(np.int32)
    handle = TensorHandle(result, tl.int32)
    return tl.tensor(handle, tl.block_type(tl.int32, list(result.shape)))


def data(arg: Any) -> Any:
    value = getattr(arg, "value", arg)  # a constexpr
    return value.handle.data if isinstance(value, tl.tensor) else value


@needs_triton
@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_ptx_says_the_same(bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of each instruction, evaluated on every code and every zero."""
    seen.clear()
    monkeypatch.setattr(tl, "inline_asm_elementwise", evaluate)
    for fixed in (True, False):
        found, expected = decoded(bits, dtype, 128, fixed, ptx=True)
        assert torch.equal(found, expected)
    half = "f16x2" if dtype == torch.float16 else "bf16x2"
    assert seen == {"lop3.b32", f"fma.rn.{half}"}
