"""The seam between what a layer sees and integer products: formats that inputs are rounded to.

    x̂[m, k] = codes[m, k] · scale[m]

An activation format is dynamic: scales are found when x arrives, one for each row (token), so that
a row's result does not depend on its neighbours. A checkpoint stores its name and nothing else.

Formats live beside the weight formats in `quant/formats/`, as `ACTIVATION`; third parties add theirs
through the entry-point group `fewbit.activations`. Each has one definition of rounding, used by the
oracle and by every kernel that does not carry its own.

A `Kernel` with an `activation` takes x as it is and rounds it itself; for all other kernels the
dispatcher hands over x̂. Deliberately not here: static scales, which need calibration and clip what
calibration has not seen.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

from .errors import RecipeError, nearest_name
from .format import IntegerForm, find_format, formats
from .packed import PackedTensor
from .registry import discover


@dataclass(frozen=True)
class RoundedRows:
    """x as rounded: codes int8 [..., K], scale fp32 [..., 1], x̂ = codes · scale."""

    codes: torch.Tensor
    scale: torch.Tensor

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """x̂ [..., K] in `dtype`: the product in fp32, rounded once."""
        return (self.codes * self.scale).to(dtype)

    def sums(self) -> torch.Tensor:
        """T = scale · Σ_k codes, fp32 [..., 1]: the sum of x̂, not of x.

        A weight with a row offset o adds o·Σx. Taking the sum from the rounded row cancels most of
        the rounding error of the product (measured: four times less error), and the integer sum
        cannot overflow where a 16-bit sum of x does.
        """
        return self.scale * self.codes.sum(-1, keepdim=True, dtype=torch.int32)


class Activation(Protocol):
    """One activation format. A module in `quant/formats/` exposes it as `ACTIVATION`."""

    name: str

    def round(self, x: torch.Tensor) -> RoundedRows:
        """Round the rows of a floating x [..., K]. Rows with NaN or Inf get a scale that is not
        finite, so that their results are not finite either."""
        ...


def activations() -> dict[str, Activation]:
    """Every activation format of `quant/formats/` and of the entry points `fewbit.activations`."""
    return discover("fewbit.quant.formats", "ACTIVATION", "fewbit.activations")


def find_activation(name: str) -> Activation:
    """The activation format called `name`, or a RecipeError that names the nearest."""
    known = activations()
    if name not in known:
        raise RecipeError(
            f"unknown activation format {name!r}{nearest_name(name, known)}; "
            f"known: {', '.join(sorted(known))}"
        )
    return known[name]


def integer_form(packed: PackedTensor) -> IntegerForm | None:
    """The weight [N, K] as integers under row scales; None for several terms, and for a format
    whose options do not allow it."""
    if len(packed.terms) != 1:
        return None
    (term,) = packed.terms
    return find_format(term.format).integer_form(term.parts, packed.shape, term.options)


@cache
def has_integer_form(weight_format: str, options: Any, k: int) -> bool:
    """Does the format answer an integer form for rows of K weights? Asked with a row of zeros; False
    for a format that is not known."""
    known = formats().get(weight_format)
    if known is None:
        return False
    specs = known.part_specs((1, k), options)
    parts = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    return known.integer_form(parts, (1, k), options) is not None
