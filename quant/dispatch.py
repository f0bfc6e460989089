"""Choosing a kernel for each (weight, bucket of M, dtype, device), and running it.

Every known kernel answers a `Problem` with its violated conditions. Among those without any, the
smallest estimated time wins; within 3 % of it, which estimates cannot tell apart, the higher
priority does, then the name. No kernel is run for that, so two processes with the same inputs
agree, and a problem of a described machine can be decided on any other. `FEWBIT_KERNEL=name` forces
one kernel; forcing one that refuses is an error, and so is a name that does not exist.

A `Runner` belongs to one weight and remembers its choices: the environment is read, kernels are
asked and layouts are derived the first time that a bucket of M is met, and a later call costs a
dictionary lookup. One layout serves all buckets of a kernel, and of an integer kernel all dtypes.

Inputs rounded to an activation format: a kernel with an `activation` rounds x itself; any other kernel
gets x̂, so that every choice computes the same function. Transforms of the input come before that.

Under autocast, layouts are derived and integers multiplied as without it (it fails to join integers,
and an exact product gains nothing). Other products and the transforms follow autocast.

Deliberately not here: measured tables. Ranking is by estimate only.
"""

import os
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch

from . import cpu, cpu_int8, reference
from .activation import find_activation
from .errors import NoKernelError, nearest_name
from .kernel import Kernel, Problem, Reason
from .machine import Limit, limit_of, this_device
from .packed import PackedTensor
from .registry import discover

# Rows of x rounded up to one of these; above the last, the last.
M_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
_TIE = 1.03  # estimates nearer than this are equal
_FORCE = "FEWBIT_KERNEL"


@cache
def kernels() -> Mapping[str, Kernel]:
    """Every kernel by name: torch's CPU operators, the reference, the kernel packages, and the
    entry-point group `fewbit.kernels`."""
    ours = (*cpu.KERNELS, *cpu_int8.KERNELS, reference.KERNEL)
    found: dict[str, Kernel] = {kernel.name: kernel for kernel in ours}
    folders = (("fewbit.kernels_triton", ""), ("fewbit.kernels_cuda", "fewbit.kernels"))
    for package, group in folders:
        for name, kernel in discover(package, "KERNEL", group).items():
            if name in found:
                raise RuntimeError(f"{package} defines kernel {name!r} again; names are unique")
            found[name] = kernel
    return found


def m_bucket(m: int) -> int:
    """Smallest bucket that holds `m` rows, or the largest bucket."""
    return M_BUCKETS[min(bisect_left(M_BUCKETS, m), len(M_BUCKETS) - 1)]


def problem_of(
    packed: PackedTensor, m: int, dtype: torch.dtype, device: str, activation: str | None = None
) -> Problem:
    """The problem that m rows of `dtype`, rounded to `activation`, pose to a weight [N, K] on
    this machine."""
    first = packed.terms[0]
    n, k = packed.shape[-2:]
    return Problem(
        format=first.format,
        options=first.options,
        n_terms=len(packed.terms),
        m_bucket=m_bucket(m),
        n=n,
        k=k,
        dtype=dtype,
        device=device,
        activation=activation,
        machine=this_device(device) if device in ("cpu", "cuda") else None,
    )


@dataclass(frozen=True)
class Explanation:
    """Why `chosen` runs `problem`: what else would fit, with estimated seconds, best first, and
    what does not, with all its reasons. forced: the choice came from the environment. limit: what no
    kernel can beat, None if the machine's rates are unknown."""

    problem: Problem
    chosen: str
    eligible: tuple[tuple[str, float], ...]
    refused: Mapping[str, tuple[Reason, ...]]
    forced: bool = False
    limit: Limit | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON form: problem, activation, chosen, forced, eligible, refused, limit. All seconds are
        estimates; `share` is the limit's over the chosen kernel's."""
        return {
            "problem": str(self.problem),
            "activation": self.problem.activation,
            "chosen": self.chosen,
            "forced": self.forced,
            "eligible": [{"kernel": name, "seconds": seconds} for name, seconds in self.eligible],
            "refused": {
                name: [asdict(reason) for reason in reasons]
                for name, reasons in self.refused.items()
            },
            "limit": {**asdict(self.limit), "estimated": True} if self.limit else None,
        }

    def text(self) -> str:
        """One line for each kernel and the limit, under a line for the problem."""
        lines = [str(self.problem)]
        for name, seconds in self.eligible:
            mark = "CHOSEN" if name == self.chosen else "ok    "
            forced = f" (forced by {_FORCE})" if self.forced and name == self.chosen else ""
            lines.append(f" {mark} {name} {seconds * 1e6:.1f} us estimated{forced}")
        lines += _refusal_lines(self.refused)
        if self.limit:
            lines.append(
                f" limit  {self.limit.bound} {self.limit.seconds * 1e6:.1f} us estimated; "
                f"{self.chosen} reaches {self.limit.share:.0%} of it"
            )
        else:
            lines.append(" limit  unknown: no rates are known of this machine")
        return "\n".join(lines)


def _refusal_lines(refused: Mapping[str, tuple[Reason, ...]]) -> list[str]:
    return [
        f" no     {name}: {reason.code} {reason.text} ({reason.fix})"
        for name, reasons in refused.items()
        for reason in reasons
    ]


def explain(
    problem: Problem, *, forced: str | None = None, prepared: frozenset[str] = frozenset()
) -> Explanation:
    """Ask every kernel about `problem` and choose.

    forced: name of the only kernel allowed. prepared: kernels whose layout of this weight already
    exists, which therefore need no further memory.
    NoKernelError if `forced` is unknown or refuses.
    """
    known = kernels()
    eligible: list[Kernel] = []
    refused: dict[str, tuple[Reason, ...]] = {}
    for kernel in known.values():
        reasons = kernel.refuse(problem)
        if kernel.name in prepared:
            reasons = tuple(reason for reason in reasons if reason.code != "MEMORY")
        if reasons:
            refused[kernel.name] = reasons
        else:
            eligible.append(kernel)
    if problem.device == "cpu":
        refused |= {name: (reason,) for name, reason in cpu.DENIED_OPS.items()}
    order = _ranked([(kernel, kernel.seconds(problem)) for kernel in eligible])
    chosen = order[0][0]  # `reference` never refuses
    if forced is not None:
        chosen = _forced_choice(forced, problem, [name for name, _ in order], refused)
    limit = limit_of(problem, dict(order)[chosen])
    return Explanation(problem, chosen, order, refused, forced is not None, limit)


def _ranked(timed: list[tuple[Kernel, float]]) -> tuple[tuple[str, float], ...]:
    """(name, seconds), best first: of those within `_TIE` of the fastest left, the higher priority
    comes next, then the name."""
    left, order = list(timed), []
    while left:
        bound = _TIE * min(seconds for _, seconds in left)
        tied = [entry for entry in left if entry[1] <= bound]
        best = min(tied, key=lambda entry: (-entry[0].priority, entry[0].name))
        order.append((best[0].name, best[1]))
        left.remove(best)
    return tuple(order)


def _forced_choice(
    name: str, problem: Problem, eligible: list[str], refused: Mapping[str, tuple[Reason, ...]]
) -> str:
    if name in eligible:
        return name
    if name in refused:
        reasons = "\n".join(_refusal_lines({name: refused[name]}))
        raise NoKernelError(
            f"{_FORCE}={name} cannot run {problem}:\n{reasons}\n"
            f"unset {_FORCE}, or use one of: {', '.join(eligible)}"
        )
    raise NoKernelError(
        f"{_FORCE}={name!r} names no kernel{nearest_name(name, (*eligible, *refused))}; "
        f"known: {', '.join(sorted(kernels()))}"
    )


def forced_kernel() -> str | None:
    """The kernel named by the environment, or None; the one place that reads it."""
    return os.environ.get(_FORCE) or None


@cache
def _warn_fallback(weight_format: str, device: str) -> None:
    """One warning for each (format, device) in a process: nothing faster than `reference` fits."""
    warnings.warn(
        f"no kernel runs {weight_format} weights on {device}: each call decodes the whole weight "
        f"(kernel 'reference'); `fewbit kernels` lists why the others refuse",
        RuntimeWarning,
        stacklevel=2,
    )


Launch = Callable[[torch.Tensor, Any], torch.Tensor]
Plan = tuple[Launch, Any]


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


class Layouts:
    """What kernels derived from one weight. An integer kernel's layout has no share in the dtype of
    x, so that it is one for all."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype | None], Any] = {}

    def __len__(self) -> int:
        return len(self._held)

    def ready(self, dtype: torch.dtype) -> frozenset[str]:
        """Names of the kernels whose layout for `dtype` exists."""
        return frozenset(name for name, held in self._held if held in (None, dtype))

    def of(
        self, kernel: Kernel, weight: Callable[[], PackedTensor], dtype: torch.dtype, device: str
    ) -> Any:
        """The layout of `kernel` for x of `dtype`; derived from weight() at first."""
        key = (kernel.name, None if kernel.activation is not None else dtype)
        if key not in self._held:
            with torch.no_grad(), _without_autocast(device):
                self._held[key] = kernel.prepare(weight(), dtype)
        return self._held[key]


def integer_launch(kernel: Kernel, device: str) -> Launch:
    """The kernel's launch, without autocast."""
    if not torch.amp.is_autocast_available(device):
        return kernel.launch

    def launch(x: torch.Tensor, layout: Any) -> torch.Tensor:
        if not torch.is_autocast_enabled(device):
            return kernel.launch(x, layout)
        with torch.autocast(device, enabled=False):
            return kernel.launch(x, layout)

    return launch


class InputTransform(Protocol):
    """What happens to x before it is rounded, such as a rotation that is folded into the weight."""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] of any floating dtype -> the same shape and dtype, differentiable."""
        ...


class Runner:
    """Multiplies by one weight [N, K]; holds its layouts and its choices. See the module's text.

    activation: name of the format that x is rounded to. inputs: transforms of x before that.
    """

    def __init__(
        self,
        packed: PackedTensor,
        activation: str | None = None,
        inputs: Sequence[InputTransform] = (),
    ) -> None:
        if len(packed.shape) != 2:
            raise NoKernelError(
                f"a product needs a weight [N, K], got {list(packed.shape)}; "
                f"take one expert of a stack first"
            )
        self.packed = packed
        self.n, self.k = packed.shape
        self.activation = activation
        self.inputs = tuple(inputs)
        self._layouts = Layouts()
        self._plans: dict[tuple[int, torch.dtype, torch.device], Plan] = {}

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> y [..., N] in the dtype of x; differentiable in x (by `reference`)."""
        for transform in self.inputs:
            x = transform.apply(x)
        if x.requires_grad and torch.is_grad_enabled():
            return reference.linear(x, self.packed, self.activation)
        rows = x.reshape(-1, self.k)
        m = rows.shape[0]
        if m == 0:
            return x.new_empty(*x.shape[:-1], self.n)
        bucket = M_BUCKETS[min(bisect_left(M_BUCKETS, m), len(M_BUCKETS) - 1)]
        key = (bucket, x.dtype, x.device)
        plan = self._plans.get(key)
        if plan is None:
            choose = self._plan
            if torch.compiler.is_compiling():
                choose = torch.compiler.disable(choose)  # not part of any graph
            plan = self._plans[key] = choose(m, x)
        launch, layout = plan
        return launch(rows, layout).view(*x.shape[:-1], self.n)

    def explain(self, m: int, dtype: torch.dtype, device: str) -> Explanation:
        """What would run for m rows, and why; the environment's choice included."""
        problem = problem_of(self.packed, m, dtype, device, self.activation)
        return explain(problem, forced=forced_kernel(), prepared=self._layouts.ready(dtype))

    def _plan(self, m: int, x: torch.Tensor) -> Plan:
        choice = self.explain(m, x.dtype, x.device.type)
        kernel = kernels()[choice.chosen]
        if kernel.name == "reference" and not choice.forced and x.device.type != "meta":
            _warn_fallback(choice.problem.format, x.device.type)
        device = x.device.type
        layout = self._layouts.of(kernel, lambda: self.packed, x.dtype, device)
        return _launch(kernel, self.activation, device), layout


def _launch(kernel: Kernel, activation: str | None, device: str) -> Launch:
    """The kernel's launch, after rounding x where the kernel does not do it."""
    if kernel.activation is not None:
        return integer_launch(kernel, device)
    if activation is None:
        return kernel.launch
    if kernel.name == "reference":
        return partial(reference.linear, activation=activation)
    rounding = find_activation(activation)

    def rounded(x: torch.Tensor, layout: Any) -> torch.Tensor:
        return kernel.launch(rounding.round(x).decode(x.dtype), layout)

    return rounded
