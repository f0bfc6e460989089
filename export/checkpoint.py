"""The source: a folder of safetensors files, or a hub id, seen as named tensors.

`Checkpoint.open` reads headers and JSON only, and refuses there whatever names, sizes and config
can tell. `read` gives rows of one tensor, decoded when the source stores low bits (`decode.py`),
and stops by name at NaN or Inf. Memory does not grow with the checkpoint. Which files count is
said in `source_files.py`; safetensors files beside them are listed, not read.

Never read: pickles, and other makers' quantized checkpoints except FP8 with scales and MXFP4.
Damage inside a source's tensors cannot be seen unless it makes NaN or Inf: safetensors files carry
no checksums.
"""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..quant.errors import CheckpointError, nearest_name
from .decode import DEFAULT_BLOCK, LogicalTensor, TensorInfo, decode_rows, logical_tensors
from .safetensors_file import Entry, Header, brief, read_entry, read_header, row_range
from .source_files import WeightFiles, find_weights, is_extra, list_files, locate, read_json

READ_METHODS = ("fp8", "mxfp4")  # values of quant_method that are decoded


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened source. `tensors` are logical: decoded, without companions, in file order.

    name: as the user gave it. revision: the hub commit, None for other folders.
    fingerprint: SHA-256 over config, index, headers and sizes; contents of tensors do not enter.
    extra_files: tokenizer, generation config, chat template, licence and the like, to be copied.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    revision: str | None
    fingerprint: str
    tensors: Mapping[str, TensorInfo]
    extra_files: tuple[Path, ...]
    unindexed_files: tuple[Path, ...]
    shards: tuple[Header, ...]
    _logical: Mapping[str, LogicalTensor]
    _home: Mapping[str, Header]
    as_stored: bool = False

    @classmethod
    def open(
        cls, path_or_id: str | Path, revision: str | None = None, as_stored: bool = False
    ) -> "Checkpoint":
        """Open a folder, or a hub id if no such path exists. CheckpointError for all that is wrong.

        Hub files come from the cache when HF_HUB_OFFLINE is set or the hub cannot be reached.
        as_stored: every tensor as its file has it, whatever it means: nothing is decoded, NaN and Inf
        are values like others, and any encoding is accepted but fewbit's own and DFloat11.
        """
        folder, commit = locate(str(path_or_id), revision)
        config_text, config = _read_config(folder)
        _refuse_coded(folder, config)
        block = DEFAULT_BLOCK if as_stored else _check_encoding(folder, config)
        files = find_weights(folder)
        shards = tuple(read_header(path) for path in files.paths)
        home = homes(folder, shards)
        _check_weight_map(folder, files.weight_map, home)
        logical = _as_stored(home) if as_stored else _pair(folder, home, block)
        return cls(
            name=str(path_or_id),
            folder=folder,
            config=config,
            revision=commit,
            fingerprint=_fingerprint(folder, config_text, files, shards),
            tensors={name: tensor.info for name, tensor in logical.items()},
            extra_files=tuple(p for p in list_files(folder) if is_extra(p, as_stored)),
            unindexed_files=files.unindexed,
            shards=shards,
            _logical=logical,
            _home=home,
            as_stored=as_stored,
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of the leading axis of tensor `name`, decoded, in fresh memory.

        CheckpointError if there is no such tensor, if the file changed, or if a value is NaN or
        Inf; IndexError if the rows are out of range.
        """
        if name not in self._logical:
            raise CheckpointError(
                f"{self.name} holds no tensor {name!r}{nearest_name(name, self.tensors)}"
            )
        tensor = self._logical[name]
        n_rows = tensor.info.shape[0] if tensor.info.shape else 1
        start, stop = row_range(name, n_rows, start, stop)
        value = decode_rows(tensor, self._fetch, start, stop)
        if not self.as_stored:
            _check_finite(self._home[tensor.weight].path, name, value, start)
        return value

    def _fetch(self, stored: str, start: int, stop: int) -> torch.Tensor:
        return read_entry(self._home[stored], stored, start, stop)

    @property
    def total_bytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(info.n_bytes for info in self.tensors.values())

    @property
    def n_parameters(self) -> int:
        """Elements of all logical tensors."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype: the config's, else the floating one that holds most elements."""
        stated = self.config.get("dtype", self.config.get("torch_dtype"))
        name = stated.removeprefix("torch.") if isinstance(stated, str) else ""
        dtype = vars(torch).get(name)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
        count: Counter[torch.dtype] = Counter()
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                count[info.dtype] += math.prod(info.shape)
        return count.most_common(1)[0][0] if count else torch.float32

    @property
    def tied_embeddings(self) -> bool | None:
        """Whether the config says that the head is the embedding; None if it says nothing."""
        for part in (self.config, self.config.get("text_config")):
            if isinstance(part, dict) and isinstance(part.get("tie_word_embeddings"), bool):
                return bool(part["tie_word_embeddings"])
        return None


def _read_config(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """Any folder of tensors is a checkpoint: a config that is not there is an empty one."""
    path = folder / "config.json"
    return read_json(path) if os.path.lexists(path) else (b"", {})


# --- how it is encoded --------------------------------------------------------------------------


def _check_encoding(folder: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    """The block of FP8 scales. CheckpointError if the config names an encoding that is not read."""
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    keys = ("quantization_config", "compression_config")
    for stated in (part[key] for part in (config, inner) for key in keys if part.get(key)):
        method = stated.get("quant_method") if isinstance(stated, dict) else stated
        if method not in READ_METHODS:
            _refuse_method(folder, method)
        return _block_size(folder, stated)
    for name in ("hf_quant_config.json", "quantize_config.json"):
        if os.path.lexists(folder / name):
            _refuse_method(folder, name)
    return DEFAULT_BLOCK


def _refuse_coded(folder: Path, config: Mapping[str, Any]) -> None:
    """What must be brought back to tensors first, whoever reads it."""
    found = config.get("quantization_config")
    if isinstance(found, dict) and found.get("quant_method") == "fewbit":
        _refuse_method(folder, "fewbit")
    if "dfloat11_config" in config:
        raise CheckpointError(
            f"{folder} is coded by DFloat11; get the tensors back first: "
            f"fewbit export {folder} -o DENSE --to dense"
        )


def _as_stored(home: Mapping[str, Header]) -> dict[str, LogicalTensor]:
    """Every stored tensor by itself."""
    found = {}
    for name, header in home.items():
        entry = header.entries[name]
        info = TensorInfo(name, entry.shape, entry.dtype, entry.end - entry.begin, "plain")
        found[name] = LogicalTensor(info, name)
    return found


def _refuse_method(folder: Path, method: object) -> NoReturn:
    what = "a fewbit checkpoint" if method == "fewbit" else f"quantized already ({brief(method)})"
    raise CheckpointError(
        f"{folder} is {what}; give the original checkpoint: 16 or 32 bits, "
        f"or one of {', '.join(READ_METHODS)}"
    )


def _block_size(folder: Path, stated: Mapping[str, Any]) -> tuple[int, int]:
    size = stated.get("weight_block_size")
    if size is None:
        return DEFAULT_BLOCK
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(type(n) is int and 0 < n < 2**31 for n in size)
    ):
        raise CheckpointError(
            f"{folder / 'config.json'}: weight_block_size is {brief(size)}, two positive integers "
            f"are allowed; correct it"
        )
    return size[0], size[1]


def _pair(
    folder: Path, home: Mapping[str, Header], block: tuple[int, int]
) -> dict[str, LogicalTensor]:
    entries: dict[str, Entry] = {name: header.entries[name] for name, header in home.items()}
    try:
        return logical_tensors(entries, block)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


# --- which tensor is where ----------------------------------------------------------------------


def homes(folder: Path, shards: Iterable[Header]) -> dict[str, Header]:
    """Stored name -> the header of its file, in file order. CheckpointError if two files hold a tensor,
    or none does."""
    home: dict[str, Header] = {}
    for header in shards:
        for name in header.entries:
            if name in home:
                raise CheckpointError(
                    f"tensor {brief(name)} is in {home[name].path} and in {header.path}; "
                    f"keep one of them"
                )
            home[name] = header
    if not home:
        raise CheckpointError(f"{folder} holds files without any tensor; download it again")
    return home


def _check_weight_map(
    folder: Path, weight_map: Mapping[str, str], home: Mapping[str, Header]
) -> None:
    for name, shard in weight_map.items():
        if name not in home or home[name].path != folder / shard:
            raise CheckpointError(
                f"the index of {folder} places {brief(name)} in {brief(shard)}, which does not "
                f"hold it; download index and shards again, from one revision"
            )


def _fingerprint(folder: Path, config: bytes, files: WeightFiles, shards: Iterable[Header]) -> str:
    """SHA-256 of length-prefixed fields, so that no two sources give the same bytes."""
    digest = hashlib.sha256()
    for field in (config, files.index_text):
        digest.update(len(field).to_bytes(8, "little") + field)
    for header in shards:
        name = os.fsencode(header.path.relative_to(folder))
        digest.update(len(name).to_bytes(8, "little") + name)
        digest.update(header.file_bytes.to_bytes(8, "little") + bytes.fromhex(header.sha256))
    return digest.hexdigest()


# --- contents -----------------------------------------------------------------------------------


def _check_finite(path: Path, name: str, value: torch.Tensor, first_row: int) -> None:
    """CheckpointError if `value` holds NaN or Inf. Either makes the sum not finite; a sum can
    also overflow by itself, so the exact test follows, which takes 60 times as long (measured)."""
    if not (value.is_floating_point() or value.is_complex()) or value.sum().isfinite():
        return
    bad = ~value.isfinite()
    n_bad = int(bad.sum())
    if n_bad:
        row = first_row + int(
            bad.reshape(bad.shape[0] if bad.ndim else 1, -1).any(1).int().argmax()
        )
        raise CheckpointError(
            f"{path}: tensor {name!r} holds NaN or Inf ({n_bad} of {value.numel()} values, the "
            f"first in row {row}); repair it or download the checkpoint again"
        )
