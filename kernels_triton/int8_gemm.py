"""8-bit inputs times 8-bit weights on a GPU: exact integer sums, then the fp32 end of the reference.

    x [M, K] → codes int8, s_x, t (quantize_rows)     y[m, n] = end(Σ_k Qx[m, k] · Qw[n, k])

Any weight with an integer form will do (`Format.integer_form`): int8 codes under row scales, with a row
offset or without. It is stored again, one byte a weight, K padded to whole tiles with zeros:

    weight  int8 [N, Kp]    tile [BN, BK] at rows n0 .. n0 + BN − 1, columns k0 .. k0 + BK − 1
    codes   int8 [M, Kp]    tile [BK, BM], the columns of which are rows m0 .. m0 + BM − 1 of x

Rows beyond M and N are read as the last row and not stored, so that no load has a mask. Both tiles are
contiguous along K, as int8 tensor instructions want them: IGMMA on capability 9.0, IMMA on all others
(Triton 3.6). `_integer_gemm.py` has the order of tiles, the splits of K, and the end.

A model that quantizes rows elsewhere (fused with a norm) calls `multiply`.
Deliberately not here: bias, tensor maps (TMA), persistent programs. Not yet run on a GPU.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..quant.activation import RoundedRows, has_integer_form, integer_form
from ..quant.errors import NoKernelError
from ..quant.format import find_format
from ..quant.formats import int_two_level
from ..quant.formats.int8_token import ACTIVATION
from ..quant.kernel import Compiled, Config, Kernel, Problem, Reason
from ..quant.packed import PackedTensor
from . import _integer_gemm
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


@jit(do_not_specialize=("m", "k_blocks", "splits"))
def int8_product(
    x, w, scale, offset, zero, row_scale, totals, y, partial, m, n, k_blocks, splits,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    OFFSET: tl.constexpr, ZERO: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """One tile of y, or of the sums of one split. k_blocks: of 256 columns."""
    # Which tile, which share of K
    pn, pm = place(tl.program_id(0), tl.cdiv(n, BN), tl.cdiv(m, BM))
    n0, m0, part = pn * BN, pm * BM, tl.program_id(1)
    k = k_blocks * 256
    steps = k // BK
    share = tl.cdiv(steps, splits)
    first = part * share
    # Sums
    column = tl.arange(0, BK)
    row = tl.minimum(n0 + tl.arange(0, BN), n - 1)
    token = tl.minimum(m0 + tl.arange(0, BM), m - 1)
    w_tile, w_at = w + n0.to(tl.int64) * k, (row - n0)[:, None] * k + column[None, :]
    x_tile, x_at = x + m0.to(tl.int64) * k, (token - m0)[None, :] * k + column[:, None]
    sums = tl.zeros([BN, BM], tl.int32)
    for step in range(first, tl.minimum(first + share, steps)):
        weights = tl.load(w_tile + step * BK + w_at)
        inputs = tl.load(x_tile + step * BK + x_at)
        sums = tl.dot(weights, inputs, sums, out_dtype=tl.int32)
    # End
    if splits == 1:
        end(
            sums, m0, n0, m, n, scale, offset, zero, row_scale, totals, y,
            BM, BN, OFFSET, ZERO, HIGH,
        )  # fmt: skip
    else:
        keep(sums, m0, n0, m, n, part, partial, BM, BN)


# ---- what may be asked ----------------------------------------------------------------------


def _refuse(problem: Problem) -> tuple[Reason, ...]:
    reasons = list(refuse_shared(problem))
    if problem.format == int_two_level.FORMAT.name:
        reasons.append(
            Reason(
                "POLICY",
                "would hold int_two_level weights a second time, a byte each, got a format of 4 bits",
                "triton_w4a8 and w4a8_library read them as they are",
            )
        )
    if problem.n_terms == 1 and not has_integer_form(problem.format, problem.options, problem.k):
        reasons.append(
            Reason(
                "INTEGERS",
                f"needs int8 codes under one scale for a row, which {problem.format} does not have "
                f"with these options",
                "use int_two_level, or int_group with group = 'row' and symmetric = true",
            )
        )
    return tuple(reasons)


# BM, BN, BK, warps, stages. All compile without a spilled register for 8.0, 8.9, 9.0, 10.0, 12.0.
_TILES: tuple[Tile, ...] = (
    *((16, 32, bk, 2, s) for bk in (128, 256) for s in (4, 6)),
    *((16, bn, bk, 4, stages) for bn in (64, 128) for bk in (128, 256) for stages in (3, 4, 5)),
    *((32, bn, bk, 4, stages) for bn in (64, 128) for bk in (128, 256) for stages in (3, 4)),
    *((64, bn, 128, warps, s) for bn, warps in ((64, 4), (128, 4), (128, 8)) for s in (3, 4)),
    *((128, 64, 128, 4, s) for s in (3, 4)),
    *((128, 128, bk, 8, s) for bk in (64, 128) for s in (3, 4)),
    *((128, 256, 128, 8, s) for s in (3, 4)),
    *((256, 128, bk, 8, s) for bk in (64, 128) for s in (3, 4)),
    *((256, 64, bk, 8, s) for bk in (64, 128) for s in (3, 4)),
)
_WEIGHT = Operand(bytes=1.0)


def _configs(problem: Problem) -> tuple[Config, ...]:
    return configs_of(problem, _TILES, _WEIGHT)


def _seconds(problem: Problem, config: Config, compiled: Compiled | None = None) -> float:
    return estimate(problem, config, _WEIGHT, compiled)


# ---- layout and launch ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """weight int8 [N, padded K], scale fp32 [N], offset fp32 [N] or None. k: before padding."""

    weight: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    k: int


def _prepare(packed: PackedTensor, dtype: torch.dtype) -> Int8Weight:
    form = integer_form(packed)
    if form is None:
        raise NoKernelError("triton_int8: this weight has no integer form; use reference")
    k = form.codes.shape[-1]
    weight = torch.nn.functional.pad(form.codes, (0, padded(k) - k)).contiguous()
    offset = None if form.offset is None else form.offset.reshape(-1).contiguous()
    return Int8Weight(weight, form.scale.reshape(-1).contiguous(), offset, k)


def multiply(
    rows: RoundedRows, layout: Int8Weight, dtype: torch.dtype, config: Config
) -> torch.Tensor:
    """y [M, N] in `dtype` (fp16 or bf16) of rounded rows [M, K], or [M, padded K] with zeros."""
    y: torch.Tensor = torch.ops.fewbit.int8_gemm(
        codes_of(rows, layout.k), rows.scale, totals_of(rows), layout.weight, layout.scale,
        layout.offset, dtype, [value for _, value in config],
    )  # fmt: skip
    return y


def _launch(x: torch.Tensor, layout: Int8Weight, config: Config) -> torch.Tensor:
    return multiply(quantize(x, width=layout.weight.shape[1]), layout, x.dtype, config)


def _gemm(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    totals: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    dtype: torch.dtype,
    config: Sequence[int],
) -> torch.Tensor:
    y = scale.new_empty(codes.shape[0], weight.shape[0], dtype=dtype)
    ends = Ends(scale, row_scale, totals, offset)
    return run_product(int8_product, (codes, weight), ends, y, config, {})


def _gemm_fake(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    totals: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    dtype: torch.dtype,
    config: Sequence[int],
) -> torch.Tensor:
    return scale.new_empty(codes.shape[0], weight.shape[0], dtype=dtype)


LIB = torch.library.Library("fewbit", "FRAGMENT")
LIB.define(
    "int8_gemm(Tensor codes, Tensor row_scale, Tensor totals, Tensor weight, Tensor scale, "
    "Tensor? offset, ScalarType dtype, int[] config) -> Tensor"
)
LIB.impl("int8_gemm", _gemm, "CompositeExplicitAutograd")
torch.library.register_fake("fewbit::int8_gemm", _gemm_fake, lib=LIB)


# ---- record ---------------------------------------------------------------------------------


@cache
def _has_offset(weight_format: str, options: Any) -> bool:
    """Does the integer form of these options have an offset? Asked with one row of zeros."""
    known = find_format(weight_format)
    specs = known.part_specs((1, 8), options)
    parts = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    form = known.integer_form(parts, (1, 8), options)
    return form is not None and form.offset is not None


def _compile(problem: Problem, config: Config, cc: tuple[int, int]) -> tuple[Compiled, ...]:
    flags = flags_of(_has_offset(problem.format, problem.options), False, False)
    return compile_product(problem, config, cc, int8_product, {"x": "*i8", "w": "*i8"}, flags)


KERNEL = Kernel(
    name="triton_int8",
    refuse=_refuse,
    prepare=_prepare,
    launch=_launch,
    seconds=_seconds,
    activation=ACTIVATION.name,
    configs=_configs,
    compile=_compile,
    source=source_hash(_integer_gemm, sys.modules[__name__]),
)
