"""How GPU benches take time: CUDA graphs over cold weights, sides in turns.

    rotation   copies of a weight, together at least three times the L2, one copy a call, so that each
               call finds its weight in memory; nothing is flushed by writing, whose dirty lines a
               kernel would be billed for
    replay     one CUDA graph over whole rotations, between two events: seconds of one call
    measure    every side is replayed once in each round, in an order permuted anew, so that a
               drifting clock meets all alike; median, 10th and 90th percentile over the rounds

Deliberately not here: what is timed, verification, and any change of the GPU's settings.
Not yet run on a GPU.
"""

import gc
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import torch

from fewbit.kernels_triton import _triton
from fewbit.quant.errors import FewbitError

ROUNDS = 20
_OLDEST = (8, 0)
_REPLAY_SECONDS = 5e-3  # that a replay should take; the cost of its launch vanishes in it
_MOST_CALLS = 50  # of one replay, unless there are more copies

_ERRORS: tuple[type[Exception], ...] = (
    FewbitError, RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError,
    AssertionError, NotImplementedError,
)  # fmt: skip

Call = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Seconds of one call over all samples: median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    def as_dict(self) -> dict[str, float]:
        """In microseconds: median_us, p10_us, p90_us."""
        return {f"{name}_us": 1e6 * seconds for name, seconds in asdict(self).items()}


def spread(samples: Sequence[float]) -> Spread:
    """Of at least one sample."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return Spread(statistics.median(samples), tenths[0], tenths[-1])


def missing(triton: bool = True) -> tuple[str, ...]:
    """What GPU benches need and this machine lacks, by name; empty where they can run."""
    found = []
    if torch.version.cuda is None:
        found.append(f"an NVIDIA GPU and a torch build with CUDA: {torch.__version__} has none")
    elif not torch.cuda.is_available():
        found.append("an NVIDIA GPU that torch can use: it finds none")
    elif torch.cuda.get_device_capability() < _OLDEST:
        major, minor = torch.cuda.get_device_capability()
        found.append(f"compute capability 8.0 or newer: this GPU has {major}.{minor}")
    if triton and not _triton.AVAILABLE:
        found.append("Triton: pip install triton")
    elif triton and _triton.interpreted():
        found.append("compiled kernels: unset TRITON_INTERPRET")
    return tuple(found)


def needs_text(bench: str, lacking: Sequence[str], remedy: str = "") -> str:
    """What a bench says on a machine where it cannot run."""
    lines = [f"{bench} cannot run here. It needs", *(f"  {item}" for item in lacking)]
    return "\n".join([*lines, remedy] if remedy else lines)


def n_calls(seconds: float, copies: int) -> int:
    """Calls of one replay, whole rotations, for calls that take about `seconds`."""
    wanted = min(_MOST_CALLS, max(1, round(_REPLAY_SECONDS / max(seconds, 1e-7))))
    return copies * ceil(wanted / copies)


class Replay:
    """Calls captured in one CUDA graph; calling it replays them and answers the seconds of one.

    calls: one for each copy of the weight. RuntimeError where a call cannot be captured.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self._stream = torch.cuda.Stream()
        self._events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for call in calls:  # compiles, and makes handles and workspaces
                call()
            self.n_calls = n_calls(self._eager_seconds(calls), len(calls))
            self._graph = self._capture([calls[i % len(calls)] for i in range(self.n_calls)])
        torch.cuda.current_stream().wait_stream(self._stream)

    def _eager_seconds(self, calls: Sequence[Call]) -> float:
        start, stop = self._events
        torch.cuda.synchronize()
        start.record()
        for call in calls:
            call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3 / len(calls)

    def _capture(self, calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
        # Not torch.cuda.graph: that collects garbage and empties the allocator's cache each time.
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        gc.disable()  # what it destroys may call CUDA, which a capture forbids
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
            gc.enable()
        return graph

    def __call__(self) -> float:
        """Seconds of one call, the mean of this replay."""
        start, stop = self._events
        start.record()
        self._graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3 / self.n_calls


def measure(
    replays: Mapping[str, Callable[[], float]], rounds: int = ROUNDS, seed: int = 0
) -> dict[str, Spread]:
    """The spread of each side; all sides take turns. One round before is not counted."""
    order, shuffle = list(replays), random.Random(seed).shuffle
    samples: dict[str, list[float]] = {name: [] for name in replays}
    for turn in range(rounds + 1):
        shuffle(order)
        for name in order:
            seconds = replays[name]()
            if turn:
                samples[name].append(seconds)
    return {name: spread(found) for name, found in samples.items()}


def kernel_errors() -> tuple[type[Exception], ...]:
    """What a kernel raises where it fails: torch's errors, our own, and Triton's."""
    if not _triton.AVAILABLE:
        return _ERRORS
    from triton.errors import TritonError

    return (*_ERRORS, TritonError)


def told(error: BaseException) -> str:
    """`RuntimeError: the first line of its text`; of a chain, the error that came first."""
    while error.__context__ is not None:
        error = error.__context__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def spoils_cuda(text: str) -> bool:
    """Does an error of this text leave the process without a usable CUDA context?"""
    return "CUDA error" in text or "[CUDA]" in text
