"""Runs of one block over the calibration batches, stage by stage, and their statistics.

A stage needs the inputs that the already rounded weights of earlier stages produce. There are two
ways to get them, with bit-equal results:

    Reruns      run the block again for each stage, up to where the stage ends. Needs no memory.
    PausedRuns  run it once. Each batch stops in front of the first product of a stage, waits until
                the stage's weights are rounded and put in place, and goes on from there.

A paused batch is a thread that sleeps inside the library's forward; one thread runs at a time, in a
fixed order, so results do not depend on scheduling. Paused batches keep their activations, and blocks
with experts use stages in turns, so `Reruns` serves those and whatever exceeds the memory bound.
Measured on the bundled model: half the CPU time of `Reruns` for a whole calibrated run.

With `originals`, the original model's block runs on its own hidden states beside the quantized one,
so that both inputs of a stage are there at the same time.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

import torch
from torch import nn

from .collect import MomentSums, OriginalInputs, Stage, StageInputs
from .model import BlockInput, ModelGraph
from .protocol import Stats
from .uses import Use, WatchWeights


@dataclass(frozen=True)
class Stream:
    """One model's way through a block: its batches and the module that they go through."""

    graph: ModelGraph
    index: int
    module: nn.Module
    batches: Sequence[BlockInput]

    def parameters(self) -> dict[str, torch.Tensor]:
        """Graph name -> parameter of the module."""
        prefix = self.graph.block_names[self.index]
        return {f"{prefix}.{name}": item for name, item in self.module.named_parameters()}

    def run(self, batch: int) -> torch.Tensor:
        """Hidden state after the block."""
        return self.graph.run(self.index, self.batches[batch], self.module)


class Reruns:
    """Runs the block anew for each stage. quantized, original: the two streams, or one."""

    def __init__(self, quantized: Stream, original: Stream | None, stages: Sequence[Stage]) -> None:
        self._quantized, self._original, self._stages = quantized, original, stages

    def statistics(self, number: int) -> Stats:
        """Moments of stage `number`, with the weights that are in the graph now."""
        stage = self._stages[number]
        wanted = StageInputs(stage, stage.later(self._stages[number + 1 :]))
        sums = MomentSums()
        for batch in range(len(self._quantized.batches)):
            original = OriginalInputs()
            if self._original is not None:
                run = partial(self._original.run, batch)
                wanted.watch(self._original.parameters(), run, original.put)

            def take(key: str, rows: torch.Tensor, original: OriginalInputs = original) -> None:
                sums.add(key, rows, original.next(key, rows))

            run = partial(self._quantized.run, batch)
            wanted.watch(self._quantized.parameters(), run, take)
        return sums.moments()

    def finish(self) -> None:
        """Replace every batch's hidden state by that after the block."""
        for stream in (self._original, self._quantized):
            for batch, item in enumerate(stream.batches if stream else ()):
                item.hidden.copy_(stream.run(batch) if stream else item.hidden)

    def close(self) -> None:
        """Nothing is held."""


class _Abandoned(Exception):
    """Raised inside a paused run that nobody will continue."""


class PausedRun:
    """One batch on its way through a block, in a thread of its own.

    stage_of: parameter -> number of its stage; each is used once, stages in rising order.
    """

    def __init__(self, stream: Stream, batch: int, stage_of: dict[str, int]) -> None:
        self._stream, self._batch, self._stage_of = stream, batch, stage_of
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._go: SimpleQueue[bool] = SimpleQueue()
        self._stopped: SimpleQueue[Future[torch.Tensor] | None] = SimpleQueue()
        self._future: Future[torch.Tensor] | None = None
        self._reached = -1
        self._x: torch.Tensor | None = None

    def to_stage(self, number: int) -> torch.Tensor:
        """Go on to the first product of stage `number`; its input [tokens, K]."""
        self._go_on()
        if self._reached != number or self._x is None:
            raise RuntimeError(f"expected to stop at stage {number}, stopped at {self._reached}")
        return self._x.reshape(-1, self._x.shape[-1])

    def to_end(self) -> torch.Tensor:
        """Go on to the end; the hidden state after the block."""
        self._go_on()
        if self._future is None or not self._future.done():
            raise RuntimeError(f"the block stopped again, at stage {self._reached}")
        return self._future.result()

    def abandon(self) -> None:
        """Let the thread end at its next stop; does not wait."""
        if self._future is not None and not self._future.done():
            self._go.put(False)

    def close(self) -> None:
        """End the thread, wherever it is, and wait for that."""
        self.abandon()
        self._thread.shutdown()

    def _go_on(self) -> None:
        self._x = None
        if self._future is None:
            self._future = self._thread.submit(self._body)
            self._future.add_done_callback(self._stopped.put)
        else:
            self._go.put(True)
        ended = self._stopped.get()
        if ended is not None:
            ended.result()  # raises what the run raised

    def _body(self) -> torch.Tensor:
        with WatchWeights(self._stream.parameters(), self._note):
            return self._stream.run(self._batch)

    def _note(self, use: Use, x: torch.Tensor) -> None:
        number = self._stage_of.get(use.parameter, -1)
        if number <= self._reached:
            return
        self._reached, self._x = number, x
        self._stopped.put(None)
        if not self._go.get():
            raise _Abandoned


class PausedRuns:
    """Runs the block once, all batches of both streams stopping at each stage."""

    def __init__(self, quantized: Stream, original: Stream | None, stages: Sequence[Stage]) -> None:
        self._keys = [stage.operands[0].input_key for stage in stages]
        numbers = {o.parameter: i for i, stage in enumerate(stages) for o in stage.operands}
        self._streams = [(quantized, _runs(quantized, numbers))]
        if original is not None:
            self._streams.append((original, _runs(original, numbers)))

    def statistics(self, number: int) -> Stats:
        """Moments of stage `number`; stages must be asked for in order."""
        sums = MomentSums()
        for pair in zip(*(runs for _, runs in self._streams), strict=True):
            rows = [run.to_stage(number) for run in pair]
            sums.add(self._keys[number], *rows)
        return sums.moments()

    def finish(self) -> None:
        """Replace every batch's hidden state by that after the block."""
        for stream, runs in self._streams:
            for item, run in zip(stream.batches, runs, strict=True):
                item.hidden.copy_(run.to_end())

    def close(self) -> None:
        """End all threads. All are told before one is waited for: a second Ctrl-C, which ends the
        waiting, must not leave a thread asleep that keeps the process from exiting."""
        found = [run for _, runs in self._streams for run in runs]
        for run in found:
            run.abandon()
        for run in found:
            run.close()


def _runs(stream: Stream, numbers: dict[str, int]) -> list[PausedRun]:
    return [PausedRun(stream, batch, numbers) for batch in range(len(stream.batches))]


def paused_bytes(streams: Sequence[Stream], stages: Sequence[Stage]) -> int:
    """What paused batches hold at most: the widest input, and about four hidden states beside it."""
    widest = max((operand.k for stage in stages for operand in stage.operands), default=0)
    total = 0
    for stream in streams:
        for item in stream.batches:
            tokens = item.hidden.numel() // item.hidden.shape[-1]
            width = widest + 4 * item.hidden.shape[-1]
            total += tokens * width * item.hidden.element_size()
    return total


def start_runs(
    quantized: Stream, original: Stream | None, stages: Sequence[Stage], max_bytes: int
) -> Reruns | PausedRuns:
    """The cheaper way that fits: paused if every stage is one plain input and memory allows it."""
    plain = all(
        stage.experts is None and len({o.input_key for o in stage.operands}) == 1
        for stage in stages
    )
    once = all(operand.uses == 1 for stage in stages for operand in stage.operands)
    streams = [quantized] if original is None else [quantized, original]
    kind: Callable[[Stream, Stream | None, Sequence[Stage]], Reruns | PausedRuns] = Reruns
    if plain and once and paused_bytes(streams, stages) <= max_bytes:
        kind = PausedRuns
    return kind(quantized, original, stages)
