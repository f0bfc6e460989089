"""Edges: where one weight's outputs become another's inputs, so that both can be changed inversely.

    norm gain ──► readers            embedding, writers ──► residual ──► norms
    v rows    ──► o columns          up rows ──► down columns          k rows ──► q rows (through q·k)

Which norm feeds which weights is seen by running one block of each kind once (`structure.py`). What a
projection is *called* decides its part (q, k, v, o, gate, up, down): names that models of this family
share. A wrong guess cannot do harm: every edit made along an edge is checked by running the block
(`check.py`).

Source tensors are named, so a projection that the graph fuses stays apart if the file keeps it apart.
Not found, hence None or absent: fused q|k|v and gate|up of one source tensor, fused expert stacks,
latent attention, MLPs without a gate.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .edits import Side
from .model import ModelGraph
from .structure import Norm, NormKind, Structure, WeightUse, find_structure, norm_kind

_PARTS = {
    "q": r"q_proj", "k": r"k_proj", "v": r"v_proj", "o": r"(?:o_proj|out_proj)",
    "gate": r"(?:gate_proj|w1)", "up": r"(?:up_proj|w3)", "down": r"(?:down_proj|w2)",
}  # fmt: skip


@dataclass(frozen=True)
class NormEdge:
    """A norm and the columns of all weights that multiply its output.

    gain, bias: source tensors; bias None if it has none. kind: None if its formula is unknown.
    """

    gain: str
    bias: str | None
    kind: NormKind | None
    readers: tuple[Side, ...]


@dataclass(frozen=True)
class AttentionEdge:
    """Projections of one attention layer: rows of q, k, v (of weight and bias) and columns of o.

    q_gain, k_gain: gains [head_dim] of norms between projection and RoPE, None if there are none.
    gain_shift: what is added to those gains before they multiply: 0, or 1.
    rotary: leading entries of a head that RoPE turns, in pairs (i, i + rotary / 2).
    """

    q: tuple[Side, ...]
    k: tuple[Side, ...]
    v: tuple[Side, ...]
    o: Side
    q_gain: str | None
    k_gain: str | None
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    gain_shift: float = 0.0


@dataclass(frozen=True)
class MlpEdge:
    """A gated MLP or one expert: rows of gate and up (weight and bias), columns of down.

    width: entries of the axis between them.
    turned: the input of down is transformed at run time, so its columns no longer belong to rows.
    """

    gate: tuple[Side, ...]
    up: tuple[Side, ...]
    down: Side
    width: int
    turned: bool = False


@dataclass(frozen=True)
class BlockEdges:
    """Edges of one block. other_norms: norms of residual width whose output no weight reads, which
    therefore stand behind a sublayer. writers: rows that add to the residual."""

    name: str
    keys: tuple[str, ...]
    norms: tuple[NormEdge, ...]
    attention: AttentionEdge | None
    mlps: tuple[MlpEdge, ...]
    writers: tuple[Side, ...]
    other_norms: tuple[str, ...]
    unread: tuple[str, ...]  # matrices that the trace did not see in use, or not as placed
    unread_readers: tuple[str, ...] = ()  # those of them that might read the residual, by width


@dataclass(frozen=True)
class ModelEdges:
    """Edges of a model.

    head: name of the output embedding's tensor, which the file lacks if it is `tied` to the input
    embedding; None if the model has none. final_norm: gain in front of it; None if not found.
    """

    architecture: str
    config: Any
    blocks: tuple[BlockEdges, ...]
    embedding: Side
    head: str | None
    tied: bool
    final_norm: str | None
    final_kind: NormKind | None


def find_edges(graph: ModelGraph, windows: torch.Tensor) -> ModelEdges:
    """Edges of every block; one block of each kind is read and run on token `windows` [b, T]."""
    inputs = graph.start(windows, windows.shape[0])[0]
    kinds: dict[tuple[Any, ...], Structure] = {}
    firsts: dict[tuple[Any, ...], int] = {}
    shifts: dict[tuple[Any, ...], float] = {}
    blocks = []
    for index in range(len(graph.block_names)):
        kind = _kind(graph, index)
        if kind not in kinds:
            graph.materialize(index)
            kinds[kind], firsts[kind] = find_structure(graph, index, inputs), index
            shifts[kind] = _gain_shift(graph, index)
            graph.release(index)
        blocks.append(_block_edges(graph, index, kinds[kind], firsts[kind], shifts[kind]))
    return _model_edges(graph, tuple(blocks))


def with_online(edges: ModelEdges, keys: Collection[str]) -> ModelEdges:
    """`edges` after the inputs of the weights `keys` were given to a transform at run time."""
    blocks = (
        replace(block, mlps=tuple(replace(m, turned=m.down.key in keys) for m in block.mlps))
        for block in edges.blocks
    )
    return replace(edges, blocks=tuple(blocks))


def kind_of_blocks(graph: ModelGraph) -> dict[int, int]:
    """Block index -> index of the first block with the same tensors."""
    firsts: dict[tuple[Any, ...], int] = {}
    return {
        index: firsts.setdefault(_kind(graph, index), index)
        for index in range(len(graph.block_names))
    }


def _kind(graph: ModelGraph, index: int) -> tuple[Any, ...]:
    prefix = graph.block_names[index]
    parameters = graph.block_parameters(index)
    return tuple((name.removeprefix(prefix), tuple(p.shape)) for name, p in parameters.items())


def _gain_shift(graph: ModelGraph, index: int) -> float:
    """1 if the norms of queries and keys in materialized block `index` multiply by 1 + w, else 0."""
    for name, module in graph.block(index).named_modules():
        if name.endswith(("q_norm", "k_norm")):
            width = module.get_parameter("weight").shape[-1]
            rows = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
            rows = rows.to(graph.device, graph.dtype)
            with torch.no_grad():
                return float(norm_kind(module, rows, module(rows)) == "rms1p")
    return 0.0


def _block_edges(
    graph: ModelGraph, index: int, structure: Structure, first: int, gain_shift: float
) -> BlockEdges:
    prefix, origin = graph.block_names[index], graph.block_names[first]

    def sources(parameter: str) -> tuple[str, ...]:
        return graph.names.sources(prefix + parameter.removeprefix(origin))

    keys = graph.block_sources(index)
    hidden = _text(graph).hidden_size
    norms = _norm_edges(structure, sources)
    read = {norm.gain for norm in norms}
    seen = {key for use in structure.uses for key in sources(use.parameter)}
    tensors = graph.source_tensors
    unread = tuple(
        key for key in keys
        if len(tensors[key].shape) > 1 and not key.endswith("bias")
        and (key not in seen or not _placed(graph, key))
    )  # fmt: skip
    return BlockEdges(
        name=prefix,
        keys=keys,
        norms=norms,
        attention=_attention(graph, keys, gain_shift),
        mlps=_mlps(keys, tensors),
        writers=_writers(structure, sources, tensors),
        other_norms=tuple(
            key for key in keys
            if re.search(r"norm\w*\.weight$", key) and key not in read
            and not re.search(r"\.[qk]_(layer)?norm\.weight$", key)
            and tuple(tensors[key].shape) == (hidden,)
        ),
        unread=unread,
        unread_readers=tuple(key for key in unread if hidden in tensors[key].shape),
    )  # fmt: skip


def _placed(graph: ModelGraph, key: str) -> bool:
    slot = graph.names.slot(key)
    return slot is not None and slot.quantizable


def _norm_edges(structure: Structure, sources: Any) -> tuple[NormEdge, ...]:
    found: dict[Norm, list[WeightUse]] = {}
    for use in structure.uses:
        if use.norm is not None:
            found.setdefault(use.norm, []).append(use)
    edges = []
    for norm, uses in found.items():
        gain, bias = sources(f"{norm.name}.weight"), sources(f"{norm.name}.bias")
        readers = tuple(
            Side(key, -2 if use.transposed else -1)
            for use in uses
            for key in sources(use.parameter)
        )
        if gain:
            edges.append(NormEdge(gain[0], bias[0] if bias else None, norm.kind, readers))
    return tuple(edges)


def _writers(structure: Structure, sources: Any, tensors: Mapping[str, Any]) -> tuple[Side, ...]:
    """Rows of o and down, and their biases: by name, checked by running the block."""
    found = []
    for use in structure.uses:
        for key in sources(use.parameter):
            if re.search(rf"\.({_PARTS['o']}|{_PARTS['down']}|dense|fc2)(\.weight)?$", key):
                found.append(Side(key, -1 if use.transposed else -2))
                found += _bias(key, tensors)
    return tuple(found)


def _bias(key: str, tensors: Mapping[str, Any]) -> list[Side]:
    name = key.removesuffix(".weight") + ".bias"
    return [Side(name)] if name in tensors else []


def _rows(key: str, tensors: Mapping[str, Any]) -> tuple[Side, ...]:
    return (Side(key, -2), *_bias(key, tensors))


def _named(keys: Sequence[str], part: str) -> dict[str, str]:
    """Owner -> key of the weights that are called `part`."""
    pattern = re.compile(rf"(?P<owner>.*\.){_PARTS[part]}\.weight")
    found = (pattern.fullmatch(key) for key in keys)
    return {match["owner"]: match[0] for match in found if match}


def _attention(graph: ModelGraph, keys: Sequence[str], gain_shift: float) -> AttentionEdge | None:
    config, tensors = _text(graph), graph.source_tensors
    parts = [_named(keys, part) for part in ("q", "k", "v", "o")]
    owners = set(parts[0]).intersection(*parts[1:])
    heads = getattr(config, "num_attention_heads", None)
    if len(owners) != 1 or not isinstance(heads, int):
        return None
    (owner,) = owners
    q, k, v, o = (part[owner] for part in parts)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = tensors[k].shape[0] // kv_heads
    if tensors[v].shape[0] != kv_heads * head_dim or tensors[q].shape[0] != heads * head_dim:
        return None
    gains = [f"{owner}{name}.weight" for name in ("q_norm", "k_norm")]
    held = [gain if gain in tensors else None for gain in gains]
    if any(gain and tuple(tensors[gain].shape) != (head_dim,) for gain in held):
        return None
    return AttentionEdge(
        _rows(q, tensors), _rows(k, tensors), _rows(v, tensors), Side(o, -1),
        held[0], held[1], heads, kv_heads, head_dim, _rotary(config, head_dim), gain_shift,
    )  # fmt: skip


def _rotary(config: Any, head_dim: int) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    share = share or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(head_dim * share)


def _mlps(keys: Sequence[str], tensors: Mapping[str, Any]) -> tuple[MlpEdge, ...]:
    gates, ups, downs = (_named(keys, part) for part in ("gate", "up", "down"))
    return tuple(
        MlpEdge(
            _rows(gates[owner], tensors),
            _rows(ups[owner], tensors),
            Side(downs[owner], -1),
            tensors[downs[owner]].shape[-1],
        )
        for owner in downs
        if owner in gates and owner in ups
    )


def _text(graph: ModelGraph) -> Any:
    return graph.config.get_text_config(decoder=True)


def _model_edges(graph: ModelGraph, blocks: tuple[BlockEdges, ...]) -> ModelEdges:
    embedding, head = graph.embedding_names()
    gain, kind = _final_norm(graph)
    return ModelEdges(
        architecture=graph.architecture,
        config=_text(graph),
        blocks=blocks,
        embedding=Side(graph.names.sources(embedding)[0], -1),
        head=_head(graph, embedding, head),
        tied=head == embedding,
        final_norm=gain,
        final_kind=kind,
    )


def _head(graph: ModelGraph, embedding: str, head: str | None) -> str | None:
    """The head's source tensor, or the name that it gets once it is untied."""
    if head is None or head == embedding:
        return None if head is None else graph.untied_head()
    found = graph.names.sources(head)
    return found[0] if found else None


def _final_norm(graph: ModelGraph) -> tuple[str | None, NormKind | None]:
    """Source tensor and kind of the one norm outside the blocks; None if there is not just one."""
    hidden = _text(graph).hidden_size
    names = [name for name in graph.outer_names() if re.search(r"norm\w*\.weight$", name)]
    if len(names) != 1 or not graph.names.sources(names[0]):
        return None, None
    with graph.outer_module(names[0].removesuffix(".weight")) as module:
        rows = torch.randn(4, hidden, generator=torch.Generator().manual_seed(0)).to(graph.device)
        rows = rows.to(graph.dtype)
        with torch.no_grad():
            kind = norm_kind(module, rows, module(rows))
    return graph.names.sources(names[0])[0], kind
