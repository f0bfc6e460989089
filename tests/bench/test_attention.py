"""The attention bench with a CPU in place of the GPU."""

import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import attention
from bench.attention import (
    CASES,
    HEAD_DIM,
    KV_HEADS,
    Call,
    call_rows,
    copied,
    fastest,
    packed_view,
    sdpa_calls,
    stored_bytes,
    verified,
)
from bench.cuda_timing import Spread, measure
from bench.oracle import here
from bench.peaks import MeasuredPeaks
from fewbit.quant import kv_softmax
from fewbit.quant.errors import FewbitError
from fewbit.quant.kv_view import Scoring
from fewbit.quant.machine import load_device

H100 = load_device("h100")
PEAKS = MeasuredPeaks(3e12, 1e-6, {"bf16": 7e14})
SCORING = Scoring(HEAD_DIM**-0.5, None, True, None, None)
runs = pytest.mark.skipif(
    here() is None or here().device == "cuda", reason="runs where Triton's interpreter does"
)


class Stopwatch:
    """In place of a CUDA graph: runs its first call."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self):
        started = time.perf_counter()
        self.calls[0]()
        return time.perf_counter() - started


def query(batch, group):
    return torch.randn(batch, KV_HEADS * group, 1, HEAD_DIM).bfloat16()


def test_cases_are_those_of_the_acceptance():
    assert set(CASES) == {(1, 1024), (1, 32768), (16, 4096), (16, 32768)}
    assert CASES[0] == (16, 32768)
    call = Call(16, 32768, 4)
    assert call.dense_bytes == 2 * 16 * 8 * 32768 * 128 * 2
    assert call.ops() == 4 * 16 * 8 * 4 * 32768 * 128
    assert call.where["case"] == "16 × 32768"


def test_both_sdpa_calls_are_the_same_attention():
    q = query(2, 4)
    keys, values = (torch.randn(2, KV_HEADS, 33, HEAD_DIM).bfloat16() for _ in range(2))
    by_group, as_queries = (call() for call in sdpa_calls(q, keys, values).values())
    assert torch.allclose(by_group.float(), as_queries.reshape(by_group.shape).float(), atol=2e-2)


def test_the_packed_cache_is_that_of_the_recipes():
    view = packed_view(Call(2, 200, 4), "cpu")
    assert (view.n_tokens, view.n_queries, view.stored) == (200, 1, 136)
    assert view.band[0].shape == (2, KV_HEADS, 64, HEAD_DIM) and view.pages.sink is not None
    # 68 bytes for a vector of 128 in 4 bits; 64 + 4 tokens dense
    vectors, dense = 2 * KV_HEADS * 136, 2 * KV_HEADS * 68
    assert stored_bytes(view) == vectors * 2 * 68 + dense * 2 * 2 * HEAD_DIM


def test_a_copy_is_the_same_in_other_memory():
    view = packed_view(Call(1, 100, 4), "cpu")
    other = copied(view)
    assert other.pages.keys["codes"].data_ptr() != view.pages.keys["codes"].data_ptr()
    q = query(1, 4)
    assert verified(kv_softmax.attend, other, q, SCORING) <= 8e-3


def test_a_wrong_kernel_is_refused():
    view = packed_view(Call(1, 100, 4), "cpu")

    def wrong(view, query, scoring):
        return 1.1 * kv_softmax.attend(view, query, scoring)

    with pytest.raises(FewbitError, match="relative error must be"):
        verified(wrong, view, query(1, 4), SCORING)


def test_the_baseline_is_the_faster_sdpa():
    spreads = {"a": Spread(2.0, 1.0, 3.0), "b": Spread(1.0, 1.0, 1.0), "c": Spread(0.1, 0.1, 0.1)}
    assert fastest(spreads, ("a", "b")) == 1.0 and fastest(spreads, ("d",)) is None


@runs
def test_rows_of_one_call(monkeypatch):
    monkeypatch.setattr(attention, "Replay", Stopwatch)
    monkeypatch.setattr(attention, "measure", partial(measure, rounds=1))
    machine = replace(H100, l2_bytes=1 << 17)
    rows = call_rows(Call(1, 130, 4), PEAKS, machine, "cpu")
    by_side = {row["side"]: row for row in rows}
    assert {"sdpa enable_gqa", "sdpa grouped"} <= set(by_side)
    ours = [row for row in rows if "kernel" in row]
    assert ours and all("failed" not in row for row in ours), ours
    for row in rows:
        assert row["bf16_over_this"] > 0 and (row["group"], row["tokens"]) == (4, 130)
        assert row["share"] == pytest.approx(row["roofline_us"] / row["median_us"])
    assert ours[0]["bytes"] < 0.8 * by_side["sdpa grouped"]["bytes"]


def test_what_does_not_fit_the_time_is_listed(monkeypatch):
    monkeypatch.setattr(attention, "this_device", lambda backend: H100)
    (row,) = attention.rows(PEAKS, seconds=-1.0)
    assert len(row["skipped"]) == 8 and row["why"] == "time"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["attention"])
    assert attention.main() == 2
    assert "bench.attention cannot run here" in capsys.readouterr().err
