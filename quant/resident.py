"""Weights that stay coded while their model lives, decoded block by block just ahead of use.

    residence = keep_coded(model, {"model.layers.0.mlp.up_proj.weight": coded, ...})

A block is a child of the outermost `nn.ModuleList` above a parameter: `model.layers.3`,
`encoder.block.5`. Each list has two buffers of the size of its largest block (`resident_slots.py`).
While a block runs, its parameters are views of one; the next block of the list is decoded into the
other meanwhile, and behind the last one the first, for the next token. Blocks may run in any order,
more than once, or in several threads at a time: what was not foreseen is decoded when it is needed.
Coded parameters that are in no block, or in several, are decoded at once and stay. What is resident:

    coded bytes  +  two blocks of each list  +  what is in no block

Decoding is exact and products are torch's own, so results have the bits of the plain model.

Between two runs a parameter is a placeholder on the meta device with its shape and dtype: reading one
raises torch's error about meta tensors, nothing hands out a buffer that is about to be overwritten. So
`named_parameters` gives placeholders, and while its block runs the weight. `state_dict` (and with it
`save_pretrained`) decodes into memory of its own, all of what was asked for. Refused by name, because
they would go wrong in silence: `load_state_dict` into coded weights, moving or casting them
(`model.to` another device or dtype; to the same it does nothing), copying and pickling the model.
`Residence.release` makes all parameters plain again, which allows everything.

Coded weights take no gradient; gradients reach inputs. A run that needs a gradient gets buffers of its
own, which the graph keeps: the memory of a plain model, as long as the graph lives. Where the need
could not be seen (it came in through a cache), backward raises torch's error about a tensor that was
modified in place; it never computes with other weights.

Hooks do the work, so a block has to be called, not its `forward`; forward hooks that are registered on
a block later than these run when its weights are gone. Deliberately not here: what codes weights, and
`torch.compile`, which would have to see parameters that stay where they are.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .errors import FewbitError, FormatError, nearest_name
from .resident_slots import Coded, Counts, Slot, Slots, renewed_after_fork, undecodable

Owner = tuple[nn.Module, str]  # a module and the name of a parameter there
_DECODING = (FewbitError, ValueError, RuntimeError, OSError)  # what decoders raise


def keep_coded(
    model: nn.Module, coded: Mapping[str, Coded], device: torch.device | str | None = None
) -> "Residence":
    """Replace the named parameters of `model` by coded ones; see the module's text.

    device: where they are decoded; None is that of each parameter, and "cpu" for those on the meta
    device, so that a model can be made without memory for them.
    FormatError: no such parameter, another shape or dtype, a block on several devices, or already
    coded.
    """
    return Residence(model, _items(model, coded, device))


class _Placeholder(nn.Parameter):
    """A coded parameter while its block does not run, on the meta device."""


@dataclass(eq=False)
class _Item:
    """A coded parameter. owners: where the model holds it. requires_grad: of what it replaces."""

    name: str
    coded: Coded
    owners: tuple[Owner, ...]
    device: torch.device
    requires_grad: bool

    def put(self, value: nn.Parameter) -> None:
        """Make `value` the parameter."""
        for module, attribute in self.owners:
            module._parameters[attribute] = value

    def decode(self) -> torch.Tensor:
        """In memory of its own; FormatError with the parameter's name."""
        with torch.inference_mode(False), torch.no_grad():
            out = torch.empty(tuple(self.coded.shape), dtype=self.coded.dtype, device=self.device)
            try:
                self.coded.decode_into(out)
            except _DECODING as error:
                raise undecodable(self.name, error) from error
            return out

    def placeholder(self) -> nn.Parameter:
        """With the shape and dtype, and no memory."""
        with torch.inference_mode(False):
            empty = torch.empty(tuple(self.coded.shape), dtype=self.coded.dtype, device="meta")
            return _Placeholder(empty, requires_grad=False)


@dataclass(eq=False)
class _Block:
    """Parameters of one block. number: in `slots`. slot: the buffer that its runs share now."""

    module: nn.Module
    items: Sequence[_Item]
    slots: Slots
    number: int
    placeholders: Sequence[nn.Parameter]
    slot: Slot | None = None
    runs: int = 0

    def put(self, values: Sequence[nn.Parameter]) -> None:
        """Make `values` the parameters."""
        for item, value in zip(self.items, values, strict=True):
            item.put(value)


class Residence:
    """What keeps a model's weights coded. `keep_coded` makes it; it lives as long as the model."""

    def __init__(self, model: nn.Module, items: Sequence[_Item]) -> None:
        lists, self._outside = _lists(model, items)
        self._slots: list[Slots] = []
        self._blocks: list[_Block] = []
        self._undo: list[Callable[[], Any]] = []
        self._lock = threading.Lock()
        self._entered = threading.local()
        plain = [item.decode() for item in self._outside]
        for device, blocks in lists:
            named = [[(item.name, item.coded) for item in own] for _, own in blocks]
            self._slots.append(Slots(named, device))
            for number, (module, own) in enumerate(blocks):
                empty = [item.placeholder() for item in own]
                self._blocks.append(_Block(module, own, self._slots[-1], number, empty))
        for item, value in zip(self._outside, plain, strict=True):
            item.put(nn.Parameter(value, requires_grad=False))
        model._apply = partial(self._apply, model, {})  # type: ignore[method-assign]
        self._undo.append(partial(model.__dict__.pop, "_apply", None))
        for block in self._blocks:
            self._install(block)
        self._kinds = {(item.coded.dtype, item.device) for item in items}
        self.coded_bytes = sum(item.coded.n_bytes for block in self._blocks for item in block.items)
        self.plain_bytes = sum(value.nbytes for value in plain)
        renewed_after_fork(self)

    # ---- facts ------------------------------------------------------------------------------

    @property
    def buffer_bytes(self) -> int:
        """Of the buffers that blocks are decoded into."""
        return sum(slots.n_bytes for slots in self._slots)

    @property
    def n_bytes(self) -> int:
        """That the named parameters take now: coded, in buffers, and what is in no block."""
        return self.coded_bytes + self.buffer_bytes + self.plain_bytes

    @property
    def counts(self) -> Counts:
        """Over all blocks since the beginning."""
        rows = [astuple(slots.counts) for slots in self._slots]
        return Counts(*map(sum, zip(*rows, strict=True)))

    # ---- life -------------------------------------------------------------------------------

    def release(self) -> None:
        """Make all parameters plain, in memory of their own; a second call does nothing. FormatError if
        a block is running, or if a weight cannot be decoded; then nothing has changed."""
        for block, _ in list(self._stack()):  # runs of this thread that were interrupted
            self._end(block)
        if any(slots.in_use for slots in self._slots):
            raise FormatError("a block of the model is running; release its weights afterwards")
        pairs = [(item, item.decode()) for block in self._blocks for item in block.items]
        for item, value in pairs:
            item.put(nn.Parameter(value, requires_grad=item.requires_grad))
        for item in self._outside:
            module, attribute = item.owners[0]
            module.get_parameter(attribute).requires_grad_(item.requires_grad)
        for undo in self._undo:
            undo()
        for slots in self._slots:
            slots.close()
        self._blocks, self._slots, self._undo, self._outside = [], [], [], []
        self.plain_bytes += sum(value.nbytes for _, value in pairs)
        self.coded_bytes = 0

    def after_fork(self) -> None:
        """In a child, where the runs of other threads have no end: blocks that only they ran do not."""
        self._lock = threading.Lock()
        entered = {block for block, _ in self._stack()}
        for block in self._blocks:
            block.runs = int(block in entered)
            if block not in entered:
                block.slot = None
                block.put(block.placeholders)

    def __deepcopy__(self, memo: Any) -> "Residence":
        raise FormatError("a model with coded weights cannot be copied; call release() first")

    def __reduce__(self) -> Any:
        raise FormatError(
            "a model with coded weights cannot be pickled; call release() first, or save its "
            "state_dict(), which has the decoded weights"
        )

    # ---- hooks ------------------------------------------------------------------------------

    def _install(self, block: _Block) -> None:
        block.put(block.placeholders)
        module = block.module
        before, after = partial(self._before, block), partial(self._after, block)
        handles = [
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            module.register_forward_hook(after, always_call=True),
        ]
        by_owner: dict[nn.Module, dict[str, _Item]] = {}
        for item in block.items:
            for owner, attribute in item.owners:
                by_owner.setdefault(owner, {})[attribute] = item
        for owner, items in by_owner.items():
            export, refuse = partial(self._export, items), partial(self._refuse_load, items)
            handles.append(owner.register_state_dict_post_hook(export))
            handles.append(owner.register_load_state_dict_pre_hook(refuse))
            owner._apply = partial(self._apply, owner, items)  # type: ignore[method-assign]
            self._undo.append(partial(owner.__dict__.pop, "_apply", None))
        self._undo += [handle.remove for handle in handles]

    def _before(
        self, block: _Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        private = torch.is_grad_enabled() and _wants_gradient(module, args, kwargs)
        stack = self._stack()
        if any(entered is block for entered, _ in stack):  # a run that was interrupted
            self._end(block)
        with self._lock:
            slot = block.slots.enter(block.number, private, block.slot)
            block.slot = slot
            block.runs += 1
            stack.append((block, slot))
        weights = block.slots.wait(slot)
        with self._lock:
            block.put(weights)

    def _after(self, block: _Block, module: nn.Module, args: Any, output: Any) -> None:
        self._end(block)

    def _end(self, block: _Block) -> None:
        """The last run of `block` that this thread began has ended, if there is one."""
        stack = self._stack()
        found = next((at for at in reversed(range(len(stack))) if stack[at][0] is block), None)
        if found is None:
            return
        _, slot = stack.pop(found)
        with self._lock:
            block.runs -= 1
            if not block.runs:
                block.slot = None
                block.put(block.placeholders)
            block.slots.leave(slot)

    def _stack(self) -> list[tuple[_Block, Slot]]:
        """Blocks that this thread has entered."""
        stack: list[tuple[_Block, Slot]] = self._entered.__dict__.setdefault("stack", [])
        return stack

    def _export(
        self,
        items: Mapping[str, _Item],
        module: nn.Module,
        state: dict[str, Any],
        prefix: str,
        local: Any,
    ) -> None:
        """Decoded weights in a state dict."""
        for attribute, item in items.items():
            if prefix + attribute in state:
                state[prefix + attribute] = item.decode()

    def _refuse_load(
        self,
        items: Mapping[str, _Item],
        module: nn.Module,
        state: Mapping[str, Any],
        prefix: str,
        *rest: Any,
    ) -> None:
        names = [prefix + attribute for attribute in items if prefix + attribute in state]
        if names:
            raise FormatError(
                f"{names[0]} is kept coded and cannot be loaded into; call release() first"
            )

    def _apply(
        self,
        owner: nn.Module,
        items: Mapping[str, _Item],
        change: Callable[..., Any],
        recurse: bool = True,
    ) -> nn.Module:
        """`owner._apply` without its coded weights, if nothing changes for any of the model."""
        for dtype, device in self._kinds:
            probe = torch.empty(1, dtype=dtype, device=device)
            changed = change(probe)
            if (changed.device, changed.dtype) != (probe.device, dtype):
                raise FormatError(
                    f"the model has weights that are kept coded, of {dtype} on {device}; they cannot "
                    f"become {changed.dtype} on {changed.device}: call release() first, or load the "
                    f"model there"
                )
        coded = {attribute: owner._parameters[attribute] for attribute in items}
        owner._parameters.update(dict.fromkeys(items))
        try:
            return type(owner)._apply(owner, change, recurse)
        finally:
            owner._parameters.update(coded)


# ---- parameters and blocks ------------------------------------------------------------------


def _items(
    model: nn.Module, coded: Mapping[str, Coded], device: torch.device | str | None
) -> list[_Item]:
    """In the order of the model; a parameter that is tied has one item, whatever name it comes by."""
    names = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[nn.Parameter, list[Owner]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((module, attribute))
    unknown = next((name for name in coded if name not in names), None)
    if unknown is not None:
        raise FormatError(
            f"the model has no parameter {unknown}{nearest_name(unknown, names)}; give names of its "
            f"named_parameters()"
        )
    found: dict[nn.Parameter, _Item] = {}
    for name, parameter in names.items():
        if name in coded and parameter not in found:
            _check(name, parameter, coded[name])
            where = "cpu" if parameter.is_meta else parameter.device
            target = torch.device(where if device is None else device)
            places, grad = tuple(owners[parameter]), parameter.requires_grad
            found[parameter] = _Item(name, coded[name], places, target, grad)
    return list(found.values())


def _check(name: str, parameter: nn.Parameter, coded: Coded) -> None:
    if isinstance(parameter, _Placeholder):
        raise FormatError(f"{name} is kept coded already; call release() of that residence first")
    if parameter.shape != tuple(coded.shape) or parameter.dtype != coded.dtype:
        raise FormatError(
            f"{name} is {parameter.dtype} {list(parameter.shape)} in the model, but coded as "
            f"{coded.dtype} {list(coded.shape)}; load the model in the dtype of its checkpoint"
        )


_Place = tuple[nn.ModuleList, nn.Module]  # a list and its child
_List = tuple[torch.device, list[tuple[nn.Module, list[_Item]]]]  # blocks in their order


def _lists(model: nn.Module, items: Sequence[_Item]) -> tuple[list[_List], list[_Item]]:
    """(for each list and device its blocks, what is in no block or in several)."""
    places: dict[nn.Module, set[_Place | None]] = {}
    _walk(model, None, places)
    outside: list[_Item] = []
    own: dict[_Place, list[_Item]] = {}
    for item in items:
        around = {place for module, _ in item.owners for place in places[module]}
        place = around.pop() if len(around) == 1 else None
        (outside if place is None else own.setdefault(place, [])).append(item)
    found: dict[tuple[nn.Module, torch.device], list[tuple[nn.Module, list[_Item]]]] = {}
    for (holder, child), inside in own.items():
        devices = {item.device for item in inside}
        if len(devices) > 1:
            raise FormatError(
                f"{inside[0].name} and others of its block are on {sorted(map(str, devices))}; a "
                f"block with coded weights must be on one device"
            )
        found.setdefault((holder, devices.pop()), []).append((child, inside))
    return [(device, blocks) for (_, device), blocks in found.items()], outside


def _walk(
    module: nn.Module, place: _Place | None, places: dict[nn.Module, set[_Place | None]]
) -> None:
    """Fill `places`: for each module, the children of outermost lists that it is in, None for none."""
    places.setdefault(module, set()).add(place)
    for child in module.children():
        inner = place
        if place is None and isinstance(module, nn.ModuleList):
            inner = (module, child)
        _walk(child, inner, places)


def _wants_gradient(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Would autograd keep weights of this run?"""
    given = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
    return any(t.requires_grad for t in given) or any(p.requires_grad for p in module.parameters())
