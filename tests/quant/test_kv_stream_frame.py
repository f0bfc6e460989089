"""The bytes of headers and frames: golden, read back, and what they refuse."""

import io
import struct
from dataclasses import replace

import google_crc32c
import pytest
import torch

from fewbit.quant.kv_stream_frame import (
    Header,
    Reader,
    StreamError,
    frame_bytes,
    read_exactly,
    read_frame,
    read_header,
)

HEADER = Header(torch.float16, 2, 600, 256, (((3, 8), (2, 6)), ((1, 4), (1, 5))), bytes(range(32)))


def read(data: bytes) -> Header:
    return read_header(io.BytesIO(data).read)


def resealed(data: bytes) -> bytes:
    """With the checksum that a liar would give it."""
    return data[:-4] + struct.pack("<I", google_crc32c.value(data[:-4]))


def test_golden_header() -> None:
    body = (
        b"fewbitKV" + bytes([1, 0, 1, 0]) + struct.pack("<II", 2, 2) + struct.pack("<Q", 600)
        + struct.pack("<I", 256) + bytes(16) + bytes(range(32))
        + struct.pack("<8I", 3, 8, 2, 6, 1, 4, 1, 5) + bytes(4)
    )  # fmt: skip
    assert HEADER.to_bytes() == body + struct.pack("<I", google_crc32c.value(body))
    assert HEADER.crc == google_crc32c.value(body)


@pytest.mark.parametrize(
    "header", [HEADER, replace(HEADER, policy="{'résidual': 64}", stored=590, tail=470)]
)
def test_a_header_comes_back(header: Header) -> None:
    found = read(header.to_bytes())
    assert found == header
    assert found.n_chunks == 3 and found.span(0) == (0, 256) and found.span(2) == (512, 600)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 0, "not a KV stream"),
        (8, 2, "version 2, this fewbit reads 1; upgrade"),
        (10, 7, "dtype 7"),
        (11, 1, "packed 1"),
        (12, 0, "0 rows, must be 1 to"),
        (15, 255, "rows, must be 1 to 65536"),
        (16, 0, "0 layers, must be 1 to"),
        (27, 255, "tokens, must be 1 to"),
        (31, 255, "chunk, must be 1 to"),
        (32, 255, "stored: impossible|stored"),
        (80, 0, "layer 0 keys: 0 heads of 8"),
        (87, 255, "layer 0 keys: 3 heads of"),
    ],
)
def test_a_header_that_lies_is_refused(at: int, value: int, message: str) -> None:
    data = bytearray(HEADER.to_bytes())
    data[at] = value
    if at == 32:
        data[33] = 255
    with pytest.raises(StreamError, match=message):
        read(resealed(bytes(data)))


def test_every_flipped_byte_of_a_header_is_found() -> None:
    data = replace(HEADER, policy="{}").to_bytes()
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 64
        with pytest.raises(StreamError, match="KV stream header"):
            read(bytes(broken))


def test_a_length_that_lies_reads_no_more_than_there_is() -> None:
    data = bytearray(HEADER.to_bytes())
    at = len(data) - 8
    data[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)
    with pytest.raises(StreamError, match="4294967295 bytes of policy, at most"):
        read(bytes(data))


@pytest.mark.parametrize("text", [b"\xff{}", b"{}\xc3", b"\xed\xa0\x80"])
def test_a_policy_that_is_no_text_is_refused(text: bytes) -> None:
    data = replace(HEADER, policy="x" * len(text)).to_bytes()
    data = data[: -4 - len(text)] + text + data[-4:]
    with pytest.raises(StreamError, match=r"KV stream header: the policy is no UTF-8 at byte [02]"):
        read(resealed(data))


def pieces(n: int = 4) -> list[bytes]:
    return [bytes([i]) * (10 + i) for i in range(n)]


def test_a_frame_comes_back() -> None:
    frame = read_frame(io.BytesIO(frame_bytes(HEADER.crc, 1, 2, pieces())).read, HEADER, 1)
    assert (frame.index, frame.level) == (1, 2)
    assert [bytes(piece.take(piece.left)) for piece in frame.pieces] == pieces()
    assert frame.pieces[3].where == "KV stream chunk 1, layer 1 values"


def test_every_flipped_byte_and_truncation_of_a_frame_is_found() -> None:
    data = frame_bytes(HEADER.crc, 1, 2, pieces())
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 1
        for damaged in (bytes(broken), data[:at]):
            with pytest.raises(StreamError, match="KV stream chunk 1"):
                read_frame(io.BytesIO(damaged).read, HEADER, 1)


def test_a_piece_that_promises_gigabytes_is_read_as_far_as_it_goes() -> None:
    head = struct.pack("<4sIIBxxx", b"KVCH", HEADER.crc, 0, 2)
    table = struct.pack("<8I", *(0xFFFFFFFF, 0) * 4)
    data = head + table + struct.pack("<I", google_crc32c.value(head + table)) + b"abc"
    asked, file = [], io.BytesIO(data)

    def source(n: int) -> bytes:
        asked.append(n)
        return file.read(n)

    with pytest.raises(StreamError, match="layer 0 keys: ends 4294967292 bytes early"):
        read_frame(source, HEADER, 0)
    assert max(asked) <= 1 << 20


def test_a_reader_stays_inside() -> None:
    reader = Reader(b"\x01\x02\x03\x04\x05", "here")
    assert reader.unpack("<H") == (0x0201,) and reader.left == 3
    assert reader.array("<u2", 1).tolist() == [0x0403]
    with pytest.raises(StreamError, match="here: 1 bytes too many"):
        reader.end()
    with pytest.raises(StreamError, match="here: ends 3 bytes early"):
        reader.array("<u4", 1)
    reader.take(1)
    reader.end()


def test_exactly_what_was_asked_of_a_source_that_gives_less() -> None:
    file = io.BytesIO(bytes(range(100)))
    assert read_exactly(lambda n: file.read(min(n, 9)), 50, "x") == bytes(range(50))
    with pytest.raises(StreamError, match="x: ends 10 bytes early"):
        read_exactly(file.read, 60, "x")
