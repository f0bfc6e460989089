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
from ._grouped import SCALE_DTYPES, GroupedFormat, aligned, stored_scale

_GROUPS = (16, 32, 64, 128)
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
        if self.scale not in tuple(SCALE_DTYPES):
            raise RecipeError(f"int_group: scale must be 'fp16' or 'bf16', got {self.scale!r}")


class IntGroup(GroupedFormat[IntGroupOptions]):
    """The format object; see the module's text for layout and maths."""

    name = "int_group"
    Options = IntGroupOptions

    def specs(
        self, rows: tuple[int, ...], padded_k: int, n_groups: int, options: IntGroupOptions
    ) -> dict[str, PartSpec]:
        """Codes, scales and, if asymmetric, zeros."""
        specs = {
            "codes": PartSpec(torch.uint8, (*rows, padded_k * options.bits // 8)),
            "scale_group": PartSpec(SCALE_DTYPES[options.scale], (*rows, n_groups)),
        }
        if not options.symmetric:
            specs["zero_group"] = PartSpec(torch.uint8, (*rows, n_groups))
        return specs

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
        shaped, picked = aligned(columns, scales, start, options)
        scale = picked["scale_group"].float()
        zero: torch.Tensor | float = float(1 << (options.bits - 1))
        if not options.symmetric:
            zero = picked["zero_group"].float()
        codes = torch.round(shaped * scale.reciprocal()).add_(zero)
        codes.clamp_(0, (1 << options.bits) - 1)
        values = (codes - zero).mul_(scale)
        return codes.to(torch.uint8).reshape(columns.shape), values.reshape(columns.shape)

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

    def check_values(self, parts: Mapping[str, torch.Tensor], options: IntGroupOptions) -> None:
        """Zeros must be codes."""
        top = 0 if options.symmetric else int(parts["zero_group"].max())
        if top >= 1 << options.bits:
            raise FormatError(f"int_group: zero_group must be below {1 << options.bits}, got {top}")


def _stored_scale(scale: torch.Tensor, options: IntGroupOptions) -> torch.Tensor:
    return stored_scale(scale, options.scale, "int_group: a scale", "use scale = 'bf16'")


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
