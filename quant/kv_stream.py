"""A prefix's keys and values as bytes: written once, sent or kept, and put into another cache.

    tables = profile_model(model, rows)                     # once per model: kv_stream_profile.py
    model(prefix, past_key_values=cache)
    write_prefix("prefix.kv", cache, level=2, tables=tables)

    cache = DynamicCache(config=model.config)
    fill_cache(cache, "prefix.kv", tables)                  # a file, bytes, or what has read(n)
    model.generate(prompt, past_key_values=cache)           # goes on behind the prefix

Level 0 is lossless: 16-bit (or fp32) keys and values bit for bit, and the pages, tail and sink of
our packed cache bit for bit. Levels 1 … 3 take dense keys and values, and need tables; what is read
is a function of the stored codes, the same as `kv_stream_codes.as_decoded` without any coder.

A prefix is cut into chunks of 256 tokens, each a frame that can be decoded by itself and may have a
level of its own: a server keeps `stream_header` and `encode_chunk` of each level, a client chooses
with `kv_stream_control.py`, and reads with `read_chunks` while they arrive.

Coding runs on the host, wherever the cache is; not yet run on a GPU. Only caches whose layers all have
full attention can be streamed. Streams hold no tokens: whoever keeps them knows which prefix, and which
model, they belong to.
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .kv_cache import KVCache, PackedLayer, is_packed
from .kv_stream_codes import LEVELS, LOSSLESS, Pair, bins_of
from .kv_stream_frame import (
    DTYPES,
    NO_TABLES,
    SIDES,
    Frame,
    Header,
    StreamError,
    frame_bytes,
    read_frame,
    read_header,
)
from .kv_stream_pages import encode_packed, restore_packed, stored_until
from .kv_stream_piece import decode_tensor, decode_vectors, encode_tensor, encode_vectors
from .kv_stream_profile import SideTable, Tables

Source = bytes | bytearray | memoryview | str | Path | BinaryIO
CHUNK = 256  # tokens


@dataclass(frozen=True)
class Chunk:
    """Decoded tokens start … stop: keys and values [B, heads, stop − start, D] of every layer."""

    index: int
    level: int
    start: int
    stop: int
    layers: list[Pair]


def encode_prefix(
    cache: Any, level: int = 2, tables: Tables | None = None, chunk: int = CHUNK
) -> bytes:
    """A whole prefix; see `stream_header` for the arguments."""
    return b"".join(_encoded(cache, level, tables, chunk))


def write_prefix(
    path: str | Path, cache: Any, level: int = 2, tables: Tables | None = None, chunk: int = CHUNK
) -> int:
    """`encode_prefix` into a file, chunk after chunk; the file's bytes.

    It is whole or absent: written under a temporary name, and renamed. CheckpointError: the disk.
    """
    from ..export.journal import named_os_errors, sync_folder

    path, n_bytes = Path(path), 0
    temporary = path.with_name(path.name + ".partial")
    with named_os_errors(path.parent):
        try:
            with open(temporary, "wb") as file:
                for block in _encoded(cache, level, tables, chunk):
                    n_bytes += file.write(block)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    return n_bytes


def _encoded(cache: Any, level: int, tables: Tables | None, chunk: int) -> Iterator[bytes]:
    """The header, then every frame."""
    header = stream_header(cache, tables if level else None, chunk)
    yield header.to_bytes()
    for index in range(header.n_chunks):
        yield encode_chunk(cache, header, index, level, tables)


def stream_header(cache: Any, tables: Tables | None = None, chunk: int = CHUNK) -> Header:
    """What the frames of a cache have in common.

    cache: a transformers cache, or pairs of keys and values [B, heads, T, D], one for each layer.
    tables: None only if every frame is going to be lossless. chunk: tokens of a frame.
    StreamError: a layer without full attention, or that differs from the others in tokens, rows or
    dtype; tables of another model.
    """
    if not isinstance(chunk, int) or not 0 < chunk <= 1 << 20:
        raise StreamError(f"KV stream: chunk must be 1 to {1 << 20} tokens, got {chunk!r}")
    if packed := _packed(cache):
        return _packed_header(packed, chunk)
    layers = _pairs(cache)
    key = layers[0][0]
    for number, pair in enumerate(layers):
        for name, x in zip(SIDES, pair, strict=True):
            same = (x.shape[0], x.shape[2], x.dtype) == (key.shape[0], key.shape[2], key.dtype)
            if not same or key.dtype not in DTYPES or x.numel() == 0:
                raise StreamError(
                    f"KV stream: layer {number} {name} are {x.dtype} {tuple(x.shape)}; all layers "
                    f"must hold the same tokens, at least one, in bf16, fp16 or fp32"
                )
    shapes = tuple(
        ((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3]))
        for keys, values in layers
    )
    header = Header(
        key.dtype, key.shape[0], key.shape[2], chunk, shapes,
        NO_TABLES if tables is None else tables.digest,
    )  # fmt: skip
    if tables is not None:
        _check_tables(header, tables)
    return header


def _packed(cache: Any) -> list[PackedLayer]:
    """The layers of our packed cache; none if it is another, or has other layers besides."""
    layers = list(getattr(cache, "layers", []))
    return layers if all(isinstance(layer, PackedLayer) for layer in layers) else []


def _pairs(cache: Any) -> list[Pair]:
    """Keys and values of every layer of a dense cache, or of a sequence of them."""
    layers = list(getattr(cache, "layers", cache))
    if not layers:
        raise StreamError("KV stream: the cache has no layers; run the model first")
    if not hasattr(cache, "layers"):
        return layers
    for number, layer in enumerate(layers):
        empty = is_packed(layer) and not layer.is_initialized
        if empty or not is_packed(layer):
            raise StreamError(
                f"KV stream: layer {number} is a {type(layer).__name__}"
                f"{' that holds nothing' if empty else ''}; every layer must have full attention "
                f"over tokens that it was given"
            )
    return [(layer.keys, layer.values) for layer in layers]


def _packed_header(layers: list[PackedLayer], chunk: int) -> Header:
    first = layers[0]
    stored, tail = stored_until(first)
    shapes = []
    for number, layer in enumerate(layers):
        here = (layer.n_tokens, *stored_until(layer))
        if layer.pages is None or not layer.n_tokens or here != (first.n_tokens, stored, tail):
            raise StreamError(
                f"KV stream: layer {number} holds {layer.n_tokens} tokens, layer 0 "
                f"{first.n_tokens}; all must hold the same, at least one"
            )
        keys, values = layer.pages.sides
        shapes.append(((keys.n_heads, keys.head_dim), (values.n_heads, values.head_dim)))
        n_rows = layer.pages.n_rows
    return Header(
        first.dtype, n_rows, first.n_tokens, chunk, tuple(shapes),
        policy=_policy_text(first), stored=stored, tail=tail,
    )  # fmt: skip


def _policy_text(layer: PackedLayer) -> str:
    """Compared with a cache's, and shown; nobody parses it."""
    return str(layer.policy.to_json())


def encode_chunk(
    cache: Any, header: Header, index: int, level: int, tables: Tables | None = None
) -> bytes:
    """The frame of chunk `index`. StreamError: a level that is not 0 … 3, or not 0 and packed."""
    start, stop = header.span(index)
    pieces: list[bytes] = []
    if packed := _packed(cache):
        if level != LOSSLESS:
            raise StreamError(
                f"KV stream: a packed cache is coded as it is, level {LOSSLESS}; got {level}"
            )
        for layer in packed:
            pieces += encode_packed(layer, start, stop, index == header.n_chunks - 1)
        return frame_bytes(header.crc, index, level, pieces)
    for number, pair in enumerate(_pairs(cache)):
        for side, vectors in enumerate(pair):
            run = vectors[:, :, start:stop]
            if level == LOSSLESS:
                pieces.append(encode_tensor(run))
                continue
            table = _table(header, tables, number, side)
            pieces.append(encode_vectors(run, _bins(level, side, number, header), table))
    return frame_bytes(header.crc, index, level, pieces)


def _bins(level: int, side: int, layer: int, header: Header) -> int:
    return bins_of(level, side, layer, len(header.shapes))


def _table(header: Header, tables: Tables | None, layer: int, side: int) -> SideTable:
    if tables is None:
        if header.tables == NO_TABLES:
            raise StreamError(
                "KV stream: levels 1 to 3 need tables; profile the model with "
                "kv_stream_profile.profile_model, or take level 0"
            )
        raise StreamError(f"KV stream: it needs the tables {header.tables.hex()}; none were given")
    if tables.digest != header.tables:
        raise StreamError(
            f"KV stream: it needs the tables {header.tables.hex()}, got {tables.digest.hex()}"
        )
    return tables.layers[layer][side]


def _check_tables(header: Header, tables: Tables) -> None:
    found = tuple(tuple((s.heads, s.head_dim) for s in sides) for sides in tables.layers)
    if found != header.shapes:
        raise StreamError(
            f"KV stream: the tables {tables.digest.hex()} are of a model of {len(found)} layers, "
            f"heads and sizes {found[0]}; the cache has {len(header.shapes)}, {header.shapes[0]}"
        )


def read_chunks(source: Source, tables: Tables | None = None) -> Iterator[Chunk]:
    """Chunks of a dense stream, each as soon as its bytes are there.

    source: bytes, a path, or an object whose read(n) gives at most n bytes, none at its end.
    StreamError: damage, named by chunk and layer; tables missing or others; a packed stream, which
    only `fill_cache` reads.
    """
    for header, frame in _frames(source):
        if header.packed:
            raise StreamError("KV stream: of a packed cache; read it with fill_cache")
        yield _decoded(header, frame, tables)


def _frames(source: Source) -> Iterator[tuple[Header, Frame]]:
    if isinstance(source, (str, Path)):
        with open(source, "rb") as file:
            yield from _frames(file)
            if file.read(1):
                raise StreamError(f"KV stream: bytes follow its last chunk in {source}")
        return
    stream = io.BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source
    header = read_header(stream.read)
    for index in range(header.n_chunks):
        yield header, read_frame(stream.read, header, index)
    if stream is not source and stream.read(1):
        raise StreamError("KV stream: bytes follow its last chunk")


def _decoded(header: Header, frame: Frame, tables: Tables | None) -> Chunk:
    start, stop = header.span(frame.index)
    vectors = []
    if frame.level not in (LOSSLESS, *LEVELS):
        raise StreamError(f"KV stream chunk {frame.index}: level {frame.level}, must be 0 to 3")
    if frame.level != LOSSLESS and tables is not None:
        _check_tables(header, tables)
    for number, piece in enumerate(frame.pieces):
        layer, side = divmod(number, len(SIDES))
        if frame.level == LOSSLESS:
            heads, dim = header.shapes[layer][side]
            shape = (header.rows, heads, stop - start, dim)
            vectors.append(decode_tensor(piece, shape, header.dtype))
            piece.end()
            continue
        table, bins = _table(header, tables, layer, side), _bins(frame.level, side, layer, header)
        vectors.append(decode_vectors(piece, header.rows, stop - start, bins, table, header.dtype))
    layers = list(zip(vectors[::2], vectors[1::2], strict=True))
    return Chunk(frame.index, frame.level, start, stop, layers)


def decode_prefix(source: Source, tables: Tables | None = None) -> list[Pair]:
    """Keys and values [B, heads, T, D] of every layer, on the host. Errors as in `read_chunks`."""
    return _joined(list(read_chunks(source, tables)))


def _joined(chunks: list[Chunk]) -> list[Pair]:
    """All tokens of every layer."""
    found: list[Pair] = []
    for layers in zip(*(chunk.layers for chunk in chunks), strict=True):
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*layers, strict=True))
        found.append((keys, values))
    return found


def fill_cache(
    cache: Any,
    source: Source,
    tables: Tables | None = None,
    device: torch.device | str = "cpu",
) -> int:
    """Put a stream into an empty transformers cache; the number of its tokens.

    cache: a `DynamicCache`, which gets all tokens at once, or our `KVCache`, which stores chunk after
    chunk by its own policy. A stream of a packed cache needs a `KVCache` of the same policy. device:
    of the model. After an error do not use the cache.
    """
    if cache.get_seq_length():
        raise StreamError(
            f"KV stream: the cache holds {cache.get_seq_length()} tokens already; give an empty one"
        )
    chunks = []
    for header, frame in _frames(source):
        if header.packed:
            if frame.index == 0:
                _check_policy(cache, header)
            restore_packed(cache.layers, frame, header, torch.device(device))
        elif isinstance(cache, KVCache):
            _update(cache, _decoded(header, frame, tables).layers, device)
        else:
            chunks.append(_decoded(header, frame, tables))
    _update(cache, _joined(chunks), device)
    return int(cache.get_seq_length())


def _update(cache: Any, layers: list[Pair], device: torch.device | str) -> None:
    for number, (keys, values) in enumerate(layers):
        cache.update(keys.to(device), values.to(device), number)


def _check_policy(cache: Any, header: Header) -> None:
    packed = isinstance(cache, KVCache) and all(isinstance(x, PackedLayer) for x in cache.layers)
    if not packed or len(cache.layers) != len(header.shapes):
        raise StreamError(
            f"KV stream: of a packed cache of {len(header.shapes)} layers; it fills a KVCache of as "
            f"many layers of full attention, got {type(cache).__name__}"
        )
    found = _policy_text(cache.layers[0])
    if found != header.policy:
        raise StreamError(f"KV stream: encoded under {header.policy}, the cache has {found}")
