"""What a kernel is to the dispatcher: a problem it may refuse with reasons, and a launch.

Selection never runs a kernel. A kernel's `refuse` answers *every* condition that the problem
violates, each with the value found, the value needed and the remedy, so that `explain` can print
why nothing else was chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from .packed import PackedTensor


@dataclass(frozen=True)
class Problem:
    """One matrix product y[M, N] = x[M, K] · Ŵ[N, K]ᵀ, as the dispatcher sees it.

    format: name of the weight's (first) format. options: its frozen options.
    dtype: of x and y. device: "cpu" or "cuda". m_bucket: smallest bucket that holds M.
    activation: name of the format that x is rounded to on the way in; None leaves it as it is.
    """

    format: str
    options: Any
    n_terms: int
    m_bucket: int
    n: int
    k: int
    dtype: torch.dtype
    device: str
    activation: str | None = None

    def __str__(self) -> str:
        """`linear int_group bits=4 group=128 ... N=4096 K=4096 M<=4 bfloat16 cpu`."""
        options = " ".join(
            f"{f.name}={getattr(self.options, f.name)}" for f in fields(self.options)
        )
        terms = f" terms={self.n_terms}" if self.n_terms > 1 else ""
        terms += f" activation={self.activation}" if self.activation else ""
        return (
            f"linear {self.format} {options}{terms} N={self.n} K={self.k} M<={self.m_bucket} "
            f"{str(self.dtype).removeprefix('torch.')} {self.device}"
        )


@dataclass(frozen=True)
class Reason:
    """One violated condition: a code (DTYPE, GROUP, SHAPE_N, ...), a sentence, and a remedy."""

    code: str
    text: str
    fix: str


@dataclass(frozen=True)
class Kernel:
    """One way to run a problem. A kernel module exposes it as `KERNEL` (or a tuple `KERNELS`).

    refuse(problem) -> every violated condition, empty if it fits. Reasons of code MEMORY depend on
        the moment and do not hold against a kernel whose layout of this weight already exists.
    prepare(packed, dtype) -> layout: derived once at load or first use, cached, never stored.
    launch(x [M, K], layout) -> y [M, N], without bias.
    seconds(problem) -> estimate, used for ranking only.
    """

    name: str
    refuse: Callable[[Problem], tuple[Reason, ...]]
    prepare: Callable[[PackedTensor, torch.dtype], Any]
    launch: Callable[[torch.Tensor, Any], torch.Tensor]
    seconds: Callable[[Problem], float]
    priority: int = 0
