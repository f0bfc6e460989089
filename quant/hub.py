"""Checkpoints by name: a local folder, or an id on the hub.

A hub id is downloaded into the hub library's cache, weights last: `config.json` is looked at first,
so that asking for a model that is not one of ours costs a few kilobytes, not all of its weights.
"""

import re
from pathlib import Path

from ..export.metadata import MANIFEST
from ..export.source_files import read_json
from .errors import CheckpointError
from .stored import CONFIG, METHOD, foreign

_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
# Where the hub library keeps a revision: <cache>/models--<owner>--<name>/snapshots/<commit>/
_SNAPSHOT = re.compile(
    r"(?P<cache>.*)/models--(?P<repo>[^/]+)/snapshots/(?P<commit>[^/]+)(?P<sub>/.*)?"
)


def fetch(path_or_id: str | Path) -> Path:
    """The local folder of a checkpoint; downloads a hub id.

    CheckpointError: neither an existing path nor a reachable hub id, or not one of fewbit's.
    """
    path = Path(path_or_id).expanduser()
    name = str(path_or_id)
    if path.exists() or isinstance(path_or_id, Path) or not _ID.fullmatch(name):
        return path
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        config = read_json(Path(hf_hub_download(name, CONFIG)))[1]
        quantization = config.get("quantization_config")
        if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
            raise CheckpointError(f"{name} {foreign(config)}")
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name!r} is neither a folder here nor a checkpoint that the hub answers for: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def fetch_manifest(folder: Path) -> None:
    """Put the manifest beside weights that the hub library downloaded without it.

    Nothing happens in an ordinary folder, or if the repository has no manifest.
    """
    found = _SNAPSHOT.fullmatch(folder.as_posix())
    if found is None or (folder / MANIFEST).exists():
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    repo = found["repo"].replace("--", "/")
    subfolder = (found["sub"] or "").strip("/") or None
    try:
        hf_hub_download(
            repo, MANIFEST, subfolder=subfolder, revision=found["commit"], cache_dir=found["cache"]
        )
    except RemoteEntryNotFoundError:  # checksums are then in the files, or missing
        return
    except (LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{repo}: {MANIFEST}, which holds the checksums, is not in the cache and cannot be "
            f"fetched: {str(error).strip().splitlines()[0]}"
        ) from error
