"""From stored modules to the model graph: what replaces which module, and under which name.

    stored                    graph has               becomes
    q_proj.{codes, ...}       nn.Linear q_proj        QuantLinear q_proj
    experts.down_proj.{...}   parameter [E, N, K]     FusedExperts at the parameter's name
    experts.3.w1.{...}, ...   parameter [E, 2N, K]    QuantLinear children experts.3.w1, and an
                                                      ExpertView at the parameter's name
    anything else             any parameter           decoded into the parameter after loading

The last row keeps a model correct where no packed holder fits (embeddings, transposed convolutions,
stacks of which only some experts are quantized, tensors that the library rearranges); it costs the
memory of the dense weight, and the loader says so.

A graph parameter that nothing in the checkpoint becomes is an error: the library would fill it with
random numbers.
"""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import CheckpointError
from .linear import ExpertView, FusedExperts, PackedModule, QuantLinear, replace_parameter
from .names import NameMap, Slot
from .stored import StoredCheckpoint, StoredModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Placement:
    """Where everything goes.

    modules: graph module name -> stored module that it holds packed.
    part_names: stored tensor name -> name in the graph's state.
    decoded: graph parameter -> stored modules (by name) that are decoded into it; none if it is only
    made of entropy-coded tensors.
    held: dense tensors that the library must not load: they belong to decoded parameters.
    has_experts: some expert stack is held packed, so experts must run one by one.
    """

    names: NameMap
    owners: Mapping[str, StoredModule]  # tensor name in an unquantized file -> module
    modules: dict[str, StoredModule] = field(default_factory=dict)
    part_names: dict[str, str] = field(default_factory=dict)
    decoded: dict[str, list[str]] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    has_experts: bool = False


def place(model: "PreTrainedModel", stored: StoredCheckpoint) -> Placement:
    """Replace modules of a skeleton on the meta device by empty packed holders.

    Until `PackedModule.fill`, the buffers of a holder are no part of the model's state.

    CheckpointError: a parameter would stay without a value, or has another shape in the checkpoint.
    """
    shapes = {name: entry.shape for name, entry in stored.dense().items()}
    owners: dict[str, StoredModule] = {}
    for module in stored.modules.values():
        for key in _dense_names(module):
            owners[key] = module
            shapes[key] = _file_shape(module)
    plan = Placement(NameMap(model, shapes), owners)
    _require_all(model, plan.names, stored)
    groups: dict[str, dict[str, Slot]] = {}
    for key in owners:
        slot = plan.names.slot(key)
        if slot is not None:
            groups.setdefault(slot.parameter, {})[key] = slot
    coded = {name for name, tensor in stored.dense().items() if tensor.coded}
    for parameter, slots in groups.items():
        if not _place_packed(model, plan, parameter, slots):
            _place_decoded(plan, parameter, coded)
    for key in sorted(coded):
        slot = plan.names.slot(key)
        if slot is not None and slot.parameter not in plan.decoded:
            _place_decoded(plan, slot.parameter, coded)
    return plan


def _dense_names(module: StoredModule) -> tuple[str, ...]:
    """What the tensor is called in an unquantized file; fused experts may lack `.weight`."""
    weight = f"{module.name}.weight"
    return (weight,) if len(module.shape) == 2 else (module.name, weight)


def _file_shape(module: StoredModule) -> tuple[int, ...]:
    *lead, n, k = module.shape
    return (*lead, k, n) if module.spec.transposed else module.shape


def _require_all(model: "PreTrainedModel", names: NameMap, stored: StoredCheckpoint) -> None:
    optional = [re.compile(text) for text in model._keys_to_ignore_on_load_missing or ()]
    families = _tied_families(model)
    for name, _ in model.named_parameters(remove_duplicate=False):
        same = families.get(name, {name})
        if any(names.sources(other) for other in same) or any(p.search(name) for p in optional):
            continue
        raise CheckpointError(
            f"{stored.folder}: no tensor of the checkpoint becomes {name}, which the model needs; "
            f"the checkpoint is incomplete, or config.json or the class belongs to another model"
        )


def _tied_families(model: "PreTrainedModel") -> dict[str, set[str]]:
    """Parameter -> all parameters that are one tensor with it."""
    families: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        family = families.get(source, {source}) | families.get(target, {target})
        families.update(dict.fromkeys(family, family))
    return families


def _place_packed(
    model: "PreTrainedModel", plan: Placement, parameter: str, slots: Mapping[str, Slot]
) -> bool:
    """Put a packed holder where `parameter` is; False if none fits."""
    sources = plan.names.sources(parameter)
    whole = slots.keys() == set(sources) and all(slot.quantizable for slot in slots.values())
    if not whole or not _untie(model, plan.names, parameter):
        return False
    owner_name, _, leaf = parameter.rpartition(".")
    owner = model.get_submodule(owner_name)
    first = slots[sources[0]]
    if first.expert is not None:
        return _place_experts(plan, owner_name, owner, leaf, slots)
    if len(sources) > 1 or first.rows is not None:
        return False
    stored = plan.owners[sources[0]]
    if type(owner) is nn.Linear and leaf == "weight" and not stored.spec.transposed:
        parent_name, _, child = owner_name.rpartition(".")
        layer = _linear(stored, owner.weight.dtype, owner.bias is not None)
        setattr(model.get_submodule(parent_name), child, layer)
        _record(plan, owner_name, stored, layer)
        return True
    if len(stored.shape) == 3:
        dtype = model.get_parameter(parameter).dtype
        spec = stored.spec
        experts = FusedExperts(
            stored.shape, spec.terms, dtype, "meta", spec.transposed, spec.activation, spec.inputs
        )
        replace_parameter(owner, leaf, experts)
        plan.has_experts = True
        _record(plan, parameter, stored, experts)
        return True
    return False


def _untie(model: "PreTrainedModel", names: NameMap, parameter: str) -> bool:
    """False if `parameter` is one tensor with another that the file does not hold itself.

    A head that is quantized although the configuration ties it to the embedding is separate in the
    file, and stays so.
    """
    family = _tied_families(model).get(parameter, {parameter})
    if not all(names.sources(other) for other in family):
        return False
    ties = model.all_tied_weights_keys
    for target in [t for t, source in ties.items() if parameter in (t, source)]:
        del ties[target]
    return True


def _linear(stored: StoredModule, dtype: torch.dtype, bias: bool) -> QuantLinear:
    spec = stored.spec
    return QuantLinear(
        stored.shape, spec.terms, bias, dtype, "meta", False, spec.activation, spec.inputs
    )


def _place_experts(
    plan: Placement, owner_name: str, owner: nn.Module, leaf: str, slots: Mapping[str, Slot]
) -> bool:
    """One `QuantLinear` for each source matrix, and a view of them as one stack."""
    order = sorted(slots, key=lambda key: (slots[key].expert, slots[key].rows or (0, 0)))
    children: dict[int, list[str]] = {}
    for key in order:
        expert = slots[key].expert
        assert expert is not None, f"{key}: a slot without expert among expert slots"
        children.setdefault(expert, []).append(plan.owners[key].name.rpartition(".")[2])
    found = {tuple(names) for names in children.values()}
    transposed = any(plan.owners[key].spec.transposed for key in order)
    if len(found) != 1 or len(set(children[0])) != len(children[0]) or transposed:
        return False
    dtype = owner.get_parameter(leaf).dtype
    for key in order:
        stored, name = plan.owners[key], str(slots[key].expert)
        child = stored.name.rpartition(".")[2]
        if name not in owner._modules:
            owner.add_module(name, nn.Module())
        layer = _linear(stored, dtype, bias=False)
        owner.get_submodule(name).add_module(child, layer)
        _record(plan, f"{owner_name}.{name}.{child}", stored, layer)
    replace_parameter(owner, leaf, ExpertView(owner, len(children), children[0]))
    plan.has_experts = True
    return True


def _record(plan: Placement, graph_name: str, stored: StoredModule, layer: PackedModule) -> None:
    for holder in layer.modules():
        holder._non_persistent_buffers_set.update(holder._buffers)
    plan.modules[graph_name] = stored
    for part, key in stored.parts.items():
        plan.part_names[key] = f"{graph_name}.{part}"


def _place_decoded(plan: Placement, parameter: str, coded: Container[str]) -> None:
    decoded = []
    for key in plan.names.sources(parameter):
        stored = plan.owners.get(key)
        if stored is None:
            if key not in coded:  # the files have its planes, under names that the library ignores
                plan.held.add(key)
        elif stored.spec.inputs:
            raise CheckpointError(
                f"{stored.name} multiplies inputs that are transformed at run time, and this model "
                f"has no plain linear layer for it; load it with the class it was quantized from"
            )
        else:
            decoded.append(stored.name)
    plan.decoded[parameter] = decoded


def take_ties(model: "PreTrainedModel", plan: Placement) -> dict[str, str]:
    """Untie, while the library loads, what is decoded afterwards: it would take both ends of a tie for
    lost. Returns target -> source of what is to be tied again; a tie whose ends the file both holds is
    none."""
    taken = {}
    ties = model.all_tied_weights_keys
    families = _tied_families(model)
    for target in [name for name in ties if families[name] & plan.decoded.keys()]:
        source = ties.pop(target)
        if not {target, source} <= plan.decoded.keys():
            taken[target] = source
    return taken


def packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    """Every packed holder of a model by its name."""
    return {name: item for name, item in model.named_modules() if isinstance(item, PackedModule)}


def set_tied(model: "PreTrainedModel", name: str, value: torch.Tensor) -> None:
    """Give `value` to a parameter and to all that are tied to it."""
    parameter = nn.Parameter(value, requires_grad=False)
    for other in sorted(_tied_families(model).get(name, {name})):
        owner_name, _, leaf = other.rpartition(".")
        owner: Any = model.get_submodule(owner_name)
        setattr(owner, leaf, value if leaf in owner._buffers else parameter)
