"""Integer products of many tokens by torch's own `_int_mm`, between our kernels before and after.

kernel             weight                     what runs
int8_library       `triton_int8`'s layout     quantize rows → _int_mm → end
w4a8_library       `triton_w4a8`'s layout     quantize rows, expand to int8 → _int_mm → end

From a few hundred tokens on, tensor cores bind, and a library may keep them busier than our kernels do.
It answers int32 sums [M, N], which are written and read once more: 8 bytes a result. The end is that of
every integer product here (`_integer_gemm.py`), so that results are bit-equal to `triton_int8`'s.

4-bit weights are made int8 in a workspace [N, Kp] at every call, from `int_two_level_gemm.py`'s words:

    program (block of rows, span)    words [BN, H]  →  columns 2H·s … 2H·s + H − 1 and the next H

A layout is shared with the kernel named above: neither makes one of its own. On a GPU `_int_mm` needs
M > 16, N and K multiples of 8. Deliberately not here: a product. Not yet run on a GPU.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from ..quant.cost_model import LATENCY_SECONDS
from ..quant.formats.int8_token import ACTIVATION
from ..quant.kernel import Compiled, Config, Kernel, Problem, Reason
from . import _integer_gemm, _triton, int8_gemm, int_two_level_gemm
from ._compile import Variant, compile_variant, source_hash
from ._integer_gemm import Ends, finish, padded
from ._triton import jit, tl
from .int8_gemm import Int8Weight
from .int_two_level_gemm import TwoLevelWeight, half_of, high_codes, scaled
from .quantize_rows import quantize

# ---- device code ----------------------------------------------------------------------------


@jit(do_not_specialize=("n",))
def expand_int8(
    words, steps, weight, n, k,
    H: tl.constexpr, HIGH: tl.constexpr, PTX: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """int8 weights [N, k] of one span and BN rows. HIGH: group "row", 16 · (code − 8)."""
    span = tl.program_id(1)
    i, byte = tl.arange(0, BN), tl.arange(0, H)[None, :]
    n0 = tl.program_id(0) * BN
    row = tl.minimum(n0 + i, n - 1)
    tile = tl.load(words + (span.to(tl.int64) * n + row)[:, None] * H + byte)
    if HIGH:
        low, high = high_codes(tile, False, PTX), high_codes(tile, True, PTX)
    else:
        both = tl.load(steps + span * n + row)
        low, high = scaled(tile, both, False, PTX), scaled(tile, both >> 16, True, PTX)
    at = weight + row.to(tl.int64)[:, None] * k + span * (2 * H) + byte
    live = (n0 + i < n)[:, None]
    tl.store(at, low, mask=live)
    tl.store(at + H, high, mask=live)


# ---- what may be asked ----------------------------------------------------------------------

_LEAST_M = 17
_ALIGN_N = 8
_PEAK = 0.8  # share of the peak that a library's product reaches; a guess
_GAP = 1.5e-6  # seconds between two kernels; a guess
_BN, _WARPS = 64, 4
_CONFIG: Config = (("bn", _BN), ("warps", _WARPS))


def _refuse(name: str, problem: Problem) -> tuple[Reason, ...]:
    base = int8_gemm.KERNEL if name == "int8_library" else int_two_level_gemm.KERNEL
    return (*base.refuse(problem), *_unfit(problem))


def _unfit(problem: Problem) -> Iterator[Reason]:
    if problem.m_bucket < _LEAST_M:
        yield Reason(
            "SHAPE_M",
            f"torch._int_mm takes M > 16 on a GPU, got a bucket of {problem.m_bucket}",
            "triton_int8 and triton_w4a8 take any M",
        )
    if problem.n % _ALIGN_N:
        yield Reason(
            "SHAPE_N",
            f"torch._int_mm takes N in multiples of {_ALIGN_N}, got {problem.n}",
            "triton_int8 and triton_w4a8 take any N",
        )


def _seconds(
    name: str, problem: Problem, config: Config | None = None, compiled: Compiled | None = None
) -> float:
    """Expansion, product, end, and the gaps between them; 1 s where the machine's rates are unknown."""
    machine = problem.machine
    if machine is None or machine.bandwidth_bytes_per_second is None:
        return 1.0
    m, n, k = problem.m_bucket, problem.n, padded(problem.k)
    peak, bandwidth = machine.peak_ops_per_second.int8, machine.bandwidth_bytes_per_second
    if peak is None:
        return math.inf
    expansion = 0.0
    if name == "w4a8_library":
        expansion = 1.6 * n * k / bandwidth + _GAP + LATENCY_SECONDS
    tiles = -(-m // 128) * 128 * -(-n // 128) * 128  # a library has tiles, too
    product = max(2.0 * tiles * k / (_PEAK * peak), (n * k + m * k + 4 * m * n) / bandwidth)
    return expansion + product + 6 * m * n / bandwidth + _GAP + LATENCY_SECONDS


# ---- launch ---------------------------------------------------------------------------------


def _launch_int8(x: torch.Tensor, layout: Int8Weight) -> torch.Tensor:
    rows = quantize(x, width=layout.weight.shape[1])
    sums = torch._int_mm(rows.codes, layout.weight.T)
    ends = Ends(layout.scale, rows.scale, rows.totals, layout.offset)
    return finish(sums, ends, x.dtype)


def _launch_w4a8(x: torch.Tensor, layout: TwoLevelWeight, config: Config) -> torch.Tensor:
    rows = quantize(x, width=padded(layout.k))
    numbers = [value for _, value in config]
    weight: torch.Tensor = torch.ops.fewbit.expand_int8(layout.words, layout.steps, numbers)
    sums = torch._int_mm(rows.codes, weight.T)
    high = layout.steps.numel() == 0
    ends = Ends(layout.scale, rows.scale, rows.totals, layout.offset, layout.zero, high)
    return finish(sums, ends, x.dtype)


def _expand(words: torch.Tensor, steps: torch.Tensor, config: Sequence[int]) -> torch.Tensor:
    """int8 [N, Kp] of words [spans, N, H]."""
    spans, n, half = words.shape
    weight = _expand_fake(words, steps, config)
    bn, warps = config
    row = steps.numel() == 0
    expand_int8[(-(-n // bn), spans)](
        words, words if row else steps, weight, n, weight.shape[1],
        H=half, HIGH=row, PTX=not _triton.interpreted(), BN=bn, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return weight


def _expand_fake(words: torch.Tensor, steps: torch.Tensor, config: Sequence[int]) -> torch.Tensor:
    spans, n, half = words.shape
    return words.new_empty(n, 2 * half * spans, dtype=torch.int8)


LIB = torch.library.Library("fewbit", "FRAGMENT")
LIB.define("expand_int8(Tensor words, Tensor steps, int[] config) -> Tensor")
LIB.impl("expand_int8", _expand, "CompositeExplicitAutograd")
torch.library.register_fake("fewbit::expand_int8", _expand_fake, lib=LIB)


# ---- records --------------------------------------------------------------------------------


def _compile(problem: Problem, config: Config, cc: tuple[int, int]) -> tuple[Compiled, ...]:
    choice, row = dict(config), problem.options.group == "row"
    variant = Variant(
        expand_int8,
        {
            "words": "*u8",
            "steps": "*u8" if row else "*i32",
            "weight": "*i8",
            "n": "i32",
            "k": "i32",
        },
        {"H": half_of(problem.options), "HIGH": row, "PTX": True, "BN": choice["bn"]},
        ("words", "steps", "weight", "k"),
        choice["warps"],
        1,
    )
    return (compile_variant(variant, cc),)


_SOURCE = source_hash(_integer_gemm, int8_gemm, int_two_level_gemm, sys.modules[__name__])
KERNELS = (
    Kernel(
        name="int8_library",
        refuse=partial(_refuse, "int8_library"),
        prepare=int8_gemm.KERNEL.prepare,
        launch=_launch_int8,
        seconds=partial(_seconds, "int8_library"),
        activation=ACTIVATION.name,
        source=_SOURCE,
    ),
    Kernel(
        name="w4a8_library",
        refuse=partial(_refuse, "w4a8_library"),
        prepare=int_two_level_gemm.KERNEL.prepare,
        launch=_launch_w4a8,
        seconds=partial(_seconds, "w4a8_library"),
        activation=ACTIVATION.name,
        configs=lambda problem: (_CONFIG,),
        compile=_compile,
        source=_SOURCE,
    ),
)
