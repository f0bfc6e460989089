"""What integer formats with scales for groups of columns have in common.

Columns are padded to whole groups. A part whose name ends in `_group` holds one number for each group,
[..., N, G]; `codes` holds `bits` of each column; any other part holds one number for each row.

    column   0 … unit−1   unit … 2·unit−1   …  Kp−1        unit = group; 8 for group "row", whose
    group         0              1          …  G−1         one group is the whole row

It does not know what the numbers mean: fitting, rounding and decoding are each format's own.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

import torch

from ..errors import FormatError
from ..format import Parts, PartSpec
from ._cuts import check_columns, cut_axis, cut_parts

SCALE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_FP16_STEP = 2.0**-24  # distance of neighbouring fp16 numbers below 2^-14


class GroupedOptions(Protocol):
    """What options of such a format say: bits of a code, and columns of a group or "row"."""

    @property
    def bits(self) -> int: ...

    @property
    def group(self) -> int | str: ...


AnyOptions = TypeVar("AnyOptions", bound=GroupedOptions)


def unit(options: GroupedOptions) -> int:
    """Columns of which K must be a multiple, and at whose multiples a weight can be cut."""
    return 8 if options.group == "row" else int(options.group)


class GroupedFormat(ABC, Generic[AnyOptions]):
    """The answers of a format that follow from its groups; see `Format` for each."""

    name: str
    tile = 1

    @abstractmethod
    def specs(
        self, rows: tuple[int, ...], padded_k: int, n_groups: int, options: AnyOptions
    ) -> dict[str, PartSpec]:
        """Stored parts of `rows` [..., N] of `padded_k` columns each."""

    @abstractmethod
    def check_values(self, parts: Mapping[str, torch.Tensor], options: AnyOptions) -> None:
        """FormatError unless stored values are valid; dtypes and shapes are, and all is finite."""

    def padded_k(self, k: int, options: AnyOptions) -> int:
        """K rounded up to whole groups (a whole row: to a multiple of 8)."""
        return -(-k // unit(options)) * unit(options)

    def group_size(self, k: int, options: AnyOptions) -> int:
        """Columns that share a scale."""
        return self.padded_k(k, options) if options.group == "row" else unit(options)

    def part_specs(self, shape: tuple[int, ...], options: AnyOptions) -> dict[str, PartSpec]:
        """Stored parts of a weight of `shape`; FormatError if it has fewer than two axes."""
        if len(shape) < 2 or min(shape) < 1:
            raise FormatError(
                f"{self.name} stores weights [..., N, K] of positive size, got {shape}"
            )
        padded = self.padded_k(shape[-1], options)
        return self.specs(
            shape[:-1], padded, padded // self.group_size(shape[-1], options), options
        )

    def padded_shape(
        self, part_shapes: Mapping[str, tuple[int, ...]], options: AnyOptions
    ) -> tuple[int, ...]:
        """[..., N, Kp], told from the shape of `codes`."""
        shape = part_shapes.get("codes", ())
        if len(shape) < 2:
            raise FormatError(f"{self.name}: codes must be [..., N, bytes], got {list(shape)}")
        return (*shape[:-1], shape[-1] * 8 // options.bits)

    def bits(self, shape: tuple[int, ...], options: AnyOptions) -> float:
        """Stored bits per weight, padding and scales included."""
        stored = sum(spec.n_bytes for spec in self.part_specs(shape, options).values())
        return 8 * stored / torch.Size(shape).numel()

    def slice(
        self,
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        options: AnyOptions,
        axis: int,
        start: int,
        stop: int,
    ) -> Parts:
        """Parts of rows or experts [start, stop), or of columns that are whole groups."""
        axis = cut_axis(self.name, shape, axis, start, stop)
        if axis != len(shape) - 1:
            return cut_parts(parts, axis, start, stop)
        step = unit(options)
        check_columns(self.name, shape[-1], start, stop, step)
        stop = self.padded_k(stop, options)
        return {
            name: part[..., _stored_span(name, start, stop, options)]
            for name, part in parts.items()
        }

    def check(
        self,
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        options: AnyOptions,
    ) -> None:
        """FormatError unless every part has its dtype and shape and every stored value is valid."""
        specs = self.part_specs(shape, options)
        if set(parts) != set(specs):
            raise FormatError(f"{self.name}: parts must be {sorted(specs)}, got {sorted(parts)}")
        for name, spec in specs.items():
            found = PartSpec(parts[name].dtype, tuple(parts[name].shape))
            if found != spec:
                raise FormatError(
                    f"{self.name}: {name} must be {spec.dtype} {spec.shape}, "
                    f"got {found.dtype} {found.shape}"
                )
        for name, part in parts.items():
            if part.is_floating_point() and not bool(torch.isfinite(part).all()):
                raise FormatError(f"{self.name}: {name} holds NaN or Inf; the file is damaged")
        self.check_values(parts, options)


def _stored_span(name: str, start: int, stop: int, options: GroupedOptions) -> slice:
    """Where part `name` holds columns [start, stop) of each row, both multiples of the unit."""
    if name == "codes":
        return slice(start * options.bits // 8, stop * options.bits // 8)
    if _by_group(name) and options.group != "row":
        return slice(start // unit(options), stop // unit(options))
    return slice(None)


def _by_group(name: str) -> bool:
    return name.endswith("_group")


def aligned(
    columns: torch.Tensor,
    scales: Mapping[str, torch.Tensor],
    start: int | torch.Tensor,
    options: GroupedOptions,
) -> tuple[torch.Tensor, Parts]:
    """`columns` [..., N, t], which begin at column `start`, and scale parts that broadcast to them.

    Several whole groups come back as a view [..., N, groups, unit], so that nothing is repeated.
    start int64 [B]: each matrix of columns [B, N, t] begins at its own, and stays in one group.
    """
    if options.group == "row":
        return columns, dict(scales)
    size = unit(options)
    if isinstance(start, torch.Tensor):
        group = (start // size).view(-1, 1, 1)
        return columns, {
            name: part.gather(-1, group.expand(-1, part.shape[-2], 1)) if _by_group(name) else part
            for name, part in scales.items()
        }
    stop = start + columns.shape[-1]
    whole = start % size == 0 and stop % size == 0 and stop - start > size
    first, last = start // size, (stop - 1) // size
    index: slice | torch.Tensor = slice(first, last + 1)
    if first != last and not whole:
        index = torch.arange(start, stop, device=columns.device) // size
    picked = {n: part[..., index] if _by_group(n) else part for n, part in scales.items()}
    if not whole:
        return columns, picked
    return columns.unflatten(-1, (-1, size)), {n: p.unsqueeze(-1) for n, p in picked.items()}


def stored_scale(scale: torch.Tensor, dtype: str, what: str, remedy: str) -> torch.Tensor:
    """Round to "fp16" or "bf16"; never zero (a group of zeros decodes to zeros with any scale).

    fp16 scales below 6.1e-5 are subnormal, multiples of 2^-24. They are normal in practice: an
    8-bit group whose largest weight is under 0.0078 has one. There the magnitude rounds up, so
    that a coarse scale never clips; a group far below 2^-24 rounds to zeros.

    FormatError for a scale that does not fit: it begins with `what` and names `remedy`.
    """
    limits = torch.finfo(SCALE_DTYPES[dtype])
    size = scale.abs()
    if not bool((size <= limits.max).all()):
        raise FormatError(
            f"{what} of {float(size.max()):.3g} does not fit {dtype} (at most {limits.max:.3g}); "
            f"{remedy}, or the weight holds NaN or Inf"
        )
    step = limits.smallest_normal if dtype == "bf16" else _FP16_STEP
    small = torch.ceil(size / step).clamp_(min=1).mul_(step)
    small = torch.where(scale < 0, -small, small)
    return torch.where(size < limits.smallest_normal, small, scale).to(SCALE_DTYPES[dtype])
