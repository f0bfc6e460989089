"""Function-preserving changes of source tensors, as data: what transforms make and readers apply.

An edit changes the vectors v that run along one axis of one source tensor:

    scale    v ← v ∘ s            permute  v ← v[order]
    rotate   v ← v · Q            fill     v ← c (a norm's gain after it was folded)

Edits are applied in the order in which they were added, each time the tensor is read, in fp32 (a
float64 tensor stays float64); so whoever reads weights, be it the model graph, the rounding passes
or the copy of what is not quantized, sees the same transformed model, and nothing is written twice.

    y = x Wᵀ is unchanged if the producer of x and the columns of W are edited inversely: x ∘ s⁻¹ with
    W ∘ s, x[order] with W[:, order], x Q with W Q (Q is orthogonal).

Whether edits belong together is the transform's business; `check.py` verifies that they do.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..quant.errors import CheckpointError
from ..quant.hadamard import Hadamard


@dataclass(frozen=True)
class Side:
    """One axis (-1 or -2) of source tensor `key`, as the file holds it."""

    key: str
    axis: int = -1

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` with the axis moved to the end, a view."""
        return tensor.movedim(self.axis, -1)


@dataclass(frozen=True, eq=False)
class Scale:
    """v ← (v + shift) ∘ factors − shift, factors fp64 [n]. shift is 1 for a gain kept as gain − 1."""

    factors: torch.Tensor
    shift: float = 0.0


@dataclass(frozen=True, eq=False)
class Permute:
    """v ← v[order], int64 [n]."""

    order: torch.Tensor


@dataclass(frozen=True)
class Rotate:
    """v ← v · Q."""

    rotation: Hadamard


@dataclass(frozen=True)
class Fill:
    """v ← value."""

    value: float


@dataclass(frozen=True, eq=False)
class Edit:
    """One change of one side."""

    side: Side
    change: Scale | Permute | Rotate | Fill

    def apply(self, tensor: torch.Tensor) -> None:
        """Change `tensor` (fp32 or fp64, the caller's own) in place."""
        view = self.side.of(tensor)
        if isinstance(self.change, Scale):
            factors, shift = self.change.factors.to(view.device, view.dtype), self.change.shift
            view.add_(shift).mul_(factors).sub_(shift) if shift else view.mul_(factors)
        elif isinstance(self.change, Permute):
            view.copy_(view[..., self.change.order.to(view.device)])
        elif isinstance(self.change, Rotate):
            view.copy_(self.change.rotation.apply(view))
        else:
            view.fill_(self.change.value)


class Source(Protocol):
    """What is edited: an opened checkpoint, or anything that reads like one."""

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor: ...


class EditedSource:
    """A source seen through edits. Tensors without any are handed out as the source has them.

    The last tensor that had to be edited whole (an edit along its first axis) is kept, because it
    is read in slabs.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._edits: dict[str, list[Edit]] = {}
        self._copies: dict[str, str] = {}
        self._whole: tuple[str, torch.Tensor] | None = None

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Facts of the source's tensors, and of the copies that were added."""
        found = dict(self._source.tensors)
        found.update({name: found[origin] for name, origin in self._copies.items()})
        return found

    def add(self, edits: Sequence[Edit]) -> None:
        """Apply `edits` from now on, after those that were there."""
        known = self.tensors
        for edit in edits:
            if edit.side.key not in known:
                raise CheckpointError(f"{edit.side.key} is to be transformed, but does not exist")
            self._edits.setdefault(edit.side.key, []).append(edit)
            self._whole = None

    def add_copy(self, name: str, origin: str) -> None:
        """Let `name` be a tensor of its own that starts as `origin`, unedited (untying)."""
        self._copies[name] = origin

    @property
    def copies(self) -> Mapping[str, str]:
        """Tensors that the file does not have: name -> the one whose contents they start with."""
        return self._copies

    def is_edited(self, name: str) -> bool:
        """Whether `name` reads differently from the file."""
        return name in self._edits

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of the leading axis; fp32 or fp64 if edited."""
        origin = self._copies.get(name, name)
        edits = self._edits.get(name)
        if not edits:
            return self._read(origin, start, stop)
        n_axes = len(self.tensors[name].shape)
        if n_axes > 1 and all(edit.side.axis % n_axes != 0 for edit in edits):
            return _applied(self._read(origin, start, stop), edits)
        if self._whole is None or self._whole[0] != name:
            self._whole = (name, _applied(self._read(origin, 0, None), edits))
        return self._whole[1][start:stop].clone() if n_axes else self._whole[1].clone()

    def _read(self, name: str, start: int, stop: int | None) -> torch.Tensor:
        if start == 0 and stop is None:
            return self._source.read(name)
        return self._source.read(name, start, stop)


def _applied(tensor: torch.Tensor, edits: Sequence[Edit]) -> torch.Tensor:
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    tensor = tensor.to(wide, copy=True).contiguous()
    for edit in edits:
        edit.apply(tensor)
    return tensor


# ---- edits on disk: an interrupted run goes on with the edits it had, not with a new search -------


def edits_bytes(edits: Sequence[Edit]) -> bytes:
    """Edits as a safetensors file."""
    from safetensors.torch import save

    tensors, entries = {}, []
    for index, edit in enumerate(edits):
        change, side = edit.change, edit.side
        entry: dict[str, Any] = {"side": [side.key, side.axis]}
        if isinstance(change, Scale):
            entry.update(op="scale", shift=change.shift)
            tensors[str(index)] = change.factors.cpu().double().clone()
        elif isinstance(change, Permute):
            entry["op"] = "permute"
            tensors[str(index)] = change.order.cpu().clone()  # edits may share one tensor
        elif isinstance(change, Rotate):
            entry.update(op="rotate", rotation=[change.rotation.order, change.rotation.seed])
        else:
            entry.update(op="fill", value=change.value)
        entries.append(entry)
    tensors.setdefault("none", torch.zeros(1))
    return save(tensors, {"edits": json.dumps(entries)})


def load_edits(path: Path) -> list[Edit]:
    """Read a file of `edits_bytes`."""
    from safetensors import safe_open

    edits = []
    with safe_open(path, framework="pt") as file:
        for index, entry in enumerate(json.loads(file.metadata()["edits"])):
            change: Scale | Permute | Rotate | Fill
            if entry["op"] == "scale":
                change = Scale(file.get_tensor(str(index)), entry["shift"])
            elif entry["op"] == "permute":
                change = Permute(file.get_tensor(str(index)))
            elif entry["op"] == "rotate":
                change = Rotate(Hadamard(*entry["rotation"]))
            else:
                change = Fill(entry["value"])
            edits.append(Edit(Side(*entry["side"]), change))
    return edits


def scale_pair(
    producers: Sequence[Side], consumers: Sequence[Side], factors: torch.Tensor
) -> list[Edit]:
    """Edits that divide what `producers` make by `factors` and multiply `consumers` by them."""
    inverse = factors.double().reciprocal()
    return [Edit(side, Scale(inverse)) for side in producers] + [
        Edit(side, Scale(factors.double())) for side in consumers
    ]
