"""The plan of an output: units, the shards that they fill, and room for the header of each shard.

    header   8 bytes of length, then JSON {name: {"dtype", "shape", "data_offsets"}}, space-padded

A header is written last but stands first, so its length is planned: exact for tensors that are stored
as they are, a bound for those that are coded, whose sizes nobody knows before.
"""

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..quant.codecs.coded import PLANES, SUFFIX, codable
from ..quant.codecs.encoder import MIN_ELEMENTS
from ..quant.format import PartSpec
from .safetensors_file import DTYPES

SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.partial)?")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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


def index_of(stored: Iterable[tuple[str, Stored]]) -> dict[str, Any]:
    """The index of several shards, from (file name, tensor) of everything written."""
    found = sorted(stored, key=lambda item: item[1].name)
    return {
        "metadata": {"total_size": sum(item.end - item.begin for _, item in found)},
        "weight_map": {item.name: shard for shard, item in found},
    }


def header_bytes(tensors: Sequence[Stored], space: int) -> bytes:
    """Length field and header, `space` bytes long."""
    return struct.pack("<Q", space) + header_json(tensors).ljust(space)


def header_json(tensors: Sequence[Stored]) -> bytes:
    """The header without padding."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for item in tensors:
        entries[item.name] = {
            "dtype": item.dtype,
            "shape": list(item.shape),
            "data_offsets": [item.begin, item.end],
        }
    return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()


def planned_header_bytes(units: Sequence[UnitPlan], lossless: bool) -> int:
    """Length of the header, a multiple of 8, as large as the plan can make it."""
    tensors, offset = [], 0
    total = sum(unit.n_bytes for unit in units)
    for unit in units:
        for name, spec in unit.tensors.items():
            end = offset + spec.n_bytes
            if lossless and may_be_coded(spec):
                bound = Stored("", "U8", (spec.n_bytes,), total, total, "")  # of each number
                tensors += [replace(bound, name=f"{name}{SUFFIX}{plane}") for plane in PLANES]
            else:
                tensors.append(Stored(name, DTYPE_NAMES[spec.dtype], spec.shape, offset, end, ""))
            offset = end
    return -(-len(header_json(tensors)) // 8) * 8


def may_be_coded(spec: PartSpec) -> bool:
    """Whether coding such a tensor is tried."""
    return math.prod(spec.shape) >= MIN_ELEMENTS and codable(spec.dtype)
