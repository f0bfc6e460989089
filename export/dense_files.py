"""Writes tensors that something else decodes as an ordinary folder of safetensors files.

Units of about 256 MB go through `CheckpointWriter`: an interrupted run resumes, and `config.json` comes
last. Nothing is rounded or coded.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ..quant.errors import CheckpointError
from ..quant.format import PartSpec
from .journal import JOURNAL, named_os_errors, write_atomic
from .shards import UnitPlan, index_of
from .writer import CheckpointWriter

UNIT_BYTES = 256 << 20
MAX_SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"


class TensorFacts(Protocol):
    """Of a tensor that can be read."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Reader(Protocol):
    """Where tensors come from."""

    @property
    def tensors(self) -> Mapping[str, TensorFacts]: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def extra_files(self) -> tuple[Path, ...]: ...

    def read(self, name: str) -> torch.Tensor: ...


def write_dense(
    source: Reader,
    out: Path,
    contents: str,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[str]:
    """Write all tensors of `source` to `out`; names of the files written.

    contents: a text that no source of other contents has. CheckpointError if `out` is neither empty
    nor an unfinished export of the same tensors.
    """
    if out.exists() and any(out.iterdir()) and not (out / JOURNAL).is_file():
        raise CheckpointError(f"{out} exists and is not empty; choose another output folder")
    units = _units(source.tensors)
    facts = json.dumps([[u.name, {k: str(v) for k, v in u.tensors.items()}] for u in units])
    digest = hashlib.sha256(facts.encode()).hexdigest()
    identity = {"export": "dense", "from": contents, "tensors": digest}
    writer = CheckpointWriter(out, units, identity, MAX_SHARD_BYTES)
    try:
        for index in range(writer.open(), len(units)):
            writer.write_unit(((n, [source.read(n)]) for n in units[index].tensors), [])
            if progress is not None:
                progress(units[index].name, index + 1, len(units))
        writer.note_extras([path.name for path in source.extra_files])
        with named_os_errors(out):
            for path in source.extra_files:
                write_atomic(out / path.name, path.read_bytes())
        names = [*writer.names, *(path.name for path in source.extra_files)]
        if len(writer.names) > 1:
            write_atomic(out / INDEX, _json_bytes(index_of(writer.stored())))
            names.append(INDEX)
        write_atomic(out / "config.json", _json_bytes(source.config))
        writer.finish()
    finally:
        writer.abandon()
    return [*names, "config.json"]


def _units(tensors: Mapping[str, TensorFacts]) -> list[UnitPlan]:
    runs: list[dict[str, PartSpec]] = []
    filled = UNIT_BYTES
    for name, facts in tensors.items():
        if filled >= UNIT_BYTES:
            runs.append({})
            filled = 0
        spec = PartSpec(facts.dtype, tuple(facts.shape))
        runs[-1][name] = spec
        filled += spec.n_bytes
    return [UnitPlan(f"tensors {i + 1} of {len(runs)}", run) for i, run in enumerate(runs)]


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
