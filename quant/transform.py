"""Runs the function-preserving transforms of a recipe and checks each of them.

    transform_model     before anything is written: edges are found, transforms of the whole model
                        become edits of the source, and every kind of block is tried: a transform that
                        this architecture cannot take is refused here, by name
    transform_block     when a block's turn comes: its own transforms, from samples of what it sees

Every edit is applied whenever a tensor is read (`calibrate/edits.py`), so the rest of the run works on
a checkpoint that happens to be easier to quantize. Edits found for a block are kept beside the
journal until the run is complete: a resumed run goes on with them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..calibrate.check import block_output, require_same, rounding_noise
from ..calibrate.edges import ModelEdges, find_edges, kind_of_blocks, with_online
from ..calibrate.edits import Edit, EditedSource, edits_bytes, load_edits
from ..calibrate.model import BlockInput, ModelGraph
from ..calibrate.observe import observe
from ..calibrate.protocol import BlockView, ModelView, Plan, PlannedBlockTransform
from ..export.checkpoint import Checkpoint
from ..export.journal import write_atomic
from .errors import CalibrationError, RecipeError
from .hadamard import Hadamard
from .kv_policy import KVPolicy

SAMPLE_TOKENS = 2048  # that a block's transforms look at
_TRIAL_WINDOW = 48  # tokens of the trial before the run
EDITS = re.compile(r"fewbit\..+\.edits(\.partial)?")  # files of `EditStore`


@dataclass(frozen=True)
class Transformed:
    """A checkpoint seen through the transforms of the whole model.

    source: reads it. config: its config.json. edges: None if the recipe has no transforms. basis: of
    the residual stream. online: source tensor -> transform of its input at run time.
    """

    source: EditedSource
    config: dict[str, Any]
    edges: ModelEdges | None = None
    basis: Hadamard | None = None
    online: Mapping[str, Hadamard] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockFacts:
    """What transforms of a block are told besides its weights; see `BlockView`."""

    rules: Mapping[str, tuple[str, Any]]
    activation: str | None
    kv: KVPolicy | None
    seed: int


def transform_model(
    checkpoint: Checkpoint, plan: Plan, seed: int, device: torch.device
) -> Transformed:
    """Apply the model's transforms as edits. RecipeError for what the architecture cannot take."""
    source = EditedSource(checkpoint)
    config = dict(checkpoint.config)
    if not plan.transforms:
        return Transformed(source, config)
    plain = ModelGraph(config, checkpoint, torch.float32, device)
    edges = find_edges(plain, _trial_tokens(plain))
    for item in plan.model:
        _refuse(item.step.name, item.step.refuse(edges, item.options), edges)
    view = ModelView(edges, lambda key: _wide(source.read(key)), seed)
    basis: Hadamard | None = None
    online: dict[str, Hadamard] = {}
    for step in plan.model:
        found = step.step.edits(view, step.options)
        if found.untie and edges.head is not None:
            source.add_copy(edges.head, edges.embedding.key)
            config = _untied(config)
        source.add(found.edits)
        basis = found.basis or basis
        online.update(found.online)
    edges = with_online(edges, online.keys())
    for part in plan.block:
        _refuse(part.step.name, part.step.refuse(edges, part.options), edges)
    made = Transformed(source, config, edges, basis, online)
    _check_model(plain, checkpoint, made, plan)
    return made


def _refuse(name: str, sentence: str | None, edges: ModelEdges) -> None:
    if sentence:
        raise RecipeError(
            f"pass {name} cannot run on {edges.architecture}: {sentence}; leave it out with "
            f"--set pass.{name}.skip=true, or use --recipe w4a16"
        )


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with a head of its own."""
    config = {**config, "tie_word_embeddings": False}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return config


def _trial_tokens(graph: ModelGraph) -> torch.Tensor:
    """A window of tokens to find out what is connected to what; which tokens does not matter."""
    vocabulary = graph.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (1, _TRIAL_WINDOW), generator=generator)


def _check_model(plain: ModelGraph, original: Checkpoint, made: Transformed, plan: Plan) -> None:
    """Try all transforms on the embedding, one block of each kind and the head, in float32."""
    names = " and ".join(item.step.name for item in plan.model)
    graph = ModelGraph(made.config, made.source, torch.float32, plain.device, made.online)
    tokens = _trial_tokens(plain)
    before, item = plain.start(tokens, 1)[0], graph.start(tokens, 1)[0]
    if plan.model:
        require_same(before.hidden, item.hidden, names, "the embedding", made.basis)
    for index in sorted(set(kind_of_blocks(graph).values())):
        check_block(graph, index, original, made, [item], names)
        facts = BlockFacts({}, None, None, 0)
        trial = EditedSource(made.source)
        twin = ModelGraph(made.config, trial, torch.float32, plain.device, made.online)
        twin.materialize(index)
        transform_block(twin, index, [item], trial, plan.block, made.edges, facts)
        twin.release(index)
    if plan.model:
        logits = plain.finish(before.hidden)
        require_same(logits, graph.finish(item.hidden), names, "the final norm and head")


def check_block(
    graph: ModelGraph,
    index: int,
    original: Checkpoint,
    made: Transformed,
    inputs: Sequence[BlockInput],
    names: str,
) -> None:
    """CalibrationError if the edits of the model change what block `index` adds."""
    if not names:
        return
    wanted = block_output(graph, index, inputs[0], original, made.basis)
    found = block_output(graph, index, inputs[0])
    noise = partial(rounding_noise, graph, index, inputs[0])  # in the basis of the residual now
    require_same(wanted, found, names, graph.block_names[index], made.basis, noise)


def transform_block(
    graph: ModelGraph,
    index: int,
    inputs: Sequence[BlockInput],
    source: EditedSource,
    steps: Sequence[PlannedBlockTransform],
    edges: ModelEdges | None,
    facts: BlockFacts,
) -> list[Edit]:
    """Run the block's transforms on materialized block `index`; its weights are read again.

    Returns the edits, which `source` has by then. CalibrationError if one changes the function.
    """
    made: list[Edit] = []
    if not steps or edges is None:
        return made
    wanted = block_output(graph, index, inputs[0])
    for item in steps:
        seen = observe(graph, index, inputs, SAMPLE_TOKENS)
        view = BlockView(
            edges.blocks[index], edges, seen, lambda key: _wide(source.read(key)),
            facts.rules, facts.activation, facts.kv, facts.seed,
        )  # fmt: skip
        found: list[Edit] = list(item.step.edits(view, item.options))
        if not found:
            continue
        source.add(found)
        made += found
        graph.materialize(index)
        after = block_output(graph, index, inputs[0])
        noise = partial(rounding_noise, graph, index, inputs[0])
        require_same(wanted, after, item.step.name, graph.block_names[index], None, noise)
    return made


class EditStore:
    """Edits of the blocks of a run, kept in the output folder until the run is over."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, block: str, edits: Sequence[Edit]) -> None:
        """Keep the edits of `block`; to be called before the block is written."""
        write_atomic(self._path(block), edits_bytes(edits))

    def load(self, block: str) -> list[Edit]:
        """The edits that `block` was written with; CalibrationError if they are gone."""
        path = self._path(block)
        if not path.is_file():
            raise CalibrationError(
                f"{path} is missing, which the finished part of this run was made with; start over "
                f"with --restart"
            )
        return load_edits(path)

    def _path(self, block: str) -> Path:
        return self._folder / f"fewbit.{block}.edits"
