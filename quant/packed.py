"""A weight as it is stored: a sum of terms, each a format with its parts.

    Ŵ = Σ_t unpack(format_t, parts_t)            W is [N, K] or, for fused experts, [E, N, K]

N counts outputs and K inputs (the axis that a matrix product sums over), whatever orientation the
source file or the model graph uses: `transposed` says that the graph wants [.., K, N].

A `PackedTensor` holds facts only. How parts turn into numbers is the format's business
(`quant/format.py`), how they are multiplied is a kernel's (`quant/kernel.py`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch


@dataclass(frozen=True)
class Term:
    """One summand: `format` names it, `options` is that format's frozen `Options`.

    parts: part name -> tensor as stored on disk (`codes`, `scale_group`, ...).
    """

    format: str
    options: Any
    parts: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class PackedTensor:
    """A quantized weight of logical `shape` [N, K] or [E, N, K]."""

    shape: tuple[int, ...]
    terms: tuple[Term, ...]
    transposed: bool = False

    def named_parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(`part` or `term<t>.part`, tensor), in storage order; names are relative to the module."""
        for index, term in enumerate(self.terms):
            prefix = "" if index == 0 else f"term{index}."
            for part, tensor in term.parts.items():
                yield prefix + part, tensor

    def to(self, device: torch.device) -> "PackedTensor":
        """The same weight with its parts on `device`; itself if they are there."""
        if all(tensor.device == device for _, tensor in self.named_parts()):
            return self
        terms = tuple(
            Term(term.format, term.options, {part: t.to(device) for part, t in term.parts.items()})
            for term in self.terms
        )
        return PackedTensor(self.shape, terms, self.transposed)

    @property
    def n_weights(self) -> int:
        """Number of weights represented."""
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Stored bytes of all parts."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.named_parts())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of all parts, divided by the number of weights."""
        return 8 * self.n_bytes / self.n_weights
