"""What a kernel is to the dispatcher: a problem it may refuse with reasons, and a launch.

Selection never runs a kernel. A kernel's `refuse` answers *every* condition that the problem
violates, each with the value found, the value needed and the remedy, so that `explain` can print
why nothing else was chosen.

A `Problem` may carry the facts of a `Device`, this machine's or a described one's, so that a choice
can be made and tested for a GPU that is not there. A described CPU is judged by its facts alone;
on this machine kernels may also try an operator or ask for free memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from .packed import PackedTensor


@dataclass(frozen=True)
class Peaks:
    """Dense operations a second by type (a multiply-add is two); None: no native path, or unknown."""

    fp32: float | None = None
    fp16: float | None = None
    bf16: float | None = None
    fp8: float | None = None
    int8: float | None = None
    fp4: float | None = None


@dataclass(frozen=True)
class Device:
    """Facts of one machine that products run on; None where they do not apply or are not known.

    name: of its file in `quant/devices/`. backend: "cuda" or "cpu". cc: compute capability.
    isa: of a CPU, among avx2, avx512, vnni, bf16, amx. sms: multiprocessors, or cores of a CPU.
    smem_block_bytes, smem_sm_bytes: shared memory of one block and of one multiprocessor.
    registers: 32-bit ones of one multiprocessor. launch_seconds: the least that any kernel takes.
    present: it is the machine that this process runs on.
    """

    name: str
    title: str
    backend: str
    cc: tuple[int, int] | None
    isa: tuple[str, ...]
    sms: int
    smem_block_bytes: int | None
    smem_sm_bytes: int | None
    registers: int | None
    l2_bytes: int | None
    memory_bytes: int | None
    bandwidth_bytes_per_second: float | None
    launch_seconds: float | None
    peak_ops_per_second: Peaks
    source: str
    present: bool = False

    def __str__(self) -> str:
        """`NVIDIA H200 SXM 141 GB sm_90`."""
        return self.title if self.cc is None else f"{self.title} sm_{self.cc[0]}{self.cc[1]}"


@dataclass(frozen=True)
class Problem:
    """One matrix product y[M, N] = x[M, K] · Ŵ[N, K]ᵀ, as the dispatcher sees it.

    format: name of the weight's (first) format. options: its frozen options.
    dtype: of x and y. device: "cpu" or "cuda". m_bucket: smallest bucket that holds M.
    activation: name of the format that x is rounded to on the way in; None leaves it as it is.
    machine: facts of that device; None stands for this machine, of which nothing was asked.
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
    machine: Device | None = None

    @property
    def described(self) -> Device | None:
        """The machine if it is not the one at hand: then its facts are all there is to judge by."""
        return None if self.machine is None or self.machine.present else self.machine

    def __str__(self) -> str:
        """`linear int_group bits=4 group=128 ... N=4096 K=4096 M<=4 bfloat16 cpu`."""
        options = " ".join(
            f"{f.name}={getattr(self.options, f.name)}" for f in fields(self.options)
        )
        terms = f" terms={self.n_terms}" if self.n_terms > 1 else ""
        terms += f" activation={self.activation}" if self.activation else ""
        machine = f" ({self.machine})" if self.machine else ""
        return (
            f"linear {self.format} {options}{terms} N={self.n} K={self.k} M<={self.m_bucket} "
            f"{str(self.dtype).removeprefix('torch.')} {self.device}{machine}"
        )


@dataclass(frozen=True)
class Reason:
    """One violated condition: a code (DTYPE, GROUP, SHAPE_N, ...), a sentence that says what is
    needed and what was found, and a remedy."""

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
