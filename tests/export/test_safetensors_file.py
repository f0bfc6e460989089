"""The container reader: what it accepts it reads bit for bit, everything else is a named error."""

import json
import os
import random
import struct
from pathlib import Path

import google_crc32c
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fewbit.export.safetensors_file import (
    DTYPES,
    HUGE_PAGE,
    find_entry,
    map_entries,
    read_entry,
    read_header,
)
from fewbit.quant.errors import CheckpointError


def container(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def one(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def write(folder: Path, content: bytes) -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(content)
    return path


def sample(dtype: torch.dtype) -> torch.Tensor:
    raw = torch.randint(0, 256, (3 * 5 * dtype.itemsize,), dtype=torch.uint8)
    return (raw % 2 if dtype == torch.bool else raw).view(dtype).reshape(3, 5)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes; NaN equals itself."""
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def test_golden_bytes(tmp_path: Path) -> None:
    header = (
        b'{"__metadata__":{"by":"hand"},"b":{"dtype":"I8","shape":[2],"data_offsets":[4,6]},'
        b'"a":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}  '
    )
    path = write(tmp_path, container(header, b"\x80\x3f\x00\xc0\xff\x07"))
    found = read_header(path)
    assert list(found.entries) == ["a", "b"], "entries come in the order of their bytes"
    assert found.metadata == {"by": "hand"}
    assert found.header_bytes == 8 + len(header)
    assert found.file_bytes == 8 + len(header) + 6
    assert found.crc32c == google_crc32c.value(path.read_bytes()[: found.header_bytes])
    entry = found.entries["b"]
    assert (entry.begin, entry.end) == (found.header_bytes + 4, found.header_bytes + 6)
    assert torch.equal(read_entry(found, "a"), torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16))
    assert torch.equal(read_entry(found, "b"), torch.tensor([-1, 7], dtype=torch.int8))


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_every_dtype_bit_for_bit(tmp_path: Path, dtype_name: str) -> None:
    tensor = sample(DTYPES[dtype_name])
    header = {
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": dtype_name, "shape": [3, 5], "data_offsets": [1, 1 + tensor.nbytes]},
    }
    data = b"\x09" + tensor.view(torch.uint8).numpy().tobytes()
    found = read_header(write(tmp_path, container(header, data)))
    assert same_bits(read_entry(found, "w"), tensor)
    assert same_bits(read_entry(found, "w", 1, 3), tensor[1:3])
    assert same_bits(map_entries(found)["w"], tensor), "unaligned data is copied, not refused"


def test_agrees_with_the_reference_implementation(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(7, 11),
        "scalar": torch.tensor(2.5),
        "no rows": torch.empty(0, 4),
        "no columns": torch.empty(3, 0, dtype=torch.float16),
        "ünïcode": torch.arange(6).reshape(1, 2, 3),
        "large": torch.randint(0, 255, (3, HUGE_PAGE), dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    mapped = map_entries(found)
    for name, expected in load_file(found.path).items():
        assert same_bits(read_entry(found, name), expected), name
        assert same_bits(mapped[name], expected), name
    assert found.entries.keys() == tensors.keys()
    assert same_bits(read_entry(found, "large", 1, 2), tensors["large"][1:2])
    assert read_entry(found, "matrix", 3, 3).shape == (0, 11)


def test_rows_out_of_range(tmp_path: Path) -> None:
    found = read_header(write(tmp_path, container(one(), b"abcd")))
    for start, stop in [(-1, 2), (0, 5), (3, 2), (5, None)]:
        with pytest.raises(IndexError, match=r"outside \[0, 4\)"):
            read_entry(found, "w", start, stop)
    scalar = read_header(write(tmp_path, container(one("U8", [], [0, 1]), b"a")))
    assert int(read_entry(scalar, "w", 0, 1)) == ord("a")
    with pytest.raises(IndexError, match="0-d"):
        read_entry(scalar, "w", 0, 0)


def test_a_wrong_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    found = read_header(write(tmp_path, container(one(), b"abcd")))
    with pytest.raises(CheckpointError, match=r"no tensor 'ww' \(did you mean 'w'"):
        find_entry(found, "ww")


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


BAD = {
    "empty file": (b"", "has 0 bytes"),
    "seven bytes": (b"\0" * 7, "has 7 bytes"),
    "huge header": (struct.pack("<Q", 2**63) + b"{}", "promises a header of"),
    "header beyond the file": (struct.pack("<Q", 99) + b"{}", "truncated: file has 10 bytes"),
    "no object": (container(b"[]"), "header begins with b'\\['"),
    "leading space": (container(b" {}"), "header begins with"),
    "empty header": (container(b""), "header begins with"),
    "not UTF-8": (container(b'{"\xff":0}'), "not valid"),
    "not JSON": (container(b'{"a":}'), "not valid"),
    "two documents": (container(b"{}{}"), "not valid"),
    "deep": (container(nested(100_000)), "nests too deeply"),
    "less deep": (container(nested(500)), "'a' is described by"),
    "duplicate": (container(b'{"a":1,"a":2}'), "'a' occurs twice"),
    "NaN": (container(b'{"a":NaN}'), "NaN is not allowed"),
    "digits": (container(b'{"a":' + b"9" * 5000 + b"}"), "not valid"),
    "lone surrogate": (container(b'{"\\ud800":{}}'), "not valid"),
    "metadata": (container({"__metadata__": {"a": 1}}), "__metadata__ is"),
    "no fields": (container({"w": {"dtype": "U8"}}), "'w' is described by"),
    "dtype": (container(one("F7"), b"abcd"), "unknown dtype 'F7'"),
    "dtype list": (container(one(["U8"]), b"abcd"), "unknown dtype"),
    "negative": (container(one(shape=[-4]), b"abcd"), r"shape \[-4\]"),
    "bool size": (container(one(shape=[True]), b"abcd"), r"shape \[True\]"),
    "float size": (container(one(shape=[4.0]), b"abcd"), r"shape \[4.0\]"),
    "infinite size": (
        container(b'{"w":{"dtype":"U8","shape":[1e999],"data_offsets":[0,0]}}'),
        "inf",
    ),
    "shape no list": (container(one(shape=4), b"abcd"), "shape 4"),
    "huge size": (container(one(shape=[2**64]), b"abcd"), "shape"),
    "overflow": (container(one(shape=[2**40, 2**40]), b"abcd"), "impossible shape"),
    "hidden overflow": (container(one(shape=[0, 2**40, 2**40], offsets=[0, 0])), "impossible"),
    "axes": (container(one(shape=[1] * 65, offsets=[0, 1]), b"a"), "impossible shape"),
    "three offsets": (container(one(offsets=[0, 4, 4]), b"abcd"), "data_offsets"),
    "descending": (container(one(offsets=[4, 0]), b"abcd"), "ascending"),
    "wrong size": (container(one("I16"), b"abcd"), r"takes 4 bytes; I16 \[4\] takes 8"),
    "hole": (container(one(offsets=[1, 5]), b"abcde"), "leaves a hole"),
    "overlap": (container({**one(), "v": one()["w"]}, b"abcd"), "overlaps"),
    "truncated": (container(one(), b"abc"), r"truncated: file has \d+ bytes, header promises"),
    "trailing": (container(one(), b"abcde"), "belong to no tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_files_are_named(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    path = write(tmp_path, content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000, "a damaged file must not fill the screen"


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "none", tmp_path / "pipe", "a\0b", "x" * 5000):
        with pytest.raises(CheckpointError):
            read_header(path)


def test_a_file_that_changes_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, container(one(), b"abcd"))
    found = read_header(path)
    for content in (path.read_bytes()[:-1], path.read_bytes() + b"e"):
        path.write_bytes(content)
        for reader in (lambda: read_entry(found, "w"), lambda: map_entries(found)):
            with pytest.raises(CheckpointError, match="when its header was read"):
                reader()
    path.unlink()
    for reader in (lambda: read_entry(found, "w"), lambda: map_entries(found)):
        with pytest.raises(CheckpointError, match="No such file"):
            reader()


def test_a_map_never_writes_to_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, container(one(), b"abcd"))
    map_entries(read_header(path))["w"].zero_()
    assert path.read_bytes().endswith(b"abcd")


def accepts_or_names(path: Path) -> bool:
    """True if the file opens and every tensor can be read; any other error fails the test."""
    try:
        found = read_header(path)
    except CheckpointError:
        return False
    for name, entry in found.entries.items():
        assert read_entry(found, name).shape == entry.shape
    return True


def test_random_damage_to_a_header(tmp_path: Path) -> None:
    rng = random.Random(0)
    save_file({"a.weight": torch.randn(4, 3), "b": torch.arange(5)}, tmp_path / "x.safetensors")
    good = (tmp_path / "x.safetensors").read_bytes()
    n_header = 8 + struct.unpack("<Q", good[:8])[0]
    opened = 0
    for _ in range(600):
        content = bytearray(good)
        for _ in range(rng.choice((1, 1, 1, 3))):
            content[rng.randrange(n_header)] = rng.randrange(256)
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        opened += accepts_or_names(write(tmp_path, bytes(content)))
    assert 0 < opened < 300, f"{opened} of 600 damaged files opened; only names may change"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4"]) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(0, 40), st.integers(0, 40)) | JSON,
    }
)


@settings(max_examples=300, deadline=None)
@given(
    header=st.dictionaries(st.text(max_size=4), FIELDS | JSON, max_size=3) | st.binary(),
    data=st.binary(max_size=40),
)
def test_any_header(tmp_path_factory: pytest.TempPathFactory, header: object, data: bytes) -> None:
    accepts_or_names(write(tmp_path_factory.getbasetemp(), container(header, data)))


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=64))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    accepts_or_names(write(tmp_path_factory.getbasetemp(), content))
