"""`dictionary`: the queue that defines it as an oracle, golden streams, rates, every kind of damage."""

import heapq
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.quant.codecs import dictionary
from fewbit.quant.codecs.chunks import Damage
from fewbit.quant.codecs.dictionary import Rows, decode, decode_part, encode, encode_part, table
from fewbit.quant.codecs.encoder import Encoder
from fewbit.quant.errors import FormatError
from fewbit.quant.formats.ternary import pack_ternaries

Planes = dict[str, torch.Tensor]


def drawn(shape: tuple[int, ...], zeros: float, seed: int = 0) -> np.ndarray:
    """Independent ternaries with P(0) = zeros."""
    u = np.random.default_rng(seed).random(shape)
    return np.where(u < zeros, 0, np.where(u < (1 + zeros) / 2, 1, 2)).astype(np.uint8)


def packed(ternaries: np.ndarray) -> torch.Tensor:
    """The part `codes` of these columns."""
    missing = -ternaries.shape[-1] % 5
    return pack_ternaries(torch.nn.functional.pad(torch.from_numpy(ternaries), (0, missing)))


# ---- the table ------------------------------------------------------------------------------------


def test_the_table_is_what_a_priority_queue_finds() -> None:
    """Best-first expansion, one sequence at a time; ties by the pairs themselves."""
    single = [0.885, (1 - 0.885) / 2, (1 - 0.885) / 2]
    chance = [second * first for second in single for first in single]
    waiting: list[tuple[float, list[int]]] = [(-1.0, [])]
    rank = 0
    found = table()
    while rank < 1 << 16:
        minus, pairs = heapq.heappop(waiting)
        if pairs:
            ternaries = [digit for pair in pairs for digit in (pair % 3, pair // 3)]
            assert found.pairs[rank] == len(pairs)
            assert found.ternaries[rank].tobytes() == bytes(ternaries).ljust(28, b"\0"), rank
            rank += 1
        if len(pairs) < 14:
            for pair in range(9):
                heapq.heappush(waiting, (minus * chance[pair], [*pairs, pair]))


def test_entries_are_two_words_of_seven_pairs() -> None:
    found = table()
    assert found.entries.shape == (1 << 16, 2) and found.entries.dtype == np.uint32
    assert np.array_equal(found.entries & 15, np.repeat(found.pairs[:, None], 2, 1))
    assert found.entries[0].tolist() == [1, 1]  # one pair of zeros
    assert found.entries[11].tolist() == [12, 12]  # twelve of them
    # the pairs 1 and 3 alone: its first ternary is 1, its second is 1
    assert found.entries[12].tolist() == [0x11, 1] and found.entries[14].tolist() == [0x41, 1]
    shifts = 4 + 4 * np.arange(7)
    nibbles = (found.entries[:, :, None] >> shifts & 15).reshape(-1, 14)
    assert np.array_equal(nibbles & 3, found.ternaries[:, 0::2])
    assert np.array_equal(nibbles >> 2, found.ternaries[:, 1::2])


def test_every_prefix_of_a_codeword_is_one() -> None:
    """The trie has one edge to each codeword, from the codeword one pair shorter."""
    found = table()
    parent, pair = np.nonzero(found.child >= 0)
    to = found.child[parent, pair]
    assert np.array_equal(np.sort(to), np.arange(1 << 16))
    pairs = np.append(found.pairs, 0)  # the last node is the empty sequence
    ternaries = np.vstack([found.ternaries, np.zeros((1, 28), np.uint8)])
    assert np.array_equal(pairs[to], pairs[parent] + 1)
    expected = ternaries[parent].copy()
    at = 2 * pairs[parent].astype(int)
    expected[np.arange(at.size), at], expected[np.arange(at.size), at + 1] = pair % 3, pair // 3
    assert np.array_equal(ternaries[to], expected)
    assert bool((found.child[1 << 16] >= 0).all()), "every pair must be a codeword"


# ---- streams --------------------------------------------------------------------------------------


def test_golden_rows() -> None:
    """Codewords 0 … 11 are 1 … 12 pairs of zeros, 12 … 15 the pairs with one weight that is not
    zero, 16 thirteen pairs of zeros: 0.783¹² > 0.885 · 0.0575 > 0.783¹³."""
    coded = encode(np.zeros((2, 26), np.uint8))
    assert coded.codewords.tolist() == [16, 16] and coded.row_off.tolist() == [0, 1, 2]
    pairs = np.array([[0, 0], [1, 0], [2, 0], [0, 1], [0, 2]], np.uint8)
    assert encode(pairs).codewords.tolist() == [0, 12, 13, 14, 15]
    # 26 pairs: the longest run there is, fourteen, and the twelve that are left
    longest, rest = encode(np.zeros((1, 52), np.uint8)).codewords
    assert (table().pairs[longest], rest) == (14, 11)


def greedy(row: list[int]) -> list[int]:
    """The longest codeword that the rest of the row begins with, again and again."""
    names = {
        bytes(table().ternaries[rank][: 2 * table().pairs[rank]]): rank for rank in range(1 << 16)
    }
    row, found = row + [0] * (len(row) % 2), []
    while row:
        size = next(n for n in range(min(28, len(row)), 0, -2) if bytes(row[:n]) in names)
        found.append(names[bytes(row[:size])])
        row = row[size:]
    return found


def test_codewords_are_as_long_as_can_be() -> None:
    rows = np.vstack([drawn((3, 301), share, seed=4) for share in (0.34, 0.885, 0.99)])
    coded = encode(rows)
    for at, row in enumerate(rows.tolist()):
        words = coded.codewords[coded.row_off[at] : coded.row_off[at + 1]]
        assert words.tolist() == greedy(row)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 6),
    k=st.integers(1, 90),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_rows_come_back(n: int, k: int, zeros: float, seed: int) -> None:
    ternaries = drawn((n, k), zeros, seed)
    coded = encode(ternaries)
    assert coded.codewords.dtype == np.uint16 and coded.row_off.dtype == np.int32
    assert coded.n_bytes == 2 * coded.codewords.size + 4 * (n + 1)
    assert np.array_equal(decode(coded, (n, k)), ternaries)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ternaries = drawn((37, 333), 0.8)
    whole = encode(ternaries)
    monkeypatch.setattr(dictionary, "_BLOCK", 1000)
    blocks = encode(ternaries)
    assert np.array_equal(whole.codewords, blocks.codewords)
    assert np.array_equal(whole.row_off, blocks.row_off)
    assert np.array_equal(decode(blocks, (37, 333)), ternaries)


def rans32_bytes(codes: torch.Tensor) -> int:
    """What the other codec needs for a part."""
    encoder = Encoder(codes.dtype, tuple(codes.shape))
    encoder.count(codes)
    assert encoder.settle()
    raw = sum(piece.numel() for piece in encoder.encode(codes))
    return raw + sum(piece.numel() for _, pieces in encoder.planes() for piece in pieces)


@pytest.mark.parametrize(
    ("zeros", "ours", "rans32"), [(0.885, 0.744, 0.648), (0.8, 1.130, 0.937), (1.0, 0.582, None)]
)
def test_rates_are_those_that_the_module_states(
    zeros: float, ours: float, rans32: float | None
) -> None:
    """Bits a weight of 4096 rows of 4096, of which row_off takes 0.008."""
    ternaries = drawn((4096, 4096), zeros)
    codes = packed(ternaries)
    n_bytes = sum(plane.numel() for plane in encode_part(codes, 4096).values())
    assert 8 * n_bytes / ternaries.size == pytest.approx(ours, abs=0.001)
    if rans32 is not None:
        n_bytes = rans32_bytes(codes)
        assert 8 * n_bytes / ternaries.size == pytest.approx(rans32, abs=0.001)


# ---- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 10), (3, 5, 63), (1, 1), (2, 7), (2, 2, 2, 8)])
def test_parts_come_back(shape: tuple[int, ...]) -> None:
    codes = packed(drawn(shape, 0.8))
    planes = encode_part(codes, shape[-1])
    assert tuple(planes) == dictionary.PLANES
    assert {plane.dtype for plane in planes.values()} == {torch.uint8}
    found = decode_part(planes)
    assert found.dtype == torch.uint8 and torch.equal(found, codes)


def crc32c(data: bytes) -> int:
    """Castagnoli's polynomial, bit by bit."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ 0x82F63B78 * (state & 1)
    return state ^ 0xFFFFFFFF


def test_golden_planes() -> None:
    """The head as drawn: one row of 26 zeros in six bytes."""
    planes = encode_part(torch.zeros(1, 6, dtype=torch.uint8), 26)
    assert bytes(planes["codewords"].tolist()) == bytes([16, 0])
    assert bytes(planes["row_off"].tolist()) == bytes([0, 0, 0, 0, 1, 0, 0, 0])
    head = bytes(planes["head"].tolist())
    assert head[:8] == b"fbqd\x01\x02\x00\x00" and len(head) == 28 + 16 + 4
    assert head[8:16] == bytes.fromhex("52b81e85eb51ec3f")  # 0.885
    assert head[16:24] == bytes([26, 0, 0, 0, 0, 0, 0, 0])
    assert head[24:28] == crc32c(bytes(6)).to_bytes(4, "little")
    assert head[28:44] == bytes([1, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0])
    assert head[44:] == zlib.crc32(head[:44]).to_bytes(4, "little")


def test_padding_of_another_writer_comes_back() -> None:
    codes = packed(drawn((3, 10), 0.5))
    codes[1, 1] = 242
    assert torch.equal(decode_part(encode_part(codes, 7)), codes)


def test_strided_parts_are_read_as_they_look() -> None:
    codes = packed(drawn((6, 50), 0.7))
    assert torch.equal(decode_part(encode_part(codes[::2], 50)), codes[::2])


@pytest.mark.parametrize(
    ("codes", "k", "message"),
    [
        (torch.full((2, 2), 243, dtype=torch.uint8), 10, "at most 242, got 243"),
        (torch.zeros(2, 2, dtype=torch.uint8), 11, r"of K = 11, got torch.uint8 \[2, 2\]"),
        (torch.zeros(2, 2, dtype=torch.uint8), 5, "of K = 5"),
        (torch.zeros(2, 2, dtype=torch.int8), 10, r"got torch.int8"),
        (torch.zeros(2, dtype=torch.uint8), 10, r"got torch.uint8 \[2\]"),
    ],
)
def test_what_is_no_part_is_refused(codes: torch.Tensor, k: int, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        encode_part(codes, k)


@pytest.mark.parametrize(
    ("ternaries", "message"),
    [
        (np.full((2, 3), 3, np.uint8), "0 to 2, got 3"),
        (np.zeros(4, np.uint8), "got uint8"),
        (np.zeros((2, 3), np.int32), "got int32"),
    ],
)
def test_what_is_no_ternary_is_refused(ternaries: np.ndarray, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        encode(ternaries)


# ---- damage ---------------------------------------------------------------------------------------


def changed(planes: Planes, name: str, at: int, flip: int) -> Planes:
    plane = planes[name].clone()
    plane[at] ^= flip
    return {**planes, name: plane}


@pytest.mark.parametrize("name", dictionary.PLANES)
def test_every_flipped_byte_is_found(name: str) -> None:
    planes = encode_part(packed(drawn((7, 203), 0.8)), 203)
    n_bytes = planes[name].numel()
    assert n_bytes >= 32
    for at in range(n_bytes):
        for flip in (1, 0x80, 0xFF):
            with pytest.raises(Damage):
                decode_part(changed(planes, name, at, flip))


@pytest.mark.parametrize("name", dictionary.PLANES)
def test_every_truncation_and_every_missing_plane_is_found(name: str) -> None:
    planes = encode_part(packed(drawn((7, 203), 0.8)), 203)
    for left in range(planes[name].numel()):
        with pytest.raises(Damage):
            decode_part({**planes, name: planes[name][:left]})
    with pytest.raises(Damage):
        decode_part({**planes, name: torch.cat([planes[name], planes[name]])})
    with pytest.raises(Damage, match=rf"\.dictionary\.{name} is missing"):
        decode_part({other: plane for other, plane in planes.items() if other != name})


def lie(coded: Rows, kind: str) -> Rows:
    words, off = coded.codewords.copy(), coded.row_off.copy()
    if kind == "backwards":
        off[2] = off[1] - 1
    elif kind == "start":
        off[0] = 1
    elif kind == "end":
        off[-1] += 1
    elif kind == "moved":  # still in order, and the total is right
        off[2] += 1
    elif kind == "short":
        words[off[1]] = 0
    elif kind == "rows":
        off = off[:-1]
    elif kind == "negative":
        off[1] = -5
    return Rows(words, off)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("backwards", "row 1: its end lies before its start"),
        ("start", "row_off goes from 1 to"),
        ("end", "row_off goes from 0 to"),
        ("moved", r"row 1: its codewords hold \d+ pairs, 50 are wanted"),
        ("short", r"row 1: its codewords hold \d+ pairs, 50 are wanted"),
        ("rows", r"row_off \(4,\) .* do not fit 4 rows"),
        ("negative", "row 0: its end lies before its start"),
    ],
)
def test_lies_about_rows_are_named(kind: str, message: str) -> None:
    coded = encode(drawn((4, 100), 0.885, seed=1))
    with pytest.raises(Damage, match=message):
        decode(lie(coded, kind), (4, 100))


def test_behind_an_odd_row_must_be_a_zero() -> None:
    ternaries = drawn((3, 8), 0.5)
    ternaries[:, 7] = [0, 2, 0]
    with pytest.raises(Damage, match="row 1: behind its end is no zero"):
        decode(encode(ternaries), (3, 7))


def resealed(head: bytes, change: Callable[[bytearray], None]) -> torch.Tensor:
    """The head changed, with a checksum that is right."""
    body = bytearray(head[:-4])
    change(body)
    sealed = bytes(body) + zlib.crc32(bytes(body)).to_bytes(4, "little")
    return torch.tensor(list(sealed), dtype=torch.uint8)


def put(at: int, value: bytes) -> Callable[[bytearray], None]:
    def change(body: bytearray) -> None:
        body[at : at + len(value)] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(0, b"x"), "no head of a dictionary-coded part"),
        (put(4, b"\x02"), "coded by version 2 of dictionary"),
        (put(5, b"\x03"), "a head of 48 bytes for 3 axes"),
        (put(6, b"\x01"), "a head of 48 bytes"),
        (put(8, b"\0\0\0\0\0\0\xe0\x3f"), r"P\(0\) = 0.5, this fewbit reads 0.885"),
        (put(16, b"\x05"), "contradicts itself"),
        (put(28, b"\x08"), "B of row_off for 8 rows"),
        (put(28, b"\0"), "contradicts itself"),
        (put(33, b"\xff"), "B of row_off for"),  # 2^47 rows: nothing may be allocated
        (put(24, b"\x99"), "checksum of the decoded codes differs"),
        (lambda body: body.extend(b"12345678"), "a head of 56 bytes for 2 axes"),
    ],
)
def test_heads_that_lie_are_named(change: Callable[[bytearray], None], message: str) -> None:
    planes = encode_part(packed(drawn((7, 203), 0.8)), 203)
    head = resealed(bytes(planes["head"].tolist()), change)
    with pytest.raises(Damage, match=message):
        decode_part({**planes, "head": head})


def test_a_head_that_asks_for_more_columns_than_there_are_allocates_nothing() -> None:
    """2^46 columns: named before a byte of them is made."""
    planes = encode_part(packed(drawn((7, 203), 0.8)), 203)
    columns, n_bytes = 5 << 44, 1 << 44

    def change(body: bytearray) -> None:
        body[16:24] = columns.to_bytes(8, "little")
        body[36:44] = n_bytes.to_bytes(8, "little")

    head = resealed(bytes(planes["head"].tolist()), change)
    with pytest.raises(Damage, match="row 0: its codewords hold 102 pairs"):
        decode_part({**planes, "head": head})
