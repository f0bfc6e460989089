"""What a kernel is to the dispatcher: a problem it may refuse with reasons, and a launch.

Selection never runs a kernel. A kernel's `refuse` answers *every* condition that the problem
violates, each with the value found, the value needed and the remedy, so that `explain` can print
why nothing else was chosen.

Three kinds of problem, each with an `op` that says which kernels it is for:

    Problem            op "linear"   y = x · Ŵᵀ
    AttentionProblem   op "attend"   few queries over packed keys and values
    RowsProblem        any other op  a function of each row of x by itself

Each has a *size*, rounded up to a bucket (rows of x, or tokens), and a *family*: all of it but the size
and the machine. A plan and a row of a tuned table belong to a family.

A kernel may leave choices open, as named whole numbers: a `Config`. Then it lists the legal ones for a
problem, estimates the time of each, and can be compiled for each without a GPU.

A `Problem` may carry the facts of a `Device`, this machine's or a described one's, so that a choice
can be made and tested for a GPU that is not there. A described CPU is judged by its facts alone;
on this machine kernels may also try an operator or ask for free memory.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, Self

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


# Rows of x are rounded up to one of these; above the last, to the last.
M_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
T_BUCKETS = tuple(64 << i for i in range(15))  # tokens, 64 to 1,048,576


def bucket_of(size: int, buckets: tuple[int, ...]) -> int:
    """Smallest bucket that holds `size`, or the largest bucket."""
    return buckets[min(bisect_left(buckets, size), len(buckets) - 1)]


class Placed:
    """What every problem says of where it runs.

    dtype: of x and of the result. device: "cpu" or "cuda". machine: facts of that device; None stands
    for this machine, of which nothing was asked.
    """

    dtype: torch.dtype
    device: str
    machine: Device | None

    @property
    def described(self) -> Device | None:
        """The machine if it is not the one at hand: then its facts are all there is to judge by."""
        return None if self.machine is None or self.machine.present else self.machine

    @property
    def where(self) -> str:
        """`bfloat16 cuda`."""
        return f"{str(self.dtype).removeprefix('torch.')} {self.device}"

    def told(self, size: str) -> str:
        """The family with `size` in it, and the machine."""
        machine = f" ({self.machine})" if self.machine else ""
        return self.family.replace(" * ", f" {size} ") + machine

    @property
    def family(self) -> str:
        """All of the problem but its size, for which ` * ` stands, and the machine."""
        raise NotImplementedError


@dataclass(frozen=True)
class Problem(Placed):
    """One matrix product y[M, N] = x[M, K] · Ŵ[N, K]ᵀ, as the dispatcher sees it.

    format: name of the weight's (first) format. options: its frozen options; fields that they leave
    out of comparisons tell no two problems apart.
    m_bucket: smallest bucket that holds M. dtype, device, machine: see `Placed`.
    activation: name of the format that x is rounded to on the way in; None leaves it as it is.
    """

    op: ClassVar[str] = "linear"
    buckets: ClassVar[tuple[int, ...]] = M_BUCKETS
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
    def size(self) -> int:
        """The bucket of M."""
        return self.m_bucket

    def at(self, size: int) -> Self:
        """The same product for another bucket of M."""
        return replace(self, m_bucket=size)

    @property
    def family(self) -> str:
        """`linear int_group bits=4 group=128 ... N=4096 K=4096 * bfloat16 cuda`."""
        terms = f" terms={self.n_terms}" if self.n_terms > 1 else ""
        terms += f" activation={self.activation}" if self.activation else ""
        told = _told_options(self.format, self.options)
        return f"linear {told}{terms} N={self.n} K={self.k} * {self.where}"

    def __str__(self) -> str:
        """`linear int_group bits=4 group=128 ... N=4096 K=4096 M<=4 bfloat16 cpu`."""
        return self.told(f"M<={self.m_bucket}")


@dataclass(frozen=True)
class AttentionProblem(Placed):
    """Attention of `n_queries` new tokens of each of `n_rows` rows over keys and values in pages.

    key, value: names of page formats; key_options, value_options: their frozen options.
    group: query heads that share a KV head. head_dim, value_dim: channels of a key and a value.
    t_bucket: smallest bucket that holds the tokens to be read. extras: among "mask", "softcap",
    "sinks", in this order. dtype, device, machine: see `Placed`; dtype is that of the queries.
    """

    op: ClassVar[str] = "attend"
    buckets: ClassVar[tuple[int, ...]] = T_BUCKETS
    key: str
    key_options: Any
    value: str
    value_options: Any
    n_rows: int
    n_queries: int
    kv_heads: int
    group: int
    head_dim: int
    value_dim: int
    t_bucket: int
    dtype: torch.dtype
    device: str
    extras: tuple[str, ...] = ()
    machine: Device | None = None

    @property
    def size(self) -> int:
        """The bucket of tokens."""
        return self.t_bucket

    def at(self, size: int) -> Self:
        """The same attention over another bucket of tokens."""
        return replace(self, t_bucket=size)

    @property
    def family(self) -> str:
        """`attend key=int4_head fit=search value=... B=16 Q=1 Hkv=8 G=4 D=128/128 * bfloat16 cuda`."""
        key = _told_options(self.key, self.key_options)
        value = _told_options(self.value, self.value_options)
        extras = "".join(f" {extra}" for extra in self.extras)
        return (
            f"attend key={key} value={value} B={self.n_rows} Q={self.n_queries} "
            f"Hkv={self.kv_heads} G={self.group} D={self.head_dim}/{self.value_dim}{extras} * "
            f"{self.where}"
        )

    def __str__(self) -> str:
        """As `family`, with the bucket of tokens and the machine."""
        return self.told(f"T<={self.t_bucket}")


@dataclass(frozen=True)
class RowsProblem(Placed):
    """A function of each row of x [M, K] by itself: `op` names it, `options` are its own facts.

    m_bucket: smallest bucket that holds M. dtype, device, machine: see `Placed`.
    """

    buckets: ClassVar[tuple[int, ...]] = M_BUCKETS
    op: str
    options: Any
    m_bucket: int
    k: int
    dtype: torch.dtype
    device: str
    machine: Device | None = None

    @property
    def size(self) -> int:
        """The bucket of M."""
        return self.m_bucket

    def at(self, size: int) -> Self:
        """The same function of another bucket of rows."""
        return replace(self, m_bucket=size)

    @property
    def family(self) -> str:
        """`hadamard order=128 seed=7 K=4096 * bfloat16 cuda`."""
        told = "" if self.options is None else _told_options("", self.options)
        return f"{self.op}{told} K={self.k} * {self.where}"

    def __str__(self) -> str:
        """As `family`, with the bucket of rows and the machine."""
        return self.told(f"M<={self.m_bucket}")


AnyProblem = Problem | AttentionProblem | RowsProblem


def _told_options(name: str, options: Any) -> str:
    """`int_group bits=4 group=128 ...`: fields that tell problems apart, which comparisons use."""
    told = "".join(f" {f.name}={getattr(options, f.name)}" for f in fields(options) if f.compare)
    return f"{name}{told}"


@dataclass(frozen=True)
class Reason:
    """One violated condition: a code (DTYPE, GROUP, SHAPE_N, ...), a sentence that says what is
    needed and what was found, and a remedy."""

    code: str
    text: str
    fix: str


PROVEN_TIMES = 1.05  # as fast as all others, before a kernel that needs proof may run

Config = tuple[tuple[str, int], ...]  # (name, value) of each choice that a kernel leaves open


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of one config for one architecture, found without a GPU.

    registers: of a thread. stack_bytes: of a thread; spilled registers lie there, and a kernel has
    no other use for it. smem_bytes: of a block, static and dynamic. threads: of a block.
    digest: of the instructions, so that a new compiler that makes the same code can be told.
    opcodes: how often each occurs, most frequent first.
    """

    registers: int
    stack_bytes: int
    smem_bytes: int
    threads: int
    digest: str
    opcodes: tuple[tuple[str, int], ...] = ()


class Compile(Protocol):
    """Compiles the kernels of one config for a compute capability; no GPU is needed."""

    def __call__(
        self, problem: Any, config: Config, cc: tuple[int, int]
    ) -> tuple[Compiled, ...]: ...


@dataclass(frozen=True)
class Kernel:
    """One way to run a problem. A kernel module exposes it as `KERNEL` (or a tuple `KERNELS`).

    refuse(problem) -> every violated condition, empty if it fits. Reasons of code MEMORY depend on
        the moment and do not hold against a kernel whose layout of this weight already exists.
    prepare(packed, dtype) -> layout: derived once at load or first use, cached, never stored. Kernels
        that have the same function here share one layout of a weight.
    launch(x [M, K], layout) -> y [M, N], without bias. Of other ops: as `op` says.
    seconds(problem) -> estimate, used for ranking only.
    op: of the problems that it is for; it is not asked about others.
    activation: name of the format that `launch` rounds x to itself, for integer products that are
        bit-equal to `reference.integer_linear`. Its layout must not depend on the dtype given to
        `prepare`: one serves all. None: x comes as it is, or rounded already.

    A kernel that leaves choices open has `configs`; then the last argument of `launch` and `seconds`
    is one of those, and `compile` can make each without a GPU.
    configs(problem) -> legal ones in a fixed order, for a problem that is not refused.
    source: hash of everything that the compiled code depends on, the compiler excepted.
    m_invariant: with one config, a row's result has the same bits whatever other rows are there.
        Integer products (`activation`) are so without saying it.
    measured_only: estimates do not choose it, only a rule, or a tuned table for which it was measured
        to be `PROVEN_TIMES` as fast as the best kernel that is not so.
    """

    name: str
    refuse: Callable[[Any], tuple[Reason, ...]]
    prepare: Callable[[PackedTensor, torch.dtype], Any]
    launch: Callable[..., Any]
    seconds: Callable[..., float]
    priority: int = 0
    op: str = "linear"
    activation: str | None = None
    configs: Callable[[Any], tuple[Config, ...]] | None = None
    compile: Compile | None = None
    source: str = ""
    m_invariant: bool = False
    measured_only: bool = False
