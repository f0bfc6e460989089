"""Tables: what is measured, the file byte by byte, and what it refuses."""

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from fewbit.quant.errors import CalibrationError
from fewbit.quant.kv_stream_codes import BINS, Pair, n_symbols, quantize
from fewbit.quant.kv_stream_frame import StreamError
from fewbit.quant.kv_stream_predict import ONE, residuals
from fewbit.quant.kv_stream_profile import (
    Tables,
    group_slices,
    n_groups,
    profile,
    profile_model,
    read_tables,
)
from kv_prefixes import model, random_layers, tables
from tiny_models import VOCAB


def small() -> Tables:
    return profile(lambda: [random_layers()])


def correlated(rho: float, mean: float, tokens: int = 3000) -> list[Pair]:
    """One layer of 4 heads of 32: keys with a mean that follow one another, values that do not."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(tokens, 128, generator=generator)
    keys = torch.empty(tokens, 128)
    keys[0] = noise[0]
    for token in range(1, tokens):
        keys[token] = rho * keys[token - 1] + (1 - rho * rho) ** 0.5 * noise[token]
    values = torch.randn(tokens, 128, generator=generator)
    halves = [x.view(1, tokens, 4, 32).transpose(1, 2) for x in (keys + mean, values)]
    return [(halves[0], halves[1])]


def test_groups_cover_all_channels_and_fill_chunks() -> None:
    expected = {1: [1], 63: [63], 64: [64], 127: [127], 128: [64, 64], 200: [64, 64, 72]}
    expected |= {512: [64] * 8, 520: [128] * 3 + [136], 1024: [128] * 8, 8192: [1024] * 8}
    for channels, widths in expected.items():
        slices = group_slices(channels)
        assert [s.stop - s.start for s in slices] == widths and len(slices) == n_groups(channels)
        assert [i for s in slices for i in range(s.start, s.stop)] == list(range(channels))


def test_what_is_measured() -> None:
    keys, values = profile(lambda: [correlated(0.9, 1.0)]).layers[0]
    assert (keys.heads, keys.head_dim) == (4, 32)
    assert np.abs(keys.predictor.correlation / ONE - 0.88).max() < 0.06
    assert not values.predictor.follows  # not worth a bit
    assert np.abs(values.predictor.mean / ONE).max() < 0.05
    peak = correlated(0.9, 1.0)[0][0].abs().transpose(1, 2).flatten(2).amax(2).mean()
    assert abs(keys.predictor.mean.mean() / ONE - float(1 / peak)) < 0.03


def test_frequencies_are_those_of_the_symbols() -> None:
    pairs = correlated(0.9, 1.0, tokens=256)
    table = profile(lambda: [pairs]).layers[0][0]
    for bins in BINS:
        codes = quantize(pairs[0][0], bins)[0].numpy()
        symbols = residuals(codes, table.predictor, bins)[:, :, table.order]
        for group, positions in enumerate(group_slices(128)):
            counts = np.bincount(symbols[:, :, positions].ravel(), minlength=256)
            share = table.frequencies[bins][group].astype(np.int64)
            assert share.sum() == 4096 and (share[: n_symbols(bins)] >= 1).all()
            assert np.abs(share / 4096 - counts / counts.sum()).max() < 0.01


def test_channels_that_cost_alike_share_a_group() -> None:
    pairs = correlated(0.0, 0.0, tokens=500)
    pairs[0][0][:, :, :, ::2] *= 0.1
    keys = profile(lambda: [pairs]).layers[0][0]
    assert (keys.order[:64] % 2 == 0).all() and (keys.order[64:] % 2 == 1).all()


def test_the_file_comes_back(tmp_path: Path) -> None:
    found = tables()
    path = tmp_path / "tables"
    path.write_bytes(found.to_bytes())
    again = read_tables(path)
    assert again.to_bytes() == found.to_bytes() and again.digest == found.digest
    for sides, others in zip(again.layers, found.layers, strict=True):
        for a, b in zip(sides, others, strict=True):
            assert np.array_equal(a.order, b.order) and (a.heads, a.head_dim) == (2, 64)
            assert np.array_equal(a.predictor.mean, b.predictor.mean)
            for bins in BINS:
                assert np.array_equal(a.frequencies[bins], b.frequencies[bins])
                assert a.frequencies[bins].shape == (2, 256)


def test_the_file_is_as_drawn() -> None:
    data, keys = small().to_bytes(), small().layers[0][0]
    expected = b"fewbitKT" + struct.pack("<IIII", 1, 2, 3, 8)
    expected += keys.order.astype("<u4").tobytes() + keys.predictor.mean.astype("<i2").tobytes()
    expected += keys.predictor.correlation.astype("<i2").tobytes()
    for bins in BINS:
        expected += keys.frequencies[bins][:, : bins - 1].astype("<u2").tobytes()
    assert data.startswith(expected)
    sides = 2 * (8 + 24 * 8 + 57 * 2 + 8 + 12 * 8 + 57 * 2)
    assert len(data) == 16 + sides + 32
    assert data[-32:] == small().digest == hashlib.sha256(data[:-32]).digest()


def resealed(data: bytes) -> bytes:
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


def test_every_flipped_byte_and_truncation_is_found() -> None:
    data = small().to_bytes()
    for at in range(0, len(data), 3):
        broken = bytearray(data)
        broken[at] ^= 16
        for damaged in (bytes(broken), data[:at]):
            with pytest.raises(StreamError, match="KV tables"):
                read_tables(damaged)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (8, 9, "version 9, this fewbit reads 1; upgrade"),
        (12, 0, "0 layers, must be 1 to"),
        (12, 3, "layer 2: ends|layer 2: .* heads"),
        (12, 1, "bytes too many"),
        (16, 0, "layer 0: 0 heads of 8"),
        (19, 255, "layer 0: .* must be 1 to 1048576 channels"),
        (18, 1, "layer 0: ends .* early"),
        (24, 99, "not a permutation"),
        (121, 127, "beyond ±1024"),
        (216, 255, "must be >= 1 and sum to 4096"),
    ],
)
def test_tables_that_lie_are_refused(at: int, value: int, message: str) -> None:
    data = bytearray(small().to_bytes())
    data[at] = value
    with pytest.raises(StreamError, match=message):
        read_tables(resealed(bytes(data)))


def test_nothing_to_profile() -> None:
    with pytest.raises(CalibrationError, match="no prefix to profile"):
        profile(list)
    with pytest.raises(CalibrationError, match="no prefix to profile"):
        profile_model(model(), torch.zeros(0, 8, dtype=torch.int64))


def test_a_layer_that_keeps_a_window_is_refused() -> None:
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=8,
    )  # fmt: skip
    rows = torch.zeros(1, 20, dtype=torch.int64)
    with pytest.raises(CalibrationError, match="layer 0 caches as DynamicSlidingWindowLayer"):
        profile_model(MistralForCausalLM(config).eval(), rows)
