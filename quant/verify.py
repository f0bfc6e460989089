"""Is every stored byte what was written? Checksums, sizes, hashes, and each format's own check.

What a checkpoint can be compared with:

    fewbit.json           our writer's: its own checksum; size and header checksum of each shard;
                          CRC32C of each tensor's bytes; of each small file; SHA-256 of config.json
                          and of its quantization_config
    header of each file   `save_pretrained`'s, which writes no manifest: under `fewbit.crc32c` the
                          CRC32C of each tensor's bytes followed by its dtype and shape, and under
                          `fewbit.config_sha256` the hash of quantization_config

Tensors are read through a memory map, once: the model that is built afterwards maps the same pages.
A single flipped bit is always found; this guards against accidents, not against forgery.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import torch

from ..export.chunked import crc32c
from ..export.coded_files import split_name
from ..export.metadata import MANIFEST, config_sha256
from ..export.safetensors_file import Entry, Header, map_entries
from .errors import CheckpointError, FormatError
from .format import find_format
from .packed import PackedTensor, Term
from .stored import CHECKSUMS, CONFIG, INDEX, StoredCheckpoint, StoredModule, open_stored

CONFIG_HASH = "fewbit.config_sha256"
_AGAIN = "it is damaged or was changed: fetch or quantize again"


def verify_checkpoint(folder: Path) -> StoredCheckpoint:
    """Check all of a folder, tokenizer files included. CheckpointError names what differs."""
    stored = open_stored(folder)
    verify(stored, everything=True)
    return stored


def verify(stored: StoredCheckpoint, everything: bool = False) -> None:
    """Check what a model is made of: weights, index, `config.json`; CheckpointError if it differs.

    everything: the other files that the manifest lists (tokenizer, generation settings), too, and what
    the loader checks anyway while it reads: coded tensors, and the parts of each format.
    """
    if stored.manifest is not None:
        expected = _by_manifest(stored, stored.manifest, everything)
    else:
        expected = _by_headers(stored)
    for header in stored.headers:
        mapped = map_entries(header)
        for name, tensor in mapped.items():
            found = crc32c(tensor)
            if stored.manifest is None:
                found = described_checksum(found, header.entries[name])
            if expected.get(name) != found:
                _name_the_chunk(stored, header, name)
                raise CheckpointError(
                    f"{header.path}: tensor {name} has checksum {found}, "
                    f"{expected.get(name, 'none')} was written; {_AGAIN}"
                )
    if everything:
        check_contents(stored)


def _name_the_chunk(stored: StoredCheckpoint, header: Header, name: str) -> None:
    """CheckpointError that says which chunk of a coded tensor is damaged, if decoding finds it."""
    split = split_name(name)
    if split is None:
        return
    try:
        stored.contents().coded(split[0]).verify()
    except CheckpointError as error:
        raise CheckpointError(f"{header.path}: {error}") from error


def described_checksum(of_bytes: str, entry: Entry) -> str:
    """Checksum of a tensor's bytes continued over its dtype and shape, 8 hex digits."""
    text = f"{entry.dtype} {list(entry.shape)}".encode()
    return f"{google_crc32c.extend(int(of_bytes, 16), text):08x}"


def header_checksums(
    tensors: Mapping[str, torch.Tensor], quantization: Mapping[str, Any]
) -> dict[str, str]:
    """Header metadata that lets files without a manifest be verified."""
    sums = {}
    for name, tensor in tensors.items():
        entry = Entry(name, tensor.dtype, tuple(tensor.shape), 0, 0)
        sums[name] = described_checksum(crc32c(tensor), entry)
    return {
        CHECKSUMS: json.dumps(sums, separators=(",", ":")),
        CONFIG_HASH: config_sha256(quantization),
    }


# --- by the manifest ----------------------------------------------------------------------------


def _by_manifest(
    stored: StoredCheckpoint, manifest: Mapping[str, Any], small_files: bool
) -> Mapping[str, str]:
    files = manifest["files"]
    shards = {name for name, fact in files.items() if "header_crc32c" in fact}
    found = {header.path.name for header in stored.headers}
    if shards != found:
        raise CheckpointError(
            f"{stored.folder}: the weights are in {sorted(found)}, {MANIFEST} lists "
            f"{sorted(shards)}; files are missing or of another checkpoint"
        )
    for header in stored.headers:
        _check_shard(header, files[header.path.name])
    for name, fact in files.items():
        if name not in shards and (small_files or name in (CONFIG, INDEX)):
            _check_small(stored.folder / name, fact)
    wanted = manifest["quantization_config_sha256"]
    if stored.quantization is not None and config_sha256(stored.quantization) != wanted:
        raise CheckpointError(
            f"{stored.folder / CONFIG}: quantization_config differs from what was written; {_AGAIN}"
        )
    expected: Mapping[str, str] = manifest["tensors"]
    held = {name for header in stored.headers for name in header.entries}
    for name in sorted(expected.keys() - held):
        raise CheckpointError(f"{stored.folder}: tensor {name} is missing; {_AGAIN}")
    return expected


def _check_shard(header: Header, fact: Mapping[str, Any]) -> None:
    if header.file_bytes != fact["bytes"]:
        raise CheckpointError(
            f"{header.path}: has {header.file_bytes} bytes, {fact['bytes']} were written; {_AGAIN}"
        )
    if f"{header.crc32c:08x}" != fact["header_crc32c"]:
        raise CheckpointError(
            f"{header.path}: its header has checksum {header.crc32c:08x}, "
            f"{fact['header_crc32c']} was written; {_AGAIN}"
        )


def _check_small(path: Path, fact: Mapping[str, Any]) -> None:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read ({error.strerror}); {_AGAIN}") from error
    for key, found in (
        ("sha256", hashlib.sha256(data).hexdigest()),
        ("crc32c", f"{google_crc32c.value(data):08x}"),
    ):
        if key in fact and fact[key] != found:
            raise CheckpointError(
                f"{path}: has {key} {found}, {fact[key]} was written; restore the original, or "
                f"load with verify=False if the change is yours"
            )


# --- by the headers -----------------------------------------------------------------------------


def _by_headers(stored: StoredCheckpoint) -> dict[str, str]:
    """Each file lists the tensors of all files, so the lists must agree."""
    found = set()
    for header in stored.headers:
        if CHECKSUMS not in header.metadata:
            raise CheckpointError(
                f"{stored.folder} has no {MANIFEST}, and {header.path.name} carries no checksums; "
                f"fetch {MANIFEST} too, or load with verify=False"
            )
        found.add((header.metadata[CHECKSUMS], header.metadata.get(CONFIG_HASH)))
    if len(found) != 1:
        raise CheckpointError(
            f"{stored.folder}: the files list different checksums, so they are of different "
            f"checkpoints or damaged; fetch or quantize again"
        )
    if stored.quantization is not None and found.pop()[1] != config_sha256(stored.quantization):
        raise CheckpointError(
            f"{stored.folder / CONFIG}: quantization_config differs from what was saved with the "
            f"weights; {_AGAIN}"
        )
    return _header_sums(stored.headers[0])


def _header_sums(header: Header) -> dict[str, str]:
    try:
        found = json.loads(header.metadata[CHECKSUMS])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{header.path}: {CHECKSUMS} is no JSON ({error}); {_AGAIN}"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{header.path}: {CHECKSUMS} is {found!r:.60}, no object; {_AGAIN}")
    return found


# --- contents -----------------------------------------------------------------------------------


def check_contents(stored: StoredCheckpoint) -> None:
    """Decode every coded tensor, and let each format check the parts of each module."""
    contents = stored.contents()
    for name, tensor in stored.dense().items():
        if tensor.coded:
            contents.coded(name).verify()
    for module in stored.modules.values():
        check_packed(module.name, packed_of(module, contents))


def packed_of(module: StoredModule, tensors: Mapping[str, torch.Tensor]) -> PackedTensor:
    """The packed tensor of a module; `tensors` by their name in the files."""
    terms = []
    for index, (name, options) in enumerate(module.spec.terms):
        prefix = f"term{index}." if index else ""
        parts = {
            part.removeprefix(prefix): tensors[key]
            for part, key in module.parts.items()
            if part.rpartition(".")[0] == prefix.rstrip(".")
        }
        terms.append(Term(name, options, parts))
    return PackedTensor(module.shape, tuple(terms), module.spec.transposed)


def check_packed(name: str, packed: PackedTensor) -> None:
    """CheckpointError unless the stored values of every term are valid."""
    for term in packed.terms:
        try:
            find_format(term.format).check(term.parts, packed.shape, term.options)
        except FormatError as error:
            raise CheckpointError(f"{name}: {error}") from error
