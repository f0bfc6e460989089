"""`fewbit export`: a checkpoint in another form, without rounding anything.

    dense        what the recipe `lossless` was given, byte for byte; the tensors of a DFloat11 folder
    dfloat11     of bf16 checkpoints, plain or made by `lossless`: Huffman-coded exponents, as the
                 DFloat11 package reads them

Forms that weights must be rounded for are not written yet.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..export.checkpoint import Checkpoint
from ..export.dense_files import write_dense
from ..export.from_dfloat11 import DFloat11Checkpoint, is_dfloat11
from ..export.source_files import locate
from ..export.stored_reader import StoredReader
from ..export.to_dense import write_originals
from ..export.to_dfloat11 import write_dfloat11
from .errors import CheckpointError, RecipeError, nearest_name
from .stored import METHOD, StoredCheckpoint, open_stored, read_config

TARGETS = ("dense", "dfloat11")

Progress = Callable[[str, int, int], None]


def export(
    path_or_id: str | Path, out: str | Path, to: str, progress: Progress | None = None
) -> None:
    """Write the checkpoint in a folder or hub id to the folder `out` in the form `to`.

    progress: told the name of each piece that is done, how much is, and how much there is in all.
    RecipeError: no such form, or not of this checkpoint. CheckpointError: damaged, or `out` is taken.
    """
    if to not in TARGETS:
        raise RecipeError(
            f"--to must be one of {', '.join(TARGETS)}; got {to!r}{nearest_name(to, TARGETS)}"
        )
    folder, _ = locate(str(path_or_id), None)
    config = read_config(folder)
    if is_dfloat11(config):
        if to == "dfloat11":
            raise RecipeError(f"{path_or_id} is a DFloat11 checkpoint already; copy it")
        write_dense(DFloat11Checkpoint.open(folder), Path(out), progress)
    elif _is_ours(config):
        _export_ours(open_stored(folder), Path(out), to, progress)
    elif to == "dense":
        raise RecipeError(
            f"{path_or_id} is neither fewbit's nor DFloat11's, so it is not coded; copy it"
        )
    else:
        write_dfloat11(Checkpoint.open(folder), Path(out), progress)


def _is_ours(config: Mapping[str, Any]) -> bool:
    found = config.get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def _export_ours(stored: StoredCheckpoint, out: Path, to: str, progress: Progress | None) -> None:
    if stored.modules:
        named = ", ".join(list(stored.modules)[:3])
        raise RecipeError(
            f"{stored.folder} holds {len(stored.modules)} quantized weights ({named}, ...): what they "
            f"were made from is not in it, and writing rounded weights as {to} is not built yet"
        )
    if out.resolve() == stored.folder.resolve():
        raise CheckpointError(f"{out} is the checkpoint itself; choose another output folder")
    contents = stored.contents()
    if to == "dense":
        write_originals(stored.folder, stored.headers, contents, stored.manifest, out, progress)
        return
    reader = StoredReader.open(stored.folder, stored.headers, contents, stored.manifest)
    if "quantization_config" in reader.config:
        raise RecipeError(
            f"{stored.folder} holds a quantized checkpoint of another maker; only 16-bit ones can be "
            f"written as {to}"
        )
    write_dfloat11(reader, out, progress)
