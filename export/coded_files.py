"""Coded tensors among the entries of safetensors files: found by name, opened, decoded when asked for.

    file     model.layers.0.mlp.up_proj.weight.rans32.{raw, words, state, index, crc, freq, head}
    logical  model.layers.0.mlp.up_proj.weight                bfloat16 [1024, 256], 10.6 bits

What a coded tensor is, its `head` says, so no configuration is needed to read one. Finding them reads
names and heads; nothing is decoded before it is used. The coding itself is in `quant/codecs/`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..quant.codecs.coded import PLANES, SUFFIX, CodedTensor, Head, parse_head
from ..quant.errors import CheckpointError
from .safetensors_file import Entry, Header, map_entries, read_entry


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the rest of fewbit sees it: `dtype` and `shape` are those of its contents.

    n_bytes: on disk. files: names of what stands for it in the files, its own name if it is plain.
    head: of a coded one.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    n_bytes: int
    files: tuple[str, ...]
    head: Head | None = None

    @property
    def coded(self) -> bool:
        """Whether it must be decoded."""
        return self.head is not None


def split_name(name: str) -> tuple[str, str] | None:
    """(tensor, plane) if `name` is a plane of a coded tensor."""
    tensor, separator, plane = name.rpartition(SUFFIX)
    return (tensor, plane) if separator and tensor and plane in PLANES else None


def stored_tensors(headers: tuple[Header, ...]) -> dict[str, StoredTensor]:
    """All tensors of these files by their logical names, in file order.

    CheckpointError: a plane is missing, not bytes, or a head is damaged; a name appears twice.
    """
    found: dict[str, StoredTensor] = {}
    planes: dict[str, dict[str, tuple[Header, Entry]]] = {}
    for header in headers:
        for name, entry in header.entries.items():
            split = split_name(name)
            if split is not None:
                planes.setdefault(split[0], {})[split[1]] = (header, entry)
            else:
                size = entry.end - entry.begin
                found[name] = StoredTensor(name, entry.dtype, entry.shape, size, (name,))
    for name, members in planes.items():
        if name in found:
            raise CheckpointError(
                f"{next(iter(members.values()))[0].path}: {name} is stored both plainly and coded; "
                f"fetch or quantize again"
            )
        found[name] = _coded(name, members)
    return found


def _coded(name: str, members: Mapping[str, tuple[Header, Entry]]) -> StoredTensor:
    path = next(iter(members.values()))[0].path
    for plane in PLANES:
        if plane not in members:
            raise CheckpointError(
                f"{path}: {name}{SUFFIX}{plane} is missing, a plane of a coded tensor; "
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
        head = parse_head(name, read_entry(header, entry.name).numpy().tobytes())
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    size = sum(entry.end - entry.begin for _, entry in members.values())
    return StoredTensor(
        name, head.dtype, head.shape, size, tuple(members[p][1].name for p in PLANES), head
    )


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

    def coded(self, name: str) -> CodedTensor:
        """The coded tensor `name`, its planes mapped."""
        return open_coded(name, self._mapped)


def open_coded(name: str, tensors: Mapping[str, torch.Tensor]) -> CodedTensor:
    """The coded tensor `name` from stored tensors by their names in the files."""
    return CodedTensor.open(name, {plane: tensors[f"{name}{SUFFIX}{plane}"] for plane in PLANES})
