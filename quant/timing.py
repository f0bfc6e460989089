"""What a tuner times, and what it asks of whatever does the timing.

    Candidate   one kernel with one config, as in a ladder
    Timer       verifies candidates against the reference, and takes samples of their seconds
    Fault       why a candidate gave no samples
    Heartbeat   how a backend, which runs candidates itself, tells a watcher what it is about to do

A `Timer` may be a simulation, the GPU of this process (`quant/gpu_timer.py`), or a worker process
that survives crashes (`quant/tuning_worker.py`). A search sees no difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from .errors import FewbitError
from .kernel import AnyProblem, Device
from .ladder import Candidate as Candidate

# TIMEOUT: no sign of life. FAULT: an error of the launch. DEATH: the process ended. WRONG: a result
# beyond tolerance.
FAULTS = ("TIMEOUT", "FAULT", "DEATH", "WRONG")


class Fault(FewbitError):
    """Why a candidate gave no samples. why: one of `FAULTS`. text: what was found."""

    def __init__(self, candidate: Candidate, why: str, text: str) -> None:
        if why not in FAULTS:
            raise ValueError(f"why must be one of {', '.join(FAULTS)}, got {why!r}")
        super().__init__(candidate, why, text)
        self.candidate = candidate
        self.why = why
        self.text = text

    def __str__(self) -> str:
        """`gemm_w4a16 {block_m 16}: TIMEOUT nothing heard for 2.0 s`."""
        return f"{self.candidate}: {self.why} {self.text}"


class Timer(Protocol):
    """Times candidates of one device."""

    def verify(self, problem: AnyProblem, candidate: Candidate) -> float:
        """Relative error (of norms) of the candidate's result against the reference. Fault if it
        cannot run, or if the error is beyond what its dtype allows (WRONG)."""
        ...

    def sample(
        self, problem: AnyProblem, candidates: Sequence[Candidate], n: int
    ) -> list[list[float] | Fault]:
        """`n` samples of each candidate, in seconds a call and in the order of `candidates`; a Fault
        in place of those that gave none. Candidates take turns, in an order permuted anew for each
        turn, so that a drifting clock meets all alike."""
        ...

    def close(self) -> None:
        """Release the device; nothing may be asked afterwards."""
        ...


@dataclass(frozen=True)
class Facts:
    """What is timed on. device: with `present`. driver: its version. conditions: clocks, temperature,
    power and its cap at the moment, as the driver's tools tell them; empty if they do not."""

    device: Device
    driver: str
    conditions: Mapping[str, str]


class Backend(Timer, Protocol):
    """A timer that runs candidates in its own process; made by a callable that takes a `Heartbeat`."""

    def facts(self) -> Facts:
        """What is timed on."""
        ...


class Heartbeat(Protocol):
    """Called by a backend before each step: the candidate about to run, or None for work on no
    candidate's account. allow_s: seconds that the step may take, if they are more than a sample's:
    compiling, filling memory. A backend must have waited for one step before it begins the next."""

    def __call__(self, candidate: Candidate | None, allow_s: float = 0.0) -> None: ...
