"""Makes the C library's allocator give large blocks back to the system at once.

A calibrated run has one thread for each paused batch, and each thread frees tensors of a few megabytes
that others would take. glibc keeps such blocks in a heap of the thread that made them; measured on a
block of 0.5B shape and 65,536 tokens, that is 2 of 5.5 GB. Blocks above a fixed size are mapped one by
one instead and unmapped when they are freed; the price is that the system clears their pages anew.

Does nothing where the C library is not glibc, and does not steer other allocators (LD_PRELOAD).
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MAPPED_BYTES = 1 << 20  # smallest block that is mapped while a run lasts
_USUAL_BYTES = 32 << 20  # what glibc's own adjustment ends at once such blocks were freed


@contextmanager
def freed_blocks_returned() -> Iterator[None]:
    """Inside, blocks of a megabyte and more go back to the system when they are freed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
    mallopt(_TRIM_THRESHOLD, 2 * _MAPPED_BYTES)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _USUAL_BYTES)
        mallopt(_TRIM_THRESHOLD, 2 * _USUAL_BYTES)
