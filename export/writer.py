"""Writes a checkpoint unit by unit, so that a kill at any moment loses at most one unit.

A *unit* is a decoder block, or a run of tensors; its stored tensors are known by name, dtype and
size before the first one is computed. Units fill shards in order:

    model-00001-of-00002.safetensors.partial
    ┌ 8 bytes ┬ header, space-padded to its planned size ┬ unit 0 │ unit 1 │ … ┐
      written last, when the shard is complete             fsync after each unit

then fsync, then rename to `model-00001-of-00002.safetensors`. A shard file is whole or absent.

With `lossless`, every tensor is entropy-coded on its way (`quant/codecs/`) unless that saves too
little; how large it becomes is known afterwards, so the plan holds bounds.

Each finished unit and each closed shard is noted in the journal (`journal.py`). Resuming cuts the open
shard back to the end of the last finished unit.

Nothing here decides what is quantized, and nothing here writes `config.json`: that comes last, after
`verify` has read every byte back.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import google_crc32c
import torch

from ..quant.codecs import dictionary
from ..quant.codecs.coded import SUFFIX
from ..quant.codecs.encoder import Encoder
from ..quant.errors import CheckpointError
from ..quant.format import PartSpec
from .chunked import Chunked, bytes_of, checked, repeatable
from .coded_files import logical_name, open_coded, split_name
from .journal import JOURNAL, Journal, named_os_errors, sync_folder
from .shards import (
    DTYPE_NAMES,
    SHARD_NAME,
    Stored,
    UnitPlan,
    header_bytes,
    may_be_coded,
    plan_shards,
    planned_header_bytes,
    shard_names,
)
from .writeback import Writeback

TERNARY_BYTES = 1 << 20  # of a part of ternaries; larger ones are always smaller by rans32


class CheckpointWriter:
    """Fills shards of `folder` with `units`; resumes from the journal that lies there.

    identity: everything that decides the bytes (recipe, source, calibration, seed, environment).
    A journal of another identity is refused by naming the first difference.
    lossless: entropy-code what gets smaller by it.
    """

    def __init__(
        self,
        folder: Path,
        units: Sequence[UnitPlan],
        identity: dict[str, Any],
        max_bytes: int,
        lossless: bool = False,
    ) -> None:
        self.folder = folder
        self.units = list(units)
        self.lossless = lossless
        self.shards = plan_shards(self.units, max_bytes)
        self.names = shard_names(len(self.shards))
        self.finished: list[list[Stored]] = []
        self.rows: list[Any] = []
        self.identity = identity
        self._journal = Journal(folder / JOURNAL)
        self._data: IO[bytes] | None = None
        self._pending: list[Stored] = []
        self._closed = 0
        self._writeback = Writeback()

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
        return 8 + planned_header_bytes(
            [self.units[unit] for unit in self.shards[shard]], self.lossless
        )

    # -- writing --------------------------------------------------------------------------------

    def write_unit(
        self,
        tensors: Iterable[Chunked],
        rows: list[Any],
        amend: Callable[[Sequence[Stored]], None] | None = None,
    ) -> None:
        """Write the next unit's tensors, in plan order; `rows` (JSON) is filled by the time the
        iteration ends and is kept in the journal. Durable on return.

        amend: told what was stored, may change `rows` before they are kept."""
        with named_os_errors(self.folder):
            self._write_unit(tensors, rows, amend)

    def _write_unit(
        self,
        tensors: Iterable[Chunked],
        rows: list[Any],
        amend: Callable[[Sequence[Stored]], None] | None,
    ) -> None:
        index = len(self.finished)
        plan = self.units[index]
        expected = iter(plan.tensors.items())
        self._pending = []
        data = self._open_shard(self._shard_of(index))
        for name, chunks in tensors:
            planned = next(expected, None)
            if planned is None or planned[0] != name:
                raise CheckpointError(f"{name}: written out of plan, expected {planned}")
            if self.lossless and may_be_coded(planned[1]):
                self._write_coded(data, name, chunks, planned[1])
            else:
                self._write_tensor(data, name, checked(name, chunks, planned[1]), planned[1])
        missing = next(expected, None)
        if missing is not None:
            raise CheckpointError(f"unit {plan.name}: {missing[0]} was planned but not written")
        if amend is not None:
            amend(self._pending)
        data.flush()
        self._writeback.settle()
        os.fsync(data.fileno())
        self._journal.append({
            "event": "unit", "name": plan.name, "rows": rows,
            "tensors": [item.to_json() for item in self._pending],
        })  # fmt: skip
        self.finished.append(self._pending)
        self.rows.append(rows)
        self._close_full_shards()

    def _write_coded(
        self, data: IO[bytes], name: str, chunks: Iterable[torch.Tensor], spec: PartSpec
    ) -> None:
        """Count, then encode; write it plainly if coding would not pay."""
        chunks = repeatable(checked(name, chunks, spec), spec, self.folder)
        encoder = Encoder(spec.dtype, spec.shape, self.folder)
        for chunk in chunks:
            encoder.count(chunk)
        worth = encoder.settle()
        bound = encoder.expected_bytes if worth else spec.n_bytes
        small = spec.n_bytes <= TERNARY_BYTES
        if small and spec.ternary_columns and self._write_ternary(data, name, chunks, spec, bound):
            return
        if not worth:
            self._write_tensor(data, name, chunks, spec)
            return
        raw = (piece for chunk in chunks for piece in encoder.encode(chunk))
        self._append(data, f"{name}{SUFFIX}raw", "U8", None, raw)
        for plane, pieces in encoder.planes():
            self._append(data, f"{name}{SUFFIX}{plane}", "U8", None, pieces)

    def _write_ternary(
        self,
        data: IO[bytes],
        name: str,
        chunks: Iterable[torch.Tensor],
        spec: PartSpec,
        bound: float,
    ) -> bool:
        """Write a part of ternaries coded by `dictionary` if that takes less than `bound` bytes."""
        assert spec.ternary_columns is not None, f"{name} holds no ternaries"
        codes = torch.cat(list(chunks)).view(spec.shape)
        planes = dictionary.encode_part(codes, spec.ternary_columns)
        if sum(plane.numel() for plane in planes.values()) >= bound:
            return False
        for plane, value in planes.items():
            self._append(data, f"{name}{dictionary.SUFFIX}{plane}", "U8", None, [value])
        return True

    def _write_tensor(
        self, data: IO[bytes], name: str, chunks: Iterable[torch.Tensor], spec: PartSpec
    ) -> None:
        self._append(data, name, DTYPE_NAMES[spec.dtype], spec.shape, chunks)

    def _append(
        self,
        data: IO[bytes],
        name: str,
        dtype: str,
        shape: tuple[int, ...] | None,
        chunks: Iterable[torch.Tensor],
    ) -> None:
        """Write the bytes of one stored tensor; without `shape`, its length is found on the way."""
        checksum, written = 0, 0
        for chunk in chunks:
            as_bytes = bytes_of(chunk)
            checksum = google_crc32c.extend(checksum, as_bytes)
            written += data.write(as_bytes)
            self._writeback.wrote(data.fileno(), len(as_bytes))
        begin = self._pending[-1].end if self._pending else self._end(self._closed)
        end, found = begin + written, (written,) if shape is None else shape
        self._pending.append(Stored(name, dtype, found, begin, end, f"{checksum:08x}"))

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
        return header_bytes(tensors, space)

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
        """A finished unit's tensor, from the complete or partial shard; checksums are compared."""
        spec = self.units[unit].tensors[name]
        items = {item.name: item for item in self.finished[unit] if logical_name(item.name) == name}
        if name in items:
            return self._read_stored(unit, items[name]).view(spec.dtype).view(spec.shape)
        split = split_name(next(iter(items)))
        assert split is not None, f"{name} was stored neither plainly nor coded"
        planes = {key: self._read_stored(unit, item) for key, item in items.items()}
        return open_coded(name, split[1], planes).decode()

    def _read_stored(self, unit: int, item: Stored) -> torch.Tensor:
        """The bytes of a stored tensor, uint8."""
        shard = self._shard_of(unit)
        final = self.folder / self.names[shard]
        path = final if shard < self._closed else final.with_name(final.name + ".partial")
        with open(path, "rb") as file:
            file.seek(self._data_start(shard) + item.begin)
            data = bytearray(file.read(item.end - item.begin))
        if f"{google_crc32c.value(bytes(data)):08x}" != item.crc32c:
            raise CheckpointError(
                f"{path}: {item.name} is damaged (checksum differs); start over with --restart"
            )
        return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte()

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
        self._writeback.close()
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
