"""`dense_head`: cached vectors as they are, in the dtype that the model computes in.

Nothing is lost and nothing is saved. It keeps one of keys and values in 16 bit while the other is
quantized, and it proves the cache: with it, text comes out as with the library's own.

Parts of a vector [D]:  values  bf16 | fp16 | fp32  [D]
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..format import Parts, PartSpec


@dataclass(frozen=True)
class DenseHeadOptions:
    """Recipe keys of `dense_head`: none."""


class DenseHead:
    """The page format object."""

    name = "dense_head"
    Options = DenseHeadOptions

    def part_specs(
        self, head_dim: int, dtype: torch.dtype, options: DenseHeadOptions
    ) -> dict[str, PartSpec]:
        """One part, the vector."""
        return {"values": PartSpec(dtype, (head_dim,))}

    def encode(self, vectors: torch.Tensor, options: DenseHeadOptions) -> Parts:
        """The vectors themselves, not a copy."""
        return {"values": vectors}

    def decode(
        self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype, options: DenseHeadOptions
    ) -> torch.Tensor:
        """The vectors in `dtype`."""
        return parts["values"].to(dtype)


PAGE_FORMAT = DenseHead()
