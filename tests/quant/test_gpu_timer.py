"""Timing on a GPU: the logic without one; with one, samples of a kernel that is there."""

import time
from collections import Counter

import pytest
import torch

from fewbit.quant import gpu_timer, timed_case
from fewbit.quant.cpu import KERNELS
from fewbit.quant.dispatch import kernels
from fewbit.quant.errors import NoKernelError, TuningError
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.kernel import Kernel, Problem, RowsProblem
from fewbit.quant.machine import this_device
from fewbit.quant.timing import Candidate, Fault
from fewbit.quant.tuning_worker import IsolatedTimer
from tuned_tables import H200

DENSE = Candidate("dense_cached")


def problem(m=8, n=256, device="cpu", machine=None):
    return Problem("int_group", IntGroupOptions(), 1, m, n, 256, torch.bfloat16, device, None,
                   machine or this_device("cpu"))  # fmt: skip


# ---- logic ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("copies", "calls"), [(1, 20), (3, 21), (7, 21), (20, 20), (21, 21), (300, 300)]
)
def test_graphs_hold_whole_rotations(copies, calls):
    assert gpu_timer.calls_of(copies) == calls


def test_every_turn_is_another_permutation():
    order = gpu_timer.turns(5, 40, seed=1)
    blocks = [tuple(order[i : i + 5]) for i in range(0, 200, 5)]
    assert all(sorted(block) == list(range(5)) for block in blocks)
    assert len(set(blocks)) > 20
    first = Counter(block[0] for block in blocks)
    assert set(first) == set(range(5))
    assert order == gpu_timer.turns(5, 40, 1) != gpu_timer.turns(5, 40, 2)
    assert gpu_timer.turns(0, 3, 1) == []


def test_drift():
    assert not gpu_timer.drifted(1.0, 1.029) and not gpu_timer.drifted(1.029, 1.0)
    assert gpu_timer.drifted(1.0, 1.031) and gpu_timer.drifted(1.031, 1.0)


def test_steady_blocks_are_kept_and_drifting_ones_repeated():
    """The clock changes once, within the second block of three."""
    clock = {"runs": 0}

    def speed():
        return 1.0 if clock["runs"] < 30 else 2.0

    def measure(position):
        clock["runs"] += 1
        return position * speed()

    order = list(range(50))
    found = gpu_timer.steady(order, measure, speed)
    assert clock["runs"] == 70  # one block of 20 again
    assert found == [p * 1.0 for p in range(20)] + [p * 2.0 for p in range(20, 50)]


def test_a_clock_that_is_never_steady_is_a_named_error():
    clock = iter(1.1**i for i in range(100))
    runs = []
    with pytest.raises(TuningError, match=r"not steady: .* more than 3% in 5 blocks of 20"):
        gpu_timer.steady(list(range(30)), lambda p: runs.append(p) or 1.0, lambda: next(clock))
    assert len(runs) == 100


def test_conditions_of_nvidia_smi():
    line = "580.65.06, 1980, 3201, 41, 117.25, 700.00"
    assert gpu_timer.parse_conditions(line) == {
        "driver": "580.65.06", "sm_mhz": "1980", "memory_mhz": "3201", "celsius": "41",
        "watts": "117.25", "watts_cap": "700.00",
    }  # fmt: skip
    assert gpu_timer.parse_conditions("No devices were found") == {}


# ---- the timer, with graphs that are played on the CPU --------------------------------------


class CpuGraph:
    """Stands in for a CUDA graph: runs the calls one after the other."""

    made = 0

    def __init__(self, calls, pool):
        CpuGraph.made += 1
        self._calls = calls

    def seconds(self):
        start = time.perf_counter()
        for call in self._calls:
            call()
        return (time.perf_counter() - start) / len(self._calls)


@pytest.fixture
def timer(monkeypatch):
    """A timer on the CPU, its beats, and kernels that fail at their first launch."""

    def fail(x, layout, config=None):
        raise NoKernelError("needs 300000 bytes of shared memory, got 232448\nand more")

    def crash(x, layout, config=None):
        raise RuntimeError("CUDA error")

    found = {k.name: k for k in KERNELS} | {
        name: Kernel(name, lambda p: (), lambda w, d: w, launch, lambda p: 1.0)
        for name, launch in (("fails", fail), ("crashes", crash))
    }
    monkeypatch.setattr(timed_case, "kernels", lambda: found)
    monkeypatch.setattr(gpu_timer, "_open_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(gpu_timer, "_sentinel_calls", lambda device: [lambda: None])
    monkeypatch.setattr(gpu_timer, "_Graph", CpuGraph)
    monkeypatch.setattr(gpu_timer, "this_device", lambda backend: H200)
    monkeypatch.setattr(gpu_timer, "drifted", lambda before, after: False)
    monkeypatch.setattr(gpu_timer, "conditions", lambda: {"driver": "580.65"})
    for name in ("graph_pool_handle", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(timed_case, "copies_of", lambda weight, l2: 3)
    beats = []
    made = gpu_timer.GpuTimer(lambda candidate, allow_s=0.0: beats.append((candidate, allow_s)))
    CpuGraph.made = 0
    return made, beats


def test_samples_and_beats(timer):
    made, beats = timer
    assert made.verify(problem(), DENSE) < 8e-3
    fails = Candidate("fails")
    found = made.sample(problem(), [DENSE, fails], 25)
    assert len(found[0]) == 25 and all(0 < s < 1 for s in found[0])
    assert str(found[1]) == "fails: FAULT needs 300000 bytes of shared memory, got 232448"
    assert beats.count((DENSE, 0.0)) == 25  # one before each sample
    assert beats.count((None, 0.0)) == 3  # the sentinel around two blocks
    assert (DENSE, 120.0) in beats and (fails, 120.0) in beats and (None, 120.0) in beats
    assert made.sample(problem(), [], 3) == []


def test_graphs_and_weights_are_kept_as_long_as_they_fit(timer):
    made, _ = timer
    for _ in range(2):
        made.sample(problem(), [DENSE], 1)
    assert CpuGraph.made == 1
    weights = made._weights
    made.sample(problem(m=16), [DENSE], 1)
    assert CpuGraph.made == 2 and made._weights is weights  # another size of the family
    made.sample(problem(n=512), [DENSE], 1)
    assert CpuGraph.made == 3 and made._weights is not weights
    made.close()
    assert made._weights is None and made._graphs == {}


def test_what_is_and_is_not_a_fault(timer):
    made, _ = timer
    with pytest.raises(Fault, match="fails: FAULT needs 300000"):
        made.verify(problem(), Candidate("fails"))
    with pytest.raises(RuntimeError, match="CUDA error"):  # ends the worker
        made.sample(problem(), [Candidate("crashes")], 1)
    rows = RowsProblem("hadamard", None, 16, 64, torch.bfloat16, "cpu", None)
    with pytest.raises(TuningError, match="op 'hadamard' cannot be timed"):
        made.sample(rows, [DENSE], 1)


def test_facts(timer):
    facts = timer[0].facts()
    assert facts.device == H200 and facts.driver == "580.65"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_by_name():
    with pytest.raises(TuningError, match=r"needs a CUDA GPU and torch sees none.*--dry-run"):
        gpu_timer.GpuTimer(lambda candidate, allow_s=0.0: None)
    isolated = IsolatedTimer()
    with pytest.raises(TuningError, match="needs a CUDA GPU and torch sees none"):
        isolated.verify(problem(), DENSE)
    isolated.close()


# ---- a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu():
    of = problem(n=4096, device="cuda", machine=this_device("cuda"))
    able = [k for k in kernels().values() if k.op == "linear" and not k.refuse(of)]
    candidates = [
        Candidate(k.name, k.configs(of)[0] if k.configs else ())
        for k in able if k.name != "reference"
    ]  # fmt: skip
    timer = IsolatedTimer()
    facts = timer.facts()
    assert facts.device.backend == "cuda" and facts.device.present
    for candidate in candidates:
        assert timer.verify(of, candidate) <= 8e-3
    for found in timer.sample(of, candidates, 10):
        assert not isinstance(found, Fault), found
        assert len(found) == 10 and all(1e-7 < seconds < 1e-2 for seconds in found)
    timer.close()
