"""Units of a calibrated run: decoder blocks, each rounded on the output of the quantized ones.

For block i, with the hidden states that blocks 0 … i−1 (already quantized) made of the calibration
windows:

    materialize → structure → for each stage: statistics → passes → put Ŵ into the graph → hidden

What goes into the graph is unpacked from what is stored, so the next block sees what a loaded model
will compute. A block that an earlier run finished is read back from the output and run once.

Hidden states live in one buffer, overwritten block by block; beyond `RESIDENT_BYTES` it is a
memory-mapped file in the output folder.
"""

import os
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from ..calibrate.collect import Operand, Stage, operands, stages
from ..calibrate.edits import Edit
from ..calibrate.matrices import expert_key
from ..calibrate.model import BlockInput, ModelGraph
from ..calibrate.protocol import Stats
from ..calibrate.runs import Reruns, Stream, start_runs
from ..calibrate.structure import find_structure
from ..export.chunked import Chunked
from ..export.journal import named_os_errors
from ..export.writer import CheckpointWriter
from .block import Block, Weight
from .device import calibration_dtype
from .errors import CalibrationError, FormatError
from .format import dequantize, find_format
from .layout import PlannedTensor, split_by_bytes
from .packed import PackedTensor, Term
from .preflight import PAUSED_BYTES, RESIDENT_BYTES, hidden_bytes
from .transform import BlockFacts, EditStore, check_block, transform_block
from .units import Job, UnitSource, make_weight, packed_of, plain_tensor, report_row, weight_error

BATCH_TOKENS = 4096
SPILL_FILE = "fewbit.hidden.partial"


class BlockwiseUnits(UnitSource):
    """First what lies outside the blocks, then the blocks, then what is only carried through."""

    def __init__(self, job: Job) -> None:
        self._job = job
        dtype = calibration_dtype(job.device, job.checkpoint.dtype)
        model = job.model
        self._graph = ModelGraph(model.config, model.source, dtype, job.device, model.online)
        self._store = EditStore(job.out)
        self._needs = {n for item in job.passes for n in item.step.needs(item.options)}
        self._inputs: list[BlockInput] | None = None
        self._originals: list[BlockInput] = []  # the same in the original model, if asked for
        blocks = [list(self._graph.block_sources(i)) for i in range(len(self._graph.block_names))]
        outer = list(self._graph.outer_sources())
        self._refuse_outer(outer)
        self.members = [(f"outside the blocks {i + 1}", keys) for i, keys in
                        enumerate(split_by_bytes(outer, model.source.tensors))]  # fmt: skip
        self._first = len(self.members)
        self.members += list(zip(self._graph.block_names, blocks, strict=True))
        carried = list(self._graph.carried_sources())
        self.members += [(f"carried {i + 1}", keys) for i, keys in
                         enumerate(split_by_bytes(carried, model.source.tensors))]  # fmt: skip

    def _refuse_outer(self, keys: Sequence[str]) -> None:
        for key in keys:
            if self._job.plan[key].rule is not None:
                raise CalibrationError(
                    f"{key} lies outside the decoder blocks and has no calibration statistics; add "
                    f"it to weights.ignore, or use a recipe without calibration"
                )

    def _block_index(self, index: int) -> int | None:
        block = index - self._first
        return block if 0 <= block < len(self._graph.block_names) else None

    # -- hidden states --------------------------------------------------------------------------

    def _hidden(self) -> list[BlockInput]:
        """Inputs of the next block, made at first use."""
        if self._inputs is None:
            data = self._job.calibration
            if data is None:
                raise CalibrationError("a calibrated run needs calibration windows, got none")
            self._inputs = self._embed(data.windows)
            if "drift" in self._needs:
                self._originals = self._embed(data.windows)
        return self._inputs

    def _embed(self, windows: torch.Tensor) -> list[BlockInput]:
        """The first block's inputs, spilled piece by piece if they exceed the bound."""
        total = hidden_bytes(self._job.checkpoint, self._job.calibration)
        batch = max(1, BATCH_TOKENS // windows.shape[1])
        n_pieces = -(-total // RESIDENT_BYTES)
        size = -(-windows.shape[0] // max(n_pieces, 1) // batch) * batch
        spill = Spill(self._job.out, windows.numel()) if n_pieces > 1 else None
        inputs: list[BlockInput] = []
        for piece in windows.split(size):
            found = self._graph.start(piece, batch)
            for item in found:  # never on the GPU: there are many more of them than of weights
                item.hidden = item.hidden.cpu() if spill is None else spill.take(item.hidden)
            inputs += found
        return inputs

    def _streams(
        self, block: int, edits: Sequence[Edit] | None = None
    ) -> tuple[Stream, Stream | None]:
        """The transformed block in the graph, and a twin that keeps its weights if drift is measured.

        edits: of the block's own transforms, if an earlier run has found them.
        """
        inputs = self._hidden()
        self._job.model.source.add(edits or ())
        module = self._graph.materialize(block)
        if edits is None:
            module = self._transform(block, inputs)
        original = None
        if self._originals:
            original = Stream(self._graph, block, deepcopy(module), self._originals)
        return Stream(self._graph, block, module, inputs), original

    def _transform(self, block: int, inputs: list[BlockInput]) -> torch.nn.Module:
        """Run and check the block's transforms; the module with its weights as they are then."""
        job, graph = self._job, self._graph
        check_block(graph, block, job.checkpoint, job.model, inputs, job.model_passes)
        rules = {
            key: (rule.format, rule.options)
            for key in graph.block_sources(block)
            if (rule := job.plan[key].rule) is not None
        }
        facts = BlockFacts(rules, job.recipe.activation, job.recipe.kv, job.seed)
        source, edges = job.model.source, job.model.edges
        edits = transform_block(graph, block, inputs, source, job.transforms, edges, facts)
        if job.transforms:
            self._store.save(graph.block_names[block], edits)
        return graph.block(block)

    # -- UnitSource -----------------------------------------------------------------------------

    def skip(self, index: int, writer: CheckpointWriter) -> None:
        """Put the stored weights of a finished block into the graph and run it."""
        block = self._block_index(index)
        if block is None:
            return
        edits = self._store.load(self.members[index][0]) if self._job.transforms else []
        quantized, original = self._streams(block, edits)
        for key in self.members[index][1]:
            tensor = self._job.plan[key]
            if tensor.rule is not None:
                packed = stored_tensor(tensor, writer, index)
                self._graph.set_weight(key, dequantize(packed), tensor.transposed)
        Reruns(quantized, original, ()).finish()
        self._graph.release(block)

    def tensors(self, index: int, rows: list[Any]) -> Iterator[Chunked]:
        """See UnitSource."""
        name, keys = self.members[index]
        block = self._block_index(index)
        done = {} if block is None else self._round_block(block, name, keys, rows)
        for key in keys:
            if key not in done:
                yield from plain_tensor(self._job, self._job.plan[key], name, rows)
                continue
            for part, value in done[key].named_parts():
                yield f"{self._job.plan[key].module}.{part}", [value]
        if block is not None:
            self._graph.release(block)

    # -- rounding one block ---------------------------------------------------------------------

    def _round_block(
        self, block: int, name: str, keys: Sequence[str], rows: list[Any]
    ) -> dict[str, PackedTensor]:
        graph = self._graph
        quantized, original = self._streams(block)
        structure = find_structure(graph, block, quantized.batches[0])
        found = operands(structure, graph.block_parameters(block))
        planned = self._by_operand(keys, found)
        used = [operand for operand in found if operand.parameter in planned]
        fused = frozenset(p for p, members in planned.items() if self._stored_fused(members))
        steps = list(stages(used, fused))
        runs = start_runs(quantized, original, steps, PAUSED_BYTES)
        done: dict[str, PackedTensor] = {}
        try:
            for number, stage in enumerate(steps):
                stats = runs.statistics(number)
                members = self._members(stage, planned)
                self._round_stage(name, stage, members, stats, rows, done)
            runs.finish()
        finally:
            runs.close()
        return done

    def _members(self, stage: Stage, planned: dict[str, list[str]]) -> list[str]:
        """Source tensors that are rounded in this stage."""
        return [
            key
            for operand in stage.operands
            for key in planned[operand.parameter]
            if self._in_stage(key, stage)
        ]

    def _by_operand(self, keys: Sequence[str], found: Sequence[Operand]) -> dict[str, list[str]]:
        """Graph parameter -> source tensors to be quantized; every one must be an operand."""
        known = {operand.parameter: operand for operand in found}
        planned: dict[str, list[str]] = {}
        for key in keys:
            tensor = self._job.plan[key]
            if tensor.rule is None:
                continue
            slot = self._graph.names.slot(key)
            operand = known.get(slot.parameter) if slot else None
            if slot is None or operand is None or not slot.quantizable:
                raise CalibrationError(
                    f"{key}: running its block showed no product of activations with this weight, "
                    f"so it cannot be calibrated; add {tensor.module!r} to weights.ignore"
                )
            if operand.transposed != tensor.transposed:
                raise CalibrationError(
                    f"{key}: the graph holds it {'K first' if operand.transposed else 'N first'}, "
                    f"the plan assumed otherwise; use a recipe without calibration"
                )
            planned.setdefault(slot.parameter, []).append(key)
        return planned

    def _stored_fused(self, members: Sequence[str]) -> bool:
        return any(len(self._job.plan[key].shape) == 3 for key in members)

    def _in_stage(self, key: str, stage: Stage) -> bool:
        slot = self._graph.names.slot(key)
        if slot is None or slot.expert is None or stage.experts is None:
            return True
        return slot.expert in stage.experts

    def _round_stage(
        self,
        name: str,
        stage: Stage,
        keys: Sequence[str],
        stats: Stats,
        rows: list[Any],
        done: dict[str, PackedTensor],
    ) -> None:
        started = time.monotonic()
        weights = {key: self._weight(key, stage) for key in keys}
        work = Block(name, list(weights.values()))
        try:
            for item in self._job.passes:
                work = item.step.run(work, stats, item.options)
        except FormatError as reason:
            raise FormatError(f"{', '.join(keys)}: {reason}") from reason
        seconds = (time.monotonic() - started) / max(len(keys), 1)
        for key, weight in weights.items():
            tensor, packed = self._job.plan[key], packed_of(weight)
            rounded = dequantize(packed)
            self._graph.set_weight(key, rounded, tensor.transposed)
            output_error = _output_error(weight, rounded, stats)
            error, energy = weight_error(weight, packed)
            row = report_row(tensor, name, error, energy, output_error, weight.fallbacks)
            row.update(seconds=seconds, tokens=_tokens(weight, stats))
            rows.append(row)
            done[key] = _on_cpu(packed)

    def _weight(self, key: str, stage: Stage) -> Weight:
        tensor = self._job.plan[key]
        value = self._job.model.source.read(key).to(self._job.device)
        weight = make_weight(tensor, value.mT if tensor.transposed else value)
        slot = self._graph.names.slot(key)
        if slot is None:
            raise CalibrationError(f"{key} has no place in the model")
        operand = next(item for item in stage.operands if item.parameter == slot.parameter)
        weight.input_key = operand.input_key
        if slot.expert is not None:
            weight.input_key = expert_key(operand.input_key, slot.expert)
        return weight


class Spill:
    """Hidden states of `n_tokens` tokens in a mapped file of `folder`, filled from the front."""

    def __init__(self, folder: Path, n_tokens: int) -> None:
        self._folder = folder
        self._n_tokens = n_tokens
        self._buffer: torch.Tensor | None = None
        self._filled = 0

    def take(self, hidden: torch.Tensor) -> torch.Tensor:
        """The place of `hidden` [b, T, H] in the file, after it was copied there."""
        if self._buffer is None:
            self._buffer = self._map(self._n_tokens * hidden.shape[-1], hidden.dtype)
        place = self._buffer[self._filled : self._filled + hidden.numel()].view(hidden.shape)
        self._filled += hidden.numel()
        return place.copy_(hidden)

    def _map(self, n_elements: int, dtype: torch.dtype) -> torch.Tensor:
        path = self._folder / SPILL_FILE
        with named_os_errors(self._folder):
            with open(path, "wb") as file:
                # A mapped file with holes kills the process if the disk fills up.
                os.posix_fallocate(file.fileno(), 0, n_elements * dtype.itemsize)
            buffer = torch.from_file(str(path), shared=True, size=n_elements, dtype=dtype)
            path.unlink()  # the mapping keeps it alive; a kill leaves nothing behind
        return buffer


def _output_error(weight: Weight, rounded: torch.Tensor, stats: Stats) -> float | None:
    """sqrt(tr(D H Dᵀ) / tr(T H Tᵀ)), T what was rounded, D = T − Ŵ: relative error that rounding
    made in the product, on calibration inputs."""
    value = weight.value.float() if weight.target is None else weight.target
    if value.dim() == 2:
        pairs = [(value, rounded, stats.get(weight.input_key))]
    else:
        pairs = [
            (value[e], rounded[e], stats.get(expert_key(weight.input_key, e)))
            for e in range(value.shape[0])
        ]
    error = energy = 0.0
    for dense, approximate, moments in pairs:
        if moments is None:
            continue
        delta = dense - approximate
        error += moments.tokens * float(((delta @ moments.hessian) * delta).sum())
        energy += moments.tokens * float(((dense @ moments.hessian) * dense).sum())
    return max(error / energy, 0.0) ** 0.5 if energy > 0 else None


def _tokens(weight: Weight, stats: Stats) -> list[int] | int:
    """Calibration tokens that the weight (or each of its experts) saw."""
    if weight.value.dim() == 2:
        moments = stats.get(weight.input_key)
        return moments.tokens if moments else 0
    found = [stats.get(expert_key(weight.input_key, e)) for e in range(weight.value.shape[0])]
    return [moments.tokens if moments else 0 for moments in found]


def _on_cpu(packed: PackedTensor) -> PackedTensor:
    terms = tuple(
        Term(t.format, t.options, {name: part.cpu() for name, part in t.parts.items()})
        for t in packed.terms
    )
    return PackedTensor(packed.shape, terms, packed.transposed)


def stored_tensor(tensor: PlannedTensor, writer: CheckpointWriter, unit: int) -> PackedTensor:
    """A finished unit's weight, read back from the (perhaps unfinished) shard that holds it."""
    if tensor.rule is None:
        raise CalibrationError(f"{tensor.key} is not quantized")
    parts = {}
    for name in tensor.specs():
        parts[name.removeprefix(f"{tensor.module}.")] = writer.read_back(unit, name)
    find_format(tensor.rule.format).check(parts, tensor.shape, tensor.rule.options)
    term = Term(tensor.rule.format, tensor.rule.options, parts)
    return PackedTensor(tensor.shape, (term,), tensor.transposed)
