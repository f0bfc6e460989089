"""A piece of a KV stream: keys or values of one layer, for the tokens of one chunk.

level 1 … 3, vectors [B, heads, T, D] (`kv_stream_codes.py`, `kv_stream_predict.py`)
    u16 base  u8 width 1 … 16            maxima, as bits of bf16: base + that many bits for each
    bits, least significant first        [B, T]
    per group of channels                symbols [B, T, channels of the group], one plane,
        streams                          coded with the table of the group

level 0, bytes of a tensor (elements in the order of its shape)
    u8 mask                              bit j: byte plane j is coded
    per coded plane                      u8 [32] which symbols occur, u16 frequency of each
    streams

streams, of n elements in C = ⌈n / 16384⌉ chunks, J coded and R raw planes (`codecs/chunks.py`)
    u8  [·]           raw planes, less what the states of chunks carry
    u32 [C]           CRC32C of the elements
    u32 [C · J]       bits 31..30 mode (rans, constant, raw), bits 29..0 bytes of words
    u32 [·, 32]       end states, for the streams with mode rans
    u8  [·]           symbols, for the streams with mode constant
    u16 [·, 32]       what states carry, for the streams that do and have another mode than rans
    u8  [·]           words

A chunk's index costs 136 bytes of up to 16384, 0.066 bit an element.
"""

import struct
from itertools import pairwise

import numpy as np
import torch

from .codecs import rans32
from .codecs.planes import Kind, kind_of
from .codecs.rans32 import CARRIED, CHUNK, LANES, Damage, Group, Mode, flat_layout
from .kv_stream_codes import dequantize, n_symbols, quantize
from .kv_stream_frame import Reader, StreamError
from .kv_stream_predict import from_runs, to_runs
from .kv_stream_profile import SideTable, group_edges

_LENGTH = (1 << 30) - 1
_MODE, _OFFSET = 62, (1 << 62) - 1
_STREAM = 4 + 4 + 4 * LANES  # bytes that a coded chunk takes besides its words


def encode_vectors(vectors: torch.Tensor, bins: int, table: SideTable) -> bytes:
    """A piece of level 1 … 3."""
    codes, maxima = quantize(vectors, bins)
    edges = group_edges(codes.shape[2])
    symbols = to_runs(codes.numpy(force=True), table.predictor, table.order, edges, bins)
    parts = [_pack_maxima(maxima)]
    ends = edges * maxima.numel()
    for group, (start, stop) in enumerate(pairwise(ends.tolist())):
        coded = rans32.encode_symbols(symbols[start:stop], table.frequencies[bins][group])
        parts.append(_streams(coded))
    return b"".join(parts)


def decode_vectors(
    piece: Reader, rows: int, tokens: int, bins: int, table: SideTable, dtype: torch.dtype
) -> torch.Tensor:
    """Vectors [rows, heads, tokens, D] of a piece of level 1 … 3."""
    maxima = _unpack_maxima(piece, rows, tokens)
    edges, coded = group_edges(len(table.order)), []
    ends = (edges * (rows * tokens)).tolist()
    for start, stop in pairwise(ends):
        coded.append(_read_streams(piece, stop - start, 1, 0))
    piece.end()
    symbols = np.empty(ends[-1], np.uint8)
    for group, (start, stop) in enumerate(pairwise(ends)):
        layout, frequencies = flat_layout(stop - start, Kind.BYTE), table.frequencies[bins]
        try:
            rans32.decode(
                coded[group], symbols[start:stop], Kind.BYTE, layout, frequencies[group, None]
            )
        except Damage as damage:
            raise StreamError(f"{piece.where}, group {group}: {damage}") from damage
    if symbols.max() >= n_symbols(bins):
        raise StreamError(f"{piece.where}: symbol {symbols.max()} of {n_symbols(bins)}")
    shape = (rows, tokens, len(table.order))
    codes = torch.from_numpy(from_runs(symbols, shape, table.predictor, table.order, edges, bins))
    return dequantize(codes, maxima, bins, table.heads, dtype)


def _pack_maxima(maxima: torch.Tensor) -> bytes:
    words = maxima.contiguous().view(torch.int16).numpy(force=True).reshape(-1)
    values = words.astype(np.int64) & 0xFFFF
    base = int(values.min())
    width = max(int(values.max() - base).bit_length(), 1)
    bits = (values[:, None] - base) >> np.arange(width) & 1
    packed = np.packbits(bits.astype(np.uint8), bitorder="little")
    return struct.pack("<HB", base, width) + packed.tobytes()


def _unpack_maxima(piece: Reader, rows: int, tokens: int) -> torch.Tensor:
    base, width = piece.unpack("<HB")
    n = rows * tokens
    if not 0 < width <= 16:
        raise StreamError(f"{piece.where}: maxima of {width} bits, must be 1 to 16")
    packed = piece.array("u1", -(-n * width // 8))
    bits = np.unpackbits(packed, count=n * width, bitorder="little").reshape(n, width)
    values = base + (bits.astype(np.int64) << np.arange(width)).sum(axis=1)
    words = torch.from_numpy((values & 0xFFFF).astype(np.uint16).view(np.int16))
    return words.view(torch.bfloat16).reshape(rows, tokens)


def encode_tensor(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, coded without loss. Planes are coded where that makes them smaller."""
    kind = kind_of(tensor.dtype)
    data = tensor.detach().contiguous().view(torch.uint8).numpy(force=True).reshape(-1)
    layout = flat_layout(data.size // kind.n_planes, kind)
    counts = rans32.count(data, kind, layout)
    frequencies = np.stack([_frequencies(plane, len(layout.sizes)) for plane in counts])
    coded = frequencies.any(axis=1)
    parts = [struct.pack("<B", int(np.packbits(coded, bitorder="little")[0]))]
    for row in frequencies[coded]:
        parts.append(np.packbits(row > 0, bitorder="little").tobytes())
        parts.append(row[row > 0].astype("<u2").tobytes())
    group = rans32.encode(data, kind, layout, frequencies)
    n_carrying = _n_carrying(layout.n_elements, int(coded.sum()), int((~coded).sum()))
    return b"".join((*parts, _streams(group, n_carrying)))


def _frequencies(counts: np.ndarray, n_chunks: int) -> np.ndarray:
    """uint16 [256], zeros where a plane's streams, index and table would not be smaller."""
    n, used = int(counts.sum()), counts[counts > 0]
    n_bytes = float((used * np.log2(n / used)).sum()) / 8 if n else 0.0
    if n_bytes + n_chunks * _STREAM + 32 + 2 * len(used) >= n:
        return np.zeros(256, np.uint16)
    return rans32.normalize(counts)


def decode_tensor(piece: Reader, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that `encode_tensor` was given."""
    kind = kind_of(dtype)
    (mask,) = piece.unpack("<B")
    if mask >> kind.n_planes:
        raise StreamError(f"{piece.where}: plane mask {mask:#x} of {kind.n_planes} planes")
    frequencies = np.zeros((kind.n_planes, 256), np.uint16)
    for plane in range(kind.n_planes):
        if mask >> plane & 1:
            used = np.unpackbits(piece.array("u1", 32), bitorder="little").astype(bool)
            frequencies[plane, used] = piece.array("<u2", int(used.sum()))
    n, n_coded = int(np.prod(shape, dtype=object)), mask.bit_count()
    coded = _read_streams(piece, n, n_coded, kind.n_planes - n_coded)
    found = torch.empty(n, dtype=dtype)
    data = found.view(torch.uint8).numpy()
    try:
        rans32.decode(coded, data, kind, flat_layout(n, kind), frequencies)
    except ValueError as damage:  # Damage, or frequencies that cannot be
        raise StreamError(f"{piece.where}: {damage}") from damage
    return found.reshape(shape)


def _streams(group: Group, n_carrying: int = 0) -> bytes:
    """As drawn above; n_carrying: of the chunks."""
    offsets = (group.index & np.uint64(_OFFSET)).astype(np.int64)
    modes = (group.index[:-1] >> np.uint64(_MODE)).astype(np.int64)
    heads = modes << 30 | np.diff(offsets)
    is_constant = modes == Mode.CONSTANT
    aside = _aside(modes, len(group.crc), n_carrying)
    return b"".join((
        group.raw.tobytes(),
        group.crc.astype("<u4").tobytes(),
        heads.astype("<u4").tobytes(),
        group.state[modes == Mode.RANS].astype("<u4").tobytes(),
        (group.state[is_constant, 0] >> np.uint32(16)).astype(np.uint8).tobytes(),
        group.state[aside].astype("<u2").tobytes(),
        group.words.tobytes(),
    ))  # fmt: skip


def _n_carrying(n: int, n_coded: int, n_raw: int) -> int:
    """How many chunks of n elements, the first ones, carry bytes of a raw plane in their states."""
    return (n + CHUNK - CARRIED) // CHUNK if n_coded and n_raw else 0


def _aside(modes: np.ndarray, n_chunks: int, n_carrying: int) -> np.ndarray:
    """bool [C · J]: streams that carry something and are not rans."""
    is_first = np.zeros((n_chunks, len(modes) // max(n_chunks, 1)), bool)
    is_first[:n_carrying, :1] = True
    return is_first.reshape(-1) & (modes != Mode.RANS)


def _read_streams(piece: Reader, n: int, n_coded: int, n_raw: int) -> Group:
    """The group of n elements; what it says is for the decoder to check."""
    n_chunks, n_carrying = -(-n // CHUNK), _n_carrying(n, n_coded, n_raw)
    raw = piece.array("u1", n_raw * n - CARRIED * n_carrying)
    crc = piece.array("<u4", n_chunks)
    heads = piece.array("<u4", n_chunks * n_coded).astype(np.int64)
    modes, lengths = heads >> 30, heads & _LENGTH
    state = np.zeros((len(heads), LANES), np.uint32)
    is_rans, is_constant = modes == Mode.RANS, modes == Mode.CONSTANT
    aside = _aside(modes, n_chunks, n_carrying)
    n_rans, n_aside = int(is_rans.sum()), int(aside.sum())
    state[is_rans] = piece.array("<u4", n_rans * LANES).reshape(n_rans, LANES)
    symbols = piece.array("u1", int(is_constant.sum())).astype(np.uint32)
    state[is_constant] = symbols[:, None] << np.uint32(16)
    state[aside] |= piece.array("<u2", n_aside * LANES).reshape(n_aside, LANES)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    words = piece.array("u1", int(offsets[-1]))
    index = offsets.astype(np.uint64)
    index[:-1] |= modes.astype(np.uint64) << np.uint64(_MODE)
    return Group(raw, words, index, state, crc)
