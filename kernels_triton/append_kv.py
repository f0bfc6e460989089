"""Rotates new keys, encodes keys and values in `int4_head`, and writes them into their pages, at once.

    program (token of a row, side, block of heads)   tiles [heads, D/2] of even and of odd channels
      position p = first + i → page table[row, p // 64], slot p % 64
      codes    [pages, heads, 64, D/2]   byte j = code[2j] | code[2j + 1] << 4
      scale    [pages, heads, 64]        fp16, as the minimum

so a byte is made where its two channels are, and nothing is written but the parts.

Rotation (keys only, first R channels) rounds each product and the sum to the dtype of the keys, as
`quant/kv_write.py` does; partners are loaded, not shuffled: they are in a cache. What follows is that
of `formats/int4_head.py` in fp32, operation by operation: differences, IEEE divisions, roundings of
scale and minimum to fp16, round half to even by adding and subtracting 1.5·2²³ (after the clamp to
0 … 15, which commutes with it). Multiplications and additions must not fuse; the launch says so.

fit = "range"    bit-equal to the format
fit = "search"   the same candidates and the same least squares. Only the order of sums over D differs,
                 which can move a scale or minimum by an ulp of fp16, and the choice between candidates
                 whose errors are equal but for rounding; the error of the vector is the same up to 1e-4

`first` is a number, or a tensor on the device that is read when the kernel runs, so that one CUDA graph
serves every step. NaN makes scale and minimum NaN and codes 0, as in the format.

Deliberately not here: which pages exist (`quant/kv_pages.py`), and queries: a model rotates its own.
Not yet run on a GPU.
"""

import struct
import sys
from collections.abc import Iterator, Sequence

import torch

from ..quant.cost_model import Tiling, Work, launch_seconds
from ..quant.errors import NoKernelError
from ..quant.formats import int4_head
from ..quant.kernel import Compiled, Config, Kernel, Reason, RowsProblem
from ..quant.kv_view import Paged
from ..quant.kv_write import Rope
from ..quant.packed import PackedTensor
from ._compile import Variant, compile_variant, pointer, source_hash
from ._triton import jit, off_gpu, tl

# ---- device code ----------------------------------------------------------------------------


def _single(number: float) -> float:
    """Rounded to fp32, as torch holds the shares of candidates."""
    rounded: float = struct.unpack("f", struct.pack("f", number))[0]
    return rounded


_BELOW = tuple(map(_single, int4_head._LOW))
_ABOVE = tuple(map(_single, int4_head._HIGH))
_BOTH = tuple(_single(below + above) for below, above in zip(_BELOW, _ABOVE, strict=True))
_SHARES = tl.constexpr(tuple(zip(_BOTH, _BELOW, strict=True)))
_TINY = tl.constexpr(2.0**-24)  # smallest positive fp16 number
_MOST = tl.constexpr(65504.0)
_ROUND = tl.constexpr(12582912.0)  # 1.5·2²³


@jit
def _stored(scale, minimum):
    """Both as fp16 holds them, in fp32."""
    minimum = tl.minimum(tl.maximum(minimum, -_MOST), _MOST)
    return (
        tl.maximum(scale.to(tl.float16).to(tl.float32), _TINY),
        minimum.to(tl.float16).to(tl.float32),
    )


@jit
def _codes(x, scale, minimum):
    """Nearest codes, as fp32; 0 for what is not a number."""
    y = tl.div_rn(x - minimum[:, None], tl.broadcast_to(scale[:, None], x.shape))
    y = tl.minimum(tl.maximum(tl.where(y == y, y, 0.0), 0.0), 15.0)
    return (y + _ROUND) - _ROUND


@jit
def _total(even, odd, inside):
    return tl.sum(tl.where(inside, even + odd, 0.0), 1)


@jit
def _line(even, odd, inside, scale, minimum, D: tl.constexpr):
    """Scale and minimum of least squared error for the codes that `scale` and `minimum` give."""
    code, other = _codes(even, scale, minimum), _codes(odd, scale, minimum)
    centre = tl.div_rn(_total(code, other, inside), D * 1.0)
    code, other = code - centre[:, None], other - centre[:, None]
    spread = _total(code * code, other * other, inside)
    mean = tl.div_rn(_total(even, odd, inside), D * 1.0)
    usable = spread > 0
    slope = tl.div_rn(_total(code * even, other * odd, inside), tl.where(usable, spread, 1.0))
    new_scale, new_minimum = _stored(slope, mean - slope * centre)
    usable = usable & (new_scale < float("inf"))
    return tl.where(usable, new_scale, scale), tl.where(usable, new_minimum, minimum)


@jit
def _error(even, odd, inside, scale, minimum):
    first = _codes(even, scale, minimum) * scale[:, None] + minimum[:, None] - even
    second = _codes(odd, scale, minimum) * scale[:, None] + minimum[:, None] - odd
    return _total(first * first, second * second, inside)


@jit
def _fitted(even, odd, inside, D: tl.constexpr, SEARCH: tl.constexpr):
    """Scale and minimum of each row of [rows, D/2] even and odd channels, as fp16 holds them."""
    low = tl.min(tl.where(inside, tl.minimum(even, odd), float("inf")), 1)
    high = tl.max(tl.where(inside, tl.maximum(even, odd), -float("inf")), 1)
    scale, minimum = _stored(tl.div_rn(high - low, 15.0), low)
    if SEARCH:
        middle, half = (low + high) * 0.5, (high - low) * 0.5
        least = _error(even, odd, inside, scale, minimum)
        for i in tl.static_range(5):
            width, below = _SHARES[i][0], _SHARES[i][1]
            new_scale, new_minimum = _stored(tl.div_rn(half * width, 15.0), middle - half * below)
            new_scale, new_minimum = _line(even, odd, inside, new_scale, new_minimum, D)
            error = _error(even, odd, inside, new_scale, new_minimum)
            better = error < least
            least = tl.where(better, error, least)
            scale = tl.where(better, new_scale, scale)
            minimum = tl.where(better, new_minimum, minimum)
    return scale, minimum


@jit
def rotated(x, at, channel, cos, sin, inside, R: tl.constexpr, STYLE: tl.constexpr):
    """Channels of x as the model has them after rotation, fp32."""
    dtype: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + at + channel, mask=inside, other=0.0).to(tl.float32)
    if STYLE != "none":
        turned = channel < R
        if STYLE == "half":
            negative = channel < R // 2
            partner = tl.where(negative, channel + R // 2, channel - R // 2)
        else:
            negative = channel % 2 == 0
            partner = channel ^ 1
        other = tl.load(x + at + partner, mask=inside & turned, other=0.0).to(tl.float32)
        cosine = tl.load(cos + channel, mask=turned, other=0.0).to(tl.float32)
        sine = tl.load(sin + channel, mask=turned, other=0.0).to(tl.float32)
        first = (value * cosine).to(dtype).to(tl.float32)
        second = (tl.where(negative, -other, other) * sine).to(dtype).to(tl.float32)
        value = tl.where(turned, (first + second).to(dtype).to(tl.float32), value)
    return value


@jit
def _write(
    x, at, head, live, cos, sin, codes, scales, minima, place,
    D: tl.constexpr, PAIRS: tl.constexpr, SEARCH: tl.constexpr, R: tl.constexpr, STYLE: tl.constexpr,
):  # fmt: skip
    """Vectors `at` [heads] of x into slots `place` [heads]."""
    pair = tl.arange(0, PAIRS)[None, :]
    inside = live[:, None] & (pair < D // 2)
    even = rotated(x, at[:, None], 2 * pair, cos, sin, inside, R, STYLE)
    odd = rotated(x, at[:, None], 2 * pair + 1, cos, sin, inside, R, STYLE)
    damaged = tl.max(tl.where((even == even) & (odd == odd), 0.0, 1.0), 1) > 0
    even = tl.minimum(tl.maximum(even, -_MOST), _MOST)
    odd = tl.minimum(tl.maximum(odd, -_MOST), _MOST)
    scale, minimum = _fitted(even, odd, inside, D, SEARCH)
    code = _codes(even, scale, minimum).to(tl.int32) | (
        _codes(odd, scale, minimum).to(tl.int32) << 4
    )
    code = tl.where(damaged[:, None], 0, code)
    tl.store(codes + place[:, None] * (D // 2) + pair, code.to(tl.uint8), mask=inside)
    nan = float("nan")
    tl.store(scales + place, tl.where(damaged, nan, scale).to(tl.float16), mask=live)
    tl.store(minima + place, tl.where(damaged, nan, minimum).to(tl.float16), mask=live)


@jit(do_not_specialize=(
    "n_new", "kv_heads", "first", "first_stride", "table_row", "key_row", "key_head", "key_token",
    "value_row", "value_head", "value_token", "rope_row", "rope_token",
))  # fmt: skip
def _append(
    keys, values, cos, sin, key_codes, key_scale, key_minimum, value_codes, value_scale,
    value_minimum, table, counts,
    n_new, kv_heads, first, first_stride, table_row, key_row, key_head, key_token,
    value_row, value_head, value_token, rope_row, rope_token,
    D: tl.constexpr, PAIRS: tl.constexpr, VALUE_D: tl.constexpr, VALUE_PAIRS: tl.constexpr,
    KEY_SEARCH: tl.constexpr, VALUE_SEARCH: tl.constexpr, R: tl.constexpr, STYLE: tl.constexpr,
    COUNTED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row, token = (tl.program_id(0) // n_new).to(tl.int64), tl.program_id(0) % n_new
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    live = head < kv_heads
    position = first + token
    if COUNTED:
        position += tl.load(counts + row * first_stride).to(tl.int32)
    page = tl.load(table + row * table_row + position // 64)
    place = (page * kv_heads + head) * 64 + position % 64
    if tl.program_id(1) == 0:
        rope_at = row * rope_row + token * rope_token
        _write(
            keys, row * key_row + head.to(tl.int64) * key_head + token * key_token, head, live,
            cos + rope_at, sin + rope_at, key_codes, key_scale, key_minimum, place,
            D, PAIRS, KEY_SEARCH, R, STYLE,
        )  # fmt: skip
    else:
        _write(
            values, row * value_row + head.to(tl.int64) * value_head + token * value_token, head,
            live, cos, sin, value_codes, value_scale, value_minimum, place,
            VALUE_D, VALUE_PAIRS, VALUE_SEARCH, 0, "none",
        )  # fmt: skip


# ---- what may be asked ----------------------------------------------------------------------

_FORMAT = "int4_head"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_CHANNELS = 1024
_VALUES = 32 * 8  # pairs of channels of a warp; more do not spill, but take long to compile


def _refuse(problem: RowsProblem) -> tuple[Reason, ...]:
    return tuple(_reasons(problem))


def _reasons(problem: RowsProblem) -> Iterator[Reason]:
    yield from off_gpu(problem)
    options = problem.options
    if (options.key, options.value) != (_FORMAT, _FORMAT):
        yield Reason(
            "FORMAT",
            f"writes keys and values in {_FORMAT}, got {options.key} and {options.value}",
            "append_torch takes every page format",
        )
    if problem.dtype not in _DTYPES:
        told = str(problem.dtype).removeprefix("torch.")
        yield Reason("DTYPE", f"takes float16, bfloat16 and float32, got {told}", "use bfloat16")
    for side, size in (("keys", options.head_dim), ("values", options.value_dim)):
        if size % 2 or not 2 <= size <= _MOST_CHANNELS:
            yield Reason(
                "SHAPE_K",
                f"takes {side} of 2 to {_MOST_CHANNELS} channels, an even number, got {size}",
                "append_torch takes every size that the format does",
            )
    if options.rotary_dim % 2 or options.rotary_dim > options.head_dim:
        yield Reason(
            "SHAPE_K",
            f"rotates an even number of channels up to {options.head_dim}, "
            f"got {options.rotary_dim}",
            "rotate before",
        )


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _configs(problem: RowsProblem) -> tuple[Config, ...]:
    """heads, warps: of a program."""
    return tuple(
        (("heads", heads), ("warps", warps))
        for heads in (1, 2, 4, 8, 16)
        if heads == 1 or heads // 2 < problem.options.kv_heads
        for warps in (1, 2, 4)
        if heads * _padded(max(problem.options.head_dim, problem.options.value_dim) // 2)
        <= _VALUES * warps
    )


# ---- launch ---------------------------------------------------------------------------------


def _prepare(packed: PackedTensor, dtype: torch.dtype) -> None:
    raise NoKernelError("append_kv writes into a cache; there is no weight to prepare")


def append(
    pages: Paged,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: int | torch.Tensor,
    rope: Rope | None = None,
    config: Config = (("heads", 1), ("warps", 1)),
) -> None:
    """Store keys and values [B, heads, n, D] at positions `first` … first + n − 1 of each row.

    first: one number for all rows, or int32 or int64 [B] or [1] on the device. The table must have
    pages there. rope: rotates the keys first; None takes them as they are.
    """
    counted = isinstance(first, torch.Tensor)
    torch.ops.fewbit.triton_append_kv(
        keys,
        values,
        [] if rope is None else [rope.cos, rope.sin],
        list(pages.keys.values()),
        list(pages.values.values()),
        pages.table,
        first if counted else None,
        0 if counted else first,
        "none" if rope is None else rope.style,
        [pages.key.options.fit == "search", pages.value.options.fit == "search"],
        [value for _, value in config],
    )


def _run(
    keys: torch.Tensor,
    values: torch.Tensor,
    rope: Sequence[torch.Tensor],
    key_parts: Sequence[torch.Tensor],
    value_parts: Sequence[torch.Tensor],
    table: torch.Tensor,
    counts: torch.Tensor | None,
    first: int,
    style: str,
    search: Sequence[bool],
    config: Sequence[int],
) -> None:
    """The op. What is not there is stood in for by a tensor that is never read."""
    n_rows, kv_heads, n_new, head_dim = keys.shape
    if n_rows * n_new == 0:
        return
    heads, warps = config
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    values = values if values.stride(-1) == 1 else values.contiguous()
    tables = [part.to(keys.dtype).contiguous() for part in rope] or [keys, keys]
    rotary_dim = tables[0].shape[-1] if rope else 0
    rope_row = tables[0].stride(0) if rope and tables[0].shape[0] > 1 else 0
    value_dim = values.shape[-1]
    _append[(n_rows * n_new, 2, -(-kv_heads // heads))](
        keys, values, *tables, *key_parts, *value_parts, table, table if counts is None else counts,
        n_new, kv_heads, first, 0 if counts is None or counts.numel() == 1 else 1, table.stride(0),
        *keys.stride()[:3], *values.stride()[:3], rope_row, rotary_dim,
        head_dim, _padded(head_dim // 2), value_dim, _padded(value_dim // 2),
        search[0], search[1], rotary_dim, style, counts is not None, heads,
        num_warps=warps, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip


def _fake(
    keys: torch.Tensor,
    values: torch.Tensor,
    rope: Sequence[torch.Tensor],
    key_parts: Sequence[torch.Tensor],
    value_parts: Sequence[torch.Tensor],
    table: torch.Tensor,
    counts: torch.Tensor | None,
    first: int,
    style: str,
    search: Sequence[bool],
    config: Sequence[int],
) -> None:
    return None


_LIBRARY = torch.library.Library("fewbit", "FRAGMENT")
_LIBRARY.define(
    "triton_append_kv(Tensor keys, Tensor values, Tensor[] rope, Tensor(a!)[] key_parts, "
    "Tensor(b!)[] value_parts, Tensor table, Tensor? counts, int first, str style, bool[] search, "
    "int[] config) -> ()"
)
_LIBRARY.impl("triton_append_kv", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fewbit::triton_append_kv", _fake, lib=_LIBRARY)


# ---- estimates ------------------------------------------------------------------------------

# Half of all lane instructions for each number (two issue where one integer instruction does), counted
# in what Triton 3.6 makes for capability 9.0.
_PLAIN, _SEARCH = 60, 440


def _seconds(problem: RowsProblem, config: Config, compiled: Compiled | None = None) -> float:
    """By `cost_model`; 1 s for an unknown machine."""
    if problem.machine is None:
        return 1.0
    choice, options = dict(config), problem.options
    searched = "search" in (options.key_options.fit, options.value_options.fit)
    numbers = problem.m_bucket * problem.k
    pairs = choice["heads"] * _padded(max(options.head_dim, options.value_dim) // 2)
    threads = 32 * choice["warps"]
    work = Work(
        bytes=numbers * (problem.dtype.itemsize + 0.5),
        ops=0.0,
        kind="fp32",
        alu=float(numbers * (_SEARCH if searched else _PLAIN)),
    )
    tiling = Tiling(
        blocks=problem.m_bucket * 2 * -(-options.kv_heads // choice["heads"]),
        threads=threads,
        in_flight_bytes=2.0 * pairs * problem.dtype.itemsize,
        registers=min(255, 40 + 6 * pairs // threads),
        smem_bytes=512,
    )
    return launch_seconds(work, tiling, problem.machine, compiled)


# ---- compilation without a GPU --------------------------------------------------------------


def _compile(problem: RowsProblem, config: Config, cc: tuple[int, int]) -> tuple[Compiled, ...]:
    choice, options = dict(config), problem.options
    dtype = pointer(problem.dtype)
    types = dict.fromkeys((name for name in _append.arg_names if not name.isupper()), "i32")
    types |= dict.fromkeys(("keys", "values", "cos", "sin"), dtype)
    types |= {"table": "*i64", "counts": "*i64", "key_codes": "*u8", "value_codes": "*u8"}
    types |= dict.fromkeys(("key_scale", "key_minimum", "value_scale", "value_minimum"), "*fp16")
    constants = {
        "D": options.head_dim,
        "PAIRS": _padded(options.head_dim // 2),
        "VALUE_D": options.value_dim,
        "VALUE_PAIRS": _padded(options.value_dim // 2),
        "KEY_SEARCH": options.key_options.fit == "search",
        "VALUE_SEARCH": options.value_options.fit == "search",
        "R": options.rotary_dim,
        "STYLE": options.rope,
        "COUNTED": False,
        "HEADS": choice["heads"],
    }
    aligned = tuple(name for name, kind in types.items() if kind.startswith("*"))
    variant = Variant(
        _append, types, constants, aligned, choice["warps"], stages=1, fp_fusion=False
    )
    return (compile_variant(variant, cc),)


# ---- record ---------------------------------------------------------------------------------

KERNEL = Kernel(
    name="triton_append_int4",
    refuse=_refuse,
    prepare=_prepare,
    launch=append,
    seconds=_seconds,
    priority=1,
    op="append_kv",
    configs=_configs,
    compile=_compile,
    source=source_hash(sys.modules[__name__]),
)
