"""Checks of kernels that rotate, and that write keys and values into pages, against `kv_write.py`.

    rotation         every bit is equal
    fit = "range"    every byte of the pages is equal, what was not to be written included
    fit = "search"   of two candidates whose errors are equal but for rounding either may be taken: the
                     squared error of a vector may exceed the reference's by a thousandth

Pages lie in any order, and their bytes are ones before. Half of the checks that rotate turn only the
first half of the channels. The reference runs on the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bench.oracle_check import (
    DTYPES,
    Check,
    Lane,
    Place,
    bit_error,
    pick_config,
    poison_free_memory,
)
from fewbit.kernels_triton.rope import RopeOptions
from fewbit.quant.dispatch import m_bucket
from fewbit.quant.formats.int4_head import Int4HeadOptions
from fewbit.quant.kernel import Config, Kernel, RowsProblem
from fewbit.quant.kv_policy import PageUse
from fewbit.quant.kv_view import Paged
from fewbit.quant.kv_write import PAGE, STYLES, AppendOptions, Rope, append, rotate
from fewbit.quant.page_format import find_page_format

_FORMAT = "int4_head"
_WORSE = 1e-3  # share of its squared error by which a vector of "search" may be worse
_COLUMNS = 3  # pages of a row


@dataclass(frozen=True)
class Spot:
    """n_rows, kv_heads, head_dim: of keys and values. n_new: tokens from position `first` on.
    counted: `first` is on the device."""

    n_rows: int
    kv_heads: int
    head_dim: int
    n_new: int
    first: int
    counted: bool = False


SPOTS = (
    Spot(1, 8, 128, 1, 0),
    Spot(3, 2, 128, 1, 63),
    Spot(2, 8, 64, 3, 63, counted=True),
    Spot(2, 1, 256, 2, 100),
    Spot(1, 3, 80, 70, 5),
    Spot(16, 8, 128, 1, 130, counted=True),
)
_FEW = SPOTS[1:4]
_FITS, _ROPES = ("search", "range"), ("half", "none", "pairs")


def lanes(kernel: Kernel, place: Place) -> list[Lane]:
    """One lane for each fit, rotation and dtype."""
    spots = _FEW if place.reduced else SPOTS
    kinds = [(fit, rope, dtype) for fit in _FITS for rope in _ROPES for dtype in DTYPES]
    return [
        [
            partial(_check, kernel, kind, spots[(at + i) % len(spots)], at + i, place)
            for i in range(len(spots))
        ]
        for at, kind in enumerate(kinds)
    ]


def _check(
    kernel: Kernel, kind: tuple[str, str, torch.dtype], spot: Spot, index: int, place: Place
) -> Check | None:
    fit, rope, dtype = kind
    options = AppendOptions(
        key=_FORMAT,
        key_options=Int4HeadOptions(fit),
        value=_FORMAT,
        value_options=Int4HeadOptions(fit),
        kv_heads=spot.kv_heads,
        head_dim=spot.head_dim,
        value_dim=spot.head_dim,
        rope=rope,
        rotary_dim=0 if rope == "none" else rotated_channels(spot, index),
    )
    bucket = m_bucket(spot.n_rows * spot.n_new)
    n_numbers = 2 * spot.kv_heads * spot.head_dim
    problem = RowsProblem(kernel.op, options, bucket, n_numbers, dtype, "cuda", place.machine)
    if kernel.refuse(problem):
        return None
    config = pick_config(kernel, problem, index)
    told = f"append_kv fit={fit} rope={rope} {spot} {str(dtype).removeprefix('torch.')}"
    tolerance = 0.0 if fit == "range" else _WORSE
    run = partial(_error, kernel, options, spot, problem, config, place)
    return Check(kernel.name, config, told, tolerance, run)


def _error(
    kernel: Kernel,
    options: AppendOptions,
    spot: Spot,
    problem: RowsProblem,
    config: Config,
    place: Place,
) -> float:
    generator = torch.Generator().manual_seed(spot.first)
    shape = (spot.n_rows, spot.kv_heads, spot.n_new, spot.head_dim)
    keys, values = (torch.randn(shape, generator=generator).to(problem.dtype) for _ in range(2))
    keys[..., 1] *= 16
    rope = None
    if options.rope != "none":
        rope = tables(spot, problem.dtype, options.rope, options.rotary_dim)
    wanted = empty_pages(options, spot, problem.dtype)
    given = moved(wanted, place.device)
    append(wanted, keys, values, spot.first, rope)
    first: Any = spot.first
    if spot.counted:
        first = torch.full((spot.n_rows,), spot.first, device=place.device)
    turned = None if rope is None else on(rope, place.device)
    poison_free_memory(place.device)
    launch: Callable[..., None] = kernel.launch
    sides = keys.to(place.device), values.to(place.device)
    launch(given, *sides, first, turned, **({"config": config} if config else {}))
    found = moved(given, "cpu")
    if options.key_options.fit == "range":
        return max(_bits(found.keys, wanted.keys), _bits(found.values, wanted.values))
    original = keys if rope is None else rotate(keys, rope)
    return max(
        _excess(options.key_options, found.keys, wanted.keys, original, wanted.table, spot),
        _excess(options.value_options, found.values, wanted.values, values, wanted.table, spot),
    )


# ---- rotation -------------------------------------------------------------------------------


def rope_lanes(kernel: Kernel, place: Place) -> list[Lane]:
    """One lane for each style and dtype."""
    spots = _FEW if place.reduced else SPOTS
    kinds = [(style, dtype) for style in STYLES for dtype in DTYPES]
    return [
        [
            partial(_rope_check, kernel, kind, spots[(at + i) % len(spots)], at + i, place)
            for i in range(len(spots))
        ]
        for at, kind in enumerate(kinds)
    ]


def _rope_check(
    kernel: Kernel, kind: tuple[str, torch.dtype], spot: Spot, index: int, place: Place
) -> Check | None:
    style, dtype = kind
    options = RopeOptions(spot.kv_heads, spot.head_dim, rotated_channels(spot, index), style)
    bucket, n_numbers = m_bucket(spot.n_rows * spot.n_new), spot.kv_heads * spot.head_dim
    problem = RowsProblem(kernel.op, options, bucket, n_numbers, dtype, "cuda", place.machine)
    if kernel.refuse(problem):
        return None
    config = pick_config(kernel, problem, index)
    told = f"rope {style} {spot} {str(dtype).removeprefix('torch.')}"
    run = partial(_rope_error, kernel, options, spot, dtype, config, place)
    return Check(kernel.name, config, told, 0.0, run)


def _rope_error(
    kernel: Kernel,
    options: RopeOptions,
    spot: Spot,
    dtype: torch.dtype,
    config: Config,
    place: Place,
) -> float:
    generator = torch.Generator().manual_seed(spot.n_new)
    # As a model has them: [B, n, H, D] in memory.
    x = torch.randn(spot.n_rows, spot.n_new, spot.kv_heads, spot.head_dim, generator=generator).to(
        dtype
    )
    rope = tables(spot, dtype, options.style, options.rotary_dim)
    poison_free_memory(place.device)
    launch: Callable[..., torch.Tensor] = kernel.launch
    given = x.to(place.device).transpose(1, 2)
    found = launch(given, on(rope, place.device), **({"config": config} if config else {}))
    return bit_error(found, rotate(x.transpose(1, 2), rope))


# ---- pages ----------------------------------------------------------------------------------


def empty_pages(options: AppendOptions, spot: Spot, dtype: torch.dtype) -> Paged:
    """Pages of ones for every row, in any order, on the CPU."""
    n_pages = _COLUMNS * spot.n_rows
    specs = find_page_format(_FORMAT).part_specs(spot.head_dim, dtype, options.key_options)
    table = torch.randperm(n_pages, generator=torch.Generator().manual_seed(n_pages))
    sides = []
    for _ in range(2):
        parts = {}
        for name, spec in specs.items():
            shape = (n_pages, spot.kv_heads, PAGE, *spec.shape)
            n_bytes = torch.Size(shape).numel() * spec.dtype.itemsize
            ones = torch.full((n_bytes,), 255, dtype=torch.uint8)
            parts[name] = ones.view(spec.dtype).view(shape)
        sides.append(parts)
    use = PageUse(_FORMAT, options.key_options)
    return Paged(use, use, sides[0], sides[1], table.view(spot.n_rows, _COLUMNS))


def moved(pages: Paged, device: str) -> Paged:
    """A copy on `device`."""
    keys, values = (
        {name: part.to(device, copy=True) for name, part in parts.items()}
        for parts in (pages.keys, pages.values)
    )
    return replace(pages, keys=keys, values=values, table=pages.table.to(device))


def rotated_channels(spot: Spot, index: int) -> int:
    """All of a head, or half of it."""
    return spot.head_dim if index % 2 else spot.head_dim // 2


def tables(spot: Spot, dtype: torch.dtype, style: str, rotary_dim: int) -> Rope:
    """Rotations of the first channels, different for each row and token."""
    count = spot.n_rows * spot.n_new * rotary_dim
    angles = torch.arange(count, dtype=torch.float32).view(spot.n_rows, spot.n_new, rotary_dim)
    return Rope(torch.cos(angles).to(dtype), torch.sin(angles).to(dtype), style)


def on(rope: Rope, device: str) -> Rope:
    """The same tables on a device."""
    return replace(rope, cos=rope.cos.to(device), sin=rope.sin.to(device))


# ---- errors ---------------------------------------------------------------------------------


def _bits(found: Any, wanted: Any) -> float:
    """Share of bytes that differ, of the part where it is largest."""
    return max(
        bit_error(found[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in wanted
    )


def _excess(
    options: Any, found: Any, wanted: Any, original: torch.Tensor, table: torch.Tensor, spot: Spot
) -> float:
    """By how much the worst vector's squared error exceeds the reference's, as a share of it. Infinity
    if anything else in the pages changed."""
    positions = spot.first + torch.arange(spot.n_new)
    at = table[:, positions // PAGE], positions % PAGE
    errors = []
    for parts in (found, wanted):
        vectors = {name: part[at[0], :, at[1]] for name, part in parts.items()}
        decoded = find_page_format(_FORMAT).decode(vectors, torch.float32, options)
        errors.append((decoded - original.float().transpose(1, 2)).square().sum(-1))
    for parts in (found, wanted):
        for part in parts.values():
            part[at[0], :, at[1]] = 0
    if _bits(found, wanted):
        return float("inf")
    excess = (errors[0] / errors[1].clamp_min(1e-12)).max() - 1
    return float(excess.clamp_min(0.0).nan_to_num(nan=float("inf")))
