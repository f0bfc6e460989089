"""Coded tensors among the entries of safetensors files: found by name, opened, decoded when asked for.

    file     model.layers.0.mlp.up_proj.weight.rans32.{raw, words, state, index, crc, freq, head}
    logical  model.layers.0.mlp.up_proj.weight                bfloat16 [1024, 256], 10.6 bits

What a coded tensor is, its `head` says, so no configuration is needed to read one. Finding them reads
names and heads; nothing is decoded before it is used. The codecs are in `quant/codecs/`: `rans32` for
all, `dictionary` for parts of ternary weights that are smaller in it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from ..quant.codecs import coded, dictionary
from ..quant.codecs.chunks import Damage
from ..quant.codecs.coded import CodedTensor
from ..quant.errors import CheckpointError
from .safetensors_file import Entry, Header, map_entries, read_entry

Facts = tuple[torch.dtype, tuple[int, ...]]


class Coded(Protocol):
    """A coded tensor with its planes. All methods raise CheckpointError for damage, by name."""

    def decode(self) -> torch.Tensor:
        """The tensor."""
        ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the leading axis."""
        ...

    def verify(self) -> None:
        """Decode all, keep nothing."""
        ...


@dataclass(frozen=True)
class DictionaryTensor:
    """A part of a ternary weight, coded by `dictionary`."""

    name: str
    planes: Mapping[str, torch.Tensor]

    def decode(self) -> torch.Tensor:
        """See `Coded`."""
        try:
            return dictionary.decode_part(self.planes)
        except Damage as damage:
            raise _damaged(self.name, damage) from damage

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """See `Coded`; such parts are small, so all of it is decoded."""
        return self.decode()[start:stop]

    def verify(self) -> None:
        """See `Coded`."""
        self.decode()


@dataclass(frozen=True)
class _Codec:
    """suffix: between the tensor's name and the plane's. facts: what a head says, dtype and shape."""

    suffix: str
    planes: tuple[str, ...]
    facts: Callable[[str, bytes], Facts]
    open: Callable[[str, Mapping[str, torch.Tensor]], Coded]


def _rans32_facts(name: str, data: bytes) -> Facts:
    head = coded.parse_head(name, data)
    return head.dtype, head.shape


def _dictionary_facts(name: str, data: bytes) -> Facts:
    try:
        return torch.uint8, dictionary.parse_head(data)[0]
    except Damage as damage:
        raise _damaged(name, damage) from damage


def _damaged(name: str, damage: Damage) -> CheckpointError:
    return CheckpointError(f"{name}: {damage.reason}; it is damaged: fetch or quantize again")


_CODECS = {
    "rans32": _Codec(coded.SUFFIX, coded.PLANES, _rans32_facts, CodedTensor.open),
    "dictionary": _Codec(dictionary.SUFFIX, dictionary.PLANES, _dictionary_facts, DictionaryTensor),
}
PLANE_NAMES = tuple(f"{c.suffix[1:]}{plane}" for c in _CODECS.values() for plane in c.planes)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the rest of fewbit sees it: `dtype` and `shape` are those of its contents.

    n_bytes: on disk. codec: by which it must be decoded, None if it is plain.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    n_bytes: int
    codec: str | None = None

    @property
    def coded(self) -> bool:
        """Whether it must be decoded."""
        return self.codec is not None


def split_name(name: str) -> tuple[str, str, str] | None:
    """(tensor, codec, plane) if `name` is a plane of a coded tensor."""
    for key, codec in _CODECS.items():
        tensor, separator, plane = name.rpartition(codec.suffix)
        if separator and tensor and plane in codec.planes:
            return tensor, key, plane
    return None


def logical_name(name: str) -> str:
    """The tensor that a stored one is, or is a plane of."""
    split = split_name(name)
    return split[0] if split else name


def stored_tensors(headers: tuple[Header, ...]) -> dict[str, StoredTensor]:
    """All tensors of these files by their logical names, in file order.

    CheckpointError: a plane is missing, not bytes, or a head is damaged; a name appears twice.
    """
    found: dict[str, StoredTensor] = {}
    planes: dict[tuple[str, str], dict[str, tuple[Header, Entry]]] = {}
    for header in headers:
        for name, entry in header.entries.items():
            split = split_name(name)
            if split is not None:
                planes.setdefault(split[:2], {})[split[2]] = (header, entry)
            else:
                size = entry.end - entry.begin
                found[name] = StoredTensor(name, entry.dtype, entry.shape, size)
    for (name, codec), members in planes.items():
        if name in found:
            raise CheckpointError(
                f"{next(iter(members.values()))[0].path}: {name} is stored twice, plainly or coded; "
                f"fetch or quantize again"
            )
        found[name] = _coded(name, codec, members)
    return found


def _coded(name: str, codec: str, members: Mapping[str, tuple[Header, Entry]]) -> StoredTensor:
    path = next(iter(members.values()))[0].path
    for plane in _CODECS[codec].planes:
        if plane not in members:
            raise CheckpointError(
                f"{path}: {name}{_CODECS[codec].suffix}{plane} is missing, a plane of a coded tensor; "
                f"fetch or quantize again"
            )
        entry = members[plane][1]
        if entry.dtype != torch.uint8 or len(entry.shape) != 1:
            raise CheckpointError(
                f"{path}: {entry.name} must be uint8 with one axis, got {entry.dtype} "
                f"{list(entry.shape)}; fetch or quantize again"
            )
    header, entry = members["head"]
    try:
        dtype, shape = _CODECS[codec].facts(name, read_entry(header, entry.name).numpy().tobytes())
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    size = sum(entry.end - entry.begin for _, entry in members.values())
    return StoredTensor(name, dtype, shape, size, codec)


class DecodedTensors(Mapping[str, torch.Tensor]):
    """Contents by logical name: plain tensors as views of the mapped files, coded ones decoded anew at
    each access, into memory of their own. CheckpointError naming tensor and chunk if damaged."""

    def __init__(self, headers: tuple[Header, ...], tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._mapped = {n: t for header in headers for n, t in map_entries(header).items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        return self.coded(name).decode() if tensor.coded else self._mapped[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def stored(self, name: str) -> StoredTensor | None:
        """Facts of the tensor `name`, None if there is none."""
        return self._tensors.get(name)

    def coded(self, name: str) -> Coded:
        """The coded tensor `name`, its planes mapped."""
        codec = self._tensors[name].codec
        if codec is None:
            raise ValueError(f"{name} is not coded")
        return open_coded(name, codec, self._mapped)


def open_coded(name: str, codec: str, tensors: Mapping[str, torch.Tensor]) -> Coded:
    """The coded tensor `name` from stored tensors by their names in the files."""
    found = _CODECS[codec]
    return found.open(
        name, {plane: tensors[f"{name}{found.suffix}{plane}"] for plane in found.planes}
    )
