"""Buffers that blocks of weights are decoded into, two of them ahead of use.

    blocks of a list   0   1   2   3   0 ...          the next token begins again
    buffer A           0       2       0
    buffer B               1       3       1
                       |---|            while block 0 runs from A, block 1 is decoded into B

`enter` gives the buffer that holds a block; `wait` waits for its weights and starts decoding the block
that follows; `leave` says that the block has run. A block that was not foreseen is decoded when it is
entered, one that is still in a buffer is not decoded again. Any number of runs of one block share a
buffer; where both are in use by others, a further one exists until its last run ends, so that threads
never wait for each other and never see each other's weights.

Decoding runs in worker threads, which native decoders let run beside the interpreter. On a GPU workers
launch on a stream of their own: events keep them from overwriting what kernels still read, and kernels
from reading what is not there yet. (Not yet run on a GPU.)

A process that was forked has none of its parent's threads: what they were decoding, what they read and
the locks that they held are forgotten there (`renewed_after_fork`), and blocks are decoded anew.

A failure is kept until somebody enters that block. Deliberately not here: modules and parameters.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import nn

from .errors import FormatError

_ALIGNED = 64  # bytes at multiples of which weights begin


class Coded(Protocol):
    """A weight that is held coded. decode_into fills `out`, contiguous, of `dtype` and `shape`, on
    the device of its parameter; on a GPU it launches on the current stream and does not wait. It is
    called from other threads, and must raise if it cannot fill all of `out`."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoded weight."""
        ...

    @property
    def shape(self) -> Sequence[int]:
        """Of the decoded weight."""
        ...

    @property
    def n_bytes(self) -> int:
        """That it takes in memory as it is."""
        ...

    def decode_into(self, out: torch.Tensor) -> object:
        """Fill `out`; what is returned does not matter."""
        ...


class Renewed(Protocol):
    """What holds locks, threads, or results of threads."""

    def after_fork(self) -> None:
        """In a child, before anything else runs there: let go of all that other threads had."""
        ...


_RENEWED: WeakSet[Renewed] = WeakSet()


def renewed_after_fork(item: Renewed) -> None:
    """Call `item.after_fork` in every process that is forked while it lives."""
    _RENEWED.add(item)


def _renew() -> None:
    for item in list(_RENEWED):
        item.after_fork()


if hasattr(os, "register_at_fork"):  # where processes can be forked
    os.register_at_fork(after_in_child=_renew)


@dataclass
class Counts:
    """How often a block was ready or being decoded when it was entered (`ahead`), was decoded only
    then (`late`), or was still there (`kept`); how long runs waited for weights."""

    ahead: int = 0
    late: int = 0
    kept: int = 0
    waited_seconds: float = 0.0


Named = Sequence[tuple[str, Coded]]


def span(coded: Coded) -> int:
    """Bytes of a buffer that a weight takes."""
    n_bytes = coded.dtype.itemsize * torch.Size(coded.shape).numel()
    return -(-n_bytes // _ALIGNED) * _ALIGNED


def weights_of(memory: torch.Tensor, named: Named) -> list[nn.Parameter]:
    """Views of u8 `memory`, one behind the other. They share its version counter."""
    found, start = [], 0
    with torch.inference_mode(False), torch.no_grad():
        for _, coded in named:
            shape = torch.Size(coded.shape)
            n_bytes = coded.dtype.itemsize * shape.numel()
            weight = memory[start : start + n_bytes].view(coded.dtype).view(shape)
            found.append(nn.Parameter(weight, requires_grad=False))
            start += span(coded)
    return found


def undecodable(name: str, error: BaseException) -> FormatError:
    """What is raised for a weight whose decoding raised `error`."""
    return FormatError(
        f"{name} cannot be decoded: {str(error) or type(error).__name__}; load the checkpoint "
        f"again, and fetch it again if that fails too"
    )


@dataclass(eq=False)
class Slot:
    """A buffer. block: whose weights it holds or will hold. users: runs of that block. filling: name of
    the weight being decoded. ready: when weights are there, used: when what read them has ended (events
    of a GPU). fresh: nobody has entered the block since it was decoded."""

    memory: torch.Tensor
    own: bool  # one of the two
    block: int | None = None
    users: int = 0
    load: "Future[None] | None" = None
    filling: str = ""
    ready: Any = None
    used: dict[int, Any] = field(default_factory=dict)  # by number of the stream
    fresh: bool = False
    views: dict[int, list[nn.Parameter]] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        """Neither read nor written."""
        return self.users == 0 and (self.load is None or self.load.done())


class Slots:
    """The buffers of the blocks of one list on one device. blocks: names and coded weights of each."""

    def __init__(self, blocks: Sequence[Named], device: torch.device) -> None:
        self.blocks = blocks
        self.device = device
        self.counts = Counts()
        self.size = max(sum(span(coded) for _, coded in named) for named in blocks)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._slots: list[Slot] = []
        self._begin()
        self._complete()
        renewed_after_fork(self)

    def _begin(self) -> None:
        self._lock = Lock()
        # A block that was not foreseen is not to wait for one that was foreseen wrongly.
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="fewbit-decode")

    def after_fork(self) -> None:
        """See `Renewed`. A buffer in use is left to its runs, of which one may be the run that forked
        and has its weights; in the others nothing counts as decoded."""
        self._begin()
        self._slots, inherited = [slot for slot in self._slots if not slot.users], self._slots
        for slot in inherited:  # not even asked, for the lock of a future may be held
            if slot.users:
                slot.own, slot.load = False, Future()
                slot.load.set_result(None)
            else:
                slot.block, slot.load, slot.fresh = None, None, False

    @property
    def n_bytes(self) -> int:
        """Of all buffers that exist now."""
        return sum(slot.memory.numel() for slot in self._slots)

    @property
    def in_use(self) -> bool:
        """Does a block run now?"""
        return any(slot.users for slot in self._slots)

    def enter(self, block: int, private: bool = False, join: Slot | None = None) -> Slot:
        """A buffer for a run of `block`, its weights perhaps still on their way: call `wait`.

        private: one that is never written again, for graphs that keep it. join: the buffer of a run
        of this block that has not ended.
        """
        with self._lock:
            slot = join or self._take(block, private)
            slot.users += 1
            return slot

    def wait(self, slot: Slot) -> list[nn.Parameter]:
        """The weights of the block that was entered; then the next one is foreseen. FormatError names
        the weight that could not be decoded; the next run will try again."""
        load, block = slot.load, slot.block
        assert load is not None and block is not None
        started = time.perf_counter()
        error = load.exception()
        waited = time.perf_counter() - started
        if error is not None:
            raise undecodable(slot.filling, error) from error
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
        with self._lock:
            self.counts.waited_seconds += waited
            self._foresee((block + 1) % len(self.blocks))
        return self._views(slot, block)

    def leave(self, slot: Slot) -> None:
        """A run has ended, on a GPU with all that was launched so far on the current stream."""
        with self._lock:
            slot.users -= 1
            self._mark(slot)
            failed = slot.load is not None and slot.load.done() and slot.load.exception()
            if failed and not slot.users:
                slot.block = None
            if not slot.own and not slot.users and slot in self._slots:
                self._slots.remove(slot)

    def close(self) -> None:
        """End the workers and drop the buffers."""
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._slots = []

    # ---- with the lock held -----------------------------------------------------------------

    def _take(self, block: int, private: bool) -> Slot:
        held = next((slot for slot in self._slots if slot.own and slot.block == block), None)
        if held is not None and not private:
            self.counts.ahead += held.fresh
            self.counts.kept += not held.fresh
            held.fresh = False
            return held
        self.counts.late += 1
        self._complete()
        after = (block + 1) % len(self.blocks)
        idle = [slot for slot in self._slots if slot.own and slot.idle and not private]
        slot = min(idle, key=lambda slot: slot.block == after, default=None)
        if slot is None:
            slot = self._new_slot(own=False)
            self._slots.append(slot)
        self._start(slot, block)
        return slot

    def _complete(self) -> None:
        """Let there be as many buffers of our own as there should be."""
        missing = min(2, len(self.blocks)) - sum(slot.own for slot in self._slots)
        self._slots += [self._new_slot(own=True) for _ in range(missing)]

    def _foresee(self, block: int) -> None:
        if any(slot.own and slot.block == block for slot in self._slots):
            return
        slot = next((slot for slot in self._slots if slot.own and slot.idle), None)
        if slot is not None:
            self._start(slot, block)
            slot.fresh = True

    def _start(self, slot: Slot, block: int) -> None:
        slot.block = block
        slot.load = self._workers.submit(self._fill, slot, block)

    def _mark(self, slot: Slot) -> None:
        if self._stream is not None:
            stream = torch.cuda.current_stream(self.device)
            slot.used[stream.cuda_stream] = stream.record_event()

    def _new_slot(self, own: bool) -> Slot:
        with torch.inference_mode(False):  # graphs and inference both read it
            size = self.size
            slot = Slot(torch.empty(size, dtype=torch.uint8, device=self.device), own)
        self._mark(slot)  # earlier kernels may still use this memory
        return slot

    # ---- in a worker ------------------------------------------------------------------------

    def _fill(self, slot: Slot, block: int) -> None:
        # A graph that has kept the old weights learns that they are gone.
        torch.autograd.graph.increment_version(slot.memory)
        with self._on_stream():
            if self._stream is not None:
                for event in slot.used.values():
                    self._stream.wait_event(event)
                slot.used.clear()
            for (name, coded), out in zip(
                self.blocks[block], self._views(slot, block), strict=True
            ):
                slot.filling = name
                coded.decode_into(out)
            if self._stream is not None:
                slot.ready = self._stream.record_event()

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _views(self, slot: Slot, block: int) -> list[nn.Parameter]:
        if block not in slot.views:
            slot.views[block] = weights_of(slot.memory, self.blocks[block])
        return slot.views[block]
