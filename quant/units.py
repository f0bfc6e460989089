"""Units of a run: which source tensors belong together, and how their stored tensors come about.

The data-free way is here: runs of source tensors, each read in slabs of rows, rounded, and dropped.
Rows are independent without statistics, so a slab gives the same bytes as the whole tensor and memory
stays flat whatever the tensor's size. The way through decoder blocks is in `blockwise.py`.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..calibrate.data import CalibrationSet
from ..calibrate.protocol import PlannedBlockTransform, PlannedPass
from ..export.checkpoint import Checkpoint
from ..export.chunked import Chunked
from ..export.coded_files import logical_name
from ..export.shards import Stored
from ..export.writer import CheckpointWriter
from .block import Block, Weight
from .errors import FormatError
from .format import dequantize
from .layout import PlannedTensor, split_by_bytes
from .packed import PackedTensor, Term
from .recipe import Recipe
from .transform import Transformed

SLAB_BYTES = 32 << 20  # of source rows that are read, rounded and dropped at a time


@dataclass(frozen=True)
class Job:
    """Everything that a run needs, validated."""

    checkpoint: Checkpoint
    recipe: Recipe
    passes: tuple[PlannedPass, ...]
    plan: Mapping[str, PlannedTensor]
    out: Path
    seed: int
    device: torch.device
    calibration: CalibrationSet | None  # None when data-free
    transforms: tuple[PlannedBlockTransform, ...]  # of single blocks
    model: Transformed  # the checkpoint as the transforms of the whole model leave it
    model_passes: str  # their names, for messages

    @property
    def calibrated(self) -> bool:
        """Whether any pass asks for statistics or samples."""
        return bool(self.transforms) or any(p.step.needs(p.options) for p in self.passes)


class UnitSource(ABC):
    """Where units come from: their members up front, their tensors on demand and in order."""

    members: list[tuple[str, list[str]]]

    @abstractmethod
    def skip(self, index: int, writer: CheckpointWriter) -> None:
        """Called in order for each unit that an earlier run finished."""

    @abstractmethod
    def tensors(self, index: int, rows: list[Any]) -> Iterator[Chunked]:
        """The unit's stored tensors in plan order; report rows are appended on the way."""


class DataFreeUnits(UnitSource):
    """Units of about 256 MB of source tensors, rounded slab by slab."""

    def __init__(self, job: Job) -> None:
        self._job = job
        runs = split_by_bytes(list(job.plan), job.model.source.tensors)
        self.members = [(f"tensors {i + 1} of {len(runs)}", keys) for i, keys in enumerate(runs)]

    def skip(self, index: int, writer: CheckpointWriter) -> None:
        """Nothing to redo: units do not depend on each other."""

    def tensors(self, index: int, rows: list[Any]) -> Iterator[Chunked]:
        """See UnitSource."""
        name, keys = self.members[index]
        for key in keys:
            yield from plain_tensor(self._job, self._job.plan[key], name, rows)


def plain_tensor(job: Job, tensor: PlannedTensor, unit: str, rows: list[Any]) -> Iterator[Chunked]:
    """A tensor that needs no statistics: copied if kept, else rounded slab by slab.

    The first part (the codes) is handed on as slabs are rounded; only the small ones are kept.
    """
    if tensor.rule is None:
        yield tensor.key, Slabs(job, tensor)
        return
    started = time.monotonic()
    first, *others = (name.removeprefix(f"{tensor.module}.") for name in tensor.specs())
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in others}
    sums = _Sums()

    def round_slabs() -> Iterator[torch.Tensor]:
        for packed in _rounded_slabs(job, tensor, unit, sums):
            parts = dict(packed.named_parts())
            for name in others:
                kept[name].append(parts[name])
            yield parts[first]

    yield f"{tensor.module}.{first}", round_slabs()
    row = report_row(tensor, unit, sums.error, sums.energy, None, sums.fallbacks)
    row["seconds"] = time.monotonic() - started
    rows.append(row)
    for name in others:
        yield f"{tensor.module}.{name}", kept[name]


@dataclass
class _Sums:
    """What is summed up over the slabs of a tensor."""

    error: float = 0.0
    energy: float = 0.0
    fallbacks: list[str] = field(default_factory=list)


def _rounded_slabs(
    job: Job, tensor: PlannedTensor, unit: str, sums: _Sums
) -> Iterator[PackedTensor]:
    for value in Slabs(job, tensor):
        weight = make_weight(tensor, value.mT if tensor.transposed else value)
        try:
            for item in job.passes:
                item.step.run(Block(unit, [weight]), {}, item.options)
        except FormatError as reason:  # passes know values, not where they come from
            raise FormatError(f"{tensor.module}: {reason}") from reason
        packed = packed_of(weight)
        error, energy = weight_error(weight, packed)
        sums.error += error
        sums.energy += energy
        sums.fallbacks += weight.fallbacks
        yield packed


@dataclass(frozen=True)
class Slabs:
    """Rows of the leading axis of a source tensor, about SLAB_BYTES at a time and read anew by each
    iteration; in one piece if there is no such axis."""

    job: Job
    tensor: PlannedTensor

    def __iter__(self) -> Iterator[torch.Tensor]:
        tensor, source = self.tensor, self.job.model.source
        shape = tensor.source_shape
        if not shape or shape[0] == 0:
            yield _as_stored(tensor, source.read(tensor.key))
            return
        row_bytes = max(1, torch.Size(shape).numel() // shape[0] * tensor.dtype.itemsize)
        step = max(1, SLAB_BYTES // row_bytes)
        for start in range(0, shape[0], step):
            rows = source.read(tensor.key, start, min(start + step, shape[0]))
            yield _as_stored(tensor, rows)


def _as_stored(tensor: PlannedTensor, value: torch.Tensor) -> torch.Tensor:
    """What is kept goes back to its dtype after it was transformed; what is rounded stays wide."""
    return value if tensor.rule is not None else value.to(tensor.dtype)


def make_weight(tensor: PlannedTensor, value: torch.Tensor) -> Weight:
    """The `Weight` of a planned tensor, `value` in logical orientation."""
    if tensor.rule is None:
        raise RuntimeError(f"{tensor.key} is not to be quantized")
    return Weight(
        name=tensor.module,
        value=value,
        format=tensor.rule.format,
        options=tensor.rule.options,
        suffix=tensor.suffix,
        transposed=tensor.transposed,
    )


def packed_of(weight: Weight) -> PackedTensor:
    """The packed form that the rounding passes left."""
    if weight.packed is None:
        raise RuntimeError(f"{weight.name}: no pass has rounded it")
    return weight.packed


def weight_error(weight: Weight, packed: PackedTensor) -> tuple[float, float]:
    """Σ (w − ŵ)² and Σ w²: the sums that the rounding pass made, or from what is stored."""
    if "squared_error" in weight.measured:
        return weight.measured["squared_error"], weight.measured["squared_norm"]
    return squared_error(weight.value, packed)


def squared_error(value: torch.Tensor, packed: PackedTensor) -> tuple[float, float]:
    """Σ (w − ŵ)² and Σ w², by row chunks: unpacked from what is stored, not from memory of it."""
    error = energy = 0.0
    flat = value.reshape(-1, value.shape[-1])
    step = max(1, (1 << 20) // value.shape[-1])
    rows = _flat_rows(packed)
    for start in range(0, flat.shape[0], step):
        chunk = flat[start : start + step].float()
        delta = chunk - dequantize(_rows_of(rows, start, start + chunk.shape[0]))
        error += float(torch.dot(delta.flatten(), delta.flatten()))
        energy += float(torch.dot(chunk.flatten(), chunk.flatten()))
    return error, energy


def _flat_rows(packed: PackedTensor) -> PackedTensor:
    """Experts' rows one below the other."""
    if len(packed.shape) == 2:
        return packed
    terms = tuple(
        Term(t.format, t.options, {name: part.flatten(0, 1) for name, part in t.parts.items()})
        for t in packed.terms
    )
    return PackedTensor((packed.shape[0] * packed.shape[1], packed.shape[2]), terms)


def _rows_of(packed: PackedTensor, start: int, stop: int) -> PackedTensor:
    terms = tuple(
        Term(t.format, t.options, {name: part[start:stop] for name, part in t.parts.items()})
        for t in packed.terms
    )
    return PackedTensor((stop - start, packed.shape[1]), terms)


def report_row(
    tensor: PlannedTensor,
    unit: str,
    error: float,
    energy: float,
    output_error: float | None,
    fallbacks: Sequence[str],
) -> dict[str, Any]:
    """A report row as the journal keeps it."""
    if tensor.rule is None:
        raise RuntimeError(f"{tensor.key} is not quantized")
    n_weights = torch.Size(tensor.shape).numel()
    n_bytes = sum(spec.n_bytes for spec in tensor.specs().values())
    return {
        "name": tensor.module,
        "shape": list(tensor.shape),
        "format": tensor.rule.format,
        "options": asdict(tensor.rule.options),
        "bits_per_weight": 8 * n_bytes / n_weights,
        "n_bytes": n_bytes,
        "n_weights": n_weights,
        "relative_error": (error / energy) ** 0.5 if energy else 0.0,
        "output_error": output_error,
        "block": unit,
        "fallbacks": list(fallbacks),
        "seconds": 0.0,
    }


def count_stored(
    job: Job, keys: Sequence[str], rows: Sequence[dict[str, Any]], stored: Sequence[Stored]
) -> None:
    """Set the bytes of each row to what was written: coding makes parts smaller than planned."""
    sizes: dict[str, int] = {}
    for item in stored:
        name = logical_name(item.name)
        sizes[name] = sizes.get(name, 0) + item.end - item.begin
    planned = {job.plan[key].module: job.plan[key].specs() for key in keys}
    for row in rows:
        row["n_bytes"] = sum(sizes[part] for part in planned[row["name"]])
        row["bits_per_weight"] = 8 * row["n_bytes"] / row["n_weights"]
