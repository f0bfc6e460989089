"""The seam between rounding and storage: what every storage format answers.

A pass decides *which* value a weight should be rounded to; a format knows which values exist and
how they are stored. One GPTQ serves every format because it only calls `fit`, `round` and `pack`.

Shapes: a weight is [..., N, K] with any number of leading (expert) axes; scales are a mapping of
part name to tensor. A format pads K up to `padded_k`; padding columns hold zero and are dropped
by `unpack`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import Any, Protocol

import torch

from .errors import RecipeError, nearest_name
from .packed import PackedTensor, Term
from .registry import discover

Parts = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PartSpec:
    """dtype and shape of a stored part, known before any weight was read.

    ternary_columns: K, if the part holds K ternaries a row, five in a byte; for a codec of their own.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    ternary_columns: int | None = field(default=None, compare=False)

    @property
    def n_bytes(self) -> int:
        """Bytes that the part takes on disk."""
        return self.dtype.itemsize * prod(self.shape)


@dataclass(frozen=True)
class IntegerForm:
    """A weight as integers under one scale (and offset) for each row, for integer products:

        w[.., n, k] = codes[.., n, k] · scale[.., n, 0] + offset[.., n, 0]

    codes int8 [.., N, K] without padding; scale, offset fp32 [.., N, 1], offset None for zero.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None = None


class Format(Protocol):
    """One storage format. A module in `quant/formats/` exposes it as `FORMAT`."""

    name: str
    Options: type[Any]  # frozen dataclass; its fields are the recipe keys
    tile: int  # columns that are rounded jointly

    def padded_k(self, k: int, options: Any) -> int:
        """K after padding to whole groups."""
        ...

    def group_size(self, k: int, options: Any) -> int:
        """Columns that share a scale."""
        ...

    def part_specs(self, shape: tuple[int, ...], options: Any) -> dict[str, PartSpec]:
        """Stored parts of a weight of `shape` [..., N, K]. FormatError if the shape is impossible."""
        ...

    def padded_shape(
        self, part_shapes: Mapping[str, tuple[int, ...]], options: Any
    ) -> tuple[int, ...]:
        """[..., N, padded K] of the weight whose stored parts have these shapes; FormatError if
        they cannot be told from them."""
        ...

    def fit(self, weight: torch.Tensor, options: Any, clip: torch.Tensor | None = None) -> Parts:
        """Scales of `weight` fp32 [..., N, padded K]; `clip` [..., N, groups] in (0, 1] shrinks the
        range that a group covers. Scales come back as stored (already rounded to their dtype)."""
        ...

    def round(
        self,
        columns: torch.Tensor,
        scales: Mapping[str, torch.Tensor],
        start: int | torch.Tensor,
        options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Nearest codes (uint8) and values (fp32) of `columns` [..., N, t], t ≥ 1 consecutive
        columns beginning at column `start`; an int64 `start` [B] gives each matrix of a batch
        [B, N, tile] its own tile. Only valid codes are returned."""
        ...

    def pack(self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], options: Any) -> Parts:
        """Stored parts of codes [..., N, padded K]."""
        ...

    def unpack(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], options: Any
    ) -> torch.Tensor:
        """Weight fp32 of `shape` [..., N, K]."""
        ...

    def slice(
        self,
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        options: Any,
        axis: int,
        start: int,
        stop: int,
    ) -> Parts:
        """Parts of rows (`axis` -2), columns (-1, whole groups only) or experts (0 of 3)."""
        ...

    def check(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], options: Any
    ) -> None:
        """FormatError unless dtypes, shapes and stored values are valid."""
        ...

    def bits(self, shape: tuple[int, ...], options: Any) -> float:
        """Stored bits per weight, padding and scales included."""
        ...

    def candidates(self, weight: torch.Tensor, options: Any) -> Iterator[Parts]:
        """Scales that a search may choose from, each as `fit` returns them, best guess first, all
        valid. Parts with one number per group, or with any number for a row that is one group, differ
        between them and may be mixed group by group; other parts are equal in all."""
        ...

    def integer_form(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], options: Any
    ) -> IntegerForm | None:
        """The weight as integers under row scales; None if these options do not allow it."""
        ...


def formats() -> dict[str, Format]:
    """Every format found in `quant/formats/` and in the entry-point group `fewbit.formats`."""
    return discover("fewbit.quant.formats", "FORMAT", "fewbit.formats")


def find_format(name: str) -> Format:
    """The format called `name`, or a RecipeError that names the nearest."""
    known = formats()
    if name not in known:
        raise RecipeError(
            f"unknown format {name!r}{nearest_name(name, known)}; known: {', '.join(sorted(known))}"
        )
    return known[name]


def parse_options(owner: str, options_type: type[Any], keys: Mapping[str, Any]) -> Any:
    """Build a frozen `Options` from recipe keys; RecipeError on unknown keys or bad values.

    `Options.__post_init__` of each format and pass checks values and raises RecipeError itself.
    """
    allowed = [field.name for field in fields(options_type)]
    for key in keys:
        if key not in allowed:
            raise RecipeError(
                f"{owner}: unknown key {key!r}{nearest_name(key, allowed)}; "
                f"allowed: {', '.join(allowed) or 'none'}"
            )
    return options_type(**keys)


def term_config(term: Term) -> dict[str, Any]:
    """JSON form of a term's format and options, as written to `quantization_config`."""
    return {"format": term.format, **asdict(term.options)}


def dequantize(packed: PackedTensor) -> torch.Tensor:
    """Σ of all terms, fp32, in logical orientation [N, K] or [E, N, K]."""
    total: torch.Tensor | None = None
    for term in packed.terms:
        value = find_format(term.format).unpack(term.parts, packed.shape, term.options)
        total = value if total is None else total + value
    if total is None:
        raise RecipeError("a packed tensor needs at least one term, got none")
    return total
