"""Codes of a prefix become symbols that cost fewer bits: what the last token did not foretell.

Keys of neighbouring tokens resemble each other where the rotary angle turns slowly, and every channel
has its own mean. A profile knows both: per channel a mean a of x / m, and a correlation r with
the token before, each in 1024ths. In whole numbers, from codes alone, the same on every machine:

    a'    = a · C                                                 1024ths of a code
    guess = (a' + (r · (1024 · (last − C) − a') >> 10) + 512) >> 10, clamped to ±C
    symbol = (code − C − guess + C) mod (2C + 1)                  C where the guess was right

The first token of a chunk has the mean for a guess, so that chunks stay independent. Where no
channel's r differs from zero, all tokens are decoded at once; else decoding goes token by token, all
channels at once, through a table of guesses: 8 · channels · (2C + 1) bytes, made anew for each piece
and kept by nobody.

`residuals` and `restore` are the reference in numpy; `to_runs` and `from_runs`, which also bring
channels into the order of coding, do the same in C (quant/native/kv_stream.c) where it is to be had.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from .errors import FormatError
from .kv_stream_codes import centre, n_symbols
from .native import compiler

ONE = 1024  # a mean or a correlation of 1
_SHIFT, _HALF = 10, 512


@dataclass(frozen=True, eq=False)
class Predictor:
    """mean, correlation: int16 [channels], 1024ths, −1024 … 1024."""

    mean: np.ndarray
    correlation: np.ndarray

    @property
    def follows(self) -> bool:
        """Whether guesses depend on the token before."""
        return bool(self.correlation.any())

    def unconditional(self) -> "Predictor":
        """The same means, and no look at the token before."""
        return Predictor(self.mean, np.zeros_like(self.correlation))

    def guesses(self, bins: int) -> np.ndarray:
        """int64 [channels · n]: at (channel, last code), the guess less C, mod n."""
        c, n = centre(bins), n_symbols(bins)
        last = np.arange(n, dtype=np.uint8)[:, None]
        guess = _guess(last, self.mean.astype(np.int32) * c, self, c)  # [last, channels]
        return _wrap(guess.T, n).astype(np.int64).reshape(-1)


def residuals(codes: np.ndarray, predictor: Predictor, bins: int) -> np.ndarray:
    """Symbols uint8 [rows, tokens, channels] of codes of that shape and dtype."""
    c = centre(bins)
    mean = predictor.mean.astype(np.int32) * c
    guess = np.empty(codes.shape, np.int32)
    guess[:, :1] = _rounded(mean, c)
    if predictor.follows:
        guess[:, 1:] = _guess(codes[:, :-1], mean, predictor, c)
    else:
        guess[:, 1:] = _rounded(mean, c)
    return _wrap(codes.astype(np.int32) - guess, n_symbols(bins))


def restore(symbols: np.ndarray, predictor: Predictor, bins: int) -> np.ndarray:
    """Codes uint8 [rows, tokens, channels]; the inverse of `residuals` for symbols 0 … 2C."""
    c, n = centre(bins), n_symbols(bins)
    mean = predictor.mean.astype(np.int32) * c
    first = _rounded(mean, c)
    if not predictor.follows:
        return _wrap(symbols.astype(np.int32) + first, n)
    rows, _, channels = symbols.shape
    guesses, wrapped = predictor.guesses(bins), np.arange(2 * n) % n
    bases = np.arange(channels) * n  # where each channel's guesses begin
    steps = np.ascontiguousarray(symbols.transpose(1, 0, 2), np.int64)  # become codes
    steps[0] = _wrap(steps[0] + first, n)
    place, guess = (np.empty((rows, channels), np.int64) for _ in range(2))
    for last, step in pairwise(steps):
        np.add(last, bases, out=place)
        np.take(guesses, place, out=guess, mode="clip")  # always inside: codes < n
        guess += step
        np.take(wrapped, guess, out=step, mode="clip")  # always inside: symbols < n
    return steps.astype(np.uint8).transpose(1, 0, 2)


def _guess(last: np.ndarray, mean: np.ndarray, predictor: Predictor, c: int) -> np.ndarray:
    """Guessed codes less C, int32, after codes uint8 [..., channels]."""
    beyond = (last.astype(np.int32) - c) * ONE - mean
    return _rounded(mean + (beyond * predictor.correlation.astype(np.int32) >> _SHIFT), c)


def _rounded(value: np.ndarray, c: int) -> np.ndarray:
    return np.clip((value + _HALF) >> _SHIFT, -c, c)


def _wrap(value: np.ndarray, n: int) -> np.ndarray:
    """value mod n as uint8, for −n … 2n − 1: several times as fast as a division."""
    value = np.where(value < 0, value + n, value)
    return np.where(value >= n, value - n, value).astype(np.uint8)


def to_runs(
    codes: np.ndarray, predictor: Predictor, order: np.ndarray, edges: np.ndarray, bins: int
) -> np.ndarray:
    """Symbols uint8 [n] of codes [rows, tokens, channels], group after group.

    order: uint32 [channels], position -> channel. edges: int64 [groups + 1], positions. A group's
    symbols are [rows, tokens, channels of the group].
    """
    library = compiler.library()
    if library is not None:
        codes, symbols = np.ascontiguousarray(codes), np.empty(codes.size, np.uint8)
        _call(library, "fewbit_kv_encode", codes, symbols, predictor, order, edges, bins)
        return symbols
    symbols = residuals(codes, predictor, bins)[:, :, order]
    return np.concatenate([np.ravel(part) for part in np.split(symbols, edges[1:-1], axis=2)])


def from_runs(
    symbols: np.ndarray,
    shape: Sequence[int],
    predictor: Predictor,
    order: np.ndarray,
    edges: np.ndarray,
    bins: int,
) -> np.ndarray:
    """Codes uint8 of this shape [rows, tokens, channels]; the inverse of `to_runs`."""
    rows, tokens, channels = shape
    found = np.empty((rows, tokens, channels), np.uint8)
    library = compiler.library()
    if library is not None:
        _call(library, "fewbit_kv_decode", found, symbols, predictor, order, edges, bins)
        return found
    parts = np.split(symbols, edges[1:-1] * (rows * tokens))
    found[:, :, order] = np.concatenate([part.reshape(rows, tokens, -1) for part in parts], axis=2)
    return restore(found, predictor, bins)


class _Run(ctypes.Structure):
    """struct fewbit_kv_run."""

    _fields_: ClassVar[Sequence[tuple[str, type]]] = [
        ("codes", ctypes.c_void_p), ("symbols", ctypes.c_void_p), ("order", ctypes.c_void_p),
        ("mean", ctypes.c_void_p), ("correlation", ctypes.c_void_p), ("edges", ctypes.c_void_p),
        ("n_groups", ctypes.c_int64), ("rows", ctypes.c_int64), ("tokens", ctypes.c_int64),
        ("channels", ctypes.c_int64), ("centre", ctypes.c_int32), ("isa", ctypes.c_int32),
    ]  # fmt: skip


def _check(
    codes: np.ndarray,
    symbols: np.ndarray,
    predictor: Predictor,
    order: np.ndarray,
    edges: np.ndarray,
) -> None:
    """All that C takes for granted: it writes where `order` and `edges` say."""
    channels = codes.shape[2]
    ours = (predictor.mean, predictor.correlation)
    if not (codes.dtype == symbols.dtype == np.uint8 and symbols.size == codes.size
            and symbols.flags.c_contiguous and order.dtype == np.uint32 and order.shape == (channels,)
            and int(order.max(initial=0)) < max(channels, 1) and edges.size > 1 and edges[0] == 0
            and edges[-1] == channels and bool((edges[1:] >= edges[:-1]).all())):  # fmt: skip
        raise FormatError(
            f"codes {codes.shape}, symbols {symbols.shape}: they do not fit the order {order.shape} of "
            f"channels or its groups; use those of one profile"
        )
    if any(part.shape != (channels,) or part.min(initial=0) < -ONE or part.max(initial=0) > ONE
           for part in ours):  # fmt: skip
        raise FormatError(
            f"means and correlations must be {channels} numbers from {-ONE} to {ONE}, got shapes "
            f"{[part.shape for part in ours]}; read or make the profile again"
        )


def _call(
    library: ctypes.CDLL,
    function: str,
    codes: np.ndarray,
    symbols: np.ndarray,
    predictor: Predictor,
    order: np.ndarray,
    edges: np.ndarray,
    bins: int,
) -> None:
    """Run one of the two C functions on arrays that belong together; FormatError if they do not."""
    _check(codes, symbols, predictor, order, edges)
    rows, tokens, channels = codes.shape
    mean = (predictor.mean.astype(np.int32) * centre(bins))[order]
    kept = (order, mean, predictor.correlation.astype(np.int32)[order], edges.astype(np.int64))
    run = _Run(
        codes.ctypes.data, symbols.ctypes.data, *(array.ctypes.data for array in kept),
        len(edges) - 1, rows, tokens, channels, centre(bins),
        library.fewbit_isa(compiler.isa_cap()),
    )  # fmt: skip
    getattr(library, function)(ctypes.byref(run))
