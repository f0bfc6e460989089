"""Rows of x as 8-bit integers: alone, after a residual sum and an RMS norm, or after a gate.

kernel                     x                          layout     returns
triton_quantize_rows       [M, K]                     None       SummedRows
triton_rmsnorm_quantize    [M, K], or (x, residual)   RmsNorm    FusedRows
triton_silu_mul_quantize   [M, 2K], or (gate, up)     None       FusedRows

Codes and scales are those of `formats/int8_token.py` of the value that the model would have computed in
the dtype of x; `_int8_rows.py` has the maths, the device code and the passes. Σ_k code comes with
them in int32, for products with a row offset. Codes may be made wider than K, columns beyond being
zero, for products that want whole tiles of K.

The fused ones save what the value costs to write and read again: 4 bytes a value. A model that needs
the value itself (a router, an unquantized layer) asks to keep it.

A problem's `options` say what is returned beside the codes; `K` is that of the codes.
Deliberately not here: what quantizes x for kernels that take x̂. Not yet run on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..quant.activation import RoundedRows
from ..quant.errors import NoKernelError
from ..quant.kernel import Compiled, Config, Kernel, RowsProblem
from ..quant.packed import PackedTensor
from . import _int8_rows
from ._compile import source_hash
from ._int8_rows import default_config, empty_results, run

Pair = tuple[torch.Tensor, torch.Tensor]
Results = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class SummedRows(RoundedRows):
    """Rounded rows with the sums of their codes. codes int8 [M, width], where width may exceed K and
    columns beyond K are zero; scale fp32 [M, 1]; totals int32 [M, 1]."""

    totals: torch.Tensor

    def sums(self) -> torch.Tensor:
        """T = scale · totals, fp32 [M, 1]."""
        return self.scale * self.totals


@dataclass(frozen=True, eq=False)
class RmsNorm:
    """gain: [K] in the dtype of x. unit_offset: the factor is 1 + gain, as in Gemma."""

    gain: torch.Tensor
    eps: float
    unit_offset: bool = False


@dataclass(frozen=True)
class FusedRows:
    """value: what was rounded, [M, K] in the dtype of x, if it was to be kept. total: x + residual
    [M, K], if there was a residual."""

    rows: SummedRows
    value: torch.Tensor | None = None
    total: torch.Tensor | None = None


@dataclass(frozen=True)
class RmsNormOptions:
    """Facts of a norm's problem. residual: one is added first. keep: the value is returned too."""

    unit_offset: bool = False
    residual: bool = False
    keep: bool = False


@dataclass(frozen=True)
class SiluMulOptions:
    """Facts of a gated activation's problem. keep: the value is returned too."""

    keep: bool = False


# ---- functions ------------------------------------------------------------------------------


def quantize(x: torch.Tensor, config: Config | None = None, width: int | None = None) -> SummedRows:
    """x fp16 or bf16 [M, K], rounded; codes are `width` columns wide, by default K."""
    m, k = x.shape
    numbers = [value for _, value in config or default_config(m, k)]
    return SummedRows(*torch.ops.fewbit.quantize_rows(x, width or k, numbers))


def rmsnorm_quantize(
    x: torch.Tensor,
    norm: RmsNorm,
    residual: torch.Tensor | None = None,
    *,
    keep: bool = False,
    width: int | None = None,
    config: Config | None = None,
) -> FusedRows:
    """x [M, K], plus `residual` [M, K] if there is one, normalised and rounded."""
    m, k = x.shape
    numbers = [value for _, value in config or default_config(m, k)]
    codes, scale, totals, value, total = torch.ops.fewbit.rmsnorm_quantize(
        x, norm.gain, residual, norm.eps, norm.unit_offset, keep, width or k, numbers
    )
    rows = SummedRows(codes, scale, totals)
    return FusedRows(rows, value if keep else None, None if residual is None else total)


def silu_mul_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    keep: bool = False,
    width: int | None = None,
    config: Config | None = None,
) -> FusedRows:
    """SiLU(gate) · up, both [M, K], rounded."""
    m, k = gate.shape
    numbers = [value for _, value in config or default_config(m, k)]
    codes, scale, totals, value = torch.ops.fewbit.silu_mul_quantize(
        gate, up, keep, width or k, numbers
    )
    return FusedRows(SummedRows(codes, scale, totals), value if keep else None)


# ---- ops ------------------------------------------------------------------------------------


def _quantize_op(x: torch.Tensor, width: int, config: Sequence[int]) -> Results:
    return run("plain", (x, None, None), False, width, config)[:3]


def _quantize_fake(x: torch.Tensor, width: int, config: Sequence[int]) -> Results:
    return empty_results(x, width, False, False)[:3]


def _norm_op(
    x: torch.Tensor,
    gain: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    unit: bool,
    keep: bool,
    width: int,
    config: Sequence[int],
) -> Results:
    if gain.dtype != x.dtype:
        raise NoKernelError(
            f"rmsnorm_quantize: the gain must be {x.dtype} like x, got {gain.dtype}; cast it once"
        )
    return run("norm", (x, residual, gain), keep, width, config, eps, unit)


def _norm_fake(
    x: torch.Tensor,
    gain: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    unit: bool,
    keep: bool,
    width: int,
    config: Sequence[int],
) -> Results:
    return empty_results(x, width, keep, residual is not None)


def _gated_op(
    gate: torch.Tensor, up: torch.Tensor, keep: bool, width: int, config: Sequence[int]
) -> Results:
    return run("gated", (gate, up, None), keep, width, config)[:4]


def _gated_fake(
    gate: torch.Tensor, up: torch.Tensor, keep: bool, width: int, config: Sequence[int]
) -> Results:
    return empty_results(gate, width, keep, False)[:4]


_OPS = (
    (
        "quantize_rows(Tensor x, int width, int[] config) -> (Tensor, Tensor, Tensor)",
        _quantize_op,
        _quantize_fake,
    ),
    (
        "rmsnorm_quantize(Tensor x, Tensor gain, Tensor? residual, float eps, bool unit_offset, "
        "bool keep, int width, int[] config) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _norm_op,
        _norm_fake,
    ),
    (
        "silu_mul_quantize(Tensor gate, Tensor up, bool keep, int width, int[] config) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        _gated_op,
        _gated_fake,
    ),
)
LIB = torch.library.Library("fewbit", "FRAGMENT")
for _signature, _op, _fake in _OPS:
    _name = _signature.partition("(")[0]
    LIB.define(_signature)
    LIB.impl(_name, _op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fewbit::{_name}", _fake, lib=LIB)


# ---- records --------------------------------------------------------------------------------


def _launch_quantize(x: torch.Tensor, layout: None, config: Config) -> SummedRows:
    return quantize(x, config)


def _launch_norm(x: torch.Tensor | Pair, layout: RmsNorm, config: Config) -> FusedRows:
    rows, residual = (x, None) if isinstance(x, torch.Tensor) else x
    return rmsnorm_quantize(rows, layout, residual, config=config)


def _launch_gated(x: torch.Tensor | Pair, layout: None, config: Config) -> FusedRows:
    gate, up = x.chunk(2, -1) if isinstance(x, torch.Tensor) else x
    return silu_mul_quantize(gate, up, config=config)


def _prepare(op: str, packed: PackedTensor, dtype: torch.dtype) -> None:
    raise NoKernelError(f"{op} has no weight to prepare; its layout is RmsNorm(...) or None")


def _compile(problem: RowsProblem, config: Config, cc: tuple[int, int]) -> tuple[Compiled, ...]:
    asked = problem.options
    keep = asked is not None and asked.keep
    norm = problem.op == "rmsnorm_quantize"
    other = problem.op == "silu_mul_quantize" or (norm and asked is not None and asked.residual)
    unit = norm and asked is not None and asked.unit_offset
    return (_int8_rows.compiled(problem, config, cc, other, unit, keep),)


_SOURCE = source_hash(_int8_rows)
KERNELS = tuple(
    Kernel(
        f"triton_{op}",
        _int8_rows.refuse,
        partial(_prepare, op),
        launch,
        _int8_rows.seconds,
        op=op,
        configs=_int8_rows.configs,
        compile=_compile,
        source=_SOURCE,
    )
    for op, launch in (
        ("quantize_rows", _launch_quantize),
        ("rmsnorm_quantize", _launch_norm),
        ("silu_mul_quantize", _launch_gated),
    )
)
