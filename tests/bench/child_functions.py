"""What children of `test_child_rows.py` run."""

import os
import time

from fewbit.quant.errors import FewbitError


def count(n):
    """n rows."""
    for i in range(n):
        yield {"i": i}


def fail_after(n):
    """n rows, then an exception."""
    yield from count(n)
    raise RuntimeError("CUDA error: a bad day")


def refuse(n):
    """n rows, then a named error."""
    yield from count(n)
    raise FewbitError("no such thing")


def die_after(n):
    """n rows, then the end of the process."""
    yield from count(n)
    os._exit(3)


def hang_after(n):
    """n rows, then nothing."""
    yield from count(n)
    time.sleep(600)


def environment(name):
    """One row with a variable of the child."""
    yield {"value": os.environ.get(name)}
