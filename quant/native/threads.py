"""Threads for native code, which lets go of the interpreter while it runs.

As many as torch uses, so that one setting (`torch.set_num_threads`, OMP_NUM_THREADS) is for all.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import TypeVar

import torch

_NAME = "fewbit-native"
Item = TypeVar("Item")
Result = TypeVar("Result")


def over_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`work` of each item, in order. An exception is raised where its result would have come, once
    nothing runs any more: whoever owns the memory that items write to may use it again then.

    Called from one of these threads it runs there: waiting for others could be waiting for itself."""
    n_threads = torch.get_num_threads()
    if n_threads < 2 or len(items) < 2 or threading.current_thread().name.startswith(_NAME):
        yield from map(work, items)
        return
    running = [_pool(n_threads, os.getpid()).submit(work, item) for item in items]
    try:
        for future in running:
            yield future.result()
    finally:
        for future in running:
            future.cancel()
        wait(running)


@cache
def _pool(n_threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork has none of its parent's."""
    return ThreadPoolExecutor(n_threads, thread_name_prefix=f"{_NAME}-{process}")


def runs_of(n: int, n_parts: int) -> list[tuple[int, int]]:
    """[start, stop) of about equal shares of n items; fewer than n_parts if n is smaller."""
    return list(pairwise(sorted({n * part // n_parts for part in range(n_parts + 1)})))
