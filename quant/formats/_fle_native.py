"""`fle4` and `fle3` in C: the calls of quant/native/fle.c on torch tensors of a CPU.

What they write is what the torch form in `fle.py` writes, byte for byte. Rows are split into bands of
64, and the bands over as many threads as torch uses; Python's lock is not held meanwhile.

The struct mirrors that of fle.c. Callers see to dtypes and shapes, and that tensors are contiguous; the
C code distrusts what is in them when it decodes. When it encodes, it fills lists whose room `encode`
checks first. Deliberately not here: windows, what is wrong with parts, and what a byte means.
"""

import ctypes
from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

import torch

from ..errors import FormatError
from ..native import compiler
from ..native.threads import over_threads, runs_of
from ._fle_codes import TILE

_COUNTED = 1 << 20  # words that a thread counts at once
_LEAST = 1 << 18  # words that are worth a thread


class _Matrix(ctypes.Structure):
    """struct fewbit_fle."""

    _fields_: ClassVar = [
        ("words", ctypes.c_void_p), ("sign_mantissa", ctypes.c_void_p), ("codes", ctypes.c_void_p),
        ("offset", ctypes.c_void_p), ("position", ctypes.c_void_p), ("exponent", ctypes.c_void_p),
        ("n", ctypes.c_int64), ("k", ctypes.c_int64), ("escapes", ctypes.c_int64),
        ("bits", ctypes.c_int32), ("base", ctypes.c_int32), ("width", ctypes.c_int32),
        ("isa", ctypes.c_int32),
    ]  # fmt: skip


def serves(*tensors: torch.Tensor) -> bool:
    """Whether tensors that are where these are can be given to the calls below."""
    if torch.compiler.is_compiling() or any(tensor.device.type != "cpu" for tensor in tensors):
        return False
    return compiler.library() is not None


def count(words: torch.Tensor) -> torch.Tensor:
    """int64 [256]: how often each exponent occurs in int16 words of bf16."""
    pieces = list(words.view(-1).split(_COUNTED))
    return torch.stack(list(over_threads(_count, pieces))).sum(0)


def _count(words: torch.Tensor) -> torch.Tensor:
    counts = torch.zeros(256, dtype=torch.int64)
    call = _library().fewbit_fle_count
    call(_pointer(words), ctypes.c_int64(words.numel()), _pointer(counts))
    return counts


def encode(words: torch.Tensor, parts: Mapping[str, torch.Tensor], bits: int) -> None:
    """Fill sign_mantissa, codes, offset and the lists for int16 words [N, K]; window is there.

    FormatError, and the lists untouched, unless they have room for exactly the escapes that there are.
    """
    matrix = _matrix(words, parts, bits)
    parts["offset"][0] = 0
    _over_bands(_library().fewbit_fle_encode, matrix)
    parts["offset"].copy_(parts["offset"].cumsum(0))
    found, rooms = int(parts["offset"][-1]), {matrix.escapes}
    if bits == 4:
        rooms.add(parts["position"].numel())
    if rooms != {found}:
        raise FormatError(
            f"the lists have room for {sorted(rooms)} escapes, the words have {found} outside of the "
            f"window; count the words that are encoded, and do not change them meanwhile"
        )
    _over_bands(_library().fewbit_fle_list, matrix)


def decode(parts: Mapping[str, torch.Tensor], words: torch.Tensor, bits: int) -> bool:
    """Fill int16 words [N, K]. False if the parts contradict each other: then words hold anything."""
    return not any(_over_bands(_library().fewbit_fle_decode, _matrix(words, parts, bits)))


def _over_bands(call: Callable[..., int], matrix: _Matrix) -> list[int]:
    """What `call` answers for runs of bands that make up the matrix."""
    n_bands = -(-matrix.n // TILE)
    n_runs = min(torch.get_num_threads(), 1 + matrix.n * matrix.k // _LEAST)
    return list(over_threads(partial(_of_run, call, matrix), runs_of(n_bands, n_runs)))


def _of_run(call: Callable[..., int], matrix: _Matrix, run: tuple[int, int]) -> int:
    return call(ctypes.byref(matrix), *map(ctypes.c_int64, run))


def _matrix(words: torch.Tensor, parts: Mapping[str, torch.Tensor], bits: int) -> _Matrix:
    """The struct; its tensors must outlive it."""
    base, width = parts["window"].tolist()
    position = parts.get("position", parts["offset"])  # never looked at in fle3
    tensors = (
        words, parts["sign_mantissa"], parts["codes"], parts["offset"], position, parts["exponent"]
    )  # fmt: skip
    isa = _library().fewbit_isa(compiler.isa_cap())
    return _Matrix(
        *(tensor.data_ptr() for tensor in tensors), *words.shape, parts["exponent"].numel(), bits, base,
        width, isa,
    )  # fmt: skip


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _library() -> ctypes.CDLL:
    found = compiler.library()
    if found is None:
        raise RuntimeError(f"native code was called without a library: {compiler.why_not()}")
    return found
