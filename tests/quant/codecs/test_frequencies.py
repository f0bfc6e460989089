"""12-bit frequencies: sums, limits, optimality against exhaustive search, tables."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbit.quant.codecs import frequencies
from fewbit.quant.codecs.frequencies import normalize

COUNTS = st.lists(st.integers(0, 1 << 40) | st.integers(0, 3), min_size=256, max_size=256)


def bits(counts, freq):
    used = counts > 0
    return float((counts[used] * (12 - np.log2(freq[used].astype(np.float64)))).sum())


def fibonacci():
    counts = [1, 1]
    while len(counts) < 80:
        counts.append(counts[-1] + counts[-2])
    return np.array(counts + [0] * 176, np.int64)


@given(COUNTS)
def test_sums_and_limits(counts):
    counts = np.array(counts, np.int64)
    freq = normalize(counts)
    assert freq.dtype == np.uint16
    assert freq.sum() == (4096 if counts.any() else 0)
    assert freq.max() <= 4095
    assert (freq[counts > 0] >= 1).all()
    assert (freq > 0).sum() == max((counts > 0).sum(), 2 if counts.any() else 0)
    np.testing.assert_array_equal(freq, normalize(counts))


@given(st.lists(st.integers(1, 1 << 30), min_size=2, max_size=60))
def test_no_exchange_of_one_unit_saves_bits(some):
    counts = np.array(some + [0] * (256 - len(some)), np.int64)
    freq = normalize(counts)
    best = bits(counts, freq)
    for up, down in itertools.permutations(range(len(some)), 2):
        if freq[down] > 1 and freq[up] < 4095:
            other = freq.copy()
            other[up] += 1
            other[down] -= 1
            assert bits(counts, other) >= best * (1 - 1e-12)


def test_two_symbols_against_every_split():
    for first, second in [(1, 1), (1, 3), (1, 1 << 20), (7, 10**9), (123456, 654321)]:
        counts = np.zeros(256, np.int64)
        counts[[9, 200]] = first, second
        found = normalize(counts)
        cost = [
            first * math.log2(4096 / f) + second * math.log2(4096 / (4096 - f))
            for f in range(1, 4096)
        ]
        assert bits(counts, found) <= min(cost) * (1 + 1e-10)


@pytest.mark.parametrize("counts, most_bits", [
    (fibonacci(), 0.025), (np.full(256, 1000, np.int64), 0), (np.arange(256) ** 3, 0.015),
])  # fmt: skip
def test_loss_against_the_entropy(counts, most_bits):
    p = counts[counts > 0] / counts.sum()
    entropy = -(p * np.log2(p)).sum()
    assert entropy <= bits(counts, normalize(counts)) / counts.sum() <= entropy + most_bits + 1e-12


def test_frozen_frequencies():
    counts = np.zeros(256, np.int64)
    counts[118:126] = 3, 40, 500, 2600, 5000, 1800, 56, 1
    assert normalize(counts)[117:127].tolist() == [0, 1, 16, 205, 1065, 2048, 737, 23, 1, 0]
    one = np.zeros(256, np.int64)
    one[255] = 12
    assert normalize(one)[[254, 255, 0]].tolist() == [0, 4095, 1]


@pytest.mark.parametrize("wrong", [
    np.full(256, -1), np.zeros(255, np.int64), np.zeros(256), np.zeros((1, 256), np.int64),
])  # fmt: skip
def test_what_are_no_counts_is_refused(wrong):
    with pytest.raises(ValueError, match="256 integers"):
        normalize(wrong)


def test_impossible_frequencies_are_refused():
    freq = np.zeros((2, 256), np.uint16)
    freq[1, :2] = 4000, 96
    assert frequencies.check(freq, 2).tolist() == [False, True]
    for wrong in ((4095, 0), (4096, 0), (4096, 1)):
        freq[1, :2] = wrong
        with pytest.raises(ValueError, match="plane 1"):
            frequencies.check(freq, 2)
    with pytest.raises(ValueError, match=r"uint16 \[2, 256\]"):
        frequencies.check(freq.astype(np.int64), 2)


def test_slots_to_the_bit():
    freq = np.zeros(256, np.uint16)
    freq[[3, 250]] = 4000, 96
    slots = frequencies.slots(freq)
    assert slots[0] == 4000 << 20 | 0 << 8 | 3
    assert slots[3999] == 4000 << 20 | 3999 << 8 | 3
    assert slots[4000] == 96 << 20 | 250
    assert slots[4095] == 96 << 20 | 95 << 8 | 250
    assert frequencies.starts(freq)[250] == 4000
