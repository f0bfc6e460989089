"""Layout of QQQ checkpoints: 4-bit codes in 32-bit words, in the order that one GPU kernel reads.

Tensors of a linear X with weight [N, K], N a multiple of 64, K of 16 (groups: of 128), symmetric:

  X.B          int32  [K/16, 2N]   eight codes a word, permuted
  X.s_channel  fp32   [1, N]       columns permuted in blocks of 32
  X.s_group    fp16   [K/128, N]   groups only, columns permuted in blocks of 64

    one scale a row   codes −8 … 7, two's complement; w = 16 · s_channel · code (the kernel leaves
                      codes in the high nibble of a byte, which multiplies them by 16)
    groups            codes 0 … 15; w = s_channel · rnd((code − 8) · s_group), rnd to int8

    row  = k//16                               a word holds rows n%8 and n%8 + 8 of a block of 16,
    word = (n//64)·128 + lane·4 + (n//16)%4    and four neighbouring columns:
    lane = (n%8)·4 + (k%16)//4
    i    = (n//8%2)·4 + k%4

    bits of the word       31..28 27..24 23..20 19..16 15..12 11..8  7..4  3..0
    i, one scale a row        3      7      2      6      1      5     0     4
    i, groups                 7      5      3      1      6      4     2     0

Position p of the scales: s_channel  p = 8i + j holds column 2i + (0 1 8 9 16 17 24 25)[j], i < 4
                          s_group    p = 8i + j holds column i + 8j, i < 8

This module only moves bytes; it reads and writes no files and does no arithmetic on scales.
"""

import torch

from ..quant.errors import FormatError
from ..quant.formats.int_group import pack_bits, unpack_bits

# Code i that fills each nibble of a word, lowest nibble first.
_ROW_SLOTS = (4, 0, 5, 1, 6, 2, 7, 3)
_GROUP_SLOTS = (0, 2, 4, 6, 1, 3, 5, 7)
# Axes of rows n = (n//64, n//16%4, n//8%2, n%8) and columns k = (k//16, k//4%4, k%4), to
# (k//16, n//64, n%8, k//4%4, n//16%4, n//8%2, k%4), and back.
_TO_STORED = (4, 0, 3, 5, 1, 2, 6)
_FROM_STORED = tuple(_TO_STORED.index(axis) for axis in range(7))


def pack_codes(codes: torch.Tensor, grouped: bool) -> torch.Tensor:
    """B int32 [K/16, 2N] of codes [N, K]: uint8 0 … 15 if `grouped`, else int8 −8 … 7."""
    n, k = codes.shape
    _need_multiple("N", n, 64)
    _need_multiple("K", k, 16)
    _need_dtype(codes, grouped)
    nibbles = codes if grouped else codes.view(torch.uint8) & 15
    axes = nibbles.view(n // 64, 4, 2, 8, k // 16, 4, 4).permute(_TO_STORED)
    words = axes.reshape(k // 16, 2 * n, 8)[..., _slots(grouped)]
    return pack_bits(words, 4).view(torch.int32).squeeze(-1)


def unpack_codes(words: torch.Tensor, grouped: bool) -> torch.Tensor:
    """Codes [N, K] of B int32 [K/16, 2N]: uint8 0 … 15 if `grouped`, else int8 −8 … 7."""
    k, n = words.shape[0] * 16, words.shape[1] // 2
    _need_multiple("N", n, 64)
    nibbles = unpack_bits(words.contiguous().unsqueeze(-1).view(torch.uint8), 4)
    axes = nibbles[..., torch.argsort(_slots(grouped))].view(k // 16, n // 64, 8, 4, 4, 2, 4)
    codes = axes.permute(_FROM_STORED).reshape(n, k)
    if grouped:
        return codes
    return ((codes ^ 8) - 8).view(torch.int8)  # sign extension; bytes wrap mod 256


def _slots(grouped: bool) -> torch.Tensor:
    return torch.tensor(_GROUP_SLOTS if grouped else _ROW_SLOTS)


def pack_channel_scales(scales: torch.Tensor) -> torch.Tensor:
    """s_channel [1, N] of row scales [N]."""
    return _permuted(scales.unsqueeze(0), _channel_columns())


def unpack_channel_scales(stored: torch.Tensor) -> torch.Tensor:
    """Row scales [N] of s_channel [1, N]."""
    return _permuted(stored, torch.argsort(_channel_columns())).squeeze(0)


def pack_group_scales(scales: torch.Tensor) -> torch.Tensor:
    """s_group [G, N] of group scales [N, G]."""
    return _permuted(scales.mT, _group_columns())


def unpack_group_scales(stored: torch.Tensor) -> torch.Tensor:
    """Group scales [N, G] of s_group [G, N]."""
    return _permuted(stored, torch.argsort(_group_columns())).mT.contiguous()


def _channel_columns() -> torch.Tensor:
    """Column of a block of 32 that is stored at each position."""
    pairs = torch.tensor([0, 1, 8, 9, 16, 17, 24, 25])
    return (2 * torch.arange(4).unsqueeze(-1) + pairs).flatten()


def _group_columns() -> torch.Tensor:
    """Column of a block of 64 that is stored at each position."""
    return torch.arange(64).view(8, 8).mT.flatten()


def _permuted(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    _need_multiple("N", rows.shape[-1], len(columns))
    return rows.unflatten(-1, (-1, len(columns)))[..., columns].flatten(-2).contiguous()


def _need_dtype(codes: torch.Tensor, grouped: bool) -> None:
    wanted = torch.uint8 if grouped else torch.int8
    if codes.dtype is not wanted:
        kind = "grouped" if grouped else "row"
        raise FormatError(f"QQQ's {kind} codes must be {wanted}, got {codes.dtype}")


def _need_multiple(axis: str, size: int, unit: int) -> None:
    if size % unit or size == 0:
        raise FormatError(f"QQQ's layout needs {axis} in multiples of {unit}, got {size}")
