"""Layout of QServe checkpoints: 4-bit codes in the order in which one GPU kernel loads them.

Tensors of a linear X with weight [N, K], N a multiple of 32, K of 32 (groups: of 128):

  X.qweight    int8  [N, K/2]    codes 0 … 15, permuted
  X.s1_scales  fp16  [N]         row scale s1
  X.s1_szeros  fp16  [N]         one scale a row: w = s1·code − s1_szeros
  X.s2_scales  int8  [K/128, N]  groups of 128: w = s1·(code·s2_scales + s2_zeros), columns permuted
  X.s2_zeros   int8  [K/128, N]

The weight is cut into tiles of 32 × 32, 512 bytes each, row-major. Inside a tile the byte address is
(lane, byte): 32 lanes of a warp load 16 bytes each, and a byte holds rows r and r + 16 of one column.

    lane = (n%8)·4 + (k%16)//4                    bits of the address in a tile:
    byte = (k//16%2)·8 + (n//8%2)·4 + k%4         8 7 6 | 5 4   | 3      | 2      | 1 0
    high nibble iff n%32 ≥ 16                     n%8   | k//4%4 | k//16%2 | n//8%2 | k%4

Columns of s2_* are permuted in blocks of 32, and two writers disagree how. Position of column n:

    "quads"   (n%8)·4 + (n%32)//8                 0 8 16 24 1 9 17 25 …     what the kernel reads
    "pairs"   (n%32)//16·16 + (n%8)·2 + n//8%2    0 8 1 9 2 10 …            what another exporter writes

Ranges cannot tell the two apart, since a row then uses another row's valid integers. Who wrote the file
decides, or the loss of the loaded model under both (`choose_group_order`).

This module only moves bytes; it reads and writes no files.
"""

from collections.abc import Callable, Mapping
from math import isnan
from typing import Literal, get_args

import torch

from ..quant.errors import CheckpointError, FormatError
from ..quant.format import Parts
from ..quant.formats.int_group import pack_bits, unpack_bits

GroupOrder = Literal["quads", "pairs"]
GROUP = 128  # columns that share s2
_TILE = 32
# Axes of rows n = (tile, n//16%2, n//8%2, n%8) and columns k = (tile, k//16%2, k//4%4, k%4), to
# (row tile, column tile, n%8, k//4%4, k//16%2, n//8%2, k%4, nibble), and back.
_TO_STORED = (0, 4, 3, 6, 5, 2, 7, 1)
_FROM_STORED = tuple(_TO_STORED.index(axis) for axis in range(8))


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """qweight int8 [N, K/2] of codes uint8 [N, K]."""
    n, k = codes.shape
    _need_multiple("N", n, _TILE)
    _need_multiple("K", k, _TILE)
    axes = codes.view(n // _TILE, 2, 2, 8, k // _TILE, 2, 4, 4)
    nibbles = axes.permute(_TO_STORED).reshape(n, k)
    return pack_bits(nibbles, 4).view(torch.int8)


def unpack_codes(qweight: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [N, K] of qweight int8 [N, K/2]."""
    n, k = qweight.shape[0], qweight.shape[1] * 2
    _need_multiple("N", n, _TILE)
    _need_multiple("K", k, _TILE)
    nibbles = unpack_bits(qweight.contiguous().view(torch.uint8), 4)
    axes = nibbles.view(n // _TILE, k // _TILE, 8, 4, 2, 2, 4, 2)
    return axes.permute(_FROM_STORED).reshape(n, k)


def pack_groups(values: torch.Tensor, order: GroupOrder) -> torch.Tensor:
    """Stored form [G, N] of one number for each group, [N, G]."""
    _need_multiple("N", values.shape[0], _TILE)
    blocks = values.mT.unflatten(-1, (-1, _TILE))
    return blocks[..., _columns(order)].flatten(-2).contiguous()


def unpack_groups(stored: torch.Tensor, order: GroupOrder) -> torch.Tensor:
    """One number for each group, [N, G], of its stored form [G, N]."""
    _need_multiple("N", stored.shape[-1], _TILE)
    blocks = stored.unflatten(-1, (-1, _TILE))
    return blocks[..., torch.argsort(_columns(order))].flatten(-2).mT.contiguous()


def _columns(order: GroupOrder) -> torch.Tensor:
    """Column of a block of 32 that is stored at each position."""
    if order not in get_args(GroupOrder):
        raise FormatError(f"group_order must be 'quads' or 'pairs', got {order!r}")
    block = torch.arange(_TILE)
    if order == "quads":
        return block.view(4, 8).mT.flatten()
    return block.view(2, 2, 8).mT.flatten()


def write_linear(parts: Mapping[str, torch.Tensor], group_order: GroupOrder = "quads") -> Parts:
    """QServe tensors, by suffix, of `int_two_level` parts [N, ...] in dialect "offset", with groups
    of 128 or one scale a row."""
    codes = unpack_bits(parts["codes"], 4)
    stored = {"qweight": pack_codes(codes), "s1_scales": parts["scale_row"][:, 0].clone()}
    if "offset_row" in parts:
        return stored | {"s1_szeros": -parts["offset_row"][:, 0]}
    _need_group(codes.shape[1], parts["scale_group"].shape[1])
    return stored | {
        "s2_scales": pack_groups(parts["scale_group"].view(torch.int8), group_order),
        "s2_zeros": pack_groups(parts["offset_group"], group_order),
    }


def read_linear(tensors: Mapping[str, torch.Tensor], group_order: GroupOrder = "quads") -> Parts:
    """`int_two_level` parts, dialect "offset", of QServe tensors by suffix. The caller checks them
    (`Format.check`)."""
    codes = unpack_codes(tensors["qweight"])
    parts = {"codes": pack_bits(codes, 4), "scale_row": tensors["s1_scales"].unsqueeze(-1)}
    if "s1_szeros" in tensors:
        return parts | {"offset_row": -tensors["s1_szeros"].unsqueeze(-1)}
    _need_group(codes.shape[1], tensors["s2_scales"].shape[0])
    steps = unpack_groups(tensors["s2_scales"], group_order)
    return parts | {
        "scale_group": steps.view(torch.uint8),
        "offset_group": unpack_groups(tensors["s2_zeros"], group_order),
    }


def choose_group_order(loss: Callable[[GroupOrder], float]) -> GroupOrder:
    """The order under which the loaded model has the lower loss (say, on a short text).

    CheckpointError if the losses are equal or both NaN: then they do not tell.
    """
    losses: dict[GroupOrder, float] = {order: loss(order) for order in get_args(GroupOrder)}
    usable = {order: value for order, value in losses.items() if not isnan(value)}
    if not usable or (len(usable) == 2 and losses["quads"] == losses["pairs"]):
        raise CheckpointError(
            f"the order of s2_scales cannot be told: the loss is {losses['quads']:.6g} in order "
            f"'quads' and {losses['pairs']:.6g} in order 'pairs'; name the order"
        )
    return min(usable, key=lambda order: usable[order])


def _need_multiple(axis: str, size: int, unit: int) -> None:
    if size % unit or size == 0:
        raise FormatError(f"QServe's layout needs {axis} in multiples of {unit}, got {size}")


def _need_group(k: int, n_groups: int) -> None:
    if n_groups * GROUP != k:
        raise FormatError(
            f"QServe's layout has groups of {GROUP} columns, got {n_groups} groups for K = {k}"
        )
