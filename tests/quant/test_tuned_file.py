"""Tuned tables on disk: appending under a lock, killed writers, layers, the environment."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from fewbit.quant import tuned_file
from fewbit.quant.errors import TableError
from fewbit.quant.machine import load_device
from fewbit.quant.tuned_file import (
    append_rows,
    environment,
    load_layers,
    read_table,
    this_toolchain,
    user_table,
)
from fewbit.quant.tuned_table import fingerprint, merge
from fewbit.quant.tuned_text import table_text
from tuned_tables import FAULT, problem, row, table

TESTS = Path(__file__).resolve().parent.parent
OTHER = table(row(problem(n=8192)), machine=load_device("a100-80gb"))


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Layers of a process that has none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FEWBIT_SITE_TABLES", str(tmp_path / "site"))
    for name in ("FEWBIT_TABLE", "FEWBIT_AUTOTUNE", "TRITON_PTXAS_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tuned_file, "_WARNED", set())
    this_toolchain.cache_clear()
    yield
    this_toolchain.cache_clear()


# ---- one file -------------------------------------------------------------------------------


def test_appending_creates_merges_and_keeps_what_is_newer(tmp_path):
    path = tmp_path / "new" / "folder" / "table.json"
    first = append_rows(path, table(row(us=9.0), quarantine=(FAULT,)))
    assert read_table(path) == first
    newer = row(us=11.0, tuned_at="2026-11-03T00:00:00Z")
    other = row(problem(n=8192))
    found = append_rows(str(path), table(newer, other))
    assert found.rows == (newer, other) and found.quarantine == (FAULT,)
    assert append_rows(path, table(row(us=9.0))) == found == read_table(path)
    assert path.read_text() == table_text(found)
    assert sorted(p.name for p in path.parent.iterdir()) == ["table.json", "table.json.lock"]


def test_rows_that_were_not_verified_do_not_enter(tmp_path):
    with pytest.raises(TableError, match=r"rows for .*: measured must be 0, or 1 of an entry that"):
        append_rows(tmp_path / "t.json", table(row(verified="")))
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema":3}', "schema must be 2, got 3; update fewbit"),
        (b"", "not valid JSON, or cut short"),
        (b"\xff\xfe", "cannot be read"),
        (table_text(table())[:500].encode(), "not valid JSON, or cut short"),
        (table_text(table()).replace("580.65", "1").encode(), "not what its sha256 says"),
        (table_text(OTHER).encode(), "holds a table of sm80-108.*, got rows of sm90-132"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_named_error_and_stays(tmp_path, content, message):
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(TableError, match=f"t.json: .*{message}"):
        append_rows(path, table())
    assert path.read_bytes() == content


def test_what_cannot_be_read_or_written(tmp_path):
    with pytest.raises(TableError, match=r"none.json: cannot be read: .*No such file"):
        read_table(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(TableError, match=r"cannot be written"):
        append_rows(tmp_path / "file" / "t.json", table())


def test_a_link_stays_a_link_and_leftovers_of_the_dead_are_removed(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    link.symlink_to(target)
    (tmp_path / ".target.json.123.tmp").write_text("half")
    (tmp_path / ".target.json.bak").write_text("of somebody else")
    append_rows(link, table())
    assert link.is_symlink() and read_table(target) == read_table(link)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [".target.json.bak", "link.json", "target.json", "target.json.lock"]


def test_a_death_before_the_rename_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    before = append_rows(path, table())

    def die(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        append_rows(path, table(row(problem(n=8192))))
    monkeypatch.undo()
    assert read_table(path) == before
    assert len(append_rows(path, table(row(problem(n=2048)))).rows) == 2


WRITER = """
import sys
from tuned_tables import problem, row, table
from fewbit.quant.tuned_file import append_rows
path, log, first, step = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with open(log, "a") as done:
    for n in range(first, 100_000, step):
        append_rows(path, table(row(problem(n=n))))
        print(n, file=done, flush=True)
"""


def test_two_writers_killed_at_random_lose_no_finished_row(tmp_path):
    """Each writer notes a row after `append_rows` returned; 8 are killed, two at a time."""
    path = tmp_path / "t.json"
    draw = random.Random(0)
    environ = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    running = []
    for number in range(8):
        log = tmp_path / f"{number}.log"
        command = [sys.executable, "-c", WRITER, str(path), str(log), str(1 + number), "8"]
        running.append((log, subprocess.Popen(command, env=environ)))
        if len(running) < 2:
            continue
        log, writer = running.pop(0)
        until = time.monotonic() + 60
        while not (log.exists() and log.read_text().count("\n") >= 2):
            assert writer.poll() is None and time.monotonic() < until, "the writer does not write"
            time.sleep(0.01)
        time.sleep(draw.random() * 0.05)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        read_table(path)  # whole at any moment
    for _, writer in running:
        writer.kill()
        writer.wait()
    finished = {int(n) for log in tmp_path.glob("*.log") for n in log.read_text().split()}
    stored = {r.family for r in read_table(path).rows}
    assert len(finished) >= 14
    assert {problem(n=n).family for n in finished} <= stored
    assert len(append_rows(path, table(row(problem(n=99_999)))).rows) == len(stored) + 1


def test_writers_wait_for_each_other(tmp_path):
    path = tmp_path / "t.json"
    threads = [
        threading.Thread(target=append_rows, args=(path, table(row(problem(n=n)))))
        for n in range(1, 13)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_table(path).rows) == 12


# ---- environment and layers -----------------------------------------------------------------


def test_the_environment(tmp_path, monkeypatch):
    found = environment()
    assert (found.mode, found.session) == ("read", None)
    assert found.user == tmp_path / "cache" / "fewbit" / "tuned"
    assert found.site == tmp_path / "site"
    device = fingerprint(load_device("h200"))
    assert user_table(device) == found.user / "sm90-132-l50-m14-b24.json"
    monkeypatch.setenv("FEWBIT_AUTOTUNE", "off")
    monkeypatch.setenv("FEWBIT_TABLE", "a.json")
    monkeypatch.delenv("FEWBIT_SITE_TABLES")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    found = environment()
    assert (found.mode, found.session) == ("off", Path("a.json"))
    assert found.site == Path("/etc/fewbit/tuned")
    assert found.cache == Path("/home/somebody/.cache/fewbit")
    monkeypatch.setenv("FEWBIT_AUTOTUNE", "raed")
    with pytest.raises(TableError, match=r"must be off or read, got 'raed' \(did you mean 'read'"):
        environment()


def test_without_a_home_there_is_no_layer_of_the_user(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert environment().user is None
    assert load_layers(environment()) == ()
    with pytest.raises(TableError, match="set HOME, or XDG_CACHE_HOME to an absolute path"):
        user_table(fingerprint(load_device("h200")))


def test_tools_at_hand(monkeypatch):
    found = dict(this_toolchain())
    assert found["torch"][0] in "23" and list(found) == sorted(found)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/opt/ptxas")
    this_toolchain.cache_clear()
    assert dict(this_toolchain())["ptxas"] == "/opt/ptxas"


def test_layers_come_in_order(tmp_path, monkeypatch):
    tables = {"user": table(), "site": OTHER, "session": table(row(problem(n=2048)))}
    folder = {"user": tmp_path / "cache" / "fewbit" / "tuned", "site": tmp_path / "site"}
    append_rows(folder["user"] / "b.json", tables["user"])
    append_rows(folder["user"] / "a.json", OTHER)
    append_rows(folder["site"] / "a.json", tables["site"])
    (folder["site"] / "README").write_text("no table")
    (folder["site"] / "folder.json").mkdir()
    append_rows(tmp_path / "s.json", tables["session"])
    monkeypatch.setenv("FEWBIT_TABLE", str(tmp_path / "s.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_layers(environment())
    found = [layered for layered in found if layered.layer != "packaged"]
    assert [(f.layer, Path(f.origin).name) for f in found] == [
        ("session", "s.json"), ("user", "a.json"), ("user", "b.json"), ("site", "a.json"),
    ]  # fmt: skip
    assert found[2].table == merge(tables["user"], tables["user"])


def test_a_damaged_file_gives_one_warning(tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "fewbit" / "tuned"
    append_rows(folder / "good.json", table())
    (folder / "newer.json").write_text('{"schema":3}')
    monkeypatch.setenv("FEWBIT_TABLE", str(tmp_path / "missing.json"))
    with pytest.warns(RuntimeWarning) as caught:
        found = load_layers(environment())
        load_layers(environment())
    assert [f.layer for f in found if f.layer != "packaged"] == ["user"]
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert "missing.json ignored: " in texts[0] and "cannot be read" in texts[0]
    assert "newer.json ignored: " in texts[1] and "update fewbit" in texts[1]
    assert all("estimates decide instead" in text for text in texts)


def test_packaged_tables_are_valid():
    settings = replace(environment(), session=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packaged = [f for f in load_layers(settings) if f.layer == "packaged"]
    for layered in packaged:
        assert Path(layered.origin).stat().st_size <= 200_000
        assert Path(layered.origin).stem == layered.table.device.name
