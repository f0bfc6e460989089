"""What a block's weights and its attention get to see, on a sample of calibration tokens.

    with watch_attention(graph, change):     change(module, q, k, v) -> (k, v), called by every layer
        graph.run(...)                       in place of what it would attend to

    seen = observe(graph, index, inputs, max_tokens)
    seen.rows["model.layers.0.mlp.down_proj.weight"]    inputs of that weight, fp32 [tokens, K]
    seen.attention.k                                    keys after RoPE, fp32 [b, KV heads, T, D]

The attention function is the library's own: it is wrapped under its name while a block runs. Models
whose attention is not looked up by name show no q, k, v (`attention` None).
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .model import BlockInput, LayerCall, ModelGraph
from .uses import Use, WatchWeights

Change = Callable[
    [nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]


@dataclass(frozen=True)
class AttentionSample:
    """q [b, H, T, D], k and v [b, KV heads, T, D] as attention gets them (after RoPE), fp32.

    scaling: what q·k is multiplied by. Attention is taken to be causal.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class Observation:
    """rows: source tensor -> inputs of that weight fp32 [tokens, K], for plain matrices and single
    experts. attention: None if the layer's attention could not be watched."""

    rows: Mapping[str, torch.Tensor]
    attention: AttentionSample | None


@contextmanager
def watch_attention(graph: ModelGraph, change: Change) -> Iterator[None]:
    """Let every attention call of `graph`'s library function use the k and v that `change` returns.

    Nothing happens in layers that do not look their attention function up by name.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    name = graph.attention_implementation
    known = FUNCTIONS.get(name)

    def watched(
        module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **how: Any
    ) -> Any:
        k, v = change(module, q, k, v)
        # eager attention is not registered: each file of the library has a function of its own
        attend = known or vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        return attend(module, q, k, v, *args, **how)

    FUNCTIONS[name] = watched
    try:
        yield
    finally:
        del FUNCTIONS[name]  # the library's own, underneath, is back


def observe(
    graph: ModelGraph, index: int, inputs: Sequence[BlockInput], max_tokens: int
) -> Observation:
    """Run materialized block `index` on the first batches, until `max_tokens` were seen."""
    rows: dict[str, list[torch.Tensor]] = {}
    found: list[AttentionSample] = []

    def note(use: Use, x: torch.Tensor) -> None:
        for key in graph.names.sources(use.parameter):
            slot = graph.names.slot(key)
            if slot is not None and slot.expert == use.expert:
                rows.setdefault(key, []).append(x.reshape(-1, x.shape[-1]).float())

    def keep(
        module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scaling = getattr(module, "scaling", None) or q.shape[-1] ** -0.5
        found.append(AttentionSample(q.float(), k.float(), v.float(), float(scaling)))
        return k, v

    seen = 0
    with watch_attention(graph, keep), WatchWeights(graph.block_parameters(index), note):
        for item in inputs:
            if seen >= max_tokens:
                break
            part = first_rows(item, -(-(max_tokens - seen) // item.hidden.shape[1]))
            graph.run(index, part)
            seen += part.hidden.shape[0] * part.hidden.shape[1]
    joined = {key: torch.cat(parts) for key, parts in rows.items()}
    return Observation(joined, _joined(found))


def _joined(found: Sequence[AttentionSample]) -> AttentionSample | None:
    if not found or len({sample.k.shape[1:] for sample in found}) != 1:
        return None
    return AttentionSample(
        torch.cat([sample.q for sample in found]),
        torch.cat([sample.k for sample in found]),
        torch.cat([sample.v for sample in found]),
        found[0].scaling,
    )


def first_rows(item: BlockInput, n_rows: int) -> BlockInput:
    """The first `n_rows` windows of a batch, with what the layers are called with cut alike."""
    batch = item.hidden.shape[0]
    if n_rows >= batch:
        return item

    def cut(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            whole = value.dim() > 0 and value.shape[0] == batch and batch > 1
            return value[:n_rows] if whole else value
        if isinstance(value, dict):
            return {key: cut(entry) for key, entry in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(cut(entry) for entry in value)
        return value

    calls = tuple(LayerCall(cut(call.args), cut(call.kwargs)) for call in item.calls)
    return replace(item, hidden=item.hidden[:n_rows], calls=calls)
