"""Gives back the files that a `lossless` checkpoint was made from, byte for byte.

Each shard is written as its own header says (`originals.py`), tensor by tensor, decoded in slabs of
rows: memory stays flat. Every byte is checked on the way: coded tensors against the checksums of their
chunks, plain ones and small files against the manifest. A shard gets its name when it is complete and
durable; `config.json` comes last. A run that was interrupted goes on with the shards that are missing.

Rounded weights are not given back: they are gone.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

import google_crc32c
import torch

from ..quant.errors import CheckpointError
from .chunked import bytes_of
from .claimed import claimed
from .coded_files import DecodedTensors
from .journal import sync_folder, write_atomic
from .metadata import MANIFEST
from .originals import content_sha256, originals_of
from .safetensors_file import Entry, Header, read_header

SLAB_BYTES = 2 << 20  # little enough that memory is used again
CONFIG, INDEX = "config.json", "model.safetensors.index.json"  # written by us, of this checkpoint

Progress = Callable[[str, int, int], None]  # name of the shard, bytes done, bytes in all


def write_originals(
    folder: Path,
    headers: tuple[Header, ...],
    tensors: DecodedTensors,
    manifest: Mapping[str, Any] | None,
    out: Path,
    progress: Progress | None = None,
) -> list[str]:
    """Write the source of the checkpoint in `folder` to `out`; names of all files written.

    headers: of its files. tensors: their contents. CheckpointError: not made by a lossless recipe,
    damaged, or `out` belongs to something else.
    """
    original = originals_of(manifest, str(folder))
    assert manifest is not None, "originals were found in no manifest"
    shards = {_safe(folder, name): text for name, text in original["shards"].items()}
    extras = copied_files(folder, headers, manifest)
    total = sum(_data_bytes(text) for text in shards.values())
    done = 0
    identity = {"export": "dense", "from": content_sha256(manifest)}
    with claimed(out, identity):
        for name, text in shards.items():
            _write_shard(out / name, text, tensors, manifest["tensors"])
            done += _data_bytes(text)
            if progress is not None:
                progress(name, done, total)
        for name in extras:
            write_atomic(out / name, _checked_file(folder / name, manifest["files"][name]))
        texts = {_safe(folder, name): text for name, text in original["texts"].items()}
        for name in sorted(texts, key=lambda name: name == CONFIG):  # config.json last
            write_atomic(out / name, texts[name].encode())
    return [*shards, *extras, *texts]


def copied_files(
    folder: Path, headers: tuple[Header, ...], manifest: Mapping[str, Any]
) -> list[str]:
    """Files in `folder` that were copied from its source; headers: of the others, its weights."""
    ours = {header.path.name for header in headers} | {CONFIG, INDEX}
    names = [name for name in manifest["files"] if name not in ours]
    return [_safe(folder, name) for name in names if name not in manifest["original"]["texts"]]


def _safe(folder: Path, name: str) -> str:
    """A name from the manifest; CheckpointError if it leads out of the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name:
        raise CheckpointError(f"{folder / MANIFEST}: {name!r} is no file below the output folder")
    return name


def _data_bytes(text: str) -> int:
    return max((entry["data_offsets"][1] for name, entry in json.loads(text).items()
                if name != "__metadata__"), default=0)  # fmt: skip


def _checked_file(path: Path, fact: Mapping[str, Any]) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read ({error.strerror}); fetch it again") from error
    if f"{google_crc32c.value(data):08x}" != fact["crc32c"]:
        raise CheckpointError(f"{path}: its checksum differs; it is damaged, fetch it again")
    return data


def _write_shard(
    path: Path, text: str, tensors: DecodedTensors, checksums: Mapping[str, str]
) -> None:
    """One safetensors file, whole or absent; nothing to do if it is there."""
    raw = text.encode()
    head = struct.pack("<Q", len(raw)) + raw
    if path.is_file() and path.stat().st_size == len(head) + _data_bytes(text):
        return  # it was renamed when it was complete
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w+b") as file:
        file.write(head)
        file.truncate(len(head) + _data_bytes(text))
        file.flush()
        header = read_header(partial)  # of a sparse file: proves that places are sound
        for name, entry in header.entries.items():
            _write_tensor(file, path, entry, tensors, checksums.get(name))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def _write_tensor(
    file: IO[bytes], path: Path, entry: Entry, tensors: DecodedTensors, checksum: str | None
) -> None:
    found = tensors.stored(entry.name)
    if found is None or (found.dtype, found.shape) != (entry.dtype, entry.shape):
        what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise CheckpointError(
            f"{path.name}: tensor {entry.name} must be {entry.dtype} {list(entry.shape)}, it is "
            f"{what}; the checkpoint is incomplete or mixed, fetch or quantize again"
        )
    file.seek(entry.begin)
    crc = 0
    for slab in slabs(tensors, entry.name):
        data = bytes_of(slab)
        file.write(data)
        crc = crc if found.coded else google_crc32c.extend(crc, data)
    if not found.coded and f"{crc:08x}" != checksum:
        raise CheckpointError(
            f"{entry.name} has checksum {crc:08x}, {checksum} was written; it is damaged or was "
            f"changed: fetch or quantize again"
        )


def slabs(tensors: DecodedTensors, name: str) -> Iterator[torch.Tensor]:
    """Rows of a tensor, about SLAB_BYTES at a time; a coded one is decoded slab by slab."""
    stored = tensors.stored(name)
    if stored is None or not stored.coded:
        yield tensors[name]
        return
    coded = tensors.coded(name)
    n_rows = stored.shape[0]
    row_bytes = max(1, torch.Size(stored.shape).numel() // n_rows * stored.dtype.itemsize)
    step = max(1, SLAB_BYTES // row_bytes)
    step = step // 64 * 64 or step  # whole bands of tiles
    for start in range(0, n_rows, step):
        yield coded.rows(start, min(start + step, n_rows))
