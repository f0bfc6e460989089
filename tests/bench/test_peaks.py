"""Rates from times, and rooflines from rates."""

import sys

import pytest
import torch

from bench import peaks
from bench.cuda_timing import Spread
from bench.peaks import MeasuredPeaks, peaks_of, probes, rated, row_text

GB = 1 << 30


def test_rates_follow_from_the_fastest_call():
    probe = next(p for p in probes(64 * GB, (9, 0)) if p.name == "read")
    assert probe.amount == 4 * GB
    found = rated(probe, {"sum": Spread(2e-3, 1e-3, 3e-3), "mv": Spread(1e-3, 9e-4, 2e-3)})
    assert found["rate"] == pytest.approx(4 * GB / 1e-3)
    assert found["median_us"] == pytest.approx(1000)


def test_probes_fit_the_memory_and_the_capability():
    names = [p.name for p in probes(64 * GB, (8, 0))]
    assert names == ["copy", "read", "bf16", "fp16", "int8", "launch"]
    assert [p.name for p in probes(64 * GB, (8, 9))] == [*names[:5], "fp8", "launch"]
    copied = probes(8 * GB, (8, 0))[0]
    assert copied.amount == 2 * 2 * GB  # a quarter of what is free, read and written


def test_peaks_of_rows():
    found = peaks_of([
        {"peak": "copy", "rate": 3e12}, {"peak": "read", "rate": 2e12}, {"peak": "bf16", "rate": 6e14},
        {"peak": "int8", "error": "no"}, {"peak": "launch", "rate": 1e6},
    ])  # fmt: skip
    assert found == MeasuredPeaks(3e12, 1e-6, {"bf16": 6e14})
    assert peaks_of([]) == MeasuredPeaks()


def test_roofline_is_the_largest_term():
    known = MeasuredPeaks(2e12, 1e-6, {"bf16": 5e14})
    assert known.roofline(2e9, 1e9, "bf16") == pytest.approx(1e-3)  # memory
    assert known.roofline(2e6, 5e11, "bf16") == pytest.approx(1e-3)  # compute
    assert known.roofline(2.0, 2.0, "bf16") == pytest.approx(1e-6)  # launch
    assert known.roofline(2e9, 1e9, "int8") is None
    assert MeasuredPeaks(None, None, {"bf16": 1.0}).roofline(1, 1, "bf16") is None


def test_rows_as_text():
    assert row_text({"peak": "copy", "unit": "B/s", "rate": 3.21e12}) == "copy        3.21 TB/s"
    assert row_text({"peak": "launch", "unit": "1/s", "rate": 1e6}) == "launch      1.00 us"
    assert "no such operator" in row_text({"peak": "fp8", "error": "no such operator"})


def test_a_peak_that_fails_is_told_and_the_others_go_on(monkeypatch):
    def broken():
        raise RuntimeError("out of luck")

    good = peaks.Probe("copy", "B/s", 10.0, lambda: [lambda: None])
    bad = peaks.Probe("int8", "op/s", 10.0, broken)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 * GB, 8 * GB))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(peaks, "probes", lambda free, capability: [bad, good])
    monkeypatch.setattr(peaks, "Replay", lambda calls: lambda: 0.5)
    first, second = peaks.rows()
    assert first == {"peak": "int8", "unit": "op/s", "error": "RuntimeError: out of luck"}
    assert second["rate"] == 20.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peaks"])
    assert peaks.main() == 2
    assert "bench.peaks cannot run here" in capsys.readouterr().err
