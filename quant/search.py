"""The search for the fastest candidate of one problem: what is worth timing, and in which rounds.

Before anything is timed: kernels that refuse the problem are out, then configs that did not compile,
that spill registers, that do not fit the device, or that failed in an earlier run (quarantine). What is
left is ranked by the cost model with the compiler's figures.

    explore   3 samples each of up to 32 candidates, or 15 % of them:
              "guided"      a third of them by the model, the best of each kernel among them; then in
                            batches of 4 those with the most expected gain (`model_error.py`)
              "halving"     24 by the model and 8 at random
              "exhaustive"  all; "random": 32 at random; "model": the model's first only
    halve     12 candidates x 8 samples, then 4 x 20, each round judged by its own medians
    duel      40 interleaved pairs with the incumbent, which is replaced only by a candidate that is
              faster in 75 % of them, and by 2 % in the median
    proof     a winner of a kernel that is `measured_only` has 40 more with the best candidate that is
              not, one of which is kept in every round; unless it is 1.05 times as fast, such are out

Candidates that are not verified are not timed. One that faults is out, and named in the outcome. A
kernel that faulted three times, and more often than it verified, is benched: where 5 % of configs
crash, a plain count of three would cost a kernel that works in one search of ten.

"guided" is the default because "halving" trusts the model's order. On a simulated device, with the
configs of the kernels here and a model whose rank correlation with the truth is 0.8 to 0.9, guided ends
within 3 % of the best in 97 % of 200 runs, halving in 90 %, random in 20 %; with made-up configs, more
of which are alike to the model, in 95 %, 60 % and 23 % (`tests/quant/test_search.py`).

Everything random is seeded by the problem: two processes search alike. Deliberately not here: clocks,
processes, tables.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from .kernel import PROVEN_TIMES, AnyProblem, Compiled, Config, Kernel
from .model_error import expected_gain
from .timing import Candidate, Fault, Timer

MODES = ("guided", "halving", "exhaustive", "random", "model")
EXHAUSTIVE = 32  # candidates that are all timed
BY_MODEL, AT_RANDOM = 24, 8
SHARE = 0.15  # of more candidates, timed at most
BATCH = 4
EXPLORE_SAMPLES = 3
HALVINGS = ((12, 8), (4, 20))  # (candidates, samples)
PAIRS = 40
FASTER_SHARE, FASTER_BY = 0.75, 0.02
_BENCHED_AFTER = 3

Binaries = Mapping[Candidate, tuple[Compiled, ...]]


# ---- what is worth timing -------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """A candidate with the model's seconds and what it compiles to (main kernel first)."""

    candidate: Candidate
    seconds: float
    compiled: tuple[Compiled, ...] = ()


@dataclass(frozen=True)
class Survivors:
    """ranked: best first. measured_only: names of kernels that need proof. The rest counts configs
    that were left out, by reason."""

    ranked: tuple[Scored, ...]
    failed: int = 0
    spilled: int = 0
    unfit: int = 0
    quarantined: int = 0
    measured_only: frozenset[str] = frozenset()

    def needs_proof(self, candidate: Candidate) -> bool:
        """Is it of a kernel that is `measured_only`?"""
        return candidate.kernel in self.measured_only

    @property
    def model(self) -> dict[Candidate, float]:
        """Seconds of each by the model, best first."""
        return {scored.candidate: scored.seconds for scored in self.ranked}


def survivors(
    problem: AnyProblem,
    kernels: Iterable[Kernel],
    binaries: Binaries | None = None,
    quarantined: Callable[[Kernel, Config], bool] = lambda kernel, config: False,
) -> Survivors:
    """Candidates of a problem with a machine, ranked.

    binaries: of every config of a kernel that can be compiled; a missing one did not compile. None:
    nothing was compiled, kernels guess. `reference` is a candidate only if there is no other.
    """
    ranked: list[Scored] = []
    out: Counter[str] = Counter()
    guarded: set[str] = set()
    for kernel in kernels:
        if kernel.measured_only:
            guarded.add(kernel.name)
        if kernel.op != problem.op or kernel.refuse(problem):
            continue
        for config in ((),) if kernel.configs is None else kernel.configs(problem):
            scored = _score(problem, kernel, config, binaries)
            if quarantined(kernel, config):
                out["quarantined"] += 1
            elif isinstance(scored, str):
                out[scored] += 1
            else:
                ranked.append(scored)
    others = [scored for scored in ranked if scored.candidate.kernel != "reference"]
    order = sorted(others or ranked, key=lambda scored: (scored.seconds, scored.candidate))
    left_out = (out["failed"], out["spilled"], out["unfit"], out["quarantined"])
    return Survivors(tuple(order), *left_out, measured_only=frozenset(guarded))


def _score(
    problem: AnyProblem, kernel: Kernel, config: Config, binaries: Binaries | None
) -> Scored | str:
    """The candidate with its estimate, or why it is out."""
    candidate = Candidate(kernel.name, config)
    compiled: tuple[Compiled, ...] = ()
    if kernel.compile is not None and binaries is not None:
        if candidate not in binaries:
            return "failed"
        compiled = binaries[candidate]
        if any(binary.stack_bytes for binary in compiled):
            return "spilled"
    if kernel.configs is None:
        seconds = kernel.seconds(problem)
    else:
        seconds = kernel.seconds(problem, config, compiled[0] if compiled else None)
    return Scored(candidate, seconds, compiled) if seconds < math.inf else "unfit"


def finalists(problem: AnyProblem, found: Survivors) -> list[Candidate]:
    """All if they are few, else the first by the model and some at random, which guard against a
    model that is off for a whole group."""
    model = list(found.model)
    if len(model) <= EXHAUSTIVE:
        return model
    return model[:BY_MODEL] + _draw(problem).sample(model[BY_MODEL:], AT_RANDOM)


def timed_limit(n_candidates: int) -> int:
    """How many of so many candidates are timed at most."""
    return min(n_candidates, max(EXHAUSTIVE, int(SHARE * n_candidates)))


def _draw(problem: AnyProblem) -> random.Random:
    return random.Random(f"{problem.family} {problem.size}")


# ---- timing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """Seconds of a call: median, 10th and 90th percentile of the samples of one round."""

    candidate: Candidate
    seconds: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    winner: to be used from now on; None if all that were tried faulted. error: of the winner, relative,
    against the reference. incumbent: as timed beside the winner; None if there was none, or it
    faulted. runner_up: the next best. times: median seconds of all that were explored.
    n_timed: candidates that were run, faulty ones included. faults: in the order in which they came up.
    """

    winner: Timed | None
    error: float
    incumbent: Timed | None
    runner_up: Timed | None
    times: Mapping[Candidate, float]
    n_timed: int
    faults: tuple[Fault, ...]


class Bench:
    """Kernels that are not run again: they faulted three times or more, and more often than not."""

    def __init__(self) -> None:
        self._faults: Counter[str] = Counter()
        self._good: Counter[str] = Counter()

    def failed(self, kernel: str) -> None:
        """A candidate of the kernel faulted."""
        self._faults[kernel] += 1

    def ran(self, kernel: str) -> None:
        """A candidate of the kernel verified."""
        self._good[kernel] += 1

    def __contains__(self, kernel: str) -> bool:
        """Is the kernel benched?"""
        return self._faults[kernel] >= max(_BENCHED_AFTER, self._good[kernel])


class Trials:
    """What was run of one problem's candidates: verified once, sampled in rounds, dropped by faults."""

    def __init__(self, problem: AnyProblem, timer: Timer, bench: Bench) -> None:
        self.tried: set[Candidate] = set()
        self.errors: dict[Candidate, float] = {}  # of those that are in
        self.faults: list[Fault] = []
        self._problem = problem
        self._timer = timer
        self._bench = bench

    def sample(self, candidates: Iterable[Candidate], n: int) -> dict[Candidate, list[float]]:
        """n samples of each that verifies and does not fault, in seconds."""
        live = [candidate for candidate in candidates if self._is_in(candidate)]
        if not live:
            return {}
        found: dict[Candidate, list[float]] = {}
        answers = self._timer.sample(self._problem, live, n)
        for candidate, answer in zip(live, answers, strict=True):
            if isinstance(answer, Fault):
                self._drop(answer)
            else:
                found[candidate] = answer
        return found

    def is_out(self, candidate: Candidate) -> bool:
        """Did it fault, or is its kernel benched?"""
        if candidate in self.tried:
            return candidate not in self.errors
        return candidate.kernel in self._bench

    def _is_in(self, candidate: Candidate) -> bool:
        """Has it verified, now or before, and not faulted since?"""
        if candidate in self.tried:
            return candidate in self.errors
        if candidate.kernel in self._bench:
            return False
        self.tried.add(candidate)
        try:
            self.errors[candidate] = self._timer.verify(self._problem, candidate)
        except Fault as fault:
            self._drop(fault)
            return False
        self._bench.ran(candidate.kernel)
        return True

    def _drop(self, fault: Fault) -> None:
        self.errors.pop(fault.candidate, None)
        self.faults.append(fault)
        self._bench.failed(fault.candidate.kernel)


def search(
    problem: AnyProblem,
    found: Survivors,
    timer: Timer,
    *,
    incumbent: Candidate | None = None,
    hints: Sequence[Candidate] = (),
    mode: str = "guided",
    bench: Bench | None = None,
) -> Outcome:
    """Time candidates of a problem until one wins.

    incumbent: what runs now; it is timed whatever the mode. hints: what was good for a neighbouring
    size; a guided search begins with it. mode: one of `MODES`. bench: of the whole run.
    """
    trials = Trials(problem, timer, bench or Bench())
    first = [c for c in dict.fromkeys((incumbent, *hints)) if c is not None and c in found.model]
    explored = times = _explore(mode, problem, found, first, trials)
    rounds: list[dict[Candidate, Timed]] = []
    for n_left, n in HALVINGS:
        rounds.append(_timed(trials.sample(_leaders(times, n_left, found), n)))
        times = {candidate: timed.seconds for candidate, timed in rounds[-1].items()}
    order = sorted(rounds[-1].values(), key=lambda timed: (timed.seconds, timed.candidate))
    winner, other = _duel(order, incumbent if incumbent in found.model else None, trials)
    if winner is not None and found.needs_proof(winner.candidate):
        plain = [timed for timed in order if not found.needs_proof(timed.candidate)]
        if not _proven(winner.candidate, plain, trials):
            kept = incumbent in found.model and not found.needs_proof(incumbent)
            winner, other = _duel(plain, incumbent if kept else None, trials)
    rest = [t for t in order if winner is not None and t.candidate != winner.candidate]
    return Outcome(
        winner=winner,
        error=trials.errors[winner.candidate] if winner is not None else 0.0,
        incumbent=other,
        runner_up=next((t for t in rest if t.candidate in trials.errors), None),
        times=explored,
        n_timed=len(trials.tried),
        faults=tuple(trials.faults),
    )


def _explore(
    mode: str,
    problem: AnyProblem,
    found: Survivors,
    first: Sequence[Candidate],
    trials: Trials,
) -> dict[Candidate, float]:
    """Median seconds of what was tried and ran."""
    model = list(found.model)
    if mode == "guided" and len(model) > EXHAUSTIVE:
        return _guided(found, first, trials)
    chosen = {
        "guided": model,
        "halving": finalists(problem, found),
        "exhaustive": model,
        "random": _draw(problem).sample(model, min(EXHAUSTIVE, len(model))),
        "model": [c for c in model if not found.needs_proof(c)][:1],
    }[mode]
    return _medians(trials.sample(dict.fromkeys((*first[:1], *chosen)), EXPLORE_SAMPLES))


def _guided(found: Survivors, first: Sequence[Candidate], trials: Trials) -> dict[Candidate, float]:
    """As `_explore`, in batches, each chosen by what the ones before it showed."""
    model, limit = found.model, timed_limit(len(found.ranked))
    best_of_kernels = {candidate.kernel: candidate for candidate in reversed(model)}.values()
    batch = list(dict.fromkeys((*first, *best_of_kernels, *model)))[: limit // 3]
    times: dict[Candidate, float] = {}
    while batch:
        times |= _medians(trials.sample(batch, EXPLORE_SAMPLES))
        left = {
            candidate: seconds
            for candidate, seconds in model.items()
            if candidate in times or not trials.is_out(candidate)
        }
        size = min(BATCH, limit - len(trials.tried))
        batch = _most_promising(left, times)[:size] if size > 0 else []
    return times


def _most_promising(
    model: Mapping[Candidate, float], times: Mapping[Candidate, float]
) -> list[Candidate]:
    """Candidates without a time, those with the most expected gain first."""
    if not times:
        return list(model)
    gain = expected_gain(model, times)
    return sorted(gain, key=lambda candidate: (-gain[candidate], candidate))


def _duel(
    order: Sequence[Timed], incumbent: Candidate | None, trials: Trials
) -> tuple[Timed | None, Timed | None]:
    """(winner, incumbent): the fastest, unless the incumbent is as good. order: of the last round,
    fastest first."""
    if not order or incumbent is None or incumbent == order[0].candidate:
        return (order[0] if order else None), (order[0] if order and incumbent else None)
    challenger = order[0].candidate
    pairs = trials.sample((challenger, incumbent), PAIRS)
    timed = _timed(pairs)
    new, old = timed.get(challenger), timed.get(incumbent)
    if new is None:
        return old or next((t for t in order[1:] if t.candidate in trials.errors), None), old
    if old is None or _replaces(pairs[challenger], pairs[incumbent]):
        return new, old
    return old, old


def _leaders(times: Mapping[Candidate, float], n: int, found: Survivors) -> list[Candidate]:
    """The fastest n, one that needs no proof among them if there is any."""
    order = sorted(times, key=lambda candidate: (times[candidate], candidate))
    plain = [candidate for candidate in order if not found.needs_proof(candidate)]
    leaders = order[:n]
    if plain and not set(plain) & set(leaders):
        leaders[-1] = plain[0]
    return leaders


def _proven(winner: Candidate, plain: Sequence[Timed], trials: Trials) -> bool:
    """Is the winner `PROVEN_TIMES` as fast as the first of the others that does not fault now?"""
    for other in plain:
        pairs = trials.sample((winner, other.candidate), PAIRS)
        if winner not in pairs:
            return False
        if other.candidate in pairs:
            return _replaces(pairs[winner], pairs[other.candidate], 1 / PROVEN_TIMES)
    return False


def _replaces(
    challenger: Sequence[float], incumbent: Sequence[float], bound: float = 1 - FASTER_BY
) -> bool:
    """Is the challenger's lead worth a change? Samples of equal position were taken side by side;
    bound: of the median of their ratios."""
    ratios = [new / old for new, old in zip(challenger, incumbent, strict=True)]
    faster = sum(ratio < 1 for ratio in ratios) / len(ratios)
    return faster >= FASTER_SHARE and median(ratios) <= bound


def _medians(samples: Mapping[Candidate, Sequence[float]]) -> dict[Candidate, float]:
    return {candidate: median(taken) for candidate, taken in samples.items()}


def _timed(samples: Mapping[Candidate, Sequence[float]]) -> dict[Candidate, Timed]:
    found = {}
    for candidate, taken in samples.items():
        tenths = quantiles(taken, n=10, method="inclusive")
        found[candidate] = Timed(candidate, median(taken), tenths[0], tenths[-1])
    return found
