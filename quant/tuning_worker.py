"""Times candidates in a process of its own, so that one that hangs or crashes costs a restart.

    this process                                   worker: the only one that touches the device
    IsolatedTimer ── Open, Verify, Sample ──▶      a Backend, such as quant/gpu_timer.py
                  ◀── Beat(candidate, seconds) ──  before each step, so that the guilty one is known
                  ◀── answer ────────────────────

A worker that is silent for max(2 s, 50 times the prediction), or for longer if it said so, is killed:
TIMEOUT. An exception ends it: FAULT. Anything else that ends it: DEATH. In each case a new worker is
started, and before it does anything else it verifies the last candidate that had verified: if that
fails three times in a row the device is broken, which ends the tuning by a named error.

The samples of the others in a block that was cut short are taken again. A kernel that cost three
workers in a row, with no good result of it between, is benched: its candidates are answered by a Fault
without being run.

Deliberately not here: timing itself, and the quarantine, which is part of the table.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from .child import Beat, Child, Done, Gone, Message, Refused
from .errors import TuningError
from .kernel import AnyProblem
from .timing import Backend, Candidate, Facts, Fault

GPU_BACKEND = "fewbit.quant.gpu_timer:GpuTimer"
_HANDLER = "fewbit.quant.tuning_worker:timer"
_ENVIRONMENT = {"TRITON_INTERPRET": "0"}
_START_SECONDS = 120.0  # to import torch and the kernels, and to open the device
_TIMES_PREDICTED = 50
_LOST_WORKERS = 3  # by one kernel in a row, before it is benched
_TRIES = 3  # of what verified before, on a new worker


@dataclass(frozen=True)
class Open:
    """Make the backend "module:callable"."""

    backend: str


@dataclass(frozen=True)
class AskFacts:
    """`Backend.facts`."""


@dataclass(frozen=True)
class Verify:
    """`Timer.verify`."""

    problem: AnyProblem
    candidate: Candidate


@dataclass(frozen=True)
class Sample:
    """`Timer.sample`."""

    problem: AnyProblem
    candidates: tuple[Candidate, ...]
    n: int


@dataclass(frozen=True)
class _Lost:
    """A worker was lost. candidate: at whose turn, None if that is not known."""

    candidate: Candidate | None
    why: str
    text: str


# ---- worker ---------------------------------------------------------------------------------


def timer(beat: Callable[[Any], None]) -> Callable[[Any], Any]:
    """What runs in the worker: a backend, made by the first task."""
    opened: list[Backend] = []

    def say(candidate: Candidate | None, allow_s: float = 0.0) -> None:
        beat((candidate, allow_s))

    def handle(task: object) -> Any:
        if isinstance(task, Open):
            module, _, name = task.backend.partition(":")
            opened.append(getattr(import_module(module), name)(say))
            return None
        (backend,) = opened
        if isinstance(task, Verify):
            return backend.verify(task.problem, task.candidate)
        if isinstance(task, Sample):
            return backend.sample(task.problem, task.candidates, task.n)
        return backend.facts()

    return handle


# ---- this process ---------------------------------------------------------------------------


class IsolatedTimer:
    """A `Timer` whose work is done by a backend in a worker process; see the module's text.

    backend: "module:callable", called with a `Heartbeat`. predicted(problem, candidate): seconds of
    one sample (all its calls), None if nothing is known. least_s: the least time that a sample may
    take before the worker counts as hung.
    """

    def __init__(
        self,
        backend: str = GPU_BACKEND,
        predicted: Callable[[AnyProblem, Candidate], float] | None = None,
        least_s: float = 2.0,
    ) -> None:
        self._backend = backend
        self._predicted = predicted
        self._least_s = least_s
        self._child: Child | None = None
        self._last_good: Verify | None = None
        self._suspect = False  # a worker was lost, and nothing has verified since
        self._lost: Counter[str] = Counter()

    @property
    def benched(self) -> frozenset[str]:
        """Kernels that cost three workers in a row."""
        return frozenset(name for name, lost in self._lost.items() if lost >= _LOST_WORKERS)

    def facts(self) -> Facts:
        """What is timed on. TuningError if the worker is lost over it."""
        answer = self._ask(AskFacts(), None, ())
        if isinstance(answer, _Lost):
            raise TuningError(f"the device says nothing of itself: {answer.text}")
        facts: Facts = answer
        return facts

    def verify(self, problem: AnyProblem, candidate: Candidate) -> float:
        """As `Timer.verify`. TuningError if there is no device, or no longer one that works."""
        self._refuse_benched(candidate)
        task = Verify(problem, candidate)
        answer = self._ask(task, problem, (candidate,))
        if isinstance(answer, _Lost):
            self._lost[candidate.kernel] += 1
            raise Fault(candidate, answer.why, answer.text)
        self._last_good = task
        self._lost[candidate.kernel] = 0
        error: float = answer
        return error

    def sample(
        self, problem: AnyProblem, candidates: Sequence[Candidate], n: int
    ) -> list[list[float] | Fault]:
        """As `Timer.sample`. TuningError as of `verify`."""
        found: dict[Candidate, list[float] | Fault] = {}
        left = list(dict.fromkeys(candidates))
        while left:
            for candidate in [c for c in left if c.kernel in self.benched]:
                found[candidate] = _benched(candidate)
                left.remove(candidate)
            if not left:
                break
            try:
                answer = self._ask(Sample(problem, tuple(left), n), problem, left)
            except Fault as fault:  # of one, in place of all
                found[fault.candidate] = fault
                left.remove(fault.candidate)
                continue
            if not isinstance(answer, _Lost):
                found.update(zip(left, answer, strict=True))
                self._lost -= Counter(dict.fromkeys((c.kernel for c in left), _LOST_WORKERS))
                break
            if answer.candidate is None:  # one at a time tells who it is
                found.update((c, self.sample(problem, [c], n)[0]) for c in left)
                break
            self._lost[answer.candidate.kernel] += 1
            found[answer.candidate] = Fault(answer.candidate, answer.why, answer.text)
            left.remove(answer.candidate)
        return [found[candidate] for candidate in candidates]

    def close(self) -> None:
        """End the worker."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def _refuse_benched(self, candidate: Candidate) -> None:
        if candidate.kernel in self.benched:
            raise _benched(candidate)

    def _ask(
        self, task: object, problem: AnyProblem | None, candidates: Sequence[Candidate]
    ) -> Any:
        """The answer to a task, or `_Lost`; a named error of the backend is raised."""
        child = self._worker()
        return self._answer(child, task, problem, candidates)

    def _answer(
        self,
        child: Child,
        task: object,
        problem: AnyProblem | None,
        candidates: Sequence[Candidate],
    ) -> Any:
        alone = candidates[0] if len(candidates) == 1 else None
        turn, allowed = alone, self._allowed(problem, alone)
        if not candidates:
            allowed = max(allowed, _START_SECONDS)
        child.send(task)
        while True:
            message = child.receive(allowed)
            if isinstance(message, Beat):
                named, allow_s = message.note
                turn = named if named in candidates else alone
                allowed = max(allow_s, self._allowed(problem, turn))
            elif isinstance(message, Done):
                return message.value
            elif isinstance(message, Refused):
                raise message.error
            else:
                return self._give_up(child, turn, message, allowed)

    def _give_up(
        self, child: Child, turn: Candidate | None, last: Message | None, allowed: float
    ) -> _Lost:
        child.kill()
        self._child, self._suspect = None, True
        if isinstance(last, Gone):
            return _Lost(turn, "FAULT" if last.fault else "DEATH", last.text)
        return _Lost(turn, "TIMEOUT", f"nothing heard for {allowed:.1f} s")

    def _allowed(self, problem: AnyProblem | None, candidate: Candidate | None) -> float:
        """Seconds that a sample of the candidate may take."""
        if problem is None or candidate is None or self._predicted is None:
            return self._least_s
        return max(self._least_s, _TIMES_PREDICTED * self._predicted(problem, candidate))

    def _worker(self) -> Child:
        """A worker with an open device; after a loss, one on which the last good result holds."""
        if self._child is None:
            self._child = self._start()
        if self._suspect and self._last_good is not None:
            self._verify_again(self._last_good)
        self._suspect = False
        if self._child is None:
            raise TuningError("the worker was lost while it was checked")
        return self._child

    def _start(self) -> Child:
        child = Child(_HANDLER, _ENVIRONMENT)
        message: Message | None = child.receive(_START_SECONDS)
        if isinstance(message, Done):
            child.send(Open(self._backend))
            message = child.receive(_START_SECONDS)
            while isinstance(message, Beat):
                message = child.receive(_START_SECONDS)
        if isinstance(message, Done):
            return child
        child.kill()
        if isinstance(message, Refused):
            raise message.error
        text = message.text if isinstance(message, Gone) else f"silent for {_START_SECONDS:g} s"
        raise TuningError(f"the process that times kernels does not start: {text}")

    def _verify_again(self, good: Verify) -> None:
        """TuningError if what had verified fails three times."""
        for _ in range(_TRIES):
            child = self._child = self._child or self._start()
            try:
                answer = self._answer(child, good, good.problem, (good.candidate,))
            except Fault as fault:
                answer = _Lost(good.candidate, fault.why, fault.text)
            if not isinstance(answer, _Lost):
                return
        raise TuningError(
            f"{good.candidate} verified before and no longer does ({answer.why} {answer.text}): the "
            f"device is in a bad state; reset it or restart the machine, then run again: finished "
            f"rows are kept"
        )


def _benched(candidate: Candidate) -> Fault:
    text = f"not run: {candidate.kernel} cost {_LOST_WORKERS} workers in a row and is benched"
    return Fault(candidate, "DEATH", text)
