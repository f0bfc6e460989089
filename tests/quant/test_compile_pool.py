"""Compiling in children: hung and dead ones, repeats, results on disk."""

import json
import os
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbit.quant import compile_pool
from fewbit.quant.compile_pool import CompileFailure, Job, compile_all, job_key, known_code
from fewbit.quant.errors import NoKernelError, TuningError
from fewbit.quant.kernel import Compiled, RowsProblem
from fewbit.quant.machine import load_device
from tuned_tables import H200, kernel, problem

TESTS = Path(__file__).resolve().parent.parent
FAKE = "fake_backends:fake_compiler"


@pytest.fixture(autouse=True)
def known(monkeypatch):
    found = {
        k.name: replace(k, compile=lambda problem, config, cc: ())
        for k in (kernel("gemm", "g1"), kernel("other", "o1"))
    }
    found["plain"] = kernel("plain", "p1")
    monkeypatch.setattr(compile_pool, "kernels", lambda: found)
    return found


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Where children note what they compile; nothing is kept from before."""
    path = tmp_path / "log"
    path.write_text("")
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("FAKE_LOG", str(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return path


def job(block_n=64, of=None, name="gemm", cc=(9, 0), **config):
    return Job(name, of or problem(), (("block_n", block_n), *config.items()), cc)


# ---- keys -----------------------------------------------------------------------------------


def test_sizes_machines_and_numbers_of_a_launch_do_not_matter():
    key = job_key(job())
    for same in (
        job(of=problem(n=8192)),
        job(of=problem(k=8192)),
        job(of=problem(m=1)),
        job(of=problem(machine=load_device("b200"))),
        job(split_k=4),
        job(splits=2),
    ):
        assert job_key(same) == key


def test_everything_else_does(known, monkeypatch):
    others = [
        job(block_n=128),
        job(stages=2),
        job(of=problem(bits=3)),
        job(of=problem(group=64)),
        job(of=problem(dtype=torch.float16)),
        job(of=replace(problem(), activation="int8_token")),
        job(of=replace(problem(), n_terms=2)),
        job(cc=(8, 0)),
        job(name="other"),
    ]
    rows = RowsProblem("gemm", None, 16, 64, torch.bfloat16, "cuda", H200)
    others += [job(of=rows), job(of=replace(rows, k=128))]
    keys = {job_key(other) for other in (job(), *others)}
    assert len(keys) == len(others) + 1
    assert job_key(job(of=replace(rows, m_bucket=1))) in keys
    known["gemm"] = replace(known["gemm"], source="g2")
    assert job_key(job()) not in keys
    monkeypatch.setattr(compile_pool, "this_toolchain", lambda: (("triton", "9.9"),))
    newer = job_key(job())
    monkeypatch.setattr(
        compile_pool, "this_toolchain", lambda: (("torch", "9.9"), ("triton", "9.9"))
    )
    assert job_key(job()) == newer


# ---- compiling ------------------------------------------------------------------------------


def test_results_repeats_and_a_second_run_from_disk(log, tmp_path):
    jobs = [job(n, of=problem(n=size), split_k=s)
            for n in (32, 64, 128) for size in (1024, 2048) for s in (1, 2)]  # fmt: skip
    seen = []
    found = compile_all(jobs, 2, progress=lambda done, total: seen.append((done, total)),
                        handler=FAKE)  # fmt: skip
    assert list(found) == jobs
    for asked, compiled in found.items():
        (one,) = compiled
        assert one.registers == 64 and str(asked.config[0][1]) in one.digest
    lines = log.read_text().splitlines()
    assert len(lines) == 3 and all(line.endswith(" 0") for line in lines)  # not in the interpreter
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert known_code(jobs[0]) == found[jobs[0]] and known_code(job(256)) is None

    start = time.monotonic()
    assert compile_all(jobs, 2, handler="fake_backends:broken") == found  # starts no child
    assert time.monotonic() - start < 1.0
    folder = tmp_path / "cache" / "fewbit" / "compiled"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(list(folder.iterdir())) == 3


def test_hung_and_dead_children_cost_their_job_only(log):
    hung, dead, faulty, refused = (job(how=how) for how in (1, 2, 3, 4))
    good = [job(n) for n in (8, 16, 32)]
    start = time.monotonic()
    found = compile_all([good[0], hung, good[1], dead, faulty, refused, good[2]], 2, 2.0,
                        handler=FAKE)  # fmt: skip
    assert time.monotonic() - start < 60
    assert found[hung] == CompileFailure("TIMEOUT", "not compiled within 2 s")
    assert found[dead] == CompileFailure("DEATH", "it ended with signal 9")
    assert found[faulty].why == "ERROR" and "RuntimeError: CUDA error" in found[faulty].text
    assert found[refused] == CompileFailure("ERROR", "no: got 3, needed 4; use another")
    assert all(isinstance(found[job], tuple) for job in good)
    for pid in {int(line.split()[0]) for line in log.read_text().splitlines()}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert known_code(hung) is None and known_code(refused) is None  # failures are not kept


def test_damaged_results_are_compiled_again(log, tmp_path):
    (good,) = compile_all([job()], handler=FAKE).values()
    (path,) = (tmp_path / "cache" / "fewbit" / "compiled").iterdir()
    text = path.read_text()
    content = json.loads(text)
    damaged = ["", text[:-9], "[]", "[3]", "{}", "[" * 100_000, b"\xff",
               *(json.dumps([{**content[0], **change}]) for change in
                 ({"registers": -1}, {"registers": True}, {"digest": None}, {"opcodes": [["a"]]},
                  {"opcodes": 3}, {"more": 1}))]  # fmt: skip
    for raw in damaged:
        path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
        assert known_code(job()) is None, raw
    assert compile_all([job()], handler=FAKE)[job()] == good
    assert path.read_text() == text and known_code(job()) == good


def test_without_a_folder_nothing_is_kept(log, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in ("relative", str(tmp_path / "file")):
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        assert isinstance(compile_all([job()], 1, handler=FAKE)[job()], tuple)
        assert known_code(job()) is None


def test_what_is_asked_wrongly(log):
    assert compile_all([], handler=FAKE) == {}
    with pytest.raises(NoKernelError, match=r"'gem' names no kernel \(did you mean 'gemm'"):
        compile_all([job(name="gem")])
    with pytest.raises(NoKernelError, match="plain has nothing to compile"):
        compile_all([job(name="plain")])
    with pytest.raises(TuningError, match="at least 1 job, got 0"):
        compile_all([job()], 0)
    with pytest.raises(TuningError, match="does not start: ImportError: no module named nothing"):
        compile_all([job()], handler="fake_backends:broken")


def test_the_child_asks_the_kernel_itself(known):
    made = (Compiled(1, 0, 0, 32, "d"),)
    asked = []

    def make(problem, config, cc):
        asked.append((config, cc))
        return list(made)

    known["gemm"] = replace(known["gemm"], compile=make)
    handle = compile_pool.compiler(print)
    assert handle(job()) == made and asked == [((("block_n", 64),), (9, 0))]
    with pytest.raises(NoKernelError, match="nothing to compile"):
        handle(job(name="plain"))
    assert str(job()) == "gemm block_n=64 sm_90"
