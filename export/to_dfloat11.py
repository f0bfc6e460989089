"""Writes a DFloat11 checkpoint folder from a dense bf16 one, in the layout of published releases.

    model_layers_0.safetensors       the six tensors of unit `model.layers.0` (q, k, v, o, gate, up,
                                     down in one stream), and the layer's norms and biases as they are
    lm_head.safetensors              units of one weight each, unless the two are tied: a tied embedding
    model_embed_tokens.safetensors   stays as it is in model.safetensors, and lm_head is not stored
    model.safetensors                what belongs to no unit
    config.json                      + dfloat11_config {version, threads_per_block, bytes_per_thread,
                                     pattern_dict: module pattern -> its weights in stream order}

A unit is held in memory at a time, and is decoded again and compared bit by bit before it is written.
Files get their names when complete, config.json comes last: a folder without it is unfinished.

A unit that the format or its published decoder cannot take stays dense in the same file, which that
decoder reads too, and `Summary.raw_units` says why: exponents from 240 on, a code of more than 17
tables, or a block of more elements than fit into 48 KiB of a GPU's shared memory, which is all that
the published decoder asks for (weights that are nearly all zero). Tensors of other dtypes than bf16 are
refused where they would have to be coded, and stored as they are elsewhere. Shapes, which the format
leaves to the model's code, are noted in each file's metadata too.

Not here: other architectures than stacks of `layers`, resuming, quantized checkpoints.
"""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..quant.errors import CheckpointError
from .dfloat11 import Shorts, decode_range, encode_unit, open_unit
from .dfloat11_code import Unfit
from .journal import named_os_errors, sync_folder, write_atomic
from .safetensors_file import DTYPES

VERSION = "0.5.0"  # of the compressor whose layout this is
SHAPES = "fewbit_shapes"  # key of a file's metadata
SHARED_BYTES = 48 * 1024
COMPARED = 1 << 22  # elements
REST = "model"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LAYER = re.compile(r"((?:[^.]+\.)*?layers\.\d+)\.(.+)\.weight")
_NO_LINEAR = re.compile(r"(.*\.)?(gate|router|shared_expert_gate|[^.]*(norm|embed|bias|conv)[^.]*)")
_ORDER = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("self_attn.qkv_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.down_proj"),
)
_OTHER_ENCODINGS = ("quantization_config", "compression_config", "dfloat11_config")

Progress = Callable[[str, int, int], None]  # a file's name, files done, files in all


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

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""


@dataclass(frozen=True)
class Plan:
    """units: module -> names of its weights in stream order. pattern_dict: of the config.

    files: file stem -> names of tensors that it stores as they are. dropped: tied heads.
    """

    units: Mapping[str, tuple[str, ...]]
    pattern_dict: Mapping[str, list[str]]
    files: Mapping[str, list[str]]
    dropped: tuple[str, ...] = ()


@dataclass
class Summary:
    """raw_units: module -> why it stays dense. coded_elements, coded_bytes: of the others.

    dropped: tied heads, which are not stored. source_bytes, stored_bytes: of all tensors.
    """

    raw_units: dict[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    coded_units: int = 0
    coded_elements: int = 0
    coded_bytes: int = 0
    source_bytes: int = 0
    stored_bytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Of coded units, tables and indexes included; 16 without any."""
        return 8 * self.coded_bytes / self.coded_elements if self.coded_elements else 16.0


@dataclass(frozen=True)
class _Item:
    """A tensor on its way to a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Any]  # its bytes

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_dfloat11(source: Source, out: Path, progress: Progress | None = None) -> Summary:
    """Write `source` to the new or empty folder `out`. CheckpointError: `out` is not empty, no decoder
    layers were found, a weight is not bf16, or a disk error."""
    plan = make_plan(source)
    with named_os_errors(out):
        if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
            raise CheckpointError(f"{out} exists and is not an empty folder; choose a new one")
        out.mkdir(parents=True, exist_ok=True)
        summary = Summary(dropped=plan.dropped)
        modules = {_stem(module): module for module in plan.units}
        for done, (stem, names) in enumerate(plan.files.items()):
            items = _items(source, plan, modules.get(stem), names, summary)
            _write_file(out / f"{stem}.safetensors", items, _shapes(source, plan, items))
            del items  # before the next unit is read
            if progress is not None:
                progress(f"{stem}.safetensors", done + 1, len(plan.files))
        summary.source_bytes = sum(_size(info) for info in source.tensors.values())
        summary.stored_bytes = _stored_bytes(out)
        for path in source.extra_files:
            shutil.copyfile(path, out / path.name)
        write_atomic(out / "config.json", _config(source.config, plan).encode())
    return summary


# --- what goes where ------------------------------------------------------------------------------


def make_plan(source: Source) -> Plan:
    """Units, patterns and files of `source`. CheckpointError: see `write_dfloat11`."""
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
    if not torch.equal(_bits(source.read(head)), _bits(source.read(found[0]))):
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
    files: dict[str, list[str]] = {_stem(module): [] for module in units}
    if len(files) != len(units) or REST in files:
        raise CheckpointError(f"modules {sorted(units)} give one file name twice; rename them")
    coded = {name for names in units.values() for name in names} | set(dropped)
    for name in tensors:
        if name not in coded:
            module = _module_of(name, units)
            files.setdefault(REST if module is None else _stem(module), []).append(name)
    return files


def _module_of(name: str, units: Mapping[str, tuple[str, ...]]) -> str | None:
    parts = name.split(".")
    return next((m for n in range(len(parts)) if (m := ".".join(parts[:n])) in units), None)


def _stem(module: str) -> str:
    return module.replace(".", "_")


# --- one file -------------------------------------------------------------------------------------


def _items(
    source: Source, plan: Plan, module: str | None, names: Sequence[str], summary: Summary
) -> list[_Item]:
    """Tensors of one file; the unit is coded here, others are read when they are written."""
    items = []
    if module is not None:
        weights = plan.units[module]
        try:
            parts = _coded(source, module, weights)
        except Unfit as error:
            summary.raw_units[module] = str(error)
            names = [*weights, *names]
        else:
            items = [_part(f"{module}.{name}", part) for name, part in parts.items()]
            summary.coded_units += 1
            summary.coded_elements += len(parts["sign_mantissa"])
            summary.coded_bytes += sum(item.n_bytes for item in items)
    return items + [_dense(source, name) for name in names]


def _coded(source: Source, module: str, names: Sequence[str]) -> dict[str, Any]:
    """The tensors of a unit, proven to give the same bits."""
    weights = [_bits(source.read(name)).reshape(-1).numpy().view(np.uint16) for name in names]
    parts = encode_unit(weights)
    _check_shared_memory(parts["output_positions"])
    _compare(parts, weights, module)
    return parts


def _compare(parts: dict[str, Any], weights: Sequence[Shorts], module: str) -> None:
    """In pieces small enough to reuse the same memory: fresh pages cost more than decoding."""
    stream, first = open_unit(parts, module), 0
    for weight in weights:
        for at in range(0, len(weight), COMPARED):
            piece = weight[at : at + COMPARED]
            found = decode_range(stream, first + at, first + at + len(piece), module)
            assert np.array_equal(found, piece), f"{module}: decoding did not give the same bits"
        first += len(weight)


def _check_shared_memory(positions: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    largest = int(np.diff(positions.view("<u4").astype(np.int64)).max())
    needed = 512 * 4 + 4 + 2 * largest
    if needed > SHARED_BYTES:
        raise Unfit(
            f"a block of 4096 bytes holds {largest} elements, for which the published decoder "
            f"needs {needed} bytes of shared memory, {SHARED_BYTES} are allowed"
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


def _part(name: str, part: np.ndarray[Any, Any]) -> _Item:
    dtype = torch.int64 if part.dtype == np.int64 else torch.uint8
    data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
    return _Item(name, dtype, part.shape, lambda: data)


def _dense(source: Source, name: str) -> _Item:
    info = source.tensors[name]

    def load() -> Any:
        return source.read(name).contiguous().reshape(-1).view(torch.uint8).numpy()

    return _Item(name, info.dtype, tuple(info.shape), load)


def _write_file(final: Path, items: list[_Item], shapes: Mapping[str, list[int]]) -> None:
    """One safetensors file, widest dtypes first, so that all are aligned; named when complete."""
    items.sort(key=lambda item: (-item.dtype.itemsize, item.name))
    partial = final.with_name(final.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(_header(items, shapes))
            for item in items:
                file.write(item.load())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, final)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
    sync_folder(final.parent)


def _shapes(source: Source, plan: Plan, items: Iterable[_Item]) -> dict[str, list[int]]:
    """Shapes of the weights that are coded in a file."""
    modules = [item.name.removesuffix(".luts") for item in items if item.name.endswith(".luts")]
    coded = [name for module in modules for name in plan.units.get(module, ())]
    return {name: list(source.tensors[name].shape) for name in coded}


def _header(items: Iterable[_Item], shapes: Mapping[str, list[int]]) -> bytes:
    metadata = {"format": "pt"} | ({SHAPES: json.dumps(shapes)} if shapes else {})
    entries: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for item in items:
        entries[item.name] = {
            "dtype": _DTYPE_NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [begin, begin + item.n_bytes],
        }
        begin += item.n_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return struct.pack("<Q", len(text)) + text


# --- the rest -------------------------------------------------------------------------------------


def _config(config: Mapping[str, Any], plan: Plan) -> str:
    kept = {key: value for key, value in config.items() if key not in _OTHER_ENCODINGS}
    kept["dfloat11_config"] = {
        "version": VERSION,
        "threads_per_block": [512],
        "bytes_per_thread": 8,
        "pattern_dict": dict(plan.pattern_dict),
    }
    return json.dumps(kept, indent=2) + "\n"


def _size(info: Described) -> int:
    return int(np.prod(info.shape, dtype=np.int64)) * info.dtype.itemsize


def _stored_bytes(out: Path) -> int:
    return sum(path.stat().st_size for path in out.glob("*.safetensors"))
