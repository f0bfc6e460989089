"""Round trips, identical bytes from every engine, damage, rate: what holds whoever codes."""

import dataclasses
import itertools
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.quant.codecs import rans32, rans32_numpy
from fewbit.quant.codecs.planes import Kind, split
from fewbit.quant.codecs.rans32 import CHUNK, Damage, Group, Layout, Mode, flat_layout, normalize
from fewbit.quant.native import compiler

OFFSETS = np.uint64((1 << 62) - 1)
FIELDS = ("raw", "words", "index", "state", "crc")


def frequencies_of(data, kind, layout, raw_planes=()):
    freq = np.stack([normalize(row) for row in rans32_numpy.count(data, kind, layout)])
    freq[list(raw_planes)] = 0
    return freq


def assert_round_trip(engine, data, kind, layout=None, raw_planes=()):
    layout = layout or flat_layout(data.size // kind.n_planes, kind)
    freq = frequencies_of(data, kind, layout, raw_planes)
    group = engine.encode(data, kind, layout, freq)
    out = np.full_like(data, 0xA5)
    engine.decode(group, out, kind, layout, freq)
    np.testing.assert_array_equal(out, data)
    return group


def modes(group):
    return (group.index[:-1] >> np.uint64(62)).tolist()


def weights(n, dtype=torch.bfloat16, seed=0):
    """Little-endian bytes of Gaussian numbers whose scale varies."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(0.5 * torch.randn(n // 256 + 1, 1, generator=generator))
    values = torch.randn(n // 256 + 1, 256, generator=generator) * scale * 0.02
    values = values.reshape(-1)[:n]
    if not dtype.is_floating_point:
        values = values * 400
    return values.to(dtype).view(torch.uint8).numpy().copy()


def tiles(n_rows, n_columns, element_bytes):
    """Tiles of 64 x 256 of a row-major matrix."""
    rows, columns = np.arange(0, n_rows, 64), np.arange(0, n_columns, 256)
    starts = (rows[:, None] * n_columns + columns).reshape(-1) * element_bytes
    sizes = np.full(starts.size, CHUNK, np.int32)
    return Layout(starts.astype(np.int64), sizes, 256, n_columns * element_bytes)


EVERY = np.arange(65536, dtype="<u2")


@pytest.mark.parametrize("order", ["sorted", "shuffled", "one only"])
def test_every_pattern_of_bf16(engine, order):
    patterns, layout = EVERY, None
    if order == "shuffled":
        patterns = np.random.default_rng(1).permutation(EVERY)
    elif order == "one only":
        patterns = EVERY if engine is not rans32_numpy else EVERY[::37].copy()
        starts = np.arange(0, 2 * patterns.size, 2, dtype=np.int64)
        layout = Layout(starts, np.ones(patterns.size, np.int32), CHUNK, 0)
    group = assert_round_trip(engine, patterns.view(np.uint8), Kind.BF16, layout)
    if order == "one only":
        assert set(modes(group)) == {Mode.CONSTANT}
        assert group.words.size == 0


def test_every_length(engine):
    data = weights(2 * CHUNK + 1)
    lengths = range(2501) if engine is not rans32_numpy else [*range(70), *range(70, 2501, 121)]
    for n in (*lengths, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1):
        layout = flat_layout(n, Kind.BF16)
        freq = FREQ_OF_WEIGHTS
        group = engine.encode(data[: 2 * n], Kind.BF16, layout, freq)
        out = np.empty(2 * n, np.uint8)
        engine.decode(group, out, Kind.BF16, layout, freq)
        assert out.tobytes() == data[: 2 * n].tobytes(), n


FREQ_OF_WEIGHTS = frequencies_of(
    weights(2 * CHUNK + 1), Kind.BF16, flat_layout(2 * CHUNK + 1, Kind.BF16)
)


def skewed(n):
    symbols = np.full(n, 77, np.uint8)
    symbols[n // 3] = 5
    return symbols


def fibonacci(n):
    counts = [1, 1]
    while sum(counts) < n:
        counts.append(counts[-1] + counts[-2])
    return np.repeat(np.arange(len(counts), dtype=np.uint8), counts)[:n]


HISTOGRAMS = {
    "all zero": (np.zeros(50000, np.uint8), {Mode.CONSTANT}),
    "constant": (np.full(50000, 255, np.uint8), {Mode.CONSTANT}),
    "1 : 2^20": (skewed((1 << 20) + 1), {Mode.CONSTANT, Mode.RANS}),
    "uniform": (
        np.random.default_rng(0).integers(0, 256, 100003, np.uint8),
        {Mode.RANS},
    ),  # saves what states hold
    "uniform, 128 of 256": (
        np.random.default_rng(0).integers(0, 128, 100003, np.uint8),
        {Mode.RANS},
    ),
    "fibonacci": (np.random.default_rng(0).permutation(fibonacci(100000)), {Mode.RANS}),
    "fibonacci, sorted": (fibonacci(100000), {Mode.CONSTANT, Mode.RANS}),
    "from 240 on": (np.random.default_rng(0).integers(240, 256, 40000, np.uint8), {Mode.RANS}),
}


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_histograms(engine, name):
    symbols, expected = HISTOGRAMS[name]
    group = assert_round_trip(engine, symbols, Kind.BYTE)
    assert set(modes(group)) <= expected
    if len(expected) == 1:
        assert set(modes(group)) == expected


def test_payloads_of_nan_and_signed_zeros(engine):
    payloads = np.concatenate([EVERY[0x7F80:0x8001], EVERY[0xFF80:], EVERY[:1]]).astype("<u2")
    rng = np.random.default_rng(3)
    assert_round_trip(engine, rng.choice(payloads, 40000).view(np.uint8), Kind.BF16)
    wide = rng.integers(0, 1 << 23, 20000, np.uint32) | np.uint32(0x7F800000)
    assert_round_trip(engine, wide.astype("<u4").view(np.uint8), Kind.FP32)


def rare_ones(n, share, seed=0):
    """Symbols and frequencies so that a share of the symbols costs 12 bits each."""
    freq = np.zeros(256, np.uint16)
    freq[:11], freq[11] = 1, 4085
    rng = np.random.default_rng(seed)
    symbols = np.where(rng.random(n) < share, rng.integers(0, 11, n), 11).astype(np.uint8)
    return symbols, freq


def test_streams_of_the_worst_rate(with_each_engine, monkeypatch):
    """Up to 12 bits a symbol: what does not pay is RAW, what just pays is RANS, all engines agree."""
    seen = set()
    for share in (0.1, 0.6, 0.66, 0.6625, 0.665, 0.67, 0.7, 1.0):
        symbols, freq = rare_ones(3 * CHUNK + 999, share)
        layout = flat_layout(symbols.size, Kind.BYTE)
        found = with_each_engine(lambda e: e.encode(symbols, Kind.BYTE, layout, freq[None]))  # noqa: B023
        assert_identical(found)
        group = found["numpy"]
        seen |= set(modes(group))
        assert (np.diff(group.index & np.uint64((1 << 62) - 1)) <= CHUNK + 1).all()
        out = np.empty_like(symbols)
        for decoded in with_each_engine(
            lambda e: e.decode(group, out, Kind.BYTE, layout, freq[None]) or out.copy()  # noqa: B023
        ).values():
            np.testing.assert_array_equal(decoded, symbols)
    assert seen == {Mode.RANS, Mode.RAW}


def test_symbols_without_a_frequency_are_stored_raw(engine):
    symbols, freq = rare_ones(3 * CHUNK, 0.1)
    symbols[CHUNK + 5] = 200
    layout = flat_layout(symbols.size, Kind.BYTE)
    group = engine.encode(symbols, Kind.BYTE, layout, freq[None])
    assert modes(group) == [Mode.RANS, Mode.RAW, Mode.RANS]
    out = np.empty_like(symbols)
    engine.decode(group, out, Kind.BYTE, layout, freq[None])
    np.testing.assert_array_equal(out, symbols)


def assert_identical(groups):
    """Every engine's arrays are those of numpy."""
    for name, group in groups.items():
        for field in FIELDS:
            ours, reference = getattr(group, field), getattr(groups["numpy"], field)
            assert ours.dtype == reference.dtype
            np.testing.assert_array_equal(ours, reference, err_msg=f"{name} {field}")


DTYPES = {
    Kind.BYTE: torch.float8_e4m3fn, Kind.BF16: torch.bfloat16, Kind.HALF: torch.float16,
    Kind.FP32: torch.float32, Kind.WORD: torch.int32, Kind.LONG: torch.float64,
}  # fmt: skip


@pytest.mark.parametrize("order", ["flat", "tile", "odd pieces"])
@pytest.mark.parametrize("kind", Kind)
def test_engines_write_the_same_bytes(with_each_engine, kind, order):
    width = kind.n_planes
    data = weights(128 * 768, DTYPES[kind])
    layout = tiles(128, 768, width)
    if order == "flat":
        data = data[: (5 * CHUNK + 333) * width]
        layout = flat_layout(5 * CHUNK + 333, kind)
    elif order == "odd pieces":
        sizes = np.array([CHUNK, 70, 70, 3001, 3001, 3001, 1], np.int32)
        layout = Layout(np.arange(7, dtype=np.int64) * 11 * width + 1, sizes, 11, 90 * width + 1)
        data = np.resize(data, (16384 // 11 + 2) * (90 * width + 1) + 200 * width)
    for raw_planes in ((), range(1, width), range(width - 1)):
        freq = frequencies_of(data, kind, layout, list(raw_planes))
        found = with_each_engine(lambda e: e.encode(data, kind, layout, freq))  # noqa: B023
        assert_identical(found)
        inside = np.zeros(data.size, bool)
        for chunk in range(len(layout.sizes)):
            rans32_numpy.write_chunk(
                np.ones(layout.sizes[chunk] * width, bool), inside, kind, layout, chunk
            )

        def decoded(engine):
            out = np.full_like(data, 0xA5)
            engine.decode(found["numpy"], out, kind, layout, freq)  # noqa: B023
            return out

        for name, out in with_each_engine(decoded).items():
            np.testing.assert_array_equal(out[inside], data[inside], err_msg=name)
            assert (out[~inside] == 0xA5).all(), f"{name} writes outside of chunks"


def test_counts_are_the_same(with_each_engine):
    data = weights(3 * CHUNK + 7)
    layout = flat_layout(3 * CHUNK + 7, Kind.BF16)
    for name, found in with_each_engine(lambda e: e.count(data, Kind.BF16, layout)).items():
        assert found.dtype == np.int64
        for counts, plane in zip(found, split(data, Kind.BF16), strict=True):
            np.testing.assert_array_equal(counts, np.bincount(plane, minlength=256), err_msg=name)


@given(st.sampled_from(Kind), st.integers(0, 2**32 - 1), st.integers(0, 700), st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_random_bytes_of_any_kind(kind, seed, n, n_symbols):
    rng = np.random.default_rng(seed)
    data = rng.integers(0, n_symbols % 255 + 1, n * kind.n_planes, np.uint8)
    layout = flat_layout(n, kind)
    counts = rans32.count(data, kind, layout)
    freq = np.stack([normalize(row) for row in counts])
    freq[rng.random(kind.n_planes) < 0.3] = 0
    out = np.empty_like(data)
    rans32.decode(rans32.encode(data, kind, layout, freq), out, kind, layout, freq)
    np.testing.assert_array_equal(out, data)


# ---- damage ----


def small_group(engine):
    """Streams of all modes: chunk 2 of the exponents is constant, the signs hold a RAW stream."""
    data = weights(4 * CHUNK + 101)
    data[2 * CHUNK * 2 : 2 * CHUNK * 3] = 0
    layout = flat_layout(4 * CHUNK + 101, Kind.BF16)
    freq = frequencies_of(data, Kind.BF16, layout)
    group = engine.encode(data, Kind.BF16, layout, freq)
    assert set(modes(group)) == set(Mode)
    return data, layout, freq, group


@pytest.mark.parametrize("field", ["words", "index", "state", "crc"])
def test_every_flipped_byte_is_damage(engine, field):
    data, layout, freq, group = small_group(engine)
    whole = getattr(group, field)
    n_bytes = whole.view(np.uint8).size
    rng = np.random.default_rng(0)
    n_tries = 1500 if engine is not rans32_numpy else 12
    places = np.unique(np.concatenate([[0, n_bytes - 1], rng.integers(0, n_bytes, n_tries)]))
    out = np.empty_like(data)
    for place in places:
        damaged = whole.copy()
        damaged.view(np.uint8).reshape(-1)[place] ^= np.uint8(1 << rng.integers(0, 8))
        with pytest.raises(Damage) as caught:
            engine.decode(
                dataclasses.replace(group, **{field: damaged}), out, Kind.BF16, layout, freq
            )
        assert -1 <= caught.value.chunk < 5
        assert caught.value.reason


def test_damage_in_raw_planes_and_in_the_names_of_chunks(engine):
    data, layout, freq, _ = small_group(engine)
    freq[1] = 0
    group = engine.encode(data, Kind.BF16, layout, freq)
    out = np.empty_like(data)
    stride = CHUNK - 64
    assert group.raw.size == 4 * stride + 101 - 64
    for chunk, place in ((0, 0), (3, 4 * stride - 1), (4, 4 * stride), (4, 4 * stride + 36)):
        raw = group.raw.copy()
        raw[place] ^= 64
        with pytest.raises(Damage) as caught:
            engine.decode(dataclasses.replace(group, raw=raw), out, Kind.BF16, layout, freq)
        assert caught.value.chunk == chunk
        assert "checksum" in caught.value.reason


def carrying_group(engine):
    """First coded streams that are RANS, CONSTANT, RAW, and RANS of 101 elements; signs are raw."""
    data = weights(3 * CHUNK + 101)
    words = data.view("<u2")
    words[CHUNK : 2 * CHUNK] = words[CHUNK : 2 * CHUNK] & 0x807F | 120 << 7
    layout = flat_layout(words.size, Kind.BF16)
    freq = frequencies_of(data, Kind.BF16, layout, [1])
    words[2 * CHUNK + 7] = 0x7F80  # exponent 255 has no frequency
    assert freq[0, 255] == 0
    group = engine.encode(data, Kind.BF16, layout, freq)
    assert modes(group) == [Mode.RANS, Mode.CONSTANT, Mode.RAW, Mode.RANS]
    return data, layout, freq, group


def test_states_carry_the_first_bytes_of_a_raw_plane(engine):
    """Acceptance: 64 bytes a chunk for nothing, whatever the mode; each of them is checked."""
    data, layout, freq, group = carrying_group(engine)
    assert group.raw.size == layout.n_elements - 4 * 64
    signs = split(data, Kind.BF16)[1]
    for chunk in range(4):
        part = signs[chunk * CHUNK : (chunk + 1) * CHUNK]
        stored = group.raw[chunk * (CHUNK - 64) :][: part.size - 64]
        np.testing.assert_array_equal(stored, part[64:])
        if chunk in (1, 2):
            halves = part[:32] | part[32:64].astype(np.uint32) << 8
            symbol = 120 << 16 if chunk == 1 else 0
            np.testing.assert_array_equal(group.state[chunk], symbol | halves)
    out = np.empty_like(data)
    engine.decode(group, out, Kind.BF16, layout, freq)
    np.testing.assert_array_equal(out, data)
    for chunk, lane, bit in itertools.product(range(4), (0, 15, 16, 31), (0, 7, 8, 15, 16, 23, 31)):
        state = group.state.copy()
        state[chunk, lane] ^= np.uint32(1 << bit)
        with pytest.raises(Damage) as caught:
            engine.decode(dataclasses.replace(group, state=state), out, Kind.BF16, layout, freq)
        assert caught.value.chunk == chunk


@pytest.mark.parametrize("n, n_carried", [(63, 0), (64, 64), (65, 64), (CHUNK + 63, 64)])
@pytest.mark.parametrize("kind, raw_planes", [
    (Kind.BF16, [1]), (Kind.BF16, [0]), (Kind.FP32, [2, 3]), (Kind.LONG, [0, 5, 7]),
])  # fmt: skip
def test_who_carries_and_how_much(engine, kind, raw_planes, n, n_carried):
    data = np.random.default_rng(n).binomial(20, 0.4, n * kind.n_planes).astype(np.uint8)
    group = assert_round_trip(engine, data, kind, raw_planes=raw_planes)
    assert group.raw.size == len(raw_planes) * n - n_carried
    planes = split(data, kind)[raw_planes]
    expected = [planes[:, :CHUNK].reshape(-1)[n_carried:], planes[:, CHUNK:].reshape(-1)]
    np.testing.assert_array_equal(group.raw, np.concatenate(expected))


def test_streams_that_carry_nothing_may_not_hold_anything(engine):
    """Bits below 65536 where a first coded plane has none, or another plane than the first."""
    data, layout, freq, group = small_group(engine)
    out = np.empty_like(data)
    seen = set()
    for row, mode in enumerate(modes(group)):
        state = group.state.copy()
        if mode == Mode.RANS:
            continue  # the words would have to be coded with it: test below
        state[row, 3] ^= 256
        seen.add(mode)
        with pytest.raises(Damage, match="does not end where it must"):
            engine.decode(dataclasses.replace(group, state=state), out, Kind.BF16, layout, freq)
    assert seen == {Mode.CONSTANT, Mode.RAW}
    # a stream that carries, offered where nothing may be carried: one plane, so no raw plane
    _, _, freq, group = carrying_group(engine)
    exponents = np.empty(CHUNK, np.uint8)
    alone = Group(
        group.raw[:0], group.words, np.array([0, group.index[1]], np.uint64) & OFFSETS,
        group.state[:1], group.crc[:1],
    )  # fmt: skip
    with pytest.raises(Damage, match="chunk 0: the decoder does not end where it must"):
        engine.decode(alone, exponents, Kind.BYTE, flat_layout(CHUNK, Kind.BYTE), freq[:1])


def test_raw_of_another_length_is_damage(engine, monkeypatch):
    monkeypatch.setattr(rans32, "_engine", lambda: engine)
    data, layout, freq, group = carrying_group(engine)
    for raw in (group.raw[:-1], np.append(group.raw, np.uint8(0)), group.raw[None], group.raw[:0]):
        with pytest.raises(Damage, match="raw is uint8"):
            rans32.decode(dataclasses.replace(group, raw=raw), data, Kind.BF16, layout, freq)


def test_swapped_chunks_shortened_words_and_foreign_tables(engine):
    data, layout, freq, group = small_group(engine)
    out = np.empty_like(data)

    def decode(changed, other=freq):
        engine.decode(changed, out, Kind.BF16, layout, other)

    state = group.state.copy()
    state[[0, 2]] = state[[2, 0]]
    with pytest.raises(Damage):
        decode(dataclasses.replace(group, state=state))
    crc = group.crc[[1, 0, 2, 3, 4]]
    with pytest.raises(Damage, match="chunk 0: the checksum"):
        decode(dataclasses.replace(group, crc=crc))
    for length in range(0, group.words.size, 64 * (1 if engine is not rans32_numpy else 99)):
        with pytest.raises(Damage):
            decode(dataclasses.replace(group, words=group.words[:length]))
    other = freq.copy()
    other[0, [124, 122]] = other[0, [122, 124]]
    with pytest.raises(Damage):
        decode(group, other)


def test_wrong_but_ascending_offsets_are_damage(engine):
    """The index still looks like one; streams begin and end where others do."""
    data, layout, freq, group = small_group(engine)
    out = np.empty_like(data)
    for row in range(1, group.index.size - 1):
        for step in (-2, 2):
            index = group.index.copy()
            index[row] = int(index[row]) + step
            with pytest.raises(Damage):
                engine.decode(dataclasses.replace(group, index=index), out, Kind.BF16, layout, freq)


def test_words_may_begin_later_and_go_on_behind(engine):
    """A reader may pass more words than the index names: chunks of a group can be read alone."""
    data, _, freq, group = small_group(engine)
    rows = slice(2 * 3, 2 * 4)
    one = Group(
        np.empty(0, np.uint8), group.words, group.index[rows.start : rows.stop + 1].copy(),
        group.state[rows], group.crc[3:4],
    )  # fmt: skip
    one.index[-1] &= np.uint64((1 << 62) - 1)
    out = np.empty(2 * CHUNK, np.uint8)
    engine.decode(one, out, Kind.BF16, flat_layout(CHUNK, Kind.BF16), freq)
    np.testing.assert_array_equal(out, data[2 * 3 * CHUNK : 2 * 4 * CHUNK])


# ---- rate, facade ----


def test_rate_on_a_million_symbols():
    """Acceptance: words, index and states together within 0.07 bit of the order-0 entropy."""
    exponents = split(weights(1 << 20), Kind.BF16)[0]
    counts = np.bincount(exponents, minlength=256)
    p = counts[counts > 0] / counts.sum()
    entropy = -(p * np.log2(p)).sum()
    group = rans32.encode_symbols(exponents, normalize(counts))
    n_bytes = group.words.nbytes + group.index.nbytes + group.state.nbytes
    assert n_bytes * 8 / exponents.size <= entropy + 0.07
    np.testing.assert_array_equal(
        rans32.decode_symbols(group, exponents.size, normalize(counts)), exponents
    )


def test_the_caller_is_told_what_is_wrong(engine, monkeypatch):
    monkeypatch.setattr(rans32, "_engine", lambda: engine)
    data = weights(100)
    layout, freq = flat_layout(100, Kind.BF16), FREQ_OF_WEIGHTS
    group = rans32.encode(data, Kind.BF16, layout, freq)
    with pytest.raises(ValueError, match="ends behind"):
        rans32.encode(data[:-2], Kind.BF16, layout, freq)
    with pytest.raises(ValueError, match="contiguous uint8"):
        rans32.count(data.view(np.uint16), Kind.BF16, layout)
    with pytest.raises(ValueError, match="contiguous uint8"):
        rans32.encode(weights(200)[::2], Kind.BF16, layout, freq)
    with pytest.raises(ValueError, match="sum to"):
        rans32.encode(data, Kind.BF16, layout, freq // 2)
    read_only = np.empty_like(data)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        rans32.decode(group, read_only, Kind.BF16, layout, freq)
    with pytest.raises(Damage, match="state is uint32"):
        rans32.decode(
            dataclasses.replace(group, state=group.state[1:]), data, Kind.BF16, layout, freq
        )


def test_numpy_is_announced_once_and_only_if_nobody_asked_for_it(monkeypatch, caplog):
    monkeypatch.setattr(compiler, "library", lambda: None)
    monkeypatch.setattr(compiler, "why_not", lambda: "there is no C compiler")
    for is_off, n_records in ((False, 1), (True, 0)):
        monkeypatch.setattr(compiler, "is_off", lambda: is_off)  # noqa: B023
        caplog.clear()
        rans32._engine.cache_clear()
        with caplog.at_level(logging.WARNING, logger="fewbit"):
            assert rans32.engine_name() == rans32.engine_name() == "numpy"
        assert len(caplog.records) == n_records
        assert all("there is no C compiler" in record.message for record in caplog.records)
    rans32._engine.cache_clear()
