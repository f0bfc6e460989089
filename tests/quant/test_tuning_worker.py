"""A timer in a worker: hangs, deaths, errors and wrong results, and who is to blame."""

import os
import time
from pathlib import Path

import pytest

from fake_backends import candidate
from fewbit.quant.errors import NoKernelError, TuningError
from fewbit.quant.timing import Fault
from fewbit.quant.tuning_worker import IsolatedTimer
from tuned_tables import H200, problem

TESTS = Path(__file__).resolve().parent.parent
FINE, HANG, DIE, RAISE, WRONG, EARLY, LONG, BREAKS = map(candidate, (0, 1, 2, 3, 5, 6, 7, 8))


@pytest.fixture
def start(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("FAKE_BROKEN", str(tmp_path / "broken"))
    timers = []

    def make(backend="fake_backends:FakeTimer", **options):
        timers.append(IsolatedTimer(backend, least_s=1.0, **options))
        return timers[-1]

    yield make
    for timer in timers:
        timer.close()


def fault_of(call, *arguments):
    with pytest.raises(Fault) as caught:
        call(*arguments)
    return caught.value


def test_a_worker_that_behaves(start):
    timer = start()
    facts = timer.facts()
    assert facts.device == H200 and facts.driver == "580.65"
    assert facts.conditions == {"sm_mhz": "1980"}
    assert timer.verify(problem(), FINE) == 1e-3
    others = [candidate(10 + i) for i in range(3)]
    found = timer.sample(problem(), [FINE, *others], 5)
    assert [len(samples) for samples in found] == [5] * 4
    assert all(10e-6 <= s <= 11e-6 for samples in found for s in samples)
    assert timer.sample(problem(), [FINE, FINE], 2)[0] is not None  # one asked for twice
    assert timer.sample(problem(), [], 2) == []
    wrong = fault_of(timer.verify, problem(), WRONG)
    assert (wrong.candidate, wrong.why) == (WRONG, "WRONG") and timer.benched == frozenset()
    assert timer.verify(problem(), LONG) == 1e-3  # it had asked for the time


def test_a_lost_worker_costs_one_candidate(start):
    timer = start()
    assert timer.verify(problem(), FINE) == 1e-3
    fine = [candidate(10 + i) for i in range(3)]
    bad = [candidate(1, "a"), candidate(2, "b"), candidate(3, "c")]
    found = timer.sample(problem(), [fine[0], bad[0], fine[1], bad[1], bad[2], fine[2]], 3)
    assert [len(found[i]) for i in (0, 2, 5)] == [3, 3, 3]
    faults = [found[i] for i in (1, 3, 4)]
    assert [fault.candidate for fault in faults] == bad
    assert [(fault.why, fault.text) for fault in faults] == [
        ("TIMEOUT", "nothing heard for 1.0 s"),
        ("DEATH", "it ended with signal 9"),
        ("FAULT", "RuntimeError: CUDA error: an illegal memory access was encountered"),
    ]
    assert timer.verify(problem(), FINE) == 1e-3


def test_a_kernel_that_costs_three_workers_in_a_row_is_benched(start):
    timer = start()
    fault_of(timer.verify, problem(), RAISE)
    assert timer.verify(problem(), FINE) == 1e-3  # a good result between
    fault_of(timer.verify, problem(), DIE)
    fault_of(timer.verify, problem(), DIE)
    assert timer.benched == frozenset()
    others = [candidate(0, "gemv"), candidate(2, "gemv")]
    found = timer.sample(problem(), [FINE, RAISE, *others], 2)  # the third in the middle of a block
    assert [isinstance(f, Fault) for f in found] == [True, True, False, True]
    assert timer.benched == {"gemm"}
    fault = fault_of(timer.verify, problem(), FINE)
    assert fault.why == "DEATH" and "gemm cost 3 workers in a row and is benched" in fault.text
    assert timer.verify(problem(), others[0]) == 1e-3


def test_a_death_before_any_sign_of_life_is_found_one_by_one(start):
    found = start().sample(problem(), [FINE, EARLY, candidate(10)], 3)
    assert len(found[0]) == len(found[2]) == 3
    assert (found[1].candidate, found[1].why) == (EARLY, "DEATH")


def test_predictions_extend_the_patience(start):
    timer = start(predicted=lambda problem, candidate: 0.05)  # times 50
    pid = timer._worker().pid
    began = time.monotonic()
    fault = fault_of(timer.verify, problem(), HANG)
    assert fault.text == "nothing heard for 2.5 s" and time.monotonic() - began > 2.4
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_verified_must_still_verify_on_a_new_worker(start, tmp_path):
    timer = start()
    assert timer.verify(problem(), BREAKS) == 1e-3
    fault_of(timer.verify, problem(), DIE)
    assert timer.verify(problem(), FINE) == 1e-3  # it did
    assert timer.verify(problem(), BREAKS) == 1e-3
    (tmp_path / "broken").write_text("")
    fault_of(timer.verify, problem(), DIE)
    with pytest.raises(TuningError, match=r"(?s)gemm \{how 8\} verified before and no longer does "
                       r"\(FAULT RuntimeError.*finished rows are kept"):  # fmt: skip
        timer.verify(problem(), FINE)


def test_errors_that_are_nobodys_fault(start):
    with pytest.raises(TuningError, match="timing needs a CUDA GPU and torch sees none"):
        start("fake_backends:no_device").verify(problem(), FINE)
    with pytest.raises(TuningError, match="does not start: ImportError: no module named nothing"):
        start("fake_backends:broken").facts()
    with pytest.raises(TuningError, match="does not start: ModuleNotFoundError"):
        start("no_such_module:Timer").facts()


def test_other_named_errors_pass_through(start):
    timer = start("fake_backends:Refusing")
    with pytest.raises(NoKernelError, match="got 3, needed 4"):
        timer.verify(problem(), FINE)
    found = timer.sample(problem(), [FINE, WRONG], 2)
    assert len(found[0]) == 2 and found[1].why == "WRONG"
