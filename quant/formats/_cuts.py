"""Cuts that all formats have in common: of rows and experts by index, of columns in whole steps."""

from collections.abc import Mapping

import torch

from ..errors import FormatError
from ..format import Parts


def cut_axis(name: str, shape: tuple[int, ...], axis: int, start: int, stop: int) -> int:
    """`axis` counted from the front; FormatError unless [start, stop) is a range inside it."""
    size, axis = shape[axis], axis % len(shape)
    if not 0 <= start < stop <= size:
        raise FormatError(f"{name}: cannot cut {start} to {stop} out of an axis of {size}")
    return axis


def cut_parts(parts: Mapping[str, torch.Tensor], axis: int, start: int, stop: int) -> Parts:
    """Every part between `start` and `stop` of a leading axis that all have."""
    index = (slice(None),) * axis + (slice(start, stop),)
    return {name: part[index] for name, part in parts.items()}


def check_columns(name: str, size: int, start: int, stop: int, step: int) -> None:
    """FormatError unless columns [start, stop) of `size` begin and end at multiples of `step`, or at
    the end."""
    if start % step or (stop % step and stop != size):
        raise FormatError(f"{name}: columns are cut at multiples of {step}, got {start} to {stop}")
