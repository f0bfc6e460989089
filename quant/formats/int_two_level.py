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
from ._grouped import GroupedFormat, aligned, stored_scale
from .int_group import pack_bits, unpack_bits

PROTECTIVE_RANGE = 119  # largest |w / s1|: nearest codes of either dialect then stay in int8
MAX_SCALE_GROUP = 17  # 15 · 17 = 255 still fits a byte lane
_TOP = 15  # largest code
_GROUPS = (32, 64, 128)
_FP16_MAX = 65504.0
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
    def shift_part(self) -> str:
        """Name of the part that shifts the grid."""
        return f"{self.dialect}_{'row' if self.group == 'row' else 'group'}"


class IntTwoLevel(GroupedFormat[IntTwoLevelOptions]):
    """The format object; see the module's text for layout and maths."""

    name = "int_two_level"
    Options = IntTwoLevelOptions

    def specs(
        self, rows: tuple[int, ...], padded_k: int, n_groups: int, options: IntTwoLevelOptions
    ) -> dict[str, PartSpec]:
        """Codes, scales and shifts."""
        specs = {
            "codes": PartSpec(torch.uint8, (*rows, padded_k // 2)),
            "scale_row": PartSpec(torch.float16, (*rows, 1)),
        }
        by_group = (*rows, n_groups)
        if options.group == "row":
            shift = torch.uint8 if options.dialect == "zero" else torch.float16
        else:
            shift = torch.uint8 if options.dialect == "zero" else torch.int8
            specs["scale_group"] = PartSpec(torch.uint8, by_group)
        return specs | {options.shift_part: PartSpec(shift, by_group)}

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
        shaped, picked = aligned(columns, scales, start, options)
        codes = _nearest(shaped, picked, options)
        stored = codes.to(torch.uint8)
        values = _decode(codes, picked, options)
        return stored.reshape(columns.shape), values.reshape(columns.shape)

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

    def check_values(self, parts: Mapping[str, torch.Tensor], options: IntTwoLevelOptions) -> None:
        """Scales must be positive and within bounds, zeros codes; stored codes decode to int8."""
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
    remedy = "store this tensor in another format"
    return stored_scale(scale, "fp16", "int_two_level: a row scale", remedy)


def _stored_offset(offset: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Round the row's smallest value to fp16; it may be moved into range by a step, not by more."""
    stored = offset.clamp(-_FP16_MAX, _FP16_MAX)
    if not bool(((offset - stored).abs() <= step).all()):
        raise FormatError(
            f"int_two_level: a row offset of {float(offset.abs().max()):.3g} does not fit fp16 "
            f"(at most {_FP16_MAX:.3g}); use dialect = 'zero' or a group"
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
