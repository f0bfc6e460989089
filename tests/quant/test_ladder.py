"""Plans: the fewest ranges, never a loss above 3 %, the same from any order of candidates."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fewbit.quant.ladder import TIE, Candidate, build_ladder, rung_of

A, B, C = Candidate("a"), Candidate("b", (("block_m", 16),)), Candidate("c")


def test_neighbours_share_what_loses_little() -> None:
    times = {
        1: {A: 1.0, B: 1.02},
        2: {A: 1.0, B: 1.01},
        4: {A: 1.2, B: 1.0, C: 1.5},
        8: {A: 9.0, B: 3.0, C: 1.0},
    }
    ladder = build_ladder(times, {})
    assert [(r.first, r.last, r.candidate) for r in ladder] == [(1, 4, B), (5, 8, C)]
    assert rung_of(ladder, 3).candidate is B and rung_of(ladder, 9999).candidate is C


def test_priority_then_time_then_name_decide_within_a_range() -> None:
    times = {1: {A: 1.0, B: 1.02, C: 1.01}, 2: {A: 1.0, B: 1.0, C: 1.0}}
    assert build_ladder(times, {})[0].candidate is A
    assert build_ladder(times, {"b": 1})[0].candidate is B
    even = {1: {C: 1.0, B: 1.0, A: 1.0}}
    assert build_ladder(even, {})[0].candidate is A


def test_one_for_all_loses_least_where_it_loses_most() -> None:
    times = {1: {A: 1.0, B: 1.5, C: 1.1}, 2: {A: 4.0, B: 1.0, C: 1.6}, 4: {B: 1.0, C: 1.3}}
    (rung,) = build_ladder(times, {}, one_for_all=True)
    assert rung.candidate is B and (rung.first, rung.last) == (1, 4)


times_of_sizes = st.lists(
    st.lists(st.floats(0.5, 2.0), min_size=4, max_size=4), min_size=1, max_size=12
)


@given(times_of_sizes, st.permutations(range(4)))
def test_any_times_give_a_plan_without_loss_or_doubt(
    rows: list[list[float]], order: list[int]
) -> None:
    candidates = [Candidate(name) for name in "abcd"]
    times = {1 << i: dict(zip(candidates, row, strict=True)) for i, row in enumerate(rows)}
    ladder = build_ladder(times, {"d": 1})
    for size, found in times.items():
        assert found[rung_of(ladder, size).candidate] <= TIE * min(found.values())
    shuffled = {s: {candidates[i]: t[candidates[i]] for i in order} for s, t in times.items()}
    assert build_ladder(shuffled, {"d": 1}) == ladder
    starts = [rung.first for rung in ladder]
    assert starts[0] == 1 and starts[1:] == [rung.last + 1 for rung in ladder[:-1]]
    # no shorter plan: where a range ends, nothing near the best goes on through the next size
    sizes = list(times)
    for rung, following in pairwise(ladder):
        inside = [s for s in sizes if rung.first <= s <= rung.last]
        beyond = next(s for s in sizes if s >= following.first)
        near = [
            {c for c, t in times[s].items() if t <= TIE * min(times[s].values())}
            for s in (*inside, beyond)
        ]
        assert not set.intersection(*near)


def test_candidates_print_their_choices() -> None:
    assert str(A) == "a" and str(B) == "b {block_m 16}"
