"""Candidates of a problem and of its whole family: who could run it, how long each takes, and the plan.

    times_of    kernels without a refusal × their configs → estimated seconds, at one size
    ladder_of   the same at every size → ranges of sizes and their candidates (`ladder.py`)

Estimates are corrected by what tables say of near shapes; what failed when it was tuned is left out.

One choice for all sizes: kernels offer the configs that suit a size, so none need be offered at all of
them. There every config that a kernel offers at any size is a candidate at every size; any config is
legal at any. Kernels whose results do not depend on the number of rows come first.

All is remembered, and a function of its arguments alone. Deliberately not here: rules and refusals of
one size, and what a table decides (`dispatch.py`).
"""

import math
from collections.abc import Mapping
from functools import lru_cache

from .kernel import AnyProblem, Config, Kernel
from .ladder import TIE, Candidate, Rung, build_ladder
from .policy import Policy
from .tuned import Tables


@lru_cache(maxsize=4096)
def times_of(
    known: tuple[Kernel, ...], problem: AnyProblem, tables: Tables, any_size: bool = False
) -> Mapping[Candidate, float]:
    """Estimated seconds of every candidate that the problem does not refuse for good.

    any_size: configs that kernels offer at other sizes count, too.
    """
    near = tables.near(problem, {kernel.name: kernel for kernel in known})
    found: dict[Candidate, float] = {}
    for kernel in known:
        if _refused(kernel, problem):
            continue
        factor = near.get(kernel.name, 1.0)
        if kernel.configs is None:
            found[Candidate(kernel.name)] = factor * kernel.seconds(problem)
            continue
        smallest = problem.at(problem.buckets[0])
        offered = _of_family(kernel, smallest) if any_size else kernel.configs(problem)
        for config in offered:
            seconds = factor * kernel.seconds(problem, config)
            if seconds < math.inf and not tables.quarantined(problem, kernel, config):
                found[Candidate(kernel.name, config)] = seconds
    return found


def _refused(kernel: Kernel, problem: AnyProblem) -> bool:
    return any(reason.code != "MEMORY" for reason in kernel.refuse(problem))


@lru_cache(maxsize=256)
def _of_family(kernel: Kernel, smallest: AnyProblem) -> tuple[Config, ...]:
    """Configs that the kernel offers at any size, each once."""
    assert kernel.configs is not None, f"{kernel.name} leaves nothing open"
    sizes = (smallest.at(size) for size in smallest.buckets)
    offered = (kernel.configs(problem) for problem in sizes if not _refused(kernel, problem))
    return tuple(dict.fromkeys(config for configs in offered for config in configs))


@lru_cache(maxsize=4096)
def ladder_of(
    known: tuple[Kernel, ...],
    smallest: AnyProblem,
    tables: Tables,
    policy: Policy,
    blocked: frozenset[str],
) -> tuple[Rung, ...]:
    """The plan of a family, without the kernels that have no memory at the moment. NoKernelError if
    one choice must serve all sizes and none does."""
    times = {}
    for size in smallest.buckets:
        problem = smallest.at(size)
        found = {
            candidate: seconds
            for candidate, seconds in times_of(
                known, problem, tables, policy.one_for_all_sizes
            ).items()
            if candidate.kernel not in blocked and not policy.left_out(problem, candidate.kernel)
        }
        if found:
            times[size] = found
    priority = {kernel.name: kernel.priority for kernel in known}
    invariant = frozenset(k.name for k in known if k.m_invariant or k.activation is not None)
    return build_ladder(times, priority, policy.one_for_all_sizes, invariant)


def ranked(
    times: Mapping[Candidate, float], known: Mapping[str, Kernel]
) -> tuple[tuple[str, float], ...]:
    """(name, seconds at its best config), best first: of those within 3 % of the fastest left, the
    higher priority comes next, then the name."""
    left: dict[str, float] = {}
    for candidate, seconds in times.items():
        left[candidate.kernel] = min(seconds, left.get(candidate.kernel, math.inf))
    order = []
    while left:
        bound = TIE * min(left.values())
        tied = [name for name, seconds in left.items() if seconds <= bound]
        best = min(tied, key=lambda name: (-known[name].priority, name))
        order.append((best, left.pop(best)))
    return tuple(order)
