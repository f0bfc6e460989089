"""Rotates queries by their positions (rotary embedding), which a packed cache leaves to the model.

    x'[c] = x[c]·cos[c] + s(c)·x[c̄]·sin[c]      c < R, the rest as it is   (styles: `quant/kv_write.py`)

    program (token of a row, block of heads)    a tile [heads, D]
      x    [B, H, n, D]   any strides but the last, which is 1
      y    [B, H, n, D]   contiguous

Each product and the sum is rounded to the dtype of x, as the transformers library does. Partners are
loaded, not shuffled: they are in a cache. Keys are rotated where they are stored (`append_kv.py`).
Deliberately not here: where cos and sin come from. Not yet run on a GPU.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..quant.cost_model import Tiling, Work, launch_seconds
from ..quant.errors import NoKernelError
from ..quant.kernel import Compiled, Config, Kernel, Reason, RowsProblem
from ..quant.kv_write import Rope
from ..quant.packed import PackedTensor
from . import append_kv
from ._compile import Variant, compile_variant, pointer, source_hash
from ._triton import jit, off_gpu, tl
from .append_kv import rotated

# ---- device code ----------------------------------------------------------------------------


@jit(do_not_specialize=(
    "n_tokens", "n_heads", "x_row", "x_head", "x_token", "rope_row", "rope_token",
))  # fmt: skip
def rotate_heads(
    x, cos, sin, y, n_tokens, n_heads, x_row, x_head, x_token, rope_row, rope_token,
    D: tl.constexpr, PADDED: tl.constexpr, R: tl.constexpr, STYLE: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token."""
    row, token = (tl.program_id(0) // n_tokens).to(tl.int64), tl.program_id(0) % n_tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channel = tl.arange(0, PADDED)[None, :]
    inside = (head < n_heads)[:, None] & (channel < D)
    at = (row * x_row + head.to(tl.int64) * x_head + token * x_token)[:, None]
    rope_at = row * rope_row + token * rope_token
    value = rotated(x, at, channel, cos + rope_at, sin + rope_at, inside, R, STYLE)
    to = ((row * n_heads + head) * n_tokens + token)[:, None] * D + channel
    tl.store(y + to, value.to(y.dtype.element_ty), mask=inside)


# ---- what may be asked ----------------------------------------------------------------------

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_CHANNELS = 1024
_TILE = 4096  # numbers of a program


@dataclass(frozen=True)
class RopeOptions:
    """Facts of an op "rope". n_heads, head_dim: of x. rotary_dim: R. style: "half" or "pairs"."""

    n_heads: int
    head_dim: int
    rotary_dim: int
    style: str = "half"


def _refuse(problem: RowsProblem) -> tuple[Reason, ...]:
    return tuple(_reasons(problem))


def _reasons(problem: RowsProblem) -> Iterator[Reason]:
    yield from off_gpu(problem)
    if problem.dtype not in _DTYPES:
        told = str(problem.dtype).removeprefix("torch.")
        yield Reason("DTYPE", f"takes float16, bfloat16 and float32, got {told}", "use bfloat16")
    if problem.options.head_dim > _MOST_CHANNELS:
        yield Reason(
            "SHAPE_K",
            f"takes heads of up to {_MOST_CHANNELS} channels, got {problem.options.head_dim}",
            "rotate with torch",
        )


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _configs(problem: RowsProblem) -> tuple[Config, ...]:
    """heads, warps: of a program."""
    options = problem.options
    return tuple(
        (("heads", heads), ("warps", warps))
        for heads in (1, 4, 16, 32)
        if heads * _padded(options.head_dim) <= _TILE
        and (heads == 1 or heads // 4 < options.n_heads)
        for warps in (1, 4)
    )


def _seconds(problem: RowsProblem, config: Config, compiled: Compiled | None = None) -> float:
    """By memory; 1 s for an unknown machine."""
    if problem.machine is None:
        return 1.0
    choice, options = dict(config), problem.options
    moved = 2.0 * problem.m_bucket * problem.k * problem.dtype.itemsize
    work = Work(bytes=moved, ops=4.0 * problem.m_bucket * problem.k, kind="fp32")
    tile = choice["heads"] * options.head_dim
    tiling = Tiling(
        blocks=problem.m_bucket * -(-options.n_heads // choice["heads"]),
        threads=32 * choice["warps"],
        in_flight_bytes=tile * problem.dtype.itemsize,
        registers=min(255, 32 + 3 * tile // (32 * choice["warps"])),
        smem_bytes=0,
    )
    return launch_seconds(work, tiling, problem.machine, compiled)


# ---- launch ---------------------------------------------------------------------------------


def _prepare(packed: PackedTensor, dtype: torch.dtype) -> None:
    raise NoKernelError("rope rotates what a model computed; there is no weight to prepare")


def rotate(
    x: torch.Tensor, rope: Rope, config: Config = (("heads", 1), ("warps", 1))
) -> torch.Tensor:
    """x [B, H, n, D] with its first R channels rotated; a new tensor of its dtype."""
    y: torch.Tensor = torch.ops.fewbit.triton_rope(
        x, rope.cos, rope.sin, rope.style, [value for _, value in config]
    )
    return y


def _run(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str, config: Sequence[int]
) -> torch.Tensor:
    n_rows, n_heads, n_tokens, head_dim = x.shape
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    heads, warps = config
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = (table.to(x.dtype).contiguous() for table in (cos, sin))
    size = cos.shape[-1]
    rotate_heads[(n_rows * n_tokens, -(-n_heads // heads))](
        x, cos, sin, y, n_tokens, n_heads, *x.stride()[:3],
        cos.stride(0) if cos.shape[0] > 1 else 0, size,
        head_dim, _padded(head_dim), size, style, heads,
        num_warps=warps, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def _fake(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str, config: Sequence[int]
) -> torch.Tensor:
    return x.new_empty(x.shape)


LIB = torch.library.Library("fewbit", "FRAGMENT")
LIB.define("triton_rope(Tensor x, Tensor cos, Tensor sin, str style, int[] config) -> Tensor")
LIB.impl("triton_rope", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fewbit::triton_rope", _fake, lib=LIB)


# ---- record ---------------------------------------------------------------------------------


def _compile(problem: RowsProblem, config: Config, cc: tuple[int, int]) -> tuple[Compiled, ...]:
    options, choice = problem.options, dict(config)
    sizes = (
        "n_tokens", "n_heads", "x_row", "x_head", "x_token", "rope_row", "rope_token",
    )  # fmt: skip
    types = dict.fromkeys(("x", "cos", "sin", "y"), pointer(problem.dtype))
    types |= dict.fromkeys(sizes, "i32")
    constants = {
        "D": options.head_dim,
        "PADDED": _padded(options.head_dim),
        "R": options.rotary_dim,
        "STYLE": options.style,
        "HEADS": choice["heads"],
    }
    variant = Variant(
        rotate_heads,
        types,
        constants,
        ("x", "cos", "sin", "y"),
        choice["warps"],
        1,
        fp_fusion=False,
    )
    return (compile_variant(variant, cc),)


KERNEL = Kernel(
    name="triton_rope",
    refuse=_refuse,
    prepare=_prepare,
    launch=rotate,
    seconds=_seconds,
    op="rope",
    configs=_configs,
    compile=_compile,
    source=source_hash(append_kv, sys.modules[__name__]),
)
