"""The linear bench with a CPU in place of the GPU: all sides are built, verified and put into rows."""

import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import gemm
from bench.cuda_timing import measure
from bench.gemm import (
    LAYERS,
    ROWS,
    SHAPES,
    Plan,
    Shape,
    Timed,
    candidates,
    estimates,
    figures,
    plan,
    problem_of,
    timed_rows,
)
from bench.oracle import here
from bench.peaks import MeasuredPeaks
from bench.peers_gpu import BASELINE
from fewbit.quant.kernel import M_BUCKETS
from fewbit.quant.machine import load_device

H100 = load_device("h100")
SMALL = Shape("small", 32, 128)
PEAKS = MeasuredPeaks(3e12, 1e-6, {"bf16": 7e14, "int8": 1e15})
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


def test_shapes_are_those_of_both_models():
    assert SHAPES[0] == Shape("llama3-70b o", 8192, 8192)  # of the acceptance
    assert len({(shape.n, shape.k) for shape in SHAPES}) == 8
    assert set(ROWS) <= set(M_BUCKETS)  # limits are counted for the bucket
    quick = plan(quick=True)
    assert set(quick.rows) <= set(ROWS) and set(quick.shapes) < set(SHAPES)
    assert {1, 16, 2048} <= set(quick.rows) and SHAPES[0] in quick.shapes


def test_each_kernel_comes_once_with_a_config_of_its_own():
    problem = problem_of(LAYERS[0], SHAPES[0], 16, H100)
    found = candidates(problem)
    names = [candidate.kernel for candidate in found]
    assert len(set(names)) == len(names) >= 1 and "reference" not in names
    from fewbit.quant.dispatch import explain_here, kernels

    explained = explain_here(problem)
    assert found[0] == explained.candidate
    assert {name for name, _ in explained.eligible} == {*names, "reference"}
    for candidate in found:
        kernel = kernels()[candidate.kernel]
        assert kernel.configs is None or candidate.config in kernel.configs(problem)


def test_figures_of_a_call():
    found = figures(Shape("x", 1000, 2000), 10, 10**6, "bf16", PEAKS, 1e-6)
    n_bytes = 10**6 + 10 * 3000 * 2
    assert found["gb_per_second"] == pytest.approx(n_bytes / 1e3)
    assert found["tops"] == pytest.approx(2 * 10 * 1000 * 2000 / 1e-6 / 1e12)
    assert found["share"] == pytest.approx(1.0)  # the launch
    assert "share" not in figures(SMALL, 1, 1, "fp8", PEAKS, 1e-6)


@runs
def test_all_sides_at_one_shape(monkeypatch):
    monkeypatch.setattr(gemm, "Replay", Stopwatch)
    monkeypatch.setattr(gemm, "measure", partial(measure, rounds=1))
    timed = Timed(SMALL, LAYERS[:3], replace(H100, l2_bytes=2000), "cpu")
    for m in (1, 17):
        found = {row["side"]: row for row in timed_rows(timed, m, PEAKS)}
        assert found[BASELINE]["bf16_over_this"] == 1.0
        ours = [row for row in found.values() if "kernel" in row]
        assert {row["side"].split()[0] for row in ours} == {"w4a16", "w8a8", "w4a8"}
        for row in ours:
            assert "failed" not in row, row
            assert row["relative_error"] <= 8e-3 and row["p10_us"] <= row["p90_us"]
            assert row["share"] == pytest.approx(row["roofline_us"] / row["median_us"])
        assert found["torchao int4"]["why"].startswith("not installed")
    assert found["_int_mm"]["median_us"] > 0
    assert (found["_int_mm"]["shape"], found["_int_mm"]["m"]) == ("small", 17)


@runs
def test_a_kernel_that_is_wrong_is_reported_and_not_timed(monkeypatch):
    from fewbit.quant import timed_case

    find = timed_case.find_kernel

    def spoiled(name):
        kernel = find(name)
        return replace(kernel, launch=lambda *a, **k: 2 * kernel.launch(*a, **k))

    monkeypatch.setattr(timed_case, "find_kernel", spoiled)
    monkeypatch.setattr(gemm, "Replay", Stopwatch)
    timed = Timed(SMALL, LAYERS[:1], replace(H100, l2_bytes=0), "cpu")
    ours = [row for row in timed_rows(timed, 4, PEAKS) if "kernel" in row]
    assert ours and all(row["failed"] and "median_us" not in row for row in ours)
    assert all("WRONG" in row["why"] for row in ours)


def test_a_peer_that_fails_is_asked_once(monkeypatch):
    calls = []

    def broken(weight):
        calls.append(weight.shape)
        raise AttributeError("another version")

    peer = replace(gemm.PEERS[0], name="peer", build=broken)
    monkeypatch.setattr(gemm, "PEERS", (peer,))
    timed = Timed(SMALL, (), H100, "cpu")
    for _ in range(2):
        (row,) = timed.sides(1)
        assert row == {"side": "peer", "why": "AttributeError: another version"}
    assert calls == [(32, 128)]


def test_what_does_not_fit_the_time_is_listed(monkeypatch):
    monkeypatch.setattr(gemm, "this_device", lambda backend: H100)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    todo = Plan(SHAPES[:1], (1, 4), ())
    (row,) = gemm.rows(todo, PEAKS, seconds=-1.0)
    assert row == {"skipped": ["llama3-70b o M=1", "llama3-70b o M=4"], "why": "time"}


def test_memory_that_runs_out_costs_a_row(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr(gemm, "Timed", full)
    monkeypatch.setattr(gemm, "this_device", lambda backend: H100)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    (row,) = gemm.rows(Plan(SHAPES[:1], (1,), ()), PEAKS, 60.0)
    assert row == {"shape": "llama3-70b o", "m": 1, "why": "OutOfMemoryError: 2 GiB"}


def test_estimates_of_a_described_machine():
    todo = Plan(SHAPES[:1], (1, 2048), LAYERS[:2])
    found = list(estimates(todo, load_device("h200")))
    assert len(found) == 4
    for row in found:
        assert row["estimated_us"] > 0 and 0 < row["share"] <= 1.05
        assert row["kernel"] != "reference"
    by = {(row["layer"], row["m"]): row["estimated_us"] for row in found}
    assert by["w4a16", 1] < by["w4a16", 2048]


def test_estimates_are_printed_and_labelled(monkeypatch, capsys, tmp_path):
    out = tmp_path / "e.json"
    monkeypatch.setattr(gemm, "plan", lambda quick: Plan(SHAPES[:1], (1,), LAYERS[:1]))
    monkeypatch.setattr(sys, "argv", ["gemm", "--gpu", "h200", "--estimate", "-o", str(out)])
    assert gemm.main() == 0
    assert capsys.readouterr().out.startswith("ESTIMATES of the cost model for NVIDIA H200")
    assert '"estimated_us"' in out.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gemm"])
    assert gemm.main() == 2
    said = capsys.readouterr().err
    assert "NVIDIA GPU" in said and "--gpu h200 --estimate" in said
