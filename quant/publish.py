"""The first and the last step of a run: may we write here, and what makes the output loadable.

Before: an output folder is empty, or ours. Ours is told by the journal of an unfinished run or by
the manifest of a finished one; `restart` removes the files that those name, and no other.

After: read every stored byte back and compare with the checksum of what was computed, check that
parts fit their format, then write index, tokenizer files, manifest, report, and `config.json` last.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import torch

from ..export.checkpoint import Checkpoint
from ..export.coded_files import DecodedTensors, stored_tensors
from ..export.journal import JOURNAL, Journal, named_os_errors, write_atomic
from ..export.metadata import (
    MANIFEST,
    MAX_INLINE_EXCEPTIONS,
    VERSION,
    ModuleSpec,
    build_quantization_config,
    config_sha256,
    manifest_bytes,
    read_manifest,
)
from ..export.originals import original_facts
from ..export.report import Report, build_report, write_report
from ..export.safetensors_file import Header, read_header
from ..export.shards import SHARD_NAME, index_of
from ..export.writer import CheckpointWriter, extras_in, is_plain_name
from .errors import CheckpointError, FormatError
from .format import find_format
from .layout import PlannedTensor
from .transform import EDITS
from .units import Job

INDEX = "model.safetensors.index.json"
_PIECE_BYTES = 8 << 20
_ENCODINGS = ("quantization_config", "compression_config")
_OURS = ("config.json", INDEX, "report.json", "report.html", MANIFEST)
_SPILL = "fewbit.hidden"  # of calibrated runs, only ever with ".partial"


def check_folder(out: Path, restart: bool, source: Path) -> None:
    """Refuse folders that are not ours, and finished ones unless `restart`. Changes nothing."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; the output must be a folder")
    if out.resolve() == source.resolve():
        raise CheckpointError(f"{out} is the source itself; choose another output folder")
    if not out.exists() or not any(out.iterdir()):
        return
    unfinished, finished = (out / JOURNAL).is_file(), (out / MANIFEST).is_file()
    if not unfinished and not finished:
        raise CheckpointError(
            f"{out} exists, is not empty and was not written by fewbit; choose another folder"
        )
    if not restart and not unfinished:
        raise CheckpointError(
            f"{out} holds a finished checkpoint; choose another folder, or discard it with "
            f"--restart"
        )


def discard(out: Path) -> None:
    """Remove what an earlier run of ours left in a folder that `check_folder` accepted.

    The journal and the manifest name files, so they are emptied last: a removal that is killed can
    be repeated. The journal stays, empty: it is the lock against a second process, and what tells an
    interrupted removal from a folder of somebody else.
    """
    if not (out / JOURNAL).is_file() and not (out / MANIFEST).is_file():
        return
    journal = Journal(out / JOURNAL)
    try:
        with named_os_errors(out):
            journal.salvage()
            names = {*_OURS, f"{_SPILL}.partial"} | _manifest_files(out) | extras_in(journal.events)
            found = [path.name for path in out.iterdir()]
            names |= {name for name in found if SHARD_NAME.fullmatch(name) or EDITS.match(name)}
            for name in sorted(names, key=_removal_order):
                for path in (out / name, out / f"{name}.partial"):
                    if path.is_file() or path.is_symlink():
                        path.unlink()
            journal.clear()
    finally:
        journal.close()


def _removal_order(name: str) -> tuple[bool, bool, bool, str]:
    """First what makes the folder loadable; shards late, for they forbid a new run in the rest."""
    return name == MANIFEST, SHARD_NAME.fullmatch(name) is not None, name != "config.json", name


def _manifest_files(out: Path) -> set[str]:
    try:
        manifest = read_manifest(out) or {}
    except CheckpointError:  # damaged: its own files are then known by their names only
        return set()
    return {name for name in manifest.get("files", {}) if is_plain_name(name)}


def finish(job: Job, writer: CheckpointWriter, facts: Mapping[str, Any]) -> Report:
    """Verify, then publish. Idempotent: a kill in here is repeated by the next run."""
    verify_written(job, writer)
    specs = {t.module: module_spec(t, job) for t in job.plan.values() if t.rule is not None}
    config = _config(job, specs)
    more: dict[str, Any] = {}
    quantization = config.get("quantization_config")
    if quantization and len(quantization["tensors"]) > MAX_INLINE_EXCEPTIONS:
        more, quantization["tensors"] = quantization["tensors"], {}
        quantization["exceptions_in_manifest"] = len(more)
    writer.note_extras([path.name for path in job.checkpoint.extra_files])
    for path in job.checkpoint.extra_files:
        _copy(path, job.out / path.name)
    _write_index(job.out, writer)
    config_text = _json_bytes(config)
    manifest = _manifest(job, writer, config, config_text, more)
    write_atomic(job.out / MANIFEST, manifest_bytes(manifest))
    report = build_report(job, writer, facts)
    provenance = replace(report.provenance, source=public_name(job.checkpoint))
    report = replace(report, provenance=provenance)
    write_report(job.out, report)
    _remove_torn(job, writer)
    write_atomic(job.out / "config.json", config_text)
    return report


def _remove_torn(job: Job, writer: CheckpointWriter) -> None:
    """Temporary files of earlier runs that were killed while they wrote them."""
    extras = [path.name for path in job.checkpoint.extra_files]
    with named_os_errors(job.out):
        for name in (*writer.names, *_OURS, _SPILL, *extras):
            (job.out / f"{name}.partial").unlink(missing_ok=True)
        for path in job.out.iterdir():
            if EDITS.match(path.name):
                path.unlink()


def module_spec(tensor: PlannedTensor, job: Job) -> ModuleSpec:
    """How a quantized tensor is described in the config."""
    if tensor.rule is None:
        raise FormatError(f"{tensor.key} is not quantized")
    padded = find_format(tensor.rule.format).padded_k(tensor.shape[-1], tensor.rule.options)
    columns = tensor.shape[-1] if padded != tensor.shape[-1] else None
    online = job.model.online.get(tensor.key)
    return ModuleSpec(
        ((tensor.rule.format, tensor.rule.options),),
        columns,
        tensor.transposed,
        job.recipe.activation,
        () if online is None else (online,),
    )


def verify_written(job: Job, writer: CheckpointWriter) -> None:
    """Read all shards again; compare checksums and headers with what was computed."""
    expected: dict[str, dict[str, str]] = {}
    for shard, item in writer.stored():
        expected.setdefault(shard, {})[item.name] = item.crc32c
    for shard, checksum in writer.header_checksums().items():
        header = read_header(job.out / shard)
        if header.crc32c != checksum:  # names, dtypes, shapes and places
            raise _reads_back_differently(job.out / shard, "its header")
        for name, found in _checksums(header):
            if found != expected[shard][name]:
                raise _reads_back_differently(job.out / shard, name)
        _check_parts(job, DecodedTensors((header,), stored_tensors((header,))))


def _checksums(header: Header) -> Iterator[tuple[str, str]]:
    """CRC32C of each tensor's bytes. Read in pieces: mapped pages would count as memory of ours."""
    with named_os_errors(header.path.parent), open(header.path, "rb") as file:
        for name, entry in header.entries.items():
            file.seek(entry.begin)
            found, left = 0, entry.end - entry.begin
            while left and (data := file.read(min(left, _PIECE_BYTES))):
                found, left = google_crc32c.extend(found, data), left - len(data)
            yield name, f"{found:08x}"


def _reads_back_differently(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {what} reads back differently from what was computed; the disk or the memory is "
        f"faulty: start over with --restart"
    )


def _check_parts(job: Job, tensors: Mapping[str, Any]) -> None:
    for tensor in job.plan.values():
        if tensor.rule is None:
            continue
        names = list(tensor.specs())
        if names[0] in tensors:
            parts = {name.removeprefix(tensor.module + "."): tensors[name] for name in names}
            try:
                find_format(tensor.rule.format).check(parts, tensor.shape, tensor.rule.options)
            except FormatError as error:
                raise FormatError(f"{tensor.module}: {error}") from error


def _config(job: Job, specs: Mapping[str, ModuleSpec]) -> dict[str, Any]:
    config = _without_encoding(job.model.config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = _without_encoding(config["text_config"])
    kv = job.recipe.kv
    recipe = job.recipe
    if specs or kv or recipe.lossless:
        if "dtype" not in config and "torch_dtype" not in config:
            dtype = _detected_dtype(job.checkpoint) if recipe.keeps_bytes else job.checkpoint.dtype
            config["dtype"] = str(dtype).removeprefix("torch.")
        config["quantization_config"] = build_quantization_config(
            recipe.name, specs, kv.to_json() if kv else None, recipe.lossless, recipe.resident,
            source_quantization(job.model.config) if recipe.keeps_bytes else None,
        )  # fmt: skip
    return config


def _detected_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What transformers takes for the dtype of a model whose config says nothing: that of the first
    16- to 64-bit floating tensor of the first file, by name."""
    entries = checkpoint.shards[0].entries
    for name in sorted(entries):
        if entries[name].dtype.is_floating_point and entries[name].dtype.itemsize > 1:
            return entries[name].dtype
    return checkpoint.dtype


def source_quantization(config: Mapping[str, Any]) -> Any:
    """What a config says of how its weights are quantized; None if nothing."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in _ENCODINGS:
            if part.get(key):
                return part[key]
    return None


def _without_encoding(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what says how the source's weights were stored."""
    return {k: v for k, v in config.items() if k not in _ENCODINGS}


def _copy(source: Path, target: Path) -> None:
    try:
        data = source.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{source}: cannot read ({error.strerror}); keep the source in place and run the same "
            f"command again to resume"
        ) from error
    write_atomic(target, data)


def _write_index(out: Path, writer: CheckpointWriter) -> None:
    if len(writer.names) == 1:
        return
    write_atomic(out / INDEX, _json_bytes(index_of(writer.stored())))


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _manifest(
    job: Job,
    writer: CheckpointWriter,
    config: Mapping[str, Any],
    config_text: bytes,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    quantization = config.get("quantization_config")
    data = job.calibration
    return {
        "version": VERSION,
        "recipe": {"name": job.recipe.name, "text": job.recipe.text},
        "source": {
            "name": public_name(job.checkpoint),
            "revision": job.checkpoint.revision,
            "fingerprint": job.checkpoint.fingerprint,
        },
        "calibration": data.fingerprint() if data else None,
        "seed": job.seed,
        "environment": writer.identity["environment"],
        "files": _file_facts(job, writer, config_text),
        "tensors": {item.name: item.crc32c for _, item in writer.stored()},
        "modules": _module_facts(job),
        "quantization_config_sha256": config_sha256(quantization) if quantization else None,
        "exceptions": dict(more),
        **({"original": original_facts(job.checkpoint)} if job.recipe.keeps_bytes else {}),
    }


def public_name(source: Checkpoint) -> str:
    """The hub id, or the name of the folder: where it lies on this machine concerns nobody else."""
    local = Path(source.name).expanduser().is_dir()
    return source.folder.resolve().name if local else source.name


def _module_facts(job: Job) -> dict[str, Any]:
    facts = {}
    for tensor in job.plan.values():
        if tensor.rule is not None:
            store = find_format(tensor.rule.format)
            bits = store.bits(tensor.shape, tensor.rule.options)
            facts[tensor.module] = {"shape": list(tensor.shape), "bits_per_weight": bits}
    return facts


def _file_facts(job: Job, writer: CheckpointWriter, config_text: bytes) -> dict[str, Any]:
    """Sizes and checksums of the files that are written before the manifest."""
    facts: dict[str, Any] = {}
    for name in writer.names:
        header = read_header(job.out / name)
        facts[name] = {"bytes": header.file_bytes, "header_crc32c": f"{header.crc32c:08x}"}
    small = [path.name for path in job.checkpoint.extra_files]
    small += [INDEX] if len(writer.names) > 1 else []
    for name in small:
        data = (job.out / name).read_bytes()
        facts[name] = {"bytes": len(data), "crc32c": f"{google_crc32c.value(data):08x}"}
    facts["config.json"] = {"sha256": hashlib.sha256(config_text).hexdigest()}
    return facts
