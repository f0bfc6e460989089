"""Which tensors of a bf16 checkpoint make DFloat11 units, and which file holds what.

    unit      model.layers.0   q, k, v, o, gate, up, down: linears of a layer, in the published order
              lm_head, model.embed_tokens   one weight each, unless the two are tied
    pattern   model\\.layers\\.\\d+ -> the paths of a unit's weights in stream order
    file      model_layers_0   the unit, and what else lies under its module
              model            what lies under no unit's module

Only names, shapes and dtypes are looked at; a tied head is compared with its embedding.

Not here: other architectures than stacks of `layers`, coding, files (`to_dfloat11.py`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..quant.errors import CheckpointError

REST = "model"
_LAYER = re.compile(r"((?:[^.]+\.)*?layers\.\d+)\.(.+)\.weight")
_NO_LINEAR = re.compile(r"(.*\.)?(gate|router|shared_expert_gate|[^.]*(norm|embed|bias|conv)[^.]*)")
_ORDER = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("self_attn.qkv_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.down_proj"),
)


class Described(Protocol):
    """What must be known of a tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""


class Source(Protocol):
    """What is exported: a `Checkpoint`, or anything that gives named dense tensors."""

    @property
    def tensors(self) -> Mapping[str, Described]:
        """Names, shapes and dtypes, in file order."""

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""

    @property
    def extra_files(self) -> tuple[Path, ...]:
        """Files to copy."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of a tensor's leading axis; may be called from several threads."""


@dataclass(frozen=True)
class Plan:
    """units: module -> names of its weights in stream order. pattern_dict: of the config.

    files: file stem -> names of tensors that it stores as they are. dropped: tied heads.
    """

    units: Mapping[str, tuple[str, ...]]
    pattern_dict: Mapping[str, list[str]]
    files: Mapping[str, list[str]]
    dropped: tuple[str, ...] = ()


def make_plan(source: Source) -> Plan:
    """Units, patterns and files of `source`. CheckpointError: no decoder layers were found, a weight of
    a unit is not bf16, or config.json ties a head that differs from its embedding."""
    layers = _layers(source.tensors)
    if not layers:
        raise CheckpointError(
            "no decoder layers were found (names like model.layers.0.self_attn.q_proj.weight); "
            "DFloat11 export knows no other architectures: use the recipe `lossless`"
        )
    ends, dropped = _embedding_units(source)
    pattern_dict: dict[str, list[str]] = {re.escape(module): [] for module in ends}
    pattern_dict |= _patterns(layers)
    units = {module: (f"{module}.weight",) for module in ends} | {
        module: tuple(f"{module}.{attribute}.weight" for attribute in attributes)
        for module, attributes in layers.items()
    }
    _check_bf16(source.tensors, [name for names in units.values() for name in names])
    return Plan(units, pattern_dict, _files(source.tensors, units, dropped), dropped)


def _layers(tensors: Mapping[str, Described]) -> dict[str, tuple[str, ...]]:
    """Layer module -> paths of its linears, in the published order where that knows them all."""
    found: dict[str, list[str]] = {}
    for name, info in tensors.items():
        match = _LAYER.fullmatch(name)
        if match and len(info.shape) == 2 and not _NO_LINEAR.fullmatch(match[2]):
            found.setdefault(match[1], []).append(match[2])
    known = {attribute: place for place, attribute in enumerate(_ORDER)}
    for attributes in found.values():
        attributes.sort(key=lambda attribute: known.get(attribute, len(known)))
    order = sorted(found, key=lambda module: (_container(module), int(module.rpartition(".")[2])))
    return {module: tuple(found[module]) for module in order}


def _container(module: str) -> str:
    return module.rpartition(".")[0]


def _patterns(layers: Mapping[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """`model\\.layers\\.\\d+`, or a list of numbers where layers of one stack differ."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for module, attributes in layers.items():
        groups.setdefault((_container(module), attributes), []).append(module.rpartition(".")[2])
    stacks = [container for container, _ in groups]
    patterns = {}
    for (container, attributes), numbers in groups.items():
        number = r"\d+" if stacks.count(container) == 1 else f"(?:{'|'.join(numbers)})"
        patterns[rf"{re.escape(container)}\.{number}"] = list(attributes)
    return patterns


def _embedding_units(source: Source) -> tuple[list[str], tuple[str, ...]]:
    """(modules of head and embedding to be coded, names of tied heads to be left out)."""
    head = "lm_head.weight"
    found = [name for name in source.tensors if f".{name}".endswith(".embed_tokens.weight")]
    text = source.config.get("text_config")
    stated = [part.get("tie_word_embeddings") for part in (source.config, text or {})]
    if head not in source.tensors or not found:
        return [], ()
    if True not in stated:
        return ["lm_head", *(name.removesuffix(".weight") for name in found)], ()
    if not torch.equal(bits_of(source.read(head)), bits_of(source.read(found[0]))):
        raise CheckpointError(
            f"config.json ties {head} to {found[0]}, but they differ; set tie_word_embeddings to "
            f"false, or remove {head}"
        )
    return [], (head,)


def _check_bf16(tensors: Mapping[str, Described], names: Sequence[str]) -> None:
    other = [name for name in names if tensors[name].dtype != torch.bfloat16]
    if other:
        dtype = str(tensors[other[0]].dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{other[0]} is {dtype} ({len(other)} of {len(names)} weights are not bf16), DFloat11 "
            f"stores bfloat16 only; use the recipe `lossless`, or convert the checkpoint first"
        )


def _files(
    tensors: Mapping[str, Described], units: Mapping[str, tuple[str, ...]], dropped: Sequence[str]
) -> dict[str, list[str]]:
    """File stem -> tensors that are stored as they are. A unit's file holds all of its module."""
    files: dict[str, list[str]] = {stem_of(module): [] for module in units}
    if len(files) != len(units) or REST in files:
        raise CheckpointError(f"modules {sorted(units)} give one file name twice; rename them")
    coded = {name for names in units.values() for name in names} | set(dropped)
    for name in tensors:
        if name not in coded:
            module = _module_of(name, units)
            files.setdefault(REST if module is None else stem_of(module), []).append(name)
    return files


def _module_of(name: str, units: Mapping[str, tuple[str, ...]]) -> str | None:
    parts = name.split(".")
    return next((m for n in range(len(parts)) if (m := ".".join(parts[:n])) in units), None)


def stem_of(module: str) -> str:
    """The name of a module's file, without its suffix."""
    return module.replace(".", "_")


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """A bf16 tensor as int16, contiguous."""
    return tensor.contiguous().view(torch.int16)
