"""The seam between the KV cache and storage: what a format of cached keys or values answers.

A page format stores one vector of D numbers for each (token, head), independently of all others:
a token can be stored the moment it arrives, padding touches nobody's range, and what was stored is
never written again. Formats that group tokens need another seam and are not described here.

Shapes: vectors are [..., D]; parts have the same leading axes, then the shape of their `PartSpec`.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from .errors import RecipeError, nearest_name
from .format import Parts, PartSpec
from .registry import discover


class PageFormat(Protocol):
    """One format of cached vectors. A module in `quant/formats/` exposes it as `PAGE_FORMAT`."""

    name: str
    Options: type[Any]  # frozen dataclass; its fields are the recipe keys

    def part_specs(self, head_dim: int, dtype: torch.dtype, options: Any) -> dict[str, PartSpec]:
        """Stored parts of one vector [D] of a model that computes in `dtype`. FormatError if D is
        impossible."""
        ...

    def encode(self, vectors: torch.Tensor, options: Any) -> Parts:
        """Parts of vectors [..., D] of any float dtype; finite for every finite or infinite input."""
        ...

    def decode(
        self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype, options: Any
    ) -> torch.Tensor:
        """Vectors [..., D] in `dtype`."""
        ...


def page_formats() -> dict[str, PageFormat]:
    """Every page format in `quant/formats/` and in the entry-point group `fewbit.page_formats`."""
    return discover("fewbit.quant.formats", "PAGE_FORMAT", "fewbit.page_formats")


def find_page_format(name: str) -> PageFormat:
    """The page format called `name`, or a RecipeError that names the nearest."""
    known = page_formats()
    if name not in known:
        raise RecipeError(
            f"unknown KV page format {name!r}{nearest_name(name, known)}; "
            f"known: {', '.join(sorted(known))}"
        )
    return known[name]
