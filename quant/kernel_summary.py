"""Which kernels a loaded model will run on: one line for each distinct plan.

    56 x linear int_two_level bits=4 ... N=4096 K=4096 bfloat16 cuda
         M = 1 to 64    triton_w4a8 {block_m 16, split_k 4}   estimated, 71 % of the limit at M = 1
         M = 65 ...     triton_expand                         estimated, 64 % of the limit at M = 96

Layers that share a product (`fused.py`) count as the one they are. A plan that falls back to
`reference`, or that stays below half of what the machine's memory and arithmetic allow, gets a warning
line; the share is known only where the machine's rates are. `quant.load` logs this at level INFO to the
logger "fewbit", and warning lines at level WARNING. Nothing is run, and no layout is made.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from .dispatch import Explanation, explain_here, problem_of
from .kernel import Problem
from .packed_module import PackedModule

_LOW = 0.5  # share of the limit below which a plan is pointed out
_LOGGER = logging.getLogger("fewbit")


@dataclass(frozen=True)
class PlanLine:
    """One distinct plan. count: products of a forward pass that follow it. rungs: an explanation for
    the smallest bucket of each range of M, in rising order."""

    count: int
    rungs: tuple[Explanation, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know: fallbacks, and ranges below half of the limit."""
        return tuple(filter(None, map(_warning, self.rungs)))

    def text(self) -> str:
        """The lines of the module's text, warnings last."""
        family = self.rungs[0].problem.family.replace(" * ", " ")
        lines = [f"{self.count} x {family}", *map(_rung_text, self.rungs)]
        return "\n".join([*lines, *(f"     warning: {line}" for line in self.warnings)])


def _rung_text(rung: Explanation) -> str:
    sizes = f"M = {rung.first} ..." if rung.last is None else f"M = {rung.first} to {rung.last}"
    known = "measured" if rung.origin == "table" else "estimated"
    share = (
        f", {rung.limit.share:.0%} of the limit at M = {rung.problem.size}" if rung.limit else ""
    )
    return f"     {sizes:16s} {rung.candidate}  {known}{share}"


def _warning(rung: Explanation) -> str | None:
    if rung.chosen == "reference" and not rung.forced:
        return f"M = {rung.first}: nothing but `reference` fits; `fewbit kernels` says why"
    if rung.limit and rung.limit.bound != "launch" and rung.limit.share < _LOW:
        return f"M = {rung.problem.size}: {rung.limit.share:.0%} of the limit"
    return None


def model_problems(model: nn.Module) -> dict[Problem, int]:
    """The distinct products of a model at one row, and how often each occurs in a forward pass.
    Experts count one product for each stack: which of them run, only the router knows."""
    found: dict[Problem, int] = {}
    groups: set[int] = set()
    for module in model.modules():
        if not isinstance(module, PackedModule):
            continue
        problem = problem_of(
            module.runners()[0].packed, 1, module.dtype, module.device.type, module.activation
        )
        shared = getattr(module, "shared", None)
        if shared is not None:
            if id(shared) in groups:
                continue
            groups.add(id(shared))
            problem = replace(problem, n=shared.n_outputs)
        found[problem] = found.get(problem, 0) + 1
    return found


def plans(problems: Mapping[Problem, int]) -> list[PlanLine]:
    """The plan of each problem's family, most frequent first."""
    lines = [PlanLine(count, tuple(_rungs(problem))) for problem, count in problems.items()]
    return sorted(lines, key=lambda line: (-line.count, line.rungs[0].problem.family))


def _rungs(problem: Problem) -> Iterator[Explanation]:
    sizes = iter(problem.buckets)
    size = next(sizes)
    while True:
        found = explain_here(problem.at(size))
        yield found
        last = found.last
        if last is None:
            return
        size = next(bigger for bigger in sizes if bigger > last)


def kernel_summary(model: nn.Module) -> str:
    """What `model` will run on, as text; NoKernelError if a rule names a kernel that cannot."""
    return "\n".join(line.text() for line in plans(model_problems(model)))


def log_summary(model: nn.Module) -> None:
    """Log the plans, if anybody listens; warnings as warnings."""
    if not _LOGGER.isEnabledFor(logging.INFO):
        return
    for line in plans(model_problems(model)):
        _LOGGER.info("%s", line.text())
        for warning in line.warnings:
            _LOGGER.warning("%s: %s", line.rungs[0].problem.family.replace(" * ", " "), warning)
