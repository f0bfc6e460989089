"""Lossless coding of groups of chunks: native code where a compiler made some, else numpy.

The format is defined in `rans32_numpy`, the arrays of a group are drawn in `chunks`. Every engine
writes the same bytes:

    avx512, avx2, scalar    quant/native, compiled at first use, chosen by what the processor has
    numpy                   always there, ten to twenty times slower; one warning says why it is used

`FEWBIT_NATIVE=off` asks for numpy and is not warned about. The functions refuse frequencies and layouts
that cannot be (`ValueError`: the caller is wrong) and find damage in what was stored (`Damage`). Native
calls release the GIL: threads that code groups run at the same time. What this does not do: choose what
to code, name tensors, or read files.
"""

import logging
from functools import cache
from types import ModuleType

import numpy as np

from ..native import compiler
from . import rans32_native, rans32_numpy
from .chunks import CARRIED, CHUNK, LANES, Damage, Group, Layout, Mode, flat_layout
from .frequencies import normalize
from .planes import Kind

_LOG = logging.getLogger("fewbit")


@cache
def _engine() -> ModuleType:
    """The module that codes, chosen once a process."""
    if compiler.library() is not None:
        return rans32_native
    if not compiler.is_off():
        _LOG.warning(
            "lossless coding runs in numpy, ten to twenty times slower: %s", compiler.why_not()
        )
    return rans32_numpy


def engine_name() -> str:
    """avx512, avx2, scalar or numpy."""
    return "numpy" if _engine() is rans32_numpy else rans32_native.engine_name()


def count(data: np.ndarray, kind: Kind, layout: Layout) -> np.ndarray:
    """u8 [bytes] -> int64 [n_planes, 256]: how often each symbol occurs in each plane."""
    _check_buffer(data)
    return _engine().count(data, kind, layout)


def encode(data: np.ndarray, kind: Kind, layout: Layout, freq: np.ndarray) -> Group:
    """Codes the chunks of u8 [bytes] with uint16 [n_planes, 256], from `normalize`.

    A plane whose frequencies are all zero is not coded: it goes to `Group.raw`.
    """
    _check_buffer(data)
    return _engine().encode(data, kind, layout, freq)


def decode(group: Group, out: np.ndarray, kind: Kind, layout: Layout, freq: np.ndarray) -> None:
    """Writes the elements of all chunks into u8 [bytes]; bytes outside of chunks stay as they are.

    Raises `Damage` if the group is not what `encode` made with these arguments; then `out` holds
    nothing to rely on, but nothing outside of its chunks was written.
    """
    _check_buffer(out)
    if not out.flags.writeable:
        raise ValueError("the buffer to decode into is read-only; give a writable array")
    _engine().decode(group, out, kind, layout, freq)


def encode_symbols(symbols: np.ndarray, freq: np.ndarray) -> Group:
    """Codes u8 [n] as one plane in flat order, with uint16 [256]."""
    return encode(symbols, Kind.BYTE, flat_layout(symbols.size, Kind.BYTE), freq[None])


def decode_symbols(group: Group, n: int, freq: np.ndarray) -> np.ndarray:
    """u8 [n], the inverse of `encode_symbols`."""
    out = np.empty(n, np.uint8)
    decode(group, out, Kind.BYTE, flat_layout(n, Kind.BYTE), freq[None])
    return out


def _check_buffer(data: np.ndarray) -> None:
    """`ValueError` unless this is a plain buffer of bytes."""
    if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous:
        raise ValueError(
            f"a buffer must be contiguous uint8 [bytes], got {data.dtype} {data.shape}"
        )


__all__ = [
    "CARRIED", "CHUNK", "LANES", "Damage", "Group", "Layout", "Mode", "count", "decode",
    "decode_symbols", "encode", "encode_symbols", "engine_name", "flat_layout", "normalize",
]  # fmt: skip
