"""A Python process that answers one task at a time, and may hang, die or be killed at any moment.

    parent                              child
    Child("module:callable")   start    callable(beat) -> handle
                               ◀──────  Done(None)                 once it is ready
    send(task)                 stdin ▶  handle(task)
    receive(seconds)           ◀──────  Beat(note) ...             signs of life
                               ◀──────  Done(value) | Refused(error)

A message is eight bytes of length, little-endian, and a pickle. What the child prints goes to its
stderr, which the parent keeps and quotes when the child has died.

A `FewbitError` of a task is an answer. Any other exception ends the child at once, without clean-up,
which may hang on a broken GPU. The child ends when its parent does, even in the middle of a task: a
thread of it reads stdin.

The child has a session of its own: what it starts (a compiler) is killed with it, and Ctrl-C reaches
the parent alone. Deliberately not here: when to give up; every caller has its own idea.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import IO, Any

from .errors import FewbitError

_MAIN = "import sys; from fewbit.quant.child import serve; serve(sys.argv[1])"
_FAULT = 70  # exit status after an exception
_END_SECONDS = 5.0  # for an idle child to end by itself

Handle = Callable[[Any], Any]


@dataclass(frozen=True)
class Beat:
    """A sign of life, and what the child is about to do."""

    note: Any


@dataclass(frozen=True)
class Done:
    """The answer to a task."""

    value: Any


@dataclass(frozen=True)
class Refused:
    """The named error that a task ended with; the child goes on."""

    error: FewbitError


@dataclass(frozen=True)
class Gone:
    """The child has ended. fault: by an exception. text: how, with the last line that it printed."""

    fault: bool
    text: str


Message = Beat | Done | Refused | Gone


# ---- parent ---------------------------------------------------------------------------------


class Child:
    """One child process. `handler` names what makes its handle; `environment` is added to ours."""

    def __init__(self, handler: str, environment: Mapping[str, str]) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the child)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _MAIN, handler],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        self._messages: SimpleQueue[Message | None] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def send(self, task: object) -> None:
        """Hand over a task. If the child has ended, the next `receive` says so."""
        try:
            _write(_pipe(self._process.stdin), task)
        except (BrokenPipeError, ValueError):  # ValueError: closed, after `kill`
            return

    def receive(self, seconds: float) -> Message | None:
        """The next message; None if there was none for so long."""
        try:
            message = self._messages.get(timeout=seconds)
        except Empty:
            return None
        if message is None:
            self._messages.put(None)  # for whoever asks again
            return self._gone()
        return message

    def kill(self) -> None:
        """End the child, and what it started, now."""
        if self._process.poll() is None:  # its number is its own until it was waited for
            if sys.platform == "win32":
                self._process.kill()
            else:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._release()

    def close(self) -> None:
        """Let an idle child end by itself; a busy one is killed after five seconds."""
        _pipe(self._process.stdin).close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return
        self._release()

    def _release(self) -> None:
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                _pipe(pipe).close()
            except BrokenPipeError:  # a task that was never taken is flushed here
                continue
        self._printed.close()

    def _read(self) -> None:
        pipe = _pipe(self._process.stdout)
        while (message := _read_message(pipe)) is not None:
            self._messages.put(message)
        self._messages.put(None)

    def _gone(self) -> Gone:
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return Gone(False, "it closed its pipe and goes on running")
        last = self._last_line()
        if status == _FAULT:
            return Gone(True, last or "an exception without text")
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return Gone(False, f"it ended with {how}{last and f': {last}'}")

    def _last_line(self) -> str:
        """That the child printed; empty after `kill` or `close`."""
        if self._printed.closed:
            return ""
        self._printed.seek(0)
        lines = self._printed.read()[-4096:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "every child has pipes"
    return pipe


# ---- child ----------------------------------------------------------------------------------


def serve(handler: str) -> None:
    """Answer tasks until stdin ends; the main function of a child."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints must not end up among the replies
    sys.excepthook = _end
    tasks: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_take, args=(sys.stdin.buffer, tasks), daemon=True).start()
    module, _, name = handler.partition(":")
    handle: Handle = getattr(import_module(module), name)(lambda note: _write(replies, Beat(note)))
    _write(replies, Done(None))
    while True:
        task = tasks.get()
        try:
            reply: Message = Done(handle(task))
        except FewbitError as error:
            reply = Refused(error)
        _write(replies, reply)


def _take(pipe: IO[bytes], tasks: "SimpleQueue[Any]") -> None:
    while (task := _read_message(pipe)) is not None:
        tasks.put(task)
    os._exit(0)  # the parent has ended, or wants this one to


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    os._exit(_FAULT)


# ---- messages -------------------------------------------------------------------------------


def _write(pipe: IO[bytes], message: object) -> None:
    content = pickle.dumps(message)
    pipe.write(len(content).to_bytes(8, "little") + content)
    pipe.flush()


def _read_message(pipe: IO[bytes]) -> Any:
    """The next message; None at the end, also in the middle of a message."""
    head = pipe.read(8)
    if len(head) < 8:
        return None
    size = int.from_bytes(head, "little")
    content = pipe.read(size)
    return pickle.loads(content) if len(content) == size else None
