"""Expands packed weights to fp16 or bf16, for a library's product: y = x · Ŵᵀ with many tokens.

From a few hundred tokens on, a product is bound by tensor cores, and a library keeps them busier than a
kernel that decodes while it multiplies. So the whole weight is decoded once for each call:

    planes (`_planes.py`)  →  Ŵ [N, K] in a workspace  →  torch's product of two dense matrices

Every weight is code − zero, exact, times the scale in fp32, rounded once: Ŵ is bit-equal to
`reference.dense`. Weights of `int_two_level` are code · scale + offset (`_int_group.py`), all in fp32.

    program id 0   blocks of N rows          program id 1   spans of 128 columns

The workspace comes from torch at each call, which gives the same memory again: none is held between
calls, and one call has one. Traffic: packed bytes are read, dense ones are written and read.
Not yet run on a GPU. Deliberately not here: a product; that is torch's.
"""

import sys
from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional

from ..quant.cost_model import LATENCY_SECONDS, Tiling, Work, launch_seconds
from ..quant.formats.int_group import IntGroupOptions
from ..quant.formats.int_two_level import IntTwoLevelOptions
from ..quant.kernel import Compiled, Config, Kernel, Problem, Reason
from . import _int_group, _planes
from ._compile import Variant, compile_variant, pointer, source_hash
from ._planes import SPAN, Planes
from ._triton import interpreted, jit, tl

# ---- device code ----------------------------------------------------------------------------


@jit(do_not_specialize=("n",))
def expand(
    first, second, third, scale, zero, dense,
    n, rows, stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    PTX: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dense [n, stride]. OFFSET: `zero` holds what is added after the scale."""
    DTYPE: tl.constexpr = dense.dtype.element_ty
    FIRST: tl.constexpr = 16 if BITS >= 4 else 8
    SECOND: tl.constexpr = 16 if BITS == 8 else 8
    SIZE: tl.constexpr = GROUP if GROUP > 0 and GROUP < 128 else 128
    PIECES: tl.constexpr = 128 // SIZE
    FIXED: tl.constexpr = 0 if OFFSET else 1 << (BITS - 1)
    first_row = tl.program_id(0) * BLOCK_N
    row, column = first_row + tl.arange(0, BLOCK_N), tl.arange(0, SIZE)
    span = tl.program_id(1).to(tl.int64)

    # Words of the span.
    words = _planes.block_at(first, span, rows, first_row, FIRST)
    a = tl.load(words + _planes.block(FIRST, BLOCK_N), eviction_policy="evict_first")
    b, c = a, a
    if BITS != 4 and BITS != 2:
        words = _planes.block_at(second, span, rows, first_row, SECOND)
        b = tl.load(words + _planes.block(SECOND, BLOCK_N), eviction_policy="evict_first")
        if BITS == 3 or BITS == 5:
            b = _planes.spread(b)
    if BITS == 7:
        words = _planes.block_at(third, span, rows, first_row, 8)
        c = tl.load(words + _planes.block(8, BLOCK_N), eviction_policy="evict_first")
        c = _planes.spread(c)

    # Values, a group at a time.
    group = row
    if GROUP > 0:
        group = span * PIECES * rows + row
    for piece in tl.static_range(PIECES):
        if ZERO:
            zeros = tl.load(zero + group).to(tl.int32)
            term, stay = _planes.terms(zeros, BITS, tl.float16)
        else:
            term, stay = _planes.fixed_terms(FIXED, BITS, tl.float16)
        values = _planes.values(a, b, c, term, stay, piece, SIZE, BITS, tl.float16, BLOCK_N, PTX)
        weights = values.to(tl.float32) * tl.load(scale + group).to(tl.float32)[:, None]
        if OFFSET:
            weights += tl.load(zero + group)[:, None]
        at = span * 128 + piece * SIZE + column
        live = (row < n)[:, None] & (at < stride)[None, :]
        target = dense + row.to(tl.int64)[:, None] * stride + at[None, :]
        tl.store(target, weights.to(DTYPE), mask=live)
        if GROUP > 0:
            group += rows


# ---- what may be asked ----------------------------------------------------------------------

_TILES = ((32, 2), (32, 4), (64, 4), (128, 4), (128, 8))  # (block_n, warps)
_MOST_REGISTERS = 255  # of a thread; saying so keeps ptxas from spilling a few to fit more blocks
_PRODUCT = 0.75  # share of the peak that a library's product reaches


def refuse(problem: Problem) -> tuple[Reason, ...]:
    """Other devices, dtypes of x, and formats of which no planes are made."""
    return tuple(_reasons(problem))


def _reasons(problem: Problem) -> Iterator[Reason]:
    yield from _int_group.foreign(problem)
    if not isinstance(problem.options, IntGroupOptions | IntTwoLevelOptions):
        text = f"reads int_group and int_two_level, got {problem.format}"
        yield Reason("FORMAT", text, "use reference")


def configs(problem: Problem) -> tuple[Config, ...]:
    """block_n, warps: of a program."""
    return tuple((("block_n", block_n), ("warps", warps)) for block_n, warps in _TILES)


def seconds(problem: Problem, config: Config, compiled: Compiled | None = None) -> float:
    """Estimated time of expanding, and of the library's product after it."""
    machine = problem.machine
    if machine is None:
        return 1.0
    choice, (m, n, k) = dict(config), (problem.m_bucket, problem.n, problem.k)
    rows, columns = _int_group.padded(n, k)
    bits, threads = problem.options.bits, 32 * choice["warps"]
    tile = choice["block_n"] * SPAN
    work = Work(
        bytes=_packed_bytes(problem) + 2 * n * k,
        ops=2.0 * rows * columns,
        kind="fp32",
        alu=rows * columns * (_int_group.DECODE_INSTRUCTIONS[bits] + 4) / 2,
    )
    tiling = Tiling(
        blocks=rows // choice["block_n"] * columns // SPAN,
        threads=threads,
        in_flight_bytes=tile * (bits / 8 + 2) / 2,
        registers=min(255, 40 + tile * 3 // (2 * threads)),
        smem_bytes=2 * tile,
    )
    kind = "fp16" if problem.dtype == torch.float16 else "bf16"
    peak: float | None = getattr(machine.peak_ops_per_second, kind)
    bandwidth = machine.bandwidth_bytes_per_second
    terms = [0.0 if peak is None else 2.0 * m * n * k / (_PRODUCT * peak)]
    if bandwidth is not None:
        terms.append(2.0 * (n * k + m * k + m * n) / bandwidth)
    after = (machine.launch_seconds or 0.0) + LATENCY_SECONDS
    return launch_seconds(work, tiling, machine, compiled) + after + max(terms)


def _packed_bytes(problem: Problem) -> float:
    if isinstance(problem.options, IntGroupOptions):
        return _int_group.packed_bytes(problem)
    rows, columns = _int_group.padded(problem.n, problem.k)
    group = _int_group.group_of(problem.options) or columns
    return rows * (columns / 2 + 8 * columns / group)


# ---- launch ---------------------------------------------------------------------------------

prepare = _int_group.prepare


def launch(x: torch.Tensor, layout: Planes, config: Config) -> torch.Tensor:
    """x [M, K] fp16 or bf16 -> y [M, N] of the same dtype."""
    if x.shape[0] == 0:
        return x.new_empty(0, layout.n)
    return functional.linear(x, dense(layout, x.dtype, config))


def dense(layout: Planes, dtype: torch.dtype, config: Config) -> torch.Tensor:
    """Ŵ [N, K] in `dtype`, fp16 or bf16; rows begin at multiples of 16 elements."""
    weight: torch.Tensor = torch.ops.fewbit.expand_planes(
        layout.planes, layout.scale, layout.zero, layout.n, layout.k, layout.bits, layout.group,
        dtype, [value for _, value in config],
    )  # fmt: skip
    return weight


def _expand(
    planes: Sequence[torch.Tensor],
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    n: int,
    k: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
    config: Sequence[int],
) -> torch.Tensor:
    block_n, warps = config
    spans, rows, _ = planes[0].shape
    weight = _workspace(scale, n, k, dtype)
    offset = zero is not None and zero.dtype == torch.float32
    expand[(-(-n // block_n), spans)](
        *_int_group.three(planes), scale, scale if zero is None else zero, weight,
        n, rows, weight.shape[1],
        BITS=bits, GROUP=group, ZERO=zero is not None and not offset, OFFSET=offset,
        PTX=not interpreted(), BLOCK_N=block_n, num_warps=warps, maxnreg=_MOST_REGISTERS,
    )  # fmt: skip
    return weight[:, :k]


def _workspace(like: torch.Tensor, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return like.new_empty(n, -(-k // _planes.ALIGNED) * _planes.ALIGNED, dtype=dtype)


def _expand_like(
    planes: Sequence[torch.Tensor],
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    n: int,
    k: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
    config: Sequence[int],
) -> torch.Tensor:
    return _workspace(scale, n, k, dtype)[:, :k]


LIB = torch.library.Library("fewbit", "FRAGMENT")
LIB.define(
    "expand_planes(Tensor[] planes, Tensor scale, Tensor? zero, int n, int k, int bits, int group, "
    "ScalarType dtype, int[] config) -> Tensor"
)
LIB.impl("expand_planes", _expand, "CompositeExplicitAutograd")
torch.library.register_fake("fewbit::expand_planes", _expand_like, lib=LIB)


# ---- compilation, record --------------------------------------------------------------------


def compile(problem: Problem, config: Config, cc: tuple[int, int]) -> tuple[Compiled, ...]:
    """The kernel that expands; the product is torch's."""
    choice, options = dict(config), problem.options
    offset = isinstance(options, IntTwoLevelOptions)
    if offset:
        types = _int_group.plane_types(options.bits) | {"scale": "*fp32", "zero": "*fp32"}
    else:
        types = _int_group.weight_types(options)
    types |= {"dense": pointer(problem.dtype)}
    divisible = (*types, "rows", "stride")
    types |= dict.fromkeys(("n", "rows", "stride"), "i32")
    constants = {
        "BITS": options.bits,
        "GROUP": _int_group.group_of(options),
        "ZERO": not offset and not options.symmetric,
        "OFFSET": offset,
        "PTX": True,
        "BLOCK_N": choice["block_n"],
    }
    variant = Variant(
        expand, types, constants, divisible, choice["warps"], 3, max_registers=_MOST_REGISTERS
    )
    return (compile_variant(variant, cc),)


KERNEL = Kernel(
    "triton_expand",
    refuse,
    prepare,
    launch,
    seconds,
    configs=configs,
    compile=compile,
    source=source_hash(_int_group, _planes, sys.modules[__name__]),
)
