"""The reference against the definition in plain integers, and frozen bytes."""

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.quant.codecs import rans32_numpy
from fewbit.quant.codecs.chunks import OFFSET_MASK, Layout, flat_layout
from fewbit.quant.codecs.frequencies import normalize
from fewbit.quant.codecs.planes import Kind, split

LOW = 65536
FROZEN_FREQ = [0, 16, 0, 1211, 621, 494, 1116, 590]
FROZEN_WORDS = (
    "52e3f8dbaaaba422dbe794222e67014371e7b5b244a2473f2a8209ea8183874367d5049994afb8697ea7dd6a"
    "516c36f383e834c7af8ff7e4b32e7ffe73adac6b8b09"
)
FROZEN_STATE = [
    323731,
    788423,
    1443556,
    2711472,
    2960736,
    1216601,
    2352471,
    2457424,
    2449940,
    4423725,
    1065294,
    559639,
    520546,
    512583,
    513687,
    620858,
    1269246,
    1277793,
    1383139,
    1379512,
    2667830,
    2939425,
    3659983,
    1617017,
    855036,
    422603,
    377018,
    379637,
    215591,
    196753,
    198556,
    180673,
]
FROZEN_CRC = 3114147141
CARRIED_WORDS = (
    "ba2bdf61db14234663f12de078a01e8451128e40eb65f6e8043b3d4a85e230ccbbb2711209c9d606a19ea8eb"
    "7fc1d552c9d1a4c77ebf338fbebca4cbe1c5aed901cb"
)
CARRIED_STATE = [
    446998,
    1300480,
    2123015,
    4963853,
    3607377,
    2031998,
    2704996,
    3993270,
    3019069,
    7794719,
    1536348,
    907737,
    688445,
    819775,
    702298,
    1034296,
    1351455,
    2502255,
    1985053,
    2644601,
    3851824,
    5810733,
    3930170,
    2833574,
    1198680,
    684960,
    528511,
    637557,
    219737,
    369546,
    256052,
    324106,
]
CARRIED_CRC = 1996329089
CARRIED_RAW_CRC = 1452460016


def code(symbols, freq, halves=(0,) * 32):
    """(words, states) of one stream, by the definition, one Python integer at a time."""
    f = [int(value) for value in freq]
    c = [sum(f[:symbol]) for symbol in range(256)]
    n_steps = -(-len(symbols) // 32)
    padded = list(symbols) + [f.index(max(f))] * (n_steps * 32 - len(symbols))
    x, words = [LOW + half for half in halves], {}
    for t in reversed(range(n_steps)):
        for lane in range(32):
            symbol = padded[32 * t + lane]
            if x[lane] >= f[symbol] << 20:
                words[t, lane] = x[lane] & 0xFFFF
                x[lane] >>= 16
            x[lane] = (x[lane] // f[symbol] << 12) + x[lane] % f[symbol] + c[symbol]
    return [words[key] for key in sorted(words)], x


def stream(symbols, freq):
    layout = flat_layout(symbols.size, Kind.BYTE)
    return rans32_numpy.encode(symbols, Kind.BYTE, layout, freq[None])


@given(st.integers(0, 2**32 - 1), st.integers(2, 300), st.integers(2, 256))
@settings(max_examples=40, deadline=None)
def test_streams_are_what_the_definition_says(seed, n, n_symbols):
    rng = np.random.default_rng(seed)
    weights = rng.random(n_symbols) ** 8
    symbols = rng.choice(n_symbols, n, p=weights / weights.sum()).astype(np.uint8)
    freq = normalize(np.bincount(symbols, minlength=256))
    group = stream(symbols, freq)
    words, states = code(symbols.tolist(), freq)
    if (symbols == symbols[0]).all():
        assert group.index.tolist() == [1 << 62, 0]
        assert group.state[0].tolist() == [int(symbols[0]) << 16] * 32
    elif 2 * len(words) >= n:
        assert group.index.tolist() == [2 << 62, n + n % 2]
        assert group.words.tolist() == symbols.tolist() + [0] * (n % 2)
    else:
        assert group.index.tolist() == [0, 2 * len(words)]
        assert group.words.view("<u2").tolist() == words
        assert group.state[0].tolist() == states
    assert group.crc[0] == google_crc32c.value(symbols.tobytes())


def test_frozen_bytes():
    """The format is frozen from here on: files are read by every later version. Never edit these."""
    i = np.arange(257)
    symbols = (120 + (i * i * 7 + i // 3) % 11 % 5 - (i % 64 == 9) * 20).astype(np.uint8)
    freq = normalize(np.bincount(symbols, minlength=256))
    group = stream(symbols, freq)
    assert freq[[99, 100, 101, 120, 121, 122, 123, 124]].tolist() == FROZEN_FREQ
    assert group.words.tobytes().hex() == FROZEN_WORDS
    assert group.state[0].tolist() == FROZEN_STATE
    assert group.index.tolist() == [0, len(FROZEN_WORDS) // 2]
    assert group.crc.tolist() == [FROZEN_CRC]


def carrying_example():
    """257 bf16 words of known bytes; their exponents are the symbols of the test above."""
    i = np.arange(257)
    exponents = 120 + (i * i * 7 + i // 3) % 11 % 5 - (i % 64 == 9) * 20
    words = (i * 37 % 2) << 15 | exponents << 7 | (i * i * 5 + 3 * i + 1) % 128
    return words.astype("<u2").view(np.uint8)


def test_frozen_bytes_of_a_chunk_that_carries():
    """The format is frozen from here on: files are read by every later version. Never edit these."""
    data = carrying_example()
    layout = flat_layout(257, Kind.BF16)
    freq = np.zeros((2, 256), np.uint16)
    freq[0] = normalize(np.bincount(split(data, Kind.BF16)[0], minlength=256))
    group = rans32_numpy.encode(data, Kind.BF16, layout, freq)
    assert google_crc32c.value(group.raw.tobytes()) == CARRIED_RAW_CRC
    assert group.words.tobytes().hex() == CARRIED_WORDS
    assert group.state[0].tolist() == CARRIED_STATE
    assert group.index.tolist() == [0, len(CARRIED_WORDS) // 2]
    assert group.crc.tolist() == [CARRIED_CRC]
    exponents, signs = split(data, Kind.BF16)
    assert group.raw.tolist() == signs[64:].tolist()
    halves = [int(signs[lane]) + 256 * int(signs[lane + 32]) for lane in range(32)]
    words, states = code(exponents.tolist(), freq[0], halves)
    assert group.words.view("<u2").tolist() == words
    assert group.state[0].tolist() == states
    out = np.zeros_like(data)
    rans32_numpy.decode(group, out, Kind.BF16, layout, freq)
    assert out.tobytes() == data.tobytes()


def test_one_step_by_hand():
    """f = 4095 for 7, 1 for 8, which raises 65536 to 65536 · 4096 + 4095 and needs no word."""
    symbols = np.array([7] * 7 + [8] * 25, np.uint8)
    freq = np.zeros(256, np.uint16)
    freq[[7, 8]] = 4095, 1
    group = stream(symbols, freq)
    assert group.words.size == 0
    assert group.state[0, :7].tolist() == [(65536 // 4095 << 12) + 65536 % 4095] * 7
    assert group.state[0, 7:].tolist() == [(65536 << 12) + 4095] * 25


def test_pieces_are_read_and_written_where_they_lie():
    data = np.arange(40, dtype=np.uint8)
    layout = Layout(np.array([4]), np.array([5], np.int32), 2, 12)
    chunk = rans32_numpy.read_chunk(data, Kind.HALF, layout, 0)
    assert chunk.tolist() == [4, 5, 6, 7, 16, 17, 18, 19, 28, 29]
    out = np.zeros_like(data)
    rans32_numpy.write_chunk(chunk, out, Kind.HALF, layout, 0)
    assert np.flatnonzero(out).tolist() == chunk.tolist() == out[chunk].tolist()


def test_many_chunks_of_several_lengths_keep_their_order():
    rng = np.random.default_rng(5)
    symbols = rng.binomial(20, 0.3, 130 * 16384 + 77).astype(np.uint8)
    layout = flat_layout(symbols.size, Kind.BYTE)
    freq = normalize(rans32_numpy.count(symbols, Kind.BYTE, layout)[0])[None]
    group = rans32_numpy.encode(symbols, Kind.BYTE, layout, freq)
    for chunk in (0, 127, 128, 129, 130):
        part = symbols[chunk * 16384 : (chunk + 1) * 16384]
        alone = stream(part, freq[0])
        begin, end = (group.index[chunk : chunk + 2] & np.uint64(OFFSET_MASK)).tolist()
        np.testing.assert_array_equal(group.words[begin:end], alone.words)
        np.testing.assert_array_equal(group.state[chunk], alone.state[0])
    out = np.empty_like(symbols)
    rans32_numpy.decode(group, out, Kind.BYTE, layout, freq)
    np.testing.assert_array_equal(out, symbols)


def test_counts_are_those_of_the_planes():
    every = np.arange(65536, dtype="<u2").view(np.uint8)
    counts = rans32_numpy.count(every, Kind.BF16, flat_layout(65536, Kind.BF16))
    assert counts.tolist() == [[256] * 256] * 2
    with pytest.raises(ValueError, match="sum to"):
        rans32_numpy.encode(
            every, Kind.BF16, flat_layout(65536, Kind.BF16), counts.astype(np.uint16)
        )
