"""What the user says about kernels: rules that force one or leave some out, and two switches.

    rules    = rule { ";" rule }
    rule     = [selector "="] kernel        problems that match run this kernel, or it is an error
             | [selector] "!=" pattern      kernels whose names match are left out; * and ? as usual
    selector = op [":" weights] ["@" size]  op: linear, attend, ...  weights: a format, or w4a16
    size     = "m" ("<=" | ">=" | "=") number       rows of x; for attention: tokens

    linear:w4a16@m<=64=triton_int_group_gemv; !=triton_*

Rules come in layers. The first layer that has a matching one decides, within a layer its first rule:

    1  the argument of a call
    2  `with use_kernels(rules):`
    3  FEWBIT_KERNEL
    4  the file FEWBIT_KERNEL_FILE, else $XDG_CONFIG_HOME/fewbit/kernels.txt: a rule a line, # comments

FEWBIT_DETERMINISTIC=1 asks for one kernel and config for all sizes of a problem, first among kernels
whose results then do not depend on how many tokens are computed together (integer products; Triton's).
Where there are none, as for floating inputs on a CPU, a library's product may still round by that.

`environment` is the one place that reads the variables and the file. Whether a name exists is not known
here: the dispatcher says so, with the nearest one. What an operator measured is in `tuned.py`.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from .errors import RecipeError
from .kernel import AnyProblem, AttentionProblem, Problem

_RULE = re.compile(
    r"(?:(?P<op>[a-z_]+)(?::(?P<weights>[a-z0-9_]+))?"
    r"(?:@[mt](?P<relation><=|>=|=)(?P<size>[0-9]{1,9}))?(?P<equals>!?=))?(?P<kernel>[\w*?.]+(?:::[\w*?.]+)*)"
    r"|!=(?P<without>[\w*?.]+(?:::[\w*?.]+)*)"
)
_GRAMMAR = (
    "a rule is KERNEL, OP[:WEIGHTS][@m<=N]=KERNEL or !=PATTERN, such as "
    "linear:w4a16@m<=64=dense_cached"
)


@dataclass(frozen=True)
class Rule:
    """One rule. op, weights: None for any. relation, size: "<=", ">=" or "=", or both None.
    kernel: a name, or a pattern if the rule `leaves_out`. origin: where it was written."""

    kernel: str
    leaves_out: bool
    origin: str
    op: str | None = None
    weights: str | None = None
    relation: str | None = None
    size: int | None = None

    def matches(self, problem: AnyProblem) -> bool:
        """Is the rule about this problem?"""
        if self.op is not None and self.op != problem.op:
            return False
        if self.weights is not None and self.weights not in weight_names(problem):
            return False
        if self.size is None:
            return True
        return {
            "<=": problem.size <= self.size,
            ">=": problem.size >= self.size,
            "=": problem.size == self.size,
        }[self.relation or "="]


Rules = tuple[Rule, ...]


def weight_names(problem: AnyProblem) -> tuple[str, ...]:
    """What a rule may call the weights (or cached vectors) of a problem: format, and w4a16."""
    if isinstance(problem, AttentionProblem):
        return (problem.key,)
    if not isinstance(problem, Problem):
        return ()
    bits = getattr(problem.options, "bits", None)
    inputs = 16 if problem.activation is None else 8
    return (problem.format,) if bits is None else (problem.format, f"w{bits}a{inputs}")


def parse_rules(text: str, origin: str) -> Rules:
    """Rules separated by ";" or new lines; RecipeError, beginning with `origin`, names a wrong one."""
    lines = [line.partition("#")[0] for line in text.splitlines()]
    return tuple(
        _parse_rule(part.strip(), origin)
        for line in lines
        for part in line.split(";")
        if part.strip()
    )


def _parse_rule(text: str, origin: str) -> Rule:
    found = _RULE.fullmatch(text.replace(" ", ""))
    if found is None:
        raise RecipeError(f"{origin}: {text!r} is not a rule; {_GRAMMAR}")
    if found["without"]:
        return Rule(found["without"], True, origin)
    return Rule(
        kernel=found["kernel"],
        leaves_out=found["equals"] == "!=",
        origin=origin,
        op=found["op"],
        weights=found["weights"],
        relation=found["relation"],
        size=int(found["size"]) if found["size"] else None,
    )


@dataclass(frozen=True)
class Policy:
    """Layers of rules, the strongest first, and whether one choice must serve all sizes."""

    layers: tuple[Rules, ...] = ()
    one_for_all_sizes: bool = False

    def forced(self, problem: AnyProblem) -> Rule | None:
        """The rule that names the kernel of `problem`; None leaves the choice open. A rule whose kernel
        an earlier one leaves out does not count."""
        before: list[Rule] = []
        for rule in self._about(problem):
            if rule.leaves_out:
                before.append(rule)
            elif not any(fnmatchcase(rule.kernel, out.kernel) for out in before):
                return rule
        return None

    def left_out(self, problem: AnyProblem, kernel: str) -> Rule | None:
        """The rule that leaves `kernel` out; None if there is none, or an earlier one forces it."""
        for rule in self._about(problem):
            if rule.leaves_out and fnmatchcase(kernel, rule.kernel):
                return rule
            if not rule.leaves_out and rule.kernel == kernel:
                return None
        return None

    def speaks_of(self, problem: AnyProblem) -> bool:
        """Is any rule about this problem?"""
        return next(self._about(problem), None) is not None

    def _about(self, problem: AnyProblem) -> Iterator[Rule]:
        """Rules that match, the strongest first."""
        for rules in self.layers:
            yield from (rule for rule in rules if rule.matches(problem))

    def on_top(self, rules: Rules) -> "Policy":
        """This policy under a stronger layer."""
        return self if not rules else Policy((rules, *self.layers), self.one_for_all_sizes)


NO_RULES = Policy()

_CONTEXT: ContextVar[Rules] = ContextVar("fewbit_kernels", default=())


@contextmanager
def use_kernels(rules: str) -> Iterator[None]:
    """Inside, products follow `rules` before anything that the environment says.

    RecipeError if they do not parse; NoKernelError at the first product if a forced kernel does not
    exist or refuses.
    """
    token = _CONTEXT.set((*parse_rules(rules, "use_kernels"), *_CONTEXT.get()))
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def context_rules() -> Rules:
    """Rules of the `use_kernels` blocks around the caller, the innermost first."""
    return _CONTEXT.get()


def environment() -> Policy:
    """The policy that the environment and the rules file ask for; RecipeError names what is wrong."""
    layers = (
        parse_rules(os.environ.get("FEWBIT_KERNEL", ""), "FEWBIT_KERNEL"),
        _file_rules(os.environ.get("FEWBIT_KERNEL_FILE")),
    )
    switch = os.environ.get("FEWBIT_DETERMINISTIC", "0")
    if switch not in ("0", "1", ""):
        raise RecipeError(f"FEWBIT_DETERMINISTIC must be 0 or 1, got {switch!r}")
    return Policy(tuple(rules for rules in layers if rules), switch == "1")


def _file_rules(given: str | None) -> Rules:
    """Rules of the named file, which must exist, or of the default one, which need not."""
    if given:
        path = Path(given)
    else:
        # Not Path.home(): it raises where a process has no home.
        config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        path = Path(config) / "fewbit" / "kernels.txt"
        if not path.is_file():
            return ()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"rules file {str(path)!r} cannot be read: {error}") from error
    return parse_rules(text, str(path))


def current_policy() -> Policy:
    """What the environment asks for, under the `use_kernels` blocks around the caller."""
    return environment().on_top(context_rules())
