"""Products with `int_group` weights of 2 to 8 bits on tensor cores: y = x · Ŵᵀ, x in fp16 or bf16.

Weights lie as `_planes.py` draws them. A program makes a tile of N rows of the weight and M tokens,
transposed, because the operand that comes out of registers must be the first:

    yᵀ[N tile, M tile] = Σ_g scale[n, g] · Σ_{k in g} (code − zero)[n, k] · x[m, k]

    for each span of 128 columns          words → shared memory, stages ahead (cp.async)
      words → registers of the operand    128-bit reads, each thread's columns of a row lie together
      shift, mask, multiply-add           code − zero, exact in 16 bits
      tensor cores                        fp32 sums of one group of columns (the whole span if g ≥ 128)
      sums · scale added to yᵀ            one fused multiply-add for g columns; group "row": at the end

The scale multiplies sums, so that the operand is an exact integer and only x, scale and result carry
rounding errors. Scales and zeros of the next group are read while this one is multiplied.

    program id 0   tiles, M fastest within groups of 8 M tiles: a weight is read from memory once
                   for 8 M tiles, and x of 8 M tiles stays in the L2 cache
    program id 1   parts of K (`_split_k.py`), in spans; fills the machine when tiles are few

Instructions of the main loop for each weight with 16 tokens, 128 rows, 4 warps and groups of 128, as
Triton 3.6 compiles it for sm_90 (not timed):

    bits    2    3    4    5    6    7    8
    fp16   2.1  3.6  2.2  3.6  3.4  4.6  3.4
    bf16   2.1  3.6  2.4  3.6  3.4  4.6  3.9

Not yet run on a GPU. With tiles of at most 32 tokens, weights are read with the policy evict_first;
Triton 3.6 drops it for asynchronous copies (seen in its PTX).
Deliberately not here: prefill, where `dequantize.py` is faster, and x in fp32.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ..quant.cost_model import Tiling, Work, alu_rate, launch_seconds
from ..quant.kernel import Compiled, Config, Device, Kernel, Problem, Reason
from . import _int_group, _planes, _split_k, _triton
from ._compile import Variant, compile_variant, pointer, source_hash
from ._planes import SPAN, Planes
from ._triton import interpreted, jit, tl

# ---- device code ----------------------------------------------------------------------------


@jit
def _tile_of(program, m, rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(M tile, N tile) of a program: 8 M tiles at a time, M fastest."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(rows, BLOCK_N)
    first = program // (8 * tiles_n) * 8
    height = tl.minimum(tiles_m - first, 8)
    inside = program % (8 * tiles_n)
    return first + inside % height, inside // height


@jit(do_not_specialize=("m", "spans", "split", "per_split"))
def multiply(
    x, first, second, third, scale, zero, y, work,
    m, k, rows, spans, stride_x, stride_y, split, per_split,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """y [m, stride_y] of x [m, stride_x] if split is 1, else one part in work [split, m, stride_y].

    GROUP: columns, 0 for whole rows. ZERO: are there zero points? rows: of the weight, padded.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    FIRST: tl.constexpr = 16 if BITS >= 4 else 8
    SECOND: tl.constexpr = 16 if BITS == 8 else 8
    SIZE: tl.constexpr = GROUP if GROUP > 0 and GROUP < 128 else 128
    PIECES: tl.constexpr = 128 // SIZE
    SCALES: tl.constexpr = PIECES if GROUP > 0 else 0  # of a row, for a span
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    tile_m, tile_n = _tile_of(tl.program_id(0), m, stride_y, BLOCK_M, BLOCK_N)
    first_row, first_token = tile_n * BLOCK_N, tile_m * BLOCK_M
    token, column = tl.arange(0, BLOCK_M), tl.arange(0, SIZE)
    is_token = (token < m - first_token)[None, :]
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, spans)
    start = begin.to(tl.int64)

    # Where the first span lies: one pointer each, and offsets that stay.
    words = _planes.block_at(first, start, rows, first_row, FIRST)
    more = _planes.block_at(second, start, rows, first_row, SECOND)
    most = _planes.block_at(third, start, rows, first_row, 8)
    inputs = x + first_token.to(tl.int64) * stride_x + begin * 128
    input_at = token[None, :] * stride_x + column[:, None]
    left = k - begin * 128
    row = first_row + tl.arange(0, BLOCK_N)
    group = start * SCALES * rows
    next_scale = tl.load(scale + group + row)
    next_zero = next_scale
    if ZERO:
        next_zero = tl.load(zero + group + row)

    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for _ in range(begin, end):
        a = tl.load(words + _planes.block(FIRST, BLOCK_N), eviction_policy=POLICY)
        b, c = a, a
        if BITS != 4 and BITS != 2:
            b = tl.load(more + _planes.block(SECOND, BLOCK_N), eviction_policy=POLICY)
            if BITS == 3 or BITS == 5:
                b = _planes.spread(b)
        if BITS == 7:
            c = tl.load(most + _planes.block(8, BLOCK_N), eviction_policy=POLICY)
            c = _planes.spread(c)
        for piece in tl.static_range(PIECES):
            live = is_token & (column + piece * SIZE < left)[:, None]
            part_x = tl.load(inputs + piece * SIZE + input_at, mask=live, other=0.0)
            this_scale = next_scale
            if ZERO:
                term, stay = _planes.terms(next_zero.to(tl.int32), BITS, DTYPE)
            else:
                term, stay = _planes.fixed_terms(MIDDLE, BITS, DTYPE)
            if GROUP > 0:
                group += rows
                next_scale = tl.load(scale + group + row)
                if ZERO:
                    next_zero = tl.load(zero + group + row)
            values = _planes.values(a, b, c, term, stay, piece, SIZE, BITS, DTYPE, BLOCK_N, PTX)
            if GROUP > 0:
                sums += tl.dot(values, part_x) * this_scale.to(tl.float32)[:, None]
            else:
                sums = tl.dot(values, part_x, sums)
        words += rows * FIRST
        more += rows * SECOND
        most += rows * 8
        inputs += 128
        left -= 128

    # Result, transposed back.
    if GROUP == 0:
        sums *= next_scale.to(tl.float32)[:, None]
    at = (first_token + token[None, :]).to(tl.int64) * stride_y + row[:, None]
    live = is_token & (row < stride_y)[:, None]
    if split == 1:
        tl.store(y + at, sums.to(DTYPE), mask=live)
    else:
        part = tl.program_id(1).to(tl.int64) * m * stride_y
        tl.store(work + part + at, sums, mask=live)


# ---- what may be asked ----------------------------------------------------------------------

_SPLITS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
_TILES = ((64, 4), (128, 4), (128, 8), (256, 8))  # (block_n, warps)
_MOST_BLOCKS = 16  # of a multiprocessor; more parts of K only add to the sums
_MOST_REGISTERS = 230  # as guessed by `_registers`: with more, some compiler spills


def refuse(problem: Problem) -> tuple[Reason, ...]:
    """Other devices, formats, dtypes of x. Any N, K, M, group and width of codes will do."""
    return tuple(_int_group.refusals(problem))


def configs(problem: Problem) -> tuple[Config, ...]:
    """block_m, block_n: of a tile. warps, stages: of a program. split_k: most parts of K."""
    return tuple(_choices(problem))


def _choices(problem: Problem) -> Iterator[Config]:
    sms = problem.machine.sms if problem.machine else 132
    spans = -(-problem.k // SPAN)
    splits = sorted({_split_k.spans_of(spans, split)[1] for split in _SPLITS})
    for block_m, block_n, warps, stages in _binaries(problem):
        tiles = -(-problem.m_bucket // block_m) * -(-problem.n // block_n)
        for split in splits:
            if split == 1 or tiles * split <= _MOST_BLOCKS * sms:
                yield (
                    ("block_m", block_m), ("block_n", block_n), ("warps", warps),
                    ("stages", stages), ("split_k", split),
                )  # fmt: skip


def _binaries(problem: Problem) -> Iterator[tuple[int, int, int, int]]:
    """(block_m, block_n, warps, stages): what is compiled."""
    smem = problem.machine.smem_block_bytes if problem.machine else None
    rows, _ = _int_group.padded(problem.n, problem.k)
    for block_m in _token_tiles(problem.m_bucket):
        for block_n, warps in _TILES:
            held = _registers(problem, block_m, block_n, warps) <= _MOST_REGISTERS
            for stages in (3, 4, 6) if block_m <= 32 else (2, 3, 4):
                fits = smem is None or _smem_bytes(problem, block_m, block_n, stages) <= smem
                if held and fits and rows % block_n == 0:
                    yield block_m, block_n, warps, stages


def _token_tiles(m: int) -> tuple[int, ...]:
    """Sizes that need at most two tiles and fill more than half of them; 32 and more for many."""
    if m > 64:
        return (32, 64, 128)
    sizes = (size for size in (8, 16, 32, 64) if size >= _least_tokens())
    return tuple(size for size in sizes if m <= 2 * size and size < 2 * max(m, 16))


def _least_tokens() -> int:
    """Of a tile: Triton 3.6 and 3.9 take 8, 3.2 refuses fewer than 16."""
    version = (_triton.VERSION or "3.6").split(".")
    return 8 if (int(version[0]), int(version[1])) >= (3, 6) else 16


def _smem_bytes(problem: Problem, block_m: int, block_n: int, stages: int) -> int:
    return stages * (block_n * SPAN * problem.options.bits // 8 + 2 * block_m * SPAN) + 1024


def _registers(problem: Problem, block_m: int, block_n: int, warps: int) -> int:
    """Of a thread: sums, sums of a group, values as pairs, words, and what pointers take; a guess that
    was fitted to what ptxas says. Sums of several groups of a span are alive together where
    instructions of a warp group run on while others are issued."""
    cc, options = problem.machine.cc if problem.machine else None, problem.options
    more = SPAN // (_int_group.group_of(options) or SPAN) - 1  # groups of a span, beside the first
    sums = 2 + (0.6 * more if _in_groups(block_m, cc) else 0.0)
    values = SPAN * _copies(block_m, block_n, warps, cc) * (0.5 + options.bits / 32)
    zeros = 0 if options.symmetric else 4 * more
    return int(48 + zeros + block_n * (sums * block_m + values) / (32 * warps))


def _in_groups(block_m: int, cc: tuple[int, int] | None) -> bool:
    """Does Triton use instructions of a warp group?"""
    return block_m > 8 and cc is not None and cc[0] in (9, 10)


def _copies(block_m: int, block_n: int, warps: int, cc: tuple[int, int] | None) -> int:
    """Warps that decode the same weights. With mma.sync, Triton shares a tile among warps so that both
    operands are read about as often; instructions of a warp group have their warps along N."""
    if _in_groups(block_m, cc):
        return max(1, 16 * warps // block_n)
    along_n, copies, left_n, left_m = 1, 1, block_n // 16, block_m // 8
    while along_n * copies < warps:
        if left_n >= left_m:
            along_n, left_n = 2 * along_n, max(1, left_n // 2)
        else:
            copies, left_m = 2 * copies, left_m // 2
    return copies * max(1, 16 * along_n // block_n)


# ---- estimate -------------------------------------------------------------------------------

_CACHE = 3.0  # the L2 cache is so many times as fast as memory; a guess
_SLOWER = 1.4  # products whose operand comes from registers, beside a library's; a guess
_APART = (
    0.5  # share of the shorter of decoding and products that does not overlap the longer; a guess
)


def seconds(problem: Problem, config: Config, compiled: Compiled | None = None) -> float:
    """Estimated time of the product and of adding its parts."""
    if problem.machine is None:
        return 1.0
    choice, bits = dict(config), problem.options.bits
    block_m, block_n, warps = choice["block_m"], choice["block_n"], choice["warps"]
    m, n, k, split = problem.m_bucket, problem.n, problem.k, choice["split_k"]
    tiles_m, tiles_n = -(-m // block_m), -(-n // block_n)
    reread = 1 + (tiles_m - 1) / _CACHE
    moved = _int_group.packed_bytes(problem) * reread + 2 * m * k * (1 + (tiles_n - 1) / _CACHE)
    work = Work(
        bytes=moved + 2 * m * n * (1 if split == 1 else 2 * split),
        ops=_SLOWER * 2.0 * tiles_m * block_m * tiles_n * block_n * _int_group.padded(n, k)[1],
        kind="fp16" if problem.dtype == torch.float16 else "bf16",
        alu=_decoding(problem, block_m, block_n, warps) * tiles_m * tiles_n,
        extra_seconds=_split_k.finish_seconds(problem.machine, m * n, split),
    )
    tiling = Tiling(
        blocks=tiles_m * tiles_n * split,
        threads=32 * warps,
        in_flight_bytes=(choice["stages"] - 1) * block_n * SPAN * bits / 8,
        registers=min(255, _registers(problem, block_m, block_n, warps)),
        smem_bytes=_smem_bytes(problem, block_m, block_n, choice["stages"]),
    )
    return launch_seconds(_in_turn(work, problem.machine), tiling, problem.machine, compiled)


def _decoding(problem: Problem, block_m: int, block_n: int, warps: int) -> float:
    """Integer instructions of a tile over all of K: half of all, the rest are of floats."""
    copies = _copies(block_m, block_n, warps, problem.machine.cc if problem.machine else None)
    group = _int_group.group_of(problem.options)
    each = _int_group.DECODE_INSTRUCTIONS[problem.options.bits] + (block_m / group if group else 0)
    return block_n * _int_group.padded(problem.n, problem.k)[1] * copies * each / 2


def _in_turn(work: Work, machine: Device) -> Work:
    """The work with operations added for what decoding and products do not overlap."""
    peak: float | None = getattr(machine.peak_ops_per_second, work.kind)
    rate = alu_rate(machine)
    if peak is None or rate is None:
        return work
    return replace(work, ops=work.ops + _APART * min(work.ops, work.alu / rate * peak))


# ---- launch ---------------------------------------------------------------------------------

prepare = _int_group.prepare


def launch(x: torch.Tensor, layout: Planes, config: Config) -> torch.Tensor:
    """x [M, K] fp16 or bf16 -> y [M, N] of the same dtype."""
    numbers = [value for _, value in config]
    y: torch.Tensor = torch.ops.fewbit.int_group_gemm(
        x, layout.planes, layout.scale, layout.zero, layout.n, layout.bits, layout.group, numbers
    )
    return y


def _multiply(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    n: int,
    bits: int,
    group: int,
    config: Sequence[int],
) -> torch.Tensor:
    block_m, block_n, warps, stages, split_k = config
    y, m = _int_group.empty_result(x, n), x.shape[0]
    if m == 0:
        return _int_group.result(y, n)
    x = _int_group.aligned(x)
    spans, rows, _ = planes[0].shape
    each, parts = _split_k.spans_of(spans, split_k)
    work = _split_k.workspace(y, parts)
    multiply[(-(-m // block_m) * -(-n // block_n), parts)](
        x, *_int_group.three(planes), scale, scale if zero is None else zero, y, work,
        m, x.shape[1], rows, spans, _int_group.row_stride(x), y.shape[1], parts, each,
        BITS=bits, GROUP=group, ZERO=zero is not None, PTX=not interpreted(),
        BLOCK_M=block_m, BLOCK_N=block_n, POLICY=_policy(block_m),
        num_warps=warps, num_stages=stages, maxnreg=_most_registers(block_m, bits, group),
    )  # fmt: skip
    _split_k.finish(work, y)
    return _int_group.result(y, n)


def _most_registers(block_m: int, bits: int, group: int) -> int:
    """Of a thread. Saying so keeps ptxas from spilling a few for the sake of more blocks. With few
    tokens, narrow codes and long groups 128 suffice: four blocks of 4 warps fit a multiprocessor."""
    return 128 if block_m <= 16 and bits <= 4 and (group == 0 or group >= 64) else 255


def _policy(block_m: int) -> str:
    """Few tokens: one tile of them or two, so that hardly anything reads the weights again."""
    return "evict_first" if block_m <= 32 else ""


def _multiply_like(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    n: int,
    bits: int,
    group: int,
    config: Sequence[int],
) -> torch.Tensor:
    return x.new_empty(x.shape[0], n)


LIB = torch.library.Library("fewbit", "FRAGMENT")
LIB.define(
    "int_group_gemm(Tensor x, Tensor[] planes, Tensor scale, Tensor? zero, int n, int bits, "
    "int group, int[] config) -> Tensor"
)
LIB.impl("int_group_gemm", _multiply, "CompositeExplicitAutograd")
torch.library.register_fake("fewbit::int_group_gemm", _multiply_like, lib=LIB)


# ---- compilation, record --------------------------------------------------------------------


def compile(problem: Problem, config: Config, cc: tuple[int, int]) -> tuple[Compiled, ...]:
    """The product, and the sum of its parts."""
    choice, options = dict(config), problem.options
    value = pointer(problem.dtype)
    types = {"x": value, **_int_group.weight_types(options), "y": value, "work": "*fp32"}
    divisible = (*types, "k", "rows", "stride_x", "stride_y")
    constants = _int_group.weight_constants(options) | {
        "BLOCK_M": choice["block_m"],
        "BLOCK_N": choice["block_n"],
        "POLICY": _policy(choice["block_m"]),
    }
    types |= dict.fromkeys(_int_group.SIZES, "i32")
    variant = Variant(
        multiply, types, constants, divisible, choice["warps"], choice["stages"],
        max_registers=_most_registers(
            choice["block_m"], options.bits, _int_group.group_of(options)
        ),
    )  # fmt: skip
    return compile_variant(variant, cc), _split_k.compiled(problem.dtype, cc)


KERNEL = Kernel(
    "triton_int_group",
    refuse,
    prepare,
    launch,
    seconds,
    priority=2,
    configs=configs,
    compile=compile,
    m_invariant=True,
    source=source_hash(_int_group, _planes, _split_k, sys.modules[__name__]),
)
