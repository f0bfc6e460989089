"""Streams of the bundled model's prefixes: size, bits, generation, quality; damage of every byte."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from fewbit.quant.errors import CheckpointError, FewbitError
from fewbit.quant.kv_cache import KVCache
from fewbit.quant.kv_policy import parse_kv
from fewbit.quant.kv_stream import (
    decode_prefix,
    encode_chunk,
    encode_prefix,
    fill_cache,
    read_chunks,
    stream_header,
    write_prefix,
)
from fewbit.quant.kv_stream_codes import LEVELS, as_decoded
from fewbit.quant.kv_stream_frame import StreamError
from fewbit.quant.kv_stream_profile import Tables, profile
from kv_prefixes import filled, layers, model, prompt, random_layers, same, tables

INT4 = {"format": "int4_head"}
POLICY = parse_kv({"key": INT4, "value": INT4, "residual": 64, "sink": 4}, "kv")


def n_bytes(pairs: Any) -> int:
    """Of the same numbers in fp16."""
    return sum(2 * x.numel() for pair in pairs for x in pair)


def small_tables(n_layers: int = 2) -> Tables:
    return profile(lambda: [random_layers(n_layers)])


def test_level_2_is_4_5_times_smaller_than_fp16() -> None:
    ratio = n_bytes(layers()) / len(encode_prefix(layers(), 2, tables()))
    assert ratio >= 4.5, ratio


def test_one_chunk_of_256_tokens_is_as_small() -> None:
    one = layers(256, start=3000)
    ratio = n_bytes(one) / len(encode_prefix(one, 2, tables()))
    assert ratio >= 4.5, ratio


def test_levels_are_ordered_in_size_and_error() -> None:
    sizes = {level: len(encode_prefix(layers(), level, tables())) for level in (0, *LEVELS)}
    assert sizes[1] < sizes[2] < sizes[3] < sizes[0] < 0.69 * n_bytes(layers())


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_read_equals_the_uncoded_path(level: int) -> None:
    found = decode_prefix(encode_prefix(layers(), level, tables()), tables())
    assert same(found, as_decoded(layers(), level))


def test_lossless_is_lossless() -> None:
    assert same(decode_prefix(encode_prefix(layers(), 0)), layers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lossless_keeps_every_bit_pattern(dtype: torch.dtype) -> None:
    pairs = random_layers(dtype=dtype)
    patterns = torch.tensor([0, -1, 0x7F81, -0x7F, 0x7C01, -0x8000], dtype=torch.int16)
    for pair in pairs:
        for x in pair:
            x.view(torch.int16)[0, 0, 0, :6] = patterns
    assert same(decode_prefix(encode_prefix(pairs, 0, chunk=16)), pairs)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize(("tokens", "chunk"), [(1, 256), (40, 1), (40, 40), (40, 39), (41, 8)])
def test_any_length_and_chunk(level: int, tokens: int, chunk: int) -> None:
    pairs, shared = random_layers(tokens=tokens), small_tables()
    data = encode_prefix(pairs, level, shared, chunk)
    assert same(decode_prefix(data, shared), as_decoded(pairs, level))


def test_data_unlike_the_profiled_codes_too() -> None:
    """Each symbol has a frequency, so everything can be coded; what is NaN comes back NaN."""
    pairs, shared = random_layers(), small_tables()
    for number, (keys, values) in enumerate(pairs):
        keys.zero_()
        values.copy_(torch.arange(values.numel()).reshape(values.shape) % 2 * 1e4)
        values[0, 0, number] = torch.nan
    for level in LEVELS:
        found = decode_prefix(encode_prefix(pairs, level, shared), shared)
        assert same(found, as_decoded(pairs, level))
        assert found[1][1][0, :, 1].isnan().all() and not found[1][1][1].isnan().any()


def continued(cache: Any, ids: torch.Tensor, n: int = 40) -> list[int]:
    """Greedy tokens after `ids`, the prefix being in the cache."""
    found = model().generate(
        ids, past_key_values=cache, max_new_tokens=n, min_new_tokens=n, do_sample=False
    )
    return found[0, ids.shape[1] :].tolist()


def test_generation_goes_on_from_a_lossless_prefix_with_the_same_tokens() -> None:
    ids = prompt(320)
    data = encode_prefix(filled(ids[:, :300]), 0)
    restored = DynamicCache(config=model().config)
    assert fill_cache(restored, data) == restored.get_seq_length() == 300
    assert continued(restored, ids) == continued(filled(ids[:, :300]), ids)


def test_a_dense_prefix_fills_a_packed_cache_as_the_model_would() -> None:
    dense = filled(prompt(300))
    found, expected = (KVCache(model().config, POLICY, handles=False) for _ in range(2))
    assert fill_cache(found, encode_prefix(dense, 0)) == 300
    for number, layer in enumerate(dense.layers):
        expected.update(layer.keys, layer.values, number)
    token = (torch.ones(1, 2, 1, 64, dtype=torch.bfloat16),) * 2
    for number in range(len(dense.layers)):
        read, wanted = (cache.update(*token, number) for cache in (found, expected))
        assert read[0].shape[2] == 301 and same([read], [wanted])


def test_generation_goes_on_from_a_packed_prefix_with_the_same_tokens() -> None:
    ids = prompt(320)

    def packed() -> KVCache:
        return KVCache(model().config, POLICY, handles=False)

    cache = filled(ids[:, :300], packed())
    data, restored = encode_prefix(cache, 0), packed()
    assert fill_cache(restored, data) == restored.get_seq_length() == 300
    assert len(data) < 0.6 * n_bytes(layers(300))
    assert continued(restored, ids) == continued(cache, ids)


def loss_after(cache: Any, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean loss of the tokens behind a prefix, and log-probabilities [n, vocabulary]."""
    with torch.no_grad():
        logits = model()(ids, past_key_values=cache).logits[0].float()
    log = logits.log_softmax(-1)
    return float(-log[:-1].gather(1, ids[0, 1:, None]).mean()), log


def test_quality_of_a_continuation_rises_with_the_level() -> None:
    ids, n = prompt(768, start=5000), 512
    data = {level: encode_prefix(filled(ids[:, :n]), level, tables()) for level in (0, *LEVELS)}
    plain, expected = loss_after(filled(ids[:, :n]), ids[:, n:])
    ratio, distance = {}, {}
    for level, stream in data.items():
        cache = DynamicCache(config=model().config)
        fill_cache(cache, stream, tables())
        loss, log = loss_after(cache, ids[:, n:])
        ratio[level] = math.exp(loss - plain)
        distance[level] = float((expected.exp() * (expected - log)).sum(-1).mean())
    assert ratio[0] == 1 and distance[0] == 0
    assert distance[1] > distance[2] > distance[3] > 0
    assert ratio[1] < 1.06 and ratio[2] < 1.04 and ratio[3] < 1.02, ratio


def test_chunks_come_as_they_arrive_and_may_differ_in_level() -> None:
    pairs = layers()
    header = stream_header(pairs, tables())
    frames = [encode_chunk(pairs, header, i, level, tables()) for i, level in enumerate((3, 1))]
    source, sent = io.BytesIO(header.to_bytes() + frames[0]), []
    chunks = read_chunks(source, tables())
    first = next(chunks)
    assert (first.index, first.level, first.start, first.stop) == (0, 3, 0, 256)
    with pytest.raises(StreamError, match=r"chunk 1 head: ends .* early"):
        next(chunks)
    whole = header.to_bytes() + b"".join(frames)
    sent = list(read_chunks(Trickle(whole), tables()))
    assert [chunk.level for chunk in sent] == [3, 1]
    for chunk in sent:
        part = slice(chunk.start, chunk.stop)
        cut = [(keys[:, :, part], values[:, :, part]) for keys, values in pairs]
        assert same(chunk.layers, as_decoded(cut, chunk.level))


class Trickle:
    """A source that gives seven bytes at most."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, n: int) -> bytes:
        return self._file.read(min(n, 7))


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "prefix.kv"
    written = write_prefix(path, layers(256), 2, tables())
    assert written == path.stat().st_size and [p.name for p in tmp_path.iterdir()] == ["prefix.kv"]
    for source in (path, str(path), path.read_bytes()):
        assert same(decode_prefix(source, tables()), as_decoded(layers(256), 2))
    with pytest.raises(StreamError, match="levels 1 to 3 need tables"):
        write_prefix(path, layers(256), 2)
    assert [p.name for p in tmp_path.iterdir()] == ["prefix.kv"]  # the old one, and nothing partial
    with pytest.raises(CheckpointError, match="cannot write"):
        write_prefix(tmp_path / "absent" / "prefix.kv", layers(256), 0)
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(StreamError, match="bytes follow its last chunk"):
        decode_prefix(path, tables())


def test_tables_that_miss_or_differ_are_named() -> None:
    pairs, shared = random_layers(), small_tables()
    data = encode_prefix(pairs, 2, shared)
    with pytest.raises(StreamError, match=f"needs the tables {shared.digest.hex()}; none"):
        decode_prefix(data)
    other = profile(lambda: [random_layers(tokens=30)])
    with pytest.raises(
        StreamError, match=f"needs the tables {shared.digest.hex()}, got {other.digest.hex()}"
    ):
        decode_prefix(data, other)
    with pytest.raises(StreamError, match="levels 1 to 3 need tables"):
        encode_prefix(pairs, 2)
    with pytest.raises(StreamError, match="of a model of 6 layers"):
        encode_prefix(pairs, 2, tables())


def test_what_cannot_be_streamed_is_named() -> None:
    config = model().config
    with pytest.raises(StreamError, match="layer 0 is a DynamicLayer that holds nothing"):
        encode_prefix(DynamicCache(config=config), 0)
    pairs = random_layers()
    pairs[1] = (pairs[1][0][:, :, :-1], pairs[1][1])
    with pytest.raises(StreamError, match=r"layer 1 keys are .*same tokens"):
        encode_prefix(pairs, 0)
    with pytest.raises(StreamError, match="float64"):
        encode_prefix([(k.double(), v.double()) for k, v in random_layers()], 0)
    with pytest.raises(FewbitError, match=r"must be one of \(1, 2, 3\), got 4"):
        encode_prefix(random_layers(), 4, small_tables())
    with pytest.raises(StreamError, match="chunk must be"):
        encode_prefix(random_layers(), 0, chunk=0)
    with pytest.raises(StreamError, match="no layers"):
        encode_prefix([], 0)
    packed = KVCache(config, POLICY, handles=False)
    with pytest.raises(StreamError, match=r"holds nothing|at least one"):
        encode_prefix(packed, 0)
    filled(prompt(20), packed)
    with pytest.raises(StreamError, match="coded as it is, level 0; got 2"):
        encode_prefix(packed, 2, tables())


def test_what_cannot_be_filled_is_named() -> None:
    config = model().config
    data = encode_prefix(filled(prompt(20), KVCache(config, POLICY, handles=False)), 0)
    with pytest.raises(StreamError, match=r"fills a KVCache .* got DynamicCache"):
        fill_cache(DynamicCache(config=config), data)
    with pytest.raises(StreamError, match="of a packed cache; read it with fill_cache"):
        decode_prefix(data)
    other = parse_kv({"key": INT4, "value": INT4}, "kv")
    with pytest.raises(StreamError, match=r"encoded under .*'residual': 64.* has .*'residual': 0"):
        fill_cache(KVCache(config, other, handles=False), data)
    with pytest.raises(StreamError, match="holds 20 tokens already"):
        fill_cache(filled(prompt(20)), encode_prefix(layers(256), 0))


def damaged(data: bytes, shared: Tables | None, read: Callable[..., Any] = decode_prefix) -> str:
    """The error that damage is told with."""
    with pytest.raises(FewbitError) as caught:
        read(data, shared)
    return str(caught.value)


@pytest.mark.parametrize("level", [0, 2])
def test_every_flipped_byte_is_found(level: int) -> None:
    pairs, shared = random_layers(tokens=9), small_tables()
    data = encode_prefix(pairs, level, shared, chunk=5)
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 1 << at % 8
        message = damaged(bytes(broken), shared)
        assert message.startswith("KV stream"), message


@pytest.mark.parametrize("level", [0, 2])
def test_every_truncation_is_found(level: int) -> None:
    pairs, shared = random_layers(tokens=9), small_tables()
    data = encode_prefix(pairs, level, shared, chunk=5)
    for end in range(0, len(data), 7):
        assert "early" in damaged(data[:end], shared)
    assert "chunk 1, layer 1 values: ends 1 bytes early" in damaged(data[:-1], shared)


def test_damage_in_a_piece_names_chunk_and_layer() -> None:
    shared = small_tables()
    data = bytearray(encode_prefix(random_layers(), 2, shared, chunk=20))
    data[-1] ^= 1
    assert "chunk 1, layer 1 values: the checksum does not match" in damaged(bytes(data), shared)


def test_frames_of_other_streams_and_places_are_found() -> None:
    pairs, shared = random_layers(tokens=20), small_tables()
    header = stream_header(pairs, shared, 10)
    frames = [encode_chunk(pairs, header, i, 2, shared) for i in range(2)]
    head = header.to_bytes()
    assert "chunk 0: found chunk 1" in damaged(head + frames[1] + frames[0], shared)
    other = stream_header(random_layers(tokens=30), shared, 10)
    foreign = encode_chunk(random_layers(tokens=30), other, 1, 2, shared)
    assert "chunk 1: it belongs to another stream" in damaged(head + frames[0] + foreign, shared)
    assert "level 9, must be 0 to 3" in damaged(
        head + encode_frame_of_level_9(pairs, header, shared), shared
    )


def encode_frame_of_level_9(pairs: Any, header: Any, shared: Tables) -> bytes:
    from fewbit.quant.kv_stream_frame import frame_bytes

    return frame_bytes(header.crc, 0, 9, [b""] * (2 * len(pairs)))
