"""Lets the disk work while more is computed: dirty pages of an open file are synced in the background.

A sync at the end of a unit would find all of it still in memory, and the processor would wait for the
disk. Here a thread syncs what is there each time `STEP_BYTES` more were written, so that the last sync
has little left. Nothing is promised before that one: `settle` raises what failed meanwhile, because the
system reports an error of writing back only once.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor

STEP_BYTES = 32 << 20


def _sync(file_descriptor: int) -> None:
    """Its data to the disk, and all its facts where a system has no fdatasync (macOS)."""
    getattr(os, "fdatasync", os.fsync)(file_descriptor)


class Writeback:
    """Background syncs of one file descriptor after another; one at a time."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None
        self._written = 0

    def wrote(self, file_descriptor: int, n_bytes: int) -> None:
        """`n_bytes` more were handed to the system. OSError of an earlier sync."""
        self._written += n_bytes
        if self._written < STEP_BYTES or (self._running and not self._running.done()):
            return
        self.settle()
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="fewbit-writeback")
        self._running = self._pool.submit(_sync, file_descriptor)

    def settle(self) -> None:
        """Wait for the sync that runs; OSError if it failed."""
        running, self._running, self._written = self._running, None, 0
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait, whatever comes of it, and end the thread."""
        if self._pool is not None:
            self._pool.shutdown()
        self._pool = self._running = None
