"""Elements taken apart into byte planes, most significant first, and put together again.

An entropy coder of bytes finds little in floating-point words as they lie in memory, since bf16
keeps one exponent bit in its low byte. The planes put what belongs together into one byte:

    bf16       15   14........7  6.........0        planes
               sign exponent     mantissa
    plane 0         e7.......e0                     exponent                  2.5 to 2.8 bits of 8
    plane 1    sign              m6.......m0        sign, mantissa            7.97 bits of 8

    fp32       the upper 16 bits as bf16 has them, then bits 15..8, then bits 7..0
    fp16       bits 15..8 (sign, exponent, two bits of mantissa), then bits 7..0
    others     their bytes, the highest first

An element of b bytes has b planes, so that sizes do not change: planes are a permutation of bits.
Words are little-endian, as safetensors has them. The functions here are the reference in numpy;
`quant/native/planes.c` does the same in one pass. Nothing is coded or compressed here.
"""

from enum import IntEnum

import numpy as np
import torch

from ..errors import FormatError


class Kind(IntEnum):
    """How the elements of a tensor are taken apart; the value is what files store."""

    BYTE = 0
    BF16 = 1
    HALF = 2
    FP32 = 3
    WORD = 4
    LONG = 5

    @property
    def n_planes(self) -> int:
        """Planes, which is also the bytes of an element."""
        return _N_PLANES[self]


_N_PLANES = (1, 2, 2, 4, 4, 8)
_BY_SIZE = {1: Kind.BYTE, 2: Kind.HALF, 4: Kind.WORD, 8: Kind.LONG}
_BY_DTYPE = {torch.bfloat16: Kind.BF16, torch.float32: Kind.FP32}


def kind_of(dtype: torch.dtype) -> Kind:
    """The kind of a tensor's elements; `FormatError` for elements wider than 8 bytes."""
    kind = _BY_DTYPE.get(dtype) or _BY_SIZE.get(dtype.itemsize)
    if kind is None:
        raise FormatError(
            f"elements of {dtype} have {dtype.itemsize} bytes; byte planes are defined for "
            f"1, 2, 4 and 8: store this tensor as it is"
        )
    return kind


def split(elements: np.ndarray, kind: Kind) -> np.ndarray:
    """u8 [n · n_planes] of little-endian elements -> u8 [n_planes, n]."""
    n_planes = kind.n_planes
    if elements.dtype != np.uint8 or elements.ndim != 1 or elements.size % n_planes:
        raise FormatError(
            f"{kind.name} elements must be a 1-D uint8 array of a multiple of {n_planes} bytes, "
            f"got {elements.dtype} {elements.shape}"
        )
    planes = np.array(elements.reshape(-1, n_planes)[:, ::-1].T, order="C")
    if kind in (Kind.BF16, Kind.FP32):
        high, low = planes[0].copy(), planes[1]
        planes[0] = (high << 1) | (low >> 7)
        planes[1] = (high & 128) | (low & 127)
    return planes


def merge(planes: np.ndarray, kind: Kind) -> np.ndarray:
    """u8 [n_planes, n] -> u8 [n · n_planes], the inverse of `split`."""
    if planes.dtype != np.uint8 or planes.ndim != 2 or len(planes) != kind.n_planes:
        raise FormatError(
            f"{kind.name} has uint8 planes of shape [{kind.n_planes}, n], "
            f"got {planes.dtype} {planes.shape}"
        )
    elements = np.empty((planes.shape[1], kind.n_planes), np.uint8)
    elements[:, ::-1] = planes.T
    if kind in (Kind.BF16, Kind.FP32):
        elements[:, -1] = (planes[1] & 128) | (planes[0] >> 1)
        elements[:, -2] = (planes[0] << 7) | (planes[1] & 127)
    return elements.reshape(-1)
