"""Time, order, failures and results of `bench.gpu`, with stand-ins for its sections."""

import json
import sys
from importlib import import_module

import pytest
import torch

from bench import gpu
from bench.child_rows import DONE, FAILED, TIMED_OUT, Outcome
from bench.gpu import (
    SECTIONS,
    SKIPPED,
    Section,
    allot,
    arguments,
    failed,
    gpu_name,
    line,
    markdown,
    planned,
    result,
    run_sections,
    without,
)

PEAK = {"peak": "copy", "unit": "B/s", "rate": 3e12, "median_us": 1.0, "p10_us": 1.0, "p90_us": 1.0}
CALL = {"case": "1 × 1024", "group": 4, "kv_heads": 8, "head_dim": 128, "side": "sdpa",
        "median_us": 7.0}  # fmt: skip
TIMED = {"shape": "a", "n": 8, "k": 16, "m": 1, "side": "w4", "median_us": 12.3}
GOOD = {"ok": True, "kernel": "k", "config": {}, "case": "c", "error": 1e-4, "tolerance": 1e-3,
        "why": "", "seconds": 1.0}  # fmt: skip
BAD = GOOD | {"ok": False, "error": None, "why": "signal 11", "lost": True}


def section(name, weight=1.0, least=10.0, takes=("seconds",)):
    return Section(name, f"bench.gpu_sections:{name}", weight, least, takes)


def outcomes(**rows):
    return {name: Outcome(tuple(found), DONE, 1.0) for name, found in rows.items()}


# ---- time -----------------------------------------------------------------------------------


def test_time_goes_by_weight():
    a, b, c = section("a", 3.0), section("b", 1.0), section("c", 2.0)
    assert allot(a, [b, c], 300.0) == 150.0
    assert allot(b, [c], 300.0) == 100.0
    assert allot(c, [], 300.0) == 300.0


def test_a_section_gets_its_least_or_nothing():
    a, b = section("a", 1.0, least=50.0), section("b", 9.0)
    assert allot(a, [b], 100.0) == 50.0
    assert allot(a, [b], 49.0) == 0.0


def test_sections_of_nine_minutes_all_get_enough():
    left = 540.0
    for index, one in enumerate(SECTIONS):
        given = allot(one, SECTIONS[index + 1 :], left)
        assert given >= one.least
        left -= given
    assert left == pytest.approx(0.0)
    assert [one.name for one in SECTIONS] == [
        "facts", "oracle", "peaks", "gemm", "attention", "rans32", "tune", "decode"
    ]  # fmt: skip


def test_a_section_plans_with_less_than_it_gets():
    assert planned(100.0) == pytest.approx(0.9 * 88)
    assert planned(5.0) == 1.0


@pytest.mark.parametrize("one", SECTIONS, ids=lambda one: one.name)
def test_every_section_names_a_function(one):
    module, _, name = one.function.partition(":")
    assert callable(getattr(import_module(module), name))


def test_arguments_are_what_the_section_takes():
    done = outcomes(peaks=[{"peak": "copy", "rate": 1e12}])
    one = section("gemm", takes=("seconds", "peaks"))
    assert arguments(one, 112.0, done, "") == (90.0, [{"peak": "copy", "rate": 1e12}])
    tune = section("tune", takes=("seconds", "table"))
    assert arguments(tune, 112.0, {}, "t.json") == (90.0, "t.json")
    assert arguments(section("facts", takes=()), 112.0, {}, "") == ()


# ---- running --------------------------------------------------------------------------------


def play(script, sections=None, seconds=600.0):
    """Run sections whose outcomes `script` gives by name; (outcomes, what was said, environments)."""
    said, environments = [], {}

    def run(function, arguments, limit, on_row, environment):
        name = function.partition(":")[2]
        environments[name] = environment["FEWBIT_KERNEL"]
        for row in script[name].rows:
            on_row(row)
        return script[name]

    sections = sections or [section(name) for name in script]
    return run_sections(sections, seconds, "", said.append, run), said, environments


def test_a_section_that_fails_does_not_stop_the_next():
    script = {
        "facts": Outcome((), FAILED, 1.0, "RuntimeError: no luck"),
        "peaks": Outcome((PEAK,), TIMED_OUT, 2.0, "its time was up"),
        "gemm": Outcome((TIMED,), DONE, 1.0),
    }  # fmt: skip
    done, said, _ = play(script)
    assert [outcome.status for outcome in done.values()] == [FAILED, TIMED_OUT, DONE]
    assert any("RuntimeError: no luck" in text for text in said)
    assert any("12.3" in text for text in said) and failed(done)


def test_what_does_not_fit_is_skipped_and_no_failure():
    script = {"facts": Outcome(({"gpu": "x"},), DONE, 1.0)}
    done, said, _ = play(script, [section("facts"), section("gemm", least=1e6)])
    assert done["gemm"].status == SKIPPED and "it needs 1000000" in done["gemm"].error
    assert not failed(done) and any("skipped" in text for text in said)


def test_kernels_that_cost_a_process_are_left_out_of_what_follows(monkeypatch):
    monkeypatch.setenv("FEWBIT_KERNEL", "!=other")
    script = {"oracle": Outcome((GOOD, BAD), DONE, 1.0), "gemm": Outcome((TIMED,), DONE, 1.0)}
    done, said, environments = play(script)
    assert environments == {"oracle": "!=other", "gemm": "!=k; !=other"}
    assert failed(done) and any("FAILED k" in text for text in said)


def test_the_table_that_was_asked_for_serves_once_it_exists(tmp_path):
    path = tmp_path / "t.json"
    assert "FEWBIT_TABLE" not in gpu.environment({}, str(path))
    path.touch()
    assert gpu.environment({}, str(path))["FEWBIT_TABLE"] == str(path)
    assert "FEWBIT_TABLE" not in gpu.environment({}, "")


def test_rules_are_joined():
    assert without([], "") == "" and without(["a", "b"], "") == "!=a; !=b"
    from fewbit.quant.policy import parse_rules

    assert all(rule.leaves_out for rule in parse_rules(without(["a", "b"], ""), "test"))


@pytest.mark.parametrize(
    "rows, wrong",
    [([GOOD], False), ([GOOD, BAD], True), ([TIMED], False), ([TIMED | {"failed": True}], True),
     ([{"side": "gemlite", "why": "not installed"}], False),
     ([{"skipped": ["x"], "why": "time"}], False)],
)  # fmt: skip
def test_what_counts_as_a_failure(rows, wrong):
    assert failed(outcomes(any=rows)) is wrong


# ---- results --------------------------------------------------------------------------------


def everything():
    return outcomes(
        facts=[{"gpu": "NVIDIA H100", "described_as": "h100"}],
        oracle=[GOOD, BAD, {"skipped": ["9 of 99 steps"], "why": "time"}],
        peaks=[PEAK],
        gemm=[TIMED, {"skipped": ["a M=16"], "why": "time"}],
        attention=[CALL],
        tune=[{"table": "t.json"}],
        decode=[{"tokens_per_second": 123.0}],
    ) | {"extra": Outcome((), FAILED, 0.0, "RuntimeError: no")}


def test_markdown_has_every_section():
    text = markdown(everything())
    assert text.startswith("# NVIDIA H100: `python -m bench.gpu`\n")
    for name in ("facts", "oracle", "peaks", "gemm", "attention", "tune", "decode", "extra"):
        assert f"\n## {name}\n" in text
    for part in (
        "3.00 TB/s",
        "12.3",
        "7.00",
        "123",
        "t.json",
        "FAILED k",
        "a M=16",
        "RuntimeError: no",
    ):
        assert part in text
    assert markdown({}).startswith("# GPU")


def test_results_are_json_with_failures_only():
    found = json.loads(json.dumps(result(everything(), 9.0), allow_nan=False))
    oracle = found["sections"]["oracle"]
    assert [row["why"] for row in oracle["rows"]] == ["signal 11", "time"]
    assert oracle["summary"]["checks"] == 2 and found["failed"] and found["minutes"] == 9.0
    assert gpu_name(everything()) == "h100" and gpu_name({}) == "unknown-gpu"


def test_lines_of_progress():
    assert line("gemm", TIMED).split() == ["a", "M=1", "w4", "12.3"]
    assert line("gemm", TIMED | {"median_us": 5.0, "share": 0.5}).endswith("5.00 (50 %)")
    refused = line("attention", {"case": "1 × 1024", "side": "x", "why": "no"})
    assert refused.split() == ["1", "×", "1024", "x", "no"]
    assert line("decode", {"a": "b" * 999}).endswith(" …")
    assert line("gemm", {"skipped": ["x", "y"], "why": "time"}) == "2 not reached: time"


def test_one_command_writes_both_files(monkeypatch, tmp_path, capsys):
    def run(sections, seconds, table, say):
        say(f"{len(sections)} sections in {seconds:.0f} s, {table}")
        return everything()

    monkeypatch.setattr(gpu, "missing", lambda: ())
    monkeypatch.setattr(gpu, "run_sections", run)
    monkeypatch.setattr(
        sys, "argv", ["gpu", "--minutes", "2", "--no-tune", "--table", "t", "-o", str(tmp_path)]
    )
    assert gpu.main() == 1
    assert "7 sections in 120 s, t" in capsys.readouterr().out
    assert json.loads((tmp_path / "h100.json").read_text())["failed"]
    assert (tmp_path / "h100.md").read_text().startswith("# NVIDIA H100")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert "bench.gpu cannot run here" in capsys.readouterr().err
