"""The device of a `device` setting, the same for every entry point."""

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
