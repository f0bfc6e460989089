"""Choosing a kernel and its config for a problem: a pure function of problem, rules and tables.

Every known kernel of the problem's op answers with its violated conditions; those without any are
candidates, with each of their configs. Their times are, in this order of trust,

    table   a row of a tuned table for this very problem, its device and its kernels' code: it decides
    near    estimates, corrected by how far they were off for a near shape in a table
    model   estimates

and `ladder.py` makes a plan of them: ranges of M that share a candidate, ties within 3 % to the higher
priority, then the name. A kernel that is `measured_only` is chosen by a row or a rule, never by
estimates. No kernel is run for that, so two processes with the same inputs agree, and a
problem of a described machine can be decided on any other. Rules (`policy.py`) come first: a kernel
that a rule forces but that refuses is an error with every reason, and so is a name that does not exist.
`reference` takes what nothing else takes, with one warning.

`explain` is the pure function. `explain_here` and `choice` take rules and tables from where this
process finds them. What a weight remembers of its choices is in `runner.py`.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from . import cpu, cpu_fle, cpu_int8, kv_softmax, kv_write, reference
from .candidates import ladder_of, ranked, times_of
from .errors import NoKernelError, nearest_name
from .kernel import (
    M_BUCKETS,
    PROVEN_TIMES,
    AnyProblem,
    Kernel,
    Problem,
    Reason,
    bucket_of,
)
from .ladder import Candidate, Rung, rung_of
from .machine import Limit, limit_of, this_device
from .packed import PackedTensor
from .policy import NO_RULES, Policy, Rule, current_policy
from .registry import discover
from .tuned import NO_TABLES, Tables, current_tables
from .tuned_table import Row

# Package, attribute of its modules, and the entry-point group that is listed with it.
_SOURCES = (
    ("fewbit.kernels_triton", "KERNEL", ""),
    ("fewbit.kernels_triton", "KERNELS", ""),
    ("fewbit.kernels_cuda", "KERNEL", "fewbit.kernels"),
    ("fewbit.kernels_cuda", "KERNELS", ""),
)
_MODEL, _NEAR, _TABLE = "model", "near", "table"  # what decided


@cache
def kernels() -> Mapping[str, Kernel]:
    """Every kernel by name: torch's CPU operators, plain torch for each op, the kernel packages, and
    the entry-point group `fewbit.kernels`."""
    torch_ops = (reference.KERNEL, reference.HADAMARD, kv_softmax.KERNEL, kv_write.KERNEL)
    ours = (*cpu.KERNELS, *cpu_int8.KERNELS, *cpu_fle.KERNELS, *torch_ops)
    found: dict[str, Kernel] = {kernel.name: kernel for kernel in ours}
    for package, attribute, group in _SOURCES:
        for name, kernel in discover(package, attribute, group).items():
            if name in found:
                raise RuntimeError(f"{package} defines kernel {name!r} again; names are unique")
            found[name] = kernel
    return found


def m_bucket(m: int) -> int:
    """Smallest bucket that holds `m` rows, or the largest bucket."""
    return bucket_of(m, M_BUCKETS)


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


# ---- explanation ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """Why `chosen` runs `problem`, and why nothing else does.

    config: what the chosen kernel leaves open. first, last: the sizes that this choice is for; last
    None for no end. origin: "model", "near", "table", or the rule that forced it.
    eligible: what would fit, with seconds at its best config, best first. refused: what does not, with
    all its reasons. limit: what no kernel can beat, None if the machine's rates are unknown.
    """

    problem: AnyProblem
    chosen: str
    config: tuple[tuple[str, int], ...]
    first: int
    last: int | None
    origin: str
    forced: bool
    eligible: tuple[tuple[str, float], ...]
    refused: Mapping[str, tuple[Reason, ...]]
    limit: Limit | None = None

    @property
    def candidate(self) -> Candidate:
        """The chosen kernel and config."""
        return Candidate(self.chosen, self.config)

    def as_dict(self) -> dict[str, Any]:
        """JSON form: problem, activation, chosen, config, sizes, origin, forced, eligible, refused,
        limit. All seconds are estimates unless origin is "table"; `share` is the limit's over the
        chosen kernel's."""
        return {
            "problem": str(self.problem),
            "activation": getattr(self.problem, "activation", None),
            "chosen": self.chosen,
            "config": dict(self.config),
            "sizes": [self.first, self.last],
            "origin": self.origin,
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
            if name == self.chosen:
                lines.append(f" CHOSEN {self.candidate} {seconds * 1e6:.1f} us {self._how()}")
            else:
                lines.append(f" ok     {name} {seconds * 1e6:.1f} us estimated")
        lines += _refusal_lines(self.refused)
        if self.limit:
            lines.append(
                f" limit  {self.limit.bound} {self.limit.seconds * 1e6:.1f} us estimated; "
                f"{self.chosen} reaches {self.limit.share:.0%} of it"
            )
        else:
            lines.append(" limit  unknown: no rates are known of this machine")
        return "\n".join(lines)

    def _how(self) -> str:
        """`estimated, for M = 33 to 48`, `measured, ...`, `estimated (forced by FEWBIT_KERNEL)`."""
        if self.forced:
            return f"estimated (forced by {self.origin})"
        known = {_MODEL: "estimated", _NEAR: "estimated from a near shape", _TABLE: "measured"}
        letter = "T" if self.problem.op == "attend" else "M"
        sizes = f"{self.first} and more" if self.last is None else f"{self.first} to {self.last}"
        return f"{known[self.origin]}, for {letter} = {sizes}"


def _refusal_lines(refused: Mapping[str, tuple[Reason, ...]]) -> list[str]:
    return [
        f" no     {name}: {reason.code} {reason.text} ({reason.fix})"
        for name, reasons in refused.items()
        for reason in reasons
    ]


def explain(
    problem: AnyProblem,
    *,
    policy: Policy = NO_RULES,
    tables: Tables = NO_TABLES,
    prepared: frozenset[str] = frozenset(),
) -> Explanation:
    """Ask every kernel of the problem's op, and choose.

    prepared: kernels whose layout of this weight already exists, which need no further memory.
    NoKernelError if a rule names a kernel that does not exist or refuses, or if nothing is left.
    """
    known = {kernel.name: kernel for kernel in kernels().values() if kernel.op == problem.op}
    _check_names(policy)
    refused = {
        name: found for name, k in known.items() if (found := _reasons(k, problem, prepared))
    }
    rules = {name: rule for name in known if (rule := policy.left_out(problem, name))}
    for name, rule in rules.items():
        refused[name] = (*refused.get(name, ()), _left_out(rule))
    open_times = times_of(tuple(known.values()), problem, tables)
    refused |= _without_candidate(known, problem, tables, set(refused), open_times)
    rule = policy.forced(problem)
    if rule is not None and rule.op is None and rule.kernel in set(kernels()) - set(known):
        rule = None  # a bare name speaks of its own op only
    row = tables.row(problem, known)
    deciding = None if policy.one_for_all_sizes or policy.speaks_of(problem) else row
    refused |= _unproven(known, problem, set(refused), rule, deciding)
    times = {candidate: t for candidate, t in open_times.items() if candidate.kernel not in refused}
    eligible = ranked(times, known)
    if problem.device == "cpu" and problem.op == "linear":
        refused |= {name: (reason,) for name, reason in cpu.DENIED_OPS.items()}
    if rule is not None:
        chosen, rung, origin = _forced(rule, problem, times, refused), None, rule.origin
        chosen = _settled(chosen, row, known, problem, tables, policy)
    elif not times:
        reasons = "\n".join(_refusal_lines(refused))
        raise NoKernelError(f"no kernel is left for {problem}:\n{reasons}")
    else:
        row = deciding
        rung, origin = _planned(known, problem, tables, policy, frozenset(refused), row)
        chosen = rung.candidate
    seconds = times.get(chosen, dict(eligible).get(chosen.kernel, math.inf))
    if origin == _TABLE and row is not None:
        seconds = row.entry(problem.size).us * 1e-6
        eligible = tuple((n, seconds if n == chosen.kernel else t) for n, t in eligible)
    return Explanation(
        problem=problem,
        chosen=chosen.kernel,
        config=chosen.config,
        first=rung.first if rung else problem.size,
        last=_end(rung, problem),
        origin=origin,
        forced=rule is not None,
        eligible=eligible,
        refused=refused,
        limit=limit_of(problem, seconds),
    )


def _unproven(
    known: Mapping[str, Kernel],
    problem: AnyProblem,
    refused: set[str],
    rule: Rule | None,
    row: Row | None,
) -> dict[str, tuple[Reason, ...]]:
    """Reasons against kernels that need a measurement, and that neither the rule nor the row of a
    table chooses."""
    entry = None if row is None else row.entry(problem.size)
    chosen = {rule.kernel} if rule is not None else set()
    if entry is not None and entry.measured:
        chosen.add(entry.kernel)
    reason = Reason(
        "UNMEASURED",
        f"not measured to be {PROVEN_TIMES} times as fast as the best other kernel, which it must be",
        "run `fewbit autotune`, or force it",
    )
    asked = set(known) - refused - chosen
    return {name: (reason,) for name in known if name in asked and known[name].measured_only}


def _end(rung: Rung | None, problem: AnyProblem) -> int | None:
    last = rung.last if rung else problem.size
    return None if last == problem.buckets[-1] else last


def _reasons(kernel: Kernel, problem: AnyProblem, prepared: frozenset[str]) -> tuple[Reason, ...]:
    reasons = tuple(kernel.refuse(problem))
    if kernel.name in prepared:
        return tuple(reason for reason in reasons if reason.code != "MEMORY")
    return reasons


def _left_out(rule: Rule) -> Reason:
    return Reason("DISABLED", f"left out by {rule.origin}: !={rule.kernel}", "change that rule")


def _check_names(policy: Policy) -> None:
    """NoKernelError for a rule whose name or pattern matches no kernel at all."""
    if not policy.layers:
        return
    names = sorted({*kernels(), *cpu.DENIED_OPS})
    for rules in policy.layers:
        for rule in rules:
            plain = not set("*?") & set(rule.kernel)
            if plain and rule.kernel not in names:
                raise NoKernelError(
                    f"{rule.origin}: {rule.kernel!r} names no kernel"
                    f"{nearest_name(rule.kernel, names)}; known: {', '.join(sorted(kernels()))}"
                )


def _forced(
    rule: Rule,
    problem: AnyProblem,
    times: Mapping[Candidate, float],
    refused: Mapping[str, tuple[Reason, ...]],
) -> Candidate:
    """The best config of the kernel that the rule names; NoKernelError with every reason if it
    refuses."""
    own = {candidate: t for candidate, t in times.items() if candidate.kernel == rule.kernel}
    if own:
        return min(own, key=lambda candidate: (own[candidate], candidate))
    others = ", ".join(sorted({candidate.kernel for candidate in times})) or "none"
    if rule.kernel not in refused:
        raise NoKernelError(
            f"{rule.origin}: {rule.kernel} cannot run {problem}: it is for another op; use one of: "
            f"{others}"
        )
    reasons = "\n".join(_refusal_lines({rule.kernel: refused[rule.kernel]}))
    raise NoKernelError(
        f"{rule.origin}: {rule.kernel} cannot run {problem}:\n{reasons}\n"
        f"change {rule.origin}, or use one of: {others}"
    )


def _settled(
    chosen: Candidate,
    row: Row | None,
    known: Mapping[str, Kernel],
    problem: AnyProblem,
    tables: Tables,
    policy: Policy,
) -> Candidate:
    """The config of a forced kernel: what was measured of it, or one for all sizes if that is asked."""
    if policy.one_for_all_sizes:
        alone = Policy((), True)
        smallest = problem.at(problem.buckets[0])
        ladder = ladder_of((known[chosen.kernel],), smallest, tables, alone, frozenset())
        return ladder[0].candidate
    entry = None if row is None else row.entry(problem.size)
    if entry is not None and entry.kernel == chosen.kernel and entry.measured:
        return Candidate(entry.kernel, entry.config)
    return chosen


def _without_candidate(
    known: Mapping[str, Kernel],
    problem: AnyProblem,
    tables: Tables,
    refused: set[str],
    times: Mapping[Candidate, float],
) -> dict[str, tuple[Reason, ...]]:
    """Reasons against kernels that take the problem, but none of whose configs is left."""
    left = {candidate.kernel for candidate in times} | refused
    found: dict[str, tuple[Reason, ...]] = {}
    for name, kernel in ((name, known[name]) for name in known if name not in left):
        failed = any(
            tables.quarantined(problem, kernel, config)
            for config in ((), *(kernel.configs(problem) if kernel.configs else ()))
        )
        code, text = ("QUARANTINED", "its configs failed when they were tuned here, got none left")
        if not failed:
            code, text = ("SMEM", "needs a config that fits this machine, got none")
        found[name] = (Reason(code, text, "tune again with a newer version, or use another"),)
    return found


# ---- plans ----------------------------------------------------------------------------------


def _planned(
    known: Mapping[str, Kernel],
    problem: AnyProblem,
    tables: Tables,
    policy: Policy,
    refused: frozenset[str],
    row: Row | None,
) -> tuple[Rung, str]:
    """The rung that holds the problem's size, and where its times come from. row: of a table, if it
    may decide."""
    if row is not None:
        entry = row.entry(problem.size)
        if entry.kernel not in refused:
            return row.rung(problem.size), _TABLE if entry.measured else _MODEL
    # What is refused at this size for its size alone is asked again at the others.
    blocked = frozenset(
        name
        for name in refused & set(known)
        if any(reason.code == "MEMORY" for reason in known[name].refuse(problem))
    )
    smallest = problem.at(problem.buckets[0])
    open_to_estimates = tuple(kernel for kernel in known.values() if not kernel.measured_only)
    ladder = ladder_of(open_to_estimates, smallest, tables, policy, blocked)
    near = tables.near(problem, known)
    return rung_of(ladder, problem.size), _NEAR if near else _MODEL


# ---- this process ---------------------------------------------------------------------------


def explain_here(problem: AnyProblem, prepared: frozenset[str] = frozenset()) -> Explanation:
    """As `explain`, under the rules and tables of this process."""
    tables = current_tables() if problem.described is None else NO_TABLES
    return explain(problem, policy=current_policy(), tables=tables, prepared=prepared)


def choice(problem: AnyProblem, prepared: frozenset[str] = frozenset()) -> Candidate:
    """The kernel (by name) and config that run `problem` in this process; a fallback warns once."""
    found = explain_here(problem, prepared)
    if found.chosen == "reference" and not found.forced and problem.device != "meta":
        _warn_fallback(getattr(problem, "format", problem.op), problem.device)
    return found.candidate


@cache
def _warn_fallback(weight_format: str, device: str) -> None:
    """One warning for each (format, device) in a process: nothing faster than `reference` fits."""
    warnings.warn(
        f"no kernel runs {weight_format} weights on {device}: each call decodes the whole weight "
        f"(kernel 'reference'); `fewbit kernels` lists why the others refuse",
        RuntimeWarning,
        stacklevel=2,
    )
