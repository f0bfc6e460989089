"""Runs transforms on tiny models and compares logits: what every transform's test needs."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fewbit.calibrate.edges import find_edges
from fewbit.calibrate.edits import EditedSource
from fewbit.calibrate.model import ModelGraph
from fewbit.calibrate.protocol import BlockTransform, ModelTransform, Plan, plan_passes
from fewbit.quant.transform import BlockFacts, Transformed, transform_block
from tiny_models import MemorySource, make_tokens, save

CPU = torch.device("cpu")
PRESERVED = ("llama", "qwen2", "qwen3", "mistral", "llama_tied", "mixtral")


class RowSource(MemorySource):
    """A memory source that reads rows, in a dtype of choice."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(folder)
        self.tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.tensors.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of the leading axis."""
        tensor = super().read(name)
        return tensor[start:stop] if tensor.dim() else tensor


def open_source(arch: str, folder: Path, dtype: torch.dtype = torch.float32) -> RowSource:
    """A saved tiny model of `arch`."""
    return RowSource(save(arch, folder), dtype)


class AllDouble(TorchFunctionMode):
    """Keeps float64 where the library's norms and softmax ask for float32 whatever they get."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.to and args[0].dtype == torch.float64:
            args = tuple(torch.float64 if item is torch.float32 else item for item in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def model_logits(
    config: Any, source: Any, dtype: torch.dtype, online: Any = None, tokens: Any = None
) -> torch.Tensor:
    """Logits of the whole model, block by block."""
    graph = ModelGraph(config, source, dtype, CPU, online)
    with AllDouble() if dtype == torch.float64 else nullcontext():
        return _run(graph, make_tokens(2, 24) if tokens is None else tokens)


def _run(graph: ModelGraph, tokens: torch.Tensor) -> torch.Tensor:
    inputs = graph.start(tokens, 2)
    for index in range(len(graph.block_names)):
        graph.materialize(index)
        for item in inputs:
            item.hidden = graph.run(index, item)
        graph.release(index)
    return torch.cat([graph.finish(item.hidden) for item in inputs])


def refusal(step: BlockTransform | ModelTransform, options: Any, arch: str, folder: Path) -> str:
    """Why transform `step` cannot take a tiny model of `arch`; there must be a reason."""
    source = open_source(arch, folder)
    edges = find_edges(ModelGraph(source.config, source, torch.float32, CPU), make_tokens(1, 24))
    sentence = step.refuse(edges, options)
    assert sentence is not None
    return sentence


def transformed(
    source: RowSource,
    uses: Sequence[tuple[str, dict[str, Any]]],
    dtype: torch.dtype = torch.float32,
    facts: BlockFacts | None = None,
) -> Transformed:
    """All passes of `uses` applied to `source`; block transforms see random tokens."""
    from fewbit.calibrate.protocol import ModelView

    plan: Plan = plan_passes(list(uses))
    graph = ModelGraph(source.config, source, dtype, CPU)
    edges = find_edges(graph, make_tokens(1, 24))
    for item in (*plan.model, *plan.block):
        sentence = item.step.refuse(edges, item.options)
        assert sentence is None, sentence
    edited, config, basis = EditedSource(source), dict(source.config), None
    online: dict[str, Any] = {}
    for step in plan.model:
        view = ModelView(edges, edited.read, 7)
        found = step.step.edits(view, step.options)
        if found.untie:
            edited.add_copy(edges.head or "", edges.embedding.key)
            config["tie_word_embeddings"] = False
        edited.add(found.edits)
        basis = found.basis or basis
        online.update(found.online)
    blocks = ModelGraph(config, edited, dtype, CPU, online)
    inputs = blocks.start(make_tokens(4, 24, seed=3), 2)
    for index in range(len(blocks.block_names)):
        blocks.materialize(index)
        transform_block(
            blocks, index, inputs, edited, plan.block, edges,
            facts or BlockFacts({}, None, None, 7),
        )  # fmt: skip
        for item in inputs:
            item.hidden = blocks.run(index, item)
        blocks.release(index)
    return Transformed(edited, config, edges, basis, online)


def difference(
    arch: str, folder: Path, uses: Sequence[tuple[str, dict[str, Any]]], dtype: torch.dtype
) -> float:
    """max |Δlogit| / max |logit| that the passes make."""
    source = open_source(arch, folder, dtype)
    made = transformed(source, uses, dtype)
    assert any(made.source.is_edited(name) for name in made.source.tensors), "nothing was edited"
    wanted = model_logits(source.config, source, dtype)
    found = model_logits(made.config, made.source, dtype, made.online)
    return float((found - wanted).abs().max() / wanted.abs().max())
