"""What passes work on: one block of a model, its weights as source tensors, and how they are used.

A block is a decoder layer, or the embedding, or the head, or (without a model graph) a run of
tensors from the source files. Weights carry the *source file's* module names, one entry per
source tensor, so that what is written never depends on how a library fuses them at run time.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from .packed import PackedTensor


@dataclass
class Weight:
    """One quantizable source tensor on its way through the passes.

    name: module name in the source file (`model.layers.0.self_attn.q_proj`); the tensor itself is
        `name + suffix`, suffix `.weight` or empty (fused expert parameters).
    value: fp32 or source dtype, logical orientation [N, K] or [E, N, K].
    format, options: where it is to be stored.
    target: what rounding should come close to, fp32; None means `value` itself.
    input_key: names the activation that it multiplies; weights with the same key share statistics.
    clip: per-group range factor left by a search pass, [..., N, groups].
    scales: scale parts left by a search pass, as `Format.fit` returns them; they replace fit and clip.
    measured: sums that a rounding pass made on the way (squared_error, squared_norm).
    fallbacks: remarks for the report; a fallback makes the run fail closed.
    """

    name: str
    value: torch.Tensor
    format: str
    options: Any
    suffix: str = ".weight"
    transposed: bool = False
    input_key: str = ""
    target: torch.Tensor | None = None
    clip: torch.Tensor | None = None
    scales: dict[str, torch.Tensor] | None = None
    packed: PackedTensor | None = None
    fallbacks: list[str] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)


@dataclass
class Block:
    """A unit of work: passes get one, change `weights`, and hand it on."""

    name: str
    weights: list[Weight]
