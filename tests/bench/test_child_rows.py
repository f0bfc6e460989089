"""Children that finish, fail, die and hang; what they had found is kept."""

import os
import time
from pathlib import Path

import pytest

from bench.child_rows import DONE, FAILED, ROOT, TIMED_OUT, run_child

HERE = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}


def run(name, *arguments, seconds=60.0, silence=None, **options):
    return run_child(
        f"child_functions:{name}", arguments, seconds, silence, environment=HERE, **options
    )


def test_rows_arrive_one_by_one():
    heard = []
    outcome = run("count", 3, on_row=heard.append)
    assert outcome.status == DONE and outcome.error == ""
    assert list(outcome.rows) == heard == [{"i": 0}, {"i": 1}, {"i": 2}]
    assert 0 < outcome.seconds < 60


@pytest.mark.parametrize(
    "name, error", [("fail_after", "a bad day"), ("refuse", "no such thing"), ("die_after", "3")]
)
def test_rows_survive_the_end_of_the_child(name, error):
    outcome = run(name, 2)
    assert outcome.status == FAILED and error in outcome.error
    assert len(outcome.rows) == 2


def test_silence_and_time_end_a_child():
    # Starting a child is silence too, so that the bound must leave room for it.
    started = time.monotonic()
    outcome = run("hang_after", 1, silence=5.0)
    assert outcome.status == TIMED_OUT and outcome.error == "no row for 5 s"
    assert len(outcome.rows) == 1
    outcome = run("hang_after", 1, seconds=0.1)
    assert outcome.status == TIMED_OUT and outcome.error == "its time was up"
    assert time.monotonic() - started < 60


def test_environment_is_added_to_ours(monkeypatch):
    monkeypatch.setenv("FEWBIT_OURS", "1")
    assert run("environment", "FEWBIT_OURS").rows == ({"value": "1"},)
    assert run("environment", "PYTHONPATH").rows == ({"value": HERE["PYTHONPATH"]},)


def test_bench_is_importable_in_a_child():
    outcome = run_child("bench.child_rows:_paths", (), 60.0)
    # Not rows, but it was found and called.
    assert "PYTHONPATH" in str(outcome.rows) or outcome.status == DONE
