"""`int4_head`: cached vectors in 4 bits, one fp16 scale and minimum for each (token, head).

    x̂[d] = code[d] · scale + minimum          code 0 … 15

The minimum itself is stored, never a zero point −min/scale: that one overflows fp16 when a vector
is nearly constant. Codes are computed from the scale and minimum *as stored*, and clamped, so that
code 16 does not exist. The scale is at least the smallest positive fp16 number.

fit = "range"   minimum min(x), scale (max(x) − min(x)) / 15: every error is at most scale/2, plus
                what rounding scale and minimum to fp16 moves the ends of the range.
fit = "search"  of several ranges, the plain one among them, each followed by a least-squares fit of
                scale and minimum to its codes, the one with the smallest squared error. Ends that
                are clipped err by more than scale/2; the vector as a whole never by more.

Inputs beyond ±65504 saturate there. NaN makes the whole vector NaN: damage is not hidden.

Parts of a vector [D], D even
  codes    uint8  [D/2]   byte i   bit 7..4 = code 2i+1   bit 3..0 = code 2i
  scale    fp16   [1]
  minimum  fp16   [1]
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import FormatError, RecipeError
from ..format import Parts, PartSpec

_FITS = ("range", "search")
_FP16_MAX = 65504.0
_FP16_TINY = 2.0**-24  # smallest positive fp16 number
_TOP = 15
# Shares of the range that a candidate keeps below and above its middle. Measured on Gaussian,
# Laplace and one-outlier vectors, with the fits below: 7 % less RMS error than the plain range.
_LOW = (1.0, 0.9, 0.8, 1.0, 0.84)
_HIGH = (1.0, 0.9, 0.8, 0.84, 1.0)
_SEARCH_ELEMENTS = 1 << 21  # numbers searched at once, times the candidates: 40 MB


@dataclass(frozen=True)
class Int4HeadOptions:
    """Recipe keys of `int4_head`. fit: "search" (least squared error) or "range"."""

    fit: str = "search"

    def __post_init__(self) -> None:
        if self.fit not in _FITS:
            raise RecipeError(
                f"int4_head: fit must be {' or '.join(map(repr, _FITS))}, got {self.fit!r}"
            )


class Int4Head:
    """The page format object; see the module's text for layout and maths."""

    name = "int4_head"
    Options = Int4HeadOptions

    def part_specs(
        self, head_dim: int, dtype: torch.dtype, options: Int4HeadOptions
    ) -> dict[str, PartSpec]:
        """Codes, scale and minimum; FormatError if D is odd."""
        if head_dim < 2 or head_dim % 2:
            raise FormatError(
                f"int4_head stores two channels in a byte: the head size must be even, "
                f"got {head_dim}; use dense_head"
            )
        return {
            "codes": PartSpec(torch.uint8, (head_dim // 2,)),
            "scale": PartSpec(torch.float16, (1,)),
            "minimum": PartSpec(torch.float16, (1,)),
        }

    def encode(self, vectors: torch.Tensor, options: Int4HeadOptions) -> Parts:
        """Codes uint8 [..., D/2], scale and minimum fp16 [..., 1] of vectors [..., D]."""
        x = vectors.detach().float().clamp(-_FP16_MAX, _FP16_MAX)
        scale, minimum = _range_fit(x) if options.fit == "range" else _search_fit(x)
        codes = _codes(x, scale.float(), minimum.float()).nan_to_num(0).to(torch.uint8)
        return {
            "codes": codes[..., 0::2] | codes[..., 1::2] << 4,
            "scale": scale,
            "minimum": minimum,
        }

    def decode(
        self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype, options: Int4HeadOptions
    ) -> torch.Tensor:
        """Vectors [..., D], computed in fp32; in fp16 they saturate rather than overflow."""
        packed = parts["codes"]
        x = packed.new_empty((*packed.shape, 2), dtype=torch.float32)
        x[..., 0] = packed & 15
        x[..., 1] = packed >> 4
        x = x.flatten(-2).mul_(parts["scale"].float()).add_(parts["minimum"].float())
        return (x.clamp_(-_FP16_MAX, _FP16_MAX) if dtype == torch.float16 else x).to(dtype)


def _codes(x: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """Nearest codes of x, as floats 0 … 15 (NaN where x is)."""
    return ((x - minimum) / scale).round_().clamp_(0, _TOP)


def _stored(scale: torch.Tensor, minimum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in fp16; the scale is floored after rounding, which can make it zero."""
    return (
        scale.to(torch.float16).clamp_min(_FP16_TINY),
        minimum.clamp(-_FP16_MAX, _FP16_MAX).to(torch.float16),
    )


def _range_fit(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = x.aminmax(dim=-1, keepdim=True)
    return _stored((high - low) / _TOP, low)


def _search_fit(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum [..., 1] of least squared error among the candidates."""
    rows = x.reshape(-1, x.shape[-1])
    step = max(1, _SEARCH_ELEMENTS // rows.shape[-1])
    found = [_search_rows(part) for part in rows.split(step)]
    scale, minimum = (torch.cat(column) for column in zip(*found, strict=True))
    return scale.view(*x.shape[:-1], 1), minimum.view(*x.shape[:-1], 1)


def _search_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_search_fit`, for rows [R, D]; candidates [C, R, 1] are tried side by side."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    below, above = (x.new_tensor(shares).view(-1, 1, 1) for shares in (_LOW, _HIGH))
    plain = _stored((high - low) / _TOP, low)
    scale, minimum = _stored(half * (below + above) / _TOP, middle - half * below)
    scale, minimum = _least_squares(x, scale, minimum)
    scale = torch.cat([plain[0].unsqueeze(0), scale])
    minimum = torch.cat([plain[1].unsqueeze(0), minimum])
    error = _residue(x, scale, minimum).square_().sum(dim=-1, keepdim=True)
    best = error.argmin(dim=0, keepdim=True)
    return scale.gather(0, best)[0], minimum.gather(0, best)[0]


def _residue(x: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """Decoded minus x, [C, R, D]."""
    scale, minimum = scale.float(), minimum.float()
    return _codes(x, scale, minimum).mul_(scale).add_(minimum).sub_(x)


def _least_squares(
    x: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The line through (code, x) for the codes of `scale` and `minimum`, [C, R, 1].

    Where all codes are equal there is no line; scale and minimum stay.
    """
    codes = _codes(x, scale.float(), minimum.float())
    centre = codes.mean(dim=-1, keepdim=True)
    centred = codes.sub_(centre)
    spread = centred.square().sum(dim=-1, keepdim=True)
    mean = x.mean(dim=-1, keepdim=True)
    slope = (centred * x).sum(dim=-1, keepdim=True) / spread
    fitted = _stored(slope, mean - slope * centre)
    usable = (spread > 0) & fitted[1].isfinite() & fitted[0].isfinite()
    return torch.where(usable, fitted[0], scale), torch.where(usable, fitted[1], minimum)


PAGE_FORMAT = Int4Head()
