"""Counts of symbols -> 12-bit frequencies, and the tables that coding reads.

Frequencies of a plane: uint16 [256], sum 4096, at least 1 for a symbol that occurs, at most 4095. A
symbol of count n and frequency f costs n · log2(4096 / f) bits. This sum is convex in each f, so that
moving one unit at a time, from where it costs least to where it gains most, ends at its minimum:

    f = max(1, round(s · n / N)), s so that the sum is near 4096, found in a few trials,
    then units are added or taken until it is 4096, then moved

At the minimum all n · ln((f + 1) / f) ≈ n / (f + ½) lie below, all n / (f - ½) above one number, which
is what rounding n times a constant does: little is left to move.
The logarithms come from a series in +, ·, / alone, so that every machine finds the same frequencies
(log2 of numpy differs by an ulp between instruction sets). A plane in which only one symbol occurs
gets 4095 for it and 1 for the next value. All zeros mean that a plane is not coded.
"""

from functools import cache

import numpy as np

TOTAL = 4096
LARGEST = TOTAL - 1
_TRIALS = 4


@cache
def _gains() -> np.ndarray:
    """float64 [4096]: ln((f + 1) / f) at f, 2·artanh(z) with z = 1 / (2f + 1).

    Infinite at 0, minus infinite at the largest f: units are never taken from the one or given to the
    other.
    """
    z = 1.0 / (2.0 * np.arange(1, TOTAL, dtype=np.float64) + 1.0)
    square, power, total = z * z, z, np.zeros_like(z)
    for odd in range(1, 41, 2):
        total = total + power / odd
        power = power * square
    return np.concatenate(([np.inf], 2.0 * total[:-1], [-np.inf]))


def normalize(counts: np.ndarray) -> np.ndarray:
    """int64 [256] of counts -> uint16 [256] of frequencies, the cheapest there are.

    All zero if nothing was counted; `ValueError` for other shapes or negative counts.
    """
    if counts.shape != (256,) or counts.dtype.kind not in "iu" or counts.min() < 0:
        raise ValueError(f"counts must be 256 integers >= 0, got {counts.dtype} {counts.shape}")
    counts = counts.astype(np.int64)
    used = np.flatnonzero(counts)
    freq = np.zeros(256, np.uint16)
    if used.size == 1:
        freq[used[0]] = LARGEST
        freq[(used[0] + 1) % 256] = 1
    elif used.size:
        freq[used] = _cheapest(counts[used])
    return freq


def _rounded(share: np.ndarray) -> np.ndarray:
    """int64: shares times a constant, rounded, at least 1, that sum to about 4096."""
    scale = float(TOTAL)
    for _ in range(_TRIALS):
        freq = (share * scale + 0.5).astype(np.int64)
        np.minimum(np.maximum(freq, 1, out=freq), LARGEST, out=freq)
        total = int(freq.sum())
        if total == TOTAL:
            break
        scale = scale * (TOTAL / total)
    return freq


def _cheapest(counts: np.ndarray) -> np.ndarray:
    """Frequencies of at least two symbols that occur."""
    weight = counts.astype(np.float64)
    freq = _rounded(weight / float(counts.sum()))
    gains = _gains()
    while True:
        missing = TOTAL - int(freq.sum())
        gain = weight * gains[freq]
        loss = weight * gains[freq - 1]
        up, down = int(gain.argmax()), int(loss.argmin())
        if missing > 0:
            freq[up] += 1
        elif missing < 0:
            freq[down] -= 1
        elif gain[up] > loss[down] * (1 + 1e-12):
            freq[up] += 1
            freq[down] -= 1
        else:
            return freq


def check(freq: np.ndarray, n_planes: int) -> np.ndarray:
    """bool [n_planes], True for planes that are coded; `ValueError` for impossible frequencies."""
    check_array(freq, n_planes)
    sums = freq.sum(axis=1, dtype=np.int64)
    for plane in range(n_planes):
        if sums[plane] not in (0, TOTAL) or freq[plane].max() > LARGEST:
            raise ValueError(
                f"frequencies of plane {plane} sum to {sums[plane]}, largest {freq[plane].max()}; "
                f"they must sum to {TOTAL} (or be all 0) and none may exceed {LARGEST}"
            )
    return sums > 0


def check_array(freq: np.ndarray, n_planes: int) -> None:
    """`ValueError` for another shape or dtype; no look inside."""
    if freq.shape != (n_planes, 256) or freq.dtype != np.uint16:
        raise ValueError(
            f"frequencies must be uint16 [{n_planes}, 256], got {freq.dtype} {freq.shape}"
        )


def starts(freq: np.ndarray) -> np.ndarray:
    """uint32 [256]: the first slot of every symbol."""
    return (np.cumsum(freq, dtype=np.int64) - freq).astype(np.uint32)


def slots(freq: np.ndarray) -> np.ndarray:
    """uint32 [4096], what a decoder reads at slot x & 4095.

    bit  31........20  19........8  7......0
         f             slot - start symbol
    """
    symbols = np.repeat(np.arange(256, dtype=np.uint32), freq)
    bias = np.arange(TOTAL, dtype=np.uint32) - starts(freq)[symbols]
    return symbols | (bias << 8) | (freq.astype(np.uint32)[symbols] << 20)
