"""Device code and launch of `quantize_rows.py`: rows of values as 8-bit integers.

kind     value v[m, k] that is rounded; each → is one rounding to the dtype of x
plain    x
norm     x·r → · w →              r = 1 / sqrt(mean_k x² + eps) in fp32, as Llama does
         x·r·(1 + w) →            `unit`: as Gemma does
         with `other`, x + other → takes the place of x and is stored as well
gated    x / (1 + e^-x) → · other →

Codes and scales are those of `formats/int8_token.py`, bit for bit, of that v:

    amax = max(max_k |v|, 2^-100)    scale = amax / 127    code = round(v · (127 / amax))

with IEEE divisions. |v| is compared as an integer, fp32 without its sign bit: the order is that of the
values, with NaN above Inf, so that a damaged row gets a scale that is not finite. Rounding to even is
one addition, exact for |y| < 2^22:

    bit   31 30......23 22 21..............8 7......0
          0    150      1  0..............0    code        y + 1.5·2^23, for code ≥ 0
    code = bits − 0x4B400000

Multiplication and addition must not fuse for that: kernels are compiled and launched without fusion.

    program p    rows p·R … p·R + R − 1
    K ≤ BLOCK    the rows stay in registers and are read once
    K > BLOCK    a pass each for Σ x² (norm), amax and codes; passes after the first hit a cache

r and e^-x differ from torch's by ulps of fp32, and sums of squares are added in another order: now and
then v differs from torch's by one rounding. Not here: x in fp32, LayerNorm, other gates.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from ..quant.cost_model import Tiling, Work, launch_seconds
from ..quant.errors import NoKernelError
from ..quant.kernel import Compiled, Config, Reason, RowsProblem
from ._compile import Variant, compile_variant, pointer
from ._triton import jit, off_gpu, tl

# ---- device code ----------------------------------------------------------------------------


@jit
def _loaded(x, row, column, stride, live):
    """fp32 of x[row, column]; zero outside `live`."""
    return tl.load(x + row[:, None] * stride + column[None, :], mask=live, other=0.0).to(tl.float32)


@jit
def _raw(
    x, other, row, column, stride_x, stride_other, live, KIND: tl.constexpr, OTHER: tl.constexpr
):
    """What passes read, as fp32 that x's dtype holds: x, x + other, or SiLU(x) · other."""
    first = _loaded(x, row, column, stride_x, live)
    if OTHER:
        second = _loaded(other, row, column, stride_other, live)
        if KIND == "gated":
            act = tl.div_rn(first, 1.0 + tl.exp(-first)).to(x.dtype.element_ty)
            first = act.to(tl.float32) * second
        else:
            first += second
        first = first.to(x.dtype.element_ty).to(tl.float32)
    return first


@jit
def _value(raw, root, gain, column, k, KIND: tl.constexpr, UNIT: tl.constexpr):
    """v of what was read; root [R] is r."""
    value = raw
    if KIND == "norm":
        weight = tl.load(gain + column, mask=column < k, other=0.0)
        value = raw * root[:, None]
        if UNIT:
            value = value * (1.0 + weight.to(tl.float32))[None, :]
        else:
            value = value.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)[None, :]
        value = value.to(weight.dtype).to(tl.float32)
    return value


@jit
def _root(squares, count, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, count) + eps))


@jit
def _largest(value):
    """max |value| of each row, as the bits of fp32."""
    return tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)


@jit
def _steps(largest):
    """(scale, 127 / amax) of each row."""
    amax = tl.maximum(largest, 0x0D800000).to(tl.float32, bitcast=True)  # 2^-100
    return tl.div_rn(amax, 127.0), tl.div_rn(127.0, amax)


@jit
def _codes(value, inverse):
    """Codes as int32; 0 for what is not a number."""
    y = value * inverse[:, None]
    bits = (y + 12582912.0).to(tl.int32, bitcast=True)
    return tl.where(y == y, bits - 0x4B400000, 0)


@jit
def _store(target, row, column, stride, data, live):
    tl.store(target + row[:, None] * stride + column[None, :], data, mask=live)


@jit(do_not_specialize=("m",))
def round_rows(
    x, other, gain, codes, scale, totals, value, total,
    m, k, width, stride_x, stride_other, count, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, KIND: tl.constexpr,
    OTHER: tl.constexpr, UNIT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """codes [m, width], scale and totals [m]; value and total [m, k] where asked for."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    is_row = (row < m)[:, None]
    root = tl.zeros([ROWS], tl.float32)

    if WHOLE:
        live = is_row & (column < k)[None, :]
        raw = _raw(x, other, row, column, stride_x, stride_other, live, KIND, OTHER)
        if KIND == "norm":
            root = _root(tl.sum(raw * raw, 1), count, eps)
            if OTHER:
                _store(total, row, column, k, raw.to(total.dtype.element_ty), live)
        v = _value(raw, root, gain, column, k, KIND, UNIT)
        step, inverse = _steps(_largest(v))
        found = _codes(v, inverse)
        summed = tl.sum(found, 1)
        _store(codes, row, column, width, found.to(tl.int8), is_row & (column < width)[None, :])
        if KEEP:
            _store(value, row, column, k, v.to(value.dtype.element_ty), live)
    else:
        # Σ x²
        if KIND == "norm":
            squares = tl.zeros([ROWS], tl.float32)
            for start in range(0, k, BLOCK):
                at = start + column
                live = is_row & (at < k)[None, :]
                raw = _raw(x, other, row, at, stride_x, stride_other, live, KIND, OTHER)
                squares += tl.sum(raw * raw, 1)
                if OTHER:
                    _store(total, row, at, k, raw.to(total.dtype.element_ty), live)
            root = _root(squares, count, eps)
        # amax
        largest = tl.zeros([ROWS], tl.int32)
        for start in range(0, k, BLOCK):
            at = start + column
            live = is_row & (at < k)[None, :]
            raw = _raw(x, other, row, at, stride_x, stride_other, live, KIND, OTHER)
            largest = tl.maximum(largest, _largest(_value(raw, root, gain, at, k, KIND, UNIT)))
        step, inverse = _steps(largest)
        # codes
        summed = tl.zeros([ROWS], tl.int32)
        for start in range(0, width, BLOCK):
            at = start + column
            live = is_row & (at < k)[None, :]
            raw = _raw(x, other, row, at, stride_x, stride_other, live, KIND, OTHER)
            v = _value(raw, root, gain, at, k, KIND, UNIT)
            found = _codes(v, inverse)
            summed += tl.sum(found, 1)
            _store(codes, row, at, width, found.to(tl.int8), is_row & (at < width)[None, :])
            if KEEP:
                _store(value, row, at, k, v.to(value.dtype.element_ty), live)
    tl.store(scale + row, step, mask=row < m)
    tl.store(totals + row, summed, mask=row < m)


# ---- what may be asked ----------------------------------------------------------------------

KINDS = {"quantize_rows": "plain", "rmsnorm_quantize": "norm", "silu_mul_quantize": "gated"}
# Values that a warp holds: more would spill (found by compiling). 16 warps have half the registers.
_WARP_VALUES = {"whole": 2048, "wide": 1024, "blocks": 1024}
_WHOLE_K = 16384  # longer rows are read in blocks
_BLOCKS = (2048, 4096, 8192)
_DTYPES = (torch.float16, torch.bfloat16)
_CACHE = 3.0  # a cache is so many times as fast as memory; a guess
_INSTRUCTIONS = {"plain": 12, "norm": 20, "gated": 40}  # for each value, counted roughly


def refuse(problem: RowsProblem) -> tuple[Reason, ...]:
    """Devices without Triton, and x in fp32."""
    return tuple(_reasons(problem))


def _reasons(problem: RowsProblem) -> Iterator[Reason]:
    yield from off_gpu(problem)
    if problem.dtype not in _DTYPES:
        yield Reason(
            "DTYPE",
            f"rounds float16 and bfloat16, got {str(problem.dtype).removeprefix('torch.')}",
            "run the model in bfloat16",
        )


def configs(problem: RowsProblem) -> tuple[Config, ...]:
    """block: columns held at once. rows, warps: of a program."""
    return tuple(_choices(problem.m_bucket, problem.k))


def _choices(m: int, k: int) -> Iterator[Config]:
    for block in _blocks(k):
        for rows in (1, 2, 4):
            for warps in (1, 2, 4, 8, 16) if k <= _WHOLE_K else (2, 4, 8):
                held = "wide" if warps == 16 else "whole" if k <= _WHOLE_K else "blocks"
                fits = 128 <= rows * block // warps <= _WARP_VALUES[held]
                if fits and (rows == 1 or rows * 2 <= m):
                    yield (("block", block), ("rows", rows), ("warps", warps))


def _blocks(k: int) -> tuple[int, ...]:
    return (max(256, 1 << (k - 1).bit_length()),) if k <= _WHOLE_K else _BLOCKS


def default_config(m: int, k: int) -> Config:
    """What runs where nothing was measured: many warps for few rows, whose latency counts."""
    block = _blocks(k)[-1]
    warps = min(16 if k <= _WHOLE_K else 8, max(1, block // (256 if m < 512 else 1024)))
    return (("block", block), ("rows", 1), ("warps", warps))


def seconds(problem: RowsProblem, config: Config, compiled: Compiled | None = None) -> float:
    """Estimated time of one launch."""
    if problem.machine is None:
        return 1.0
    choice, kind = dict(config), KINDS[problem.op]
    elements = problem.m_bucket * problem.k
    inputs = 2 if kind == "gated" else 1
    passes = 1 if choice["block"] >= problem.k else 3 if kind == "norm" else 2
    work = Work(
        bytes=elements * (2 * inputs * (1 + (passes - 1) / _CACHE) + 1),
        ops=0.0,
        kind="fp32",
        alu=float(_INSTRUCTIONS[kind] * elements * passes),
    )
    values = choice["rows"] * choice["block"]
    threads = 32 * choice["warps"]
    tiling = Tiling(
        blocks=math.ceil(problem.m_bucket / choice["rows"]),
        threads=threads,
        in_flight_bytes=2.0 * inputs * values,
        registers=min(255, 32 + 2 * values // threads),
        smem_bytes=1024,
    )
    return launch_seconds(work, tiling, problem.machine, compiled)


# ---- launch ---------------------------------------------------------------------------------


def empty_results(x: torch.Tensor, width: int, keep: bool, sums: bool) -> tuple[torch.Tensor, ...]:
    """codes, scale, totals, value, total for x [M, K]; the last two are empty unless asked for."""
    m, k = x.shape
    if width < k:
        raise NoKernelError(f"codes of rows of {k} values cannot be {width} wide; needs {k}")
    return (
        x.new_empty(m, width, dtype=torch.int8),
        x.new_empty(m, 1, dtype=torch.float32),
        x.new_empty(m, 1, dtype=torch.int32),
        x.new_empty(m, k) if keep else x.new_empty(0),
        x.new_empty(m, k) if sums else x.new_empty(0),
    )


def run(
    kind: str,
    tensors: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    keep: bool,
    width: int,
    config: Sequence[int],
    eps: float = 0.0,
    unit: bool = False,
) -> tuple[torch.Tensor, ...]:
    """One launch over tensors = (x [M, K], other [M, K] or None, gain [K] or None), of one dtype.
    Results as of `empty_results`."""
    x, other, gain = tensors
    m, k = x.shape
    results = empty_results(x, width, keep, kind == "norm" and other is not None)
    if m == 0:
        return results
    block, rows, warps = config
    x = x if x.stride(1) == 1 else x.contiguous()
    second = x if other is None else other if other.stride(1) == 1 else other.contiguous()
    round_rows[((m + rows - 1) // rows,)](
        x, second, x if gain is None else gain, *results,
        m, k, width, x.stride(0), second.stride(0), float(k), eps,
        ROWS=rows, BLOCK=block, WHOLE=block >= width, KIND=kind,
        OTHER=other is not None, UNIT=unit, KEEP=keep,
        num_warps=warps, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip
    return results


def compiled(
    problem: RowsProblem, config: Config, cc: tuple[int, int], other: bool, unit: bool, keep: bool
) -> Compiled:
    """The launch of `config` for codes as wide as the rows."""
    choice, kind = dict(config), KINDS[problem.op]
    value, aligned = pointer(problem.dtype), problem.k % 16 == 0
    sizes = ("m", "k", "width", "stride_x", "stride_other")
    types = dict.fromkeys(("x", "other", "gain"), value)
    types |= {"codes": "*i8", "scale": "*fp32", "totals": "*i32", "value": value, "total": value}
    types |= dict.fromkeys(sizes, "i32") | {"count": "fp32", "eps": "fp32"}
    constants = {
        "ROWS": choice["rows"], "BLOCK": choice["block"], "WHOLE": choice["block"] >= problem.k,
        "KIND": kind, "OTHER": other, "UNIT": unit, "KEEP": keep,
    }  # fmt: skip
    divisible = tuple(name for name in types if types[name].startswith("*"))
    if aligned:
        divisible += sizes[1:]
    variant = Variant(round_rows, types, constants, divisible, choice["warps"], 2, fp_fusion=False)
    return compile_variant(variant, cc)
