"""Tensors on their way to a file, in row chunks: checked against the plan, read again if need be."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import torch

from ..quant.errors import CheckpointError
from ..quant.format import PartSpec

# A tensor on its way to a file: its name and its bytes as row chunks in order. Coding reads them twice:
# what can be iterated only once is kept until then.
Chunked = tuple[str, Iterable[torch.Tensor]]
KEPT_BYTES = 128 << 20  # of such chunks in memory; more go to a file


def crc32c(tensor: torch.Tensor) -> str:
    """CRC32C of a tensor's bytes in row-major order, 8 hex digits."""
    return f"{google_crc32c.value(bytes_of(tensor)):08x}"


def bytes_of(tensor: torch.Tensor) -> Any:
    """Row-major bytes as a uint8 numpy array (zero-copy for contiguous CPU tensors)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def checked(name: str, chunks: Iterable[torch.Tensor], spec: PartSpec) -> Iterable[torch.Tensor]:
    """`chunks`, which must have the planned dtype and size together; as often as they can be read."""
    once = iter(chunks) is chunks

    def read() -> Iterator[torch.Tensor]:
        n_bytes = 0
        for chunk in chunks:
            if chunk.dtype != spec.dtype:
                raise CheckpointError(f"{name}: planned {spec.dtype}, computed {chunk.dtype}")
            n_bytes += chunk.numel() * chunk.element_size()
            yield chunk
        if n_bytes != spec.n_bytes:
            raise CheckpointError(f"{name}: planned {spec.n_bytes} bytes, computed {n_bytes}")

    return read() if once else _Repeated(read)


class _Repeated:
    """Iterates over `make()` each time."""

    def __init__(self, make: Callable[[], Iterator[torch.Tensor]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self._make()


def repeatable(
    chunks: Iterable[torch.Tensor], spec: PartSpec, folder: Path
) -> Iterable[torch.Tensor]:
    """Chunks that can be read twice: kept in memory if they are small, else in a nameless file."""
    if spec.n_bytes <= KEPT_BYTES:
        return list(chunks)
    if iter(chunks) is not chunks:
        return chunks
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - gone when it is not needed any more
    for chunk in chunks:
        file.write(bytes_of(chunk))

    def replay() -> Iterator[torch.Tensor]:
        file.seek(0)
        while data := bytearray(file.read(KEPT_BYTES)):
            yield torch.frombuffer(data, dtype=spec.dtype)

    return _Repeated(replay)
