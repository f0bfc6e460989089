"""Integer products on the CPU: 8-bit inputs times 8-bit integers, exact, by torch's own operators.

kernel       what it runs                    measured at N = K = 2048, one core, microseconds
                                                M = 1    8   32   64    (bf16 dense 450 480 900 1370)
int8_onednn  onednn::qlinear_pointwise            118  174  367  619
int8_mm      aten::_int_mm                        146  426  618  866

Inputs are rounded by `formats/int8_token.py`; the weight is what `Format.integer_form` answers: int8
codes under row scales, with a row offset or without. 4-bit weights over int8 and 8-bit weights are
the same thing here: one byte a weight in memory, beside the stored parts. The fp32 operations and
their order are those of `reference.integer_linear`, bit for bit.

Maths of int8_onednn. The operator wants unsigned inputs: with signed ones it runs a scalar loop on
processors without AMX (measured 60 ms for M = 1, N = K = 2048). So it gets Qx + 128 and the zero point
128, whose share 128·ΣQw it takes off in int32. |Σ (Qx + 128)·Qw| ≤ 255·128·K is below 2^31 up to
K = 65793. It multiplies by s_w[n] itself, once, in fp32; s_x, T and the offset follow here.

int8_mm returns the int32 sums. It lays out the weight anew at every call of two rows or more, and
returns what was in memory before for K = 1 (seen in torch 2.13).

Both operators are tried once in a process on extreme values before they are offered: x86 processors
without VNNI add pairs of products in 16 bits, which saturates. Those that pass have vector code for
both (measured with oneDNN limited to AVX2-VNNI and to AVX-512 VNNI); other architectures are refused
untried, because scalar code would pass as well.
Deliberately not here: groups along K that do not fold into int8, and rounding of inputs by any other
format; dense kernels cover both.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch

from . import cpu
from .activation import RoundedRows, has_integer_form, integer_form
from .errors import NoKernelError
from .format import IntegerForm
from .formats.int8_token import ACTIVATION
from .kernel import Kernel, Problem, Reason
from .packed import PackedTensor
from .reference import integer_linear

_MAX_K = {"int8_onednn": (2**31 - 1) // (255 * 128), "int8_mm": (2**31 - 1) // (127 * 128)}
_MIN_K = {"int8_onednn": 1, "int8_mm": 2}
_BLOCK = 1 << 18  # results finished at once: 1 MB of fp32

# Bytes and multiply-adds a second of one core with AVX-512 VNNI, measured. What every kernel of such a
# problem pays alike (rounding x, one pass over the results) is in none of the estimates.
_BYTES, _MACS = 40e9, 530e9
_RELAID_BYTES = 8e9  # int8_mm from two rows on


@dataclass(frozen=True, eq=False)
class Int8Layout:
    """weight int8 as the operator wants it, scale fp32 [N], offset fp32 [N] or None, zero int32 [N].
    Counted in `cpu.DENSE_BUDGET` while this object lives."""

    weight: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    zero: torch.Tensor


_Sums = Callable[[torch.Tensor, Int8Layout], torch.Tensor]  # int8 codes -> fp32(sums)·s_w


# ---- the two operators ----------------------------------------------------------------------


def _onednn_weight(codes: torch.Tensor) -> torch.Tensor:
    return torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)


def _onednn_sums(codes: torch.Tensor, layout: Int8Layout) -> torch.Tensor:
    shifted = codes.view(torch.uint8) ^ 128  # two's complement: the same as + 128
    product = _opaque_product if torch.compiler.is_compiling() else _onednn_product
    return product(shifted, layout.weight, layout.scale, layout.zero)


def _onednn_product(
    shifted: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> torch.Tensor:
    y: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, weight, scale, zero, None,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return y


# What compilers see of it. Inductor has a lowering of its own for the operator, which fails unless
# the weight is a constant of the graph. Called directly otherwise: no dispatch through Python.
_opaque_product = torch.library.custom_op(
    "fewbit::onednn_int8_product", _onednn_product, mutates_args=()
)


@_opaque_product.register_fake
def _product_like(
    shifted: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> torch.Tensor:
    return scale.new_empty(shifted.shape[0], scale.shape[0])


def _mm_weight(codes: torch.Tensor) -> torch.Tensor:
    return codes.contiguous()


def _mm_sums(codes: torch.Tensor, layout: Int8Layout) -> torch.Tensor:
    return torch._int_mm(codes, layout.weight.T) * layout.scale


_WEIGHT = {"int8_onednn": _onednn_weight, "int8_mm": _mm_weight}
_SUMS: dict[str, _Sums] = {"int8_onednn": _onednn_sums, "int8_mm": _mm_sums}


def _layout(form: IntegerForm, name: str) -> Int8Layout:
    scale = form.scale.reshape(-1)
    offset = None if form.offset is None else form.offset.reshape(-1)
    zero = torch.zeros(scale.shape, dtype=torch.int32)
    return Int8Layout(_WEIGHT[name](form.codes), scale.contiguous(), offset, zero)


def _multiply(rows: RoundedRows, layout: Int8Layout, name: str, dtype: torch.dtype) -> torch.Tensor:
    """y [M, N] in `dtype`. Results are finished in row blocks, which stay in a second-level cache."""
    y = _SUMS[name](rows.codes, layout)
    totals = None if layout.offset is None else rows.sums()
    result = y if dtype == torch.float32 else torch.empty(y.shape, dtype=dtype)
    step = max(1, _BLOCK // y.shape[1])
    for start in range(0, y.shape[0], step):
        block = slice(start, start + step)
        part = y[block].mul_(rows.scale[block])
        if layout.offset is not None and totals is not None:
            part.add_(layout.offset * totals[block])
        if result is not y:
            result[block] = part
    return result


# ---- refusals -------------------------------------------------------------------------------


@cache
def _trial(name: str) -> str | None:
    """What is wrong with the operator on this machine; None if it is exact. It is run once, on
    4 x 512 times 512 x 256 integers, half of them extreme."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        return f"needs AVX2 or AVX-512 with VNNI, got {capability}"
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (4, 512), dtype=torch.int8, generator=generator)
    weight = torch.randint(-128, 128, (256, 512), dtype=torch.int8, generator=generator)
    x[::2], weight[::2] = 127, -128
    weight[::4] = 127
    scale = torch.rand(256, 1, generator=generator) + 0.5
    rows, form = RoundedRows(x, torch.ones(4, 1)), IntegerForm(weight, scale)
    try:
        layout = _layout(form, name)
        y = _multiply(rows, layout, name, torch.float32)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        return f"is not available: {reason[0]}"
    if not torch.equal(y, integer_linear(rows, form)):
        return f"does not return the exact integers on this processor ({capability} without VNNI)"
    return None


def _refuse(name: str, problem: Problem) -> tuple[Reason, ...]:
    return (*cpu.off_cpu(problem), *_no_integers(problem), *_not_here(name, problem))


def _no_integers(problem: Problem) -> Iterator[Reason]:
    """Inputs or weights that are no integers."""
    if problem.activation != ACTIVATION.name:
        yield Reason(
            "ACTIVATION",
            f"multiplies inputs rounded to {ACTIVATION.name}, got {problem.activation}",
            f"quantize with [activations] format = '{ACTIVATION.name}'",
        )
    if problem.n_terms != 1:
        yield Reason("TERMS", f"holds one term, got {problem.n_terms}", "use dense_cached")
    elif not has_integer_form(problem.format, problem.options, problem.k):
        yield Reason(
            "INTEGERS",
            f"needs int8 codes under one scale for a row, which {problem.format} does not have "
            f"with these options",
            "use int_two_level, or int_group with group = 'row' and symmetric = true",
        )


def _not_here(name: str, problem: Problem) -> Iterator[Reason]:
    """Sizes that overflow, operators that fail, memory that is used up."""
    if problem.k > _MAX_K[name]:
        yield Reason(
            "SHAPE_K", f"sums in int32: K <= {_MAX_K[name]}, got {problem.k}", "use dense_cached"
        )
    if problem.k < _MIN_K[name]:
        yield Reason(
            "SHAPE_K", f"needs K >= {_MIN_K[name]}, got {problem.k}", "int8_onednn takes it"
        )
    if problem.device != "cpu" or problem.activation != ACTIVATION.name:
        return
    fault = _trial(name) if problem.described is None else _untried(problem)
    if fault:
        yield Reason("ARCH", fault, "use dense_cached")
    yield from cpu.no_room(problem, problem.n * problem.k)


def _untried(problem: Problem) -> str | None:
    """What `_trial` would find on a described CPU: operators without VNNI are not exact."""
    capability = cpu.capability_of(problem)
    if capability in ("AVX2", "AVX512") and problem.described and "vnni" in problem.described.isa:
        return None
    return f"needs AVX2 or AVX-512 with VNNI, got {capability} without"


# ---- kernels --------------------------------------------------------------------------------


def _prepare(name: str, packed: PackedTensor, dtype: torch.dtype) -> Int8Layout:
    form = integer_form(packed)
    if form is None:
        raise NoKernelError(f"{name}: this weight has no integer form; use dense_cached")
    layout = _layout(form, name)
    cpu.DENSE_BUDGET.take(layout, packed.n_weights)
    return layout


def _launch(name: str, x: torch.Tensor, layout: Int8Layout) -> torch.Tensor:
    return _multiply(ACTIVATION.round(x), layout, name, x.dtype)


def _seconds(name: str, problem: Problem) -> float:
    n, k, m = problem.n, problem.k, problem.m_bucket
    read = n * k / (_RELAID_BYTES if name == "int8_mm" and m > 1 else _BYTES)
    return read + n * k * m / _MACS


def _kernel(name: str, priority: int) -> Kernel:
    return Kernel(
        name,
        partial(_refuse, name),
        partial(_prepare, name),
        partial(_launch, name),
        partial(_seconds, name),
        priority,
        activation=ACTIVATION.name,
    )


KERNELS = (_kernel("int8_onednn", 1), _kernel("int8_mm", 0))
