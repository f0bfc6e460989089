"""Checks of kernels that treat each row of x by itself, against torch in fp32 and fp64.

quantize_rows       codes, scales and sums of `int8_token`, bit by bit
rmsnorm_quantize,   as the model computes the value, in its dtype; then rounded. Decoded codes
silu_mul_quantize   are compared: one value that falls on the other side of a step costs a code
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from bench.oracle_check import (
    DTYPES,
    Check,
    Lane,
    Place,
    bit_error,
    pick_config,
    planted_rows,
    poison_free_memory,
    poisoned,
    row_error,
)
from fewbit.kernels_triton.hadamard import HadamardLayout
from fewbit.kernels_triton.quantize_rows import (
    FusedRows,
    RmsNorm,
    RmsNormOptions,
    SiluMulOptions,
    SummedRows,
)
from fewbit.quant.dispatch import m_bucket
from fewbit.quant.formats.int8_token import ACTIVATION
from fewbit.quant.hadamard import Hadamard
from fewbit.quant.kernel import Config, Kernel, RowsProblem
from fewbit.quant.timed_case import TOLERANCE

ROWS = (0, 1, 2, 7, 16, 33, 130)
WIDTHS = (72, 328, 1032, 4096)
_FEW_ROWS, _FEW_WIDTHS = (0, 1, 7, 33), (72, 328)
_FEW_STEPS = 4
_STRIDE = 3  # between steps of a lane; it has no divisor in common with the number of spots
_ORDERS = (128, 4096, 12, 14336, 768, 1, 2, 20, 5120, 64, 448, 11008)
_EPS = 1e-5

Error = Callable[[Kernel, RowsProblem, int, Config, Place], float]


@dataclass(frozen=True)
class Oracle:
    """options: the variants of an op's problem. exact: are bits to be equal? by_order: K is one and
    three times the order of the variant; else one of `WIDTHS`."""

    options: tuple[Any, ...]
    error: Error
    exact: bool = False
    by_order: bool = False

    def widths(self, options: Any, reduced: bool) -> tuple[int, ...]:
        """Values of K for a variant."""
        if self.by_order:
            return (options.order,) if reduced else (options.order, 3 * options.order)
        return _FEW_WIDTHS if reduced else WIDTHS


def lanes(kernel: Kernel, place: Place) -> list[Lane]:
    """One lane for each variant and dtype; none for an op that has no oracle here."""
    oracle = ORACLES[kernel.op]
    rows = _FEW_ROWS if place.reduced else ROWS
    pairs = [(options, dtype) for options in oracle.options for dtype in DTYPES]
    found: list[Lane] = []
    for at, (options, dtype) in enumerate(pairs):
        spots = [(m, k) for k in oracle.widths(options, place.reduced) for m in rows]
        n_steps = min(len(spots), _FEW_STEPS) if place.reduced else len(spots)
        order = [spots[(at + _STRIDE * i) % len(spots)] for i in range(n_steps)]
        found.append(
            [
                partial(_check, kernel, options, dtype, spot, at + i, place)
                for i, spot in enumerate(order)
            ]
        )
    return found


def _check(
    kernel: Kernel,
    options: Any,
    dtype: torch.dtype,
    spot: tuple[int, int],
    index: int,
    place: Place,
) -> Check | None:
    m, k = spot
    oracle = ORACLES[kernel.op]
    problem = RowsProblem(kernel.op, options, m_bucket(m), k, dtype, "cuda", place.machine)
    if kernel.refuse(problem):
        return None
    config = pick_config(kernel, problem, index)
    return Check(
        kernel.name,
        config,
        problem.family.replace(" * ", f" M={m} "),
        0.0 if oracle.exact else TOLERANCE[dtype],
        partial(oracle.error, kernel, problem, m, config, place),
    )


# ---- rounding to int8 -----------------------------------------------------------------------


def _quantized(kernel: Kernel, problem: RowsProblem, m: int, config: Config, place: Place) -> float:
    x = planted_rows(m, problem.k, problem.dtype, seed=m)
    poison_free_memory(place.device)
    found: SummedRows = kernel.launch(poisoned(x, place.device, 24), None, config)
    wanted = ACTIVATION.round(x)
    sums = wanted.codes.sum(-1, keepdim=True, dtype=torch.int32)
    pairs = ((found.codes, wanted.codes), (found.scale, wanted.scale), (found.totals, sums))
    return max(bit_error(a, b) for a, b in pairs)


def _normed(kernel: Kernel, problem: RowsProblem, m: int, config: Config, place: Place) -> float:
    x = planted_rows(m, problem.k, problem.dtype, seed=m)
    other = planted_rows(m, problem.k, problem.dtype, seed=m + 1)
    generator = torch.Generator().manual_seed(problem.k)
    gain = (1 + 0.2 * torch.randn(problem.k, generator=generator)).to(problem.dtype)
    options: RmsNormOptions = problem.options
    norm = RmsNorm(gain.to(place.device), _EPS, options.unit_offset)
    given: Any = poisoned(x, place.device, 24)
    if options.residual:
        given, x = (given, poisoned(other, place.device, 8)), x + other
    poison_free_memory(place.device)
    found: FusedRows = kernel.launch(given, norm, config)
    root = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + _EPS)
    scaled = x.float() * root
    if options.unit_offset:
        value = (scaled * (1 + gain.float())).to(problem.dtype)
    else:
        value = scaled.to(problem.dtype) * gain
    error = _fused_error(found, value)
    if options.residual:
        error = max(error, _maybe(found.total, x))
    return error


def _gated(kernel: Kernel, problem: RowsProblem, m: int, config: Config, place: Place) -> float:
    gate, up = (planted_rows(m, problem.k, problem.dtype, seed=m + i) for i in range(2))
    poison_free_memory(place.device)
    given = (poisoned(gate, place.device, 24), poisoned(up, place.device, 8))
    found: FusedRows = kernel.launch(given, None, config)
    return _fused_error(found, functional.silu(gate) * up)


def _fused_error(found: FusedRows, value: torch.Tensor) -> float:
    """Of decoded rows; the sums must be those of the codes."""
    rows = found.rows
    sums = rows.codes.sum(-1, keepdim=True, dtype=torch.int32)
    wanted = ACTIVATION.round(value)
    decoded = rows.codes.float() * rows.scale
    errors = [
        row_error(decoded, wanted.codes.float() * wanted.scale),
        bit_error(rows.totals, sums),
    ]
    return max(errors)


def _maybe(found: torch.Tensor | None, wanted: torch.Tensor) -> float:
    """Of a result that must have been returned, bit by bit."""
    return float("inf") if found is None else bit_error(found, wanted)


# ---- rotation -------------------------------------------------------------------------------


def _hadamard(kernel: Kernel, problem: RowsProblem, m: int, config: Config, place: Place) -> float:
    transform: Hadamard = problem.options
    x = planted_rows(m, problem.k, problem.dtype, seed=m)
    errors = []
    for transposed in (False, True):
        layout = HadamardLayout(transform, transposed)
        poison_free_memory(place.device)
        found = kernel.launch(poisoned(x, place.device, 24), layout, config)
        wide = x.double()
        wanted = transform.apply_transposed(wide) if transposed else transform.apply(wide)
        errors.append(row_error(found, wanted) if found.dtype == x.dtype else float("inf"))
    return max(errors)


ORACLES: dict[str, Oracle] = {
    "quantize_rows": Oracle((None,), _quantized, exact=True),
    "rmsnorm_quantize": Oracle(
        (RmsNormOptions(), RmsNormOptions(residual=True), RmsNormOptions(unit_offset=True)), _normed
    ),
    "silu_mul_quantize": Oracle((SiluMulOptions(),), _gated),
    "hadamard": Oracle(
        tuple(Hadamard(order, 7 if order % 3 else None) for order in _ORDERS),
        _hadamard,
        by_order=True,
    ),
}
