"""`int_two_level`: 4-bit codes over an int8 intermediate, for integer products with int8 inputs.

Groups of 32, 64 or 128 columns: a float scale for the row, small integers for each group.

    w8[n, k] = code[n, k] · s2[n, g] + o[n, g]        dialect "offset"     g = k // group
    w8[n, k] = (code[n, k] − z[n, g]) · s2[n, g]      dialect "zero"
    w[n, k]  = s1[n] · w8[n, k]                       w8 in [−128, 127], s2 in 1 … 17

Group "row": no second level.

    w[n, k] = s1[n] · code[n, k] + o[n]               dialect "offset", o is fp16
    w[n, k] = s1[n] · (code[n, k] − z[n])             dialect "zero"

s1 is fp16(amax |row| / 119), used as rounded; w / s1 is not rounded before the second level, which
would cost a second rounding error. Zero is representable in dialect "zero"; "offset" need not waste
range on it and shifts its grid by single steps of w8, so it errs less and is the default.

w8 must fit int8 for every code that a rounding pass may emit, not only for nearest codes of the
fitted weights (error feedback pushes weights outside the fitted range). "offset": the offsets made
here satisfy −128 ≤ o ≤ 127 − 15·s2, so any code does. "zero": `round` clamps codes to
[z − ⌊128/s2⌋, z + ⌊127/s2⌋]. `check` tests the codes that are stored, so files whose makers bounded
codes in another way pass.

Parts, for a weight [..., N, K], Kp = K padded to whole groups (a row: to a multiple of 8), G = Kp/group
  codes         uint8  [..., N, Kp/2]   byte j of a row: bit 7..4 = code 2j+1, bit 3..0 = code 2j
  scale_row     fp16   [..., N, 1]      positive
  scale_group   uint8  [..., N, G]      groups only
  offset_group  int8   [..., N, G]      groups, "offset"         offset_row  fp16   [..., N, 1]
  zero_group    uint8  [..., N, G]      groups, "zero"           zero_row    uint8  [..., N, 1]
Padding columns are dropped by `unpack`.

This module does not choose among scales: `candidates` lists what a search may try.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..errors import FormatError, RecipeError
from ..format import IntegerForm, Parts, PartSpec
from .int_group import pack_bits, unpack_bits

PROTECTIVE_RANGE = 119  # largest |w / s1|: nearest codes of either dialect then stay in int8
MAX_SCALE_GROUP = 17  # 15 · 17 = 255 still fits a byte lane
_TOP = 15  # largest code
_GROUPS = (32, 64, 128)
_FP16 = torch.finfo(torch.float16)
_FP16_STEP = 2.0**-24  # distance of neighbouring fp16 numbers below 2^-14
# What `candidates` tries: shares of the range, and shifts of the grid in steps. Eighths of a step were
# measured to be worth more than finer shares; a zero point moves by whole steps only.
_FACTORS = (1.0, 1.06, 0.93, 0.86, 0.79, 0.72)
_SHIFTS = {
    "offset": (0.0, -0.125, 0.125, -0.25, 0.25, -0.375, 0.375, 0.5),
    "zero": (0.0, -0.5, 0.5),
}


@dataclass(frozen=True)
class IntTwoLevelOptions:
    """Recipe keys of `int_two_level`.

    bits: 4. group: columns that share second-level integers, 32, 64, 128, or "row" for one level.
    dialect: "offset" (code · s2 + o) or "zero" ((code − z) · s2).
    """

    bits: int = 4
    group: int | str = 128
    dialect: str = "offset"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits != 4:
            raise RecipeError(f"int_two_level: bits must be 4, got {self.bits!r}")
        if isinstance(self.group, bool) or self.group not in (*_GROUPS, "row"):
            raise RecipeError(
                f"int_two_level: group must be 32, 64, 128 or 'row', got {self.group!r}"
            )
        if self.dialect not in ("offset", "zero"):
            raise RecipeError(
                f"int_two_level: dialect must be 'offset' or 'zero', got {self.dialect!r}"
            )

    @property
    def unit(self) -> int:
        """Columns of which K must be a multiple."""
        return 8 if self.group == "row" else int(self.group)

    @property
    def shift_part(self) -> str:
        """Name of the part that shifts the grid."""
        return f"{self.dialect}_{'row' if self.group == 'row' else 'group'}"


class IntTwoLevel:
    """The format object; see the module's text for layout and maths."""

    name = "int_two_level"
    Options = IntTwoLevelOptions
    tile = 1

    def padded_k(self, k: int, options: IntTwoLevelOptions) -> int:
        """K rounded up to whole groups (a row: to a multiple of 8)."""
        return -(-k // options.unit) * options.unit

    def group_size(self, k: int, options: IntTwoLevelOptions) -> int:
        """Columns that share a scale."""
        return self.padded_k(k, options) if options.group == "row" else options.unit

    def part_specs(
        self, shape: tuple[int, ...], options: IntTwoLevelOptions
    ) -> dict[str, PartSpec]:
        """Stored parts of a weight of `shape`; FormatError if it has fewer than two axes."""
        if len(shape) < 2 or min(shape) < 1:
            raise FormatError(
                f"int_two_level stores weights [..., N, K] of positive size, got {shape}"
            )
        padded, rows = self.padded_k(shape[-1], options), shape[:-1]
        specs = {
            "codes": PartSpec(torch.uint8, (*rows, padded // 2)),
            "scale_row": PartSpec(torch.float16, (*rows, 1)),
        }
        shift = torch.uint8 if options.dialect == "zero" else torch.int8
        if options.group == "row":
            shift = torch.uint8 if options.dialect == "zero" else torch.float16
            return specs | {options.shift_part: PartSpec(shift, (*rows, 1))}
        by_group = (*rows, padded // options.unit)
        return specs | {
            "scale_group": PartSpec(torch.uint8, by_group),
            options.shift_part: PartSpec(shift, by_group),
        }

    def padded_shape(
        self, part_shapes: Mapping[str, tuple[int, ...]], options: IntTwoLevelOptions
    ) -> tuple[int, ...]:
        """[..., N, Kp], told from the shape of `codes`."""
        shape = part_shapes.get("codes", ())
        if len(shape) < 2:
            raise FormatError(f"int_two_level: codes must be [..., N, bytes], got {list(shape)}")
        return (*shape[:-1], shape[-1] * 2)

    def bits(self, shape: tuple[int, ...], options: IntTwoLevelOptions) -> float:
        """Stored bits per weight, padding and scales included."""
        stored = sum(spec.n_bytes for spec in self.part_specs(shape, options).values())
        return 8 * stored / torch.Size(shape).numel()

    def fit(
        self, weight: torch.Tensor, options: IntTwoLevelOptions, clip: torch.Tensor | None = None
    ) -> Parts:
        """Scales of fp32 `weight` [..., N, Kp]; each group covers `clip` times its own range."""
        low, high, row = self._ranges(weight, options)
        return _grid(low, high, row, options, 1.0 if clip is None else clip, 0.0)

    def candidates(self, weight: torch.Tensor, options: IntTwoLevelOptions) -> Iterator[Parts]:
        """Joint choices of step and shift: shares of the range, each grid also moved by parts of
        a step. All leave int8 to no code."""
        low, high, row = self._ranges(weight, options)
        for factor in _FACTORS:
            for shift in _SHIFTS[options.dialect]:
                yield _grid(low, high, row, options, factor, shift)

    def _ranges(
        self, weight: torch.Tensor, options: IntTwoLevelOptions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Smallest and largest value of each group, in units of the row's scale, and that scale
        (group "row": in units of the weight, and None)."""
        groups = weight.unflatten(-1, (-1, self.group_size(weight.shape[-1], options)))
        low, high = groups.amin(-1), groups.amax(-1)
        if options.dialect == "zero":
            low, high = low.clamp(max=0), high.clamp(min=0)
        if options.group == "row":
            return low, high, None
        largest = torch.maximum(high, -low).amax(-1, keepdim=True)
        row = _stored_scale(largest / PROTECTIVE_RANGE)
        return low / row.float(), high / row.float(), row

    def round(
        self,
        columns: torch.Tensor,
        scales: Mapping[str, torch.Tensor],
        start: int | torch.Tensor,
        options: IntTwoLevelOptions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Nearest codes and values of `columns` [..., N, t] beginning at column `start`."""
        whole = False
        if isinstance(start, torch.Tensor):
            picked = _gather(scales, start // options.unit, options)
        else:
            index, whole = _group_index(columns.shape[-1], start, options)
            picked = {n: p if n.endswith("_row") else p[..., index] for n, p in scales.items()}
        if whole:
            picked = {name: part.unsqueeze(-1) for name, part in picked.items()}
            columns = columns.unflatten(-1, (-1, options.unit))
        codes = _nearest(columns, picked, options)
        stored = codes.to(torch.uint8)
        values = _decode(codes, picked, options)
        return (stored.flatten(-2), values.flatten(-2)) if whole else (stored, values)

    def pack(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], options: IntTwoLevelOptions
    ) -> Parts:
        """Stored parts of uint8 codes [..., N, Kp]."""
        return {"codes": pack_bits(codes, 4), **scales}

    def unpack(
        self,
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        options: IntTwoLevelOptions,
    ) -> torch.Tensor:
        """Weight fp32 of `shape`; w8 is exact, so groups see one rounding, in the product."""
        codes = unpack_bits(parts["codes"], 4).unflatten(
            -1, (parts[options.shift_part].shape[-1], -1)
        )
        by_group = {name: part.unsqueeze(-1) for name, part in parts.items() if name != "codes"}
        values = _decode(codes.float(), by_group, options)
        return values.flatten(-2)[..., : shape[-1]]

    def integer_form(
        self,
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        options: IntTwoLevelOptions,
    ) -> IntegerForm:
        """Groups: w8 under scale_row. Row, "zero": code − z. Row, "offset": code − 8, which lies
        around zero, so that offset = o + 8·s1 is small and its product with Σx loses little."""
        codes = unpack_bits(parts["codes"], 4)
        scale = parts["scale_row"].float()
        shift = parts[options.shift_part]
        # Bytes wrap mod 256; the results fit int8, so they are right when read as int8.
        if options.group == "row":
            if options.dialect == "zero":
                return IntegerForm((codes - shift)[..., : shape[-1]].view(torch.int8), scale)
            signed = (codes - 8)[..., : shape[-1]].view(torch.int8)
            return IntegerForm(signed, scale, shift.float() + 8 * scale)
        groups = codes.unflatten(-1, (shift.shape[-1], -1))
        step, shift = parts["scale_group"].unsqueeze(-1), shift.view(torch.uint8).unsqueeze(-1)
        if options.dialect == "zero":
            groups = groups.sub_(shift).mul_(step)
        else:
            groups = groups.mul_(step).add_(shift)
        return IntegerForm(groups.flatten(-2)[..., : shape[-1]].view(torch.int8), scale)

    def slice(
        self,
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        options: IntTwoLevelOptions,
        axis: int,
        start: int,
        stop: int,
    ) -> Parts:
        """Parts of rows or experts [start, stop), or of columns that are whole groups."""
        size = shape[axis]
        if not 0 <= start < stop <= size:
            raise FormatError(
                f"int_two_level: cannot cut {start} to {stop} out of an axis of {size}"
            )
        if axis % len(shape) != len(shape) - 1:
            index = (slice(None),) * (axis % len(shape)) + (slice(start, stop),)
            return {name: part[index] for name, part in parts.items()}
        unit = options.unit
        if start % unit or (stop % unit and stop != size):
            raise FormatError(
                f"int_two_level: columns are cut at multiples of {unit}, got {start} to {stop}"
            )
        stop = self.padded_k(stop, options)
        spans = {"codes": slice(start // 2, stop // 2)}
        if options.group != "row":
            spans |= dict.fromkeys(
                ("scale_group", options.shift_part), slice(start // unit, stop // unit)
            )
        return {name: part[..., spans.get(name, slice(None))] for name, part in parts.items()}

    def check(
        self,
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        options: IntTwoLevelOptions,
    ) -> None:
        """FormatError unless every part has its dtype and shape, every stored value is valid, and
        every stored code decodes to int8."""
        specs = self.part_specs(shape, options)
        if set(parts) != set(specs):
            raise FormatError(f"int_two_level: parts must be {sorted(specs)}, got {sorted(parts)}")
        for name, spec in specs.items():
            found = PartSpec(parts[name].dtype, tuple(parts[name].shape))
            if found != spec:
                raise FormatError(
                    f"int_two_level: {name} must be {spec.dtype} {spec.shape}, "
                    f"got {found.dtype} {found.shape}"
                )
        for name in ("scale_row", "offset_row"):
            if name in parts and not torch.isfinite(parts[name]).all():
                raise FormatError(f"int_two_level: {name} holds NaN or Inf; the file is damaged")
        if not bool((parts["scale_row"] > 0).all()):
            lowest = float(parts["scale_row"].min())
            raise FormatError(f"int_two_level: scale_row must be positive, got {lowest}")
        if options.dialect == "zero":
            _check_within(parts, options.shift_part, 0, _TOP)
        if options.group != "row":
            _check_within(parts, "scale_group", 1, MAX_SCALE_GROUP)
            _check_int8(parts, options)


def _grid(
    low: torch.Tensor,
    high: torch.Tensor,
    row: torch.Tensor | None,
    options: IntTwoLevelOptions,
    factor: float | torch.Tensor,
    shift: float,
) -> Parts:
    """Scale parts whose 16 values are centred on `factor` times the range low … high, moved by
    `shift` steps. A step that rounded down then clips both ends by half of what it lacks."""
    middle, step = (high + low) * (0.5 * factor), (high - low) * (factor / _TOP)
    if row is None:
        scale = _stored_scale(step)
        step = scale.float()
        parts = {"scale_row": scale}
    else:
        step = torch.round(step).clamp_(1, MAX_SCALE_GROUP)
        parts = {"scale_row": row, "scale_group": step.to(torch.uint8)}
    lowest = middle + step * (shift - _TOP / 2)
    if options.dialect == "zero":
        shifted = torch.round(-lowest / step).clamp_(0, _TOP).to(torch.uint8)
    elif row is None:
        shifted = _stored_offset(lowest, step)
    else:
        shifted = torch.minimum(torch.round(lowest), 127 - _TOP * step)
        shifted = shifted.clamp_(min=-128).to(torch.int8)
    return parts | {options.shift_part: shifted}


def _group_index(
    n_columns: int, start: int, options: IntTwoLevelOptions
) -> tuple[slice | torch.Tensor, bool]:
    """Groups of columns start … start+n; True if they are several whole ones, in order."""
    if options.group == "row":
        return slice(0, 1), False
    first, last = start // options.unit, (start + n_columns - 1) // options.unit
    if first == last:
        return slice(first, first + 1), False
    if start % options.unit == 0 and n_columns % options.unit == 0:
        return slice(first, last + 1), True
    return torch.arange(start, start + n_columns) // options.unit, False


def _gather(
    scales: Mapping[str, torch.Tensor], group: torch.Tensor, options: IntTwoLevelOptions
) -> Parts:
    """Scale parts [B, N, 1] of one group for each matrix of a batch, `group` int64 [B]."""
    if options.group == "row":
        return dict(scales)
    index = group.view(-1, 1, 1).expand(-1, scales["scale_row"].shape[-2], 1)
    return {n: p if n.endswith("_row") else p.gather(-1, index) for n, p in scales.items()}


def _nearest(
    columns: torch.Tensor, scales: Mapping[str, torch.Tensor], options: IntTwoLevelOptions
) -> torch.Tensor:
    """Nearest valid codes, as fp32; scales broadcast against columns."""
    step = unit = scales["scale_row"].float()
    shift = scales[options.shift_part].float()
    if options.group != "row":
        unit = scales["scale_group"].float()
        step = step * unit
    origin = shift if options.dialect == "zero" else shift / -unit
    codes = torch.addcmul(origin, columns, step.reciprocal()).round_().clamp_(0, _TOP)
    if options.dialect == "zero" and options.group != "row":
        lowest, highest = shift - torch.floor(128 / unit), shift + torch.floor(127 / unit)
        codes = torch.minimum(torch.maximum(codes, lowest), highest)
    return codes


def _decode(
    codes: torch.Tensor, scales: Mapping[str, torch.Tensor], options: IntTwoLevelOptions
) -> torch.Tensor:
    """Values of fp32 `codes`, which are overwritten; scales broadcast against them."""
    row, shift = scales["scale_row"].float(), scales[options.shift_part].float()
    if options.dialect == "zero":
        codes = codes.sub_(shift)
        if options.group != "row":
            codes = codes.mul_(scales["scale_group"].float())
        return codes.mul_(row)
    if options.group == "row":
        return codes.mul_(row).add_(shift)
    return codes.mul_(scales["scale_group"].float()).add_(shift).mul_(row)


def _stored_scale(scale: torch.Tensor) -> torch.Tensor:
    """Round to fp16; never zero. Subnormal scales round up, so that a coarse one never clips."""
    largest = scale.max()
    if not bool(largest <= _FP16.max):
        raise FormatError(
            f"int_two_level: a row scale of {float(largest):.3g} does not fit fp16 (at most "
            f"{_FP16.max:.3g}); store this tensor in another format, or the weight holds NaN or Inf"
        )
    small = torch.ceil(scale / _FP16_STEP).clamp_(min=1).mul_(_FP16_STEP)
    return torch.where(scale < _FP16.smallest_normal, small, scale).half()


def _stored_offset(offset: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Round the row's smallest value to fp16; it may be moved into range by a step, not by more."""
    stored = offset.clamp(-_FP16.max, _FP16.max)
    if not bool(((offset - stored).abs() <= step).all()):
        raise FormatError(
            f"int_two_level: a row offset of {float(offset.abs().max()):.3g} does not fit fp16 "
            f"(at most {_FP16.max:.3g}); use dialect = 'zero' or a group"
        )
    return stored.half()


def _check_within(parts: Mapping[str, torch.Tensor], name: str, lowest: int, highest: int) -> None:
    found = (int(parts[name].min()), int(parts[name].max()))
    if found[0] < lowest or found[1] > highest:
        raise FormatError(
            f"int_two_level: {name} must lie in {lowest} to {highest}, got {found[0]} to {found[1]}"
        )


def _check_int8(parts: Mapping[str, torch.Tensor], options: IntTwoLevelOptions) -> None:
    """Every stored code of a group must decode to −128 … 127; the extreme codes tell."""
    step, shift = parts["scale_group"].int(), parts[options.shift_part].int()
    groups = unpack_bits(parts["codes"], 4).unflatten(-1, (shift.shape[-1], -1))
    for extreme in (groups.amin(-1), groups.amax(-1)):
        code = extreme.int()
        value = (code - shift) * step if options.dialect == "zero" else code * step + shift
        wrong = (value < -128) | (value > 127)
        if bool(wrong.any()):
            raise FormatError(
                f"int_two_level: codes must decode to -128 to 127 before the row's scale, "
                f"got {int(value[wrong][0])} in {int(wrong.sum())} groups"
            )


FORMAT = IntTwoLevel()
