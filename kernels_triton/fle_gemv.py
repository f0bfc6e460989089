"""Products of 1 to 8 tokens with `fle4` and `fle3` weights, without a dense weight: y = x · Wᵀ.

A program makes 64 rows of the result and all tokens, and goes along K tile by tile (`_fle.py`):

    fle4   codes, signs and mantissas → fp32, escapes as zero → Σ_k w[n, k] · x[m, k]
           afterwards, 32 entries of the lists at a time: their tile by comparing offsets, w and x by
           address, w · x added to the row
    fle3   words, escapes among them → fp32 → Σ_k w[n, k] · x[m, k]

Products and sums are in fp32. K is cut into parts (`_split_k.py`), so that few rows fill the machine.

Every weight is exact, but sums have another order than a library's: y is as near to the true product,
and not bit-equal. And it may lose: published kernels of this kind were slower than a library on memory
as fast as an H100's. So it is `measured_only`: a plan has it where a tuned table of that very GPU and
shape says that it is 1.05 times as fast as `fle_decode.py` and all others, and nowhere else.
x that is infinite gives NaN where fle4 escapes.

Not yet run on a GPU. Deliberately not here: more tokens, and tensor cores.
"""

import sys
from collections.abc import Iterator, Sequence

import torch

from ..quant.cost_model import Tiling, Work, launch_seconds
from ..quant.errors import NoKernelError
from ..quant.kernel import Compiled, Config, Kernel, Problem, Reason
from . import _fle, _int_group, _split_k
from ._compile import Variant, compile_variant, source_hash
from ._fle import TILE, FlePlanes
from ._triton import jit, tl

# ---- device code ----------------------------------------------------------------------------


@jit
def add_escapes(
    sums, x, sign, offset, position, exponent, row, begin, end, m, columns, stride_x,
    TOKENS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """sums [64, TOKENS] and the products of the escapes of tiles begin … end − 1 along K of the row of
    tiles that `offset` points at; row: its first. TILES ≥ end − begin, a power of two."""
    line, token = tl.arange(0, 64), tl.arange(0, TOKENS)
    tile = begin + tl.arange(0, TILES)
    ends = tl.load(offset + tile + 1, mask=tile < end, other=2147483647)
    last = tl.load(offset + end)
    for start in tl.range(tl.load(offset + begin), last, 32):
        at = start + tl.arange(0, 32)
        live = at < last
        place = tl.load(position + at, mask=live, other=0).to(tl.int32)
        across = begin + tl.sum((ends[None, :] <= at[:, None]).to(tl.int32), 1)
        column = tl.where(live, across * 64 + (place & 63), 0)
        low = tl.load(sign + (row + (place >> 6)) * columns + column, mask=live, other=0)
        listed = tl.load(exponent + at, mask=live, other=0).to(tl.int32)
        weight = _fle.number(_fle.word(low.to(tl.int32), listed))
        hit = ((place >> 6)[None, :] == line[:, None]) & live[None, :]
        for i in tl.static_range(TOKENS):
            inputs = tl.load(x + i * stride_x + column, mask=live & (i < m), other=0.0)
            products = tl.where(hit, (weight * inputs.to(tl.float32))[None, :], 0.0)
            sums += tl.where((token == i)[None, :], tl.sum(products, 1)[:, None], 0.0)
    return sums


@jit
def store_sums(sums, y, work, row, m, stride_y, split, TOKENS: tl.constexpr):
    """sums [64, TOKENS] to y, or as this program's part to work."""
    token, lines = tl.arange(0, TOKENS), row + tl.arange(0, 64)
    at = token[None, :] * stride_y + lines[:, None]
    live = (token < m)[None, :] & (lines < stride_y)[:, None]
    if split == 1:
        tl.store(y + at, sums.to(y.dtype.element_ty), mask=live)
    else:
        part = tl.program_id(1).to(tl.int64) * m * stride_y
        tl.store(work + part + at, sums, mask=live)


@jit(do_not_specialize=("m", "n", "split", "per_split"))
def multiply_nibbles(
    x, sign, codes, window, offset, position, exponent, y, work,
    m, n, k, columns, stride_x, stride_y, split, per_split,
    TOKENS: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """yᵀ [n, m] of fle4. columns: k rounded up to 64. TILES ≥ per_split, a power of two."""
    row = tl.program_id(0).to(tl.int64) * 64
    lines, token = row + tl.arange(0, 64), tl.arange(0, TOKENS)
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, columns // 64)
    base, width = tl.load(window).to(tl.int32), tl.load(window + 1).to(tl.int32)
    sums = tl.zeros([64, TOKENS], tl.float32)
    for tile in tl.range(begin, end, num_stages=STAGES):
        both = _fle.nibbles(codes, lines, tile, columns, n)
        for part in tl.static_range(2):
            code = (both >> (4 * part)) & 15
            low = _fle.half(sign, lines, tile, part, columns, n)
            words = _fle.word(low, _fle.inside(code, base, width))
            weights = _fle.number(tl.where(code == 0, 0, words))
            column = tile * 64 + part * 32 + tl.arange(0, 32)
            for i in tl.static_range(TOKENS):
                live = (column < k) & (i < m)
                inputs = tl.load(x + i * stride_x + column, mask=live, other=0.0)
                one = tl.sum(weights * inputs.to(tl.float32)[None, :], 1)
                sums += tl.where((token == i)[None, :], one[:, None], 0.0)
    of_row = offset + tl.program_id(0).to(tl.int64) * (columns // 64)
    sums = add_escapes(
        sums, x, sign, of_row, position, exponent, row, begin, end, m, columns, stride_x,
        TOKENS, TILES,
    )  # fmt: skip
    store_sums(sums, y, work, row, m, stride_y, split, TOKENS)


@jit(do_not_specialize=("m", "n", "split", "per_split"))
def multiply_planes(
    x, sign, codes, window, offset, position, exponent, y, work,
    m, n, k, columns, stride_x, stride_y, split, per_split,
    TOKENS: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `multiply_nibbles`: fle3."""
    row = tl.program_id(0).to(tl.int64) * 64
    lines, token = row + tl.arange(0, 64), tl.arange(0, TOKENS)
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, columns // 64)
    base, width = tl.load(window).to(tl.int32), tl.load(window + 1).to(tl.int32)
    of_row = offset + tl.program_id(0).to(tl.int64) * (columns // 64)
    sums = tl.zeros([64, TOKENS], tl.float32)
    for tile in tl.range(begin, end, num_stages=STAGES):
        first = tl.load(of_row + tile)
        words = _fle.words_of_planes(
            sign, codes, exponent, lines, tile, first, base, width, columns, n
        )
        weights = _fle.number(words)
        column = (tile * 64 + tl.arange(0, 8) * 8)[:, None] + tl.arange(0, 8)[None, :]
        for i in tl.static_range(TOKENS):
            live = (column < k) & (i < m)
            inputs = tl.load(x + i * stride_x + column, mask=live, other=0.0)
            one = tl.sum(tl.sum(weights * inputs.to(tl.float32)[None, :, :], 2), 1)
            sums += tl.where((token == i)[None, :], one[:, None], 0.0)
    store_sums(sums, y, work, row, m, stride_y, split, TOKENS)


# ---- what may be asked ----------------------------------------------------------------------

MOST_TOKENS = 8
_SPLITS = (1, 2, 4, 8, 16, 32)
_MOST_BLOCKS = 32  # of a multiprocessor
_MOST_TILES = (
    64  # of a program along K: to compare escapes with more offsets takes too many registers
)
_MOST_REGISTERS = 255  # of a thread; saying so keeps ptxas from spilling a few to fit more blocks


def refuse(problem: Problem) -> tuple[Reason, ...]:
    """Other devices, dtypes of x and formats, and more than 8 tokens."""
    return tuple(_reasons(problem))


def _reasons(problem: Problem) -> Iterator[Reason]:
    yield from _fle.refusals(problem)
    if problem.m_bucket > MOST_TOKENS:
        text = f"multiplies at most {MOST_TOKENS} tokens, got a bucket of {problem.m_bucket}"
        yield Reason("SHAPE_M", text, "use triton_fle_decode")


def configs(problem: Problem) -> tuple[Config, ...]:
    """tokens: that M is at most. warps, stages: of a program. split_k: most parts of K."""
    return tuple(_choices(problem))


def _choices(problem: Problem) -> Iterator[Config]:
    sms = problem.machine.sms if problem.machine else 132
    down, across = _fle.tiles_of(problem)
    tokens = 1 << (problem.m_bucket - 1).bit_length()
    cuts = {_split_k.spans_of(across, split) for split in _SPLITS}
    short = {parts for each, parts in cuts if each <= _MOST_TILES}
    splits = sorted(short or {max(parts for _, parts in cuts)})
    for warps in (4, 8):
        for stages in (1, 2, 4):
            for split in splits:
                if split == splits[0] or down * split <= _MOST_BLOCKS * sms:
                    yield (
                        ("tokens", tokens), ("warps", warps), ("stages", stages), ("split_k", split)
                    )  # fmt: skip


def seconds(problem: Problem, config: Config, compiled: Compiled | None = None) -> float:
    """Estimated time of the product and of adding its parts."""
    if problem.machine is None:
        return 1.0
    choice = dict(config)
    warps, stages, split = choice["warps"], choice["stages"], choice["split_k"]
    m, n, k, bits = problem.m_bucket, problem.n, problem.k, _fle.bits_of(problem)
    down, across = _fle.tiles_of(problem)
    weights, tile_bytes = down * across * TILE * TILE, TILE * TILE * (1 + bits / 8)
    work = Work(
        bytes=_fle.packed_bytes(problem) + 2 * m * k + 2 * m * n,
        ops=2.0 * m * weights,
        kind="fp32",
        alu=weights * (_fle.DECODE_INSTRUCTIONS[bits] + 1.5 * m) / 2,
        extra_seconds=_split_k.finish_seconds(problem.machine, m * n, split),
    )
    tiling = Tiling(
        blocks=down * split,
        threads=32 * warps,
        in_flight_bytes=tile_bytes / 2 if stages == 1 else (stages - 1) * tile_bytes,
        registers=min(255, 48 + TILE * TILE // (32 * warps) + 4 * m),
        smem_bytes=1024 if stages == 1 else int(stages * tile_bytes),
    )
    return launch_seconds(work, tiling, problem.machine, compiled)


# ---- launch ---------------------------------------------------------------------------------

prepare = _fle.prepare


def launch(x: torch.Tensor, layout: FlePlanes, config: Config) -> torch.Tensor:
    """x bf16 [M, K], M ≤ 8 -> y bf16 [M, N]."""
    numbers = [value for _, value in config]
    y: torch.Tensor = torch.ops.fewbit.fle_gemv(x, layout.tensors, layout.n, layout.bits, numbers)
    return y


def _multiply(
    x: torch.Tensor, parts: Sequence[torch.Tensor], n: int, bits: int, config: Sequence[int]
) -> torch.Tensor:
    tokens, warps, stages, split_k = config
    y, m = _int_group.empty_result(x, n), x.shape[0]
    if m > tokens:
        raise NoKernelError(f"fle_gemv: at most {tokens} tokens, got {m}; use triton_fle_decode")
    if m == 0:
        return _int_group.result(y, n)
    x = _int_group.aligned(x)
    columns = parts[0].shape[1]
    each, split = _split_k.spans_of(columns // TILE, split_k)
    work = _split_k.workspace(y, split)
    multiply = multiply_nibbles if bits == 4 else multiply_planes
    multiply[(-(-n // TILE), split)](
        x, *parts, y, work,
        m, n, x.shape[1], columns, _int_group.row_stride(x), y.shape[1], split, each,
        TOKENS=tokens, TILES=_tiles(each), STAGES=stages, num_warps=warps, num_stages=stages,
        maxnreg=_MOST_REGISTERS,
    )  # fmt: skip
    _split_k.finish(work, y)
    return _int_group.result(y, n)


def _tiles(per_split: int) -> int:
    """A power of two, which tiles of a program are."""
    return 1 << (per_split - 1).bit_length()


def _multiply_like(
    x: torch.Tensor, parts: Sequence[torch.Tensor], n: int, bits: int, config: Sequence[int]
) -> torch.Tensor:
    return x.new_empty(x.shape[0], n)


LIB = torch.library.Library("fewbit", "FRAGMENT")
LIB.define("fle_gemv(Tensor x, Tensor[] parts, int n, int bits, int[] config) -> Tensor")
LIB.impl("fle_gemv", _multiply, "CompositeExplicitAutograd")
torch.library.register_fake("fewbit::fle_gemv", _multiply_like, lib=LIB)


# ---- compilation, record --------------------------------------------------------------------

_SIZES = ("m", "n", "k", "columns", "stride_x", "stride_y", "split", "per_split")  # i32


def compile(problem: Problem, config: Config, cc: tuple[int, int]) -> tuple[Compiled, ...]:
    """The product, and the sum of its parts."""
    choice, bits = dict(config), _fle.bits_of(problem)
    types = {"x": "*bf16", **_fle.list_types(bits), "y": "*bf16", "work": "*fp32"}
    divisible = (*types, "k", "columns", "stride_x", "stride_y")
    types |= dict.fromkeys(_SIZES, "i32")
    each, _ = _split_k.spans_of(_fle.tiles_of(problem)[1], choice["split_k"])
    constants = {"TOKENS": choice["tokens"], "TILES": _tiles(each), "STAGES": choice["stages"]}
    function = multiply_nibbles if bits == 4 else multiply_planes
    variant = Variant(
        function, types, constants, divisible, choice["warps"], choice["stages"],
        max_registers=_MOST_REGISTERS,
    )  # fmt: skip
    return compile_variant(variant, cc), _split_k.compiled(problem.dtype, cc)


KERNEL = Kernel(
    "triton_fle_gemv",
    refuse,
    prepare,
    launch,
    seconds,
    configs=configs,
    compile=compile,
    m_invariant=True,
    measured_only=True,
    source=source_hash(_fle, _int_group, _split_k, sys.modules[__name__]),
)
