"""What a pass is: block in, block out, with the statistics that it asked for.

A module in `calibrate/passes/` exposes a frozen record as `PASS`. The pipeline discovers it, parses
its options, asks which statistics it needs and whether it can run at all, and calls `run`.

A pass is one of three records. A `ModelTransform` and a `BlockTransform` preserve the function (kind
`xform`, which is checked): they look at weights and samples and answer with edits. A `Pass` works on
the weights of one stage: `alloc` chooses formats, `round` puts weights on their grid (then the error
is recorded), `tune` adjusts what a later pass rounds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..quant.block import Block
from ..quant.errors import RecipeError, nearest_name
from ..quant.format import parse_options
from ..quant.hadamard import Hadamard
from ..quant.kv_policy import KVPolicy
from ..quant.registry import discover
from .edges import BlockEdges, ModelEdges
from .edits import Edit
from .observe import Observation

Kind = Literal["alloc", "round", "tune"]


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


@dataclass(frozen=True)
class BlockView:
    """What a transform of one block may look at: the block as the transforms before it left it.

    seen: sampled inputs of its weights, and its queries, keys and values.
    read(source tensor): its values, fp32. rules: source tensor -> (format, options) that it will be
    stored in, for those that are quantized. activation: format that inputs are rounded to, None for
    16 bit. kv: how keys and values are cached, None for 16 bit. seed: of the run.
    """

    edges: BlockEdges
    model: ModelEdges
    seen: Observation
    read: Callable[[str], torch.Tensor]
    rules: Mapping[str, tuple[str, Any]]
    activation: str | None
    kv: KVPolicy | None
    seed: int


@dataclass(frozen=True)
class ModelView:
    """What a transform of the whole model may look at. read(source tensor): its values, fp32."""

    edges: ModelEdges
    read: Callable[[str], torch.Tensor]
    seed: int


@dataclass(frozen=True)
class ModelEdits:
    """Edits of a transform of the whole model. basis: new basis of the residual stream, None if it
    stays. untie: the head must become a tensor of its own. online: what is left to run time, source
    tensor -> transform of its input."""

    edits: tuple[Edit, ...]
    basis: Hadamard | None = None
    untie: bool = False
    online: Mapping[str, Hadamard] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockTransform:
    """A function-preserving rewrite of one block, found from samples. Exposed as `PASS`.

    refuse(edges, options): what is missing for it, as a sentence, or None.
    edits(view, options): the edits; may be none. The pipeline verifies them (`check.py`).
    """

    name: str
    Options: type[Any]
    refuse: Callable[[ModelEdges, Any], str | None]
    edits: Callable[[BlockView, Any], list[Edit]]
    kind: Literal["xform"] = "xform"


@dataclass(frozen=True)
class ModelTransform:
    """A function-preserving rewrite of the whole model from its weights alone. Exposed as `PASS`."""

    name: str
    Options: type[Any]
    refuse: Callable[[ModelEdges, Any], str | None]
    edits: Callable[[ModelView, Any], ModelEdits]
    kind: Literal["xform"] = "xform"


AnyPass = Pass | BlockTransform | ModelTransform


def passes() -> dict[str, AnyPass]:
    """Every pass in `calibrate/passes/` and in the entry-point group `fewbit.passes`."""
    return discover("fewbit.calibrate.passes", "PASS", "fewbit.passes")


@dataclass(frozen=True)
class PlannedPass:
    """A pass with parsed options."""

    step: Pass
    options: Any


@dataclass(frozen=True)
class PlannedModelTransform:
    """A transform of the model with parsed options."""

    step: ModelTransform
    options: Any


@dataclass(frozen=True)
class PlannedBlockTransform:
    """A transform of a block with parsed options."""

    step: BlockTransform
    options: Any


@dataclass(frozen=True)
class Plan:
    """Passes in the order in which they run: transforms of the model, of each block, then the rest."""

    model: tuple[PlannedModelTransform, ...]
    block: tuple[PlannedBlockTransform, ...]
    passes: tuple[PlannedPass, ...]

    @property
    def transforms(self) -> bool:
        """Whether there is any transform."""
        return bool(self.model or self.block)


def plan_passes(uses: list[tuple[str, Mapping[str, Any]]]) -> Plan:
    """Resolve names and options; without a rounding pass, `nearest` is appended.

    RecipeError for what is unknown, and for an order in which a pass would do nothing.
    """
    known = passes()
    found: list[tuple[AnyPass, Any]] = []
    for name, keys in uses:
        if name not in known:
            raise RecipeError(
                f"unknown pass {name!r}{nearest_name(name, known)}; known: {', '.join(known)}"
            )
        found.append((known[name], parse_options(f"pass {name}", known[name].Options, keys)))
    _check_order([step for step, _ in found])
    model = [PlannedModelTransform(p, o) for p, o in found if isinstance(p, ModelTransform)]
    block = [PlannedBlockTransform(p, o) for p, o in found if isinstance(p, BlockTransform)]
    planned = [PlannedPass(step, o) for step, o in found if isinstance(step, Pass)]
    if not any(item.step.kind == "round" for item in planned):
        nearest = known["nearest"]
        assert isinstance(nearest, Pass)
        planned.append(PlannedPass(nearest, nearest.Options()))
    return Plan(tuple(model), tuple(block), tuple(planned))


def _check_order(steps: Sequence[AnyPass]) -> None:
    """Weights are transformed, then tuned, then rounded once."""
    before: AnyPass | None = None
    rounding: Pass | None = None
    for step in steps:
        if before is not None and _scope(step) < _scope(before):
            raise RecipeError(
                f"pass {step.name!r} rewrites weights that pass {before.name!r} before it has "
                f"already worked on; put {step.name!r} before {before.name!r}"
            )
        before = step
        if not isinstance(step, Pass):
            continue
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


def _scope(step: AnyPass) -> int:
    """0 for the whole model, 1 for a block, 2 for passes on single weights."""
    return 0 if isinstance(step, ModelTransform) else 1 if isinstance(step, BlockTransform) else 2
