"""One check of a kernel against its oracle, and what all kinds of checks share.

    lane    the possible checks of one kernel, one format and one dtype, in a fixed order; a step that
            the kernel refuses gives none
    check   a config on a shape: kernels are asked with the facts of `Place.machine`, tensors are on
            `Place.device`, the expected result is computed on the CPU

Errors are of norms, row by row, and the worst row counts: an outlier in one row cannot hide another.
Memory that a kernel may not read is NaN: behind the rows and columns of x, behind the stored parts of a
weight, and, on a GPU, in what the allocator hands out next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch

from fewbit.quant.kernel import AnyProblem, Config, Device, Kernel
from fewbit.quant.packed import PackedTensor, Term

DTYPES = (torch.bfloat16, torch.float16)
_POISON = 64  # elements behind a stored part
_POISONED_BYTES = tuple(1 << power for power in range(9, 25))  # blocks of the allocator


@dataclass(frozen=True)
class Place:
    """Where checks run. device: of tensors, "cuda" or, in Triton's interpreter, "cpu". machine: whose
    facts kernels are asked with. reduced: a few small shapes only."""

    device: str
    machine: Device
    reduced: bool = False


@dataclass(frozen=True)
class Check:
    """case: shape, format and dtype in words. tolerance: of the relative error; 0 for bits that must
    be equal. error(): runs the kernel; NaN where none belongs gives infinity."""

    kernel: str
    config: Config
    case: str
    tolerance: float
    error: Callable[[], float]


Step = Callable[[], Check | None]
Lane = Sequence[Step]


def pick_config(kernel: Kernel, problem: AnyProblem, index: int) -> Config:
    """Of the kernel's configs for a problem that it takes: the first, the last, or another one, which
    `index` decides. ValueError if it has none."""
    if kernel.configs is None:
        return ()
    found = kernel.configs(problem)
    if not found:
        raise ValueError(f"{kernel.name} does not refuse {problem}, but has no configs for it")
    if index % 3 == 2:
        return found[(index * 2654435761 >> 7) % len(found)]  # spread over all, and reproducible
    return found[0 if index % 3 == 0 else -1]


# ---- errors ---------------------------------------------------------------------------------


def row_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest |found − wanted| / |wanted| over rows [..., N], in fp64; 0 without rows, infinity
    for another shape or for NaN. A row of zeros must be one."""
    if found.shape != wanted.shape:
        return inf
    if found.numel() == 0:
        return 0.0
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    if not bool(torch.isfinite(found).all()):
        return inf
    wrong = torch.linalg.vector_norm(found - wanted, dim=-1)
    size = torch.linalg.vector_norm(wanted, dim=-1)
    return float((wrong / torch.where(size == 0, 1.0, size)).max())


def bit_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Share of elements that differ; infinity for another shape or dtype."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return inf
    if found.numel() == 0:
        return 0.0
    return float((found.detach().cpu() != wanted.detach().cpu()).double().mean())


# ---- inputs ---------------------------------------------------------------------------------


def planted_rows(m: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """x [M, K] on the CPU: normal, with outliers of 30, one row of zeros and one that is small."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    x = torch.where(torch.rand(m, k, generator=generator) < 0.005, 30 * x, x)
    if m > 3:
        x[1] = 0
        x[2] *= 1e-3
    return x.to(dtype)


def poisoned(x: torch.Tensor, device: str, extra: int) -> torch.Tensor:
    """The same rows on `device`, as a view of a wider and longer tensor of NaN."""
    m, k = x.shape
    wide = torch.full((m + 2, k + extra), torch.nan, dtype=x.dtype, device=device)
    wide[:m, :k] = x.to(device)
    return wide[:m, :k]


def poisoned_parts(packed: PackedTensor, device: str) -> PackedTensor:
    """The same weight on `device`; behind each part lie bytes of ones, which is NaN in floats."""
    terms = tuple(
        Term(
            t.format, t.options, {name: _with_tail(part, device) for name, part in t.parts.items()}
        )
        for t in packed.terms
    )
    return PackedTensor(packed.shape, terms, packed.transposed)


def _with_tail(part: torch.Tensor, device: str) -> torch.Tensor:
    n_bytes = (part.numel() + _POISON) * part.element_size()
    flat = torch.full((n_bytes,), 255, dtype=torch.uint8, device=device).view(part.dtype)
    flat[: part.numel()] = part.flatten().to(device)
    return flat[: part.numel()].view(part.shape)


def poison_free_memory(device: str) -> None:
    """Fill what the GPU's allocator hands out next with NaN. Nothing on a CPU."""
    if device == "cuda":
        held = [torch.full((n,), 255, dtype=torch.uint8, device=device) for n in _POISONED_BYTES]
        del held
