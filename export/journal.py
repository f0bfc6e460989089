"""Durable small writes: the journal of a run, and files that are whole or absent.

The journal `fewbit.journal` holds one line for each event, `<json>\\t<crc32c hex>\\n`: the identity
of the run, each finished unit (its tensors' places and checksums, and its report rows), each closed
shard, the names of the files to be copied beside the shards. A last line without its newline is a
torn write and is dropped; any other damage is an error.
While a run holds the journal open, no other process can write to the same folder.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import google_crc32c

from ..quant.errors import CheckpointError

JOURNAL = "fewbit.journal"


@contextmanager
def named_os_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk and other failures of the system into one named error."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"{folder}: the disk is full; what is finished is kept: free some space and run "
                f"the same command again to resume"
            ) from error
        raise CheckpointError(
            f"{folder}: cannot write ({error.strerror or error}); what is finished is kept: run "
            f"the same command again to resume"
        ) from error


class Journal:
    """The append-only record of a run. See the module's text for the line format."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None

    def open(self) -> None:
        """Read what is there, drop a torn last line, lock, and append from there on."""
        file = self._locked()
        file.seek(0)
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.events = [_parse_line(self.path, i, line) for i, line in enumerate(_lines(whole))]
        if len(whole) != len(data):
            file.truncate(len(whole))

    def salvage(self) -> None:
        """Lock, and read the lines that are whole; damaged ones are passed over, not an error."""
        file = self._locked()
        file.seek(0)
        self.events = []
        for index, line in enumerate(_lines(file.read())):
            with suppress(CheckpointError, ValueError):
                self.events.append(_parse_line(self.path, index, line))

    def clear(self) -> None:
        """Forget what is there, whatever it is; the lock is held until `close`."""
        self._locked().truncate(0)
        self.events = []

    def _locked(self) -> IO[bytes]:
        if self._file is not None:
            return self._file
        file = open(self.path, "a+b")  # noqa: SIM115 - held for the life of the run
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise CheckpointError(
                f"{self.path.parent}: another fewbit process is writing here; wait for it, or "
                f"choose another output folder"
            ) from error
        self._file = file
        return file

    def append(self, event: dict[str, Any]) -> None:
        """Write one event and make it durable."""
        if self._file is None:
            raise CheckpointError(f"{self.path}: the journal is not open")
        body = json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode()
        self._file.write(body + b"\t" + f"{google_crc32c.value(body):08x}".encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.events.append(event)

    def close(self) -> None:
        """Release the lock."""
        if self._file is not None:
            with suppress(OSError):  # of a full disk: a torn line is dropped by the next `open`
                self._file.close()
            self._file = None


def _lines(data: bytes) -> list[bytes]:
    return data.split(b"\n")[:-1]


def _parse_line(path: Path, index: int, line: bytes) -> dict[str, Any]:
    body, _, checksum = line.rpartition(b"\t")
    if f"{google_crc32c.value(body):08x}".encode() != checksum:
        raise CheckpointError(
            f"{path}: line {index + 1} is damaged (checksum differs); start over with --restart"
        )
    event = json.loads(body)
    if not isinstance(event, dict):
        raise CheckpointError(f"{path}: line {index + 1} is not an event; use --restart")
    return event


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """A small file, whole or absent: temporary name, fsync, rename."""
    temporary = path.with_name(path.name + ".partial")
    with named_os_errors(path.parent):
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
