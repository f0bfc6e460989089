"""Packed layers through a stream: pages, tail and sink bit for bit; shared pages, padding, crops."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from fewbit.quant.kv_cache import KVCache, PackedLayer
from fewbit.quant.kv_policy import KVPolicy, parse_kv
from fewbit.quant.kv_stream import encode_prefix, fill_cache
from fewbit.quant.kv_stream_frame import StreamError
from fewbit.quant.kv_stream_pages import stored_until

DENSE, INT4 = {"format": "dense_head"}, {"format": "int4_head"}
WINDOWS = pytest.mark.parametrize(("residual", "sink"), [(0, 0), (0, 4), (20, 0), (64, 4)])
FORMATS = pytest.mark.parametrize("form", [DENSE, INT4], ids=["dense", "int4"])


CONFIG = LlamaConfig(num_hidden_layers=2)


def policy(form: Any, residual: int, sink: int) -> KVPolicy:
    return parse_kv({"key": form, "value": form, "residual": residual, "sink": sink}, "kv")


def new_cache(rule: KVPolicy, starts: torch.Tensor | None = None) -> KVCache:
    return KVCache(CONFIG, rule, starts=starts, handles=False)


def feed(cache: KVCache, n: int, seed: int = 0, rows: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for number in range(len(cache.layers)):
        keys = torch.randn(rows, 2, n, 8, generator=generator).bfloat16()
        cache.update(keys, torch.randn(rows, 2, n, 6, generator=generator).bfloat16(), number)


def state(layer: PackedLayer) -> list[torch.Tensor]:
    """Everything that a layer reads from: its pages in the order of tokens, tail, sink."""
    assert layer.pages is not None
    paged = layer.pages.paged()
    found = []
    for parts in (paged.keys, paged.values):
        for part in parts.values():
            run = part[paged.table].transpose(1, 2).flatten(2, 3)[:, :, : layer.pages.n_tokens]
            found.append(run)
    if layer.tail is not None:
        found += [b[:, :, : layer.tail.stop - layer.tail.start] for b in layer.tail.buffers]
    if layer.sink is not None:
        found += [*layer.sink.buffers, layer.sink.starts]
    return found


def assert_equal(found: KVCache, expected: KVCache) -> None:
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert isinstance(a, PackedLayer) and isinstance(b, PackedLayer)
        assert a.n_tokens == b.n_tokens and stored_until(a) == stored_until(b)
        assert all(torch.equal(x, y) for x, y in zip(state(a), state(b), strict=True))


@FORMATS
@WINDOWS
@pytest.mark.parametrize("pieces", [[170], [100, 1, 1, 3, 65], [5]])
@pytest.mark.parametrize("chunk", [256, 50])
def test_a_restored_cache_is_the_one_that_was_encoded(
    form: Any, residual: int, sink: int, pieces: list[int], chunk: int
) -> None:
    rule = policy(form, residual, sink)
    cache, found = new_cache(rule), new_cache(rule)
    for n in pieces:
        feed(cache, n, seed=n)
    data = encode_prefix(cache, 0, chunk=chunk)
    assert fill_cache(found, data) == sum(pieces)
    assert_equal(found, cache)
    for n in (1, 70):  # both go on alike
        feed(cache, n, seed=n)
        feed(found, n, seed=n)
        assert_equal(found, cache)
    for kept in (cache, found):
        kept.crop(-30)
        feed(kept, 10)
    assert_equal(found, cache)


@WINDOWS
def test_after_a_crop(residual: int, sink: int) -> None:
    rule = policy(INT4, residual, sink)
    cache, found = new_cache(rule), new_cache(rule)
    feed(cache, 150)
    cache.crop(-100)
    fill_cache(found, encode_prefix(cache, 0, chunk=16))
    assert_equal(found, cache)


def test_rows_that_share_pages_become_rows_of_their_own() -> None:
    rule = policy(INT4, 20, 4)
    cache, found = new_cache(rule), new_cache(rule)
    feed(cache, 150)
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    feed(cache, 3, rows=3)
    fill_cache(found, encode_prefix(cache, 0, chunk=64))
    assert_equal(found, cache)


def test_padding_has_to_agree() -> None:
    rule, starts = policy(INT4, 20, 4), torch.tensor([0, 37])
    cache, found = new_cache(rule, starts), new_cache(rule, starts)
    feed(cache, 100)
    data = encode_prefix(cache, 0, chunk=64)
    fill_cache(found, data)
    assert_equal(found, cache)
    with pytest.raises(StreamError, match=r"rows that begin at \[0, 37\], .* made for \[0, 0\]"):
        fill_cache(new_cache(rule), data)


def test_pages_of_zeros_cost_little() -> None:
    cache = new_cache(policy(INT4, 0, 0))
    for number in range(2):
        cache.update(torch.zeros(2, 2, 256, 8), torch.zeros(2, 2, 256, 6), number)
    plain = 2 * 2 * 2 * 256 * (8 + 7)  # layers, rows, heads, tokens, bytes of keys and of values
    assert len(encode_prefix(cache, 0)) < plain / 20


def test_layers_that_hold_different_tokens_are_refused() -> None:
    cache = new_cache(policy(INT4, 0, 0))
    feed(cache, 10)
    cache.layers[1].crop(-1)
    with pytest.raises(StreamError, match="layer 1 holds 9 tokens, layer 0 10"):
        encode_prefix(cache, 0)
