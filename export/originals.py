"""What a run without any rounding must remember to give every file of its source back, byte for byte.

Tensors are stored, coded or not. Of the files around them the manifest keeps, under `original`:

    {"texts": {"config.json": "...", "model.safetensors.index.json": "..."},
     "shards": {"model-00001-of-00002.safetensors": "{\"__metadata__\": ...}   "}}

texts are files that the output has its own version of; shards the headers as they stand in the files,
padding included. Tokenizer files and the like lie beside the output unchanged.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..quant.errors import CheckpointError
from .checkpoint import Checkpoint
from .source_files import INDEX_SUFFIX


def original_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """The part `original` of a manifest."""
    folder = checkpoint.folder
    names = [path.name for path in sorted(folder.iterdir())
             if path.name == "config.json" or path.name.endswith(INDEX_SUFFIX)]  # fmt: skip
    shards = {}
    for header in checkpoint.shards:
        with open(header.path, "rb") as file:
            raw = file.read(header.header_bytes)
        shards[header.path.relative_to(folder).as_posix()] = raw[8:].decode("utf-8")
    return {"texts": {name: (folder / name).read_text("utf-8") for name in names}, "shards": shards}


def content_sha256(manifest: Mapping[str, Any]) -> str:
    """Of a manifest: two checkpoints have the same only if every stored byte is the same."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def originals_of(manifest: Mapping[str, Any] | None, where: str) -> Mapping[str, Any]:
    """`original` of a manifest; CheckpointError if it has none."""
    found = (manifest or {}).get("original")
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{where} does not say what its source looked like (its weights were rounded, or its "
            f"fewbit.json is gone); only what the recipe `lossless` wrote can be given back"
        )
    return found
