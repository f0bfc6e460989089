"""Checks before the work that the disk and the memory will do, and says how long it will take.

Stored bytes are exact. Memory is that of two blocks in fp32, the statistics of the largest weight,
activations that wait and hidden states. Time is a guess from one timed product; what is left is
measured from the first unit on (see `Progress`).
"""

import os
import resource
import shutil
import time
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..calibrate.data import CalibrationSet
from ..export.checkpoint import Checkpoint
from .errors import CheckpointError

RESIDENT_BYTES = 2 << 30  # of hidden states kept in memory; more are spilled to a mapped file
PAUSED_BYTES = 4 << 30  # of activations that wait between stages; more are computed again
_DATA_FREE_BYTES = 400_000_000  # measured: 310 MB, whatever the checkpoint
_PROCESS_BYTES = 500_000_000  # torch, transformers and their working memory, measured
_DATA_FREE_RATE = 200e6  # bytes per second, measured on two cores
_COPY_RATE = 500e6  # of tensors that are coded as they are stored, measured on one core
_SPARE_BYTES = 64 << 20  # config, manifest, tokenizer, report


def check_resources(
    out: Path,
    planned_bytes: int,
    checkpoint: Checkpoint,
    calibration: CalibrationSet | None,
    lossless: bool = False,
) -> str:
    """One line on what the run will take. CheckpointError if the disk of `out` or the free memory
    cannot hold it. lossless: planned_bytes is a bound, for tensors will be entropy-coded."""
    existing = sum(path.stat().st_size for path in out.glob("model*.safetensors*"))
    spilled = hidden_bytes(checkpoint, calibration)
    needed = max(0, planned_bytes - existing) + _SPARE_BYTES
    needed += spilled if spilled > RESIDENT_BYTES else 0
    free = shutil.disk_usage(_existing_parent(out)).free
    if free < needed:
        raise CheckpointError(
            f"{out}: the result needs {_size(needed)} of disk, {_size(free)} are free; free some "
            f"space or choose another output folder"
        )
    memory = _memory_needed(checkpoint, calibration)
    available = _available_memory()
    if available is not None and available < memory:
        smaller = "a data-free recipe (w4a16-rtn), fewer --samples, or " if calibration else ""
        raise CheckpointError(
            f"the run needs about {_size(memory)} of memory, {_size(available)} are available; "
            f"use {smaller}a machine with more memory"
        )
    seconds = _seconds(checkpoint, calibration)
    result = f"less than {_size(planned_bytes)}" if lossless else _size(planned_bytes)
    return (
        f"{checkpoint.name}: {_size(checkpoint.total_bytes)} in, {result} out; disk "
        f"{_size(needed)} of {_size(free)}; memory about {_size(memory)}; about {_span(seconds)}"
    )


def _memory_needed(checkpoint: Checkpoint, calibration: CalibrationSet | None) -> int:
    if calibration is None:
        return _DATA_FREE_BYTES
    n_blocks = text_config(checkpoint.config).get("num_hidden_layers")
    largest = max((prod(info.shape) * 2 for info in checkpoint.tensors.values()), default=0)
    block = checkpoint.n_parameters * 4 // max(n_blocks if isinstance(n_blocks, int) else 1, 1)
    own = _PROCESS_BYTES + 2 * block + 4 * largest
    paused = _paused_bytes(checkpoint, calibration)
    held = paused if paused <= PAUSED_BYTES else 0  # more is computed again instead
    return own + held + min(hidden_bytes(checkpoint, calibration), RESIDENT_BYTES)


def _paused_bytes(checkpoint: Checkpoint, calibration: CalibrationSet) -> int:
    """Activations that wait between the stages of a block, in two models: the widest input of a
    weight and about four hidden states beside it for each token."""
    hidden = _hidden_size(checkpoint.config)
    shapes = [info.shape for info in checkpoint.tensors.values() if len(info.shape) == 2]
    widest = max((shape[-1] for shape in shapes), default=hidden)
    return 2 * calibration.windows.numel() * (widest + 4 * hidden) * checkpoint.dtype.itemsize


def hidden_bytes(checkpoint: Checkpoint, calibration: CalibrationSet | None) -> int:
    """Bytes of the hidden states of all calibration windows, in fp32, in two models: the quantized
    one, and the original that some passes compare it with."""
    if calibration is None:
        return 0
    return 2 * calibration.windows.numel() * _hidden_size(checkpoint.config) * 4


def _hidden_size(config: Mapping[str, Any]) -> int:
    """Numbers in a hidden state; where the config does not say, that of a large model."""
    inner = text_config(config)
    for key in ("hidden_size", "n_embd", "d_model"):
        if isinstance(inner.get(key), int):
            return int(inner[key])
    return 8192


def _seconds(checkpoint: Checkpoint, calibration: CalibrationSet | None) -> float:
    """Rough: bytes over the measured copy-and-round rate, or operations over a timed product."""
    if calibration is None:
        return checkpoint.total_bytes / (_COPY_RATE if checkpoint.as_stored else _DATA_FREE_RATE)
    side = torch.rand(768, 768)
    side @ side
    started = time.perf_counter()
    side @ side
    rate = 2 * side.shape[0] ** 3 / max(time.perf_counter() - started, 1e-6)
    runs = 4  # statistics of the stages, the quantized run, and the rounding itself
    return runs * 2 * checkpoint.n_parameters * calibration.windows.numel() / rate


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{max(seconds, 1):.0f} s"


def _available_memory() -> int | None:
    """Bytes that can be allocated without swapping, None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    names = os.sysconf_names
    if "SC_AVPHYS_PAGES" in names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def peak_resident_bytes() -> int:
    """Most memory that this process has had resident.

    Linux's own count of this program; the portable one starts with what the *parent* process had.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _size(n_bytes: int) -> str:
    """Decimal units, as disks and files are sold."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes} bytes"
