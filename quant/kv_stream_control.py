"""Which level of a KV stream's next chunk still arrives in time.

A prefix of N chunks has to be there within a deadline; each chunk exists at several levels, of known
sizes, and may be computed again instead, in a known time, which costs the device and is the way out
where sending is too slow. Before each chunk, with R seconds left and an estimate b of the bandwidth:

    plain    for every chunk to come: the best level that takes at most deadline / N at b (CacheGen's
             rule, which carries nothing over); computed again if none does and that is known
    slack    R less the seconds of the plain levels
    >= 0     the best level that takes at most the plain one's seconds + slack / chunks to come; beyond
             plain only if a fall of the bandwidth to b / hedge, now, leaves time for it and for all
             others at their smallest, or computed again
    < 0      the best level that takes at most the least possible seconds + (R − those of all chunks to
             come) / chunks to come; if even the least are too many, the least

b is the smaller of an exponential average over observed chunks and the newest observation: a fall
counts at once, a rise by and by. So plain levels are never undercut while they are in time, and slack
is spent evenly, on upgrades that a bad turn survives. In 2,000 simulated prefixes (bandwidth constant,
falling to 15 % by and by, or breaking to a quarter once or often; this module's test) no deadline that
plain levels meet was missed. A fall beyond `hedge` within one chunk can make it miss one.

Everything is arithmetic on its arguments: the same observations give the same choices. No clock is
read and nothing is sent here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import FewbitError
from .kv_stream_codes import LEVELS, LOSSLESS

RECOMPUTE = None  # as a choice's level
_ROUNDING = 1e-9  # of the deadline: what sums of seconds may be off
BEST_FIRST = (LOSSLESS, *sorted(LEVELS, reverse=True))


class Bandwidth:
    """Bytes a second, estimated from what chunks took. start: before any, weight: of the newest."""

    def __init__(self, start: float, weight: float = 0.5) -> None:
        _require("start", start, 0 < start < math.inf, "a finite number of bytes a second above 0")
        _require("weight", weight, 0 < weight <= 1, "above 0 and at most 1")
        self._average = self._newest = float(start)
        self._weight = weight
        self._observed = False

    def observe(self, n_bytes: float, seconds: float) -> None:
        """A transfer. One that took no time, or of no bytes, says nothing and is left out."""
        _require("seconds", seconds, seconds >= 0, "a number that is not negative")
        if not 0 < n_bytes < math.inf or not 0 < seconds < math.inf:
            return
        rate = n_bytes / seconds
        if not 0 < rate < math.inf:
            return
        weight = self._weight if self._observed else 1.0
        self._average += weight * (rate - self._average)
        self._newest, self._observed = rate, True

    @property
    def estimate(self) -> float:
        """Bytes a second, above 0."""
        return min(self._average, self._newest)


@dataclass(frozen=True)
class Choice:
    """level: 0 … 3, or None to compute the chunk again. seconds: that it is expected to take."""

    level: int | None
    seconds: float


class Controller:
    """Chooses levels for the chunks of one prefix.

    sizes: for each chunk, level -> bytes. deadline: seconds for all, from when elapsed is 0.
    recompute: seconds to compute each chunk again, None if nobody can. hedge: the fall of bandwidth
    that spending slack has to survive.
    """

    def __init__(
        self,
        sizes: Sequence[Mapping[int, int]],
        deadline: float,
        recompute: Sequence[float] | None = None,
        hedge: float = 4.0,
    ) -> None:
        _require("deadline", deadline, 0 < deadline < math.inf, "a finite number above 0")
        _require("hedge", hedge, 1 <= hedge < math.inf, "a finite number of at least 1")
        _require("sizes", len(sizes), len(sizes) > 0, "at least one chunk")
        if recompute is not None:
            _require(
                "recompute", len(recompute), len(recompute) == len(sizes), "one for each chunk"
            )
            for seconds in recompute:
                _require("recompute", seconds, seconds >= 0, "a number that is not negative")
        for chunk in sizes:
            known = bool(chunk) and set(chunk) <= set(BEST_FIRST) and min(chunk.values()) > 0
            _require("sizes", dict(chunk), known, f"bytes above 0 for levels of {BEST_FIRST}")
        self._sizes = [dict(chunk) for chunk in sizes]
        self._deadline, self._hedge = float(deadline), float(hedge)
        self._recompute = [math.inf] * len(sizes) if recompute is None else list(recompute)
        self._smallest = [min(chunk.values()) for chunk in sizes]

    def choose(self, index: int, elapsed: float, bandwidth: float) -> Choice:
        """The level of chunk `index`, when all before it are there and `elapsed` seconds passed."""
        n_chunks = len(self._sizes)
        _require("index", index, 0 <= index < n_chunks, f"0 to {n_chunks - 1}")
        _require("elapsed", elapsed, 0 <= elapsed < math.inf, "finite seconds, not negative")
        _require("bandwidth", bandwidth, bandwidth > 0, "above 0 bytes a second")
        left = max(self._deadline - elapsed, 0.0)
        seconds = {level: n / bandwidth for level, n in self._sizes[index].items()}
        plain = [self._plain(i, bandwidth) for i in range(index, len(self._sizes))]
        slack = left - sum(choice.seconds for choice in plain)
        if slack < -_ROUNDING * self._deadline:
            return self._late(index, seconds, left, bandwidth)
        budget = plain[0].seconds + slack / len(plain)
        for level in BEST_FIRST:
            if level == plain[0].level:
                break
            if seconds.get(level, math.inf) <= budget and self._survives(
                index, seconds[level], left, bandwidth
            ):
                return Choice(level, seconds[level])
        return plain[0]

    def _plain(self, index: int, bandwidth: float) -> Choice:
        """The best level whose chunk takes no more than its even part of the deadline."""
        part = self._deadline / len(self._sizes)
        for level in BEST_FIRST:
            seconds = self._sizes[index].get(level, math.inf) / bandwidth
            if seconds <= part * (1 + _ROUNDING):
                return Choice(level, seconds)
        if self._recompute[index] < math.inf:
            return Choice(RECOMPUTE, self._recompute[index])
        return self._least(index, bandwidth)

    def _least(self, index: int, bandwidth: float) -> Choice:
        """What takes the least time."""
        level = min(self._sizes[index], key=lambda level: self._sizes[index][level])
        seconds, again = self._smallest[index] / bandwidth, self._recompute[index]
        return Choice(RECOMPUTE, again) if again < seconds else Choice(level, seconds)

    def _late(
        self, index: int, seconds: Mapping[int, float], left: float, bandwidth: float
    ) -> Choice:
        """The best level within the chunk's share of what is left, else what takes least."""
        least = [self._least(i, bandwidth) for i in range(index, len(self._sizes))]
        spare = left - sum(choice.seconds for choice in least)
        budget = least[0].seconds + max(spare, 0.0) / len(least)
        for level in BEST_FIRST:
            if seconds.get(level, math.inf) <= budget < math.inf:
                return Choice(level, seconds[level])
        return least[0]

    def _survives(self, index: int, seconds: float, left: float, bandwidth: float) -> bool:
        """Whether the rest is in time if the bandwidth falls now."""
        fallen = bandwidth / self._hedge
        rest = sum(
            min(size / fallen, again)
            for size, again in zip(
                self._smallest[index + 1 :], self._recompute[index + 1 :], strict=True
            )
        )
        return seconds * self._hedge + rest <= left


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise FewbitError(f"KV stream control: {name} must be {allowed}, got {value!r}")
