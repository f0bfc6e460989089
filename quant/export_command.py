"""`fewbit export`: a checkpoint in another form, without rounding anything.

    dense        what the recipe `lossless` was given, byte for byte; the tensors of a DFloat11 folder
    dfloat11     of bf16 checkpoints, plain or made by `lossless`: Huffman-coded exponents, as the
                 DFloat11 package reads them

Forms that weights must be rounded for are not written yet.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..export.checkpoint import Checkpoint
from ..export.dense_files import write_dense
from ..export.from_dfloat11 import DFloat11Checkpoint, is_dfloat11
from ..export.originals import content_sha256
from ..export.source_files import locate
from ..export.stored_reader import StoredReader
from ..export.to_dense import write_originals
from ..export.to_dfloat11 import Summary, write_dfloat11
from .errors import CheckpointError, RecipeError, nearest_name
from .stored import METHOD, StoredCheckpoint, open_stored, read_config

TARGETS = ("dense", "dfloat11")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Exported:
    """What was written. files: names below `folder`; n_bytes: of all of them.

    Of dfloat11, else 0 and empty: coded_units; raw_units: module -> why its weights stay dense;
    dropped: tied heads, which the form does not store; bits_per_weight: of coded units.
    """

    form: str
    folder: Path
    files: tuple[str, ...]
    n_bytes: int
    coded_units: int = 0
    raw_units: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    bits_per_weight: float = 0.0

    def text(self) -> str:
        """One line, and one more for each unit that stays dense."""
        line = f"{self.folder}: {self.form}, {len(self.files)} files, {self.n_bytes / 1e6:,.1f} MB"
        if self.form == "dfloat11":
            line += f"; {self.coded_units} units coded, {self.bits_per_weight:.3f} bits per weight"
        if self.dropped:
            line += f"; tied and not stored: {', '.join(self.dropped)}"
        return "\n".join(
            [line, *(f"  {m} stays dense: {why}" for m, why in self.raw_units.items())]
        )


def export(
    path_or_id: str | Path, out: str | Path, to: str, progress: Progress | None = None
) -> Exported:
    """Write the checkpoint in a folder or hub id to the folder `out` in the form `to`.

    progress: told the name of each piece that is done, how much is, and how much there is in all.
    An interrupted export goes on where it stopped. RecipeError: no such form, or not of this
    checkpoint. CheckpointError: damaged, or `out` is taken.
    """
    if to not in TARGETS:
        raise RecipeError(
            f"--to must be one of {', '.join(TARGETS)}; got {to!r}{nearest_name(to, TARGETS)}"
        )
    folder, _ = locate(str(path_or_id), None)
    out = Path(out)
    _check_out(folder, out)
    config = read_config(folder)
    if is_dfloat11(config):
        if to == "dfloat11":
            raise RecipeError(f"{path_or_id} is a DFloat11 checkpoint already; copy it")
        coded = DFloat11Checkpoint.open(folder)
        return _dense(out, write_dense(coded, out, _folder_identity(folder), progress))
    if _is_ours(config):
        return _export_ours(open_stored(folder), out, to, progress)
    if to == "dense":
        raise RecipeError(
            f"{path_or_id} is neither fewbit's nor DFloat11's, so it is not coded; copy it"
        )
    source = _open_plain(folder)
    return _dfloat11(out, write_dfloat11(source, out, progress, _folder_identity(folder)))


def _check_out(folder: Path, out: Path) -> None:
    if out.resolve() == folder.resolve():
        raise CheckpointError(f"{out} is the checkpoint itself; choose another output folder")
    if folder.resolve() in out.resolve().parents:
        raise CheckpointError(f"{out} lies inside the checkpoint; choose another output folder")
    if os.path.lexists(out) and not out.is_dir():
        raise CheckpointError(f"{out} is a file; the output must be a folder")


def _dense(out: Path, names: list[str]) -> Exported:
    return Exported("dense", out, tuple(names), _size(out, names))


def _dfloat11(out: Path, found: Summary) -> Exported:
    names = [*(facts.name for facts in found.files), *found.extras, "config.json"]
    return Exported(
        *("dfloat11", out, tuple(names), _size(out, names)),
        *(found.coded_units, found.raw_units, found.dropped, found.bits_per_weight),
    )


def _size(out: Path, names: list[str]) -> int:
    return sum((out / name).stat().st_size for name in names)


# --- plain checkpoints ----------------------------------------------------------------------------


def _open_plain(folder: Path) -> Checkpoint:
    """A 16-bit checkpoint with its NaN and Inf, or one of few bits, decoded."""
    found = Checkpoint.open(folder)  # refuses what other makers quantized
    if all(info.encoding == "plain" for info in found.tensors.values()):
        return Checkpoint.open(folder, as_stored=True)
    return found


def _folder_identity(folder: Path) -> str:
    """Of the files and their times: headers alone are the same in any two models of one shape."""
    files = sorted(folder.rglob("*.safetensors"))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return f"{folder.resolve()} {stats}"


# --- checkpoints of ours --------------------------------------------------------------------------


def _is_ours(config: Mapping[str, Any]) -> bool:
    found = config.get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def _export_ours(
    stored: StoredCheckpoint, out: Path, to: str, progress: Progress | None
) -> Exported:
    if stored.modules:
        named = ", ".join(list(stored.modules)[:3])
        raise RecipeError(
            f"{stored.folder} holds {len(stored.modules)} quantized weights ({named}, ...): what they "
            f"were made from is not in it, and writing rounded weights as {to} is not built yet"
        )
    contents = stored.contents()
    if to == "dense":
        names = write_originals(
            stored.folder, stored.headers, contents, stored.manifest, out, progress
        )
        return _dense(out, names)
    reader = StoredReader.open(stored.folder, stored.headers, contents, stored.manifest)
    if "quantization_config" in reader.config:
        raise RecipeError(
            f"{stored.folder} holds a quantized checkpoint of another maker; only 16-bit ones can be "
            f"written as {to}"
        )
    identity = content_sha256(stored.manifest or {})
    return _dfloat11(out, write_dfloat11(reader, out, progress, identity))
