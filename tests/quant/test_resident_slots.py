"""Two buffers: what is ahead, what is late, what is kept, and what is never overwritten."""

import threading
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import torch

from fewbit.quant.errors import CheckpointError, FormatError
from fewbit.quant.resident_slots import Counts, Slots, span, weights_of
from forking import true_in_a_fork

CPU = torch.device("cpu")


@dataclass(eq=False)
class Number:
    """A weight [shape] of one number. started, gate: decoding says so and waits; error: it fails."""

    number: float
    shape: tuple[int, ...] = (4, 3)
    dtype: torch.dtype = torch.float32
    n_bytes: int = 2
    error: Exception | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    started: threading.Event = field(default_factory=threading.Event)
    decoded: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    def decode_into(self, out: torch.Tensor) -> None:
        self.started.set()
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        assert out.shape == self.shape and out.dtype == self.dtype and out.is_contiguous()
        assert out.data_ptr() % 64 == 0
        self.decoded += 1
        out.fill_(self.number)


def make(n: int) -> tuple[list[Number], Slots]:
    weights = [Number(float(i)) for i in range(n)]
    return weights, Slots([[(f"block.{i}.w", weight)] for i, weight in enumerate(weights)], CPU)


def run(slots: Slots, block: int) -> float:
    slot = slots.enter(block)
    (weight,) = slots.wait(slot)
    number = float(weight.unique().item())
    slots.leave(slot)
    return number


def settle(slots: Slots) -> None:
    for slot in slots._slots:
        if slot.load is not None:
            slot.load.exception()


def test_the_next_block_is_decoded_ahead_and_behind_the_last_the_first() -> None:
    weights, slots = make(5)
    for _ in range(3):
        for block in range(5):
            assert run(slots, block) == block
            settle(slots)
            assert weights[(block + 1) % 5].decoded > 0
    counts = slots.counts
    assert (counts.ahead, counts.late, counts.kept) == (14, 1, 0)
    assert [weight.decoded for weight in weights] == [4, 3, 3, 3, 3]
    assert slots.n_bytes == 2 * 64
    slots.close()


@pytest.mark.parametrize("n", [1, 2])
def test_lists_that_fit_the_buffers_are_decoded_once(n: int) -> None:
    weights, slots = make(n)
    for _ in range(4):
        assert [run(slots, block) for block in range(n)] == list(range(n))
    assert [weight.decoded for weight in weights] == [1] * n
    assert slots.n_bytes == n * 64 and slots.counts.kept >= 4 * n - 2
    slots.close()


def test_any_order_gives_the_block_that_was_asked_for() -> None:
    order = torch.randint(0, 6, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    _, slots = make(6)
    assert [run(slots, block) for block in order] == order
    assert slots.counts.late > 0 and slots.n_bytes == 2 * 64
    assert slots.counts.ahead + slots.counts.late + slots.counts.kept == 300
    slots.close()


def test_a_wrong_guess_is_neither_waited_for_nor_overwritten_while_it_is_written() -> None:
    weights, slots = make(4)
    weights[1].gate.clear()
    assert run(slots, 0) == 0
    assert weights[1].started.wait(10)  # foreseen, and stuck
    assert run(slots, 3) == 3 and run(slots, 2) == 2
    assert slots.n_bytes == 2 * 64
    weights[1].gate.set()
    assert run(slots, 1) == 1 and weights[1].decoded == 1
    slots.close()


def test_what_runs_is_not_overwritten_and_further_buffers_end_with_their_runs() -> None:
    _, slots = make(6)
    held = [slots.enter(block) for block in (0, 2, 4, 5)]
    values = [slots.wait(slot)[0] for slot in held]
    assert [float(value.unique()) for value in values] == [0, 2, 4, 5]
    assert slots.n_bytes == 4 * 64 and slots.in_use
    settle(slots)
    assert [float(value.unique()) for value in values] == [0, 2, 4, 5]
    for slot in held:
        slots.leave(slot)
    assert slots.n_bytes == 2 * 64 and not slots.in_use
    slots.close()


def test_runs_of_one_block_share_a_buffer() -> None:
    weights, slots = make(4)
    first = slots.enter(2)
    again = slots.enter(2)
    assert again is first and first.users == 2 and weights[2].decoded <= 1
    assert slots.wait(first)[0] is slots.wait(again)[0]
    slots.leave(first)
    settle(slots)
    assert float(slots.wait(again)[0].unique()) == 2
    slots.leave(again)
    slots.close()


def test_a_private_buffer_is_never_written_again() -> None:
    _, slots = make(3)
    slot = slots.enter(0, private=True)
    (kept,) = slots.wait(slot)
    slots.leave(slot)
    assert not slot.own and slots.n_bytes == 2 * 64
    version = kept._version
    for block in (1, 2, 0, 1, 2):
        run(slots, block)
    assert float(kept.unique()) == 0 and kept._version == version
    slots.close()


def test_a_failure_is_raised_where_the_weight_is_needed_and_the_next_run_tries_again() -> None:
    weights, slots = make(3)
    weights[1].error = CheckpointError("chunk 7: the checksum differs")
    assert run(slots, 0) == 0
    settle(slots)
    for _ in range(2):
        slot = slots.enter(1)
        with pytest.raises(FormatError, match=r"block\.1\.w cannot be decoded: chunk 7"):
            slots.wait(slot)
        slots.leave(slot)
    weights[1].error = None
    assert run(slots, 1) == 1 and run(slots, 2) == 2
    weights[0].error = AssertionError()
    run(slots, 1)
    weights[0].error = None
    assert not slots.in_use
    slots.close()


def test_a_foreseen_failure_that_nobody_needs_is_silent() -> None:
    weights, slots = make(3)
    weights[1].error = ValueError("gone")
    assert run(slots, 0) == 0
    settle(slots)
    assert run(slots, 2) == 2 and run(slots, 0) == 0
    slots.close()


def test_decoding_runs_while_a_block_runs() -> None:
    weights, slots = make(3)
    slot = slots.enter(0)
    slots.wait(slot)
    assert weights[1].started.wait(10)  # block 0 has not been left
    slots.leave(slot)
    slots.close()


def test_threads_see_their_own_blocks() -> None:
    _, slots = make(7)
    wrong: list[tuple[int, float]] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for block in torch.randint(0, 7, (150,), generator=generator).tolist():
            found = run(slots, block)
            if found != block:
                wrong.append((block, found))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not slots.in_use and slots.n_bytes == 2 * 64
    slots.close()


def test_a_fork_decodes_with_workers_of_its_own() -> None:
    _, slots = make(5)
    assert [run(slots, block) for block in (0, 1, 2)] == [0, 1, 2]  # both workers live, and idle
    settle(slots)
    order = [3, 4, 0, 2, 2, 1]
    assert true_in_a_fork(lambda: [run(slots, block) for block in order] == order)
    assert [run(slots, block) for block in order] == order
    slots.close()


def test_a_fork_waits_for_nothing_that_its_parent_was_decoding_or_running() -> None:
    weights, slots = make(4)
    weights[1].gate.clear()
    assert run(slots, 0) == 0
    assert weights[1].started.wait(10)  # foreseen, and half decoded when the process forks
    other = slots.enter(2)
    slots.wait(other)

    def work() -> bool:
        weights[1].gate = threading.Event()
        weights[1].gate.set()
        assert not slots.in_use
        found = [run(slots, block) for block in (1, 2, 3, 0, 1)]
        settle(slots)
        return found == [1, 2, 3, 0, 1] and slots.n_bytes == 2 * 64

    with slots._lock:  # as if another thread was there
        assert true_in_a_fork(work)
    weights[1].gate.set()
    slots.leave(other)
    assert run(slots, 1) == 1 and weights[1].decoded == 1
    slots.close()


def test_a_run_that_forks_keeps_its_weights_and_can_be_joined() -> None:
    _, slots = make(4)
    slot = slots.enter(2)
    (weight,) = slots.wait(slot)

    def work() -> bool:
        others = [run(slots, block) for block in (3, 0, 1, 2, 3)]
        again = slots.enter(2, join=slot)
        same = slots.wait(again)[0] is weight
        slots.leave(again)
        slots.leave(slot)
        return others == [3, 0, 1, 2, 3] and same and float(weight.unique()) == 2

    assert true_in_a_fork(work)
    slots.leave(slot)
    assert run(slots, 2) == 2
    slots.close()


@dataclass(eq=False)
class Stream:
    """What is told to a stream of a GPU, in one log."""

    cuda_stream: int
    log: list[str]
    n_events: int = 0

    def record_event(self) -> str:
        self.n_events += 1
        self.log.append(f"{self.cuda_stream} records {self.cuda_stream}.{self.n_events}")
        return f"{self.cuda_stream}.{self.n_events}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.cuda_stream} waits {event}")


def test_events_order_a_decoding_stream_and_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer is not written before its readers' event, not read before its writer's."""
    log: list[str] = []
    compute, side = Stream(1, log), Stream(2, log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: compute)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    weights, slots = make(3)
    for weight in weights:
        monkeypatch.setattr(
            weight, "decode_into", lambda out, n=weight.number: log.append(f"decodes {n:.0f}")
        )
    slots._stream = side  # type: ignore[assignment]
    told = []
    for block in (0, 1, 2):
        slot = slots.enter(block)
        slots.wait(slot)
        settle(slots)
        told.append(list(log))
        log.clear()
        slots.leave(slot)
    assert told[0] == [
        "decodes 0", "2 records 2.1", "1 waits 2.1", "decodes 1", "2 records 2.2"
    ]  # fmt: skip
    assert told[1] == [  # block 2 goes where block 0 was
        "1 records 1.1", "1 waits 2.2", "2 waits 1.1", "decodes 2", "2 records 2.3"
    ]  # fmt: skip
    assert told[2][:3] == ["1 records 1.2", "1 waits 2.3", "2 waits 1.2"]
    for _ in range(5):
        slot = slots.enter(2)
        slots.wait(slot)
        slots.leave(slot)
    assert len(slot.used) == 1  # the last event of a stream is enough
    slots.close()


def test_weights_lie_one_behind_the_other_at_multiples_of_64_bytes() -> None:
    named = [
        ("a", Number(0.0, (3, 5), torch.bfloat16)),
        ("b", Number(0.0, ())),
        ("c", Number(0.0, (0, 4))),
        ("d", Number(0.0, (65,), torch.int8)),
        ("e", Number(0.0, (2,), torch.float64)),
    ]
    assert [span(coded) for _, coded in named] == [64, 64, 0, 128, 64]
    memory = torch.zeros(320, dtype=torch.uint8)
    found = weights_of(memory, named)
    assert [tuple(one.shape) for one in found] == [(3, 5), (), (0, 4), (65,), (2,)]
    starts = [one.data_ptr() - memory.data_ptr() for one in found if one.numel()]
    assert starts == [0, 64, 128, 256]
    torch.autograd.graph.increment_version(memory)
    assert all(one._version == 1 for one in found if one.numel())
    assert Counts() == Counts(0, 0, 0, 0.0)
