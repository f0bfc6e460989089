"""The arithmetic of GPU timing, and what is said where there is no GPU."""

import pytest
import torch

from bench import cuda_timing
from bench.cuda_timing import measure, missing, n_calls, needs_text, spoils_cuda, spread, told


def test_spread_of_known_samples():
    found = spread([float(i) for i in range(11)])
    assert (found.p10, found.median, found.p90) == (1.0, 5.0, 9.0)
    assert spread([2.0]) == spread([2.0, 2.0, 2.0])
    assert found.as_dict() == {"median_us": 5e6, "p10_us": 1e6, "p90_us": 9e6}


@pytest.mark.parametrize(
    "seconds, copies, calls",
    [(5e-6, 1, 50), (5e-6, 17, 51), (1e-3, 1, 5), (1e-3, 4, 8), (0.1, 1, 1), (0.1, 3, 3),
     (5e-6, 130, 130), (0.0, 2, 50)],
)  # fmt: skip
def test_a_replay_is_whole_rotations(seconds, copies, calls):
    assert n_calls(seconds, copies) == calls


def test_sides_take_turns_in_an_order_drawn_anew():
    order = []

    def side(name, seconds):
        def replay():
            order.append(name)
            return seconds

        return replay

    found = measure({name: side(name, i + 1.0) for i, name in enumerate("abc")}, rounds=8, seed=1)
    assert [found[name].median for name in "abc"] == [1.0, 2.0, 3.0]
    turns = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(turns) == 9 and all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) > 2


def test_the_first_round_does_not_count():
    seconds = iter([9.0, 1.0, 1.0, 1.0])
    assert measure({"a": lambda: next(seconds)}, rounds=3)["a"].p90 == 1.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_what_is_missing_is_named():
    lacking = missing()
    assert lacking and any("GPU" in item for item in lacking)
    text = needs_text("bench.gemm", lacking, "do this instead")
    assert text.startswith("bench.gemm cannot run here") and text.endswith("do this instead")


def test_an_old_gpu_is_missing_something(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert missing(triton=False) == ("compute capability 8.0 or newer: this GPU has 7.5",)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert missing(triton=False) == ()
    monkeypatch.setattr(cuda_timing._triton, "AVAILABLE", False)
    assert missing() == ("Triton: pip install triton",)


def test_of_a_chain_the_first_error_is_told():
    with pytest.raises(RuntimeError) as raised:
        try:
            raise ValueError("the cause\nand more")
        finally:
            raise RuntimeError("capture failed")
    assert told(raised.value) == "ValueError: the cause"
    assert told(KeyError()) == "KeyError"


def test_errors_of_the_device_spoil_its_context():
    assert spoils_cuda("RuntimeError: CUDA error: an illegal memory access was encountered")
    assert spoils_cuda("RuntimeError: Triton Error [CUDA]: misaligned address")
    assert not spoils_cuda("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
