"""Times candidates on the GPU of this process. Not yet run on a GPU.

    graph     20 calls or more, one after the other over the rotation of weights, in one CUDA graph
    sample    one replay between two events, divided by its calls
    turn      one sample of each candidate, in an order drawn anew
    block     20 samples between two runs of a sentinel; more than 3 % between those discards the block

Weights are cold: a rotation passes three times the L2 (`timed_case.py`), so that nothing has to be
flushed by writing, whose dirty lines the kernel would pay for. The first launch, which compiles, and
the first replay are not counted. Every sample waits for its end, so that a fault has one owner.

The sentinel is a bf16 product and a copy. A block is repeated up to five times; if the clocks are never
steady, timing means nothing, which is a named error. Settings of the device are read, never changed.

Runs inside `tuning_worker.py`; by itself it survives no crash. Errors that leave the device in order,
such as too much shared memory asked for, are Faults of their candidates.
"""

import random
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from .errors import NoKernelError, TuningError
from .kernel import AnyProblem, Problem
from .machine import this_device
from .timed_case import Case, Weights, timed_problem
from .timing import Candidate, Facts, Fault, Heartbeat

CALLS = 20  # of a graph, at least
BLOCK = 20  # samples between two runs of the sentinel
DRIFT = 0.03
REPEATS = 5  # of a block, before the clocks count as unsteady
_COMPILE_SECONDS = 120.0
_DATA_SECONDS = 120.0
_SENTINEL_ORDER = 2048  # of a square product: about 20 microseconds on an H100
_SENTINEL_BYTES = 64 << 20
_QUERY = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "celsius": "temperature.gpu",
    "watts": "power.draw",
    "watts_cap": "power.limit",
}


# ---- what needs no GPU ----------------------------------------------------------------------


def calls_of(n_copies: int) -> int:
    """Calls of a graph: whole rotations, at least `CALLS`."""
    return n_copies * -(-CALLS // n_copies)


def turns(n_candidates: int, n: int, seed: int) -> list[int]:
    """Positions of candidates in the order of sampling: n turns, each a permutation of its own."""
    draw = random.Random(seed)
    order: list[int] = []
    for _ in range(n):
        order += draw.sample(range(n_candidates), n_candidates)
    return order


def drifted(before: float, after: float) -> bool:
    """Do two runs of the sentinel differ by more than `DRIFT`?"""
    return abs(after - before) > DRIFT * min(before, after)


def steady(
    order: Sequence[int], measure: Callable[[int], float], sentinel: Callable[[], float]
) -> list[float]:
    """measure(position) for each of `order`; blocks over which the sentinel drifts are measured
    again. TuningError if one drifts `REPEATS` times."""
    samples: list[float] = []
    before = sentinel()
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        for _ in range(REPEATS):
            taken = [measure(position) for position in block]
            after = sentinel()
            is_steady = not drifted(before, after)
            before = after
            if is_steady:
                samples += taken
                break
        else:
            raise TuningError(
                f"the device is not steady: a sentinel's time changed by more than {DRIFT:.0%} in "
                f"{REPEATS} blocks of {BLOCK} samples; stop other work on it, let it cool, or raise "
                f"its power cap, then run again: finished rows are kept"
            )
    return samples


def parse_conditions(line: str) -> dict[str, str]:
    """{name: value} of one line of nvidia-smi's answer to `_QUERY`; empty if it is not one."""
    values = [value.strip() for value in line.split(",")]
    if len(values) != len(_QUERY):
        return {}
    return dict(zip(_QUERY, values, strict=True))


# ---- the GPU --------------------------------------------------------------------------------


def conditions() -> Mapping[str, str]:
    """Driver, clocks in MHz, temperature, power and its cap of the current GPU, as nvidia-smi tells
    them; empty where it cannot be asked."""
    program = shutil.which("nvidia-smi")
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    if program is None or uuid is None:
        return {}
    query = f"--query-gpu={','.join(_QUERY.values())}"
    command = [program, query, "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_conditions(done.stdout.strip())


def _harmless() -> tuple[type[BaseException], ...]:
    """Errors of a first launch that leave the device in order."""
    ours = (NoKernelError, torch.OutOfMemoryError)
    if find_spec("triton") is None:
        return ours
    from triton.errors import TritonError

    return (*ours, TritonError)


class GpuTimer:
    """A `Backend` on the current GPU; TuningError without one."""

    def __init__(self, beat: Heartbeat) -> None:
        self._device = _open_device()
        self._beat = beat
        self._machine = this_device("cuda")
        self._weights: Weights | None = None
        self._case: Case | None = None
        self._graphs: dict[Candidate, _Graph] = {}
        self._seed = 0
        self._pool = torch.cuda.graph_pool_handle()
        self._sentinel = _Graph(_sentinel_calls(self._device), self._pool)

    def facts(self) -> Facts:
        """As `Backend.facts`."""
        self._beat(None, 15.0)
        found = conditions()
        return Facts(self._machine, found.get("driver", ""), found)

    def verify(self, problem: AnyProblem, candidate: Candidate) -> float:
        """As `Timer.verify`."""
        case = self._open(timed_problem(problem))
        self._beat(candidate, _COMPILE_SECONDS)
        try:
            error = case.verify(candidate)
        except _harmless() as reason:
            raise Fault(candidate, "FAULT", _first_line(reason)) from reason
        torch.cuda.synchronize()
        return error

    def sample(
        self, problem: AnyProblem, candidates: Sequence[Candidate], n: int
    ) -> list[list[float] | Fault]:
        """As `Timer.sample`."""
        case = self._open(timed_problem(problem))
        found: list[list[float] | Fault] = []
        live: list[int] = []
        for position, candidate in enumerate(candidates):
            fault = self._capture(case, candidate)
            found.append([] if fault is None else fault)
            if fault is None:
                live.append(position)

        def measure(place: int) -> float:
            candidate = candidates[live[place]]
            self._beat(candidate)
            return self._graphs[candidate].seconds()

        self._seed += 1
        order = turns(len(live), n, self._seed)
        for place, seconds in zip(order, steady(order, measure, self._watch), strict=True):
            samples = found[live[place]]
            if not isinstance(samples, Fault):
                samples.append(seconds)
        return found

    def close(self) -> None:
        """As `Timer.close`."""
        self._graphs.clear()
        self._case = self._weights = None
        torch.cuda.empty_cache()

    def _watch(self) -> float:
        self._beat(None)
        return self._sentinel.seconds()

    def _open(self, problem: Problem) -> Case:
        """Data of the problem; that of another one is dropped first."""
        if self._case is not None and self._case.problem == problem:
            return self._case
        self._beat(None, _DATA_SECONDS)
        self._graphs.clear()
        self._case = None
        if self._weights is None or self._weights.family != problem.family:
            self._weights = None
            torch.cuda.empty_cache()
            self._weights = Weights(problem, self._device, self._machine.l2_bytes)
        self._case = Case(problem, self._weights, self._device)
        torch.cuda.synchronize()
        return self._case

    def _capture(self, case: Case, candidate: Candidate) -> Fault | None:
        """The candidate's graph, launched once before; why not, if it cannot be launched."""
        if candidate in self._graphs:
            return None
        self._beat(candidate, _COMPILE_SECONDS)
        try:
            calls = case.calls(candidate)
            calls[0]()
        except _harmless() as reason:
            return Fault(candidate, "FAULT", _first_line(reason))
        torch.cuda.synchronize()
        n_calls = calls_of(len(calls))
        self._graphs[candidate] = _Graph(
            [calls[i % len(calls)] for i in range(n_calls)], self._pool
        )
        return None


def _open_device() -> torch.device:
    if not torch.cuda.is_available():
        raise TuningError(
            "timing needs a CUDA GPU and torch sees none; `fewbit autotune --dry-run` does "
            "everything else without one"
        )
    return torch.device("cuda", torch.cuda.current_device())


class _Graph:
    """Calls in one CUDA graph; results are dropped, their memory is shared with other graphs."""

    def __init__(self, calls: Sequence[Callable[[], object]], pool: Any) -> None:
        self._n_calls = len(calls)
        self._graph = torch.cuda.CUDAGraph()
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        with torch.no_grad(), torch.cuda.graph(self._graph, pool=pool):
            for call in calls:
                call()
        self.seconds()  # the first replay also uploads the graph

    def seconds(self) -> float:
        """Of one call, by one replay."""
        self._start.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3 / self._n_calls


def _sentinel_calls(device: torch.device) -> list[Callable[[], object]]:
    """A product and a copy: one follows the clock of the multiprocessors, one that of the memory."""
    square = torch.randn(_SENTINEL_ORDER, _SENTINEL_ORDER, device=device, dtype=torch.bfloat16)
    source = torch.randn(_SENTINEL_BYTES // 4, device=device)
    target = torch.empty_like(source)

    def both() -> object:
        return torch.mm(square, square), target.copy_(source)

    both()  # cuBLAS takes its workspace here, not in a graph
    torch.cuda.synchronize()
    return [both] * 4


def _first_line(reason: BaseException) -> str:
    return (str(reason).strip().splitlines() or [type(reason).__name__])[0]
