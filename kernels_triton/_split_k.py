"""Sums the parts of a product that was cut along K; device and host.

    program (tile, s)   work[s, m, n] = Σ_k of part s          fp32, one writer for each number
    afterwards          y[m, n] = work[0] + work[1] + ...      in this order, rounded once

There are no atomics, so the same inputs give the same bits. With one part, the product's kernel
writes y itself and this does not run. Rows of `work` and y have a stride that is a multiple of 16.
Deliberately not here: the cut itself, which is `spans_of`.
"""

import torch

from ..quant.cost_model import LATENCY_SECONDS
from ..quant.kernel import Compiled, Device
from ._compile import Variant, compile_variant, pointer
from ._triton import jit, tl

_BLOCK, _WARPS = 1024, 4
_CACHE = 3.0  # the workspace stays in a cache, which is so many times as fast as memory; a guess


@jit(do_not_specialize=("split",))
def add_parts(work, y, count, split, BLOCK: tl.constexpr):
    """y[i] = Σ_s work[s · count + i]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    total = tl.zeros([BLOCK], tl.float32)
    source = work + at
    for _ in range(split):
        total += tl.load(source, mask=live, other=0.0)
        source += count
    tl.store(y + at, total.to(y.dtype.element_ty), mask=live)


def spans_of(spans: int, split: int) -> tuple[int, int]:
    """(spans of each part, parts that have any) when `spans` are cut into at most `split` parts."""
    each = -(-spans // split)
    return each, -(-spans // each)


def workspace(y: torch.Tensor, parts: int) -> torch.Tensor:
    """fp32 [parts, *y.shape] for parts of y [M, stride]; empty if one part is all."""
    return y.new_empty((parts, *y.shape) if parts > 1 else 0, dtype=torch.float32)


def finish(work: torch.Tensor, y: torch.Tensor) -> None:
    """y [M, stride] = Σ_s work[s], stride a multiple of 16; nothing if there is one part."""
    if work.numel():
        count = y.numel()
        blocks = -(-count // _BLOCK)
        add_parts[(blocks,)](work, y, count, work.shape[0], BLOCK=_BLOCK, num_warps=_WARPS)


def finish_seconds(device: Device, count: int, parts: int) -> float:
    """Estimate for `count` results of `parts`: a launch, a latency, and the traffic."""
    if parts == 1:
        return 0.0
    bandwidth = device.bandwidth_bytes_per_second
    moved = 0.0 if bandwidth is None else count * (4 * parts + 2) / (bandwidth * _CACHE)
    return (device.launch_seconds or 0.0) + LATENCY_SECONDS + moved


def compiled(dtype: torch.dtype, cc: tuple[int, int]) -> Compiled:
    """The kernel for results of `dtype`."""
    types = {"work": "*fp32", "y": pointer(dtype), "count": "i32", "split": "i32"}
    divisible = ("work", "y", "count")
    return compile_variant(Variant(add_parts, types, {"BLOCK": _BLOCK}, divisible, _WARPS, 3), cc)
