"""Whole runs on a device that is not there: tables, budgets, crashes, resumption, dry runs."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fewbit.quant import autotune as module
from fewbit.quant import dispatch, reference
from fewbit.quant.autotune import Settings, autotune
from fewbit.quant.autotune_report import Silent
from fewbit.quant.compile_pool import CompileFailure
from fewbit.quant.errors import NoKernelError, TableError, TuningError
from fewbit.quant.kernel import Compiled
from fewbit.quant.ladder import Candidate
from fewbit.quant.machine import load_device
from fewbit.quant.search import survivors
from fewbit.quant.timing import Fault
from fewbit.quant.tuned import Tables
from fewbit.quant.tuned_file import Layered, append_rows, read_table, this_toolchain
from fewbit.quant.tuned_table import Quarantined
from fewbit.quant.tuning_worker import IsolatedTimer
from simulated_device import KERNELS, Shares, SimulatedDevice, truth
from tuned_tables import H200 as PRESENT
from tuned_tables import problem, row, table

H200 = replace(PRESENT, present=False)
FAMILY, OTHER = problem(m=1, machine=H200), problem(n=8192, m=1, machine=H200)
SIZES = FAMILY.buckets
COMPILABLE = tuple(replace(kernel, compile=lambda *a: ()) for kernel in KERNELS)
ALIKE = Shares(
    0.2, 0.5, 0.3, 0.0
)  # nothing of one config alone, which would be drawn anew for each M


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The made-up kernels and the reference are all that there are."""

    def use(*known):
        named = {kernel.name: kernel for kernel in (*known, reference.KERNEL)}
        monkeypatch.setattr(dispatch, "kernels", lambda: named)
        monkeypatch.setattr(module, "kernels", lambda: named)

    use(*COMPILABLE)
    return use


def builder(jobs, n_jobs, progress):
    """Compiles everything; tiles of 128 x 256 with 4 warps spill, those with 5 stages fail."""
    found = {}
    for job in jobs:
        choice = dict(job.config)
        spills = (choice.get("block_m"), choice["block_n"], choice["warps"]) == (128, 256, 4)
        made = Compiled(64, 64 if spills else 0, 32 << 10, 32 * choice["warps"], repr(job.config))
        failed = choice.get("stages") == 5
        found[job] = CompileFailure("ERROR", "ptxas says no") if failed else (made,)
    progress(len(found), len(found))
    return found


def device(seed: int = 0) -> SimulatedDevice:
    """Times of each problem: the model's, with errors that are alike for all sizes."""
    tables = {}

    def of(posed):
        if posed not in tables:
            tables[posed] = truth(survivors(posed, KERNELS).model, seed, 0.9, ALIKE)
        return tables[posed]

    return SimulatedDevice({}, seed, of)


def run(timer, out: Path | None, *families, clock=None, **options):
    """One run; the clock is the device's unless it is given."""
    settings = Settings(out=out, **options)
    now = clock or (lambda: timer.clock if timer else 0.0)
    return autotune(families or [FAMILY], timer, settings, builder=builder, clock=now)


def ladder(out: Path, family=FAMILY):
    (found,) = (row.ladder for row in read_table(out).rows if row.family == family.family)
    return {entry.size: entry for entry in found}


# ---- what it does ---------------------------------------------------------------------------


def test_a_family_is_tuned_and_kept(tmp_path) -> None:
    out, timer = tmp_path / "t.json", device()
    report = run(timer, out)
    assert [result.problem.size for result in report.results] == list(SIZES)
    assert report.n_skipped == report.n_left == 0 and not report.is_dry
    entries = ladder(out)
    for result in report.results:
        entry = entries[result.problem.size]
        assert entry.measured and entry.verified == "rel 1.0e-03" and entry.source
        assert entry.p10 <= entry.us <= entry.p90 and entry.digest and entry.model_us
        assert result.after.kernel == entry.kernel and result.share is not None
        assert result.n_timed <= max(32, 0.15 * len(result.found.ranked))
        true = timer._of(result.problem)
        best = min(true[scored.candidate] for scored in result.found.ranked
                   if not timer.fate(scored.candidate))  # fmt: skip
        assert true[Candidate(entry.kernel, entry.config)] <= 1.1 * best
        assert result.gain is None or result.gain > 0.97


def test_what_spills_or_does_not_compile_is_never_run(tmp_path) -> None:
    timer = device()
    report = run(timer, None)
    for _, candidate in timer.verified:
        choice = dict(candidate.config)
        assert choice.get("stages") != 5
        assert (choice.get("block_m"), choice["block_n"], choice["warps"]) != (128, 256, 4)
    last = report.results[-1].found
    assert last.failed and last.spilled and report.out is None
    assert report.failures == (("ERROR ptxas says no", 24),)


def test_it_decides_from_then_on(tmp_path) -> None:
    out = tmp_path / "t.json"
    run(device(), out)
    tables = Tables((Layered("user", str(out), read_table(out)),), this_toolchain())
    found = dispatch.explain(FAMILY.at(64), tables=tables)
    entry = ladder(out)[64]
    assert (found.origin, found.candidate) == ("table", Candidate(entry.kernel, entry.config))
    again = autotune(
        [FAMILY], device(), Settings(), tables=tables, builder=builder, clock=lambda: 0.0
    )
    assert {result.origin for result in again.results} == {"table"}
    assert sum(result.before == Candidate(result.after.kernel, result.after.config)
               for result in again.results) >= 16  # fmt: skip


# ---- resumption -----------------------------------------------------------------------------


def test_finished_rows_are_skipped(tmp_path) -> None:
    out = tmp_path / "t.json"
    run(device(), out)
    before = out.read_bytes()
    timer = device()
    again = run(timer, out)
    assert again.results == () and again.n_skipped == len(SIZES) and again.n_binaries == 0
    assert timer.n_samples == 0 and out.read_bytes() == before
    more = run(timer, out, FAMILY, OTHER, FAMILY)
    assert {result.problem.family for result in more.results} == {OTHER.family}
    assert len(read_table(out).rows) == 2 and more.n_skipped == len(SIZES)


def test_a_budget_ends_a_run_and_the_next_goes_on(tmp_path) -> None:
    out = tmp_path / "t.json"
    timer = device()
    first = run(timer, out, budget_seconds=40.0)
    assert 0 < first.n_left < len(SIZES) and timer.clock < 80
    entries = ladder(out)
    n_measured = sum(entry.measured for entry in entries.values())
    assert n_measured == len(SIZES) - first.n_left and list(entries) == list(SIZES)
    left = [entry for entry in entries.values() if not entry.measured]
    assert all(entry.verified == "" and entry.us > 0 for entry in left)
    second = run(device(1), out)
    assert [r.problem.size for r in second.results] == [entry.size for entry in left]
    after = ladder(out)
    assert all(entry.measured for entry in after.values())
    assert all(after[size] == entry for size, entry in entries.items() if entry.measured)


def test_no_row_of_a_family_that_was_not_begun(tmp_path) -> None:
    out = tmp_path / "t.json"
    report = run(device(), out, FAMILY, OTHER, budget_seconds=40.0)
    assert [row.family for row in read_table(out).rows] == [FAMILY.family]
    assert report.n_left > len(SIZES)


def test_an_interrupted_run_keeps_what_it_finished(tmp_path) -> None:
    out = tmp_path / "t.json"

    class Stops(SimulatedDevice):
        def verify(self, posed, candidate):
            if posed.size == 16:
                raise KeyboardInterrupt
            return super().verify(posed, candidate)

    timer = Stops({}, 0, device()._of)
    with pytest.raises(KeyboardInterrupt):
        run(timer, out)
    assert [size for size, entry in ladder(out).items() if entry.measured] == [1, 2, 4, 8]
    assert [result.problem.size for result in run(device(), out).results] == list(SIZES[4:])


def test_a_device_that_fails_keeps_what_was_finished(tmp_path) -> None:
    out = tmp_path / "t.json"

    class Breaks(SimulatedDevice):
        def sample(self, posed, candidates, n):
            if posed.size == 4:
                raise TuningError("the device is in a bad state")
            return super().sample(posed, candidates, n)

    with pytest.raises(TuningError):
        run(Breaks({}, 0, device()._of), out)
    assert [size for size, entry in ladder(out).items() if entry.measured] == [1, 2]


def test_an_edited_kernel_is_tuned_again(tmp_path, kernels) -> None:
    out = tmp_path / "t.json"
    run(device(), out)
    small = {size for size, entry in ladder(out).items() if entry.kernel == "sim_gemv"}
    kernels(COMPILABLE[0], replace(COMPILABLE[1], source="edited"))
    report = run(device(), out)
    assert {result.problem.size for result in report.results} == small


# ---- faults ---------------------------------------------------------------------------------


def test_faults_are_quarantined_and_not_run_again(tmp_path) -> None:
    out = tmp_path / "t.json"
    report = run(device(), out)
    faults = [fault for result in report.results for fault in result.faults]
    named = {(fault.candidate.kernel, fault.candidate.config) for fault in faults}
    assert len(named) == len(faults) >= 5  # each once, whatever the bucket
    kept = {(q.kernel, q.config): q for q in read_table(out).quarantine}
    assert kept.keys() == named
    assert {q.why.split()[0] for q in kept.values()} <= {"DEATH", "TIMEOUT", "WRONG"}
    timer = device()
    run(timer, out, OTHER)
    assert not {(c.kernel, c.config) for _, c in timer.verified} & named


def test_where_everything_faults_the_model_s_choice_stays(tmp_path) -> None:
    out = tmp_path / "t.json"

    class Wrong(SimulatedDevice):
        def verify(self, posed, candidate):
            if posed.size == 16:
                raise Fault(candidate, "WRONG", "rel 1")
            return super().verify(posed, candidate)

    report = run(Wrong({}, 0, device()._of), out)
    (result,) = (result for result in report.results if result.problem.size == 16)
    assert not result.after.measured and result.n_timed >= 3
    assert Candidate(result.after.kernel, result.after.config) not in {
        fault.candidate for fault in result.faults
    }
    assert [size for size, entry in ladder(out).items() if not entry.measured] == [16]


def test_a_worker_that_really_dies(tmp_path, monkeypatch, kernels) -> None:
    """Through `IsolatedTimer`: one config kills its process, one raises, one is wrong."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    hows = (0, 10, 11, 12, 2, 3, 5)  # best first by the model
    gemm = replace(
        COMPILABLE[0],
        name="gemm",
        configs=lambda posed: tuple((("how", how),) for how in hows),
        seconds=lambda posed, config, compiled=None: 1e-5 * (1 + hows.index(config[0][1]) / 9),
        compile=None,
    )
    kernels(gemm)
    out, timer = tmp_path / "t.json", IsolatedTimer("fake_backends:FakeTimer", least_s=30.0)
    try:
        report = run(timer, out, clock=lambda: 0.0)
    finally:
        timer.close()
    assert all(result.after.measured for result in report.results)
    assert {(dict(q.config)["how"], q.why.split()[0]) for q in read_table(out).quarantine} == {
        (2, "DEATH"), (3, "FAULT"), (5, "WRONG"),
    }  # fmt: skip


# ---- dry runs -------------------------------------------------------------------------------


def test_a_dry_run_ranks_everything(tmp_path) -> None:
    out = tmp_path / "t.json"
    report = run(None, out)
    assert report.is_dry and len(report.results) == len(SIZES)
    for result in report.results:
        assert 0 < len(result.finalists) <= 32 and result.n_timed == 0
        assert all(scored.compiled[0].registers for scored in result.finalists)
        first = result.found.ranked[0]
        assert result.after.us == pytest.approx(first.seconds * 1e6)
        assert result.before_seconds is None and not result.after.measured
    assert not any(entry.measured for entry in ladder(out).values())
    assert not read_table(out).method


def test_a_dry_run_leaves_measured_entries(tmp_path) -> None:
    out = tmp_path / "t.json"
    run(device(), out, budget_seconds=40.0)
    before = ladder(out)
    report = run(None, out)
    assert 0 < len(report.results) < len(SIZES)
    after = ladder(out)
    assert all(after[size] == entry for size, entry in before.items() if entry.measured)


def test_a_dry_run_writes_no_file_of_its_own(tmp_path) -> None:
    run(None, None)
    assert list(tmp_path.iterdir()) == []


def test_an_estimated_row_is_tuned_later(tmp_path) -> None:
    out = tmp_path / "t.json"
    run(None, out)
    assert len(run(device(), out).results) == len(SIZES)
    assert all(entry.measured for entry in ladder(out).values())


# ---- bad input ------------------------------------------------------------------------------


def never(jobs, n_jobs, progress):
    raise AssertionError("nothing may be compiled")


def refused(error, match, out, *families):
    timer = device()
    with pytest.raises(error, match=match):
        autotune(families or [FAMILY], timer, Settings(out=out), builder=never)
    assert timer.n_samples == 0


def test_tables_that_cannot_be_gone_on_with_are_found_first(tmp_path) -> None:
    out = tmp_path / "t.json"
    append_rows(out, table(machine=load_device("b200")))
    before = out.read_bytes()
    refused(TableError, "give another file", out)
    assert out.read_bytes() == before
    out.write_text(json.dumps({"schema": 3}))
    refused(TableError, "update fewbit", out)
    out.write_text("{")
    refused(TableError, "t.json", out)
    assert out.read_text() == "{"


def test_machines_that_there_are_no_tables_for() -> None:
    cpu = load_device("cpu")
    refused(TuningError, "tables are for GPUs", None, problem(machine=cpu))
    refused(TuningError, "one machine, got 2", None, FAMILY, problem(machine=load_device("b200")))
    refused(TuningError, "whose facts are known", None, problem(machine=None))


def test_no_compiler() -> None:
    def fails(jobs, n_jobs, progress):
        return {job: CompileFailure("ERROR", "no Triton here") for job in jobs}

    with pytest.raises(NoKernelError, match="no Triton here"):
        autotune([FAMILY], None, Settings(), builder=fails)


def test_a_whole_kernel_in_quarantine(tmp_path) -> None:
    out = tmp_path / "t.json"
    fault = Quarantined("sim_gemv", (), COMPILABLE[1].source, "DEATH three times")
    append_rows(out, table(row(OTHER), machine=H200, quarantine=(fault,)))
    report = run(None, out)
    assert all(result.after.kernel == "sim_gemm" for result in report.results)
    assert report.results[0].found.quarantined == 36


def test_progress_counts_to_the_end(tmp_path) -> None:
    class Counts(Silent):
        def __init__(self) -> None:
            self.binaries, self.problems = [], []

        def compiled(self, done, total):
            self.binaries.append((done, total))

        def searched(self, done, total, result):
            self.problems.append((done, total))

    counts = Counts()
    autotune([FAMILY, OTHER], None, Settings(), progress=counts, builder=builder)
    assert counts.problems == [(i + 1, 36) for i in range(36)]
    assert counts.binaries[-1][0] == counts.binaries[-1][1] > 0
    assert math.isfinite(autotune([FAMILY], None, builder=builder).seconds)
