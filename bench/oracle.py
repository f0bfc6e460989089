"""Every kernel of the registry that runs here, against an oracle in plain torch.

    python -m bench.oracle [--minutes 30] [--jobs 8] [--kernel NAME]
    TRITON_INTERPRET=1 python -m bench.oracle        without a GPU: few, small shapes, slowly

Checks come from the files `oracle_*.py`, one for each kind of problem. Kernels take turns, and the
steps of each go breadth first through formats, dtypes, shapes and configs: a run that is cut short has
seen a little of everything. A kernel whose op has no oracle is a failure by itself.

    parent   --- shard i of n -->   child 1 … n   begins a check, says so, ends it, says so
    a child that dies or hangs in a check: that check failed; another child goes on behind it

All failures are collected, with kernel, config, shape and error; any gives exit code 1.
Not yet run on a GPU.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from math import isfinite
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from bench import oracle_append, oracle_attention, oracle_linear, oracle_rans32, oracle_rows
from bench.child_rows import DONE, Outcome, Row, run_child
from bench.cuda_timing import kernel_errors, missing, needs_text, spoils_cuda, told
from bench.oracle_check import Check, Lane, Place, Step
from fewbit.kernels_triton import _triton
from fewbit.quant.dispatch import kernels
from fewbit.quant.kernel import Kernel
from fewbit.quant.machine import load_device, this_device

INTERPRETED_AS = "h100"  # whose facts kernels are asked with where they are interpreted
_LANES: dict[str, Callable[[Kernel, Place], list[Lane]]] = {
    "linear": oracle_linear.lanes,
    "attend": oracle_attention.lanes,
    "append_kv": oracle_append.lanes,
    "rope": oracle_append.rope_lanes,
    "decode_rans32": oracle_rans32.lanes,
    **dict.fromkeys(oracle_rows.ORACLES, oracle_rows.lanes),
}
_SILENCE_SECONDS = 120.0  # of one check, its compilation included
_MOST_JOBS = 8


def here() -> Place | None:
    """The GPU at hand, or Triton's interpreter where it is switched on; None where there is neither."""
    if _triton.interpreted():
        return Place("cpu", load_device(INTERPRETED_AS), reduced=True)
    if missing():
        return None
    return Place("cuda", this_device("cuda"))


# ---- which checks ---------------------------------------------------------------------------


def gpu_kernels(names: Sequence[str] = ()) -> list[Kernel]:
    """Kernels of the registry that have code of their own to be compiled, or those of them with these
    names. The others are torch's operators, which the oracles are made of."""
    found = [kernel for kernel in kernels().values() if kernel.source]
    return [kernel for kernel in found if not names or kernel.name in names]


def steps(place: Place, names: Sequence[str] = ()) -> list[Step]:
    """All possible checks in their order; making the list asks no kernel anything."""
    columns = [_breadth_first(_lanes(kernel, place)) for kernel in gpu_kernels(names)]
    return [step for turn in zip_longest(*columns) for step in turn if step is not None]


def checks(place: Place, names: Sequence[str] = ()) -> Iterator[Check]:
    """Every check of every kernel that does not refuse it."""
    for step in steps(place, names):
        check = made(step)
        if check is not None:
            yield check


def made(step: Step) -> Check | None:
    """The check of a step; one that fails where the kernel cannot even be asked."""
    try:
        return step()
    except kernel_errors() as error:
        return Check(
            asked_kernel(step), (), f"asking it: {step!r}"[:300], 0.0, partial(_raise, error)
        )


def asked_kernel(step: Step) -> str:
    """Name of the kernel that a step is about, "?" if it does not tell."""
    given = getattr(step, "args", ())
    return given[0].name if given and isinstance(given[0], Kernel) else "?"


def _raise(error: Exception) -> float:
    raise error


def _lanes(kernel: Kernel, place: Place) -> list[Lane]:
    if kernel.op in _LANES:
        return _LANES[kernel.op](kernel, place)
    return [[lambda: Check(kernel.name, (), f"op {kernel.op}", 0.0, partial(_unknown, kernel))]]


def _unknown(kernel: Kernel) -> float:
    raise NotImplementedError(f"op {kernel.op!r} has no oracle; add one to bench/oracle.py")


def _breadth_first(lanes: Iterable[Lane]) -> list[Step]:
    return [step for turn in zip_longest(*lanes) for step in turn if step is not None]


# ---- one check ------------------------------------------------------------------------------


def heading(check: Check) -> Row:
    """Which check: kernel, config, case."""
    return {"kernel": check.kernel, "config": dict(check.config), "case": check.case}


def run_check(check: Check) -> Row:
    """Row of a finished check: ok, error (None if it is not finite), tolerance, why, seconds; lost
    if it cost the process its CUDA context."""
    started, error, why = time.monotonic(), float("inf"), ""
    try:
        error = check.error()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if not isfinite(error):
            why = "NaN, or another shape or dtype"
    except kernel_errors() as raised:
        why = told(raised)
    ok = error <= check.tolerance
    if not ok and not why:
        why = f"error {error:.2e} exceeds {check.tolerance:g}"
    found: Row = {
        "ok": ok,
        "error": error if isfinite(error) else None,
        "tolerance": check.tolerance,
    }
    found |= {"why": why, "seconds": time.monotonic() - started}
    return heading(check) | found | ({"lost": True} if spoils_cuda(why) else {})


def shard_rows(shard: int, n_shards: int, first: int, names: Sequence[str]) -> Iterator[Row]:
    """In a child: every n-th step from `first` on; a row with `index` alone before each check, its
    result after it. The child ends behind an error of CUDA, which spoils all that follows."""
    place = here()
    assert place is not None, "a shard needs a GPU or the interpreter"
    for index, step in enumerate(steps(place, names)):
        if index < first or index % n_shards != shard:
            continue
        check = made(step)
        if check is None:
            continue
        yield {"index": index, **heading(check)}
        row = run_check(check)
        yield {"index": index, **row}
        if "lost" in row:
            raise RuntimeError(row["why"])


# ---- many children --------------------------------------------------------------------------


def is_result(row: Row) -> bool:
    """Is it the row of a finished check?"""
    return "ok" in row


def unfinished(outcome: Outcome) -> Row | None:
    """The check in which a child ended; None if it ended between two."""
    last = outcome.rows[-1] if outcome.rows else None
    return None if last is None or is_result(last) else last


def run_shard(
    run: Callable[[int, float, Callable[[Row], None]], Outcome],
    seconds: float,
    on_row: Callable[[Row], None],
) -> int | None:
    """One shard in as many children as it takes; the first step that was not reached, None if all
    were. run(first step, seconds, on_row) runs one child."""
    deadline, first = time.monotonic() + seconds, 0
    while True:
        outcome = run(first, deadline - time.monotonic(), on_row)
        if outcome.status == DONE:
            return None
        begun = unfinished(outcome)
        if time.monotonic() >= deadline:
            if begun is not None:
                return int(begun["index"])
            return outcome.rows[-1]["index"] + 1 if outcome.rows else first
        if begun is not None:
            failed = {"ok": False, "error": None, "why": outcome.error, "lost": True}
            on_row(begun | failed)
        elif not outcome.rows:
            on_row({"ok": False, "kernel": "", "config": {}, "case": "start", "why": outcome.error})
            return first
        first = outcome.rows[-1]["index"] + 1


def pool_rows(seconds: float, n_jobs: int, names: Sequence[str] = ()) -> Iterator[Row]:
    """Results of all checks that fit into `seconds`, as they come, from `n_jobs` children; then how
    many steps were not reached."""
    queue: SimpleQueue[Row | None] = SimpleQueue()
    unreached: dict[int, int] = {}

    def child(shard: int, first: int, left: float, on_row: Callable[[Row], None]) -> Outcome:
        arguments = (shard, n_jobs, first, tuple(names))
        return run_child("bench.oracle:shard_rows", arguments, left, _SILENCE_SECONDS, on_row)

    def work(shard: int) -> None:
        try:
            first = run_shard(partial(child, shard), seconds, queue.put)
            if first is not None:
                unreached[shard] = first
        finally:
            queue.put(None)

    threads = [Thread(target=work, args=(shard,), daemon=True) for shard in range(n_jobs)]
    for thread in threads:
        thread.start()
    running = n_jobs
    while running:
        row = queue.get()
        if row is None:
            running -= 1
        elif is_result(row):
            yield row
    if unreached:
        yield left_over(unreached, n_jobs, names)


def left_over(unreached: dict[int, int], n_jobs: int, names: Sequence[str]) -> Row:
    """The row that says how many steps were not reached, from the first one of each shard."""
    place = here()
    n_steps = len(steps(place, names)) if place else 0
    left = sum(
        sum(index % n_jobs == shard for index in range(first, n_steps))
        for shard, first in unreached.items()
    )
    return {"skipped": [f"{left} of {n_steps} steps"], "why": "time"}


def default_jobs() -> int:
    """Half of the processors, at most eight: each child compiles, and holds a CUDA context."""
    return max(1, min(_MOST_JOBS, (os.cpu_count() or 2) // 2))


# ---- report ---------------------------------------------------------------------------------


def summary(rows: Iterable[Row]) -> dict[str, Any]:
    """checks, failed, and for each kernel its checks and its largest error over its tolerance."""
    by_kernel: dict[str, dict[str, Any]] = {}
    found = [row for row in rows if is_result(row)]
    for row in found:
        cell = by_kernel.setdefault(row["kernel"], {"checks": 0, "failed": 0, "worst": 0.0})
        cell["checks"] += 1
        cell["failed"] += not row["ok"]
        if row.get("error") is not None and row.get("tolerance"):
            cell["worst"] = max(cell["worst"], row["error"] / row["tolerance"])
    failures = [row for row in found if not row["ok"]]
    return {"checks": len(found), "failed": len(failures), "kernels": by_kernel}


def lost_kernels(rows: Iterable[Row]) -> list[str]:
    """Kernels that cost a process, by a fault, a hang or its death."""
    return sorted({row["kernel"] for row in rows if row.get("lost") and row["kernel"]})


def failure_text(row: Row) -> str:
    """`triton_x {block_m 16} linear ... M=7 ...: error 3.1e-02 exceeds 0.008`."""
    config = ", ".join(f"{name} {value}" for name, value in row["config"].items())
    return f"FAILED {row['kernel']} {{{config}}} {row['case']}: {row['why']}"


def main() -> int:
    """Print failures as they come and a line for each kernel; 1 if anything failed, 2 without GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--jobs", type=int, default=default_jobs())
    parser.add_argument("--kernel", action="append", default=[], help="only this one; repeatable")
    args = parser.parse_args()
    if here() is None:
        remedy = "TRITON_INTERPRET=1 runs a few checks in Triton's interpreter, on the CPU."
        print(needs_text("bench.oracle", missing(), remedy), file=sys.stderr)
        return 2
    rows = []
    for row in pool_rows(60 * args.minutes, args.jobs, args.kernel):
        rows.append(row)
        if "skipped" in row:
            print(f"not reached ({row['why']}): {row['skipped'][0]}")
        elif not row["ok"]:
            print(failure_text(row), flush=True)
    found = summary(rows)
    for name, cell in found["kernels"].items():
        counts = f"{cell['checks']} checks, {cell['failed']} failed"
        print(f"{name:32s} {counts}, worst {cell['worst']:.2f} of the tolerance")
    print(f"{found['checks']} checks, {found['failed']} failed")
    return 1 if found["failed"] or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
