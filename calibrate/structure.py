"""The structure of a block, found by running it once: what is used how, and what feeds it.

Nothing is looked up by an architecture's name. A weight is a linear because it was seen in a matrix
product; two weights share an input because they got the same tensor; a norm feeds a weight because
its output has the values that the weight got; and the norm is of a kind because that kind's
formula gives its output:

    rms        x / sqrt(mean(x²) + eps) · w
    rms1p      x / sqrt(mean(x²) + eps) · (1 + w)
    layernorm  (x − mean(x)) / sqrt(var(x) + eps) · w + b

Experts get a choice of tokens, so a norm feeds them if each of their rows is a row of its output.

A name is looked at once: a weight whose output picks experts is a router, told by the class or
attribute name of its module beside a module `experts`. Recipes leave routers alone.

What a trace cannot show is not claimed: that a norm's output has no other reader, or that a starved
expert would be used like the others.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from .model import BlockInput, ModelGraph
from .uses import Use, WatchWeights

Role = Literal["linear", "experts", "router"]
NormKind = Literal["rms", "rms1p", "layernorm"]

_ROUTER_CLASSES = ("router", "topk", "gate")
_ROUTER_ATTRIBUTES = ("gate", "router")
_ROWS_OF_NORM = 64  # enough to tell one formula from another
_ROWS_CHECKED = 16  # of an expert's input; equality of whole rows by chance is out of the question


@dataclass(frozen=True)
class Norm:
    """A norm whose output a weight multiplies.

    name: graph module name. kind: None if no known formula gives its output.
    """

    name: str
    kind: NormKind | None
    bias: bool
    eps: float


@dataclass(frozen=True)
class WeightUse:
    """How one graph parameter is used.

    transposed: the graph holds [.., K, N]. input_key: equal for weights that get the very same
    activations (for experts: expert by expert). norm: what makes that activation, if a norm does.
    """

    parameter: str
    role: Role
    transposed: bool
    input_key: str
    norm: Norm | None
    times: int = 1  # products with it in one run of the block


@dataclass(frozen=True)
class Structure:
    """Facts of one block.

    uses: every weight that multiplies activations, in order of first use.
    unseen: parameters with two or more axes that no watched product used.
    """

    uses: tuple[WeightUse, ...]
    unseen: tuple[str, ...]

    @property
    def linears(self) -> tuple[WeightUse, ...]:
        """Matrices, routers among them."""
        return tuple(use for use in self.uses if use.role != "experts")

    @property
    def experts(self) -> tuple[WeightUse, ...]:
        """Stacks [E, .., ..]."""
        return tuple(use for use in self.uses if use.role == "experts")

    def find(self, parameter: str) -> WeightUse | None:
        """The use of `parameter`, or None if it was not seen."""
        for use in self.uses:
            if use.parameter == parameter:
                return use
        return None


@dataclass(frozen=True)
class _Input:
    """What a weight, or one expert of a stack, was multiplied by, as it was at that moment."""

    identity: tuple[int, ...]
    norm: Norm | None
    held: torch.Tensor  # so that its address is not given to another tensor during the trace


@dataclass(frozen=True)
class _NormTrace:
    norm: Norm
    output: torch.Tensor
    version: int  # of the output when it was made; it says nothing once it was written to


def find_structure(graph: ModelGraph, index: int, inputs: BlockInput) -> Structure:
    """Run materialized block `index` once on `inputs` and say how its weights are used."""
    prefix = graph.block_names[index]
    parameters = graph.block_parameters(index)
    uses: dict[str, list[_Input]] = defaultdict(list)
    transposed: dict[str, bool] = {}
    norms: list[_NormTrace] = []

    def on_use(use: Use, x: torch.Tensor) -> None:
        uses[use.parameter].append(_Input(_identity(use, x), _feeding_norm(x, norms), x))
        transposed[use.parameter] = use.transposed

    hooks = _watch_norms(graph.block(index), prefix, norms)
    try:
        with WatchWeights(parameters, on_use):
            graph.run(index, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    keys = _input_keys(uses)
    found = [
        WeightUse(
            name,
            _role(graph.block(index), name.removeprefix(f"{prefix}."), parameters[name].dim()),
            transposed[name],
            keys[name],
            _common_norm(uses[name]),
        )
        for name in uses
    ]
    return Structure(
        uses=tuple(found),
        unseen=tuple(n for n, item in parameters.items() if item.dim() >= 2 and n not in uses),
    )


def _identity(use: Use, x: torch.Tensor) -> tuple[int, ...]:
    """Equal for the same expert and the same values at the same address, [b, T, K] or [b·T, K]."""
    expert = -1 if use.expert is None else use.expert
    layout = x.numel(), x.shape[-1], int(x.is_contiguous())
    return (expert, x.data_ptr(), x._version, *layout)


def _input_keys(uses: dict[str, list[_Input]]) -> dict[str, str]:
    """Parameter -> name of the first parameter that got the same tensors."""
    first: dict[object, str] = {}
    keys: dict[str, str] = {}
    for name, inputs in uses.items():
        identity = tuple(sorted(item.identity for item in inputs))
        keys[name] = first.setdefault(identity, name)
    return keys


def _role(block: nn.Module, name: str, n_axes: int) -> Role:
    """Role of a used parameter by its relative `name`, `mlp.gate.weight`."""
    if n_axes == 3:
        return "experts"
    owner_name = name.rpartition(".")[0]
    parent_name, _, attribute = owner_name.rpartition(".")
    if not hasattr(block.get_submodule(parent_name), "experts"):
        return "linear"
    class_name = type(block.get_submodule(owner_name)).__name__.lower()
    by_class = any(part in class_name for part in _ROUTER_CLASSES)
    by_attribute = any(
        attribute == part or attribute.endswith(f"_{part}") for part in _ROUTER_ATTRIBUTES
    )
    return "router" if by_class or by_attribute else "linear"


def _watch_norms(
    block: nn.Module, prefix: str, traces: list[_NormTrace]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Record output and kind of every module that has a 1-D weight and keeps its input's shape."""
    hooks = []

    def watch(name: str) -> None:
        def after(module: nn.Module, args: tuple[torch.Tensor, ...], output: object) -> None:
            width = module.get_parameter("weight").shape[0]
            if not isinstance(output, torch.Tensor) or output.shape != args[0].shape:
                return
            if output.shape[-1] != width:
                return
            kind = norm_kind(module, args[0], output)
            has_bias = getattr(module, "bias", None) is not None
            norm = Norm(name, kind, has_bias, _eps(module))
            traces.append(_NormTrace(norm, output, output._version))

        hooks.append(module.register_forward_hook(after))

    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1:
            watch(f"{prefix}.{name}")
    return hooks


def _eps(module: nn.Module) -> float:
    for attribute in ("eps", "variance_epsilon"):
        if isinstance(getattr(module, attribute, None), float):
            return float(getattr(module, attribute))
    return 0.0


def norm_kind(module: nn.Module, x: torch.Tensor, output: torch.Tensor) -> NormKind | None:
    """The kind whose formula gives `output` to 1e-5, or to what its dtype resolves."""
    weight = module.get_parameter("weight").double()
    has_bias = isinstance(getattr(module, "bias", None), torch.Tensor)
    shift = module.get_parameter("bias").double() if has_bias else torch.zeros_like(weight)
    wide, output = (item.reshape(-1, weight.shape[0])[:_ROWS_OF_NORM] for item in (x, output))
    wide = wide.double()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _eps(module))
    candidates: dict[NormKind, torch.Tensor] = {
        "rms": unit * weight + shift,
        "rms1p": unit * (1 + weight) + shift,
        "layernorm": functional.layer_norm(wide, weight.shape, weight, None, _eps(module)) + shift,
    }
    scale = output.double().norm()
    tolerance = max(1e-5, torch.finfo(output.dtype).eps)
    for kind, value in candidates.items():
        if bool((value - output.double()).norm() <= tolerance * scale):
            return kind
    return None


def _feeding_norm(x: torch.Tensor, traces: list[_NormTrace]) -> Norm | None:
    """The norm whose output has the values of `x`, or rows of which `x` is a choice."""
    for trace in traces:
        if trace.output._version == trace.version and _comes_from(x, trace.output):
            return trace.norm
    return None


def _common_norm(inputs: list[_Input]) -> Norm | None:
    """The norm that feeds every one of `inputs`."""
    norms = {item.norm for item in inputs}
    return norms.pop() if len(norms) == 1 else None


def _comes_from(x: torch.Tensor, output: torch.Tensor) -> bool:
    if x.shape[-1] != output.shape[-1] or x.numel() == 0:
        return False
    rows = x.reshape(-1, x.shape[-1])
    table = output.reshape(-1, output.shape[-1]).to(rows.dtype)  # a router may cast its input
    if rows.shape == table.shape and torch.equal(rows, table):
        return True
    step = max(1, rows.shape[0] // _ROWS_CHECKED)
    return all(_has_row(table, row) for row in rows[::step])


def _has_row(table: torch.Tensor, row: torch.Tensor) -> bool:
    """Whether `row` is a row of `table`; most rows are ruled out by their first number."""
    alike = table[table[:, 0] == row[0]]
    return bool((alike == row).all(-1).any())
