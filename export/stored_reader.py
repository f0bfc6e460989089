"""A checkpoint of the recipe `lossless`, read like the source that it was made from.

What other formats are written from: names, facts and contents of tensors, the source's own config.json,
and the files beside it. Coded tensors are decoded when they are read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .coded_files import DecodedTensors, StoredTensor
from .originals import originals_of
from .safetensors_file import Header
from .to_dense import copied_files


@dataclass(frozen=True)
class StoredReader:
    """config: the source's. extra_files: tokenizer, generation settings and the like."""

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    extra_files: tuple[Path, ...]
    contents: DecodedTensors

    @classmethod
    def open(
        cls, folder: Path, headers: tuple[Header, ...], contents: DecodedTensors,
        manifest: Mapping[str, Any] | None,
    ) -> "StoredReader":  # fmt: skip
        """headers, contents: of the files in `folder`. CheckpointError if its source is not known."""
        original = originals_of(manifest, str(folder))
        assert manifest is not None, "originals were found in no manifest"
        config = json.loads(original["texts"].get("config.json", "{}"))
        extras = [folder / name for name in copied_files(folder, headers, manifest)]
        tensors = {name: tensor for name in contents if (tensor := contents.stored(name))}
        return cls(manifest["source"]["name"], config, tensors, tuple(extras), contents)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of the leading axis of tensor `name`; a coded one is not decoded beyond
        the chunks that hold them. A 0-d tensor is read whole."""
        facts = self.tensors[name]
        if not facts.shape:
            return self.contents[name]
        stop = facts.shape[0] if stop is None else stop
        if facts.coded:
            return self.contents.coded(name).rows(start, stop)
        return self.contents[name][start:stop]
