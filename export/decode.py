"""Low-bit weights of other makers, decoded to bfloat16 while they are read.

FP8 with scales. `W` float8 [.., N, K] and a companion `W_scale_inv` or `W_scale` (or `.scale`
beside `.weight`) that holds one number per tensor, per matrix, per row, or per block:

    value = bf16( fp32(W[n, k]) · scale[n // block_n, k // block_k] )

Both companion names mean a multiplier. Scales are floats, or the bare exponents of E8M0:
scale = 2^(byte - 127), with 255 for NaN.

MXFP4 experts. `W_blocks` uint8 [E, N, K/32, 16] and `W_scales` uint8 [E, N, K/32]; byte j of a
block holds two E2M1 numbers, and all 32 share one E8M0 scale:

    byte j   bit 7..4: value 2j + 1       bit 3..0: value 2j
    E2M1     bit 3: sign   2..1: exponent   0: mantissa  ->  ± 0, ½, 1, 1½, 2, 3, 4, 6

The tensor `W` that a bfloat16 checkpoint of the same model holds is [E, K, N], so the last two axes
are exchanged. Every product is exact in bfloat16 unless it leaves its range.

`logical_tensors` pairs names by what is stored, and refuses what it cannot decode: an encoded
weight must never be taken for an ordinary one. Quantizing is not done here, and no file is opened.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..quant.errors import CheckpointError
from .safetensors_file import Entry, new_buffer

Float32s = np.ndarray[Any, np.dtype[np.float32]]
Halves = np.ndarray[Any, np.dtype[np.uint16]]
Fetch = Callable[[str, int, int], torch.Tensor]  # stored name, start row, stop row -> rows

DEFAULT_BLOCK = (128, 128)  # what the config means when it says nothing
CHUNK = 2**18  # float32 numbers at work at a time: 1 MiB stays in the cache
MX_GROUP = 32  # numbers that share a scale
NOT_READ = (".qweight", ".weight_packed", ".weight.absmax", ".SCB", "_weight_qdata")
_FLOAT8 = {
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
}
_E8M0 = {torch.uint8, getattr(torch, "float8_e8m0fnu", torch.uint8)}
_SCALE_DTYPES = {torch.float32, torch.bfloat16, torch.float16} | _E8M0
_ACTIVATION = ("input_scale", "activation_scale")  # of static activations; no part of the weight


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the rest of fewbit sees it: after decoding.

    n_bytes: bytes in the source, companions included. encoding: plain, fp8_block or mxfp4.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    n_bytes: int
    encoding: str


@dataclass(frozen=True)
class LogicalTensor:
    """What one logical tensor is made of.

    weight, scale: stored names. block: rows and columns that share a scale (FP8 only).
    scale_shape: the scale as [.., rows of blocks, columns of blocks].
    """

    info: TensorInfo
    weight: str
    scale: str = ""
    block: tuple[int, int] = (1, 1)
    scale_shape: tuple[int, ...] = ()


def logical_tensors(
    entries: Mapping[str, Entry], block: tuple[int, int] = DEFAULT_BLOCK
) -> dict[str, LogicalTensor]:
    """Pair every encoded weight with its companions; the rest is plain. Order is kept.

    `block` is the config's `weight_block_size`. CheckpointError naming a tensor that is encoded in
    a way that cannot be decoded: no scale, a scale of another shape, an unknown packing.
    """
    found: dict[str, LogicalTensor] = {}
    companions: set[str] = set()
    for name, entry in entries.items():
        tensor = _encoded(name, entry, entries, block)
        if tensor is not None:
            found[name] = tensor
            companions |= _companions(tensor, entries)
    logical: dict[str, LogicalTensor] = {}
    for name, entry in entries.items():
        if name in companions:
            continue
        tensor = found.get(name) or _plain(entry, entries)
        own = tensor.info.name
        if own != name and own in entries:
            raise CheckpointError(
                f"{own!r} is stored twice, plainly and as {name!r}; remove one of them"
            )
        logical[own] = tensor
    return logical


def decode_rows(tensor: LogicalTensor, fetch: Fetch, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of the leading axis, decoded; reads only what they need."""
    if tensor.info.encoding == "plain":
        return fetch(tensor.weight, start, stop)
    shape = (stop - start, *tensor.info.shape[1:])
    if 0 in shape:
        return torch.empty(shape, dtype=torch.bfloat16)
    if tensor.info.encoding == "fp8_block":
        return _fp8_rows(tensor, fetch, start, stop)
    return decode_mxfp4(fetch(tensor.weight, start, stop), fetch(tensor.scale, start, stop))


def decode_fp8(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], first_row: int = 0
) -> torch.Tensor:
    """bf16 [.., N, K] from float8 [.., N, K] and scales [.., row blocks, column blocks].

    `first_row` is the place of row 0 of `weight` in the first block of rows. numpy does the work:
    torch's threads cost more than they save on pieces that fit the cache (measured).
    """
    *lead, n_rows, n_columns = weight.shape
    out = _new_bfloat16(tuple(weight.shape))
    codes = weight.view(torch.uint8).reshape(-1, n_rows, n_columns).numpy()
    result = _bits(out).reshape(-1, n_rows, n_columns)
    factors = _multipliers(scale)
    factors = np.broadcast_to(factors, (*lead, *factors.shape[-2:]))
    factors = factors.reshape(-1, *factors.shape[-2:])
    table, step = _float8_table(weight.dtype), max(1, CHUNK // max(1, n_columns))
    for matrix in range(len(codes)):
        for row in range(0, n_rows, step):
            values = np.take(table, codes[matrix, row : row + step])
            in_block = (np.arange(len(values)) + row + first_row) // block[0]
            wide = np.repeat(factors[matrix, in_block], block[1], axis=-1)[:, :n_columns]
            with np.errstate(over="ignore", invalid="ignore"):  # the reader names NaN and Inf
                values *= wide
                result[matrix, row : row + step] = _round_to_bfloat16(values)
    return out


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bf16 [E, K, N] from uint8 blocks [E, N, K/32, 16] and E8M0 scales [E, N, K/32]."""
    n_experts, n_rows, n_groups, _ = blocks.shape
    n_columns = n_groups * MX_GROUP
    out = _new_bfloat16((n_experts, n_columns, n_rows))
    codes, result, factors = blocks.numpy(), _bits(out), _multipliers(scales)
    table, step = _pair_table(), max(1, CHUNK // max(1, n_columns))
    for expert in range(n_experts):
        for row in range(0, n_rows, step):
            rows = slice(row, row + step)
            values = np.take(table, codes[expert, rows]).view(np.float32)
            with np.errstate(over="ignore", invalid="ignore"):
                values *= factors[expert, rows, :, None]
            # The product is exact in bfloat16, so that its upper half is all of it.
            upper = values.reshape(len(values), -1).view(np.uint16)[:, 1::2]
            result[expert, :, rows] = upper.T
    return out


# --- which tensors belong together --------------------------------------------------------------


def _plain(entry: Entry, entries: Mapping[str, Entry]) -> LogicalTensor:
    name, n_bytes = entry.name, entry.end - entry.begin
    if entry.dtype in _FLOAT8 or (entry.dtype in _E8M0 and entry.dtype != torch.uint8):
        raise CheckpointError(
            f"{name!r} is {_short(entry.dtype)} {list(entry.shape)} without a scale beside it "
            f"({', '.join(_scale_names(name))}); give the checkpoint with its scales, or the "
            f"16-bit original"
        )
    integers = not entry.dtype.is_floating_point and len(entry.shape) >= 2
    scaled = integers and any(other in entries for other in _scale_names(name))
    if scaled or name.endswith(NOT_READ):
        raise CheckpointError(
            f"{name!r} ({_short(entry.dtype)} {list(entry.shape)}) belongs to a low-bit encoding "
            f"that is not read; FP8 with scales and MXFP4 are. Give the 16-bit original"
        )
    return LogicalTensor(TensorInfo(name, entry.shape, entry.dtype, n_bytes, "plain"), name)


def _encoded(
    name: str, entry: Entry, entries: Mapping[str, Entry], block: tuple[int, int]
) -> LogicalTensor | None:
    if entry.dtype in _FLOAT8:
        scales = [entries[other] for other in _scale_names(name) if other in entries]
        if len(scales) > 1:
            names = " and ".join(repr(scale.name) for scale in scales)
            raise CheckpointError(f"{name!r} has two scales, {names}; one is allowed: remove one")
        return _fp8(entry, scales[0], entries, block) if scales else None
    if name.endswith("_blocks") and entry.dtype == torch.uint8:
        scale = entries.get(name.removesuffix("_blocks") + "_scales")
        return _mxfp4(entry, scale) if scale or len(entry.shape) == 4 else None
    return None


def _scale_names(name: str) -> list[str]:
    names = [f"{name}_scale_inv", f"{name}_scale"]
    if name.endswith(".weight"):
        names.append(name.removesuffix("weight") + "scale")
    return names


def _companions(tensor: LogicalTensor, entries: Mapping[str, Entry]) -> set[str]:
    """Stored names that vanish into `tensor`."""
    stem = tensor.weight.removesuffix("weight")
    extra = {stem + name for name in _ACTIVATION} if tensor.info.encoding == "fp8_block" else set()
    return {tensor.scale} | (extra & entries.keys())


def _fp8(
    entry: Entry, scale: Entry, entries: Mapping[str, Entry], block: tuple[int, int]
) -> LogicalTensor:
    if len(entry.shape) not in (2, 3):
        raise CheckpointError(
            f"{entry.name!r} is {_short(entry.dtype)} {list(entry.shape)}; float8 weights of 2 or "
            f"3 axes are read, give the 16-bit original"
        )
    if scale.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{scale.name!r} is {_short(scale.dtype)}; a scale must be F32, BF16, F16 or E8M0"
        )
    block, scale_shape = _scale_grid(entry, scale, block)
    info = TensorInfo(entry.name, entry.shape, torch.bfloat16, 0, "fp8_block")
    tensor = LogicalTensor(info, entry.name, scale.name, block, scale_shape)
    stored = [entry, *(entries[name] for name in _companions(tensor, entries))]
    n_bytes = sum(one.end - one.begin for one in stored)
    info = TensorInfo(entry.name, entry.shape, torch.bfloat16, n_bytes, "fp8_block")
    return LogicalTensor(info, entry.name, scale.name, block, scale_shape)


def _scale_grid(
    entry: Entry, scale: Entry, block: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, ...]]:
    """(rows and columns per scale, the scale's shape with both axes of blocks)."""
    *lead, n_rows, n_columns = entry.shape
    whole = (max(n_rows, 1), max(n_columns, 1))
    grid = (*lead, -(-n_rows // block[0]), -(-n_columns // block[1]))
    if scale.shape == grid:  # a block larger than the matrix means the matrix
        return (min(block[0], whole[0]), min(block[1], whole[1])), grid
    if math.prod(scale.shape) == 1:  # one number for everything
        return whole, (1,) * len(entry.shape)
    if lead and scale.shape in ((*lead,), (*lead, 1), (*lead, 1, 1)):
        return whole, (*lead, 1, 1)
    if scale.shape in ((*lead, n_rows), (*lead, n_rows, 1)):
        return (1, whole[1]), (*lead, n_rows, 1)
    raise CheckpointError(
        f"{scale.name!r} has the shape {list(scale.shape)}; for {entry.name!r} {list(entry.shape)} "
        f"one number, one per row, or {list(grid)} (blocks of {block[0]} x {block[1]}) is allowed; "
        f"check weight_block_size in config.json"
    )


def _mxfp4(blocks: Entry, scales: Entry | None) -> LogicalTensor:
    if scales is None:
        wanted = blocks.name.removesuffix("_blocks") + "_scales"
        raise CheckpointError(
            f"{blocks.name!r} has no {wanted!r} beside it; download the checkpoint again"
        )
    shape = blocks.shape
    fits = len(shape) == 4 and shape[3] == MX_GROUP // 2 and scales.shape == shape[:3]
    if not fits or scales.dtype not in _E8M0:
        raise CheckpointError(
            f"{blocks.name!r} {list(shape)} and {scales.name!r} {_short(scales.dtype)} "
            f"{list(scales.shape)} are no MXFP4 weight; U8 [E, N, K/32, 16] and U8 [E, N, K/32] "
            f"are read, give the 16-bit original"
        )
    n_bytes = blocks.end - blocks.begin + scales.end - scales.begin
    name, logical = blocks.name.removesuffix("_blocks"), (shape[0], shape[2] * MX_GROUP, shape[1])
    info = TensorInfo(name, logical, torch.bfloat16, n_bytes, "mxfp4")
    return LogicalTensor(info, blocks.name, scales.name)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- numbers ------------------------------------------------------------------------------------


def _fp8_rows(tensor: LogicalTensor, fetch: Fetch, start: int, stop: int) -> torch.Tensor:
    """Rows of the leading axis: of N for a matrix, of E for fused experts."""
    weight = fetch(tensor.weight, start, stop)
    matrix = len(tensor.info.shape) == 2
    first, last, in_block = start, stop, 0
    if matrix:
        first, last = start // tensor.block[0], (stop - 1) // tensor.block[0] + 1
        in_block = start % tensor.block[0]
    if tensor.scale_shape[0] == 1:
        first, last = 0, 1
    # A scalar is stored as 0-d, [1] or [1, 1], and has a single row in each case.
    scale = fetch(tensor.scale, first, last)
    return decode_fp8(weight, scale.reshape(-1, *tensor.scale_shape[1:]), tensor.block, in_block)


def _multipliers(scale: torch.Tensor) -> Float32s:
    """fp32 scales; bytes and E8M0 numbers are bare exponents."""
    if scale.dtype in _E8M0:
        return np.take(_exponent_table(), scale.view(torch.uint8).numpy())
    return scale.to(torch.float32).numpy()


def _exponent_table() -> Float32s:
    """fp32 value of each E8M0 byte."""
    table = np.ldexp(np.ones(256, np.float32), np.minimum(np.arange(256), 254) - 127)
    table[255] = np.nan
    return table


def _float8_table(dtype: torch.dtype) -> Float32s:
    """fp32 value of each float8 byte. A look-up is four times as fast as torch's conversion."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32).numpy()


def _pair_table() -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Two fp32 numbers for each byte, the low nibble at the lower address."""
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    value = np.array(positive + [-x for x in positive], np.float32)
    byte = np.arange(256)
    return np.stack([value[byte & 15], value[byte >> 4]], axis=-1).view(np.uint64).reshape(-1)


def _new_bfloat16(shape: tuple[int, ...]) -> torch.Tensor:
    return new_buffer(math.prod(shape) * 2).view(torch.bfloat16).reshape(shape)


def _bits(tensor: torch.Tensor) -> Halves:
    """The 16 bits of each number of a bfloat16 tensor, sharing its memory."""
    return tensor.view(torch.int16).numpy().view(np.uint16)


def _round_to_bfloat16(values: Float32s) -> Halves:
    """Bits of the nearest bfloat16, ties to even; `values` are overwritten.

    Adding 7fff, or 8000 if the kept part is odd, carries into it exactly when rounding is up. That
    would turn a NaN with a long payload into a number, so torch converts a piece that may hold one.
    """
    if not np.isfinite(values.sum()):
        return _bits(torch.from_numpy(values).to(torch.bfloat16))
    bits = values.view(np.uint32)
    odd = bits >> 16
    odd &= 1
    bits += 0x7FFF
    bits += odd
    bits >>= 16
    return bits.astype(np.uint16)
