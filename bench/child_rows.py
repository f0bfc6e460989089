"""Runs a part of a bench in a child process that hands over its results row by row.

    parent   run_child("module:function", task)   ->   child   function(task) yields rows
             on_row(row) as each arrives          <-           one message a row

A fault of a kernel ruins the CUDA context of its process, and a hang stops it: both end one child, and
the rows that it finished survive. A child is ended when it exceeds its time, or is silent for too long;
what it started ends with it. `quant/child.py` does the talking.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fewbit.quant.child import Beat, Child, Done, Refused

DONE, FAILED, TIMED_OUT = "done", "failed", "timed out"
ROOT = Path(__file__).resolve().parent.parent
_HANDLER = "bench.child_rows:serve_rows"
Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a child did. status: "done", "failed" or "timed out". error: the last line of what it
    printed, or which limit it exceeded; empty if it is done."""

    rows: tuple[Row, ...]
    status: str
    seconds: float
    error: str = ""


def serve_rows(beat: Callable[[Any], None]) -> Callable[[Any], Any]:
    """In the child: answers ("module:function", arguments) with one message for each row."""

    def handle(task: tuple[str, tuple[Any, ...]]) -> None:
        module, _, name = task[0].partition(":")
        rows: Iterable[Row] = getattr(import_module(module), name)(*task[1])
        for row in rows:
            beat(row)

    return handle


def run_child(
    function: str,
    arguments: tuple[Any, ...],
    seconds: float,
    silence_seconds: float | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
    environment: Mapping[str, str] = {},
) -> Outcome:
    """Rows of `function` ("module:name", called with `arguments`) in a child that gets `seconds`, of
    which at most `silence_seconds` without a new row. Starting it counts. environment: beside ours."""
    started = time.monotonic()
    child = Child(_HANDLER, {**_paths(), **environment})
    rows: list[Row] = []
    try:
        child.send((function, arguments))
        status, error = _listen(child, rows, started + seconds, silence_seconds, on_row)
    finally:
        child.kill()
    return Outcome(tuple(rows), status, time.monotonic() - started, error)


def _listen(
    child: Child,
    rows: list[Row],
    deadline: float,
    silence: float | None,
    on_row: Callable[[Row], None],
) -> tuple[str, str]:
    """(status, error) at the child's end. The first answer says that it is ready."""
    ready = False
    while True:
        left = max(0.0, deadline - time.monotonic())
        message = child.receive(left if silence is None else min(left, silence))
        if isinstance(message, Beat):
            rows.append(message.note)
            on_row(message.note)
        elif isinstance(message, Done):
            if ready:
                return DONE, ""
            ready = True
        elif isinstance(message, Refused):
            return FAILED, f"{type(message.error).__name__}: {message.error}"
        elif message is not None:
            return FAILED, message.text
        elif deadline - time.monotonic() <= 0:
            return TIMED_OUT, "its time was up"
        else:
            return TIMED_OUT, f"no row for {silence:.0f} s"


def _paths() -> dict[str, str]:
    """`bench` is not installed, so that the child is told where it lies."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
