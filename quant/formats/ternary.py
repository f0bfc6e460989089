"""`ternary`: each weight is the row's low level, zero, or its high level; five weights in a byte.

    code 0   w = 0
    code 1   w = low[n]       bf16, the row's minimum, at most 0
    code 2   w = high[n]      bf16, the row's maximum, at least 0

That is QMoE's rule. Nearest rounding sends to zero whatever lies within half a level of it; the ends
of a row are rare, so most codes are 0 (nine of ten for Gaussian rows of 2048) and an entropy coder
behind this format takes the file well below a bit a weight: `quant/codecs/rans32.py` codes the bytes,
`quant/codecs/dictionary.py` is QMoE's own coder.

Parts, for a weight [..., N, K]
  codes   uint8  [..., N, ⌈K/5⌉]   byte j of a row holds columns 5j … 5j+4, the first one lowest:
                                   c₀ + 3·c₁ + 9·c₂ + 27·c₃ + 81·c₄, that is 0 … 242
  levels  bf16   [..., N, 2]       low, high

      byte 0 = 0    all five zero          byte 121 = 1+3+9+27+81   all five low
      byte 5 = 2 + 3·1                     columns 0 and 1 are high and low, the others zero
      byte 242                             all five high

8/5 bits a weight and 32 bits a row. K is padded inside the last byte with code 0. Bytes of 243 and
above stand for no five codes: `check` refuses them.

Levels are rounded to bf16 once, in `fit`, and codes are chosen against them as stored. This module
does not choose how far a row is clipped: `candidates` lists what a search may try.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from ..errors import FormatError
from ..format import IntegerForm, Parts, PartSpec
from ._cuts import check_columns, cut_axis, cut_parts

PER_BYTE = 5
TOP_BYTE = 3**PER_BYTE - 1
_FACTORS = tuple(1 - step / 20 for step in range(15))  # shares of the range: 1.0 down to 0.3


@dataclass(frozen=True)
class TernaryOptions:
    """No keys."""


class Ternary:
    """The format object; see the module's text for layout and maths."""

    name = "ternary"
    Options = TernaryOptions
    tile = 1

    def padded_k(self, k: int, options: TernaryOptions) -> int:
        """K rounded up to whole bytes."""
        return -(-k // PER_BYTE) * PER_BYTE

    def group_size(self, k: int, options: TernaryOptions) -> int:
        """The whole row has one pair of levels."""
        return self.padded_k(k, options)

    def part_specs(self, shape: tuple[int, ...], options: TernaryOptions) -> dict[str, PartSpec]:
        """Codes and levels; FormatError if the shape has fewer than two axes or an empty one."""
        if len(shape) < 2 or min(shape) < 1:
            raise FormatError(f"ternary stores weights [..., N, K] of positive size, got {shape}")
        rows, n_bytes = shape[:-1], self.padded_k(shape[-1], options) // PER_BYTE
        return {
            "codes": PartSpec(torch.uint8, (*rows, n_bytes), ternary_columns=shape[-1]),
            "levels": PartSpec(torch.bfloat16, (*rows, 2)),
        }

    def padded_shape(
        self, part_shapes: Mapping[str, tuple[int, ...]], options: TernaryOptions
    ) -> tuple[int, ...]:
        """[..., N, 5 · bytes], told from the shape of `codes`."""
        shape = part_shapes.get("codes", ())
        if len(shape) < 2:
            raise FormatError(f"ternary: codes must be [..., N, bytes], got {list(shape)}")
        return (*shape[:-1], shape[-1] * PER_BYTE)

    def fit(
        self, weight: torch.Tensor, options: TernaryOptions, clip: torch.Tensor | None = None
    ) -> Parts:
        """Minimum and maximum of each row of fp32 `weight` [..., N, Kp], times `clip` [..., N, 1].

        A row on one side of zero gets 0 as its other level. FormatError for NaN, Inf, and what
        bf16 rounds to Inf.
        """
        low = weight.amin(-1, keepdim=True).clamp(max=0)
        high = weight.amax(-1, keepdim=True).clamp(min=0)
        levels = torch.cat([low, high], -1)
        if clip is not None:
            levels = levels * clip
        stored = levels.to(torch.bfloat16)
        if not bool(torch.isfinite(stored).all()):
            raise FormatError(
                f"ternary: a level of {float(levels.abs().max()):.3g} does not fit bf16 (at most "
                f"{torch.finfo(torch.bfloat16).max:.3g}); the weight holds NaN, Inf or a number "
                f"out of range: mend it, or keep it as it is with an override"
            )
        return {"levels": stored}

    def round(
        self,
        columns: torch.Tensor,
        scales: Mapping[str, torch.Tensor],
        start: int | torch.Tensor,
        options: TernaryOptions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Nearest codes and values of `columns` [..., N, t]; a tie goes to zero."""
        low, high = _levels(scales)
        is_low, is_high = columns < low / 2, columns > high / 2
        codes = (is_high.view(torch.uint8) * 2).add_(is_low.view(torch.uint8))
        return codes, _values(is_low, is_high, low, high)

    def pack(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], options: TernaryOptions
    ) -> Parts:
        """Stored parts of uint8 codes [..., N, Kp]."""
        return {"codes": pack_ternaries(codes), **scales}

    def unpack(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], options: TernaryOptions
    ) -> torch.Tensor:
        """Weight fp32 of `shape`, each number one of its row's levels or zero: exact."""
        codes = unpack_ternaries(parts["codes"])[..., : shape[-1]]
        return _values(codes == 1, codes == 2, *_levels(parts))

    def slice(
        self,
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        options: TernaryOptions,
        axis: int,
        start: int,
        stop: int,
    ) -> Parts:
        """Parts of rows or experts [start, stop), or of columns that fill bytes."""
        axis = cut_axis(self.name, shape, axis, start, stop)
        if axis != len(shape) - 1:
            return cut_parts(parts, axis, start, stop)
        check_columns(self.name, shape[-1], start, stop, PER_BYTE)
        cut = slice(start // PER_BYTE, -(-stop // PER_BYTE))
        return {"codes": parts["codes"][..., cut], "levels": parts["levels"]}

    def check(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], options: TernaryOptions
    ) -> None:
        """FormatError unless dtypes and shapes are right, bytes are at most 242, and
        −∞ < low ≤ 0 ≤ high < ∞ for every row."""
        specs = self.part_specs(shape, options)
        if set(parts) != set(specs):
            raise FormatError(f"ternary: parts must be {sorted(specs)}, got {sorted(parts)}")
        for name, spec in specs.items():
            found = PartSpec(parts[name].dtype, tuple(parts[name].shape))
            if found != spec:
                raise FormatError(
                    f"ternary: {name} must be {spec.dtype} {spec.shape}, "
                    f"got {found.dtype} {found.shape}"
                )
        if (top := int(parts["codes"].max())) > TOP_BYTE:
            raise FormatError(f"ternary: codes must be at most {TOP_BYTE}, got {top}")
        if not bool(torch.isfinite(parts["levels"]).all()):
            raise FormatError("ternary: levels holds NaN or Inf; the file is damaged")
        low, high = _levels(parts)
        if bool((low > 0).any()) or bool((high < 0).any()):
            raise FormatError(
                f"ternary: levels must be low ≤ 0 ≤ high, got low up to {float(low.max()):.3g} "
                f"and high down to {float(high.min()):.3g}"
            )

    def bits(self, shape: tuple[int, ...], options: TernaryOptions) -> float:
        """Stored bits per weight, padding and levels included."""
        stored = sum(spec.n_bytes for spec in self.part_specs(shape, options).values())
        return 8 * stored / torch.Size(shape).numel()

    def candidates(self, weight: torch.Tensor, options: TernaryOptions) -> Iterator[Parts]:
        """Levels at the ends of each row's range, and nearer to zero: down to 30 % of it."""
        for factor in _FACTORS:
            yield self.fit(weight, options, weight.new_full((*weight.shape[:-1], 1), factor))

    def integer_form(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], options: TernaryOptions
    ) -> IntegerForm | None:
        """None: three values at unequal distances are no integers under one scale."""
        return None


def _levels(scales: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high in fp32, each [..., N, 1]."""
    levels = scales["levels"].float()
    return levels[..., :1], levels[..., 1:]


def _values(
    is_low: torch.Tensor, is_high: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """fp32 [..., N, t]: levels where the masks say so, +0 elsewhere."""
    return torch.where(is_low, low, torch.where(is_high, high, low.new_zeros(())))


def pack_ternaries(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0 … 2 [..., n], n a multiple of 5, to bytes [..., n/5]."""
    digits = codes.unflatten(-1, (-1, PER_BYTE))
    packed = digits[..., PER_BYTE - 1]
    for place in range(PER_BYTE - 2, -1, -1):
        packed = packed * 3 + digits[..., place]
    return packed.contiguous()


def unpack_ternaries(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_ternaries`: uint8 codes [..., 5 · bytes] of bytes up to 242."""
    table = _digits().to(packed.device)
    digits = table.index_select(0, packed.reshape(-1).int())  # measured 4x faster than table[...]
    return digits.view(*packed.shape[:-1], -1)


@cache
def _digits() -> torch.Tensor:
    """uint8 [256, 5]: digits to base 3, the lowest first; rows of 243 and above are not used."""
    places = torch.tensor([3**place for place in range(PER_BYTE)])
    return (torch.arange(256).unsqueeze(1) // places % 3).to(torch.uint8)


FORMAT = Ternary()
