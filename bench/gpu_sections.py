"""The sections of `bench/gpu.py`, as functions that run in a child process and yield rows.

    facts      what the numbers depend on
    oracle     results of checks, as they come
    peaks, gemm, attention    as those benches
    tune       `quant.autotune` on a few families; a row for each bucket
    decode     `bench.decode_step` end to end

Each gets the seconds that it may use and stops by itself; peaks are handed on as rows.
"""

import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench import attention, gemm, oracle
from bench.child_rows import ROOT, Row
from bench.peaks import peaks_of
from bench.peers_gpu import versions
from fewbit.kernels_triton import _triton
from fewbit.quant.autotune import Settings, autotune
from fewbit.quant.autotune_report import Result
from fewbit.quant.errors import FewbitError, TableError
from fewbit.quant.gpu_timer import conditions
from fewbit.quant.ladder import Candidate
from fewbit.quant.machine import this_device
from fewbit.quant.tuned import current_tables
from fewbit.quant.tuned_table import fingerprint, utc_now
from fewbit.quant.tuning_worker import IsolatedTimer

_LEAST_TUNING_SECONDS = 30.0  # of a family: what compiling and a few buckets take


def facts() -> Iterator[Row]:
    """One row: the GPU, its driver, clocks, temperature and power, versions, and the commit."""
    device = this_device("cuda")
    print_of = fingerprint(device)
    yield {
        "gpu": torch.cuda.get_device_name(),
        "described_as": device.name,
        "fingerprint": print_of.name if print_of else None,
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "multiprocessors": device.sms,
        "l2_bytes": device.l2_bytes,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "published": {
            "bytes_per_second": device.bandwidth_bytes_per_second,
            **{
                f"{kind}_ops_per_second": rate
                for kind, rate in asdict(device.peak_ops_per_second).items()
            },
        },
        **conditions(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton.VERSION,
        "peers": {name: found for name, found in versions().items() if name != "torch"},
        "commit": commit(),
        "time": utc_now(),
    }


def commit() -> str:
    """The repository's commit, with "+" if files differ from it; "unknown" outside of one."""
    found = []
    for arguments in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"]):
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"
        if done.returncode:
            return "unknown"
        found.append(done.stdout.strip())
    return found[0] + ("+" if found[1] else "")


def check_all(seconds: float) -> Iterator[Row]:
    """Results of oracle checks; the rows of one that failed say why."""
    yield from oracle.pool_rows(seconds, oracle.default_jobs())


def time_gemm(seconds: float, peak_rows: Sequence[Row]) -> Iterator[Row]:
    """The quick plan of `bench/gemm.py`."""
    yield from gemm.rows(gemm.plan(quick=True), peaks_of(peak_rows), seconds)


def time_attention(seconds: float, peak_rows: Sequence[Row]) -> Iterator[Row]:
    """All cases of `bench/attention.py`."""
    yield from attention.rows(peaks_of(peak_rows), seconds)


# ---- tuning ---------------------------------------------------------------------------------


class TimeUp(FewbitError):
    """The time of a section ended while kernels were compiled."""


class Watch:
    """A `Progress` that keeps results as rows, and ends a compilation that takes too long."""

    def __init__(self, deadline: float) -> None:
        self.rows: list[Row] = []
        self._deadline = deadline

    def compiled(self, done: int, total: int) -> None:
        """TimeUp when the time is up before all is compiled."""
        if done < total and time.monotonic() > self._deadline:
            raise TimeUp(f"{done} of {total} binaries were compiled when the time was up")

    def searched(self, done: int, total: int, result: Result) -> None:
        """Keep the result."""
        self.rows.append(tuned_row(result))


def tuned_row(result: Result) -> Row:
    """A bucket's choice before and after."""
    entry, before = result.after, result.before_seconds
    return {
        "family": result.problem.family.replace(" * ", " "),
        "size": result.problem.size,
        "before": str(result.before),
        "before_us": None if before is None else 1e6 * before,
        "after": str(Candidate(entry.kernel, entry.config)),
        "after_us": entry.us,
        "measured": entry.measured,
        "share": result.share,
        "gain": result.gain,
        "timed": result.n_timed,
        "faults": [str(fault) for fault in result.faults],
    }


def table_path(given: str) -> Path:
    """The table that is written: the one that was asked for, or the packaged one of this GPU."""
    if given:
        return Path(given)
    here = fingerprint(this_device("cuda"))
    if here is None:
        raise TableError("a CPU has no tuned table; give a GPU")
    return ROOT / "quant" / "tuned" / f"{here.name}.json"


def tune(seconds: float, table: str) -> Iterator[Row]:
    """Families of the first shape of `bench/gemm.py`, one after the other; half of the time of each is
    for the device. A row for each bucket, then where the table is."""
    deadline, out = time.monotonic() + seconds, table_path(table)
    timer = IsolatedTimer()
    left_out: list[str] = []
    try:
        told = timer.facts()
        for layer in gemm.QUICK_LAYERS:
            left, watch = deadline - time.monotonic(), Watch(deadline)
            if left < _LEAST_TUNING_SECONDS:
                left_out.append(layer.name)
                continue
            family = gemm.problem_of(layer, gemm.SHAPES[0], 1, told.device)
            n_jobs = max(1, (os.cpu_count() or 2) // 2)
            settings = Settings(out=out, budget_seconds=left / 2, n_jobs=n_jobs, driver=told.driver)
            try:
                autotune([family], timer, settings, tables=current_tables(), progress=watch)
            except TimeUp as error:
                left_out.append(f"{layer.name}: {error}")
            yield from watch.rows
    finally:
        timer.close()
    yield {"table": str(out)}
    if left_out:
        yield {"skipped": left_out, "why": "time"}


def decode(seconds: float) -> Iterator[Row]:
    """What `bench.decode_step` measures, or that there is no such bench."""
    if find_spec("bench.decode_step") is None:
        yield {"skipped": ["end-to-end decode"], "why": "bench.decode_step is not there"}
        return
    found: dict[str, Any] = import_module("bench.decode_step").run(seconds)
    left_out = found.pop("skipped", [])
    yield found
    if left_out:
        yield {"skipped": left_out, "why": "time"}
