"""What an autotuning run says: the closing table, JSON, progress with and without a terminal."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fewbit.quant.autotune_report import Report, Result, Silent, TuningBar
from fewbit.quant.kernel import Compiled
from fewbit.quant.ladder import Candidate
from fewbit.quant.search import Scored, Survivors
from fewbit.quant.timing import Fault
from tuned_tables import CONFIG, H200, entry, problem

MADE = Compiled(96, 0, 48 << 10, 128, "digest", (("HFMA2", 3),))
SCORED = Scored(Candidate("gemm", CONFIG), 12e-6, (MADE,))
FOUND = Survivors((SCORED,), failed=2, spilled=3)
DEAD = Fault(Candidate("gemm", (("block_n", 64),)), "DEATH", "signal 11")


def result(size=16, **facts) -> Result:
    found = Result(
        problem=problem(m=size),
        before=Candidate("gemv"),
        origin="model",
        before_seconds=(size + 5) * 1e-6,
        after=entry(size, kernel="gemm", config=CONFIG, us=10.0),
        found=FOUND,
        finalists=(SCORED,),
        n_timed=33,
    )
    return replace(found, **facts)


def report(*results: Result, **facts) -> Report:
    found = Report(H200, results or (result(),), 0, 0, 12, (), False, 61.2, Path("t.json"))
    return replace(found, **facts)


def dry(size=16) -> Result:
    after = entry(size, kernel="gemm", config=CONFIG, us=10.0, measured=False, verified="")
    return result(size, before_seconds=None, n_timed=0, after=after)


def test_before_after_and_the_share_of_the_limit() -> None:
    text = report(result(16), result(64, faults=(DEAD,)), n_left=3, n_skipped=2).text()
    lines = text.splitlines()
    assert lines[0].startswith("tuned on NVIDIA H200")
    assert lines[2].startswith("linear int_group bits=4") and " * " not in lines[2]
    assert lines[3].split() == ["M", "before", "us", "after", "us", "limit", "gain", "timed"]
    assert lines[4].split() == [
        "16", "gemv", "21.0", "gemm", "{block_n", "128,", "split_k", "2}", "10.0", "80%", "2.10x",
        "33/1",
    ]  # fmt: skip
    assert "configs left out, over all problems: 4 did not compile, 6 spill registers" in text
    assert "fault: gemm {block_n 64}: DEATH signal 11" in text
    assert "2 problems were finished by an earlier run" in text
    assert "the budget ended before 3 problems were timed" in text
    assert lines[-1] == "table: t.json" and "12 binaries, 61 s" in text


def test_a_choice_that_stayed_and_one_that_was_not_timed() -> None:
    same = result(before=Candidate("gemm", CONFIG), before_seconds=10e-6)
    assert " the same " in report(same).text() and "1.00x" in report(same).text()
    line = report(result(), dry(64)).text().splitlines()[5]
    assert "?" in line and "~10.0" in line and "x" not in line.replace("block", "")


def test_each_family_has_its_table() -> None:
    other = replace(result(), problem=problem(n=8192))
    lines = report(result(), other).text().splitlines()
    assert sum(line.startswith("linear") for line in lines) == 2


def test_a_dry_run_tells_what_was_compiled() -> None:
    text = report(dry(), is_dry=True, out=None, failures=(("ERROR ptxas says no", 4),)).text()
    lines = text.splitlines()
    assert lines[0].startswith("dry run for NVIDIA H200") and "estimates" in lines[0]
    assert lines[3].split("  ")[0] == "M" and "registers" in lines[3]
    assert lines[4].split()[-5:] == ["73%", "96", "48", "1/1", "3"]
    assert "did not compile (4): ERROR ptxas says no" in text
    assert lines[-1] == "no table was written (-o TABLE.json)"


def test_shares_count_the_launch_once() -> None:
    """Of what is measured it is part; estimates are without."""
    assert H200.launch_seconds == 1e-6
    assert result().share == pytest.approx(8 / 10)
    assert dry().share == pytest.approx(8 / 11)
    assert replace(result(), after=entry(16, ideal_us=0.0)).share is None


def test_json(tmp_path) -> None:
    value = json.loads(json.dumps(report(result(faults=(DEAD,)), dry(64)).as_dict()))
    first, second = value["results"]
    assert first["before"] == {"kernel": "gemv", "config": {}, "origin": "model"}
    assert first["after"] == {"kernel": "gemm", "config": dict(CONFIG)}
    assert first["after_seconds"] == pytest.approx(1e-5) and first["measured"]
    assert not second["measured"] and second["before_seconds"] is None
    assert first["faults"] == ["gemm {block_n 64}: DEATH signal 11"]
    assert first["finalists"][0]["binaries"] == [
        {"registers": 96, "stack_bytes": 0, "smem_bytes": 49152, "threads": 128}
    ]
    assert first["left_out"] == {"failed": 2, "spilled": 3, "unfit": 0, "quarantined": 0}
    assert value["machine"]["name"] == "h200" and value["out"] == "t.json"


# ---- progress -------------------------------------------------------------------------------


def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with TuningBar() as bar:
        for done in range(401):
            bar.compiled(done, 400)
        bar.searched(1, 2, result())
        bar.searched(1, 3, dry())  # of a dry run only the last is told
        bar.searched(2, 2, dry())
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("compiled")]) == 11
    assert "compiled 400/400 binaries" in lines
    assert lines[-2].startswith("[1/2] linear") and "10.0 us, 80% of the limit" in lines[-2]
    assert lines[-1].startswith("[2/2]") and "~10.0 us" in lines[-1]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with TuningBar() as bar:
        bar.compiled(0, 4)
        bar.compiled(4, 4)
        bar.searched(1, 1, result())
    assert "compiling" in screen.getvalue() and "tuning" in screen.getvalue()
    assert "80% of the limit" in screen.getvalue()


def test_nothing_to_compile_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with TuningBar() as bar:
        bar.compiled(0, 0)
    Silent().compiled(1, 2)
    Silent().searched(1, 2, result())
    assert capsys.readouterr().err == ""
