"""`int_group`: b-bit integers, one scale (and zero point) for each group of columns.

    w[n, k] = (code[n, k] − zero[n, g]) · scale[n, g]          g = k // group

2 to 8 bits; groups of 16, 32, 64, 128 columns or the whole row; scales in fp16 or bf16. K is padded
to whole groups (a whole row: to a multiple of 8), the padding decodes to zero and is dropped.

symmetric:   zero is 2^(b−1), not stored. The scale is *signed*: the grid −2^(b−1) … 2^(b−1)−1 has
             one more value on its negative side, so the scale takes the sign that puts the value
             of largest magnitude there. That uses the whole grid: a step of |max|/2^(b−1), not
             |max|/(2^(b−1)−1), at no stored bit.
asymmetric:  zero is an integer code 0 … 2^b−1, one byte for each group.

Parts, for a weight [..., N, K], Kp = padded K, G = Kp / group
  codes       uint8      [..., N, Kp·b/8]   little-endian bit stream, row by row
  scale_group fp16|bf16  [..., N, G]
  zero_group  uint8      [..., N, G]        asymmetric only

Code k of a row occupies bits k·b … k·b+b−1 of the row's stream; bit i of the stream is bit i % 8 of
byte i // 8. So 8 codes take b whole bytes. Two of the widths:

  4 bits   byte 0   bit 7..4 = code 1     bit 3..0 = code 0
  3 bits   byte 0   bit 7..6 = code 2 low two bits   bit 5..3 = code 1   bit 2..0 = code 0
           byte 1   bit 7 = code 5 low bit   6..4 = code 4   3..1 = code 3   0 = code 2 high bit
           byte 2   bit 7..5 = code 7   4..2 = code 6   1..0 = code 5 high two bits

This module does not choose clipping or rounding direction: passes do.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..errors import FormatError, RecipeError
from ..format import IntegerForm, Parts, PartSpec

_GROUPS = (16, 32, 64, 128)
_SCALE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_FP16_STEP = 2.0**-24  # distance of neighbouring fp16 numbers below 2^-14
# Codes are gathered into one machine word before they are cut into bytes: width -> (codes, dtype).
_WORDS = {
    2: (4, torch.uint8),
    4: (2, torch.uint8),
    8: (1, torch.uint8),
    **dict.fromkeys((3, 5, 6, 7), (8, torch.int64)),
}


@dataclass(frozen=True)
class IntGroupOptions:
    """Recipe keys of `int_group`.

    bits: 2 to 8. group: columns that share a scale, 16, 32, 64, 128 or "row".
    symmetric: zero point fixed at the middle code. scale: "fp16" or "bf16".
    """

    bits: int = 4
    group: int | str = 128
    symmetric: bool = True
    scale: str = "fp16"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise RecipeError(f"int_group: bits must be a whole number 2 to 8, got {self.bits!r}")
        if isinstance(self.group, bool) or self.group not in (*_GROUPS, "row"):
            raise RecipeError(
                f"int_group: group must be 16, 32, 64, 128 or 'row', got {self.group!r}"
            )
        if not isinstance(self.symmetric, bool):
            raise RecipeError(f"int_group: symmetric must be true or false, got {self.symmetric!r}")
        if self.scale not in tuple(_SCALE_DTYPES):
            raise RecipeError(f"int_group: scale must be 'fp16' or 'bf16', got {self.scale!r}")


class IntGroup:
    """The format object; see the module's text for layout and maths."""

    name = "int_group"
    Options = IntGroupOptions
    tile = 1

    def padded_k(self, k: int, options: IntGroupOptions) -> int:
        """K rounded up to whole groups (a whole row: to a multiple of 8)."""
        unit = 8 if options.group == "row" else int(options.group)
        return -(-k // unit) * unit

    def group_size(self, k: int, options: IntGroupOptions) -> int:
        """Columns that share a scale."""
        return self.padded_k(k, options) if options.group == "row" else int(options.group)

    def part_specs(self, shape: tuple[int, ...], options: IntGroupOptions) -> dict[str, PartSpec]:
        """Stored parts of a weight of `shape`; FormatError if it has fewer than two axes."""
        if len(shape) < 2 or min(shape) < 1:
            raise FormatError(f"int_group stores weights [..., N, K] of positive size, got {shape}")
        padded = self.padded_k(shape[-1], options)
        rows = shape[:-1]
        n_groups = padded // self.group_size(shape[-1], options)
        specs = {
            "codes": PartSpec(torch.uint8, (*rows, padded * options.bits // 8)),
            "scale_group": PartSpec(_SCALE_DTYPES[options.scale], (*rows, n_groups)),
        }
        if not options.symmetric:
            specs["zero_group"] = PartSpec(torch.uint8, (*rows, n_groups))
        return specs

    def padded_shape(
        self, part_shapes: Mapping[str, tuple[int, ...]], options: IntGroupOptions
    ) -> tuple[int, ...]:
        """[..., N, Kp], told from the shape of `codes`."""
        shape = part_shapes.get("codes", ())
        if len(shape) < 2:
            raise FormatError(f"int_group: codes must be [..., N, bytes], got {list(shape)}")
        return (*shape[:-1], shape[-1] * 8 // options.bits)

    def bits(self, shape: tuple[int, ...], options: IntGroupOptions) -> float:
        """Stored bits per weight, padding and scales included."""
        stored = sum(spec.n_bytes for spec in self.part_specs(shape, options).values())
        return 8 * stored / torch.Size(shape).numel()

    def fit(
        self, weight: torch.Tensor, options: IntGroupOptions, clip: torch.Tensor | None = None
    ) -> Parts:
        """Scales of fp32 `weight` [..., N, Kp]; each group covers `clip` times its own range."""
        groups = weight.unflatten(-1, (-1, self.group_size(weight.shape[-1], options)))
        low, high = groups.amin(-1), groups.amax(-1)  # measured 14x faster than aminmax(dim)
        if clip is not None:
            low, high = low * clip, high * clip
        if options.symmetric:
            extreme = torch.where(high > -low, high, low)
            return {"scale_group": _stored_scale(extreme / -(1 << (options.bits - 1)), options)}
        top = (1 << options.bits) - 1
        low, high = low.clamp(max=0), high.clamp(min=0)  # zero must stay representable
        scale = _stored_scale((high - low) / top, options)
        zero = torch.round(-low / scale.float()).clamp_(0, top)
        return {"scale_group": scale, "zero_group": zero.to(torch.uint8)}

    def round(
        self,
        columns: torch.Tensor,
        scales: Mapping[str, torch.Tensor],
        start: int | torch.Tensor,
        options: IntGroupOptions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Nearest codes and values of `columns` [..., N, t] beginning at column `start`."""
        if isinstance(start, torch.Tensor):
            scale, zero = self._pick(scales, start, options)
        else:
            scale, zero = self._spread(scales, columns.shape[-1], start, options)
        size = scale.shape[-1] if scale.dim() == columns.dim() else 0
        shaped = columns if size else columns.unflatten(-1, (scale.shape[-2], -1))
        codes = torch.round(shaped * scale.reciprocal()).add_(zero)
        codes.clamp_(0, (1 << options.bits) - 1)
        values = (codes - zero).mul_(scale)
        return codes.to(torch.uint8).view(columns.shape), values.view(columns.shape)

    def _pick(
        self, scales: Mapping[str, torch.Tensor], start: torch.Tensor, options: IntGroupOptions
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Scale and zero [B, N, 1] of one column for each matrix of a batch, `start` [B]."""
        stored = scales["scale_group"]
        group = start // int(options.group) if options.group != "row" else torch.zeros_like(start)
        index = group.view(-1, 1, 1).expand(-1, stored.shape[-2], 1)
        scale = stored.gather(-1, index).float()
        if options.symmetric:
            return scale, float(1 << (options.bits - 1))
        return scale, scales["zero_group"].gather(-1, index).float()

    def _spread(
        self,
        scales: Mapping[str, torch.Tensor],
        n_columns: int,
        start: int,
        options: IntGroupOptions,
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Scale and zero that broadcast against columns start … start+n, or against their view
        [..., N, groups, group] when they are whole groups (one more axis tells which)."""
        stored = scales["scale_group"]
        size = self._group_of(stored, options, start + n_columns)
        first, last = start // size, (start + n_columns - 1) // size
        middle = float(1 << (options.bits - 1))
        if first == last:
            index: slice | torch.Tensor = slice(first, first + 1)
            view = False
        elif start % size == 0 and n_columns % size == 0:
            index, view = slice(first, last + 1), True
        else:
            columns = torch.arange(start, start + n_columns, device=stored.device)
            index, view = columns // size, False
        scale = stored[..., index].float()
        zero: torch.Tensor | float = middle
        if not options.symmetric:
            zero = scales["zero_group"][..., index].float()
        if not view:
            return scale, zero
        return scale.unsqueeze(-1), zero if isinstance(zero, float) else zero.unsqueeze(-1)

    @staticmethod
    def _group_of(scale: torch.Tensor, options: IntGroupOptions, end: int) -> int:
        return max(end, 1) if options.group == "row" else int(options.group)

    def pack(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], options: IntGroupOptions
    ) -> Parts:
        """Stored parts of uint8 codes [..., N, Kp]."""
        return {"codes": pack_bits(codes, options.bits), **scales}

    def unpack(
        self,
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        options: IntGroupOptions,
    ) -> torch.Tensor:
        """Weight fp32 of `shape`: (code − zero) · scale, one rounding in the product."""
        codes = unpack_bits(parts["codes"], options.bits)
        groups = codes.unflatten(-1, (parts["scale_group"].shape[-1], -1)).float()
        zero: torch.Tensor | float = float(1 << (options.bits - 1))
        if not options.symmetric:
            zero = parts["zero_group"].float().unsqueeze(-1)
        values = groups.sub_(zero).mul_(parts["scale_group"].float().unsqueeze(-1))
        return values.flatten(-2)[..., : shape[-1]]

    def candidates(self, weight: torch.Tensor, options: IntGroupOptions) -> Iterator[Parts]:
        """Scales for the whole range of each group down to 60 % of it."""
        n_groups = weight.shape[-1] // self.group_size(weight.shape[-1], options)
        for factor in torch.linspace(1.0, 0.6, 9).tolist():
            clip = weight.new_full((*weight.shape[:-1], n_groups), factor)
            yield self.fit(weight, options, clip)

    def integer_form(
        self,
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        options: IntGroupOptions,
    ) -> IntegerForm | None:
        """Symmetric codes under whole-row scales, zero point removed; None for any other options."""
        if options.group != "row" or not options.symmetric:
            return None
        codes = unpack_bits(parts["codes"], options.bits)[..., : shape[-1]]
        # uint8 subtraction wraps; read as int8 the result is code − 2^(b−1)
        signed = (codes - (1 << (options.bits - 1))).view(torch.int8)
        return IntegerForm(signed, parts["scale_group"].float())

    def slice(
        self,
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        options: IntGroupOptions,
        axis: int,
        start: int,
        stop: int,
    ) -> Parts:
        """Parts of rows or experts [start, stop), or of columns that are whole groups."""
        size = shape[axis]
        if not 0 <= start < stop <= size:
            raise FormatError(f"int_group: cannot cut {start} to {stop} out of an axis of {size}")
        if axis % len(shape) != len(shape) - 1:
            index = (slice(None),) * (axis % len(shape)) + (slice(start, stop),)
            return {name: part[index] for name, part in parts.items()}
        unit = 8 if options.group == "row" else int(options.group)
        if start % unit or (stop % unit and stop != shape[-1]):
            raise FormatError(
                f"int_group: columns are cut at multiples of {unit}, got {start} to {stop}"
            )
        stop = self.padded_k(stop, options)
        cut = {"codes": parts["codes"][..., start * options.bits // 8 : stop * options.bits // 8]}
        for name in parts.keys() - {"codes"}:
            whole_row = options.group == "row"
            cut[name] = parts[name] if whole_row else parts[name][..., start // unit : stop // unit]
        return {name: cut[name] for name in parts}

    def check(
        self,
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        options: IntGroupOptions,
    ) -> None:
        """FormatError unless every part has its dtype and shape and every stored value is valid."""
        specs = self.part_specs(shape, options)
        if set(parts) != set(specs):
            raise FormatError(f"int_group: parts must be {sorted(specs)}, got {sorted(parts)}")
        for name, spec in specs.items():
            found = PartSpec(parts[name].dtype, tuple(parts[name].shape))
            if found != spec:
                raise FormatError(
                    f"int_group: {name} must be {spec.dtype} {spec.shape}, "
                    f"got {found.dtype} {found.shape}"
                )
        if not torch.isfinite(parts["scale_group"]).all():
            raise FormatError("int_group: scale_group holds NaN or Inf; the file is damaged")
        if not options.symmetric:
            top = int(parts["zero_group"].max())
            if top >= 1 << options.bits:
                raise FormatError(
                    f"int_group: zero_group must be below {1 << options.bits}, got {top}"
                )


def _stored_scale(scale: torch.Tensor, options: IntGroupOptions) -> torch.Tensor:
    """Round to the stored dtype; never zero (a group of zeros decodes to zeros with any scale).

    fp16 scales below 6.1e-5 are subnormal, multiples of 2^-24. They are normal in practice: an
    8-bit group whose largest weight is under 0.0078 has one. There the magnitude rounds up, so
    that a coarse scale never clips; a group far below 2^-24 rounds to zeros.
    """
    dtype = _SCALE_DTYPES[options.scale]
    limits = torch.finfo(dtype)
    size = scale.abs()
    if not bool((size <= limits.max).all()):
        raise FormatError(
            f"int_group: a scale of {float(size.max()):.3g} does not fit {options.scale} "
            f"(at most {limits.max:.3g}); use scale = 'bf16', or the weight holds NaN or Inf"
        )
    step = limits.smallest_normal if dtype is torch.bfloat16 else _FP16_STEP
    small = torch.ceil(size / step).clamp_(min=1).mul_(step)
    small = torch.where(scale < 0, -small, small)
    return torch.where(size < limits.smallest_normal, small, scale).to(dtype)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [..., n], n a multiple of 8, to a little-endian bit stream [..., n·bits/8]."""
    per_word, dtype = _WORDS[bits]
    if per_word == 1:
        return codes.contiguous()
    words = codes.unflatten(-1, (-1, per_word))
    stream = words[..., 0].to(dtype)
    for index in range(1, per_word):
        stream = stream | (words[..., index].to(dtype) << (index * bits))
    if dtype is torch.uint8:
        return stream.contiguous()
    as_bytes = stream.contiguous().view(torch.uint8).unflatten(-1, (-1, 8))
    return as_bytes[..., :bits].flatten(-2).contiguous()


def unpack_bits(stream: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack_bits`: uint8 codes [..., n]."""
    per_word, dtype = _WORDS[bits]
    if per_word == 1:
        return stream
    if dtype is torch.uint8:
        words = stream
    else:
        as_bytes = stream.unflatten(-1, (-1, bits))
        padded = torch.nn.functional.pad(as_bytes, (0, 8 - bits)).contiguous()
        words = padded.view(torch.int64).squeeze(-1)
    mask = (1 << bits) - 1
    columns = [((words >> (index * bits)) & mask).to(torch.uint8) for index in range(per_word)]
    return torch.stack(columns, dim=-1).flatten(-2)


FORMAT = IntGroup()
