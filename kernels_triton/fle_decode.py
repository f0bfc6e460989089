"""Expands `fle4` and `fle3` weights to bf16, for a library's product: y = x · Wᵀ, bit for bit.

    planes, lists  →  W [N, K] bf16 in a workspace  →  torch's product of two dense matrices

W is made as a dense weight lies in memory, contiguous and with every bit of the original, so that the
library does with it what it does with the original: y is `functional.linear(x, W)`, not close to it.
This is the one product of such weights whose logits are promised to be those of the dense model.

    program id 0   64 columns       program id 1   64 rows: a tile, which `_fle.py` decodes

fle4: all codes become words as if there were no escapes, without a branch. Then the tile's escapes, one
or so, are written again: entry i of the list says where, and the exponent. A barrier of the program
keeps the second writing behind the first.
fle3: escapes are counted and looked up as the words are made; everything is written once.

Traffic of a weight: 1.5 bytes read, 2 written, 2 read by the product. Not yet run on a GPU.
Deliberately not here: a product; that is torch's.
"""

import sys
from collections.abc import Sequence

import torch
from torch.nn import functional

from ..quant.cost_model import LATENCY_SECONDS, Tiling, Work, launch_seconds
from ..quant.kernel import Compiled, Config, Kernel, Problem, Reason
from . import _fle
from ._compile import Variant, compile_variant, source_hash
from ._fle import TILE, FlePlanes
from ._triton import jit, tl

# ---- device code ----------------------------------------------------------------------------


@jit
def rewrite(sign, position, exponent, dense, first, last, row, column, k, columns):
    """Entries first … last − 1 of the lists, of a tile that begins at (row, column)."""
    for start in tl.range(first, last, 32):
        at = start + tl.arange(0, 32)
        live = at < last
        place = tl.load(position + at, mask=live, other=0).to(tl.int32)
        y, x = row + (place >> 6), column + (place & 63)
        low = tl.load(sign + y * columns + x, mask=live, other=0).to(tl.int32)
        words = _fle.word(low, tl.load(exponent + at, mask=live, other=0).to(tl.int32))
        tl.store(dense + y * k + x, words.to(tl.int16), mask=live)


@jit(do_not_specialize=("n",))
def expand_nibbles(sign, codes, window, offset, position, exponent, dense, n, k, columns):
    """dense int16 [n, k]: fle4. columns: k rounded up to 64."""
    row = tl.program_id(1).to(tl.int64) * 64 + tl.arange(0, 64)
    tile = tl.program_id(0)
    entry = offset + tl.program_id(1).to(tl.int64) * (columns // 64) + tile
    first, last = tl.load(entry), tl.load(entry + 1)
    base, width = tl.load(window).to(tl.int32), tl.load(window + 1).to(tl.int32)
    both = _fle.nibbles(codes, row, tile, columns, n)
    for part in tl.static_range(2):
        low = _fle.half(sign, row, tile, part, columns, n)
        words = _fle.word(low, _fle.inside((both >> (4 * part)) & 15, base, width))
        column = tile * 64 + part * 32 + tl.arange(0, 32)
        live = (row < n)[:, None] & (column < k)[None, :]
        tl.store(dense + row[:, None] * k + column[None, :], words.to(tl.int16), mask=live)

    tl.debug_barrier()
    y = tl.program_id(1).to(tl.int64) * 64
    rewrite(sign, position, exponent, dense, first, last, y, tile * 64, k, columns)


@jit(do_not_specialize=("n",))
def expand_planes(sign, codes, window, offset, position, exponent, dense, n, k, columns):
    """As `expand_nibbles`: fle3."""
    row = tl.program_id(1).to(tl.int64) * 64 + tl.arange(0, 64)
    tile = tl.program_id(0)
    first = tl.load(offset + tl.program_id(1).to(tl.int64) * (columns // 64) + tile)
    base, width = tl.load(window).to(tl.int32), tl.load(window + 1).to(tl.int32)
    words = _fle.words_of_planes(sign, codes, exponent, row, tile, first, base, width, columns, n)
    column = (tile * 64 + tl.arange(0, 8) * 8)[:, None] + tl.arange(0, 8)[None, :]
    live = (row < n)[:, None, None] & (column < k)[None, :, :]
    tl.store(dense + row[:, None, None] * k + column[None, :, :], words.to(tl.int16), mask=live)


# ---- what may be asked ----------------------------------------------------------------------

_WARPS = (2, 4, 8)
_PRODUCT = 0.75  # share of the peak that a library's product reaches


def refuse(problem: Problem) -> tuple[Reason, ...]:
    """Other devices, dtypes of x and formats."""
    return tuple(_fle.refusals(problem))


def configs(problem: Problem) -> tuple[Config, ...]:
    """warps: of a program."""
    return tuple((("warps", warps),) for warps in _WARPS)


def seconds(problem: Problem, config: Config, compiled: Compiled | None = None) -> float:
    """Estimated time of expanding, and of the library's product after it."""
    machine = problem.machine
    if machine is None:
        return 1.0
    ((_, warps),) = config
    m, n, k = problem.m_bucket, problem.n, problem.k
    down, across = _fle.tiles_of(problem)
    bits = _fle.bits_of(problem)
    weights = down * across * TILE * TILE
    work = Work(
        bytes=_fle.packed_bytes(problem) + 2 * n * k,
        ops=0.0,
        kind="fp32",
        alu=weights * _fle.DECODE_INSTRUCTIONS[bits],
    )
    tiling = Tiling(
        blocks=down * across,
        threads=32 * warps,
        in_flight_bytes=TILE * TILE * (3 + bits / 8),
        registers=min(255, 32 + TILE * TILE // (32 * warps)),
        smem_bytes=1024,
    )
    peak, bandwidth = machine.peak_ops_per_second.bf16, machine.bandwidth_bytes_per_second
    terms = [0.0 if peak is None else 2.0 * m * n * k / (_PRODUCT * peak)]
    if bandwidth is not None:
        terms.append(2.0 * (n * k + m * k + m * n) / bandwidth)
    after = (machine.launch_seconds or 0.0) + LATENCY_SECONDS
    return launch_seconds(work, tiling, machine, compiled) + after + max(terms)


# ---- launch ---------------------------------------------------------------------------------

prepare = _fle.prepare


def launch(x: torch.Tensor, layout: FlePlanes, config: Config) -> torch.Tensor:
    """x bf16 [M, K] -> y bf16 [M, N]."""
    return functional.linear(x, dense(layout, config))


def dense(layout: FlePlanes, config: Config) -> torch.Tensor:
    """W bf16 [N, K], contiguous."""
    weight: torch.Tensor = torch.ops.fewbit.expand_fle(
        layout.tensors, layout.n, layout.k, layout.bits, [value for _, value in config]
    )
    return weight


def _expand(
    parts: Sequence[torch.Tensor], n: int, k: int, bits: int, config: Sequence[int]
) -> torch.Tensor:
    (warps,), columns = config, parts[0].shape[1]
    weight = parts[0].new_empty(n, k, dtype=torch.bfloat16)
    expand = expand_nibbles if bits == 4 else expand_planes
    expand[(columns // TILE, -(-n // TILE))](
        *parts, weight.view(torch.int16), n, k, columns, num_warps=warps
    )
    return weight


def _expand_like(
    parts: Sequence[torch.Tensor], n: int, k: int, bits: int, config: Sequence[int]
) -> torch.Tensor:
    return parts[0].new_empty(n, k, dtype=torch.bfloat16)


LIB = torch.library.Library("fewbit", "FRAGMENT")
LIB.define("expand_fle(Tensor[] parts, int n, int k, int bits, int[] config) -> Tensor")
LIB.impl("expand_fle", _expand, "CompositeExplicitAutograd")
torch.library.register_fake("fewbit::expand_fle", _expand_like, lib=LIB)


# ---- compilation, record --------------------------------------------------------------------


def compile(problem: Problem, config: Config, cc: tuple[int, int]) -> tuple[Compiled, ...]:
    """The kernel that expands; the product is torch's."""
    ((_, warps),) = config
    bits = _fle.bits_of(problem)
    types = {**_fle.list_types(bits), "dense": "*i16"}
    # Rows of the result lie as in a dense weight: aligned only if k is a multiple of 16.
    divisible = (*types, "columns", *(("k",) if problem.k % 16 == 0 else ()))
    types |= dict.fromkeys(("n", "k", "columns"), "i32")
    function = expand_nibbles if bits == 4 else expand_planes
    return (compile_variant(Variant(function, types, {}, divisible, warps, 3), cc),)


KERNEL = Kernel(
    "triton_fle_decode",
    refuse,
    prepare,
    launch,
    seconds,
    configs=configs,
    compile=compile,
    source=source_hash(_fle, sys.modules[__name__]),
)
