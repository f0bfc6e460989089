"""y = x·Q or x·Qᵀ of `quant/hadamard.py`, Q = blockdiag of diag(signs)·H / √order, by tensor cores.

H = A ⊗ B with A [L, L] and B [C, C] of ±1, so a block of x, seen as a matrix X [L, C], becomes

    Y = Aᵀ · X · B / √order          (transposed: A · X · Bᵀ / √order; signs before, or after)

two products of small matrices instead of one of `order` columns. A holds the base matrix (12, 20, …)
and as many twos as make both about equal; both come as operands, padded with zeros to powers of two.

    form "right"   order ≤ 128: A is 1, B is H. program: a tile [rows, C], each row a block of x
    form "both"    program: one block, a tile [L, C], both products without leaving the chip
    form "passes"  a tile of more than 16,384 numbers (4,096 of fp32) does not fit: Aᵀ·X in one launch,
                   by blocks of columns, kept in fp32, and ·B in a second one

    padded tile of 14,336 = 28·2⁹: A [112, 112], B [128, 128], X 128 × 128 with 16 rows of zeros

Precision. ±1 is exact in every type, so only the values are rounded. The first product takes x of 16
bits as it is and sums in fp32. The second takes sums in fp32 as bf16 terms, hi + lo: 16 bits of them,
2⁻¹⁷ relative, below what the result's own rounding loses. fp32 in and out takes three terms: 24 bits.

Deliberately not here: orders whose H has no such A and B of at most 256 (29,568 = 44·84·8), fp64,
gradients. Not yet run on a GPU.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

from ..quant.cost_model import Tiling, Work, launch_seconds
from ..quant.errors import NoKernelError
from ..quant.hadamard import Hadamard, hadamard_matrix, two_factors
from ..quant.kernel import Compiled, Config, Kernel, Reason, RowsProblem
from ._compile import Variant, compile_variant, pointer, source_hash
from ._triton import jit, off_gpu, tl

# ---- device code ----------------------------------------------------------------------------


@jit
def _product(exact, values, total, TERMS: tl.constexpr, FROM_LEFT: tl.constexpr):
    """total + exact · values, or + values · exact. Values of the exact side's type are taken as they
    are (TERMS 0), fp32 ones as `TERMS` terms in bf16."""
    if TERMS == 0:
        total = tl.dot(exact, values, total) if FROM_LEFT else tl.dot(values, exact, total)
    for _ in tl.static_range(TERMS):
        term = values.to(tl.bfloat16)
        values = values - term.to(tl.float32)
        total = tl.dot(exact, term, total) if FROM_LEFT else tl.dot(term, exact, total)
    return total


@jit
def _signed(values, signs, at, inside, SIGNED: tl.constexpr):
    """Values with their signs, exactly, in their type."""
    if SIGNED:
        turned = tl.load(signs + at, mask=inside, other=0).to(tl.float32)
        values = (values.to(tl.float32) * turned).to(values.dtype)
    return values


@jit(do_not_specialize=("n_units", "per_row", "x_row", "y_row"))
def _right(
    x, y, matrix, signs, n_units, per_row, x_row, y_row, scale,
    L: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
    TERMS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """Units [C] of x times a matrix [C, C], `per_row` of them in a row of x. Of the signs [L·C] of a
    block, unit u has those from u % L · C on."""
    unit = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, start = (unit // per_row).to(tl.int64), unit % per_row * C
    live = (unit < n_units)[:, None]
    sign_row = (unit % L * C)[:, None]
    c, k = tl.arange(0, WIDTH)[None, :], tl.arange(0, STEP)
    x_at = x + (row * x_row + start)[:, None]
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in tl.range(0, WIDTH, STEP):
        column = (first + k)[None, :]
        inside = live & (column < C)
        values = tl.load(x_at + column, mask=inside, other=0.0)
        values = _signed(values, signs, sign_row + column, inside, BEFORE)
        part = tl.load(matrix + (first + k)[:, None] * WIDTH + c)
        total = _product(part, values, total, TERMS, False)
    inside = live & (c < C)
    total = _signed(total * scale, signs, sign_row + c, inside, AFTER)
    tl.store(y + (row * y_row + start)[:, None] + c, total.to(y.dtype.element_ty), mask=inside)


@jit(do_not_specialize=("per_row", "x_row", "y_row"))
def _left(
    x, y, left, right, signs, per_row, x_row, y_row, scale,
    L: tl.constexpr, C: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr,
    STEP: tl.constexpr, TERMS: tl.constexpr, RIGHT_TERMS: tl.constexpr, BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
):  # fmt: skip
    """A matrix [L, L] times `COLUMNS` columns of a block [L, C] of x; with RIGHT_TERMS these are all
    columns, and the sums meet a matrix [C, C] from the right as well."""
    per_block: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0) // per_block
    row, start = (block // per_row).to(tl.int64), block % per_row * (L * C)
    x += row * x_row + start
    y += row * y_row + start
    r, k = tl.arange(0, HEIGHT)[:, None], tl.arange(0, STEP)
    column = (tl.program_id(0) % per_block * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    total = tl.zeros([HEIGHT, COLUMNS], tl.float32)
    for first in tl.range(0, HEIGHT, STEP):
        at = (first + k)[:, None] * C + column
        inside = ((first + k) < L)[:, None] & (column < C)
        values = _signed(tl.load(x + at, mask=inside, other=0.0), signs, at, inside, BEFORE)
        part = tl.load(left + r * HEIGHT + (first + k)[None, :])
        total = _product(part, values, total, TERMS, True)
    if RIGHT_TERMS == 0:
        inside = (r < L) & (column < C)
        total = _signed(total * scale, signs, r * C + column, inside, AFTER)
        tl.store(y + r * C + column, total.to(y.dtype.element_ty), mask=inside)
    else:
        across = tl.arange(0, COLUMNS)[:, None] * COLUMNS
        for first in tl.range(0, COLUMNS, STEP, num_stages=1):
            at = (first + k)[None, :]
            part = tl.load(right + across + at)
            summed = tl.zeros([HEIGHT, STEP], tl.float32)
            summed = _product(part, total, summed, RIGHT_TERMS, False) * scale
            inside = (r < L) & (at < C)
            summed = _signed(summed, signs, r * C + at, inside, AFTER)
            tl.store(y + r * C + at, summed.to(y.dtype.element_ty), mask=inside)


# ---- what may be asked ----------------------------------------------------------------------

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST = 256  # order of a factor
_ONE_FACTOR = 128  # orders up to here are one product
_TILES = {2: 1 << 14, 4: 1 << 12}  # numbers that a program holds, by their bytes
_STAGES = 2
_STEP = 32  # columns or rows of a matrix that are fetched at once


def _terms(dtype: torch.dtype) -> tuple[int, int]:
    """bf16 terms that x, and sums in fp32, are cut into; 0: x is taken as it is."""
    return (3, 3) if dtype == torch.float32 else (0, 2)


@lru_cache(maxsize=4096)
def _cut(order: int) -> tuple[int, int] | None:
    """L and C."""
    if order <= _ONE_FACTOR:
        return 1, order
    factors = two_factors(order, _LARGEST)
    return None if factors is None else (factors[0].shape[0], factors[1].shape[0])


def _refuse(problem: RowsProblem) -> tuple[Reason, ...]:
    return tuple(_reasons(problem))


def _reasons(problem: RowsProblem) -> Iterator[Reason]:
    yield from off_gpu(problem)
    order = problem.options.order
    if problem.dtype not in _DTYPES:
        told = str(problem.dtype).removeprefix("torch.")
        yield Reason(
            "DTYPE",
            f"transforms float16, bfloat16 and float32, got {told}",
            "use quant/hadamard.py",
        )
    if problem.k % order:
        yield Reason("SHAPE_K", f"needs K a multiple of {order}, got {problem.k}", "pad K")
    if _cut(order) is None:
        yield Reason(
            "SHAPE_K",
            f"needs H of two factors of at most {_LARGEST}, which order {order} does not have",
            "use quant/hadamard.py, or blocks of another order",
        )


# ---- configs --------------------------------------------------------------------------------


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _form(order: int, dtype: torch.dtype) -> str:
    left, right = _cut(order) or (0, 0)
    if left == 1:
        return "right"
    return "both" if _padded(left) * _padded(right) <= _TILES[dtype.itemsize] else "passes"


def _configs(problem: RowsProblem) -> tuple[Config, ...]:
    """rows: blocks of x in a program, in the form "right"; of parts of them in the last pass. columns:
    in a program of the first pass. warps: of a program. 0: does not apply."""
    order = problem.options.order
    form, (left, right) = _form(order, problem.dtype), _cut(order) or (1, 1)
    height, width = _padded(left), _padded(right)
    if form == "both":
        tiles = [(0, 0, height * width)]
    elif form == "right":
        tiles = [(rows, 0, rows * width) for rows in (16, 32, 64, 128)]
    else:
        tiles = [
            (rows, columns, max(rows * width, height * columns))
            for rows in (16, 32)
            for columns in (16, 32, 64)
        ]
    return tuple(
        (("columns", columns), ("rows", rows), ("warps", warps))
        for rows, columns, numbers in tiles
        for warps in (1, 2, 4, 8, 16)
        if _fits(numbers, warps, problem.dtype)
    )


def _fits(numbers: int, warps: int, dtype: torch.dtype) -> bool:
    """Does a tile stay in registers, and is there enough of it? (Compiled for five capabilities.)"""
    most = 512 if dtype == torch.float32 else 2048
    return 128 * warps <= numbers <= most * warps and (warps < 16 or dtype != torch.float32)


def default_config(hadamard: Hadamard, dtype: torch.dtype) -> Config:
    """What runs where nothing was chosen."""
    problem = RowsProblem("hadamard", hadamard, 64, hadamard.order, dtype, "cuda")
    found = _configs(problem)
    return found[len(found) // 2]


# ---- launch ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class HadamardLayout:
    """What a transform is derived from; matrices are made at the first launch on a device."""

    hadamard: Hadamard
    transposed: bool = False


def _prepare(hadamard: Any, dtype: torch.dtype, transposed: bool = False) -> HadamardLayout:
    """hadamard: a `Hadamard`. transposed: x·Qᵀ, the inverse, instead of x·Q."""
    if _cut(hadamard.order) is None:
        raise NoKernelError(f"no two factors of H of order {hadamard.order}; use quant/hadamard.py")
    return HadamardLayout(hadamard, transposed)


@lru_cache(maxsize=64)
def _operands(
    layout: HadamardLayout, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """What multiplies from the left [L, L], from the right [C, C], both padded; signs int8 [order]."""
    order = layout.hadamard.order
    found = two_factors(order, _LARGEST) if order > _ONE_FACTOR else None
    one = torch.ones(1, 1, dtype=torch.int8)
    left, right = found or (one, hadamard_matrix(order))
    left, right = (left, right.T) if layout.transposed else (left.T, right)
    first = torch.bfloat16 if dtype == torch.float32 else dtype
    with torch.inference_mode(False):  # kept beyond the call that made them
        matrices = [
            functional.pad(matrix, (0, _padded(len(matrix)) - len(matrix)) * 2).to(device, kind)
            for matrix, kind in ((left, first), (right, first if found is None else torch.bfloat16))
        ]
        return (*(matrix.contiguous() for matrix in matrices), layout.hadamard.signs().to(device))


def transform(
    x: torch.Tensor, layout: HadamardLayout, config: Config | None = None
) -> torch.Tensor:
    """x [..., K] fp16, bf16 or fp32 -> the same shape and dtype."""
    chosen = config or default_config(layout.hadamard, x.dtype)
    left, right, signs = _operands(layout, x.dtype, x.device)
    order = layout.hadamard.order
    sizes = _cut(order) or (0, 0)
    where = "none" if layout.hadamard.seed is None else "after" if layout.transposed else "before"
    rows = x.reshape(-1, x.shape[-1])
    y: torch.Tensor = torch.ops.fewbit.triton_hadamard(
        rows, left, right, signs, [order, *sizes], where, [value for _, value in chosen]
    )
    return y.view(x.shape)


def _run(
    x: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    signs: torch.Tensor,
    sizes: Sequence[int],
    where: str,
    config: Sequence[int],
) -> torch.Tensor:
    """The op: x [M, K] -> y [M, K]."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y
    x = x if x.stride(-1) == 1 else x.contiguous()
    order, height, width = sizes
    columns, rows, warps = config
    m, k = x.shape
    n_blocks, terms = m * k // order, _terms(x.dtype)
    before, after = where == "before", where == "after"
    form = _form(order, x.dtype)
    if form == "right":
        _right[(-(-n_blocks // rows),)](
            x, y, right, signs, n_blocks, k // order, x.stride(0), k, order**-0.5,
            1, width, rows, right.shape[0], min(_STEP, right.shape[0]), terms[0], before, after,
            num_warps=warps, num_stages=_STAGES, enable_fp_fusion=True,
        )  # fmt: skip
        return y
    both = form == "both"
    between = y if both else torch.empty(m, k, dtype=torch.float32, device=x.device)
    across = right.shape[0] if both else columns
    _left[(n_blocks * -(-width // across),)](
        x, between, left, right, signs, k // order, x.stride(0), k, order**-0.5 if both else 1.0,
        height, width, left.shape[0], across, min(_STEP, across, left.shape[0]), terms[0],
        terms[1] if both else 0, before, after and both,
        num_warps=warps, num_stages=_STAGES, enable_fp_fusion=True,
    )  # fmt: skip
    if not both:
        n_units = n_blocks * height
        _right[(-(-n_units // rows),)](
            between, y, right, signs, n_units, k // width, k, k, order**-0.5,
            height, width, rows, right.shape[0], min(_STEP, right.shape[0]), terms[1], False, after,
            num_warps=warps, num_stages=_STAGES, enable_fp_fusion=True,
        )  # fmt: skip
    return y


_LIBRARY = torch.library.Library("fewbit", "FRAGMENT")
_LIBRARY.define(
    "triton_hadamard(Tensor x, Tensor left, Tensor right, Tensor signs, int[] sizes, str signed, "
    "int[] config) -> Tensor"
)
_LIBRARY.impl("triton_hadamard", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("fewbit::triton_hadamard", lib=_LIBRARY)
def _fake(
    x: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    signs: torch.Tensor,
    sizes: Sequence[int],
    signed: str,
    config: Sequence[int],
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# ---- estimates ------------------------------------------------------------------------------

_LANES = 7  # half of the lane instructions for each number beside products, a guess


def _seconds(problem: RowsProblem, config: Config, compiled: Compiled | None = None) -> float:
    """By `cost_model`; 1 s for an unknown machine. Two passes are taken as one, moving more."""
    if problem.machine is None:
        return 1.0
    choice, order = dict(config), problem.options.order
    form, (left, right) = _form(order, problem.dtype), _cut(order) or (1, 1)
    height, width = _padded(left), _padded(right)
    numbers = float(problem.m_bucket * problem.k)
    padding = height * width / order if form != "right" else width / order
    first, second = _terms(problem.dtype)
    first = max(1, first)
    products = first * width if form == "right" else first * height + second * width
    moved = 2 * problem.dtype.itemsize + (8 if form == "passes" else 0)
    tile = {
        "right": choice["rows"] * width,
        "both": height * width,
        "passes": height * choice["columns"],
    }[form]
    threads = 32 * choice["warps"]
    work = Work(
        bytes=numbers * moved,
        ops=2.0 * numbers * padding * products,
        kind="bf16",
        alu=numbers * padding * _LANES,
    )
    tiling = Tiling(
        blocks=max(1, round(numbers * padding / tile)),
        threads=threads,
        in_flight_bytes=float(tile * problem.dtype.itemsize),
        registers=min(255, (1 << 16) // threads, 48 + 2 * tile // threads),
        smem_bytes=min(4 * tile, 96 << 10),
    )
    return launch_seconds(work, tiling, problem.machine, compiled)


# ---- compilation without a GPU --------------------------------------------------------------


def _compile(problem: RowsProblem, config: Config, cc: tuple[int, int]) -> tuple[Compiled, ...]:
    """Signs come before, as in `apply`."""
    choice, order, dtype = dict(config), problem.options.order, problem.dtype
    form, (left, right) = _form(order, problem.dtype), _cut(order) or (1, 1)
    height, width = _padded(left), _padded(right)
    first, second = _terms(dtype)
    exact = pointer(torch.bfloat16 if dtype == torch.float32 else dtype)
    sizes = {"L": left, "C": right}
    rows = {"ROWS": choice["rows"], "WIDTH": width, "STEP": min(_STEP, width)}
    if form == "right":
        types = _types(_right, dtype, dtype, {"matrix": exact})
        constants = sizes | rows | {"TERMS": first, "BEFORE": True, "AFTER": False}
        return (_compiled(_right, types, constants, choice["warps"], cc),)
    both = form == "both"
    across = width if both else choice["columns"]
    between = dtype if both else torch.float32
    types = _types(_left, dtype, between, {"left": exact, "right": pointer(torch.bfloat16)})
    constants = sizes | {"HEIGHT": height, "COLUMNS": across, "STEP": min(_STEP, across, height)}
    constants |= {"TERMS": first, "RIGHT_TERMS": second if both else 0}
    constants |= {"BEFORE": True, "AFTER": False}
    found = _compiled(_left, types, constants, choice["warps"], cc)
    if both:
        return (found,)
    types = _types(_right, between, dtype, {"matrix": pointer(torch.bfloat16)})
    constants = sizes | rows | {"TERMS": second, "BEFORE": False, "AFTER": False}
    return found, _compiled(_right, types, constants, choice["warps"], cc)


def _types(
    function: Any, of_x: torch.dtype, of_y: torch.dtype, matrices: dict[str, str]
) -> dict[str, str]:
    known = {"x": pointer(of_x), "y": pointer(of_y), "signs": "*i8", "scale": "fp32"} | matrices
    return {name: known.get(name, "i32") for name in function.arg_names if not name.isupper()}


def _compiled(
    function: Any, types: dict[str, str], constants: dict[str, Any], warps: int, cc: tuple[int, int]
) -> Compiled:
    aligned = tuple(name for name, kind in types.items() if kind.startswith("*"))
    return compile_variant(Variant(function, types, constants, aligned, warps, _STAGES), cc)


KERNEL = Kernel(
    name="triton_hadamard",
    refuse=_refuse,
    prepare=_prepare,
    launch=transform,
    seconds=_seconds,
    op="hadamard",
    configs=_configs,
    compile=_compile,
    source=source_hash(sys.modules[__name__]),
)
