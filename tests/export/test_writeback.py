"""Background syncs: one at a time, errors are not lost."""

import errno
import os
import threading

import pytest

from fewbit.export import writeback
from fewbit.export.writeback import Writeback


def test_a_sync_starts_at_each_step(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(writeback, "STEP_BYTES", 100)
    monkeypatch.setattr(os, "fdatasync", calls.append, raising=False)
    found = Writeback()
    for _ in range(10):
        found.wrote(7, 60)
        if found._running:
            found._running.result()
    found.settle()
    found.close()
    assert calls == [7] * 5


def test_a_system_without_fdatasync(monkeypatch):
    """macOS."""
    calls = []
    monkeypatch.setattr(writeback, "STEP_BYTES", 1)
    monkeypatch.delattr(os, "fdatasync", raising=False)
    monkeypatch.setattr(os, "fsync", calls.append)
    found = Writeback()
    found.wrote(7, 1)
    found.settle()
    found.close()
    assert calls == [7]


def test_one_runs_at_a_time(monkeypatch):
    monkeypatch.setattr(writeback, "STEP_BYTES", 1)
    go, calls = threading.Event(), []

    def slow(descriptor):
        calls.append(descriptor)
        go.wait(10)

    monkeypatch.setattr(os, "fdatasync", slow, raising=False)
    found = Writeback()
    for _ in range(5):
        found.wrote(7, 1)
    go.set()
    found.settle()
    assert calls == [7]
    found.close()


def test_errors_are_raised_once_settled(monkeypatch):
    monkeypatch.setattr(writeback, "STEP_BYTES", 1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fdatasync", full, raising=False)
    found = Writeback()
    found.wrote(7, 1)
    with pytest.raises(OSError, match="full"):
        found.settle()
    found.settle()
    found.close()
