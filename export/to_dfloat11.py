"""Writes a DFloat11 checkpoint folder from a dense bf16 one, in the layout of published releases.

    model_layers_0.safetensors       the six tensors of unit `model.layers.0` (q, k, v, o, gate, up,
                                     down in one stream), and the layer's norms and biases as they are
    lm_head.safetensors              units of one weight each, unless the two are tied: a tied embedding
    model_embed_tokens.safetensors   stays as it is in model.safetensors, and lm_head is not stored
    model.safetensors                what belongs to no unit
    config.json                      + dfloat11_config {version, threads_per_block, bytes_per_thread,
                                     pattern_dict: module pattern -> its weights in stream order}

Weights are read in slabs, coded straight into the file, then decoded from it and compared bit by bit:
memory holds the code stream of one unit and maps its file. A file gets its name when it is complete and
durable, then its line in the journal; an interrupted run goes on with the files that have none.
config.json comes last: a folder without it is unfinished.

A unit that the format or its published decoder cannot take stays dense in the same file, which that
decoder reads too, and `Summary.raw_units` says why: exponents from 240 on, a code of more than 17
tables, or a block of more elements than fit into 48 KiB of a GPU's shared memory, which is all that
the published decoder asks for (weights that are nearly all zero). Tensors of other dtypes than bf16 are
refused where they would have to be coded, and stored as they are elsewhere. Shapes, which the format
leaves to the model's code, are noted in each file's metadata too.

Not here: which tensors make a unit (`dfloat11_plan.py`), the streams (`dfloat11_encoder.py`), quantized
checkpoints.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..quant.errors import CheckpointError
from .claimed import claimed
from .dfloat11 import decode_range, engine, open_unit
from .dfloat11_code import Bytes, Shorts, Unfit
from .dfloat11_encoder import UnitEncoder
from .dfloat11_plan import Described, Plan, Source, bits_of, make_plan, stem_of
from .journal import Journal, sync_folder, write_atomic
from .safetensors_file import DTYPES
from .writeback import Writeback

VERSION = "0.5.0"  # of the compressor whose layout this is
SHAPES = "fewbit_shapes"  # key of a file's metadata
SHARED_BYTES = 48 * 1024
SLAB_BYTES = 1 << 20  # little enough to stay in the processor's cache, and to get used memory
BAND = 64  # rows that a coded source decodes together
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_OTHER_ENCODINGS = ("quantization_config", "compression_config", "dfloat11_config")

Progress = Callable[[str, int, int], None]  # a file's name, files done, files in all
Writing = Callable[[int, int], Iterator[int]]  # file, place in it -> numbers of bytes written


@dataclass(frozen=True)
class FileFacts:
    """A finished file. module: of its unit, if it has one. raw: why that stays dense, if it does.

    n_coded: elements of a coded unit. coded_bytes: what they take. n_bytes: of the file.
    """

    name: str
    n_bytes: int
    module: str | None = None
    raw: str | None = None
    n_coded: int = 0
    coded_bytes: int = 0


@dataclass(frozen=True)
class Summary:
    """files: as they were finished. dropped: tied heads, which are not stored. extras: other files.

    source_bytes: of all tensors.
    """

    files: tuple[FileFacts, ...]
    dropped: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    source_bytes: int = 0

    @property
    def raw_units(self) -> dict[str, str]:
        """Module -> why it stays dense."""
        return {f.module: f.raw for f in self.files if f.module and f.raw is not None}

    @property
    def coded_units(self) -> int:
        """Units that are coded."""
        return sum(f.n_coded > 0 for f in self.files)

    @property
    def coded_elements(self) -> int:
        """Weights in them."""
        return sum(f.n_coded for f in self.files)

    @property
    def stored_bytes(self) -> int:
        """Of all files with tensors, headers included."""
        return sum(f.n_bytes for f in self.files)

    @property
    def bits_per_weight(self) -> float:
        """Of coded units, tables and indexes included; 16 without any."""
        coded = sum(f.coded_bytes for f in self.files)
        return 8 * coded / self.coded_elements if self.coded_elements else 16.0


@dataclass(frozen=True)
class _Item:
    """A tensor of a file. rank: items with a lower one are written first, wherever they lie."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    write: Writing
    rank: int = 1

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_dfloat11(
    source: Source, out: Path, progress: Progress | None = None, identity: str = ""
) -> Summary:
    """Write `source` to the folder `out`, which is new, empty, or holds an unfinished export of it.

    identity: a text that no source of other contents has. CheckpointError: `out` holds something
    else, no decoder layers were found, a weight is not bf16, or a disk error.
    """
    plan = make_plan(source)
    claim = {"export": "dfloat11", "from": identity, "plan": _digest(source, plan)}
    with claimed(out, claim) as journal:
        files = _write_files(source, plan, out, journal, progress)
        for path in source.extra_files:
            write_atomic(out / path.name, path.read_bytes())
        write_atomic(out / "config.json", _config(source.config, plan).encode())
    extras = tuple(path.name for path in source.extra_files)
    source_bytes = sum(math.prod(t.shape) * t.dtype.itemsize for t in source.tensors.values())
    return Summary(tuple(files), plan.dropped, extras, source_bytes)


# --- resuming -------------------------------------------------------------------------------------


def _digest(source: Source, plan: Plan) -> str:
    facts = [[name, list(t.shape), str(t.dtype)] for name, t in source.tensors.items()]
    text = json.dumps([VERSION, facts, plan.files, plan.units, dict(source.config)])
    return hashlib.sha256(text.encode()).hexdigest()


def _finished(journal: Journal, out: Path) -> dict[str, FileFacts]:
    """Files that need not be written again."""
    try:
        found = [FileFacts(**e["facts"]) for e in journal.events if e["event"] == "file"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{journal.path}: not a journal of this version ({error!r}); remove {out}"
        ) from error
    return {
        facts.name: facts
        for facts in found
        if (out / facts.name).is_file() and (out / facts.name).stat().st_size == facts.n_bytes
    }


# --- one file -------------------------------------------------------------------------------------


def _write_files(
    source: Source, plan: Plan, out: Path, journal: Journal, progress: Progress | None
) -> list[FileFacts]:
    finished = _finished(journal, out)
    modules = {stem_of(module): module for module in plan.units}
    files = []
    for stem, names in plan.files.items():
        facts = finished.get(f"{stem}.safetensors")
        if facts is None:
            facts = _write_unit(source, plan, modules.get(stem), names, out / f"{stem}.safetensors")
            journal.append({"event": "file", "facts": asdict(facts)})
        files.append(facts)
        if progress is not None:
            progress(facts.name, len(files), len(plan.files))
    return files


def _write_unit(
    source: Source, plan: Plan, module: str | None, names: Sequence[str], final: Path
) -> FileFacts:
    """A file with its unit coded if that can be, and other tensors as they are."""
    plain = [_dense(source, name) for name in names]
    if module is None:
        return FileFacts(final.name, _write_file(final, plain, {}))
    weights = plan.units[module]
    try:
        unit = _Unit.count(source, module, weights)
        shapes = {name: list(source.tensors[name].shape) for name in weights}
        n_bytes = _write_file(final, [*unit.items(), *plain], {SHAPES: json.dumps(shapes)}, unit)
    except Unfit as error:
        dense = [_dense(source, name) for name in weights]
        return FileFacts(final.name, _write_file(final, dense + plain, {}), module, str(error))
    coded_bytes = sum(item.n_bytes for item in unit.items())
    return FileFacts(final.name, n_bytes, module, None, unit.encoder.n, coded_bytes)


def _write_file(
    final: Path, items: list[_Item], metadata: Mapping[str, str], unit: "_Unit | None" = None
) -> int:
    """One safetensors file, widest dtypes first, so that all are aligned; its size. Named when
    complete and, if it has a unit, compared."""
    items = sorted(items, key=lambda item: (-item.dtype.itemsize, item.name))
    head = _header(items, metadata)
    ends = np.cumsum([len(head), *(item.n_bytes for item in items)]).tolist()
    partial = final.with_name(final.name + ".partial")
    try:
        with open(partial, "w+b") as file, closing(Writeback()) as writeback:
            handle = file.fileno()
            _write_at(handle, head, 0)
            for item, at in sorted(zip(items, ends, strict=False), key=lambda pair: pair[0].rank):
                for n_bytes in item.write(handle, at):
                    writeback.wrote(handle, n_bytes)
            file.truncate(ends[-1])  # of a last tensor without elements
            if unit is not None:
                unit.compare(file, dict(zip((item.name for item in items), ends, strict=False)))
            writeback.settle()
            os.fsync(handle)
        os.replace(partial, final)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
    sync_folder(final.parent)
    return int(ends[-1])


def _header(items: Iterable[_Item], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata)}
    begin = 0
    for item in items:
        entries[item.name] = {
            "dtype": _DTYPE_NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [begin, begin + item.n_bytes],
        }
        begin += item.n_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return struct.pack("<Q", len(text)) + text


def _write_at(handle: int, data: bytes | Bytes, at: int) -> None:
    view: Any = data
    while len(view):
        n_written = os.pwrite(handle, view, at)
        view, at = view[n_written:], at + n_written


# --- slabs ----------------------------------------------------------------------------------------


def _slabs(info: Described) -> list[tuple[int, int]]:
    """Rows [start, stop) of about SLAB_BYTES, whole bands."""
    n_rows = info.shape[0] if info.shape else 1
    row_bytes = math.prod(info.shape[1:]) * info.dtype.itemsize
    step = -(-max(1, SLAB_BYTES // max(1, row_bytes)) // BAND) * BAND
    return [(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def _dense(source: Source, name: str) -> _Item:
    info = source.tensors[name]

    def write(handle: int, at: int) -> Iterator[int]:
        for start, stop in _slabs(info):
            rows = source.read(name, start, stop).contiguous().reshape(-1).view(torch.uint8)
            _write_at(handle, rows.numpy(), at)
            at += rows.numel()
            yield rows.numel()

    return _Item(name, info.dtype, tuple(info.shape), write)


# --- a unit ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Unit:
    """A module's weights, counted. split: where one ends and the next begins, int64."""

    module: str
    encoder: UnitEncoder
    split: np.ndarray[Any, np.dtype[np.int64]]
    _parts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def count(cls, source: Source, module: str, names: Sequence[str]) -> "_Unit":
        """The first of three readings. Unfit: see `UnitEncoder`."""
        places = [(name, *rows) for name in names for rows in _slabs(source.tensors[name])]
        widths = {name: math.prod(source.tensors[name].shape[1:]) for name in names}

        def fetch(index: int) -> Shorts:
            return bits_of(source.read(*places[index])).reshape(-1).numpy().view(np.uint16)

        sizes = [(stop - start) * widths[name] for name, start, stop in places]
        ends = np.cumsum([math.prod(source.tensors[name].shape) for name in names], dtype=np.int64)
        return cls(module, UnitEncoder(sizes, fetch, engine()), ends[:-1])

    def items(self) -> list[_Item]:
        """The six tensors. Signs and mantissas are written while the others are made."""
        shapes = {name: (size,) for name, size in self.encoder.sizes.items()}
        shapes["luts"] = self.encoder.code.luts.shape
        found = [
            _Item(f"{self.module}.{name}", torch.uint8, shape, self._writing(name))
            for name, shape in shapes.items()
            if name != "sign_mantissa"
        ]
        split = _Item(f"{self.module}.split_positions", torch.int64, self.split.shape,
                      lambda handle, at: _written(handle, self.split.view(np.uint8), at))  # fmt: skip
        first = _Item(f"{self.module}.sign_mantissa", torch.uint8, shapes["sign_mantissa"],
                      self._encode, rank=0)  # fmt: skip
        return [*found, split, first]

    def _writing(self, name: str) -> Writing:
        return lambda handle, at: _written(handle, self._parts[name].reshape(-1), at)

    def _encode(self, handle: int, at: int) -> Iterator[int]:
        yield from self.encoder.encode(lambda first, data: _write_at(handle, data, at + first))
        self._parts.update(self.encoder.parts())
        _check_shared_memory(self._parts["output_positions"])

    def compare(self, file: IO[bytes], places: Mapping[str, int]) -> None:
        """The third reading: what lies in the file gives the same bits."""
        place = places[f"{self.module}.sign_mantissa"]
        mapped = np.memmap(file, np.uint8, "r", place, (self.encoder.n,))
        parts = self._parts | {"sign_mantissa": mapped, "split_positions": self.split}
        stream = open_unit(parts, self.module)
        self.encoder.compare(
            stream, lambda coded, start, stop: decode_range(coded, start, stop, self.module)
        )


def _written(handle: int, data: Bytes, at: int) -> Iterator[int]:
    _write_at(handle, data, at)
    yield len(data)


def _check_shared_memory(positions: Bytes) -> None:
    largest = int(np.diff(positions.view("<u4").astype(np.int64)).max())
    needed = 512 * 4 + 4 + 2 * largest
    if needed > SHARED_BYTES:
        raise Unfit(
            f"a block of 4096 bytes holds {largest} elements, for which the published decoder "
            f"needs {needed} bytes of shared memory, {SHARED_BYTES} are allowed"
        )


# --- the rest -------------------------------------------------------------------------------------


def _config(config: Mapping[str, Any], plan: Plan) -> str:
    kept = {key: value for key, value in config.items() if key not in _OTHER_ENCODINGS}
    kept["dfloat11_config"] = {
        "version": VERSION,
        "threads_per_block": [512],
        "bytes_per_thread": 8,
        "pattern_dict": dict(plan.pattern_dict),
    }
    return json.dumps(kept, indent=2) + "\n"
