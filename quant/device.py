"""The device of a `device` setting, the same for every entry point."""

from functools import cache

import torch

from .errors import RecipeError


def resolve_device(device: str) -> torch.device:
    """ "auto" is the first GPU if there is one; RecipeError if this machine lacks the device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise RecipeError(f"device must be auto, cpu, cuda or cuda:i, got {device!r}") from error
    n_gpus = torch.cuda.device_count()
    if found.type not in ("cpu", "cuda") or (found.type == "cuda" and (found.index or 0) >= n_gpus):
        raise RecipeError(
            f"device {device!r} is not available: torch sees a cpu and {n_gpus} GPUs; use auto"
        )
    return found


def calibration_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """In which dtype calibration runs the blocks.

    A GPU: as stored. A CPU: bf16 if the weights are bf16 and the processor multiplies bf16 natively
    (measured: four times fp32's speed, the same quality); otherwise fp32, since emulated 16-bit
    products are slower than fp32.
    """
    if device.type == "cuda":
        return stored
    if stored == torch.bfloat16 and _cpu_multiplies_bf16():
        return torch.bfloat16
    return torch.float32


@cache
def _cpu_multiplies_bf16() -> bool:
    """Whether Linux lists an instruction for bf16 products; False where nothing is listed."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())
