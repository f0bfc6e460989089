"""Where a source checkpoint lies and which of its files count.

A source is a folder, or a hub id when no such path exists (`org/name`, downloaded or taken from the
cache by huggingface_hub, which also honours HF_HUB_OFFLINE). Weights, in this order:

    *.safetensors.index.json     exactly the shards that it names
    model.safetensors            that file
    model-00001-of-0000n...      the whole numbered set
    *.safetensors                all of them: any folder of tensors is a checkpoint

Pickles are never read: unpickling can run code. Files in subfolders count only where an index names
them. Nothing here looks into a safetensors file.
"""

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..quant.errors import CheckpointError
from .safetensors_file import brief

MAX_TEXT = 100_000_000  # bytes of a JSON file, and of a file worth copying
INDEX_SUFFIX = ".safetensors.index.json"
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_COPIED_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".md"}
_COPIED_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "README", "USE_POLICY")
# Facts on the source's own encoding, and names that fewbit writes itself.
_ENCODING = {"hf_quant_config.json", "quantize_config.json", "quant_config.json"}
_WRITTEN = {"config.json", "fewbit.json", "report.json"}
# Subfolders of a repository, and `consolidated*`, hold the same weights in other layouts.
_HUB_ALLOWED = [
    "*.safetensors",
    *(f"*{suffix}" for suffix in sorted(_COPIED_SUFFIXES)),
    *(f"{name}*" for name in _COPIED_NAMES),
]
_HUB_IGNORED = ["*/*", "consolidated*.safetensors"]


@dataclass(frozen=True)
class WeightFiles:
    """paths: files to read, sorted by name. unindexed: safetensors files beside them, not read.

    index_text and weight_map (tensor name -> file name) are empty without an index.
    """

    paths: tuple[Path, ...]
    unindexed: tuple[Path, ...]
    index_text: bytes
    weight_map: Mapping[str, str]


def locate(source: str, revision: str | None) -> tuple[Path, str | None]:
    """(folder, hub commit or None). What exists on disk is never looked up on the hub.

    CheckpointError: nothing there, not a folder, or the hub and its cache do not have it.
    """
    folder = Path(source).expanduser()
    if os.path.isdir(folder):
        if revision is not None:
            raise CheckpointError(
                f"revision {revision!r} was asked of the folder {source!r}; only hub ids have "
                f"revisions, leave it out"
            )
        commit = _COMMIT.fullmatch(folder.name) and folder.parent.name == "snapshots"
        return folder, folder.name if commit else None
    if os.path.lexists(folder):
        raise CheckpointError(f"{source!r} is not a folder; give the folder that holds the weights")
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{source!r} does not exist and is no hub id; give a folder, or a hub id like org/name"
        )
    folder = _download(source, revision)
    return folder, folder.name if _COMMIT.fullmatch(folder.name) else revision


def _download(hub_id: str, revision: str | None) -> Path:
    import huggingface_hub  # here, because most runs have a folder
    from huggingface_hub import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    hub_errors = tuple(kind for kind in kinds if issubclass(kind, Exception))
    caught: tuple[type[Exception], ...] = (*hub_errors, OSError, ValueError)
    try:
        found = huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=_HUB_ALLOWED, ignore_patterns=_HUB_IGNORED
        )
    except caught as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise CheckpointError(
            f"no folder {hub_id!r} here, and the hub gives no such model: {reason}; check name, "
            f"revision and network, log in with `hf auth login` if it is gated, or download it "
            f"and give the folder"
        ) from error
    return Path(found)


def list_files(folder: Path) -> list[Path]:
    """Files of the folder itself, sorted by name; broken links are left out."""
    try:
        return sorted(path for path in folder.iterdir() if os.path.isfile(path))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error}; check its rights") from error


def is_extra(path: Path, encoding: bool = False) -> bool:
    """Whether a file of the source belongs beside the result: tokenizer, template, licence, ...

    encoding: so do files that say how its weights are encoded.
    """
    if path.name in _WRITTEN or (path.name in _ENCODING and not encoding):
        return False
    if path.name.endswith(".index.json") or path.name.startswith("."):
        return False
    legal = not path.suffix and path.name.upper().startswith(_COPIED_NAMES)
    return (legal or path.suffix in _COPIED_SUFFIXES) and path.stat().st_size <= MAX_TEXT


def read_json(path: Path) -> tuple[bytes, dict[str, Any]]:
    """(bytes, object) of a JSON file. CheckpointError unless it is one JSON object."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise ValueError("it is no regular file")
        if status.st_size > MAX_TEXT:
            raise ValueError(f"{status.st_size} bytes, at most {MAX_TEXT} are allowed")
        text = path.read_bytes()
        found = json.loads(text.decode("utf-8"))  # with Infinity: published configs have it
    except RecursionError:
        raise CheckpointError(f"{path} nests too deeply; download it again") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} holds a {type(found).__name__}, a JSON object is allowed; download it again"
        )
    return text, found


def find_weights(folder: Path) -> WeightFiles:
    """Which safetensors files of `folder` to read. CheckpointError if there are none, if the index
    is damaged, or if a file that should be there is missing."""
    files = list_files(folder)
    stored = [path for path in files if path.suffix == ".safetensors"]
    index = _index_file(folder, [path for path in files if path.name.endswith(INDEX_SUFFIX)])
    if index is not None:
        text, document = read_json(index)
        weight_map = _weight_map(index, document)
        paths = _indexed(index, weight_map.values())
    else:
        text, weight_map, paths = b"", {}, _unindexed(folder, files, stored)
    left = tuple(path for path in stored if path not in paths)
    return WeightFiles(tuple(paths), left, text, weight_map)


def _unindexed(folder: Path, files: list[Path], stored: list[Path]) -> list[Path]:
    if not stored:
        raise _no_weights(folder, files)
    numbered = [path for path in stored if path.name.startswith("model-")]
    numbered = [path for path in numbered if _NUMBERED.fullmatch(path.name)]
    chosen = [path for path in stored if path.name == "model.safetensors"] or numbered or stored
    _check_numbers(chosen)
    return chosen


def _index_file(folder: Path, found: list[Path]) -> Path | None:
    named = folder / f"model{INDEX_SUFFIX}"
    if os.path.lexists(named):
        return named
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} has several indexes: {', '.join(path.name for path in found)}; "
            f"keep one of them"
        )
    return found[0] if found else None


def _weight_map(index: Path, document: Mapping[str, Any]) -> dict[str, str]:
    found = document.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(
            f"{index}: weight_map is {brief(found)}, a map of tensor names to files is needed; "
            f"download it again"
        )
    for name, shard in found.items():
        parts = Path(shard).parts if isinstance(shard, str) else ()
        if not parts or ".." in parts or parts[0] == os.sep or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} places {brief(name)} in {brief(shard)}; only safetensors files inside "
                f"the folder are allowed: download it again"
            )
    return found


def _indexed(index: Path, names: Iterable[str]) -> list[Path]:
    paths = [index.parent / name for name in sorted(set(names))]
    missing = [path.name for path in paths if not os.path.isfile(path)]
    if missing:
        raise CheckpointError(
            f"{index} names {len(missing)} missing file(s): {brief(missing[0])}; download the "
            f"missing files"
        )
    return paths


def _check_numbers(paths: list[Path]) -> None:
    """A numbered set without an index must be whole."""
    names = {path.name for path in paths}
    for match in filter(None, map(_NUMBERED.fullmatch, sorted(names))):
        for number in range(1, int(match[3]) + 1):
            wanted = f"{match[1]}-{number:05d}-of-{match[3]}.safetensors"
            if wanted not in names:
                raise CheckpointError(
                    f"{paths[0].parent} holds {match[0]} but not {wanted}; download the missing "
                    f"files"
                )


def _no_weights(folder: Path, files: list[Path]) -> CheckpointError:
    pickles = [path.name for path in files if path.suffix in _PICKLES]
    if pickles:
        return CheckpointError(
            f"{folder} holds pickle weights only ({pickles[0]}), which are never read because "
            f"reading them can run code; where you trust them, convert with "
            f"AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    inside = sorted({path.parent.name for path in folder.glob("*/*.safetensors")})
    remedy = f"give one of its subfolders: {', '.join(inside)}" if inside else "check the path"
    return CheckpointError(f"{folder} is not a checkpoint, it holds no *.safetensors; {remedy}")
