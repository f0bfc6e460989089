"""Threads for native code, which lets go of the interpreter while it runs.

As many as torch uses, so that one setting (`torch.set_num_threads`, OMP_NUM_THREADS) is for all.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def over_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`work` of each item, in order. An exception is raised where its result would have come."""
    n_threads = min(torch.get_num_threads(), len(items))
    if n_threads < 2:
        yield from map(work, items)
        return
    yield from _pool(n_threads, os.getpid()).map(work, items)


@cache
def _pool(n_threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork has none of its parent's."""
    return ThreadPoolExecutor(n_threads, thread_name_prefix=f"fewbit-native-{process}")


def runs_of(n: int, n_parts: int) -> list[tuple[int, int]]:
    """[start, stop) of about equal shares of n items; fewer than n_parts if n is smaller."""
    return list(pairwise(sorted({n * part // n_parts for part in range(n_parts + 1)})))
