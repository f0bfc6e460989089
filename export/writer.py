"""Writes a checkpoint unit by unit, so that a kill at any moment loses at most one unit.

A *unit* is a decoder block, or a run of tensors; its stored tensors are known by name, dtype and
size before the first one is computed. Units fill shards in order:

    model-00001-of-00002.safetensors.partial
    ┌ 8 bytes ┬ header, space-padded to its planned size ┬ unit 0 │ unit 1 │ … ┐
      written last, when the shard is complete             fsync after each unit

then fsync, then rename to `model-00001-of-00002.safetensors`. A shard file is whole or absent.

Each finished unit and each closed shard is noted in the journal (`journal.py`). Resuming cuts the open
shard back to the end of the last finished unit.

Nothing here decides what is quantized, and nothing here writes `config.json`: that comes last, after
`verify` has read every byte back.
"""

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import google_crc32c
import torch

from ..quant.errors import CheckpointError
from ..quant.format import PartSpec
from .journal import JOURNAL, Journal, named_os_errors, sync_folder
from .safetensors_file import DTYPES

SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.partial)?")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# A tensor on its way to a file: its name and its bytes as row chunks in order.
Chunked = tuple[str, Iterable[torch.Tensor]]


@dataclass(frozen=True)
class UnitPlan:
    """One unit: its name and its stored tensors, in writing order."""

    name: str
    tensors: Mapping[str, PartSpec]

    @property
    def n_bytes(self) -> int:
        """Bytes that the unit will store."""
        return sum(spec.n_bytes for spec in self.tensors.values())


@dataclass(frozen=True)
class Stored:
    """Where a finished tensor lies: shard index, bytes relative to the data section, CRC32C."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    crc32c: str

    def to_json(self) -> list[Any]:
        """Journal form."""
        return [self.name, self.dtype, list(self.shape), self.begin, self.end, self.crc32c]


def crc32c(tensor: torch.Tensor) -> str:
    """CRC32C of a tensor's bytes in row-major order, 8 hex digits."""
    return f"{google_crc32c.value(_bytes_of(tensor)):08x}"


def _bytes_of(tensor: torch.Tensor) -> Any:
    """Row-major bytes as a uint8 numpy array (zero-copy for contiguous CPU tensors)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def plan_shards(units: Sequence[UnitPlan], max_bytes: int) -> list[list[int]]:
    """Unit indices of each shard: as many whole units as fit in `max_bytes`, at least one."""
    shards: list[list[int]] = [[]]
    filled = 0
    for index, unit in enumerate(units):
        if shards[-1] and filled + unit.n_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(index)
        filled += unit.n_bytes
    return shards


def shard_names(n_shards: int) -> list[str]:
    """File names in the hub's convention."""
    if n_shards == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors" for i in range(n_shards)]


def _header_json(tensors: Sequence[Stored]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for item in tensors:
        entries[item.name] = {
            "dtype": item.dtype,
            "shape": list(item.shape),
            "data_offsets": [item.begin, item.end],
        }
    return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()


def _planned_header_bytes(units: Sequence[UnitPlan]) -> int:
    """Length of the header, a multiple of 8, as large as the plan can make it."""
    tensors, offset = [], 0
    for unit in units:
        for name, spec in unit.tensors.items():
            end = offset + spec.n_bytes
            tensors.append(Stored(name, _DTYPE_NAMES[spec.dtype], spec.shape, offset, end, ""))
            offset = end
    return -(-len(_header_json(tensors)) // 8) * 8


class CheckpointWriter:
    """Fills shards of `folder` with `units`; resumes from the journal that lies there.

    identity: everything that decides the bytes (recipe, source, calibration, seed, environment).
    A journal of another identity is refused by naming the first difference.
    """

    def __init__(
        self, folder: Path, units: Sequence[UnitPlan], identity: dict[str, Any], max_bytes: int
    ) -> None:
        self.folder = folder
        self.units = list(units)
        self.shards = plan_shards(self.units, max_bytes)
        self.names = shard_names(len(self.shards))
        self.finished: list[list[Stored]] = []
        self.rows: list[Any] = []
        self.identity = identity
        self._journal = Journal(folder / JOURNAL)
        self._data: IO[bytes] | None = None
        self._pending: list[Stored] = []
        self._closed = 0

    # -- opening and resuming -------------------------------------------------------------------

    def open(self) -> int:
        """Create or resume; returns how many units are finished already."""
        with named_os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._journal.open()
            events = self._journal.events
            if not events:
                self._refuse_strangers()
                self._journal.append({"event": "run", "identity": self.identity})
            else:
                self._resume(events)
            self._close_full_shards()
        return len(self.finished)

    def _refuse_strangers(self) -> None:
        for path in self.folder.iterdir():
            if SHARD_NAME.fullmatch(path.name):
                raise CheckpointError(
                    f"{self.folder} holds {path.name} but no journal of an unfinished run; choose "
                    f"another output folder, or discard it with --restart"
                )

    def _resume(self, events: list[dict[str, Any]]) -> None:
        try:
            self._compare_identity(events[0]["identity"])
            for event in events[1:]:
                if event["event"] == "unit":
                    self.finished.append([Stored(n, d, tuple(s), b, e, c) for n, d, s, b, e, c
                                          in event["tensors"]])  # fmt: skip
                    self.rows.append(event["rows"])
                elif event["event"] == "shard":
                    self._closed += 1
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self._journal.path}: not a journal of this version ({error!r}); use --restart"
            ) from error
        self._cut_back()

    def _compare_identity(self, found: dict[str, Any]) -> None:
        difference = _difference("", found, self.identity)
        if difference is not None:
            raise CheckpointError(
                f"{self.folder} holds an unfinished run with another {difference}; repeat the "
                f"original command, choose another folder, or discard it with --restart"
            )

    def _cut_back(self) -> None:
        """Bring the files to the state that the journal describes."""
        done = len(self.finished)
        for index, members in enumerate(self.shards):
            final = self.folder / self.names[index]
            partial = final.with_name(final.name + ".partial")
            inside = [unit for unit in members if unit < done]
            if index < self._closed:
                if not final.is_file():
                    raise CheckpointError(f"{final} is missing, the journal says it is complete")
                continue
            if final.is_file():  # killed between the rename and its journal line
                os.replace(final, partial)
            if not inside:
                partial.unlink(missing_ok=True)
                continue
            end = self._data_start(index) + self._end(index)
            if not partial.is_file() or partial.stat().st_size < end:
                raise CheckpointError(
                    f"{partial} is shorter than the journal says; start over with --restart"
                )
            os.truncate(partial, end)

    def _data_start(self, shard: int) -> int:
        return 8 + _planned_header_bytes([self.units[unit] for unit in self.shards[shard]])

    # -- writing --------------------------------------------------------------------------------

    def write_unit(self, tensors: Iterable[Chunked], rows: list[Any]) -> None:
        """Write the next unit's tensors, in plan order; `rows` (JSON) is filled by the time the
        iteration ends and is kept in the journal. Durable on return."""
        with named_os_errors(self.folder):
            self._write_unit(tensors, rows)

    def _write_unit(self, tensors: Iterable[Chunked], rows: list[Any]) -> None:
        index = len(self.finished)
        plan = self.units[index]
        expected = iter(plan.tensors.items())
        self._pending = []
        data = self._open_shard(self._shard_of(index))
        for name, chunks in tensors:
            self._write_tensor(data, name, chunks, next(expected, None))
        missing = next(expected, None)
        if missing is not None:
            raise CheckpointError(f"unit {plan.name}: {missing[0]} was planned but not written")
        data.flush()
        os.fsync(data.fileno())
        self._journal.append({
            "event": "unit", "name": plan.name, "rows": rows,
            "tensors": [item.to_json() for item in self._pending],
        })  # fmt: skip
        self.finished.append(self._pending)
        self.rows.append(rows)
        self._close_full_shards()

    def _write_tensor(
        self,
        data: IO[bytes],
        name: str,
        chunks: Iterable[torch.Tensor],
        planned: tuple[str, PartSpec] | None,
    ) -> None:
        if planned is None or planned[0] != name:
            raise CheckpointError(f"{name}: written out of plan, expected {planned}")
        spec, checksum, written = planned[1], 0, 0
        for chunk in chunks:
            if chunk.dtype != spec.dtype:
                raise CheckpointError(f"{name}: planned {spec.dtype}, computed {chunk.dtype}")
            as_bytes = _bytes_of(chunk)
            checksum = google_crc32c.extend(checksum, as_bytes)
            written += data.write(as_bytes)
        if written != spec.n_bytes:
            raise CheckpointError(f"{name}: planned {spec.n_bytes} bytes, computed {written}")
        begin = self._pending[-1].end if self._pending else self._end(self._closed)
        self._pending.append(
            Stored(
                name,
                _DTYPE_NAMES[spec.dtype],
                spec.shape,
                begin,
                begin + written,
                f"{checksum:08x}",
            )
        )

    def _end(self, shard: int) -> int:
        """Bytes of the data section that finished units take in a shard."""
        done = [unit for unit in self.shards[shard] if unit < len(self.finished)]
        return max((item.end for unit in done for item in self.finished[unit]), default=0)

    def _shard_of(self, unit: int) -> int:
        return next(i for i, members in enumerate(self.shards) if unit in members)

    def _open_shard(self, shard: int) -> IO[bytes]:
        if self._data is None:
            path = self.folder / (self.names[shard] + ".partial")
            self._data = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
            self._data.seek(self._data_start(shard) + self._end(shard))
            self._data.truncate()
        return self._data

    def _close_full_shards(self) -> None:
        """Close shards whose units are all finished (a kill can leave one open)."""
        while self._closed < len(self.shards) and self._is_full(self._closed):
            self._close_shard(self._closed)

    def _is_full(self, shard: int) -> bool:
        return not self.shards[shard] or self.shards[shard][-1] < len(self.finished)

    def _close_shard(self, shard: int) -> None:
        """Write the header, make the file durable, rename it, note it in the journal."""
        data = self._open_shard(shard)
        data.seek(0)
        data.write(self._header(shard))
        data.flush()
        os.fsync(data.fileno())
        data.close()
        self._data = None
        final = self.folder / self.names[shard]
        os.replace(final.with_name(final.name + ".partial"), final)
        sync_folder(self.folder)
        self._journal.append({"event": "shard", "name": final.name})
        self._closed += 1

    def _header(self, shard: int) -> bytes:
        """Length field and header of a full shard."""
        tensors = [item for unit in self.shards[shard] for item in self.finished[unit]]
        space = self._data_start(shard) - 8
        return struct.pack("<Q", space) + _header_json(tensors).ljust(space)

    def header_checksums(self) -> dict[str, int]:
        """CRC32C that the length field and header of each complete shard must have."""
        return {
            name: int(google_crc32c.value(self._header(shard)))
            for shard, name in enumerate(self.names)
        }

    def stored(self) -> Iterator[tuple[str, Stored]]:
        """(shard file name, tensor) of everything written."""
        for shard, members in enumerate(self.shards):
            for unit in members:
                for item in self.finished[unit]:
                    yield self.names[shard], item

    def read_back(self, unit: int, name: str) -> torch.Tensor:
        """A finished unit's tensor, from the complete or partial shard; its checksum is compared."""
        item = next(item for item in self.finished[unit] if item.name == name)
        shard = self._shard_of(unit)
        final = self.folder / self.names[shard]
        path = final if shard < self._closed else final.with_name(final.name + ".partial")
        with open(path, "rb") as file:
            file.seek(self._data_start(shard) + item.begin)
            data = bytearray(file.read(item.end - item.begin))
        if f"{google_crc32c.value(bytes(data)):08x}" != item.crc32c:
            raise CheckpointError(
                f"{path}: {name} is damaged (checksum differs); start over with --restart"
            )
        spec = self.units[unit].tensors[name]
        return torch.frombuffer(data, dtype=torch.uint8).view(spec.dtype).view(spec.shape)

    def note_extras(self, names: Sequence[str]) -> None:
        """Note files that are about to be copied into the folder, so that they are known as ours."""
        event = {"event": "extras", "names": list(names)}
        if names and event not in self._journal.events:
            with named_os_errors(self.folder):
                self._journal.append(event)

    def finish(self) -> None:
        """Remove the journal: the checkpoint is complete."""
        with named_os_errors(self.folder):
            self._journal.path.unlink(missing_ok=True)
            sync_folder(self.folder)
        self.abandon()

    def abandon(self) -> None:
        """Close files without removing anything, so that a later run resumes."""
        if self._data is not None:
            with suppress(OSError):  # of a full disk: bytes that no journal line speaks of
                self._data.close()
            self._data = None
        self._journal.close()


def extras_in(events: Iterable[Mapping[str, Any]]) -> set[str]:
    """File names that `extras` events of a journal speak of; what is no plain name is left out."""
    found: set[str] = set()
    for event in events:
        names = event.get("names") if event.get("event") == "extras" else None
        if isinstance(names, list):
            found |= {name for name in names if is_plain_name(name)}
    return found


def is_plain_name(name: Any) -> bool:
    """Whether this names a file in the folder itself, and not the journal, which is the lock."""
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..", JOURNAL)


def _difference(where: str, found: Any, wanted: Any) -> str | None:
    """`key.subkey: found, now wanted` for the first difference of two JSON trees, None if equal."""
    if found == wanted:
        return None
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys(), key=_telling_first):
            inner = _difference(f"{where}.{key}", found.get(key), wanted.get(key))
            if inner is not None:
                return inner
    return f"{where.lstrip('.')}: {_short(found)}, now {_short(wanted)}"


def _telling_first(key: str) -> tuple[bool, str]:
    """Another recipe brings other calibration and environment with it, so it is named first."""
    return key not in ("recipe", "name"), key


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
