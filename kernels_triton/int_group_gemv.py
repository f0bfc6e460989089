"""Products of 1 to 4 tokens with `int_group` weights on the fp32 units: y = x · Ŵᵀ, no tensor cores.

Weights lie as `_planes.py` draws them. A program makes BLOCK_N rows of the weight and all tokens:

    for each span of 128 columns, for each group in it
      words → registers → code − zero in fp16, exact → fp32        once for all tokens
      Σ_k (code − zero)[n, k] · x[m, k]                            a fused multiply-add each
      · scale[n, g], added to yᵀ[n, m]

Four threads share a row; each holds the columns 2t, 2t+1, 2t+8, 2t+9 of every 16, and their sums are
added at the end of a group. K is cut into parts (`_split_k.py`), so that few rows fill the machine too.

Instructions of the main loop for each weight, 4 bits, groups of 128, 128 rows, 4 warps, as Triton 3.6
compiles it for sm_90 (not timed):  1 token 4.0,  2 tokens 5.5,  4 tokens 8.4.
Not yet run on a GPU.
Deliberately not here: more tokens, for which `int_group_gemm.py` does the sums on tensor cores.
"""

import sys
from collections.abc import Iterator, Sequence

import torch

from ..quant.cost_model import Tiling, Work, launch_seconds
from ..quant.errors import NoKernelError
from ..quant.kernel import Compiled, Config, Kernel, Problem, Reason
from . import _int_group, _planes, _split_k
from ._compile import Variant, compile_variant, pointer, source_hash
from ._planes import SPAN, Planes
from ._triton import interpreted, jit, tl

# ---- device code ----------------------------------------------------------------------------


@jit(do_not_specialize=("m", "spans", "split", "per_split"))
def multiply_few(
    x, first, second, third, scale, zero, y, work,
    m, k, rows, spans, stride_x, stride_y, split, per_split,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, PTX: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `int_group_gemm.multiply`, for m ≤ TOKENS."""
    FIRST: tl.constexpr = 16 if BITS >= 4 else 8
    SECOND: tl.constexpr = 16 if BITS == 8 else 8
    SIZE: tl.constexpr = GROUP if GROUP > 0 and GROUP < 128 else 128
    PIECES: tl.constexpr = 128 // SIZE
    SCALES: tl.constexpr = PIECES if GROUP > 0 else 0  # of a row, for a span
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    first_row = tl.program_id(0) * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_N)
    token, column = tl.arange(0, TOKENS), tl.arange(0, SIZE)
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, spans)
    start = begin.to(tl.int64)

    # Where the first span lies: one pointer each, and offsets that stay.
    words = _planes.block_at(first, start, rows, first_row, FIRST)
    more = _planes.block_at(second, start, rows, first_row, SECOND)
    most = _planes.block_at(third, start, rows, first_row, 8)
    inputs = x + begin * 128
    left = k - begin * 128
    group = start * SCALES * rows

    sums = tl.zeros([BLOCK_N, TOKENS], tl.float32)
    for _ in tl.range(begin, end, num_stages=STAGES):
        a = tl.load(words + _planes.block(FIRST, BLOCK_N), eviction_policy="evict_first")
        b, c = a, a
        if BITS != 4 and BITS != 2:
            b = tl.load(more + _planes.block(SECOND, BLOCK_N), eviction_policy="evict_first")
            if BITS == 3 or BITS == 5:
                b = _planes.spread(b)
        if BITS == 7:
            c = tl.load(most + _planes.block(8, BLOCK_N), eviction_policy="evict_first")
            c = _planes.spread(c)
        for piece in tl.static_range(PIECES):
            if ZERO:
                term, stay = _planes.terms(
                    tl.load(zero + group + row).to(tl.int32), BITS, tl.float16
                )
            else:
                term, stay = _planes.fixed_terms(MIDDLE, BITS, tl.float16)
            values = _planes.values(
                a, b, c, term, stay, piece, SIZE, BITS, tl.float16, BLOCK_N, PTX
            ).to(tl.float32)
            # One token at a time: a product of three axes would leave the layout of the words.
            part = tl.zeros([BLOCK_N, TOKENS], tl.float32)
            for i in tl.static_range(TOKENS):
                live = (column + piece * SIZE < left) & (i < m)
                at = inputs + i * stride_x + piece * SIZE + column
                part_x = tl.load(at, mask=live, other=0.0)
                one = tl.sum(values * part_x.to(tl.float32)[None, :], 1)
                part = tl.where((token == i)[None, :], one[:, None], part)
            if GROUP > 0:
                part *= tl.load(scale + group + row).to(tl.float32)[:, None]
                group += rows
            sums += part
        words += rows * FIRST
        more += rows * SECOND
        most += rows * 8
        inputs += 128
        left -= 128

    if GROUP == 0:
        sums *= tl.load(scale + row).to(tl.float32)[:, None]
    at = token[None, :] * stride_y + row[:, None]
    live = (token < m)[None, :] & (row < stride_y)[:, None]
    if split == 1:
        tl.store(y + at, sums.to(y.dtype.element_ty), mask=live)
    else:
        part = tl.program_id(1).to(tl.int64) * m * stride_y
        tl.store(work + part + at, sums, mask=live)


# ---- what may be asked ----------------------------------------------------------------------

MOST_TOKENS = 4
_SPLITS = (1, 2, 4, 8, 16, 32)
_TILES = ((32, 4), (64, 4), (128, 4), (128, 8), (256, 8))  # (block_n, warps)
_MOST_BLOCKS = 32  # of a multiprocessor
_MOST_REGISTERS = 255  # of a thread; saying so keeps ptxas from spilling a few to fit more blocks


def refuse(problem: Problem) -> tuple[Reason, ...]:
    """As `int_group_gemm.refuse`, and more than 4 tokens."""
    reasons = tuple(_int_group.refusals(problem))
    if problem.m_bucket <= MOST_TOKENS:
        return reasons
    text = f"multiplies at most {MOST_TOKENS} tokens, got a bucket of {problem.m_bucket}"
    return (*reasons, Reason("SHAPE_M", text, "use triton_int_group"))


def configs(problem: Problem) -> tuple[Config, ...]:
    """tokens: that M is at most. block_n, warps, stages: of a program. split_k: most parts of K."""
    return tuple(_choices(problem))


def _choices(problem: Problem) -> Iterator[Config]:
    sms = problem.machine.sms if problem.machine else 132
    rows, columns = _int_group.padded(problem.n, problem.k)
    splits = sorted({_split_k.spans_of(columns // SPAN, split)[1] for split in _SPLITS})
    for block_n, warps in _TILES:
        for stages in (1, 2, 4):
            for split in splits:
                blocks = -(-problem.n // block_n) * split
                few = split == 1 or blocks <= _MOST_BLOCKS * sms
                if few and rows % block_n == 0:
                    yield (
                        ("tokens", _tokens(problem.m_bucket)), ("block_n", block_n), ("warps", warps),
                        ("stages", stages), ("split_k", split),
                    )  # fmt: skip


def _tokens(m: int) -> int:
    """A power of two, which tiles are."""
    return 1 << (m - 1).bit_length()


def seconds(problem: Problem, config: Config, compiled: Compiled | None = None) -> float:
    """Estimated time of the product and of adding its parts."""
    if problem.machine is None:
        return 1.0
    choice = dict(config)
    block_n, warps, split = choice["block_n"], choice["warps"], choice["split_k"]
    m, n, k, bits = problem.m_bucket, problem.n, problem.k, problem.options.bits
    tiles = -(-n // block_n)
    weights = tiles * block_n * _int_group.padded(n, k)[1]
    rows_of_thread = block_n / (8 * warps)
    # To fp32, then for each token the product and its share of reading x.
    instructions = _int_group.DECODE_INSTRUCTIONS[bits] + 1 + m * (1 + 2 / rows_of_thread)
    work = Work(
        bytes=_int_group.packed_bytes(problem) + 2 * m * k + 2 * m * n,
        ops=2.0 * m * weights,
        kind="fp32",
        alu=weights * instructions / 2,  # every other one is of floats
        extra_seconds=_split_k.finish_seconds(problem.machine, m * n, split),
    )
    tile = block_n * SPAN * bits / 8
    stages = choice["stages"]
    registers = 40 + rows_of_thread * (32 + bits + 4 * m) / 2
    tiling = Tiling(
        blocks=tiles * split,
        threads=32 * warps,
        in_flight_bytes=tile / 2 if stages == 1 else (stages - 1) * tile,
        registers=min(255, int(registers)),
        smem_bytes=1024 if stages == 1 else int(stages * tile),
    )
    return launch_seconds(work, tiling, problem.machine, compiled)


# ---- launch ---------------------------------------------------------------------------------

prepare = _int_group.prepare


def launch(x: torch.Tensor, layout: Planes, config: Config) -> torch.Tensor:
    """x [M, K] fp16 or bf16, M ≤ 4 -> y [M, N] of the same dtype."""
    numbers = [value for _, value in config]
    y: torch.Tensor = torch.ops.fewbit.int_group_gemv(
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
    tokens, block_n, warps, stages, split_k = config
    y, m = _int_group.empty_result(x, n), x.shape[0]
    if m > tokens:
        raise NoKernelError(f"int_group_gemv: at most {tokens} tokens, got {m}; use int_group_gemm")
    if m == 0:
        return _int_group.result(y, n)
    x = _int_group.aligned(x)
    spans, rows, _ = planes[0].shape
    each, parts = _split_k.spans_of(spans, split_k)
    work = _split_k.workspace(y, parts)
    multiply_few[(-(-n // block_n), parts)](
        x, *_int_group.three(planes), scale, scale if zero is None else zero, y, work,
        m, x.shape[1], rows, spans, _int_group.row_stride(x), y.shape[1], parts, each,
        BITS=bits, GROUP=group, ZERO=zero is not None, PTX=not interpreted(),
        TOKENS=tokens, BLOCK_N=block_n, STAGES=stages,
        num_warps=warps, num_stages=stages, maxnreg=_MOST_REGISTERS,
    )  # fmt: skip
    _split_k.finish(work, y)
    return _int_group.result(y, n)


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
    "int_group_gemv(Tensor x, Tensor[] planes, Tensor scale, Tensor? zero, int n, int bits, "
    "int group, int[] config) -> Tensor"
)
LIB.impl("int_group_gemv", _multiply, "CompositeExplicitAutograd")
torch.library.register_fake("fewbit::int_group_gemv", _multiply_like, lib=LIB)


# ---- compilation, record --------------------------------------------------------------------


def compile(problem: Problem, config: Config, cc: tuple[int, int]) -> tuple[Compiled, ...]:
    """The product, and the sum of its parts."""
    choice, options = dict(config), problem.options
    value = pointer(problem.dtype)
    types = {"x": value, **_int_group.weight_types(options), "y": value, "work": "*fp32"}
    divisible = (*types, "k", "rows", "stride_x", "stride_y")
    types |= dict.fromkeys(_int_group.SIZES, "i32")
    constants = _int_group.weight_constants(options) | {
        "TOKENS": choice["tokens"],
        "BLOCK_N": choice["block_n"],
        "STAGES": choice["stages"],
    }
    variant = Variant(
        multiply_few, types, constants, divisible, choice["warps"], choice["stages"],
        max_registers=_MOST_REGISTERS,
    )  # fmt: skip
    return compile_variant(variant, cc), _split_k.compiled(problem.dtype, cc)


KERNEL = Kernel(
    "triton_int_group_gemv",
    refuse,
    prepare,
    launch,
    seconds,
    priority=1,
    configs=configs,
    compile=compile,
    m_invariant=True,
    source=source_hash(_int_group, _planes, _split_k, sys.modules[__name__]),
)
