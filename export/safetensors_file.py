"""Strict reader of one safetensors file: header, rows of a tensor, memory map.

    byte  0..7            8..8+N-1                      8+N..end
          N, u64 little   header, UTF-8 JSON object     tensor data, contiguous, no holes
          ^------------ header_bytes ------------^

    header: {"__metadata__": {text: text}, name: {"dtype", "shape", "data_offsets": [begin, end]}}

`read_header` proves that every byte of the file belongs to exactly one tensor, so that whatever it
accepts can be read without further checks. All that can be wrong with the bytes of a file ends in
a `CheckpointError` that names the file, what was found and what to do; no other exception leaves
this module for any content.

Rows are read with `preadv` into memory of their own instead of being mapped: pages of a mapped
file stay counted as ours until the kernel wants them back, and a file that shrinks under a map
kills the process. `map_entries` is for loading, where sharing pages is the aim.

Not done here: writing, several files (`checkpoint.py`), decoding (`decode.py`), sub-byte dtypes.
"""

import hashlib
import json
import math
import mmap
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import google_crc32c
import torch

from ..quant.errors import CheckpointError, nearest_name

MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
MAX_AXES = 64  # torch's own limit for iterating over a tensor
MAX_ELEMENTS = 2**63 - 1  # torch counts elements in int64
HUGE_PAGE = 2**21  # bytes; reads beyond this go to huge pages
MAX_READ = 2**30  # bytes per system call; Linux stops at 2 GiB - 4 KiB

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7 and later
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `begin` and `end` are absolute byte offsets in it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file promises to hold. `entries` are in the order of their bytes.

    `header_bytes` counts the length field too; `crc32c` and `sha256` are over those bytes.
    """

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    header_bytes: int
    file_bytes: int
    crc32c: int
    sha256: str


def read_header(path: str | Path) -> Header:
    """Read and validate the header of `path`. CheckpointError for anything but a whole file."""
    path = Path(path)
    file_bytes, raw = _header_bytes(path)
    document = _parse(path, raw[8:])
    metadata = _metadata(path, document.pop("__metadata__", {}))
    found = [_entry(path, name, fields, len(raw)) for name, fields in document.items()]
    found.sort(key=lambda entry: (entry.begin, entry.end))
    _check_contiguous(path, found, len(raw), file_bytes)
    return Header(
        path=path,
        entries={entry.name: entry for entry in found},
        metadata=metadata,
        header_bytes=len(raw),
        file_bytes=file_bytes,
        crc32c=int(google_crc32c.value(raw)),
        sha256=hashlib.sha256(raw).hexdigest(),
    )


def read_entry(header: Header, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows [start, stop) of the leading axis of tensor `name`, in memory of their own.

    A 0-d tensor is read whole. IndexError if the rows are out of range, CheckpointError if the
    file has vanished, shrunk or grown since its header was read.
    """
    entry = find_entry(header, name)
    shape, offset = entry.shape, entry.begin
    if shape:
        start, stop = row_range(name, shape[0], start, stop)
        row_bytes = (entry.end - entry.begin) // shape[0] if shape[0] else 0
        offset += start * row_bytes
        shape = (stop - start, *shape[1:])
    elif (start, stop) not in ((0, None), (0, 1)):
        raise IndexError(f"{name}: a 0-d tensor has no rows, asked for [{start}, {stop})")
    buffer = new_buffer(math.prod(shape) * entry.dtype.itemsize)
    if buffer.numel():
        _read_into(header, buffer, offset)
    return buffer.view(entry.dtype).reshape(shape)


def map_entries(header: Header) -> dict[str, torch.Tensor]:
    """Every tensor of the file as a view of one private memory map, in file order.

    Meant to be read: a write goes to a private copy of the page, never to the file. Tensors that
    the file does not align to their element size are copied, because torch cannot view them.
    """
    try:
        _check_size(header, os.stat(header.path).st_size)
        storage = torch.UntypedStorage.from_file(
            os.fspath(header.path), shared=False, nbytes=header.file_bytes
        )
    except (OSError, RuntimeError) as error:
        _fail(header.path, f"cannot be memory-mapped: {error}", "check the file and its rights")
    data = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
    return {name: _view(data, entry) for name, entry in header.entries.items()}


def find_entry(header: Header, name: str) -> Entry:
    """The entry called `name`; CheckpointError naming the nearest one."""
    try:
        return header.entries[name]
    except KeyError:
        raise CheckpointError(
            f"{header.path} holds no tensor {name!r}{nearest_name(name, header.entries)}; "
            f"it holds {len(header.entries)} tensors"
        ) from None


def row_range(name: str, n_rows: int, start: int, stop: int | None) -> tuple[int, int]:
    """`start`, `stop` with None meaning the end; IndexError unless 0 ≤ start ≤ stop ≤ n_rows."""
    stop = n_rows if stop is None else stop
    if not 0 <= start <= stop <= n_rows:
        raise IndexError(f"{name}: rows [{start}, {stop}) are outside [0, {n_rows})")
    return start, stop


def _fail(path: Path, found: str, remedy: str) -> NoReturn:
    found = found if len(found) <= 400 else found[:397] + "..."  # a damaged name can be long
    raise CheckpointError(f"{path}: {found}; {remedy}")


# --- header -------------------------------------------------------------------------------------


def _header_bytes(path: Path) -> tuple[int, bytes]:
    """(size of the file, its first 8 + N bytes)."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            _fail(path, "is not a regular file", "give a safetensors file")
        size = status.st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            _check_length(path, size, len(prefix), length)
            raw = prefix + file.read(length)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        _fail(path, f"cannot be read: {error}", "check the path and its rights")
    if len(raw) != 8 + length:
        _fail(path, f"shrank to {len(raw)} bytes while it was read", "wait for its writer")
    return size, raw


def _check_length(path: Path, size: int, n_prefix: int, length: int) -> None:
    again = "download or copy it again"
    if n_prefix < 8:
        _fail(path, f"has {size} bytes, a safetensors file has at least 8", again)
    if length > MAX_HEADER:
        found = f"promises a header of {length} bytes, at most {MAX_HEADER} are allowed"
        _fail(path, found, "it is not a safetensors file, or its first bytes are damaged")
    if 8 + length > size:
        _fail(path, f"truncated: file has {size} bytes, header needs {8 + length}", again)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    """The header's JSON object. Duplicate keys, NaN and Infinity are refused."""
    remedy = "it is not a safetensors file, or it is damaged: download it again"
    if raw[:1] != b"{":
        _fail(path, f"header begins with {raw[:1]!r}, a JSON object begins with b'{{'", remedy)
    try:
        document = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant
        )
        for name in document:
            name.encode("utf-8")  # a lone surrogate is no text
    except RecursionError:
        _fail(path, "header nests too deeply", remedy)
    except ValueError as error:  # bad UTF-8, bad JSON, integers of thousands of digits
        _fail(path, f"header is not valid: {brief(error)}", remedy)
    return dict(document)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of the json module: ValueError naming a key that occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} occurs twice")
            seen.add(key)
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not allowed in JSON")


def brief(value: object) -> str:
    """At most 80 characters of a value from a damaged file, for a message."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except (ValueError, RecursionError):  # an integer or a nesting that Python will not print
        text = f"a {type(value).__name__} too large to print"
    return text if len(text) <= 80 else text[:77] + "..."


def _metadata(path: Path, found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        _fail(path, f"__metadata__ is {brief(found)}", "a map of text to text is allowed")
    return found


def _entry(path: Path, name: str, fields: Any, header_bytes: int) -> Entry:
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        found = f"tensor {name!r} is described by {brief(fields)}"
        _fail(path, found, "dtype, shape and data_offsets are needed: download it again")
    dtype = _dtype(path, name, fields["dtype"])
    shape = _naturals(path, name, "shape", fields["shape"])
    offsets = _naturals(path, name, "data_offsets", fields["data_offsets"])
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        found = f"tensor {name!r} has data_offsets {brief(list(offsets))}"
        _fail(path, found, "two ascending numbers are allowed: download it again")
    # Sizes of 0 must not hide an overflow that torch would meet while it computes strides.
    if len(shape) > MAX_AXES or math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        found = f"tensor {name!r} has the impossible shape {brief(list(shape))}"
        _fail(path, found, f"at most {MAX_AXES} axes and {MAX_ELEMENTS} elements are allowed")
    n_bytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != n_bytes:
        found = f"tensor {name!r} takes {offsets[1] - offsets[0]} bytes"
        _fail(path, found, f"{fields['dtype']} {list(shape)} takes {n_bytes}: download it again")
    return Entry(name, dtype, shape, header_bytes + offsets[0], header_bytes + offsets[1])


def _dtype(path: Path, name: str, found: Any) -> torch.dtype:
    if not isinstance(found, str) or found not in DTYPES:
        allowed = f"known: {', '.join(DTYPES)}"
        if found == "F8_E8M0":
            allowed = "it needs torch 2.7 or later: upgrade torch"
        _fail(path, f"tensor {name!r} has the unknown dtype {brief(found)}", allowed)
    return DTYPES[found]


def _naturals(path: Path, name: str, key: str, found: Any) -> tuple[int, ...]:
    """A list of integers in [0, 2⁶³); true and false are not integers in JSON."""
    if not isinstance(found, list) or not all(
        type(size) is int and 0 <= size <= MAX_ELEMENTS for size in found
    ):
        wanted = "a list of integers in [0, 2**63) is allowed: download it again"
        _fail(path, f"tensor {name!r} has {key} {brief(found)}", wanted)
    return tuple(found)


def _check_contiguous(path: Path, found: list[Entry], begin: int, file_bytes: int) -> None:
    """Every byte after the header belongs to exactly one tensor, so nothing can hide in a file."""
    for entry in found:
        if entry.begin != begin:
            kind = "overlaps the tensor before it" if entry.begin < begin else "leaves a hole"
            found_text = f"tensor {entry.name!r} begins at byte {entry.begin} and {kind}"
            _fail(path, found_text, f"byte {begin} is expected: write or download it again")
        begin = entry.end
    if begin > file_bytes:
        found_text = f"truncated: file has {file_bytes} bytes, header promises {begin}"
        _fail(path, found_text, "download or copy it again")
    if begin < file_bytes:
        found_text = f"file has {file_bytes} bytes, header promises {begin}"
        _fail(path, found_text, "bytes that belong to no tensor are not allowed: download it again")


# --- data ---------------------------------------------------------------------------------------


def new_buffer(n_bytes: int) -> torch.Tensor:
    """Uninitialised uint8 [n_bytes].

    Large ones lie on huge pages: faulting in 4-KiB pages costs more than copying the data
    (measured: 13 GB/s from the page cache instead of 2.5).
    """
    if n_bytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(n_bytes, dtype=torch.uint8)
    try:
        pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without huge pages, or no memory: torch reports the latter
        return torch.empty(n_bytes, dtype=torch.uint8)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _read_into(header: Header, buffer: torch.Tensor, offset: int) -> None:
    """Fill uint8 `buffer` from byte `offset` of the file."""
    target = buffer.numpy().data
    try:
        file = os.open(header.path, os.O_RDONLY)
        try:
            _check_size(header, os.fstat(file).st_size)
            done = 0
            while done < len(target):
                n_read = os.preadv(file, [target[done : done + MAX_READ]], offset + done)
                if n_read == 0:
                    found = f"ends at byte {offset + done} while it is read"
                    _fail(header.path, found, "do not change the source while it is in use")
                done += n_read
        finally:
            os.close(file)
    except OSError as error:
        _fail(header.path, f"cannot be read any more: {error}", "keep the source in place")


def _check_size(header: Header, size: int) -> None:
    if size != header.file_bytes:
        found = f"has {size} bytes, had {header.file_bytes} when its header was read"
        _fail(header.path, found, "do not change the source while it is in use; start again")


def _view(data: torch.Tensor, entry: Entry) -> torch.Tensor:
    part = data[entry.begin : entry.end]
    if entry.begin % entry.dtype.itemsize:
        part = part.clone()
    return part.view(entry.dtype).reshape(entry.shape)
