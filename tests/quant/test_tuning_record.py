"""The table that a run goes on with: what counts as finished, what is added, what is refused."""

import json
from dataclasses import replace

import pytest

from fewbit.quant import tuning_record
from fewbit.quant.errors import TableError, TuningError
from fewbit.quant.kernel import Compiled
from fewbit.quant.ladder import Candidate
from fewbit.quant.machine import load_device
from fewbit.quant.search import Outcome, Scored, Survivors, Timed
from fewbit.quant.timing import Fault
from fewbit.quant.tuned_file import append_rows, read_table, this_toolchain
from fewbit.quant.tuned_table import code_digest
from fewbit.quant.tuning_record import Record, measured_entry, modelled_entry
from tuned_tables import CONFIG, FAULT, H200, KNOWN, entry, problem, row, table

FAMILY = problem(m=1)


def fresh_row(**facts):
    return row(FAMILY, toolchain=this_toolchain(), **facts)


def record(path, kernels=KNOWN):
    return Record(path, H200, kernels)


def test_what_is_measured_and_fresh_is_kept(tmp_path):
    path = tmp_path / "t.json"
    assert record(path).kept(FAMILY) == {}
    append_rows(path, table(fresh_row()))
    kept = record(path).kept(FAMILY)
    assert list(kept) == list(FAMILY.buckets) and kept[16] == entry(16)
    assert record(path).kept(problem(n=8192)) == {}
    changed = KNOWN | {"gemv": replace(KNOWN["gemv"], source="v2")}
    assert min(record(path, changed).kept(FAMILY)) == 16  # smaller ones are of gemv
    assert record(path, {"gemv": KNOWN["gemv"]}).kept(FAMILY).keys() == {1, 2, 4, 8}
    assert Record(None, H200, KNOWN).kept(FAMILY) == {}


def test_estimates_and_other_compilers_are_not_kept(tmp_path):
    path = tmp_path / "t.json"
    append_rows(path, table(fresh_row(measured=False, verified="")))
    assert record(path).kept(FAMILY) == {}
    other = tmp_path / "u.json"
    append_rows(other, table(row(FAMILY, toolchain=(("triton", "2.0.0"),))))
    assert record(other).kept(FAMILY) == {}


def test_quarantined_entries_are_not_kept(tmp_path):
    path = tmp_path / "t.json"
    append_rows(path, table(fresh_row(), quarantine=(FAULT,)))
    found = record(path)
    assert found.quarantined(KNOWN["gemm"], FAULT.config)
    assert not found.quarantined(KNOWN["gemm"], CONFIG)
    assert not found.quarantined(replace(KNOWN["gemm"], source="g2"), FAULT.config)
    assert max(found.kept(FAMILY)) < 256  # larger ones are of that config
    whole = replace(FAULT, config=())
    append_rows(path, table(fresh_row(), quarantine=(whole,)))
    assert record(path).quarantined(KNOWN["gemm"], CONFIG)


def test_saving_adds_and_never_loses(tmp_path):
    path = tmp_path / "deep" / "t.json"
    other = row(problem(n=8192))
    append_rows(path, table(other))
    found = record(path)
    found.describe("590.1", (("stat", "median"),))
    bad = Candidate("gemm", (("block_n", 64),))
    found.keep([Fault(bad, "DEATH", "signal 11"), Fault(bad, "DEATH", "not run: it is benched")])
    ladder = [entry(size) for size in FAMILY.buckets]
    found.save(FAMILY, ladder)
    again = [replace(entry(size), us=1.5) for size in FAMILY.buckets]
    found.save(FAMILY, again)  # within the same second
    written = read_table(path)
    rows = {r.family: r for r in written.rows}
    assert rows[FAMILY.family].ladder[3].us == 1.5 and rows[other.family] == other
    assert [(q.config, q.why) for q in written.quarantine] == [(bad.config, "DEATH signal 11")]
    assert (written.driver, written.method) == ("590.1", (("stat", "median"),))
    assert found.kept(FAMILY)[16].us == 1.5 == record(path).kept(FAMILY)[16].us


def test_nothing_is_saved_without_a_file():
    Record(None, H200, KNOWN).save(FAMILY, [entry(size) for size in FAMILY.buckets])


def test_tables_that_cannot_be_gone_on_with(tmp_path):
    path = tmp_path / "t.json"
    append_rows(path, table(machine=load_device("b200")))
    before = path.read_bytes()
    with pytest.raises(TableError, match=r"holds a table of sm100.*this GPU is sm90-132.*-o"):
        record(path)
    assert path.read_bytes() == before
    path.write_text(json.dumps({"schema": 99}))
    with pytest.raises(TableError, match="got 99; update fewbit"):
        record(path)
    path.write_text('{"schema":2,')
    with pytest.raises(TableError):
        record(path)
    with pytest.raises(TableError, match="cannot be read"):
        record(tmp_path)


def test_no_gpu():
    with pytest.raises(TuningError, match="tables are for GPUs"):
        Record(None, load_device("cpu"), {})


@pytest.mark.parametrize(
    ("now", "earlier", "stamp"),
    [
        ("2026-11-02T10:00:00Z", "", "2026-11-02T10:00:00Z"),
        ("2026-11-02T10:00:00Z", "2026-11-02T09:59:59Z", "2026-11-02T10:00:00Z"),
        ("2026-11-02T10:00:00Z", "2026-11-02T10:00:00Z", "2026-11-02T10:00:01Z"),
        ("2026-11-02T10:00:00Z", "2026-12-31T23:59:59Z", "2027-01-01T00:00:00Z"),
    ],
)
def test_stamps_rise(monkeypatch, now, earlier, stamp):
    monkeypatch.setattr(tuning_record, "utc_now", lambda: now)
    assert tuning_record._stamp_after(earlier) == stamp


# ---- entries --------------------------------------------------------------------------------

MADE = (Compiled(64, 0, 1024, 128, "digest"),)
FOUND = Survivors((Scored(Candidate("gemm", CONFIG), 12e-6, MADE), Scored(Candidate("gemv"), 1.0)))


def test_the_model_s_choice():
    found = modelled_entry(problem(), FOUND, KNOWN)
    assert (found.kernel, found.config, found.us, found.model_us) == ("gemm", CONFIG, 12.0, 10.0)
    assert not found.measured and found.verified == "" and found.digest == code_digest(MADE)
    assert found.runner_up == "gemv ~1000000.0 us" and found.ideal_us > 1 and found.source == "g1"


def test_the_model_chooses_no_kernel_that_needs_proof():
    guarded = replace(FOUND, measured_only=frozenset({"gemm"}))
    assert modelled_entry(problem(), guarded, KNOWN).kernel == "gemv"
    everything = replace(FOUND, measured_only=frozenset({"gemm", "gemv"}))
    assert modelled_entry(problem(), everything, KNOWN).kernel == "gemm"


def test_the_winner_of_a_search():
    winner, second = (
        Timed(Candidate("gemm", CONFIG), 9e-6, 8e-6, 10e-6),
        Timed(Candidate("gemv"), 11e-6, 10e-6, 12e-6),
    )
    outcome = Outcome(winner, 9.1e-4, None, second, {}, 2, ())
    found = measured_entry(problem(), FOUND, outcome, KNOWN)
    assert found is not None and found.measured and found.verified == "rel 9.1e-04"
    assert (found.us, found.p10, found.p90) == pytest.approx((9.0, 8.0, 10.0))
    assert found.model_us == 10.0 and found.runner_up == "gemv 11.0 us"
    assert measured_entry(problem(), FOUND, replace(outcome, winner=None), KNOWN) is None


def test_an_infinite_guess_is_not_written():
    never = {"gemm": replace(KNOWN["gemm"], seconds=lambda *a: float("inf"))}
    assert modelled_entry(problem(), FOUND, never).model_us == 0.0
