"""4-bit weights over int8 times 8-bit inputs: int8 weights are made in registers, four at a time.

Layout, made once from the stored parts. K is padded to Kp, whole multiples of 256, with codes 0. H is
the group, and 128 for "row". Columns go by spans of 2H; the two halves of a span share bytes:

    words   uint8 [Kp/2H, N, H]    byte j of (span s, row n):  bit 7..4  code of column 2H·s + H + j
                                                               bit 3..0  code of column 2H·s + j
    steps   int32 [Kp/2H, N]       bit 29..21  256 + o of columns H … 2H − 1    bit 20..16  their s2
                                   bit 13..5   256 + o of columns 0 … H − 1     bit 4..0    their s2

where o is the offset, or −z · s2 in dialect "zero": one kernel for both. So a tile [BN, bytes] holds
two tiles of weights that are contiguous in K, each under one (s2, o) a row, and no value moves between
threads. A register holds four bytes of a row; `quant/byte_lanes.py` has the proof that lanes do not
disturb each other:

    A = (128 + o) · 0x01010101 mod 2^32             once for a row of a tile
    low   ((w      & 0x0F0F0F0F) · s2 + A) ^ 0x80808080        3 instructions for 4 weights
    high  ((w >> 4 & 0x0F0F0F0F) · s2 + A) ^ 0x80808080        4

Group "row" has no s2. Codes go to the high halves of bytes, 16 · (code − 8) as int8, and the sums are
divided by 16 afterwards, exactly:

    low   (w << 4 & 0xF0F0F0F0) ^ 0x80808080                   2
    high  (w      & 0xF0F0F0F0) ^ 0x80808080                   1

    "offset"   w = s1 · (code − 8) + (o + 8 · s1)              a row offset, as in `integer_form`
    "zero"     w = s1 · (code − z)                             sums + (8 − z) · Σ_k Qx, in int32

The instructions are PTX: Triton splits bytes into registers of their own otherwise. Its interpreter
runs no PTX and takes `_plain`. Packing four bytes relies on a thread holding four neighbours
in K, which int8 operands of an mma do (kWidth = 4).

On capability 9.0 W is the first operand of IGMMA in registers; elsewhere of IMMA (Triton 3.6). The end
of the product, splits and the order of tiles are in `_integer_gemm.py`. One kernel serves every M.
Deliberately not here: bias, unsigned products (`tl.dot` has no u8 · s8). Not yet run on a GPU.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..quant.activation import RoundedRows
from ..quant.formats.int8_token import ACTIVATION
from ..quant.formats.int_group import unpack_bits
from ..quant.formats.int_two_level import FORMAT, IntTwoLevelOptions
from ..quant.kernel import Compiled, Config, Kernel, Problem, Reason
from ..quant.packed import PackedTensor
from . import _integer_gemm, _triton
from ._compile import source_hash
from ._integer_gemm import (
    Ends,
    Operand,
    Tile,
    codes_of,
    compile_product,
    configs_of,
    end,
    estimate,
    flags_of,
    keep,
    padded,
    place,
    refuse_shared,
    run_product,
    totals_of,
)
from ._triton import jit, tl
from .quantize_rows import quantize

# ---- device code ----------------------------------------------------------------------------

# $0: four int8 weights. $1: four bytes. Then s2 and A, four times each, once for a weight: all equal.
LOW_PTX = (
    "{ .reg .b32 t; and.b32 t, $1, 0x0F0F0F0F; mad.lo.u32 t, t, $2, $6; "
    "xor.b32 $0, t, 0x80808080; }"
)
HIGH_PTX = (
    "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 t, t, 0x0F0F0F0F; mad.lo.u32 t, t, $2, $6; "
    "xor.b32 $0, t, 0x80808080; }"
)
ROW_LOW_PTX = (
    "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 t, t, 0xF0F0F0F0; xor.b32 $0, t, 0x80808080; }"
)
ROW_HIGH_PTX = "{ .reg .b32 t; and.b32 t, $1, 0xF0F0F0F0; xor.b32 $0, t, 0x80808080; }"
_LOW, _HIGH = tl.constexpr(LOW_PTX), tl.constexpr(HIGH_PTX)
_ROW_LOW, _ROW_HIGH = tl.constexpr(ROW_LOW_PTX), tl.constexpr(ROW_HIGH_PTX)
_ROW_REGISTERS = tl.constexpr("=r,r")
_REGISTERS = tl.constexpr("=r,r,r,r,r,r,r,r,r,r")


@jit
def scaled(words, half, HIGH: tl.constexpr, PTX: tl.constexpr):
    """int8 weights of one half of bytes [BN, B]; half [BN]: its 14 bits of `steps`."""
    step, shift = half & 31, (half >> 5) & 511
    if PTX:
        # (shift − 128) · 0x01010101, as a product and a constant
        addend = shift * 0x01010101 + 0x7F7F7F80
        s = tl.broadcast_to(step[:, None], words.shape)
        a = tl.broadcast_to(addend[:, None], words.shape)
        asm: tl.constexpr = _HIGH if HIGH else _LOW
        weights = tl.inline_asm_elementwise(
            asm, _REGISTERS, [words, s, a], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        codes = (words >> 4 if HIGH else words & 15).to(tl.int32)
        weights = (codes * step[:, None] + (shift - 256)[:, None]).to(tl.int8)
    return weights


@jit
def high_codes(words, HIGH: tl.constexpr, PTX: tl.constexpr):
    """16 · (code − 8) as int8 of one half of bytes."""
    if PTX:
        asm: tl.constexpr = _ROW_HIGH if HIGH else _ROW_LOW
        weights = tl.inline_asm_elementwise(
            asm, _ROW_REGISTERS, [words], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        codes = (words >> 4 if HIGH else words & 15).to(tl.int32)
        weights = (16 * codes - 128).to(tl.int8)
    return weights


@jit(do_not_specialize=("m", "k_blocks", "splits"))
def two_level_product(
    x, w, steps, scale, offset, zero, row_scale, totals, y, partial, m, n, k_blocks, splits,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    OFFSET: tl.constexpr, ZERO: tl.constexpr, HIGH: tl.constexpr,
    H: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One tile of y, or of the sums of one split. k_blocks: of 256 columns. HIGH: group "row"."""
    # Bytes of a row in one tile, tiles in one span, tiles in one step of the loop
    BYTES: tl.constexpr = H if H < BK // 2 else BK // 2
    PARTS: tl.constexpr = H // BYTES
    TILES: tl.constexpr = BK // (2 * BYTES)
    # Which tile, which share of K
    pn, pm = place(tl.program_id(0), tl.cdiv(n, BN), tl.cdiv(m, BM))
    n0, m0, part = pn * BN, pm * BM, tl.program_id(1)
    k = k_blocks * 256
    n_steps = k // BK
    share = tl.cdiv(n_steps, splits)
    first = part * share
    # Sums
    byte = tl.arange(0, BYTES)
    row = tl.minimum(n0 + tl.arange(0, BN), n - 1)
    token = tl.minimum(m0 + tl.arange(0, BM), m - 1)
    w_at = row[:, None] * H + byte[None, :]
    x_tile, x_at = x + m0.to(tl.int64) * k, (token - m0)[None, :] * k + byte[:, None]
    sums = tl.zeros([BN, BM], tl.int32)
    for step in range(first, tl.minimum(first + share, n_steps)):
        for tile in tl.static_range(TILES):
            span = (step * TILES + tile) // PARTS
            inside = (step * TILES + tile) % PARTS * BYTES
            x_span = x_tile + (span * (2 * H) + inside)
            words = tl.load(w + (tl.cast(span, tl.int64) * n * H + inside) + w_at)
            x_low, x_high = tl.load(x_span + x_at), tl.load(x_span + H + x_at)
            if HIGH:
                low, high = high_codes(words, False, PTX), high_codes(words, True, PTX)
            else:
                both = tl.load(steps + span * n + row)
                low, high = scaled(words, both, False, PTX), scaled(words, both >> 16, True, PTX)
            sums = tl.dot(low, x_low, sums, out_dtype=tl.int32)
            sums = tl.dot(high, x_high, sums, out_dtype=tl.int32)
    # End
    if splits == 1:
        end(
            sums, m0, n0, m, n, scale, offset, zero, row_scale, totals, y,
            BM, BN, OFFSET, ZERO, HIGH,
        )  # fmt: skip
    else:
        keep(sums, m0, n0, m, n, part, partial, BM, BN)


# ---- what may be asked ----------------------------------------------------------------------

# BM, BN, BK, warps, stages. All compile without a spilled register for 8.0, 8.9, 9.0, 10.0, 12.0.
_TILES: tuple[Tile, ...] = (
    *((16, 32, bk, 2, s) for bk in (128, 256) for s in (4, 6)),
    *((16, bn, bk, 4, s) for bn in (64, 128) for bk in (128, 256) for s in (3, 4, 5)),
    *((32, bn, bk, 4, s) for bn in (64, 128) for bk in (128, 256) for s in (3, 4)),
    *((64, bn, bk, 4, s) for bn in (64, 128) for bk in (128, 256) for s in (3, 4)),
    *((64, 128, bk, 8, s) for bk in (128, 256) for s in (3, 4)),
    *((128, 64, 128, 4, s) for s in (3, 4)),
    *((128, 128, bk, 8, s) for bk in (128, 256) for s in (3, 4)),
)
# These spill but for capability 9.0.
_TILES_9_0: tuple[Tile, ...] = (
    *((256, 128, 128, 8, s) for s in (3, 4)),
    *((128, 256, 128, 8, s) for s in (3, 4)),
)


def _refuse(problem: Problem) -> tuple[Reason, ...]:
    reasons = list(refuse_shared(problem))
    if problem.format != FORMAT.name:
        reasons.append(
            Reason("FORMAT", f"multiplies {FORMAT.name}, got {problem.format}", "use triton_int8")
        )
    return tuple(reasons)


def _operand(options: IntTwoLevelOptions) -> Operand:
    """Bytes with steps, and instructions as counted in SASS, with those that unpack steps."""
    if options.group == "row":
        return Operand(0.5, 0.9)
    group = int(options.group)
    return Operand(0.5 + 2 / group, 1.3 + 16 / group)


def _configs(problem: Problem) -> tuple[Config, ...]:
    tiles = _TILES
    if problem.machine and problem.machine.cc == (9, 0):
        tiles += _TILES_9_0
    return configs_of(problem, tiles, _operand(problem.options))


def _seconds(problem: Problem, config: Config, compiled: Compiled | None = None) -> float:
    return estimate(problem, config, _operand(problem.options), compiled)


# ---- layout ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TwoLevelWeight:
    """words uint8 [spans, N, H]; steps int32 [spans, N] (empty for group "row"); scale fp32 [N];
    offset fp32 [N], zero int32 [N], or None. k: before padding."""

    words: torch.Tensor
    steps: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    zero: torch.Tensor | None
    k: int


def half_of(options: IntTwoLevelOptions) -> int:
    """H: columns of one half of a span."""
    return 128 if options.group == "row" else int(options.group)


def _prepare(packed: PackedTensor, dtype: torch.dtype) -> TwoLevelWeight:
    term, k = packed.terms[0], packed.shape[1]
    options, parts, half = term.options, term.parts, half_of(term.options)
    scale = parts["scale_row"].float().flatten().contiguous()
    words = _words(unpack_bits(parts["codes"], 4), half, padded(k))
    if options.group != "row":
        return TwoLevelWeight(words, _steps(parts, options, words.shape[0]), scale, None, None, k)
    shift, none = parts[options.shift_part].flatten(), scale.new_empty(0, dtype=torch.int32)
    if options.dialect == "zero":
        return TwoLevelWeight(words, none, scale, None, 8 - shift.int(), k)
    return TwoLevelWeight(words, none, scale, shift.float() + 8 * scale, None, k)


def _words(codes: torch.Tensor, half: int, width: int) -> torch.Tensor:
    """Bytes [spans, N, half] of codes [N, any K up to width]."""
    full = torch.nn.functional.pad(codes, (0, width - codes.shape[1]))
    halves = full.view(full.shape[0], -1, 2, half)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).transpose(0, 1).contiguous()


def _steps(
    parts: Mapping[str, torch.Tensor], options: IntTwoLevelOptions, spans: int
) -> torch.Tensor:
    """s2 and offsets of both halves, int32 [spans, N]; padding has s2 = 1, o = 0."""
    step, shift = parts["scale_group"].int(), parts[options.shift_part].int()
    offset = -shift * step if options.dialect == "zero" else shift
    extra = (0, 2 * spans - step.shape[1])
    step = torch.nn.functional.pad(step, extra, value=1)
    offset = torch.nn.functional.pad(offset, extra)
    halves = (step | (256 + offset) << 5).view(step.shape[0], spans, 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 16).T.contiguous()


# ---- launch ---------------------------------------------------------------------------------


def multiply(
    rows: RoundedRows, layout: TwoLevelWeight, dtype: torch.dtype, config: Config
) -> torch.Tensor:
    """y [M, N] in `dtype` (fp16 or bf16) of rounded rows [M, K], or [M, padded K] with zeros."""
    y: torch.Tensor = torch.ops.fewbit.int_two_level_gemm(
        codes_of(rows, layout.k), rows.scale, totals_of(rows), layout.words, layout.steps,
        layout.scale, layout.offset, layout.zero, dtype, [value for _, value in config],
    )  # fmt: skip
    return y


def _launch(x: torch.Tensor, layout: TwoLevelWeight, config: Config) -> torch.Tensor:
    return multiply(quantize(x, width=padded(layout.k)), layout, x.dtype, config)


def _gemm(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    totals: torch.Tensor,
    words: torch.Tensor,
    steps: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    zero: torch.Tensor | None,
    dtype: torch.dtype,
    config: Sequence[int],
) -> torch.Tensor:
    y = scale.new_empty(codes.shape[0], words.shape[1], dtype=dtype)
    row = steps.numel() == 0
    ends = Ends(scale, row_scale, totals, offset, zero, high=row)
    operands = (codes, words, totals if row else steps)
    constants = {"H": words.shape[2], "PTX": not _triton.interpreted()}
    return run_product(two_level_product, operands, ends, y, config, constants)


def _gemm_fake(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    totals: torch.Tensor,
    words: torch.Tensor,
    steps: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    zero: torch.Tensor | None,
    dtype: torch.dtype,
    config: Sequence[int],
) -> torch.Tensor:
    return scale.new_empty(codes.shape[0], words.shape[1], dtype=dtype)


LIB = torch.library.Library("fewbit", "FRAGMENT")
LIB.define(
    "int_two_level_gemm(Tensor codes, Tensor row_scale, Tensor totals, Tensor words, Tensor steps, "
    "Tensor scale, Tensor? offset, Tensor? zero, ScalarType dtype, int[] config) -> Tensor"
)
LIB.impl("int_two_level_gemm", _gemm, "CompositeExplicitAutograd")
torch.library.register_fake("fewbit::int_two_level_gemm", _gemm_fake, lib=LIB)


# ---- record ---------------------------------------------------------------------------------


def _compile(problem: Problem, config: Config, cc: tuple[int, int]) -> tuple[Compiled, ...]:
    options = problem.options
    row, dialect = options.group == "row", options.dialect
    flags = flags_of(row and dialect == "offset", row and dialect == "zero", row)
    constants = {**flags, "H": half_of(options), "PTX": True}
    operands = {"x": "*i8", "w": "*u8", "steps": "*i32"}
    return compile_product(problem, config, cc, two_level_product, operands, constants)


KERNEL = Kernel(
    name="triton_w4a8",
    refuse=_refuse,
    prepare=_prepare,
    launch=_launch,
    seconds=_seconds,
    priority=1,
    activation=ACTIVATION.name,
    configs=_configs,
    compile=_compile,
    source=source_hash(_integer_gemm, sys.modules[__name__]),
)
