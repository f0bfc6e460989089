"""The order of checks, and that every failure, death and hang ends up in the report."""

import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import oracle
from bench.child_rows import DONE, FAILED, TIMED_OUT, Outcome, run_child
from bench.oracle import (
    checks,
    failure_text,
    gpu_kernels,
    here,
    lost_kernels,
    run_check,
    run_shard,
    steps,
    summary,
)
from bench.oracle_check import Check, Place
from fewbit.kernels_triton import _triton
from fewbit.quant.dispatch import kernels
from fewbit.quant.errors import NoKernelError
from fewbit.quant.machine import load_device

PLACE = here() or Place("cpu", load_device("h100"), reduced=True)
FEW = replace(PLACE, reduced=True)
KERNELS = [kernel.name for kernel in gpu_kernels()]
runs = pytest.mark.skipif(here() is None, reason="neither a GPU nor Triton's interpreter")


@runs
@pytest.mark.parametrize("name", KERNELS)
def test_the_first_checks_of_every_kernel_pass(name):
    found = []
    for check in checks(FEW, [name]):
        found.append(run_check(check))
        if len(found) == 3:
            break
    assert found, f"no check of {name}"
    assert all(row["ok"] for row in found), found


def test_every_op_of_the_registry_has_an_oracle():
    ops = {kernel.op for kernel in gpu_kernels()}
    assert ops <= set(oracle._LANES), f"no oracle for {sorted(ops - set(oracle._LANES))}"


def test_kernels_take_turns():
    found = [check.kernel for check in checks(FEW)]
    assert set(found) == set(KERNELS)
    assert set(KERNELS) <= set(kernels()) and "reference" not in KERNELS
    # Some take few shapes, or none of the formats that come first: their first turns are empty.
    assert len(set(found[: 2 * len(KERNELS)])) >= len(KERNELS) - 5


def test_the_order_is_always_the_same():
    first, second = ([c.case + str(c.config) for c in checks(FEW)] for _ in range(2))
    assert first == second and len(first) > 50
    assert len(steps(FEW)) >= len(first)


def test_a_kernel_whose_op_is_unknown_is_a_failure(monkeypatch):
    stranger = replace(gpu_kernels()[0], name="stranger", op="teleport")
    monkeypatch.setattr(oracle, "kernels", lambda: {stranger.name: stranger})
    (check,) = checks(FEW)
    row = run_check(check)
    assert not row["ok"] and "'teleport' has no oracle" in row["why"]


def test_a_kernel_that_cannot_even_be_asked_is_a_failure(monkeypatch):
    def refuse(problem):
        raise AttributeError("no such option")

    broken = replace(gpu_kernels()[0], name="broken", refuse=refuse)
    monkeypatch.setattr(oracle, "kernels", lambda: {broken.name: broken})
    check = next(checks(FEW))
    row = run_check(check)
    assert check.kernel == "broken" and not row["ok"] and "no such option" in row["why"]
    emptied = replace(broken, refuse=lambda problem: (), configs=lambda problem: ())
    monkeypatch.setattr(oracle, "kernels", lambda: {emptied.name: emptied})
    assert "no configs" in run_check(next(checks(FEW)))["why"]


def check_that(error):
    return Check("k", (("block", 16),), "linear M=7", 1e-3, error)


def raises(error):
    raise error


@pytest.mark.parametrize(
    "error, ok, why",
    [
        (lambda: 5e-4, True, ""),
        (lambda: 2e-3, False, "error 2.00e-03 exceeds 0.001"),
        (lambda: float("inf"), False, "NaN, or another shape or dtype"),
        (partial(raises, NoKernelError("refused")), False, "NoKernelError: refused"),
        (partial(raises, ValueError("bad")), False, "ValueError: bad"),
    ],
)
def test_rows_say_what_was_found(error, ok, why):
    row = run_check(check_that(error))
    assert (row["ok"], row["why"], row["config"]) == (ok, why, {"block": 16})
    assert "lost" not in row


def test_an_error_of_the_device_is_told_apart():
    row = run_check(check_that(partial(raises, RuntimeError("CUDA error: illegal address"))))
    assert row["lost"] and lost_kernels([row]) == ["k"]
    if _triton.AVAILABLE:
        from triton.runtime.errors import OutOfResources

        row = run_check(check_that(partial(raises, OutOfResources(2, 1, "shared memory"))))
        assert not row["ok"] and "lost" not in row and "shared memory" in row["why"]


# ---- children -------------------------------------------------------------------------------


def begun(index):
    return {"index": index, "kernel": "k", "config": {}, "case": f"case {index}"}


def finished(index, ok=True):
    return begun(index) | {"ok": ok, "error": 0.0, "tolerance": 1e-3, "why": "", "seconds": 0.1}


def played(*outcomes):
    """A stand-in for children that end like this one after the other, and where each began."""
    left, firsts = list(outcomes), []

    def run(first, seconds, on_row):
        firsts.append(first)
        outcome = left.pop(0)
        for row in outcome.rows:
            on_row(row)
        return outcome

    return run, firsts


def results(run, seconds=60.0, reached=None):
    heard = []
    assert run_shard(run, seconds, heard.append) == reached
    return [row for row in heard if oracle.is_result(row)]


def test_a_shard_that_ends_well_is_one_child():
    run, firsts = played(Outcome((begun(0), finished(0), begun(2), finished(2)), DONE, 1.0))
    assert [row["index"] for row in results(run)] == [0, 2] and firsts == [0]


@pytest.mark.parametrize("status, error", [(FAILED, "signal 11"), (TIMED_OUT, "no row for 120 s")])
def test_another_child_goes_on_behind_the_check_that_killed_one(status, error):
    run, firsts = played(
        Outcome((begun(0), finished(0), begun(4)), status, 1.0, error),
        Outcome((begun(8), finished(8)), DONE, 1.0),
    )
    rows = results(run)
    assert [(row["index"], row["ok"]) for row in rows] == [(0, True), (4, False), (8, True)]
    assert rows[1]["why"] == error and lost_kernels(rows) == ["k"] and firsts == [0, 5]


def test_an_error_that_was_told_is_not_told_twice():
    run, firsts = played(
        Outcome((begun(0), finished(0, ok=False)), FAILED, 1.0, "CUDA error"),
        Outcome((), DONE, 1.0),
    )
    assert len(results(run)) == 1 and firsts == [0, 1]


def test_children_that_do_not_start_are_one_failure():
    run, _ = played(Outcome((), FAILED, 1.0, "ImportError: no bench"))
    (row,) = results(run, reached=0)
    assert not row["ok"] and row["why"] == "ImportError: no bench" and lost_kernels([row]) == []
    assert "start" in failure_text(row)


def test_the_end_of_the_time_is_no_failure():
    run, _ = played(Outcome((begun(0), finished(0), begun(1)), TIMED_OUT, 1.0, "its time was up"))
    assert [row["ok"] for row in results(run, seconds=0.0, reached=1)] == [True]
    run, _ = played(Outcome((begun(0), finished(0)), TIMED_OUT, 1.0, "its time was up"))
    assert results(run, seconds=0.0, reached=1)
    run, _ = played(Outcome((), TIMED_OUT, 1.0, "its time was up"))
    assert results(run, seconds=0.0, reached=0) == []


def test_steps_that_were_not_reached_are_counted(monkeypatch):
    monkeypatch.setattr(oracle, "here", lambda: FEW)
    monkeypatch.setattr(oracle, "steps", lambda place, names: [None] * 10)
    # of 0, 3, 6, 9 those from 6 on; of 1, 4, 7 all
    row = oracle.left_over({0: 6, 1: 0}, 3, ())
    assert row == {"skipped": ["5 of 10 steps"], "why": "time"}
    assert not oracle.is_result(row) and summary([row])["checks"] == 0


@runs
def test_shards_share_the_steps(monkeypatch):
    name = "triton_quantize_rows"
    n = len(steps(here(), [name]))
    rows = []
    for shard in range(2):
        arguments = (shard, 2, n - 4, (name,))
        outcome = run_child("bench.oracle:shard_rows", arguments, 120.0)
        assert outcome.status == DONE, outcome.error
        rows += [row for row in outcome.rows if oracle.is_result(row)]
    assert sorted(row["index"] for row in rows) == list(range(n - 4, n))
    assert all(row["ok"] for row in rows)


# ---- report ---------------------------------------------------------------------------------


def test_summary_counts_and_keeps_the_largest_error():
    rows = [finished(0), finished(1) | {"error": 5e-4}, finished(2, ok=False) | {"error": 2e-3}]
    found = summary(rows)
    assert (found["checks"], found["failed"]) == (3, 1)
    assert found["kernels"] == {"k": {"checks": 3, "failed": 1, "worst": 2.0}}
    assert summary([])["checks"] == 0


def test_failures_name_kernel_config_and_case():
    row = finished(3, ok=False) | {"config": {"block": 16, "warps": 4}, "why": "error 1"}
    assert failure_text(row) == "FAILED k {block 16, warps 4} case 3: error 1"


@pytest.mark.parametrize("ok, code", [(True, 0), (False, 1)])
def test_exit_code_and_every_failure(monkeypatch, capsys, ok, code):
    monkeypatch.setattr(sys, "argv", ["oracle", "--jobs", "1"])
    monkeypatch.setattr(oracle, "here", lambda: FEW)
    monkeypatch.setattr(oracle, "pool_rows", lambda *_: [finished(0), finished(1, ok)])
    assert oracle.main() == code
    assert Counter(capsys.readouterr().out.split())["FAILED"] == (0 if ok else 1)


def test_nothing_checked_is_a_failure(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["oracle"])
    monkeypatch.setattr(oracle, "here", lambda: FEW)
    monkeypatch.setattr(oracle, "pool_rows", lambda *_: [])
    assert oracle.main() == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["oracle"])
    monkeypatch.setattr(_triton, "interpreted", lambda: False)
    assert oracle.main() == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err
