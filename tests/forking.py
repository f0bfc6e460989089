"""Processes that tests fork."""

import os
import signal
import time
from collections.abc import Callable


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
