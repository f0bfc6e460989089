"""Freed blocks leave the process while they should, and only then."""

import subprocess
import sys

import pytest

PROGRAM = """
import threading
import torch
from fewbit.quant.allocator import freed_blocks_returned

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmRSS"))

def work(kept):
    held = [torch.ones(1 << 20) for _ in range(16)]  # 4 MB each
    kept.append(torch.ones(100))  # keeps the heap's end where it is
    del held

def threads():
    kept, before = [], resident()
    for _ in range(4):
        thread = threading.Thread(target=work, args=(kept,))
        thread.start()
        thread.join()
    return resident() - before

torch.set_num_threads(1)
torch.ones(1 << 22)  # raises glibc's own threshold above 4 MB when it is freed
{use}
"""


def grown(use: str) -> int:
    program = PROGRAM.replace("{use}", use)
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return int(found.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_blocks_leave_the_process() -> None:
    inside = grown("with freed_blocks_returned():\n    print(threads())")
    assert inside < 8 << 20  # of 64 MB that were made in each thread


def test_it_can_be_entered_again_and_leaves_no_trace() -> None:
    import torch

    from fewbit.quant.allocator import freed_blocks_returned

    for _ in range(2):
        with freed_blocks_returned():
            value = torch.ones(1 << 20)
        assert float(value.sum()) == 1 << 20
