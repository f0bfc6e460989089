"""Checks of kernels for products y = x · Ŵᵀ.

    inputs as they are    against fp64 of the same codes: 2e-3 for fp16, 8e-3 for bf16, in each row
    inputs rounded        against `reference.linear`, bit by bit, where the weight has an integer form

Shapes: M of 0, 1, 2, 7, 16, 33, 130 and N × K of 40 × 72, 100 × 328, 1000 × 1032, with outliers in x
and in the weight. Formats: every width and group of `int_group`, with and without zeros, with both
scales; every group and dialect of `int_two_level`; others with their default options. Those of the
packaged recipes come first, so that a run that is cut short has seen them.
"""

import random
from functools import lru_cache, partial
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
    poisoned_parts,
    row_error,
)
from fewbit.quant import reference
from fewbit.quant.activation import integer_form
from fewbit.quant.dispatch import m_bucket
from fewbit.quant.format import dequantize, find_format, formats
from fewbit.quant.formats.fle import Fle, FleOptions, to_fle
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.formats.int_two_level import IntTwoLevelOptions
from fewbit.quant.kernel import Kernel, Problem
from fewbit.quant.packed import PackedTensor, Term
from fewbit.quant.runner import bound_launch
from fewbit.quant.timed_case import TOLERANCE

Layer = tuple[str, Any]  # format and options

ROWS = (0, 1, 2, 7, 16, 33, 130)
SHAPES = ((40, 72), (100, 328), (1000, 1032))  # N, K
_FEW_ROWS, _FEW_SHAPES = (0, 1, 7, 33), SHAPES[:2]
_FEW_STEPS = 4  # of a lane, where checks are few
_STRIDE = 8  # between neighbouring steps of a lane; it has no divisor in common with their number
# On a CPU they get whole rows: torch's product of bf16 rows there reads behind the columns of a view
# (2.13, K = 328, M = 33).
_LIBRARY_PRODUCTS = ("triton_expand", "triton_fle_decode")
_SHIPPED: tuple[Layer, ...] = (
    ("int_group", IntGroupOptions(4, 128)),
    ("int_two_level", IntTwoLevelOptions(4, 128)),
    ("int_group", IntGroupOptions(8, "row")),
    ("int_group", IntGroupOptions(3, 128)),
    ("int_two_level", IntTwoLevelOptions(4, "row")),
)
_FEW: tuple[Layer, ...] = (
    *_SHIPPED[:3],
    ("int_group", IntGroupOptions(3, 32, False, "bf16")),
    ("int_two_level", IntTwoLevelOptions(4, 32, "zero")),
    ("fle4", FleOptions()),
    ("fle3", FleOptions()),
)


def layers(reduced: bool) -> tuple[Layer, ...]:
    """Formats and options to be checked, the packaged recipes' first, the others shuffled."""
    if reduced:
        return _FEW
    groups = (16, 32, 64, 128, "row")
    found: list[Layer] = [
        ("int_group", IntGroupOptions(bits, group, symmetric, scale))
        for bits in range(2, 9)
        for group in groups
        for symmetric in (True, False)
        for scale in ("fp16", "bf16")
    ]
    found += [
        ("int_two_level", IntTwoLevelOptions(4, group, dialect))
        for group in groups[1:]
        for dialect in ("offset", "zero")
    ]
    found += [
        (name, form.Options())
        for name, form in formats().items()
        if name not in ("int_group", "int_two_level")
    ]
    rest = [layer for layer in found if layer not in _SHIPPED]
    random.Random(0).shuffle(rest)
    return (*_SHIPPED, *rest)


def lanes(kernel: Kernel, place: Place) -> list[Lane]:
    """One lane for each layer and dtype; its steps go through the shapes in an order of its own."""
    rows, shapes = (_FEW_ROWS, _FEW_SHAPES) if place.reduced else (ROWS, SHAPES)
    spots = [(m, *shape) for shape in shapes for m in rows]
    n_steps = min(len(spots), _FEW_STEPS) if place.reduced else len(spots)
    pairs = [(layer, dtype) for layer in layers(place.reduced) for dtype in DTYPES]
    stride = _STRIDE if len(spots) % 2 else 3
    return [
        [
            partial(
                _check, kernel, layer, dtype, spots[(at + stride * i) % len(spots)], at + i, place
            )
            for i in range(n_steps)
        ]
        for at, (layer, dtype) in enumerate(pairs)
    ]


def _check(
    kernel: Kernel,
    layer: Layer,
    dtype: torch.dtype,
    spot: tuple[int, int, int],
    index: int,
    place: Place,
) -> Check | None:
    (name, options), (m, n, k) = layer, spot
    problem = Problem(
        format=name,
        options=options,
        n_terms=1,
        m_bucket=m_bucket(m),
        n=n,
        k=k,
        dtype=dtype,
        device="cuda",
        activation=kernel.activation,
        machine=place.machine,
    )
    if any(reason.code != "MEMORY" for reason in kernel.refuse(problem)):
        return None
    config = pick_config(kernel, problem, index)
    exact = kernel.activation is not None and has_integer_form(name, options)
    return Check(
        kernel.name,
        config,
        problem.family.replace(" * ", f" M={m} "),
        0.0 if exact else TOLERANCE[dtype],
        partial(_error, kernel, problem, m, config, place),
    )


def _error(kernel: Kernel, problem: Problem, m: int, config: Any, place: Place) -> float:
    packed = planted_weight(problem.format, problem.options, problem.n, problem.k)
    x = planted_rows(m, problem.k, problem.dtype, seed=m)
    with torch.no_grad():
        layout = kernel.prepare(poisoned_parts(packed, place.device), problem.dtype)
        poison_free_memory(place.device)
        given = poisoned(x, place.device, 24 if m % 2 else 7)
        if place.device == "cpu" and kernel.name in _LIBRARY_PRODUCTS:
            given = x
        y = bound_launch(kernel, config)(given, layout)
        if y.dtype != problem.dtype:
            return float("inf")
        if kernel.activation is None:
            wanted = functional.linear(x.double(), dequantize(packed).double())
            return row_error(y, wanted)
        wanted = reference.linear(x, packed, kernel.activation)
        exact = integer_form(packed) is not None
        return bit_error(y, wanted) if exact else row_error(y, wanted)


@lru_cache(maxsize=8)
def planted_weight(name: str, options: Any, n: int, k: int) -> PackedTensor:
    """A weight [N, K] on the CPU: normal numbers with outliers, rounded to nearest. The first row is
    zero and the second one small."""
    generator = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=generator)
    weight = torch.where(torch.rand(n, k, generator=generator) < 0.002, 12 * weight, weight)
    weight = weight.mul_(k**-0.5)
    weight[0] = 0
    weight[1] *= 1e-2
    form = find_format(name)
    if isinstance(form, Fle):  # rounds nothing
        return to_fle(weight.bfloat16(), form.code_bits)
    padded = functional.pad(weight, (0, form.padded_k(k, options) - k))
    scales = form.fit(padded, options)
    codes, _ = form.round(padded, scales, 0, options)
    return PackedTensor((n, k), (Term(name, options, form.pack(codes, scales, options)),))


@lru_cache(maxsize=1024)
def has_integer_form(name: str, options: Any) -> bool:
    """Can the integer reference multiply such a weight?"""
    return integer_form(planted_weight(name, options, 8, 128)) is not None
