"""A checkpoint of ours as it lies on disk: what headers, `config.json` and the manifest promise.

Which modules are quantized is read off the tensor names: `<module>.<part>` for the first term,
`<module>.term<t>.<part>` for the others, where the parts are those of the format that
`quantization_config` gives the module.

    model.layers.0.mlp.up_proj.codes          U8   [96, 64]
    model.layers.0.mlp.up_proj.scale_group    F16  [96, 1]     -> int_group, [96, 64], 8.25 bits

A module that lacks a part, or has one of another dtype or shape, is an error: nobody may find out
later, with random numbers in its place.

Tensors are named and described by their contents, coded or not (`export/coded_files.py`).

Only headers are read here, so that 100 GB of weights are described in the time that it takes to
open their files. Contents are checked in `verify.py`; what a model makes of the names is in
`placement.py`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from ..export.coded_files import DecodedTensors, StoredTensor, stored_tensors
from ..export.journal import JOURNAL
from ..export.metadata import (
    MANIFEST,
    ModuleSpec,
    QuantizationConfig,
    parse_quantization_config,
    read_manifest,
)
from ..export.safetensors_file import Header, read_header
from ..export.source_files import find_weights, read_json
from .errors import CheckpointError, FewbitError
from .format import PartSpec, find_format

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
METHOD = "fewbit"

_TERM = re.compile(r"(?P<module>.+)\.term(?P<term>[1-9]\d*)")


@dataclass(frozen=True)
class StoredModule:
    """One quantized source module: logical `shape` [N, K] or [E, N, K], and its stored parts.

    parts: `codes` or `term1.codes` -> tensor name in the files.
    """

    name: str
    spec: ModuleSpec
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    n_bytes: int

    @property
    def n_weights(self) -> int:
        """Number of weights represented."""
        return prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of all parts, divided by the number of weights."""
        return 8 * self.n_bytes / self.n_weights


@dataclass(frozen=True)
class StoredCheckpoint:
    """What a checkpoint holds, by its headers.

    quantization: contents of `quantization_config`; None if nothing is quantized.
    manifest: contents of `fewbit.json`, None if there is none or if the files carry their own
    checksums. tensors: every stored tensor by its logical name. resident: how coded ones are held.
    source_method: quant_method of the source, if it was stored as it was.
    """

    folder: Path
    headers: tuple[Header, ...]
    quantization: Mapping[str, Any] | None
    manifest: Mapping[str, Any] | None
    modules: Mapping[str, StoredModule]
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    resident: str = "decoded"
    source_method: str | None = None

    def refuse_foreign(self) -> None:
        """CheckpointError if what is held here is another maker's quantized checkpoint, coded."""
        if self.source_method is not None:
            raise CheckpointError(
                f"{self.folder} holds a checkpoint of quant_method {self.source_method!r}, coded "
                f"without loss; fewbit does not run it: get it back with fewbit export {self.folder} "
                f"-o OUT --to dense"
            )

    def contents(self) -> DecodedTensors:
        """The tensors themselves by logical name, mapped; coded ones are decoded at each access."""
        return DecodedTensors(self.headers, self.tensors)

    def dense(self) -> dict[str, StoredTensor]:
        """Stored tensors that are no part of a quantized module."""
        parts = {name for module in self.modules.values() for name in module.parts.values()}
        return {name: entry for name, entry in self.tensors.items() if name not in parts}


# Written into the header of each file by `save_pretrained`; see `verify.py`.
CHECKSUMS = "fewbit.crc32c"


def open_stored(folder: Path) -> StoredCheckpoint:
    """The checkpoint in a folder. CheckpointError: missing, foreign, unfinished or damaged."""
    config = read_config(folder)
    quantization = config.get("quantization_config")
    has_manifest = (folder / MANIFEST).is_file()
    ours = isinstance(quantization, dict) and quantization.get("quant_method") == METHOD
    if not ours and (quantization is not None or not has_manifest):
        raise CheckpointError(f"{folder} {foreign(config)}")
    return describe(folder, weight_files(folder), quantization, read_manifest(folder))


def foreign(config: Mapping[str, Any]) -> str:
    """What a checkpoint is that fewbit did not write, and what to do with it."""
    found = config.get("quantization_config")
    if found is None:
        kind = f"is an unquantized checkpoint (model_type {config.get('model_type')!r})"
    else:
        method = found.get("quant_method") if isinstance(found, dict) else found
        kind = f"is a checkpoint of quant_method {method!r}"
    return f"{kind}, not one of fewbit's; write one with: fewbit quantize SRC -o OUT"


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder; CheckpointError if it cannot be, saying why."""
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist; give a checkpoint folder or a hub id")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give the folder that holds it")
    if (folder / CONFIG).is_file():
        return read_json(folder / CONFIG)[1]
    if (folder / JOURNAL).is_file():
        raise CheckpointError(
            f"{folder} holds an unfinished run; run the same quantize command again to finish it"
        )
    raise CheckpointError(
        f"{folder} has no {CONFIG}, so it is not a checkpoint; give the folder that "
        f"`fewbit quantize` wrote"
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order of their names."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor {INDEX}; its weights are missing, fetch or "
            f"quantize again"
        )
    return list(find_weights(folder).paths)


def describe(
    folder: Path,
    files: Iterable[Path],
    quantization: Mapping[str, Any] | None,
    manifest: Mapping[str, Any] | None,
) -> StoredCheckpoint:
    """Read the headers of `files` and find the quantized modules among their tensors."""
    headers = tuple(read_header(path) for path in files)
    seen: set[str] = set()
    for header in headers:
        for name in header.entries:
            if name in seen:
                raise CheckpointError(f"{header.path}: tensor {name} is in another file, too")
            seen.add(name)
    tensors = stored_tensors(headers)
    _check_index(folder, headers)
    if headers and all(CHECKSUMS in header.metadata for header in headers):
        manifest = None  # of an earlier checkpoint in this folder, which these files replaced
    modules: dict[str, StoredModule] = {}
    resident, method = "decoded", None
    if quantization is not None:
        more = (manifest or {}).get("exceptions")
        config = parse_quantization_config(quantization, str(folder / CONFIG), more)
        modules = _find_modules(folder, config, manifest, tensors)
        resident, method = config.resident, config.source_method
    return StoredCheckpoint(
        folder, headers, quantization, manifest, modules, tensors, resident, method
    )


def _check_index(folder: Path, headers: tuple[Header, ...]) -> None:
    """Every tensor that the index names is where it says, and the other way round."""
    if len(headers) == 1 or not (folder / INDEX).is_file():
        return
    promised = find_weights(folder).weight_map
    found = {name: header.path.name for header in headers for name in header.entries}
    for name in sorted(promised.keys() | found.keys()):
        if promised.get(name) != found.get(name):
            raise CheckpointError(
                f"{folder / INDEX} says that {name} is in {promised.get(name)}, but it is in "
                f"{found.get(name)}; the checkpoint is incomplete or mixed, fetch or quantize again"
            )


def _find_modules(
    folder: Path,
    config: QuantizationConfig,
    manifest: Mapping[str, Any] | None,
    tensors: Mapping[str, StoredTensor],
) -> dict[str, StoredModule]:
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        owner = part_owner(name, config)
        if owner is not None:
            found.setdefault(owner[0], {})[owner[1]] = name
    facts = manifest["modules"] if manifest is not None else dict.fromkeys(found)
    for module in sorted(facts.keys() - found.keys()):
        raise CheckpointError(
            f"{folder}: no part of quantized module {module} is in the files; "
            f"fetch or quantize again"
        )
    modules = {}
    for module, fact in facts.items():
        shape = tuple(fact["shape"]) if fact else None
        modules[module] = _describe_module(
            folder, module, config.spec_for(module), shape, found[module], tensors
        )
    return modules


def part_owner(name: str, config: QuantizationConfig) -> tuple[str, str] | None:
    """(module, part) if tensor `name` is a part of a quantized module, else None."""
    owner, _, part = name.rpartition(".")
    found = _TERM.fullmatch(owner)
    if found is not None:
        terms, term = config.spec_for(found["module"]).terms, int(found["term"])
        if term < len(terms) and part in _part_names(*terms[term]):
            return found["module"], f"term{term}.{part}"
    terms = config.spec_for(owner).terms  # a module may be called `term1` itself
    if not owner or not terms or part not in _part_names(*terms[0]):
        return None
    return owner, part


@cache
def _part_names(name: str, options: Any) -> frozenset[str]:
    """Names of the parts of a format; they do not depend on the shape."""
    return frozenset(find_format(name).part_specs((1024, 1024), options))


def _describe_module(
    folder: Path,
    name: str,
    spec: ModuleSpec,
    shape: tuple[int, ...] | None,
    parts: Mapping[str, str],
    tensors: Mapping[str, StoredTensor],
) -> StoredModule:
    try:
        if shape is None:
            shape = _shape_from_parts(spec, parts, tensors)
        expected = expected_parts(spec, shape)
    except FewbitError as error:
        raise CheckpointError(f"{folder}: {name}: {error}") from error
    for part, wanted in expected.items():
        if part not in parts:
            raise CheckpointError(
                f"{folder}: {name}.{part} is missing, a part of a quantized module; "
                f"fetch or quantize again"
            )
        entry = tensors[parts[part]]
        if PartSpec(entry.dtype, entry.shape) != wanted:
            raise CheckpointError(
                f"{folder}: {entry.name} must be {wanted.dtype} {list(wanted.shape)} for a weight "
                f"{list(shape)}, got {entry.dtype} {list(entry.shape)}; fetch or quantize again"
            )
    ordered = {part: parts[part] for part in expected}
    n_bytes = sum(tensors[name].n_bytes for name in ordered.values())
    return StoredModule(name, spec, shape, ordered, n_bytes)


def _shape_from_parts(
    spec: ModuleSpec, parts: Mapping[str, str], tensors: Mapping[str, StoredTensor]
) -> tuple[int, ...]:
    name, options = spec.terms[0]
    shapes = {part: tensors[key].shape for part, key in parts.items() if "." not in part}
    padded = find_format(name).padded_shape(shapes, options)
    return padded if spec.columns is None else (*padded[:-1], spec.columns)


def expected_parts(spec: ModuleSpec, shape: tuple[int, ...]) -> dict[str, PartSpec]:
    """Part -> dtype and shape for a weight of `shape`, over all terms in storage order."""
    found: dict[str, PartSpec] = {}
    for index, (name, options) in enumerate(spec.terms):
        prefix = f"term{index}." if index else ""
        specs = find_format(name).part_specs(shape, options)
        found.update({prefix + part: wanted for part, wanted in specs.items()})
    return found
