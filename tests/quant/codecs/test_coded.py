"""Coded tensors: any part of them back bit for bit, damage named, heads frozen."""

import hashlib
from dataclasses import replace

import google_crc32c
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.quant.codecs.coded import (
    PLANES,
    CodedTensor,
    head_of,
    pack_freq,
    parse_head,
    unpack_freq,
)  # fmt: skip
from fewbit.quant.codecs.encoder import Encoder
from fewbit.quant.codecs.rans32 import CHUNK
from fewbit.quant.errors import CheckpointError


def gaussian(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 0.02).to(dtype)


def coded(tensor, name="t", slab=None):
    """`tensor` coded in slabs of `slab` rows; None if it does not pay."""
    slabs = [tensor] if slab is None else list(tensor.split(slab))
    encoder = Encoder(tensor.dtype, tuple(tensor.shape))
    for rows in slabs:
        encoder.count(rows)
    if not encoder.settle():
        return None
    nothing = torch.empty(0, dtype=torch.uint8)
    raw = [piece for rows in slabs for piece in encoder.encode(rows)]
    planes = {"raw": torch.cat([nothing, *raw])}
    planes |= {plane: torch.cat([nothing, *pieces]) for plane, pieces in encoder.planes()}
    return CodedTensor.open(name, planes)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


SHAPES = [
    (64, 256),
    (128, 768),
    (2, 64, 512),
    (5000,),
    (129, 257),
    (16384,),
    (3, 5, 7, 200),
    (1, 20000),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_round_trip(shape, dtype):
    tensor = gaussian(*shape, dtype=torch.float32)
    tensor = (tensor * 1000).to(dtype) if dtype == torch.int8 else tensor.to(dtype)
    found = coded(tensor)
    assert found is not None
    assert same(found.decode(), tensor)
    assert found.n_bytes < 0.97 * tensor.numel() * dtype.itemsize
    found.verify()


def test_tiles_where_rows_and_columns_allow_them():
    assert head_of(torch.bfloat16, (64, 256), (True, False)).tiled
    assert head_of(torch.bfloat16, (4, 16, 256), (True, False)).tiled
    for shape in [(64, 255), (63, 256), (16384,), (0, 256), (64, 0)]:
        assert not head_of(torch.bfloat16, shape, (True, False)).tiled


@pytest.mark.parametrize("shape", [(192, 768), (130, 300), (6, 32, 512)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_and_columns(shape, dtype):
    tensor = gaussian(*shape, dtype=dtype)
    found = coded(tensor)
    for start, stop in [(0, 1), (1, 5), (0, shape[0]), (shape[0] - 1, shape[0]), (3, 3)]:
        assert same(found.rows(start, stop), tensor[start:stop])
    for start, stop in [(0, 256), (1, 290), (0, shape[-1]), (shape[-1] - 1, shape[-1]), (7, 7)]:
        assert same(found.columns(start, stop), tensor[..., start:stop])
    for bad in [(-1, 2), (2, 1), (0, shape[0] + 1)]:
        with pytest.raises(IndexError, match=r"t: rows"):
            found.rows(*bad)
    with pytest.raises(IndexError, match=r"t: columns"):
        found.columns(0, shape[-1] + 1)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 200), columns=st.sampled_from([256, 512, 33, 300]),
    slab=st.integers(1, 200), seed=st.integers(0, 99),
)  # fmt: skip
def test_slabs_of_any_size_give_the_same_planes(rows, columns, slab, seed):
    tensor = gaussian(rows, columns, seed=seed)
    whole, pieces = coded(tensor), coded(tensor, slab=slab)
    if whole is None:
        assert pieces is None
        return
    for plane in PLANES:
        assert torch.equal(whole.planes[plane], pieces.planes[plane]), plane
    assert same(pieces.decode(), tensor)


def test_threads_do_not_change_the_planes():
    tensor = gaussian(512, 1024)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = coded(tensor)
        torch.set_num_threads(4)
        four = coded(tensor)
        assert same(four.decode(), tensor)
    finally:
        torch.set_num_threads(before)
    for plane in PLANES:
        assert torch.equal(one.planes[plane], four.planes[plane]), plane


def frozen_tensor():
    """bf16 [64, 512]: a uniform sign and mantissa, and eight exponents of falling frequency."""
    mixed = np.arange(64 * 512, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(8)
    exponent = 120 + np.minimum((mixed >> 16 & 255) // (1 + (mixed >> 9 & 31)), 7)
    words = (mixed & 0x807F | exponent << 7).astype(np.uint16)
    return torch.from_numpy(words.reshape(64, 512)).view(torch.bfloat16)


def test_golden_planes():
    """The format is frozen: these hashes may never change."""
    found = coded(frozen_tensor())
    assert found.head.coded == (True, False)
    sums = {plane: hashlib.sha256(found.planes[plane].numpy().tobytes()).hexdigest()[:16]
            for plane in PLANES}  # fmt: skip
    assert sums == GOLDEN


GOLDEN = {
    "raw": "1864199a3983cccb",
    "words": "e19921d024f1653b",
    "state": "78f143973f2f22e6",
    "index": "750bcc68b343e45b",
    "crc": "5df908ca3bb9b4b4",
    "freq": "a6b8be904f33ec1b",
    "head": "0fc670aa1e5511dc",
}


def test_head_bytes():
    sums = {"freq_crc": 0x01020304, "index_crc": 5, "state_crc": 6, "crc_crc": 7}
    head = replace(head_of(torch.bfloat16, (3, 5), (True, False)), **sums)
    body = bytes.fromhex("6662726e 01 01 00 02 0b 01 0000 00400000 04030201 05000000"
                         "06000000 07000000 0300000000000000 0500000000000000")  # fmt: skip
    assert head.to_bytes()[:-4] == body
    assert parse_head("t", head.to_bytes()) == head


@pytest.mark.parametrize(
    "lie",
    [
        {"tiled": False},
        {"shape": (256, 64)},
        {"shape": (2**64 - 1, 0, 64)},
        {"shape": (2**40, 2**40)},
        {"coded": (False, False)},
        {"dtype": torch.float32, "coded": (True, False)},
    ],
    ids=str,
)
def test_a_head_that_lies_with_a_sound_checksum(lie):
    """Its order follows from its shape; other lies show when planes do not fit."""
    found = coded(gaussian(64, 256))
    lying = replace(found.head, **lie).to_bytes()
    planes = {**found.planes, "head": torch.tensor(list(lying), dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=r"^w: "):
        CodedTensor.open("w", planes).decode()


def test_heads_do_not_share_a_checksum():
    """What a manifest says of a head (CRC32C of its bytes) must depend on the head."""
    shapes = [(64, 256), (128, 256), (64, 512), (100,)]
    heads = [head_of(torch.bfloat16, shape, (True, False)).to_bytes() for shape in shapes]
    assert len({google_crc32c.value(head) for head in heads}) == len(heads)


def test_exchanged_chunks_are_found():
    """Chunks of one exponent each have no words, and checksums that move with them."""
    first = frozen_tensor()[:, :256].view(torch.int16) & ~0x7F80
    one = (first | 120 << 7).view(torch.bfloat16)
    two = (first ^ 1 | 121 << 7).view(torch.bfloat16)
    found = coded(torch.cat([one, two], 1))
    planes = {name: plane.clone() for name, plane in found.planes.items()}
    for plane in ("raw", "state", "crc"):
        a, b = planes[plane].chunk(2)
        planes[plane] = torch.cat([b, a])
    exchanged = CodedTensor.open("w", planes)
    with pytest.raises(CheckpointError, match=r"^w: the checksum of plane state differs"):
        exchanged.decode()
    with pytest.raises(CheckpointError, match=r"^w: the checksum of plane state differs"):
        exchanged.verify()


def test_a_newer_version_is_refused_by_name():
    data = bytearray(head_of(torch.bfloat16, (64, 256), (True, False)).to_bytes())
    data[4] = 2
    with pytest.raises(CheckpointError, match=r"w: coded by version 2 .* reads version 1; upgrade"):
        parse_head("w", bytes(data))


@pytest.mark.parametrize("byte", range(48 + 4))
def test_every_byte_of_a_head_is_checked(byte):
    data = bytearray(head_of(torch.bfloat16, (64, 256), (True, False)).to_bytes())
    assert len(data) == 52
    data[byte] ^= 1
    with pytest.raises(CheckpointError, match=r"^w: "):
        parse_head("w", bytes(data))


def test_one_chunk_touches_little():
    tensor = gaussian(640, 2560)
    found = coded(tensor)
    index = found.head.n_chunks - 3
    state = found.planes["index"].numpy().view("<u8")
    mask = (1 << 62) - 1
    words = (int(state[index + 1]) & mask) - (int(state[index]) & mask)
    read = words + CHUNK + 128 + 16 + 4 + 512 + found.planes["head"].numel()
    assert read <= 64 << 10
    band, across = divmod(index, 10)
    tile = tensor[64 * band : 64 * band + 64, 256 * across : 256 * across + 256]
    assert np.array_equal(found.chunk(index), bits(tile).numpy())


@pytest.mark.parametrize("axis", [0, 1])
def test_a_quarter_decodes_a_quarter(axis, monkeypatch):
    tensor = gaussian(1024, 1024)
    found = coded(tensor)
    seen = []
    plain = CodedTensor._decode_run

    def counted(self, start, stop, out, layout):
        seen.append(stop - start)
        plain(self, start, stop, out, layout)

    monkeypatch.setattr(CodedTensor, "_decode_run", counted)
    part = found.rows(256, 512) if axis == 0 else found.columns(256, 512)
    assert same(part, tensor[256:512] if axis == 0 else tensor[:, 256:512])
    assert sum(seen) <= 0.26 * found.head.n_chunks


def test_what_gains_too_little_is_not_coded():
    generator = torch.Generator().manual_seed(0)
    assert coded(torch.randint(0, 256, (300, 300), dtype=torch.uint8, generator=generator)) is None
    assert coded(gaussian(30, 30)) is None  # fewer than 1,024
    assert coded(torch.zeros(64, 256, dtype=torch.bfloat16)) is not None


def test_planes_that_hold_no_information_are_constant():
    upcast = gaussian(256, 1024).float()
    found = coded(upcast)
    assert same(found.decode(), upcast)
    assert found.n_bytes * 8 / upcast.numel() < 10.9  # as the bf16 it came from


@pytest.mark.parametrize("n", [1, 63, 64, 65, CHUNK, CHUNK + 1, CHUNK + 63, CHUNK + 64, 3 * CHUNK])
def test_raw_offsets(n):
    """A chunk of at least 64 elements leaves 64 bytes of its first raw plane to its states."""
    for dtype, n_raw in [(torch.bfloat16, 1), (torch.float32, 3)]:
        head = head_of(dtype, (n,), (True, *[False] * n_raw))
        sizes = [min(CHUNK, n - at) for at in range(0, n, CHUNK)]
        wanted = np.cumsum([0] + [size * n_raw - (64 if size >= 64 else 0) for size in sizes])
        assert [head.raw_offset(chunk) for chunk in range(len(sizes) + 1)] == wanted.tolist()
    assert head_of(torch.int8, (n,), (True,)).raw_offset(7) == 0


def test_tables_are_stored_sparsely():
    freq = np.zeros((2, 256), np.uint16)
    freq[0, [3, 200]] = 4095, 1
    freq[1] = 16
    data = np.frombuffer(pack_freq(freq), np.uint8)
    assert data.size == 32 + 4 + 32 + 512
    assert data[:36].tobytes().hex() == "08" + "00" * 24 + "01" + "00" * 6 + "ff0f" + "0100"
    assert np.array_equal(unpack_freq("t", data, 2), freq)
    for wrong in (data[:-1], data[:30], np.append(data, np.uint8(0)), data[:36]):
        with pytest.raises(CheckpointError, match=r"^t: plane freq"):
            unpack_freq("t", wrong, 2)
    with pytest.raises(CheckpointError, match=r"^t: plane freq"):
        unpack_freq("t", np.frombuffer(pack_freq(freq[:1] * 2), np.uint8), 1)


def test_a_missing_plane_and_a_wrong_size_are_named():
    planes = dict(coded(gaussian(64, 256)).planes)
    for plane in PLANES:
        less = {key: value for key, value in planes.items() if key != plane}
        with pytest.raises(CheckpointError, match=rf"w: plane \.rans32\.{plane} is missing"):
            CodedTensor.open("w", less)
    for plane in ("raw", "state", "index", "crc"):
        with pytest.raises(CheckpointError, match=rf"w: plane {plane} has \d+ bytes"):
            CodedTensor.open("w", {**planes, plane: planes[plane][:-1]})


@pytest.mark.parametrize("plane", [name for name in PLANES if name != "head"])
def test_flipped_bytes_are_found_and_the_chunk_is_named(plane):
    tensor = gaussian(128, 512)
    found = coded(tensor)
    generator = np.random.default_rng(1)
    for _ in range(60):
        data = found.planes[plane].clone()
        where = int(generator.integers(data.numel()))
        data[where] ^= int(generator.integers(1, 256))
        with pytest.raises(CheckpointError, match=r"^t: (chunk \d+ of 4|the checksum of plane)"):
            CodedTensor.open("t", {**found.planes, plane: data}).decode()
