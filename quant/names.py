"""Names: which parameter of a transformers model a tensor of the source file becomes, and where.

The library renames keys when it loads a checkpoint and fuses what the file stores apart. Its own
conversion tables are asked, so that nothing about an architecture is repeated here:

    file    model.layers.0.block_sparse_moe.experts.3.w3.weight       [N, K]
    graph   model.layers.0.mlp.experts.gate_up_proj                   [E, 2N, K]
    slot    expert 3, rows N … 2N

A *slot* exists for a rename, for experts stacked on a new leading axis, and for tensors laid one
after the other on the axis of outputs, alone or inside each expert. Any other conversion (chunks,
permutations, transposes) is still carried out, by the library's own code, but such a slot is not
`quantizable`: what is stored would no longer be what the graph multiplies by.

Quantized sources are decoded by whoever reads them: the shapes given here are those of the tensors
that an unquantized file of this model holds (fused experts of gpt-oss: [E, K, N]).
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

Read = Callable[[str], torch.Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """Place of a source tensor inside a graph parameter (or persistent buffer).

    expert: index on the leading axis when the source is one expert of a stack.
    rows: [start, stop) on the axis of outputs when others are concatenated to it.
    quantizable: False if the library computes the parameter by other means than placing.
    """

    parameter: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    quantizable: bool = True


@dataclass
class _Group:
    """Source tensors that become one parameter.

    target: the parameter, or the first one if the conversion makes several.
    keys: source pattern -> keys in the library's order.
    """

    target: str
    converter: "WeightConverter | None"
    keys: dict[str, list[str]] = field(default_factory=dict)

    def flat(self) -> tuple[str, ...]:
        return tuple(key for keys in self.keys.values() for key in keys)


class NameMap:
    """Source tensors of one checkpoint against the parameters of one model.

    model: a transformers model; its parameters may be on the meta device.
    source_shapes: tensor name in the file -> logical shape.
    CheckpointError if a tensor that the graph takes has another shape than the graph's parameter.
    """

    def __init__(self, model: "PreTrainedModel", source_shapes: Mapping[str, Shape]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
        )

        self._model = model
        self._shapes = source_shapes
        self._graph: dict[str, Shape] = {
            name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
        }
        mapping = get_model_conversion_mapping(model)
        self._converters = [item for item in mapping if isinstance(item, WeightConverter)]
        self._renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        self._slots: dict[str, Slot] = {}
        self._groups: dict[str, _Group] = {}  # parameter -> what it is built from
        # The library stacks experts in this order of keys.
        for group in self._collect(sorted(source_shapes, key=dot_natural_key)).values():
            self._place(group)

    def slot(self, key: str) -> Slot | None:
        """Where source tensor `key` goes; None if the graph does not take it."""
        return self._slots.get(key)

    def sources(self, parameter: str) -> tuple[str, ...]:
        """Source tensors of a graph parameter; none if it is tied to another, or absent."""
        group = self._groups.get(parameter)
        return group.flat() if group else ()

    def module_key(self, key: str) -> str:
        """`key` after renaming, before any fusion: its name in a graph with unfused modules."""
        fused, _ = self._rename(key, self._converters, prefixed=False)
        final, _ = self._rename(key, self._converters, prefixed=True)
        plain, _ = self._rename(key, [], prefixed=False)
        prefix = f"{self._model.base_model_prefix}."
        if final == prefix + fused:
            return prefix + plain
        return plain.removeprefix(prefix) if fused == prefix + final else plain

    def assemble(self, parameter: str, read: Read) -> torch.Tensor:
        """The graph parameter, built from what `read` answers for each of its sources.

        A parameter of one source is what `read` answered, not a copy of it.
        CheckpointError if the parameter has no source.
        """
        group = self._groups.get(parameter)
        if group is None:
            raise CheckpointError(
                f"no tensor of the checkpoint becomes {parameter}, which the model needs; the "
                "checkpoint is incomplete or its config.json describes another model"
            )
        keys = group.flat()
        if group.converter is None:
            return read(keys[0])
        if not self._slots[keys[0]].quantizable:
            return self._convert(group, read)[parameter]
        whole: torch.Tensor | None = None
        for key in keys:
            part = read(key)
            if whole is None:
                whole = part.new_empty(self._graph[parameter])
            slot_view(whole, self._slots[key]).copy_(part)
        assert whole is not None, f"{parameter}: a group without source tensors was recorded"
        return whole

    def _rename(
        self, key: str, converters: list["WeightConverter"], prefixed: bool
    ) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix if prefixed else None
        graph = self._graph if prefixed else None
        return rename_source_key(key, self._renamings, converters, prefix, graph)

    def _target(self, key: str) -> tuple[str, str | None]:
        """(graph name, source pattern of the converter that matched) as the library finds them."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = self._rename(key, self._converters, prefixed=True)
        if name not in self._graph and key in self._graph:
            return rename_source_key(key, [], [], self._model.base_model_prefix, self._graph)
        return name, pattern

    def _collect(self, keys: list[str]) -> dict[str, _Group]:
        """Graph parameter -> group. Keys that the graph does not know are left out, and so is a
        second key of a parameter that is merely renamed: the first one wins, as in the library."""
        by_pattern = {
            pattern: converter
            for converter in self._converters
            for pattern in converter.source_patterns
        }
        groups: dict[str, _Group] = {}
        for key in keys:
            target, pattern = self._target(key)
            if target not in self._graph:
                continue
            converter = by_pattern[pattern] if pattern is not None else None
            group = groups.setdefault(target, _Group(target, converter))
            if converter is None and group.keys:
                continue
            group.keys.setdefault(pattern or key, []).append(key)
        return groups

    def _place(self, group: _Group) -> None:
        """Record the slots of one group and the parameters that it makes."""
        slots = self._layout(group)
        if slots is None:
            slots = {key: Slot(group.target, quantizable=False) for key in group.flat()}
            made = self._convert(group, lambda key: torch.empty(self._shapes[key], device="meta"))
            shapes = {name: tuple(tensor.shape) for name, tensor in made.items()}
        else:
            shapes = {group.target: self._placed_shape(slots)}
        for name in shapes.keys() & self._graph.keys():
            if shapes[name] != self._graph[name]:
                raise CheckpointError(
                    f"{', '.join(group.flat()[:2])}: the checkpoint gives {name} the shape "
                    f"{shapes[name]}, its config.json says {self._graph[name]}; use the "
                    "config.json that belongs to these weights"
                )
            self._groups[name] = group
        self._slots.update(slots)

    def _layout(self, group: _Group) -> dict[str, Slot] | None:
        """Slots of a renamed, stacked or concatenated group; None if it is made otherwise."""
        target, converter = group.target, group.converter
        if converter is None:
            return {group.flat()[0]: Slot(target)}
        patterns = [name for name in converter.source_patterns if name in group.keys]
        columns = [group.keys[pattern] for pattern in patterns]
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
        if steps == [("Concatenate", 0)]:
            ordered = [key for keys in columns for key in keys]
            return {key: Slot(target, None, rows) for key, rows in self._ranges(ordered)}
        if steps[:1] == [("MergeModulelist", 0)]:
            for keys in columns:
                self._refuse_unlike(target, keys, first_axis=0)
        if steps == [("MergeModulelist", 0)] and len(columns) == 1:
            return {key: Slot(target, expert) for expert, key in enumerate(columns[0])}
        if steps != [("MergeModulelist", 0), ("Concatenate", 1)]:
            return None
        if len({len(keys) for keys in columns}) != 1:
            counts = {pattern: len(group.keys[pattern]) for pattern in patterns}
            raise CheckpointError(
                f"{target}: every expert needs each of its tensors, found {counts} of them; the "
                "checkpoint is incomplete"
            )
        return {
            key: Slot(target, expert, rows)
            for expert, keys in enumerate(zip(*columns, strict=True))
            for key, rows in self._ranges(list(keys))
        }

    def _ranges(self, keys: list[str]) -> Iterator[tuple[str, tuple[int, int]]]:
        start = 0
        for key in keys:
            stop = start + self._shapes[key][0]
            yield key, (start, stop)
            start = stop

    def _placed_shape(self, slots: Mapping[str, Slot]) -> Shape:
        """Shape of the tensor that the slots fill; CheckpointError if they do not fit together."""
        key, slot = next(iter(slots.items()))
        shape = list(self._shapes[key])
        self._refuse_unlike(slot.parameter, list(slots), first_axis=1)
        if slot.rows is not None:
            shape[0] = max(item.rows[1] for item in slots.values() if item.rows)
        if slot.expert is not None:
            shape.insert(0, 1 + max(item.expert or 0 for item in slots.values()))
        return tuple(shape)

    def _refuse_unlike(self, parameter: str, keys: list[str], first_axis: int) -> None:
        """CheckpointError unless the shapes of `keys` agree from `first_axis` on."""
        for key in keys:
            if self._shapes[key][first_axis:] != self._shapes[keys[0]][first_axis:]:
                raise CheckpointError(
                    f"{parameter} is made of {keys[0]} {self._shapes[keys[0]]} and {key} "
                    f"{self._shapes[key]}; their shapes must agree, the checkpoint is damaged"
                )

    def _convert(self, group: _Group, read: Read) -> dict[str, torch.Tensor]:
        """The library's own conversion of a group: graph parameter -> tensor."""
        converter: Any = deepcopy(group.converter)
        for pattern, keys in group.keys.items():
            for key in keys:
                converter.add_tensor(group.target, key, pattern, read(key))
        made = converter.convert(group.target, model=self._model, config=self._model.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }


def slot_view(whole: torch.Tensor, slot: Slot, transposed: bool = False) -> torch.Tensor:
    """The part of graph parameter `whole` that `slot` names, a view in logical orientation.

    transposed: `whole` is [.., K, N]; the view is [.., N, K] all the same.
    """
    view = whole if slot.expert is None else whole[slot.expert]
    if transposed:
        view = view.transpose(-1, -2)
    if slot.rows is None:
        return view
    axis = 0 if view.dim() == 1 else -2
    return view.narrow(axis, slot.rows[0], slot.rows[1] - slot.rows[0])
