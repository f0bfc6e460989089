"""Transforms of a layer's inputs while it runs, on a GPU by the kernel that the dispatcher chooses.

A transform applies itself in plain torch, on any device and differentiably. A Hadamard transform
of inputs on a GPU that need no gradient goes to the kernel of op "hadamard" that is fastest for their
number of rows; the choice is remembered. Everything else applies itself.

Not yet run on a GPU.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Protocol

import torch

from . import dispatch
from .hadamard import Hadamard
from .kernel import RowsProblem, bucket_of
from .machine import this_device
from .policy import Rules, context_rules


class InputTransform(Protocol):
    """What happens to x before it is rounded, such as a rotation that is folded into the weight."""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] of any floating dtype -> the same shape and dtype, differentiable."""
        ...


def transformed(transform: InputTransform, x: torch.Tensor) -> torch.Tensor:
    """x [..., K] · Q, the same shape and dtype."""
    if x.device.type != "cuda" or not isinstance(transform, Hadamard):
        return transform.apply(x)
    if (x.requires_grad and torch.is_grad_enabled()) or x.numel() == 0:
        return transform.apply(x)
    bucket = bucket_of(x.numel() // x.shape[-1], RowsProblem.buckets)
    return hadamard_launch(transform, bucket, x.shape[-1], x.dtype, "cuda", context_rules())(x)


@lru_cache(maxsize=4096)
def hadamard_launch(
    transform: Hadamard, bucket: int, k: int, dtype: torch.dtype, device: str, rules: Rules
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What applies `transform` to rows of K numbers on `device`; `rules` are those in force, by which
    a choice is remembered."""
    problem = RowsProblem("hadamard", transform, bucket, k, dtype, device, this_device(device))
    chosen = dispatch.choice(problem)
    kernel = dispatch.kernels()[chosen.kernel]
    layout = kernel.prepare(transform, dtype)  # type: ignore[arg-type]  # there is no weight
    extra = {"config": chosen.config} if chosen.config else {}
    return partial(kernel.launch, layout=layout, **extra)
