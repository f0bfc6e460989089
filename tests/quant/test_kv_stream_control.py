"""The controller in simulated networks, beside the rule that carries no slack over."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.quant.errors import FewbitError
from fewbit.quant.kv_stream_control import BEST_FIRST, RECOMPUTE, Bandwidth, Choice, Controller

QUALITY = {RECOMPUTE: 4, 0: 4, 3: 3, 2: 2, 1: 1}
MEGA = 1e6
STEPS = 50  # of a trace, over the deadline; the last one lasts
KINDS = ("constant", "falling", "breaking", "bursty")


@dataclass(frozen=True)
class Case:
    """sizes, deadline, seconds to compute each chunk again, bytes a second in each step."""

    sizes: list[dict[int, int]]
    deadline: float
    recompute: list[float] | None
    trace: list[float]


@dataclass(frozen=True)
class Outcome:
    met: bool
    quality: float


def case_of(kind: str, seed: int, recompute: bool) -> Case:
    rng = random.Random(f"{kind} {seed}")
    n_chunks = rng.randrange(4, 40)
    even = {1: 3.0, 2: 3.6, 3: 4.4, 0: 11.2}
    sizes = [
        {level: int(MEGA * size * rng.uniform(0.95, 1.05)) for level, size in even.items()}
        for _ in range(n_chunks)
    ]
    start = MEGA * rng.uniform(30, 300)
    deadline = n_chunks * rng.uniform(0.025, 0.14)
    again = [rng.uniform(0.3, 2) * deadline / n_chunks] * n_chunks if recompute else None
    return Case(sizes, deadline, again, [start * part for part in shape_of(kind, rng)])


def shape_of(kind: str, rng: random.Random) -> list[float]:
    """Bandwidth over its first value."""
    if kind == "constant":
        return [1.0] * STEPS
    if kind == "falling":
        end = rng.uniform(0.15, 1)
        return [end ** (step / STEPS) for step in range(STEPS)]
    low = rng.uniform(0.25, 1)
    if kind == "breaking":
        broken = rng.randrange(STEPS)
        return [1.0 if step < broken else low for step in range(STEPS)]
    found, now, change = [], 1.0, rng.uniform(0.05, 0.5)
    for _ in range(STEPS):
        now = (low if now == 1 else 1.0) if rng.random() < change else now
        found.append(now)
    return found


def arrival(n_bytes: float, now: float, case: Case) -> float:
    """When bytes that are asked for now are all there."""
    step_seconds, left = case.deadline / STEPS, n_bytes
    while True:
        step = min(int(now / step_seconds + 1e-9), STEPS - 1)
        end = (step + 1) * step_seconds if step < STEPS - 1 else math.inf
        if case.trace[step] * (end - now) >= left:
            return now + left / case.trace[step]
        left -= case.trace[step] * (end - now)
        now = end


def without_slack(case: Case, index: int, bandwidth: float) -> int | None:
    """CacheGen's rule: the largest level in an even part of the deadline, else compute again."""
    sizes, part = case.sizes[index], case.deadline / len(case.sizes)
    fits = [level for level in BEST_FIRST if sizes[level] / bandwidth < part]
    if fits:
        return fits[0]
    return RECOMPUTE if case.recompute else 1


def simulate(case: Case, carries_slack: bool) -> Outcome:
    bandwidth, now, levels = Bandwidth(case.trace[0]), 0.0, []
    controller = Controller(case.sizes, case.deadline, case.recompute)
    for index, sizes in enumerate(case.sizes):
        if carries_slack:
            level = controller.choose(index, now, bandwidth.estimate).level
        else:
            level = without_slack(case, index, bandwidth.estimate)
        levels.append(level)
        if level is RECOMPUTE:
            assert case.recompute is not None
            now += case.recompute[index]
            continue
        end = arrival(sizes[level], now, case)
        bandwidth.observe(sizes[level], end - now)
        now = end
    quality = sum(QUALITY[level] for level in levels) / len(levels)
    return Outcome(now <= case.deadline * (1 + 1e-9), quality)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_meets_what_the_rule_without_slack_meets_and_is_better(
    kind: str, recompute: bool
) -> None:
    ours, theirs, n_both = 0.0, 0.0, 0
    n_met = [0, 0]
    for seed in range(250):
        case = case_of(kind, seed, recompute)
        found, other = simulate(case, True), simulate(case, False)
        assert found.met or not other.met, f"missed in case {seed}"
        n_met[0] += found.met
        n_met[1] += other.met
        if other.met:
            ours, theirs, n_both = ours + found.quality, theirs + other.quality, n_both + 1
            if kind == "constant" and not recompute:
                assert found.quality >= other.quality
    assert n_both > 100 and n_met[0] >= n_met[1]
    assert ours / n_both >= theirs / n_both + 0.03, (ours / n_both, theirs / n_both)


def even(n: int, sizes: Mapping[int, int] | None = None) -> list[dict[int, int]]:
    return [dict(sizes or {1: 100, 2: 200, 3: 400}) for _ in range(n)]


def levels(controller: Controller, n: int, rate: float) -> list[int | None]:
    """Choices at a constant bandwidth."""
    found, now = [], 0.0
    for index in range(n):
        choice = controller.choose(index, now, rate)
        found.append(choice.level)
        now += choice.seconds
    return found


def test_slack_is_spent_on_upgrades() -> None:
    """1910 bytes fit: nine chunks of level 2 and one of level 1, where plain levels are all 1."""
    chosen = levels(Controller(even(10), 10.0, hedge=1.0), 10, 191.0)
    assert chosen.count(2) == 9 and chosen.count(1) == 1


def test_a_bandwidth_that_fits_exactly_is_enough() -> None:
    for rate in (0.1, 200 / 3, 1e-3, 7e11):
        deadline = 7 * 200 / rate
        assert levels(Controller(even(7), deadline), 7, rate) == [2] * 7


def test_too_slow_for_the_smallest_computes_again_where_that_is_known_and_quicker() -> None:
    slow = 10.0  # 10 s for 100 bytes
    assert Controller(even(4), 4.0).choose(0, 0.0, slow) == Choice(1, 10.0)
    assert Controller(even(4), 4.0, [0.5] * 4).choose(0, 0.0, slow) == Choice(RECOMPUTE, 0.5)
    assert Controller(even(4), 4.0, [20.0] * 4).choose(0, 0.0, slow) == Choice(1, 10.0)


def test_after_the_deadline_it_takes_what_is_quickest() -> None:
    controller = Controller(even(4), 4.0, [0.5] * 4)
    assert controller.choose(3, 5.0, 1000.0).level == 1
    assert controller.choose(3, 5.0, 100.0).level is RECOMPUTE


def test_a_hedge_keeps_slack_for_a_fall() -> None:
    sizes, rate = even(2, {1: 100, 2: 150}), 120.0
    assert Controller(sizes, 2.2, hedge=1.0).choose(0, 0.0, rate).level == 1
    assert Controller(sizes, 2.6, hedge=1.0).choose(0, 0.0, rate).level == 2
    assert Controller(even(2, {1: 100, 2: 300}), 4.0, hedge=1.0).choose(0, 0.0, 140.0).level == 1


def test_lossless_is_best() -> None:
    sizes = even(3, {1: 100, 3: 400, 0: 1000})
    assert Controller(sizes, 3.0).choose(0, 0.0, 2000.0).level == 0
    assert Controller(sizes, 3.0).choose(0, 0.0, 500.0).level == 3


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 12), seed=st.integers(0, 10**6),
    deadline=st.floats(1e-300, 1e300), elapsed=st.floats(0, 1e300),
    rate=st.floats(min_value=5e-324, max_value=1e308), recompute=st.booleans(),
)  # fmt: skip
def test_extreme_numbers_give_a_level_that_exists(
    n: int, seed: int, deadline: float, elapsed: float, rate: float, recompute: bool
) -> None:
    rng = random.Random(seed)
    sizes = [{level: rng.randrange(1, 1 << 40) for level in (1, 2, 3)} for _ in range(n)]
    again = [rng.choice([0.0, 1e-300, 0.2, 1e300]) for _ in range(n)] if recompute else None
    index = rng.randrange(n)
    controller = Controller(sizes, deadline, again)
    choice = controller.choose(index, elapsed, rate)
    assert choice == Controller(sizes, deadline, again).choose(index, elapsed, rate)
    assert choice.level in sizes[index] or (choice.level is RECOMPUTE and again is not None)
    assert not math.isnan(choice.seconds)


def test_the_estimate_falls_at_once_and_rises_by_and_by() -> None:
    bandwidth = Bandwidth(100.0)
    bandwidth.observe(300, 1.0)  # the first observation replaces the start
    assert bandwidth.estimate == 300
    bandwidth.observe(100, 1.0)
    assert bandwidth.estimate == 100
    bandwidth.observe(400, 1.0)
    assert bandwidth.estimate == 0.5 * 400 + 0.5 * 200
    for seconds in (0.0, math.inf):
        bandwidth.observe(100, seconds)
    bandwidth.observe(0, 1.0)
    assert bandwidth.estimate == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 1.0), "sizes must be at least one chunk"),
        (([{}], 1.0), "sizes must be bytes above 0"),
        (([{1: 0}], 1.0), "sizes must be bytes above 0"),
        (([{7: 10}], 1.0), "levels of"),
        (([{1: 10}], 0.0), "deadline must be a finite number above 0, got 0.0"),
        (([{1: 10}], math.nan), "deadline must be"),
        (([{1: 10}], 1.0, [1.0, 2.0]), "recompute must be one for each chunk, got 2"),
        (([{1: 10}], 1.0, [-1.0]), "recompute must be a number that is not negative"),
        (([{1: 10}], 1.0, None, 0.5), "hedge must be"),
    ],
)
def test_bad_settings_are_named(arguments: Sequence[object], message: str) -> None:
    with pytest.raises(FewbitError, match=message):
        Controller(*arguments)  # type: ignore[arg-type]


def test_bad_observations_are_named() -> None:
    controller = Controller(even(2), 1.0)
    for index, elapsed, rate in ((2, 0.0, 1.0), (0, math.nan, 1.0), (0, -1.0, 1.0), (0, 0.0, 0.0)):
        with pytest.raises(FewbitError, match="KV stream control"):
            controller.choose(index, elapsed, rate)
    with pytest.raises(FewbitError, match="start must be"):
        Bandwidth(0.0)
    with pytest.raises(FewbitError, match="weight must be"):
        Bandwidth(1.0, 0.0)
    with pytest.raises(FewbitError, match="seconds must be"):
        Bandwidth(1.0).observe(1, math.nan)
