"""`fewbit autotune` as a command: requests, refusals before any work, and a dry run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import tiny_models
from fewbit.quant import autotune as tuning
from fewbit.quant import autotune_command as module
from fewbit.quant import dispatch, reference
from fewbit.quant.autotune_command import Request, predicted_seconds
from fewbit.quant.cli import main
from fewbit.quant.ladder import Candidate
from fewbit.quant.machine import load_device
from fewbit.quant.search import survivors
from fewbit.quant.timing import Facts
from fewbit.quant.tuned_file import append_rows, read_table
from fewbit.quant.tuned_table import fingerprint
from simulated_device import KERNELS, SimulatedDevice
from tuned_tables import H200, table

DRY = ("autotune", "--dry-run", "--gpu", "h200")
SHAPES = ("--shapes", "mine.json", "--formats", "w4a16")
MINE = {
    "title": "small",
    "linears": {"q": [4096, 4096], "o": [4096, 4096], "down": [4096, 14336]},
    "attention": {"heads": 32, "kv_heads": 8, "head_dim": 128},
    "source": "made up",
}


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Path:
    """Made-up kernels, a folder with a list of shapes, and a home of its own."""
    named = {kernel.name: kernel for kernel in (*KERNELS, reference.KERNEL)}
    for place in (dispatch, tuning, module):
        monkeypatch.setattr(place, "kernels", lambda: named)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FEWBIT_TABLE", raising=False)
    monkeypatch.delenv("FEWBIT_KERNEL", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text(json.dumps(MINE))
    return tmp_path


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


# ---- dry runs -------------------------------------------------------------------------------


def test_a_dry_run_for_a_described_gpu(capsys, here) -> None:
    code, out, err = command(capsys, *DRY, *SHAPES, "-o", "t.json")
    assert code == 0 and out.startswith("dry run for NVIDIA H200")
    assert "K=4096 bfloat16 cuda" in out and "K=14336 bfloat16 cuda" in out
    assert "[36/36]" in err and out.rstrip().endswith("table: t.json")
    rows = read_table(here / "t.json").rows
    assert len(rows) == 2 and not any(entry.measured for row in rows for entry in row.ladder)


def test_json_and_nothing_else(capsys, here) -> None:
    code, out, _ = command(capsys, *DRY, *SHAPES, "--json", "-")
    value = json.loads(out)
    assert code == 0 and value["dry_run"] and value["out"] is None
    assert len(value["results"]) == 36
    assert all(len(result["finalists"]) <= 32 for result in value["results"])
    assert not (here / "cache" / "fewbit" / "tuned").exists()


def test_a_checkpoint(capsys, here) -> None:
    source = tiny_models.save("llama", here / "source")
    flags = ("-o", str(here / "out"), "--recipe", "w4a16-rtn", "--quiet")
    assert main(["quantize", str(source), *flags]) == 0
    code, out, _ = command(capsys, *DRY, str(here / "out"), "--json", "-")
    families = {result["family"] for result in json.loads(out)["results"]}
    assert code == 0 and families and all("int_group bits=4" in family for family in families)


def test_attention_is_ranked_where_a_recipe_packs_the_cache() -> None:
    shapes, device = module.load_shapes("llama3-8b"), load_device("h200")
    found = module._families(Request(shapes="x", dry_run=True), shapes, device)
    assert [f.op for f in found].count("attend") == 2 and len(found) == 18
    timed = module._families(Request(shapes="x"), shapes, device)
    assert {f.op for f in timed} == {"linear"}
    plain = module._families(Request(formats="w4a16, w8a16,", dry_run=True), shapes, device)
    assert {f.op for f in plain} == {"linear"} and len(plain) == 8


# ---- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (DRY, "give a checkpoint folder or --shapes NAME"),
        ((*DRY, "some/path", *SHAPES), "and not both"),
        ((*DRY, "--shapes", "llama3-8c"), "did you mean 'llama3-8b'"),
        (("autotune", "--dry-run", "--gpu", "h20", *SHAPES), "did you mean 'h200'"),
        (("autotune", "--dry-run", "--gpu", "cpu", *SHAPES), "--gpu must be a GPU"),
        ((*DRY, "--shapes", "llama3-8b", "--formats", "w4a61"), "did you mean 'w4a16'"),
        ((*DRY, "--shapes", "llama3-8b", "--formats", "kv4"), "quantizes no weights"),
        ((*DRY, "path", "--formats", "w4a16"), "--formats goes with --shapes"),
        ((*DRY, "no/such/folder"), "does not exist"),
        ((*DRY, "mine.json"), "is a file; give the folder"),
        ((*DRY, *SHAPES, "--budget", "0"), "--budget must be minutes above 0, got 0"),
        ((*DRY, *SHAPES, "--budget", "-1"), "got -1"),
        ((*DRY, *SHAPES, "--budget", "nan"), "got nan"),
        ((*DRY, *SHAPES, "--jobs", "0"), "--jobs must be at least 1"),
        (("autotune", "--gpu", "h200", *SHAPES), "--gpu h200 needs --dry-run"),
        ((*DRY, *SHAPES, "-o", "other.json"), "holds a table of sm100"),
        ((*DRY, *SHAPES, "-o", "newer.json"), "got 99; update fewbit"),
        ((*DRY, *SHAPES, "-o", "mine.json"), "mine.json"),
        ((*DRY, *SHAPES, "-o", "."), "cannot be read"),
    ],
)
def test_bad_requests_are_one_line_and_change_nothing(
    arguments: tuple[str, ...], message: str, capsys, here, monkeypatch
) -> None:
    append_rows(here / "other.json", table(machine=load_device("b200")))
    (here / "newer.json").write_text('{"schema": 99}')

    def never(*arguments, **options):
        raise AssertionError("nothing may be compiled or timed")

    monkeypatch.setattr(tuning, "build", never)
    before = {path: path.read_bytes() for path in here.rglob("*.json")}
    code, out, err = command(capsys, *arguments)
    assert code == 1 and out == "" and len(err.splitlines()) == 1
    assert message in err and err.startswith("fewbit: ")
    assert {path: path.read_bytes() for path in here.rglob("*.json")} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys) -> None:
    code, _, err = command(capsys, "autotune", *SHAPES)
    assert code == 1 and "TuningError" in err and "--dry-run --gpu h200" in err
    code, _, err = command(capsys, "autotune", "--dry-run", *SHAPES)
    assert code == 1 and "say which one is meant" in err


def test_help(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["autotune", "--help"])
    assert stop.value.code == 0 and "--dry-run" in capsys.readouterr().out


# ---- with a GPU that is not there -----------------------------------------------------------


class Worker(SimulatedDevice):
    """Stands for the process that times."""

    made: ClassVar[list["Worker"]] = []

    def __init__(self, predicted=None) -> None:
        super().__init__({}, 1, lambda posed: survivors(posed, KERNELS).model)
        self.predicted = predicted
        Worker.made.append(self)

    def facts(self) -> Facts:
        return Facts(replace(H200, present=True), "580.65", {"sm_mhz": "1980"})


@pytest.fixture
def gpu(monkeypatch) -> type[Worker]:
    Worker.made = []
    monkeypatch.setattr(module, "IsolatedTimer", Worker)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return Worker


def test_the_user_s_table_is_the_default(capsys, here, gpu) -> None:
    code, out, _ = command(capsys, "autotune", *SHAPES, "--budget", "0.5")
    own = fingerprint(H200)
    assert own is not None and code == 0 and out.startswith("tuned on NVIDIA H200")
    path = here / "cache" / "fewbit" / "tuned" / f"{own.name}.json"
    written = read_table(path)
    assert written.driver == "580.65" and ("sm_mhz", "1980") in written.method
    assert any(entry.measured for row in written.rows for entry in row.ladder)
    (worker,) = gpu.made
    assert worker.closed and worker.predicted is predicted_seconds


def test_an_interrupt_says_that_it_resumes(capsys, here, gpu, monkeypatch) -> None:
    def stops(self, posed, candidate):
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "verify", stops)
    code, _, err = command(capsys, "autotune", *SHAPES)
    assert code == 130 and "the same command resumes" in err and gpu.made[0].closed


def test_a_dry_run_for_the_gpu_at_hand(capsys, gpu) -> None:
    code, out, _ = command(capsys, "autotune", "--dry-run", *SHAPES)
    assert code == 0 and out.startswith("dry run for NVIDIA H200") and gpu.made[0].closed


def test_predictions() -> None:
    shapes = module.load_shapes("mine.json")
    (posed, *_) = module._families(Request(formats="w4a16"), shapes, load_device("h200"))
    found = survivors(posed, KERNELS)
    first, last = found.ranked[0], found.ranked[-1]
    assert predicted_seconds(posed, first.candidate) == pytest.approx(64 * first.seconds)
    assert predicted_seconds(posed, last.candidate) > 64 * first.seconds
    assert predicted_seconds(posed, Candidate("reference")) >= 0.0
