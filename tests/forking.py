"""Processes that tests fork."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

FRESH = "FEWBIT_TEST_FRESH"


def passed_in_a_fresh_process(file: str, test: str) -> bool:
    """Run a test in a process of its own, once: a fork of one that hundreds of tests have left threads
    and locks in may hang wherever these were. False inside that process, where the test goes on."""
    if os.environ.get(FRESH):
        return False
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{file}::{test}"]
    ended = subprocess.run(
        command, env={**os.environ, FRESH: "1"}, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stdout
    return True


def true_in_a_fork(work: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Is `work` true in a forked process that ends in time? One that does not is killed."""
    child = os.fork()
    if not child:
        try:
            os._exit(0 if work() else 1)
        finally:  # pytest must not go on there
            os._exit(2)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False
