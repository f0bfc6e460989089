"""From times at each size to a plan: which kernel and config for which range of sizes.

A ladder has a rung for each range of M (or of tokens). Neighbouring sizes share a candidate as long
as it loses less than 3 % to the best at each of them, which estimates cannot tell apart anyway:

    near(b)  candidates of bucket b within 3 % of its best
    range    grows from the smallest bucket on while the intersection of near(b) is not empty
    choice   of the intersection: the higher priority, then the smaller sum of times, then the name

That gives the fewest ranges possible. Everything is decided by the inputs: two processes agree.

With `one_for_all` there is one rung, whose candidate loses least where it loses most; NoKernelError if
none takes every size.
Deliberately not here: where the times come from.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import NoKernelError
from .kernel import Config

TIE = 1.03  # times nearer than this are equal


@dataclass(frozen=True, order=True)
class Candidate:
    """A kernel by name with one of its configs, () if it has none."""

    kernel: str
    config: Config = ()

    def __str__(self) -> str:
        """`triton_int8 {block_m 16, split_k 4}`."""
        told = ", ".join(f"{name} {value}" for name, value in self.config)
        return f"{self.kernel} {{{told}}}" if told else self.kernel


@dataclass(frozen=True)
class Rung:
    """`candidate` runs sizes above that of the rung before, up to `last` (the last rung: all)."""

    first: int
    last: int
    candidate: Candidate


Times = Mapping[Candidate, float]


def build_ladder(
    times: Mapping[int, Times],
    priority: Mapping[str, int],
    one_for_all: bool = False,
    invariant: frozenset[str] = frozenset(),
) -> tuple[Rung, ...]:
    """Rungs for candidates' seconds at each size, which come in rising order; every size must have
    a candidate. priority: of each kernel by name, 0 if it is missing. invariant: kernels that come
    first where one candidate serves all sizes."""
    sizes = list(times)
    if one_for_all:
        return (Rung(1, sizes[-1], _least_regret(times, invariant)),)
    rungs: list[Rung] = []
    start = 0
    while start < len(sizes):
        common, stop = _near(times[sizes[start]]), start + 1
        while stop < len(sizes) and (narrower := common & _near(times[sizes[stop]])):
            common, stop = narrower, stop + 1
        covered = [times[size] for size in sizes[start:stop]]
        first = 1 if start == 0 else sizes[start - 1] + 1
        rungs.append(Rung(first, sizes[stop - 1], _best(common, covered, priority)))
        start = stop
    return tuple(rungs)


def rung_of(ladder: Sequence[Rung], size: int) -> Rung:
    """The rung that holds `size`; above the last, the last."""
    return next((rung for rung in ladder if size <= rung.last), ladder[-1])


def _near(times: Times) -> set[Candidate]:
    """Candidates within `TIE` of the fastest."""
    bound = TIE * min(times.values())
    return {candidate for candidate, seconds in times.items() if seconds <= bound}


def _best(
    common: set[Candidate], covered: Sequence[Times], priority: Mapping[str, int]
) -> Candidate:
    def rank(candidate: Candidate) -> tuple[int, float, Candidate]:
        total = math.fsum(times[candidate] for times in covered)
        return -priority.get(candidate.kernel, 0), total, candidate

    return min(common, key=rank)


def _least_regret(times: Mapping[int, Times], invariant: frozenset[str]) -> Candidate:
    """Of the candidates at every size, the one whose worst ratio to the best of a size is least."""
    best = {size: min(found.values()) for size, found in times.items()}
    everywhere = set.intersection(*(set(found) for found in times.values()))
    if not everywhere:
        raise NoKernelError(
            "FEWBIT_DETERMINISTIC=1: no kernel and config that rules leave takes every size; unset it, "
            "or change the rules"
        )

    def regret(candidate: Candidate) -> tuple[float, Candidate]:
        return max(times[size][candidate] / best[size] for size in times), candidate

    return min({c for c in everywhere if c.kernel in invariant} or everywhere, key=regret)
