"""Sections as generators; what a GPU would be asked is replaced."""

import re
import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from bench import gpu_sections
from bench.gpu_sections import TimeUp, commit
from fewbit.quant.autotune_report import Result
from fewbit.quant.ladder import Candidate
from fewbit.quant.machine import load_device
from fewbit.quant.timing import Facts
from fewbit.quant.tuned_table import Entry


def test_facts_name_the_gpu_the_versions_and_the_commit(monkeypatch):
    class Properties:
        total_memory = 80 << 30

    monkeypatch.setattr(gpu_sections, "this_device", lambda backend: load_device("h100"))
    monkeypatch.setattr(gpu_sections, "conditions", lambda: {"driver": "580.1", "watts": "300"})
    monkeypatch.setattr(gpu_sections, "commit", lambda: "abc1234")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    (row,) = gpu_sections.facts()
    assert (row["gpu"], row["described_as"], row["driver"]) == ("NVIDIA H100", "h100", "580.1")
    assert (row["commit"], row["torch"]) == ("abc1234", torch.__version__)
    assert row["fingerprint"].startswith("sm90-132") and row["compute_capability"] == "9.0"
    assert row["published"]["int8_ops_per_second"] > 1e15


def test_the_commit_is_told_or_unknown(monkeypatch):
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|unknown", commit())

    def absent(*arguments, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    assert commit() == "unknown"


def test_benches_get_their_seconds_and_the_peaks(monkeypatch):
    peak = [{"peak": "copy", "rate": 2e12}]
    monkeypatch.setattr(
        gpu_sections.gemm, "rows", lambda plan, peaks, s: [(len(plan.rows), peaks, s)]
    )
    monkeypatch.setattr(gpu_sections.attention, "rows", lambda peaks, s: [(peaks, s)])
    ((_, peaks, seconds),) = gpu_sections.time_gemm(20.0, peak)
    assert (peaks.bytes_per_second, seconds) == (2e12, 20.0)
    ((peaks, seconds),) = gpu_sections.time_attention(30.0, peak)
    assert (peaks.bytes_per_second, seconds) == (2e12, 30.0)


def test_checks_come_from_the_pool(monkeypatch):
    monkeypatch.setattr(gpu_sections.oracle, "pool_rows", lambda s, jobs: [{"ok": True, "s": s}])
    assert list(gpu_sections.check_all(9.0)) == [{"ok": True, "s": 9.0}]


# ---- tuning ---------------------------------------------------------------------------------


H100 = replace(load_device("h100"), present=True)
ENTRY = Entry(1, "k", (("block", 16),), 9.5, 9.0, 10.0, 7.6, 8.0, "", "s", "", "rel 1e-4")


def a_result(family, size, faults=()):
    problem = family.at(size)
    before = Candidate("k", (("block", 32),))
    return Result(problem, before, "model", 1.9e-5, replace(ENTRY, size=size), None, (), 3, faults)


class FakeTimer:
    closed = False

    def facts(self):
        return Facts(H100, "580.1", {})

    def close(self):
        FakeTimer.closed = True


def play(monkeypatch, tmp_path, seconds, autotune):
    monkeypatch.setattr(gpu_sections, "IsolatedTimer", FakeTimer)
    monkeypatch.setattr(gpu_sections, "autotune", autotune)
    return list(gpu_sections.tune(seconds, str(tmp_path / "t.json")))


def test_families_are_tuned_one_after_the_other(monkeypatch, tmp_path):
    asked = []

    def autotune(families, timer, settings, *, tables, progress):
        asked.append((families[0], settings))
        progress.compiled(1, 2)
        progress.searched(1, 1, a_result(families[0], 4))

    rows = play(monkeypatch, tmp_path, 100.0, autotune)
    assert [family.format for family, _ in asked] == ["int_group", "int_group", "int_two_level"]
    assert all(
        settings.budget_seconds <= 50 and settings.driver == "580.1" for _, settings in asked
    )
    assert [row["size"] for row in rows[:3]] == [4, 4, 4]
    assert rows[0]["gain"] == 2.0 and rows[0]["share"] == pytest.approx(0.8)
    assert rows[0]["before_us"] == pytest.approx(19.0)
    assert rows[3] == {"table": str(tmp_path / "t.json")} and len(rows) == 4 and FakeTimer.closed


def test_families_without_time_are_listed(monkeypatch, tmp_path):
    rows = play(monkeypatch, tmp_path, 5.0, None)
    assert rows[1] == {"skipped": ["w4a16", "w8a8", "w4a8"], "why": "time"}


def test_a_compilation_that_takes_too_long_is_ended(monkeypatch, tmp_path):
    watch = gpu_sections.Watch(deadline=0.0)
    watch.compiled(2, 2)
    with pytest.raises(TimeUp, match="1 of 2 binaries"):
        watch.compiled(1, 2)

    def autotune(families, timer, settings, *, tables, progress):
        raise TimeUp("1 of 2 binaries were compiled when the time was up")

    rows = play(monkeypatch, tmp_path, 100.0, autotune)
    assert rows[0] == {"table": str(tmp_path / "t.json")}
    assert len(rows[1]["skipped"]) == 3 and "1 of 2 binaries" in rows[1]["skipped"][0]


def test_the_table_is_the_packaged_one_unless_another_is_given(monkeypatch):
    monkeypatch.setattr(gpu_sections, "this_device", lambda backend: H100)
    path = gpu_sections.table_path("")
    assert path.parent.name == "tuned" and path.parent.parent.name == "quant"
    assert path.name.startswith("sm90-132") and path.suffix == ".json"
    assert str(gpu_sections.table_path("x/y.json")) == "x/y.json"


def test_decode_runs_where_there_is_such_a_bench(monkeypatch):
    found = ModuleType("bench.decode_step")
    found.run = lambda seconds: {"tokens_per_second": 2 * seconds, "skipped": ["70B"]}
    monkeypatch.setitem(sys.modules, "bench.decode_step", found)
    monkeypatch.setattr(gpu_sections, "find_spec", lambda name: object())
    first, second = gpu_sections.decode(3.0)
    assert first == {"tokens_per_second": 6.0}
    assert second == {"skipped": ["70B"], "why": "time"}
    monkeypatch.setattr(gpu_sections, "find_spec", lambda name: None)
    (row,) = gpu_sections.decode(3.0)
    assert row["skipped"] and "bench.decode_step" in row["why"]
