"""Shared tables of KV streams: measured once on a model, referred to by hash in every stream.

For keys and for values of every layer: in which order channels are coded, what foretells them
(`kv_stream_predict.py`), and how often each symbol occurs, for groups of channels that are alike. A
stream carries none of it, which is what makes streams of 256 tokens small; it names the SHA-256 of
the tables, and is refused with others. Every symbol has a frequency of at least 1 of 4096: any text
can be coded, texts unlike the profiled ones cost more.

Channels are sorted by what their symbols cost and cut into at most 8 groups of 64 or a multiple (the
last takes the rest): with 256 tokens, 64 channels are 16384 symbols, one chunk of the coder. Bits of a
code at level 2, on the bundled model and another text than was profiled (`bench/kv_stream.py`): 3.539
with one table for a layer's keys and one for its values, 3.517 with two groups of sorted channels,
3.493 with means besides, 3.316 with correlations, which a side of a layer gets only if they save it
0.02 bit.

The file, little-endian

    "fewbitKT"  u32 version 1  u32 layers
    per layer, keys then values
        u32 heads  u32 head_dim
        u32 order [channels]     position -> channel; channels = heads · head_dim
        i16 mean [channels]      i16 correlation [channels]       by channel, 1024ths
        for bins 12, 16, 32:     u16 frequency [groups, bins − 1]
    SHA-256 of all the above, 32 bytes

Nothing here depends on the length of a prefix, on a batch, or on how heads are spread over devices.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .codecs.rans32 import normalize
from .errors import CalibrationError
from .kv_stream_codes import BINS, Pair, n_symbols, quantize
from .kv_stream_frame import Reader, StreamError
from .kv_stream_predict import ONE, Predictor, residuals

MAGIC, VERSION = b"fewbitKT", 1
GROUP = 64  # channels, or a multiple
_MOST_GROUPS = 8  # calls of the coder a piece; more of them take longer than they save
_CHUNK = 256  # tokens after which guesses start anew; what streams use unless told
_WORTH = 0.02  # bits of a symbol that correlations must save a side
_MOST_LAYERS, _MOST_CHANNELS = 1 << 12, 1 << 20
_TOTAL = 4096


def n_groups(channels: int) -> int:
    """Groups that this many channels are cut into."""
    return max(1, channels // _width(channels))


def _width(channels: int) -> int:
    """Channels of a group: a multiple of 64 of which at most 8 fit."""
    return GROUP * max(1, -(-channels // (GROUP * _MOST_GROUPS)))


def group_edges(channels: int) -> np.ndarray:
    """int64 [groups + 1]: positions, in the order of coding, at which groups begin, and the end."""
    return np.append(np.arange(n_groups(channels)) * _width(channels), channels).astype(np.int64)


def group_slices(channels: int) -> list[slice]:
    """Positions, in the order of coding, of each group."""
    return [slice(*ends) for ends in pairwise(group_edges(channels).tolist())]


@dataclass(frozen=True, eq=False)
class SideTable:
    """Keys, or values, of one layer. order: uint32 [channels]. frequencies: bins -> uint16
    [groups, 256]."""

    heads: int
    head_dim: int
    order: np.ndarray
    predictor: Predictor
    frequencies: dict[int, np.ndarray]

    def to_bytes(self) -> bytes:
        """As drawn above."""
        predictor = self.predictor
        parts = [
            struct.pack("<II", self.heads, self.head_dim),
            self.order.astype("<u4").tobytes(),
            predictor.mean.astype("<i2").tobytes(),
            predictor.correlation.astype("<i2").tobytes(),
        ]
        for bins in BINS:
            parts.append(self.frequencies[bins][:, : n_symbols(bins)].astype("<u2").tobytes())
        return b"".join(parts)


@dataclass(frozen=True, eq=False)
class Tables:
    """All layers: (keys, values) each."""

    layers: tuple[tuple[SideTable, SideTable], ...]

    @cached_property
    def body(self) -> bytes:
        """The file without its hash."""
        head = MAGIC + struct.pack("<II", VERSION, len(self.layers))
        return head + b"".join(side.to_bytes() for sides in self.layers for side in sides)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of `body`, which streams refer to."""
        return hashlib.sha256(self.body).digest()

    def to_bytes(self) -> bytes:
        """The file."""
        return self.body + self.digest


def read_tables(source: str | Path | bytes) -> Tables:
    """Tables from a file or its bytes. StreamError: not ours, a newer version, or damaged."""
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    where = "KV tables" if isinstance(source, bytes) else f"KV tables {source}"
    if data[: len(MAGIC)] != MAGIC:
        raise StreamError(f"{where}: not a table file (it must begin with {MAGIC.decode()})")
    reader = Reader(data, where)
    reader.take(len(MAGIC))
    version, n_layers = reader.unpack("<II")
    if version != VERSION:
        raise StreamError(f"{where}: version {version}, this fewbit reads {VERSION}; upgrade it")
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise StreamError(f"{where}: the SHA-256 does not match; profile again, or copy them anew")
    if not 0 < n_layers <= _MOST_LAYERS:
        raise StreamError(f"{where}: {n_layers} layers, must be 1 to {_MOST_LAYERS}")
    layers = []
    for layer in range(n_layers):
        reader.where = f"{where}: layer {layer}"
        layers.append((_read_side(reader), _read_side(reader)))
    if reader.left != 32:
        raise StreamError(f"{where}: {reader.left - 32} bytes too many")
    return Tables(tuple(layers))


def _read_side(reader: Reader) -> SideTable:
    heads, head_dim = reader.unpack("<II")
    channels = heads * head_dim
    if not 0 < channels <= _MOST_CHANNELS:
        raise StreamError(
            f"{reader.where}: {heads} heads of {head_dim}, must be 1 to {_MOST_CHANNELS} channels"
        )
    order = reader.array("<u4", channels)
    mean, correlation = (reader.array("<i2", channels) for _ in range(2))
    if not np.array_equal(np.sort(order), np.arange(channels)):
        raise StreamError(f"{reader.where}: the order of channels is not a permutation")
    if max(np.abs(part.astype(np.int32)).max() for part in (mean, correlation)) > ONE:
        raise StreamError(f"{reader.where}: a mean or correlation is beyond ±{ONE}")
    frequencies = {}
    for bins in BINS:
        shape = (n_groups(channels), n_symbols(bins))
        found = reader.array("<u2", shape[0] * shape[1]).reshape(shape)
        if found.min() < 1 or (found.sum(axis=1, dtype=np.int64) != _TOTAL).any():
            raise StreamError(f"{reader.where}: frequencies must be >= 1 and sum to {_TOTAL}")
        frequencies[bins] = _wide(found)
    return SideTable(heads, head_dim, order, Predictor(mean, correlation), frequencies)


def _wide(frequencies: np.ndarray) -> np.ndarray:
    """uint16 [groups, 256] of [groups, symbols]."""
    wide = np.zeros((len(frequencies), 256), np.uint16)
    wide[:, : frequencies.shape[1]] = frequencies
    return wide


def profile_model(model: Any, rows: torch.Tensor) -> Tables:
    """Tables from what a model caches of token rows int64 [n, T], one row at a time, twice.

    CalibrationError: no rows, or a layer whose cache is not plain keys and values of all tokens.
    """
    from transformers import DynamicCache

    def caches() -> Iterable[list[Pair]]:
        for row in rows:
            cache = DynamicCache(config=model.config.get_text_config(decoder=True))
            with torch.no_grad():
                model(row.unsqueeze(0).to(model.device), past_key_values=cache)
            yield [_plain(layer, i) for i, layer in enumerate(cache.layers)]

    return profile(caches)


def _plain(layer: Any, index: int) -> Pair:
    from transformers.cache_utils import DynamicLayer

    if type(layer) is not DynamicLayer:
        raise CalibrationError(
            f"KV streams need full attention in every layer; layer {index} caches as "
            f"{type(layer).__name__}"
        )
    return layer.keys, layer.values


def profile(caches: Callable[[], Iterable[Sequence[Pair]]]) -> Tables:
    """Tables from the keys and values [B, heads, T, D] of every layer, for each prefix profiled.

    caches: called twice, must answer the same. CalibrationError: it answers nothing.
    """
    sides: list[tuple[_Moments, _Moments]] = []
    for layers in caches():
        sides = sides or [(_Moments(k), _Moments(v)) for k, v in layers]
        for found, pair in zip(sides, layers, strict=True):
            for moments, vectors in zip(found, pair, strict=True):
                moments.add(vectors)
    if not sides:
        raise CalibrationError(
            "no prefix to profile; give at least one, better several thousand tokens"
        )
    counts = [tuple(_Counts(moments) for moments in found) for found in sides]
    for layers in caches():
        for counted, pair in zip(counts, layers, strict=True):
            for side, vectors in zip(counted, pair, strict=True):
                side.add(vectors)
    return Tables(tuple((keys.table(), values.table()) for keys, values in counts))


class _Moments:
    """Sums over tokens of u = x / m, for each channel: of u, u², and u times the u before."""

    def __init__(self, like: torch.Tensor) -> None:
        self.heads, self.head_dim = like.shape[1], like.shape[3]
        channels = self.heads * self.head_dim
        self.n = self.n_pairs = 0
        self.total, self.square, self.product = np.zeros((3, channels))

    def add(self, vectors: torch.Tensor) -> None:
        codes, _ = quantize(vectors, 32)  # finite whatever the vectors are
        u = codes.numpy(force=True).astype(np.float64) / 15 - 1
        self.n += u.shape[0] * u.shape[1]
        self.n_pairs += u.shape[0] * (u.shape[1] - 1)
        self.total += u.sum(axis=(0, 1))
        self.square += (u * u).sum(axis=(0, 1))
        self.product += (u[:, 1:] * u[:, :-1]).sum(axis=(0, 1))

    def predictor(self) -> Predictor:
        mean = self.total / max(self.n, 1)
        variance = self.square / max(self.n, 1) - mean * mean
        covariance = self.product / max(self.n_pairs, 1) - mean * mean
        correlation = covariance / np.maximum(variance, 1e-12)
        return Predictor(_fixed(mean), _fixed(np.clip(correlation, -1, 1)))


def _fixed(value: np.ndarray) -> np.ndarray:
    return np.round(value * ONE).astype(np.int16)


class _Counts:
    """Counts of symbols for each channel and number of bins, with and without correlations."""

    def __init__(self, moments: _Moments) -> None:
        self.heads, self.head_dim = moments.heads, moments.head_dim
        following = moments.predictor()
        self.predictors = (following.unconditional(), following)
        channels = self.heads * self.head_dim
        self.counts = tuple(
            {bins: np.zeros((channels, n_symbols(bins)), np.int64) for bins in BINS}
            for _ in self.predictors
        )

    def add(self, vectors: torch.Tensor) -> None:
        for bins in BINS:
            codes = quantize(vectors, bins)[0].numpy(force=True)
            for predictor, counts in zip(self.predictors, self.counts, strict=True):
                for start in range(0, codes.shape[1], _CHUNK):
                    symbols = residuals(codes[:, start : start + _CHUNK], predictor, bins)
                    _count_into(counts[bins], symbols)

    def table(self) -> SideTable:
        """The cheaper predictor's."""
        costs = [np.stack([_bits(counts[b]) for b in BINS]) for counts in self.counts]
        saved = costs[0].mean() - costs[1].mean()
        chosen = int(saved >= _WORTH)
        order = costs[chosen].mean(axis=0).argsort(kind="stable").astype(np.uint32)
        return SideTable(
            self.heads,
            self.head_dim,
            order,
            self.predictors[chosen],
            {bins: _frequencies(self.counts[chosen][bins][order]) for bins in BINS},
        )


def _count_into(counts: np.ndarray, symbols: np.ndarray) -> None:
    """Add symbols [rows, tokens, channels] to counts [channels, n]."""
    channels, n = counts.shape
    places = symbols.astype(np.int64) + np.arange(channels) * n
    counts += np.bincount(places.ravel(), minlength=channels * n).reshape(channels, n)


def _bits(counts: np.ndarray) -> np.ndarray:
    """Order-0 entropy of each channel, bits per symbol [channels]."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return -(share * np.log2(np.where(share > 0, share, 1))).sum(axis=1)


def _frequencies(counts: np.ndarray) -> np.ndarray:
    """uint16 [groups, 256] of counts [channels, symbols] in the order of coding."""
    frequencies = np.zeros((n_groups(len(counts)), 256), np.uint16)
    for group, positions in enumerate(group_slices(len(counts))):
        padded = np.zeros(256, np.int64)
        padded[: counts.shape[1]] = counts[positions].sum(axis=0) + 1
        frequencies[group] = normalize(padded)
    return frequencies
