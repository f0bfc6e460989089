"""Buffers of one packed weight inside a module tree, and the rules by which they move.

The stored parts are persistent buffers under their checkpoint names (`codes`, `scale_group`,
`term1.codes`, ...), so `state_dict` is the checkpoint. They keep their stored dtype whatever
`.to(dtype)` says. Kernel layouts are derived at first use, are no part of the state, and are
dropped when a buffer is replaced, moved or written to. Products may run on another device than the
parts are on (`place`, `stored_parts_stay`): then only layouts are there. Writing through `.data` or
numpy, or to a buffer made in inference mode, leaves no trace in the tensor and is not noticed.

What stands in a model graph is in `linear.py`. Weights are not trained here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import nn

from . import reference
from .activation import find_activation
from .errors import FormatError
from .format import PartSpec, find_format
from .online import InputTransform
from .packed import PackedTensor, Term
from .runner import Runner

Terms = Sequence[tuple[str, Any]]  # (format name, its options) of each summand


_STAY: ContextVar[bool] = ContextVar("fewbit_parts_stay", default=False)


@contextmanager
def stored_parts_stay() -> Iterator[None]:
    """Modules that are moved inside leave their stored parts where they are, and multiply on the new
    device by layouts that are derived there."""
    token = _STAY.set(True)
    try:
        yield
    finally:
        _STAY.reset(token)


class StoredParts(nn.Module):
    """A module whose buffers are stored parts, perhaps views of a mapped file."""

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: parts of their own, not the whole file that they are a view of."""
        owned = {
            name: None if part is None else _owned(part) for name, part in self._buffers.items()
        }
        return {**self.__dict__, "_buffers": owned}


def _owned(part: torch.Tensor) -> torch.Tensor:
    if part.is_meta or part.untyped_storage().nbytes() == part.numel() * part.element_size():
        return part
    return part.clone()


class PackedModule(StoredParts):
    """Buffers of one `PackedTensor`. Base of `QuantLinear` and `FusedExperts`.

    shape: logical [N, K] or [E, N, K]. transposed: the graph wants [.., K, N].
    dtype: of bias and of the decoded weight. device: "meta" leaves the buffers empty.
    activation: name of the format that inputs are rounded to; RecipeError if there is none.
    inputs: transforms of the inputs before that. The stored weight belongs to transformed inputs.
    FormatError if `shape` has other axes than the class holds.
    """

    # Of a class that holds weights of one kind only, as its errors tell it: what, and its axes.
    kind: ClassVar[tuple[str, int] | None] = None

    def __init__(
        self,
        shape: Sequence[int],
        terms: Terms,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        transposed: bool = False,
        activation: str | None = None,
        inputs: Sequence[InputTransform] = (),
    ) -> None:
        super().__init__()
        if self.kind is not None and len(shape) != self.kind[1]:
            raise FormatError(f"{self.kind[0]}, got {list(shape)}")
        self.logical_shape = tuple(shape)
        self.terms = tuple(terms)
        self.dtype = dtype
        self.transposed = transposed
        self.activation = None if activation is None else find_activation(activation).name
        self.inputs = tuple(inputs)
        self._runners: list[Runner] = []
        self._stamp: list[int] = []
        self._placed: torch.device | None = None  # where products run if the parts are elsewhere
        self._part_names: list[tuple[str, ...]] = []
        for index, (name, options) in enumerate(self.terms):
            holder = self if index == 0 else StoredParts()
            specs = find_format(name).part_specs(self.logical_shape, options)
            self._part_names.append(tuple(specs))
            for part, spec in specs.items():
                empty = torch.empty(spec.shape, dtype=spec.dtype, device=device)
                holder.register_buffer(part, empty)
            if index:
                self.add_module(f"term{index}", holder)

    @property
    def shape(self) -> torch.Size:
        """Shape as the model graph sees it: the last two axes swapped if `transposed`."""
        *lead, n, k = self.logical_shape
        return torch.Size((*lead, k, n) if self.transposed else (*lead, n, k))

    @property
    def device(self) -> torch.device:
        """Where products run: the device of the stored parts, unless `place` named another."""
        return self._placed or next(self._parts())[2].device

    def place(self, device: torch.device) -> None:
        """Multiply on `device`, wherever the stored parts are."""
        here = next(self._parts())[2].device
        self._placed = None if device == here else device
        self._runners = []

    @property
    def packed(self) -> PackedTensor:
        """The weight as stored. FormatError if a buffer was given another dtype or shape."""
        found: list[dict[str, torch.Tensor]] = [{} for _ in self.terms]
        for index, part, tensor in self._parts():
            found[index][part] = tensor
        terms = []
        for (name, options), parts in zip(self.terms, found, strict=True):
            specs = find_format(name).part_specs(self.logical_shape, options)
            for part, spec in specs.items():
                _check_part(f"{name}.{part}", parts[part], spec)
            terms.append(Term(name, options, parts))
        return PackedTensor(self.logical_shape, tuple(terms), self.transposed)

    def fill(self, packed: PackedTensor) -> None:
        """Take the parts of `packed` as buffers, without a copy."""
        for index, term in enumerate(packed.terms):
            holder = self if index == 0 else self.get_submodule(f"term{index}")
            for part, tensor in term.parts.items():
                holder.register_buffer(part, tensor)

    def dense(self) -> torch.Tensor:
        """The decoded weight in `dtype`, as the model graph sees it (see `shape`). With `inputs` it
        is the matrix that transformed inputs are multiplied by, not the one that x is."""
        weight = reference.dense(self.packed.to(self.device), self.dtype)
        return weight.transpose(-1, -2) if self.transposed else weight

    def runners(self) -> list[Runner]:
        """One runner, or one for each expert; made anew after a buffer changed."""
        stamp = self.state_stamp()
        if stamp != self._stamp or not self._runners:
            self._runners = [
                Runner(matrix, self.activation, self.inputs, self.device)
                for matrix in _matrices(self.packed)
            ]
            self._stamp = stamp
        return self._runners

    def _parts(self) -> Iterator[tuple[int, str, torch.Tensor]]:
        """(term, part, stored tensor)."""
        for index, names in enumerate(self._part_names):
            holder = self if index == 0 else self._modules[f"term{index}"]
            for part in names:
                yield index, part, holder._buffers[part]  # type: ignore[union-attr, misc]

    def state_stamp(self) -> list[int]:
        """Identity and version of every buffer. Identities last while somebody (a runner) keeps the
        tensors."""
        stamp: list[int] = []
        for _, _, tensor in self._parts():
            stamp += (id(tensor), 0 if tensor.is_inference() else tensor._version)
        return stamp

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """`.to`, `.half`, `.cuda`: stored parts follow the device only, and not even that inside
        `stored_parts_stay` or if they are elsewhere and the device stays the same."""
        stored = {id(tensor) for _, _, tensor in self._parts()}
        sample = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        stay = _STAY.get() or (self._placed is not None and sample.device == self._placed)

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if stay and id(tensor) in stored:
                return tensor
            moved = fn(tensor)
            if id(tensor) in stored and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        self.dtype = sample.dtype
        applied = super()._apply(move, recurse)
        self.place(sample.device)
        return applied

    def __getstate__(self) -> dict[str, Any]:
        """Without runners: layouts are derived again where the copy is used."""
        return {**super().__getstate__(), "_runners": [], "_stamp": []}

    def extra_repr(self) -> str:
        """Shape and formats, for `print(model)`."""
        formats = " + ".join(f"{name}({options})" for name, options in self.terms)
        rounded = f", activation={self.activation}" if self.activation else ""
        turned = f", inputs={list(self.inputs)}" if self.inputs else ""
        return f"{list(self.logical_shape)}, {formats}, dtype={self.dtype}{rounded}{turned}"


def _check_part(name: str, tensor: torch.Tensor, spec: PartSpec) -> None:
    found = PartSpec(tensor.dtype, tuple(tensor.shape))
    if found != spec:
        raise FormatError(
            f"{name} must be {spec.dtype} {list(spec.shape)}, got {found.dtype} "
            f"{list(found.shape)}; load stored parts without casting them"
        )


def _matrices(packed: PackedTensor) -> Iterator[PackedTensor]:
    """The weight itself if it is [N, K], else each expert of [E, N, K]."""
    if len(packed.shape) == 2:
        yield packed
        return
    for expert in range(packed.shape[0]):
        terms = tuple(
            Term(term.format, term.options, {part: t[expert] for part, t in term.parts.items()})
            for term in packed.terms
        )
        yield PackedTensor(packed.shape[1:], terms, packed.transposed)
