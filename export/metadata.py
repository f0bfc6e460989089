"""The two descriptions inside a checkpoint: `quantization_config` and the manifest `fewbit.json`.

`quantization_config` (in `config.json`) says how stored parts turn into weights. It has a default
and, under `tensors`, only what differs from it, by source module name or `re:` pattern:

    {"quant_method": "fewbit", "version": 1, "recipe": "w4a16",
     "default": {"terms": [{"format": "int_group", "bits": 4, "group": 128, ...}],
                 "activation": {"format": "int8_token"}},
     "tensors": {"model.layers.3.mlp.down_proj": {"columns": 700}},
     "kv": {"key": {"format": "int4_head"}, "value": {"format": "int4_head"}, ...}}

    terms       formats and options, in order of summation
    columns     K, where padding hides it (without it K is what the parts hold)
    transposed  the graph wants [.., K, N]
    activation  format that inputs are rounded to; without it they stay as they are
    input       transforms of inputs at run time, in order: {"op": "hadamard", "order": .., "seed": ..}
    kv          how keys and values are cached; without it, as the model computes them
    coded       {codec: version}: tensors may be stored coded, each says how (`coded_files.py`)
    resident    how coded tensors are held once the model is loaded; without it, decoded
    source_quantization   of another maker, whose stored tensors are held here coded

*Which* modules are quantized is not listed: those whose parts are in the files. More than 1,000
exceptions move to the manifest; `exceptions_in_manifest` then says how many, so that a lost manifest
is noticed.

The manifest holds what must be checked and what must be known later: sizes and header checksums of
files, the CRC32C of every stored tensor, shapes, recipe text, source, calibration, seed, versions.
Its last key is the CRC32C of all bytes before it, so that any flipped byte is seen.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from ..quant.activation import find_activation
from ..quant.errors import CheckpointError, FewbitError, RecipeError
from ..quant.format import find_format, parse_options
from ..quant.hadamard import Hadamard
from ..quant.kv_policy import KVPolicy, parse_kv
from ..quant.recipe import check_resident

VERSION = 1
MANIFEST = "fewbit.json"
CODECS = {"rans32": 1, "dictionary": 1}
MAX_INLINE_EXCEPTIONS = 1000
_CHECKSUM_KEY = b',\n"crc32c": "'


@dataclass(frozen=True)
class ModuleSpec:
    """How one quantized module is stored: terms as (format name, options); K if padding hides it.

    activation: name of the format that its inputs are rounded to. inputs: transforms before that.
    """

    terms: tuple[tuple[str, Any], ...]
    columns: int | None = None
    transposed: bool = False
    activation: str | None = None
    inputs: tuple[Hadamard, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON form; keys at their default are left out."""
        entry: dict[str, Any] = {
            "terms": [{"format": name, **asdict(options)} for name, options in self.terms]
        }
        if self.columns is not None:
            entry["columns"] = self.columns
        if self.transposed:
            entry["transposed"] = True
        if self.activation is not None:
            entry["activation"] = {"format": self.activation}
        if self.inputs:
            entry["input"] = [turn.to_json() for turn in self.inputs]
        return entry


def build_quantization_config(
    recipe: str,
    modules: Mapping[str, ModuleSpec],
    kv: Mapping[str, Any] | None = None,
    coded: bool = False,
    resident: str = "decoded",
    source: Any = None,
) -> dict[str, Any]:
    """The smallest config that resolves to `modules` (source module name -> spec).

    kv: the cache policy in its JSON form. coded, resident: of tensors that may be entropy-coded.
    source: the source's own quantization_config, if its tensors are stored as they were.
    """
    entries = {name: spec.to_json() for name, spec in modules.items()}
    terms = _most_common(entry["terms"] for entry in entries.values()) or []
    activation = _most_common(entry.get("activation") for entry in entries.values())
    default = {"terms": terms} | ({"activation": activation} if activation else {})
    exceptions = {}
    for name, entry in entries.items():
        if activation and "activation" not in entry:
            entry["activation"] = None
        differing = {key: value for key, value in entry.items() if default.get(key, ()) != value}
        if differing:
            exceptions[name] = differing
    config = {
        "quant_method": "fewbit",
        "version": VERSION,
        "recipe": recipe,
        "default": default,
        "tensors": _fold_layers(exceptions, list(entries)),
    }
    config |= {"kv": dict(kv)} if kv else {}
    config |= {"coded": dict(CODECS)} if coded else {}
    config |= {"resident": resident} if resident != "decoded" else {}
    return config | ({"source_quantization": source} if source else {})


def _most_common(values: Iterable[Any]) -> Any:
    counts: dict[str, int] = {}
    for value in values:
        text = json.dumps(value, sort_keys=True)
        counts[text] = counts.get(text, 0) + 1
    return json.loads(max(counts, key=lambda text: counts[text])) if counts else None


def _fold_layers(exceptions: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Join exceptions that differ only in numbers, where the pattern covers nothing else."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(_pattern(name), []).append(name)
    folded: dict[str, Any] = {}
    for pattern, members in families.items():
        found = [exceptions.get(name) for name in members]
        if len(members) > 1 and found[0] is not None and all(e == found[0] for e in found):
            folded[pattern] = found[0]
        else:
            folded.update({name: exceptions[name] for name in members if name in exceptions})
    return folded


def _pattern(name: str) -> str:
    return "re:" + re.sub(r"(?<=\\\.)\d+(?=\\\.|$)", r"\\d+", re.escape(name))


@dataclass(frozen=True)
class QuantizationConfig:
    """A parsed and validated `quantization_config`."""

    recipe: str
    default: ModuleSpec
    exact: Mapping[str, ModuleSpec]
    patterns: tuple[tuple[re.Pattern[str], ModuleSpec], ...]
    kv: KVPolicy | None = None
    resident: str = "decoded"
    source_method: str | None = None

    def spec_for(self, module: str) -> ModuleSpec:
        """The spec of a quantized source module."""
        if module in self.exact:
            return self.exact[module]
        for pattern, spec in self.patterns:
            if pattern.fullmatch(module):
                return spec
        return self.default


_CONFIG_KEYS = {
    "quant_method", "version", "recipe", "default", "tensors", "exceptions_in_manifest", "kv",
    "coded", "resident", "source_quantization",
}  # fmt: skip


def parse_quantization_config(
    config: Any, where: str, more: Mapping[str, Any] | None = None
) -> QuantizationConfig:
    """Validate a config; `more` holds exceptions that moved to the manifest."""
    if not isinstance(config, dict) or config.get("quant_method") != "fewbit":
        method = config.get("quant_method") if isinstance(config, dict) else config
        raise CheckpointError(f"{where}: quant_method must be 'fewbit', got {method!r}")
    version = config.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{where}: version must be a whole number ≥ 1, got {version!r}")
    if version > VERSION:
        raise CheckpointError(
            f"{where}: written by format version {version}, this fewbit reads up to {VERSION}; "
            f"upgrade with: pip install -U fewbit"
        )
    unknown = sorted(config.keys() - _CONFIG_KEYS)
    if unknown:
        raise CheckpointError(
            f"{where}: unknown keys {unknown} in quantization_config; a newer fewbit may know them"
        )
    moved = config.get("exceptions_in_manifest", 0)
    if moved != len(more or {}):
        raise CheckpointError(
            f"{where}: {moved!r} exceptions lie in {MANIFEST}, {len(more or {})} were found there; "
            f"fetch the checkpoint again, with its {MANIFEST}"
        )
    default = _module_spec(where, "default", config.get("default"), ModuleSpec(()))
    exact: dict[str, ModuleSpec] = {}
    patterns = []
    for name, entry in {**_tensors(where, config.get("tensors", {})), **(more or {})}.items():
        spec = _module_spec(where, name, entry, default)
        if name.startswith("re:"):
            patterns.append((_compiled(where, name[3:]), spec))
        else:
            exact[name] = spec
    _check_codecs(where, config.get("coded", {}))
    return QuantizationConfig(
        str(config.get("recipe")),
        default,
        exact,
        tuple(patterns),
        _kv(where, config.get("kv")),
        _resident(where, config.get("resident", "decoded")),
        _method(config.get("source_quantization")),
    )


def _check_codecs(where: str, codecs: Any) -> None:
    if not isinstance(codecs, dict):
        raise CheckpointError(f"{where}: coded must be an object, got {codecs!r:.80}")
    for name, version in codecs.items():
        known = CODECS.get(name)
        if known is None or type(version) is not int or not 1 <= version <= known:
            raise CheckpointError(
                f"{where}: tensors are coded by {name!r} of version {version!r:.40}, this fewbit "
                f"knows {CODECS}; upgrade with: pip install -U fewbit"
            )


def _resident(where: str, value: Any) -> str:
    try:
        check_resident(value)
    except RecipeError as error:
        raise CheckpointError(f"{where}: {error}; a newer fewbit may know it") from error
    return str(value)


def _method(config: Any) -> str | None:
    """What a foreign quantization_config calls itself."""
    if config is None:
        return None
    return str(config.get("quant_method")) if isinstance(config, dict) else str(config)


def _kv(where: str, tree: Any) -> KVPolicy | None:
    if tree is None:
        return None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{where}: kv must be an object, got {tree!r:.80}")
    try:
        return parse_kv(tree, "kv")
    except RecipeError as error:
        raise CheckpointError(f"{where}: {error}; a newer fewbit may know it") from error


def _tensors(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: tensors must be an object, got {value!r:.80}")
    return value


def _compiled(where: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise CheckpointError(f"{where}: bad pattern {pattern!r}: {error}") from error


_SPEC_KEYS = {"terms", "columns", "transposed", "activation", "input"}


def _module_spec(where: str, name: str, entry: Any, default: ModuleSpec) -> ModuleSpec:
    if not isinstance(entry, dict) or not entry.keys() <= _SPEC_KEYS:
        raise CheckpointError(
            f"{where}: {name}: expected an object with {', '.join(sorted(_SPEC_KEYS))}; "
            f"got {entry!r:.120}"
        )
    columns, transposed = entry.get("columns"), entry.get("transposed", False)
    whole = isinstance(columns, int) and not isinstance(columns, bool) and columns > 0
    if not isinstance(transposed, bool) or not (columns is None or whole):
        raise CheckpointError(f"{where}: {name}: bad columns {columns!r} or {transposed!r}")
    return ModuleSpec(
        _terms(where, name, entry["terms"]) if "terms" in entry else default.terms,
        columns,
        transposed,
        _activation(where, name, entry["activation"]) if "activation" in entry else
        default.activation,
        _inputs(where, name, entry["input"]) if "input" in entry else default.inputs,
    )  # fmt: skip


def _activation(where: str, name: str, entry: Any) -> str | None:
    if entry is None:
        return None
    if not isinstance(entry, dict) or entry.keys() != {"format"}:
        raise CheckpointError(f"{where}: {name}: activation must be a format, got {entry!r:.80}")
    try:
        return find_activation(str(entry["format"])).name
    except RecipeError as error:
        raise CheckpointError(f"{where}: {name}: {error}; a newer fewbit may know it") from error


def _inputs(where: str, name: str, entries: Any) -> tuple[Hadamard, ...]:
    if not isinstance(entries, list):
        raise CheckpointError(f"{where}: {name}: input must be a list, got {entries!r:.80}")
    try:
        return tuple(Hadamard.parse(entry) for entry in entries)
    except FewbitError as error:
        raise CheckpointError(f"{where}: {name}: {error}; a newer fewbit may know it") from error


def _terms(where: str, name: str, terms: Any) -> tuple[tuple[str, Any], ...]:
    if not isinstance(terms, list) or not all(isinstance(term, dict) for term in terms):
        raise CheckpointError(f"{where}: {name}: terms must be a list, got {terms!r:.80}")
    parsed = []
    for term in terms:
        keys = {key: value for key, value in term.items() if key != "format"}
        try:
            found = find_format(str(term.get("format")))
            parsed.append((found.name, parse_options(found.name, found.Options, keys)))
        except (FewbitError, TypeError) as error:
            raise CheckpointError(f"{where}: {name}: {error}") from error
    return tuple(parsed)


def config_sha256(config: Mapping[str, Any]) -> str:
    """Hash of a `quantization_config`, independent of key order and white space."""
    text = json.dumps(config, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """Serialize; the last key is the checksum of everything before it."""
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False)
    body = text[: text.rindex("\n}")].encode()
    return body + _CHECKSUM_KEY + f"{google_crc32c.value(body):08x}".encode() + b'"\n}\n'


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The checked manifest of a checkpoint, None if it has none; CheckpointError if damaged."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read ({error.strerror})") from error
    body, key, tail = data.rpartition(_CHECKSUM_KEY)
    if not key or tail != f"{google_crc32c.value(body):08x}".encode() + b'"\n}\n':
        raise CheckpointError(
            f"{path}: the manifest is damaged (checksum differs); fetch or quantize again"
        )
    manifest = json.loads(data)
    version = manifest.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"{path}: written by format version {version}, this fewbit reads up to {VERSION}; "
            f"upgrade with: pip install -U fewbit"
        )
    return manifest
