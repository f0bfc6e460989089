"""The journal: events come back, torn tails are dropped, damage is named, one process writes."""

import json

import pytest

from fewbit.export.journal import JOURNAL, Journal, write_atomic
from fewbit.quant.errors import CheckpointError


def reopen(folder):
    journal = Journal(folder / JOURNAL)
    try:
        journal.open()
    finally:
        journal.close()
    return journal.events


def filled(folder, n=3):
    journal = Journal(folder / JOURNAL)
    journal.open()
    for index in range(n):
        journal.append({"event": "unit", "index": index, "text": "ü\t\n"})
    journal.close()
    return (folder / JOURNAL).read_bytes()


def test_events_come_back(tmp_path):
    filled(tmp_path)
    assert [event["index"] for event in reopen(tmp_path)] == [0, 1, 2]
    assert reopen(tmp_path)[0]["text"] == "ü\t\n"


def test_golden_line(tmp_path):
    journal = Journal(tmp_path / JOURNAL)
    journal.open()
    journal.append({"a": 1})
    journal.close()
    assert (tmp_path / JOURNAL).read_bytes() == b'{"a":1}\tcff7d56a\n'


def test_every_truncation_keeps_the_whole_lines(tmp_path):
    data = filled(tmp_path)
    for length in range(len(data)):
        (tmp_path / JOURNAL).write_bytes(data[:length])
        assert len(reopen(tmp_path)) == data[:length].count(b"\n")
        assert (tmp_path / JOURNAL).stat().st_size == data[:length].rfind(b"\n") + 1


def test_every_flip_is_named_or_drops_the_tail(tmp_path):
    data = filled(tmp_path)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x11
        (tmp_path / JOURNAL).write_bytes(bytes(damaged))
        if position == len(data) - 1:  # the last newline: a torn line
            assert len(reopen(tmp_path)) == 2
            continue
        with pytest.raises(CheckpointError, match="--restart"):
            reopen(tmp_path)


def test_one_process_writes(tmp_path):
    first = Journal(tmp_path / JOURNAL)
    first.open()
    with pytest.raises(CheckpointError, match="another fewbit process"):
        Journal(tmp_path / JOURNAL).open()
    first.close()
    assert reopen(tmp_path) == []


def test_append_needs_an_open_journal(tmp_path):
    with pytest.raises(CheckpointError, match="not open"):
        Journal(tmp_path / JOURNAL).append({})


def test_write_atomic_leaves_no_partial(tmp_path):
    write_atomic(tmp_path / "a.json", b"{}")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_bytes()) == {}
