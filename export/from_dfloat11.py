"""Reads a DFloat11 checkpoint folder, published or ours, as named dense tensors.

    all *.safetensors of the folder, one file or many   units: <module>.{luts, encoded_exponent, …};
                                                        other tensors as they are
    config.json  dfloat11_config.pattern_dict           module pattern -> paths of a unit's weights,
                                                        [] for the module's own weight

The format stores no shapes. They come from the file's metadata (ours), else from the config's
hidden_size H, known places of the weights and their sizes n: o_proj and down_proj are [H, n/H], the
other usual projections, head and embedding [n/H, H]; else from the model that `transformers` builds of
the config, without memory for its weights.

`read` decodes the blocks that a tensor needs and keeps the coded bytes of one unit. All damage that
shows is a CheckpointError naming file, tensor and block; the format has no checksums, so not all
damage shows. Values are what was stored, NaN and Inf included.

Not here: diffusers pipelines, units of a grid other than 512 threads of 8 bytes.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..quant.errors import CheckpointError, nearest_name
from .checkpoint import homes
from .decode import TensorInfo
from .dfloat11 import CODED, Stream, decode_range, open_unit
from .safetensors_file import Header, brief, read_entry, read_header, row_range
from .source_files import is_extra, list_files, locate, read_json
from .to_dfloat11 import SHAPES

_MARK = ".encoded_exponent"
_MAX_PATTERN = 1000
_BY_ROWS = {"o_proj", "down_proj"}
_BY_COLUMNS = {
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj"),
    *("lm_head", "embed_tokens"),
}


@dataclass(frozen=True)
class _Weight:
    """Elements [start, start + product of shape) of a unit."""

    unit: str
    start: int
    shape: tuple[int, ...]


def is_dfloat11(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a DFloat11 checkpoint."""
    return "dfloat11_config" in config


@dataclass(frozen=True, eq=False)
class DFloat11Checkpoint:
    """An opened folder. tensors: dense, in file order; n_bytes is a weight's share of its unit.

    config: without dfloat11_config. fingerprint: SHA-256 over config, headers and sizes; contents
    of tensors do not enter. revision: the hub commit, None for other folders.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    revision: str | None
    fingerprint: str
    tensors: Mapping[str, TensorInfo]
    extra_files: tuple[Path, ...]
    _home: Mapping[str, Header]
    _weights: Mapping[str, _Weight]
    _opened: dict[str, Stream] = field(default_factory=dict)

    @classmethod
    def open(cls, path_or_id: str | Path, revision: str | None = None) -> "DFloat11Checkpoint":
        """Open a folder or a hub id: JSON, headers and sizes. CheckpointError for all that is wrong."""
        folder, commit = locate(str(path_or_id), revision)
        text, config = read_json(folder / "config.json")
        patterns = _patterns(folder, config.get("dfloat11_config"))
        paths = [path for path in list_files(folder) if path.suffix == ".safetensors"]
        headers = [read_header(path) for path in paths]
        home = homes(folder, headers)
        plain = {key: value for key, value in config.items() if key != "dfloat11_config"}
        _check_layers(folder, home, plain)
        tensors, weights = _dense_view(home, patterns, plain)
        digest = hashlib.sha256(text)
        for header in headers:
            digest.update(f"{header.path.name}/{header.file_bytes}/{header.sha256}\n".encode())
        return cls(
            name=str(path_or_id),
            folder=folder,
            config=plain,
            revision=commit,
            fingerprint=digest.hexdigest(),
            tensors=tensors,
            extra_files=tuple(path for path in list_files(folder) if is_extra(path)),
            _home=home,
            _weights=weights,
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of a tensor's leading axis, in fresh memory. CheckpointError if there is
        no such tensor or if it is damaged; IndexError if the rows are out of range."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.name} holds no tensor {name!r}{nearest_name(name, self.tensors)}"
            )
        if name not in self._weights:
            return read_entry(self._home[name], name, start, stop)
        weight = self._weights[name]
        start, stop = row_range(name, weight.shape[0], start, stop)
        row = math.prod(weight.shape[1:])
        where = self._where(weight.unit)
        begin, end = weight.start + start * row, weight.start + stop * row
        found = decode_range(self._stream(weight.unit), begin, end, where)
        dense = torch.from_numpy(found.view("int16")).view(torch.bfloat16)
        return dense.reshape(stop - start, *weight.shape[1:])

    def _where(self, unit: str) -> str:
        return f"{self._home[unit + _MARK].path}: {unit}"

    def _stream(self, unit: str) -> Stream:
        """The unit's coded bytes; those of the unit before are let go."""
        if unit not in self._opened:
            self._opened.clear()
            header = self._home[unit + _MARK]
            parts = {name: read_entry(header, f"{unit}.{name}").numpy() for name in CODED}
            self._opened[unit] = open_unit(parts, self._where(unit))
        return self._opened[unit]

    @property
    def total_bytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(info.n_bytes for info in self.tensors.values())


# --- config and files -----------------------------------------------------------------------------


def _patterns(folder: Path, found: Any) -> list[tuple[re.Pattern[str], list[str]]]:
    where = f"{folder / 'config.json'}: dfloat11_config"
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} is {brief(found)}, an object is needed; download it again")
    grid = (found.get("threads_per_block"), found.get("bytes_per_thread"))
    if grid not in (([512], 8), (512, 8)):
        raise CheckpointError(
            f"{where} has threads_per_block {brief(grid[0])} and bytes_per_thread {brief(grid[1])}, "
            f"[512] and 8 are read; ask its maker for a release in that layout"
        )
    patterns = found.get("pattern_dict")
    if not isinstance(patterns, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in patterns.values()
    ):
        raise CheckpointError(
            f"{where} has pattern_dict {brief(patterns)}, lists of names are needed; download it again"
        )
    return [(_compiled(where, pattern), names) for pattern, names in patterns.items()]


def _compiled(where: str, pattern: str) -> re.Pattern[str]:
    try:
        if len(pattern) > _MAX_PATTERN:
            raise ValueError(f"{len(pattern)} characters, at most {_MAX_PATTERN} are allowed")
        return re.compile(pattern)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where}: bad pattern {brief(pattern)}: {error}") from None


def _check_layers(folder: Path, home: Iterable[str], config: Mapping[str, Any]) -> None:
    """Files that are missing leave a hole in the numbers of layers: there is no index of files."""
    stacks: dict[str, set[int]] = {}
    for name in home:
        match = re.match(r"((?:[^.]+\.)*?layers)\.(\d{1,9})\.", name)
        if match:
            stacks.setdefault(match[1], set()).add(int(match[2]))
    stated = config.get("num_hidden_layers")
    for stack, numbers in stacks.items():
        n = max(numbers) + 1
        if len(stacks) == 1 and type(stated) is int:
            n = max(n, stated)
        missing = next((number for number in range(n) if number not in numbers), None)
        if missing is not None:
            raise CheckpointError(
                f"{folder} holds nothing of {stack}.{missing}; download the missing files"
            )


# --- dense tensors --------------------------------------------------------------------------------


def _dense_view(
    home: Mapping[str, Header],
    patterns: Sequence[tuple[re.Pattern[str], list[str]]],
    config: Mapping[str, Any],
) -> tuple[dict[str, TensorInfo], dict[str, _Weight]]:
    units = [name.removesuffix(_MARK) for name in home if name.endswith(_MARK)]
    owned = {f"{unit}.{name}" for unit in units for name in CODED}
    tensors: dict[str, TensorInfo] = {}
    weights: dict[str, _Weight] = {}
    for name, header in home.items():
        if name.endswith(_MARK):
            found = _unit_weights(header, name.removesuffix(_MARK), patterns, config)
            for dense, (weight, n_bytes) in found.items():
                _add(tensors, TensorInfo(dense, weight.shape, torch.bfloat16, n_bytes, "dfloat11"))
                weights[dense] = weight
        elif name not in owned:
            entry = header.entries[name]
            n_bytes = entry.end - entry.begin
            _add(tensors, TensorInfo(name, entry.shape, entry.dtype, n_bytes, "plain"))
    return tensors, weights


def _add(tensors: dict[str, TensorInfo], info: TensorInfo) -> None:
    if info.name in tensors:
        raise CheckpointError(f"tensor {brief(info.name)} is stored twice; download it again")
    tensors[info.name] = info


def _unit_weights(
    header: Header,
    unit: str,
    patterns: Sequence[tuple[re.Pattern[str], list[str]]],
    config: Mapping[str, Any],
) -> dict[str, tuple[_Weight, int]]:
    """Name -> (weight, its share of the unit's bytes) of one unit."""
    where = f"{header.path}: {unit}"
    listed = next((names for pattern, names in patterns if pattern.fullmatch(unit)), None)
    if listed is None:
        raise CheckpointError(f"{where} matches no pattern of dfloat11_config; download it again")
    names = [f"{unit}.{name}.weight" for name in listed] or [f"{unit}.weight"]
    missing = [name for name in CODED if f"{unit}.{name}" not in header.entries]
    if missing:
        raise CheckpointError(f"{where}.{missing[0]} is missing in this file; download it again")
    entries = [header.entries[f"{unit}.{name}"] for name in CODED]
    n = math.prod(header.entries[f"{unit}.sign_mantissa"].shape)
    split = header.entries[f"{unit}.split_positions"]
    if split.dtype != torch.int64 or split.shape != (len(names) - 1,):
        raise CheckpointError(
            f"{where}.split_positions is {split.dtype} {list(split.shape)}, int64 "
            f"[{len(names) - 1}] is needed for the {len(names)} weights of its pattern"
        )
    bounds = [0, *read_entry(header, split.name).tolist(), n]
    if sorted(bounds) != bounds:
        raise CheckpointError(f"{where}.split_positions does not ascend within 0 … {n}")
    n_bytes = sum(entry.end - entry.begin for entry in entries)
    shares = [n_bytes * bound // n if n else 0 for bound in bounds]
    shapes = _noted_shapes(header)
    return {
        name: (
            _Weight(
                unit, bounds[i], _shape(where, name, bounds[i + 1] - bounds[i], shapes, config)
            ),
            shares[i + 1] - shares[i],
        )
        for i, name in enumerate(names)
    }


def _noted_shapes(header: Header) -> dict[str, Any]:
    try:
        found = json.loads(header.metadata.get(SHAPES, "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _shape(
    where: str, name: str, n: int, noted: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[int, ...]:
    """Of a weight of n elements. CheckpointError if no source of shapes knows one that fits."""
    found = noted.get(name)
    if not isinstance(found, list) or not all(type(size) is int and size >= 0 for size in found):
        found = _usual_shape(name, n, config)
    if found is None:
        found = _model_shapes(json.dumps(config, sort_keys=True)).get(name)
    if found is None or not found or math.prod(found) != n:
        raise CheckpointError(
            f"{where}: {name} has {n} elements, and no shape that fits them is known "
            f"({brief(found)}); check config.json"
        )
    return tuple(found)


def _usual_shape(name: str, n: int, config: Mapping[str, Any]) -> list[int] | None:
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    hidden = config.get("hidden_size", inner.get("hidden_size"))
    role = name.removesuffix(".weight").rpartition(".")[2]
    if type(hidden) is not int or hidden <= 0 or n % hidden:
        return None
    if role in _BY_ROWS:
        return [hidden, n // hidden]
    return [n // hidden, hidden] if role in _BY_COLUMNS else None


@cache
def _model_shapes(config: str) -> dict[str, list[int]]:
    """Shapes of the model that `transformers` builds of a config, on the device that has no memory."""
    import transformers  # here, because most checkpoints do not need it
    from huggingface_hub.errors import StrictDataclassError

    tree = json.loads(config)
    kind = tree.pop("model_type", None)
    if kind not in transformers.CONFIG_MAPPING:
        return {}
    wrong = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, StrictDataclassError)
    try:
        with torch.device("meta"):
            built = transformers.AutoConfig.for_model(kind, **tree)
            model = transformers.AutoModelForCausalLM.from_config(built)
    except wrong:
        return {}
    return {name: list(value.shape) for name, value in model.state_dict().items()}
