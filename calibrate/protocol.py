"""What a pass is: block in, block out, with the statistics that it asked for.

A module in `calibrate/passes/` exposes a frozen record as `PASS`. The pipeline discovers it, parses
its options, asks which statistics it needs and whether it can run at all, and calls `run`.

Kinds: `xform` preserves the block's function (then it is checked), `alloc` chooses formats, `round`
puts weights on their grid (then the error is recorded), `tune` adjusts what a later pass rounds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..quant.block import Block
from ..quant.errors import RecipeError, nearest_name
from ..quant.format import parse_options
from ..quant.registry import discover

Kind = Literal["xform", "alloc", "round", "tune"]


@dataclass(frozen=True)
class Moments:
    """Second moments of one activation over the calibration tokens.

    hessian: fp32 [K, K], X̂ᵀX̂ / tokens, for the inputs X̂ that the quantized model makes.
    tokens: rows of X̂ that were seen.
    drift: fp32 [K, K], (X − X̂)ᵀX̂ / tokens, X being the original model's inputs for the same tokens;
        None if it was not asked for, or if the rows of the two cannot be paired (experts).
    """

    hessian: torch.Tensor
    tokens: int
    drift: torch.Tensor | None = None


Stats = Mapping[str, Moments]  # by `Weight.input_key`


@dataclass(frozen=True)
class Pass:
    """One pass.

    needs(options): names of the statistics that it reads ("moments", "drift"); none if data-free.
    refuse(architecture, options): a sentence why the architecture cannot take it, or None.
    run(block, stats, options): the changed block. Rounding passes set `Weight.packed`.
    """

    name: str
    kind: Kind
    Options: type[Any]
    needs: Callable[[Any], tuple[str, ...]]
    refuse: Callable[[str, Any], str | None]
    run: Callable[[Block, Stats, Any], Block]


def passes() -> dict[str, Pass]:
    """Every pass in `calibrate/passes/` and in the entry-point group `fewbit.passes`."""
    return discover("fewbit.calibrate.passes", "PASS", "fewbit.passes")


@dataclass(frozen=True)
class PlannedPass:
    """A pass with parsed options."""

    step: Pass
    options: Any


def plan_passes(uses: list[tuple[str, Mapping[str, Any]]]) -> tuple[PlannedPass, ...]:
    """Resolve names and options; without a rounding pass, `nearest` is appended.

    RecipeError for what is unknown, and for an order in which a pass would do nothing.
    """
    known = passes()
    planned = []
    for name, keys in uses:
        if name not in known:
            raise RecipeError(
                f"unknown pass {name!r}{nearest_name(name, known)}; known: {', '.join(known)}"
            )
        step = known[name]
        planned.append(PlannedPass(step, parse_options(f"pass {name}", step.Options, keys)))
    _check_order([item.step for item in planned])
    if not any(item.step.kind == "round" for item in planned):
        planned.append(PlannedPass(known["nearest"], known["nearest"].Options()))
    return tuple(planned)


def _check_order(steps: list[Pass]) -> None:
    """Weights are rounded once, and what tunes them comes before that."""
    rounding: Pass | None = None
    for step in steps:
        if rounding is not None and step.kind == "round":
            raise RecipeError(
                f"passes {rounding.name!r} and {step.name!r} both round, and weights are rounded "
                f"once; keep one of the two"
            )
        if rounding is not None and step.kind == "tune":
            raise RecipeError(
                f"pass {step.name!r} tunes what pass {rounding.name!r} before it has already "
                f"rounded; put {step.name!r} before {rounding.name!r}"
            )
        if step.kind == "round":
            rounding = step
