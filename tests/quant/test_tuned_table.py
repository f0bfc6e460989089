"""Tuned tables as facts: what a device is known by, rungs, merging."""

import itertools
import random
from dataclasses import replace

import pytest

from fewbit.quant.errors import TableError
from fewbit.quant.kernel import Compiled
from fewbit.quant.ladder import Candidate
from fewbit.quant.machine import device_names, load_device
from fewbit.quant.tuned_table import (
    Fingerprint,
    Quarantined,
    code_digest,
    fingerprint,
    merge,
    utc_now,
)
from tuned_tables import FAULT, H200, entry, problem, row, table


def test_described_gpus_are_told_apart_and_cpus_have_no_tables():
    found = [fingerprint(load_device(name)) for name in device_names()]
    assert [f for f in found if f is None] == [None]  # the CPU
    gpus = [f for f in found if f is not None]
    for a, b in itertools.combinations(gpus, 2):
        assert not a.matches(b) and a.name != b.name
    assert fingerprint(H200) == Fingerprint((9, 0), 132, 50, 14, 24)
    assert fingerprint(H200).name == "sm90-132-l50-m14-b24"


def test_a_name_decides_nothing_and_multiprocessors_do():
    board = replace(H200, name="gh200", title="NVIDIA GH200 480GB")
    assert fingerprint(board) == fingerprint(H200)
    slice_of_it = replace(H200, sms=60)
    assert not fingerprint(slice_of_it).matches(fingerprint(H200))


def test_what_is_not_known_matches_anything():
    undescribed = replace(H200, bandwidth_bytes_per_second=None, l2_bytes=None)
    found = fingerprint(undescribed)
    assert found.bandwidth_class is None and found.name == "sm90-132-m14"
    assert found.matches(fingerprint(H200)) and fingerprint(H200).matches(found)


def test_a_rung_holds_all_neighbouring_sizes_of_one_choice():
    found = row()
    first, second = (("block_n", 128), ("split_k", 2)), (("block_n", 256), ("split_k", 1))
    for size, expected in {
        1: (1, 8, Candidate("gemv", first)),
        8: (1, 8, Candidate("gemv", first)),
        16: (9, 192, Candidate("gemm", first)),
        192: (9, 192, Candidate("gemm", first)),
        256: (193, 4096, Candidate("gemm", second)),
        4096: (193, 4096, Candidate("gemm", second)),
    }.items():
        rung = found.rung(size)
        assert (rung.first, rung.last, rung.candidate) == expected
    assert found.entry(9).size == 16 and found.entry(10**6).size == 4096


def test_the_newer_row_of_a_family_is_kept():
    old, new = row(us=9.0), row(us=11.0, tuned_at="2026-11-02T10:00:01Z")
    other = row(problem(n=8192))
    merged = merge(table(old, other), table(new))
    assert set(merged.rows) == {new, other}
    assert merge(table(new), table(old, other)) == merged


def test_merging_does_not_depend_on_order_or_repetition():
    draw = random.Random(0)
    problems = [problem(n=n) for n in (1024, 2048, 4096)]
    for _ in range(50):
        tables = [
            table(
                *(
                    row(p, f"2026-11-02T10:00:0{draw.randrange(3)}Z", us=float(draw.randrange(3)))
                    for p in draw.sample(problems, draw.randint(1, 3))
                ),
                quarantine=tuple(
                    Quarantined("gemm", (), "g1", draw.choice(["TIMEOUT", "DEATH"]))
                    for _ in range(draw.randrange(2))
                ),
                driver=draw.choice(["a", "b"]),
            )
            for _ in range(3)
        ]
        a, b, c = tables
        assert merge(a, b) == merge(b, a)
        assert merge(merge(a, b), c) == merge(a, merge(b, c))
        assert merge(merge(a, a), a) == merge(a, a)
        assert merge(merge(a, b), b) == merge(a, b)


def test_the_header_is_that_of_the_newest_row():
    old, new = table(driver="z"), table(row(tuned_at="2027-01-01T00:00:00Z"), driver="a")
    assert merge(old, new).driver == merge(new, old).driver == "a"


def test_every_quarantined_config_is_kept_once():
    other = replace(FAULT, source="g2")
    merged = merge(table(quarantine=(FAULT, FAULT)), table(quarantine=(other, FAULT)))
    assert merged.quarantine == (FAULT, other)


def test_tables_of_two_devices_are_not_merged():
    with pytest.raises(TableError, match=r"sm90-132.* and sm80-108"):
        merge(table(), table(machine=load_device("a100-80gb")))


def test_one_digest_for_all_binaries_of_a_config():
    a, b = Compiled(64, 0, 0, 128, "a"), Compiled(64, 0, 0, 128, "b")
    assert code_digest(()) == ""
    assert len({code_digest((a,)), code_digest((a, b)), code_digest((b, a)), ""}) == 4


def test_time_stamps_sort_as_text():
    assert len(utc_now()) == len("2026-11-02T10:00:00Z") and utc_now() > "2026-01-01T00:00:00Z"
    assert entry(1).measured
