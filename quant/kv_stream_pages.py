"""Packed cache layers as KV streams carry them: what is stored, bit for bit, and back.

A frame's piece, for keys or values of one layer, at level 0

    per part of the page format, by name    its numbers [rows, heads, tokens, *part] for the tokens
                                            of the chunk that lie in pages
    last frame only                         tail [rows, heads, tokens − tail, D], as computed
                                            sink [rows, heads, count, D] and starts int64 [rows]

each coded by `kv_stream_piece.encode_tensor`. Pages are read through their table, so that rows that
share pages (beams) come out as rows of their own. A restored layer reads, stores and crops like the
one that was encoded: its tail has the same tokens, its pages the same bytes.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .format import Parts
from .kv_cache import PackedLayer
from .kv_pages import PAGE, PageArena
from .kv_stream_frame import Frame, Header, Reader, StreamError
from .kv_stream_piece import decode_tensor, encode_tensor
from .page_format import find_page_format


def stored_until(layer: PackedLayer) -> tuple[int, int]:
    """(tokens in pages, first token of the tail) of a layer that holds tokens."""
    n_stored = 0 if layer.pages is None else layer.pages.n_tokens
    return n_stored, layer.n_tokens if layer.tail is None else layer.tail.start


def encode_packed(layer: PackedLayer, start: int, stop: int, last: bool) -> tuple[bytes, bytes]:
    """Pieces of keys and values for tokens start … stop."""
    arena = _arena(layer)
    pieces = [[encode_tensor(parts[name]) for name in sorted(parts)]
              for parts in _parts(arena, start, min(stop, arena.n_tokens))]  # fmt: skip
    if last:
        for side, piece in enumerate(pieces):
            piece += [encode_tensor(tensor) for tensor in _dense(layer, side)]
    return b"".join(pieces[0]), b"".join(pieces[1])


def _arena(layer: PackedLayer) -> PageArena:
    if layer.pages is None:
        raise StreamError("a packed layer holds nothing yet; run the model first")
    return layer.pages


def _parts(arena: PageArena, start: int, stop: int) -> tuple[Parts, Parts]:
    """Stored parts [rows, heads, stop − start, *part] of keys and of values."""
    if stop <= start:
        return {}, {}
    paged, first = arena.paged(), start // PAGE
    pages = paged.table[:, first : -(-stop // PAGE)]
    tokens = slice(start - first * PAGE, stop - first * PAGE)
    keys, values = (
        {name: part[pages].transpose(1, 2).flatten(2, 3)[:, :, tokens]
         for name, part in parts.items()}
        for parts in (paged.keys, paged.values)
    )  # fmt: skip
    return keys, values


def _dense(layer: PackedLayer, side: int) -> list[torch.Tensor]:
    """Tail, then sink and starts, of a layer that has them."""
    found = []
    if layer.tail is not None and layer.tail.stop > layer.tail.start:
        found.append(layer.tail.buffers[side][:, :, : layer.tail.stop - layer.tail.start])
    if layer.sink is not None:
        found += [layer.sink.buffers[side], layer.sink.starts]
    return found


def restore_packed(
    layers: Sequence[Any], frame: Frame, header: Header, device: torch.device
) -> None:
    """Append one frame's tokens to the packed layers of a cache; the last one finishes them."""
    start, stop = header.span(frame.index)
    for number, layer in enumerate(layers):
        if not layer.is_initialized:
            key, value = (
                torch.empty((header.rows, heads, 0, dim), dtype=header.dtype, device=device)
                for heads, dim in header.shapes[number]
            )
            layer.lazy_initialization(key, value)
        pieces = frame.pieces[2 * number : 2 * number + 2]
        n_stored = min(stop, header.stored) - start
        if n_stored > 0:
            _append(layer, pieces, n_stored)
        if frame.index == header.n_chunks - 1:
            _finish(layer, pieces, header, number)
        layer.n_tokens = stop
        for piece in pieces:
            piece.end()


def _append(layer: PackedLayer, pieces: Sequence[Reader], n_new: int) -> None:
    """Give pages to n tokens, and write their parts."""
    arena = _arena(layer)
    start, rows = arena.n_tokens, arena.n_rows
    decoded = []
    for side, piece in zip(arena.sides, pieces, strict=True):
        specs = find_page_format(side.use.format).part_specs(
            side.head_dim, side.dtype, side.use.options
        )
        decoded.append({
            name: decode_tensor(piece, (rows, side.n_heads, n_new, *spec.shape), spec.dtype)
            for name, spec in sorted(specs.items())
        })  # fmt: skip
    arena.append(*(
        torch.zeros((), dtype=side.dtype, device=arena.device)
        .expand(rows, side.n_heads, n_new, side.head_dim)
        for side in arena.sides
    ))  # fmt: skip
    paged = arena.paged()
    tokens = torch.arange(start, start + n_new, device=arena.device)
    pages, slots = paged.table[:, tokens // PAGE], tokens % PAGE
    for parts, storage in zip(decoded, (paged.keys, paged.values), strict=True):
        for name, part in parts.items():
            # [rows, heads, tokens, …] to [rows, tokens, heads, …]: indices first, then what is sliced
            storage[name][pages, :, slots] = part.transpose(1, 2).to(arena.device)


def _finish(layer: PackedLayer, pieces: Sequence[Reader], header: Header, number: int) -> None:
    """Tail and sink, from the last frame."""
    for side, piece in enumerate(pieces):
        heads, dim = header.shapes[number][side]
        n_tail = header.tokens - header.tail
        if layer.tail is not None:
            buffer = layer.tail.buffers[side]
            if n_tail > buffer.shape[2]:
                raise StreamError(
                    f"{piece.where}: a tail of {n_tail} tokens, at most {buffer.shape[2]}"
                )
            if n_tail:
                shape = (header.rows, heads, n_tail, dim)
                buffer[:, :, :n_tail] = decode_tensor(piece, shape, header.dtype)
            layer.tail.start, layer.tail.stop = header.tail, header.tokens
        if layer.sink is not None:
            shape = (header.rows, heads, layer.sink.count, dim)
            layer.sink.buffers[side].copy_(decode_tensor(piece, shape, header.dtype))
            starts = decode_tensor(piece, (header.rows,), torch.int64)
            if not torch.equal(starts, layer.sink.starts):
                raise StreamError(
                    f"{piece.where}: encoded with rows that begin at {starts.tolist()}, the cache "
                    f"was made for {layer.sink.starts.tolist()}; give KVCache these `starts`"
                )
