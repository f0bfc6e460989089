"""What will be stored where: the plan of a run, made from names and headers alone.

For each source tensor the recipe's rule decides: quantized (then its parts are planned) or kept.
Kept are, always: what is not a matrix product's weight (vectors, embeddings, convolutions), routers
and whatever else the recipe ignores, weights that the format would not shrink, and weights outside
the language model (multi-token-prediction heads, vision and audio towers), which are carried through
untouched.

Fused expert weights are [E, N, K] in most models. The table `_INPUT_FIRST` lists those whose files
hold [E, K, N] instead.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..export.shards import UnitPlan
from .errors import CheckpointError
from .format import PartSpec, find_format
from .preflight import text_config
from .recipe import Recipe, WeightRule

UNIT_BYTES = 256 << 20  # of source data in one unit of a data-free run
_NOT_LINEAR = re.compile(
    r"(^|[._])(embed\w*|wte|wpe|word_embeddings|position\w*|relative_attention_bias|shared|norm\w*|"
    r"ln_\w+|conv\w*|patch_embed\w*|rotary\w*)(\.|$)"
)
_OUTSIDE = re.compile(
    r"(^|\.)(mtp\w*|nextn\w*|visual|vision\w*|image\w*|audio\w*|multi_modal_projector)\."
)
_INPUT_FIRST = {"gpt_oss": r"\.experts\.(gate_up_proj|down_proj)$", "llama4": r"\.experts\.\w+$"}
_MIN_COLUMNS = 16


class SourceTensor(Protocol):
    """What the plan needs to know of a source tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As the file (after decoding) has it."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """After decoding."""
        ...

    @property
    def n_bytes(self) -> int:
        """Stored bytes in the source."""
        ...


@dataclass(frozen=True)
class PlannedTensor:
    """One source tensor and its fate. `rule` None: kept. shape: logical, [.., N, K] if quantized."""

    key: str
    module: str
    shape: tuple[int, ...]
    source_shape: tuple[int, ...]
    dtype: torch.dtype
    rule: WeightRule | None
    transposed: bool
    reason: str  # why it is kept, empty when quantized

    @property
    def suffix(self) -> str:
        """What the source name has after the module name."""
        return self.key[len(self.module) :]

    def specs(self) -> dict[str, PartSpec]:
        """Stored tensors by full name."""
        if self.rule is None:
            return {self.key: PartSpec(self.dtype, self.source_shape)}
        parts = find_format(self.rule.format).part_specs(self.shape, self.rule.options)
        return {f"{self.module}.{part}": spec for part, spec in parts.items()}


def plan_tensors(
    recipe: Recipe, config: Mapping[str, Any], tensors: Mapping[str, SourceTensor]
) -> dict[str, PlannedTensor]:
    """The fate of every source tensor, in source order."""
    inner = text_config(config)
    layers = inner.get("num_hidden_layers")
    model_type = str(inner.get("model_type", config.get("model_type", "")))
    swapped = next((p for name, p in _INPUT_FIRST.items() if model_type.startswith(name)), None)
    plan = {}
    for key, info in tensors.items():
        transposed = len(info.shape) == 3 and bool(swapped and re.search(swapped, key))
        plan[key] = _plan_tensor(recipe, key, info, transposed, layers)
    _refuse_clashes(plan)
    return plan


def _plan_tensor(
    recipe: Recipe, key: str, info: SourceTensor, transposed: bool, layers: Any
) -> PlannedTensor:
    module = key.removesuffix(".weight")
    shape = tuple(info.shape)
    logical = (shape[0], shape[2], shape[1]) if transposed else shape
    reason = _why_kept(key, module, logical, info.dtype, layers)
    rule = None if reason else recipe.rule_for(module)
    if rule is None:
        reason = reason or "the recipe leaves it out"
    else:
        bits = find_format(rule.format).bits(logical, rule.options)
        if bits >= 8 * info.dtype.itemsize:
            reason = f"{rule.format} would take {bits:.1f} bits per weight"
            rule = None
    logical = logical if rule else shape
    return PlannedTensor(
        key, module, logical, shape, info.dtype, rule, transposed and rule is not None, reason
    )


def _why_kept(
    key: str, module: str, shape: tuple[int, ...], dtype: torch.dtype, layers: Any
) -> str:
    experts = len(shape) == 3 and re.search(r"(^|\.)experts(\.|$)", key) is not None
    if not (len(shape) == 2 and key.endswith(".weight")) and not experts:
        return "not the weight of a matrix product"
    if not dtype.is_floating_point or module.endswith("bias"):
        return "not the weight of a matrix product"
    if _NOT_LINEAR.search(module):
        return "an embedding, norm or convolution"
    if _OUTSIDE.search(key) or _beyond_last_layer(key, layers):
        return "outside the language model"
    if shape[-1] < _MIN_COLUMNS or 0 in shape:
        return f"fewer than {_MIN_COLUMNS} columns"
    return ""


def _beyond_last_layer(key: str, layers: Any) -> bool:
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
    return isinstance(layers, int) and found is not None and int(found[1]) >= layers


def _refuse_clashes(plan: Mapping[str, PlannedTensor]) -> None:
    """A part must not take the name of a source tensor that is kept."""
    for tensor in plan.values():
        for name in tensor.specs() if tensor.rule else ():
            if name in plan:
                raise CheckpointError(f"{name} exists in the source and would be overwritten")


def unit_of(name: str, keys: list[str], plan: Mapping[str, PlannedTensor]) -> UnitPlan:
    """The stored tensors of a unit, in the order of `keys`."""
    return UnitPlan(name, {n: spec for key in keys for n, spec in plan[key].specs().items()})


def split_by_bytes(keys: list[str], tensors: Mapping[str, SourceTensor]) -> list[list[str]]:
    """Runs of source tensors of about UNIT_BYTES."""
    runs: list[list[str]] = []
    filled = UNIT_BYTES
    for key in keys:
        if filled >= UNIT_BYTES:
            runs.append([])
            filled = 0
        runs[-1].append(key)
        filled += tensors[key].n_bytes
    return runs
