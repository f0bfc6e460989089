"""`dictionary`: QMoE's code for ternary weights, 16-bit codewords that stand for up to 28 of them.

A row's ternaries are taken in pairs, symbol t₀ + 3·t₁ (0 … 8). Pairs are thought to be independent,
with P(t = 0) = 0.885 and the rest split evenly, whatever the tensor's own shares are. The codewords
are the 2^16 most probable sequences of 1 to 14 pairs. A sequence is less probable than its prefixes,
so all prefixes of a codeword are codewords: a trie, which the encoder walks as far as it goes, and any
row ends exactly where a codeword does.

    codeword   0    1    …   11   12  13  14  15   16    …
    pairs      0    00   …  0¹²   1   2   3   6    0¹³   …   most probable first

Probabilities are products in float64, taken from left to right; equal ones are ordered by their pairs.
So codewords have the numbers that QMoE's own queue gives them, and `codewords` and `row_off` are what
its files call `w_comp` and `row_off`. Its table, `entries`, is two u32 for each codeword:

    bits    31..28   …   11..8   7..4    3..0
    word 0  pair 6   …   pair 1  pair 0  pairs in the codeword      a pair: t₀ | t₁ << 2, or 0
    word 1  pair 13  …   pair 8  pair 7  pairs in the codeword

Rows are streams of their own: row r is codewords[row_off[r] : row_off[r + 1]]. An odd K is followed by
one zero. A part `codes` of the format `ternary`, u8 [..., N, B], becomes three tensors of U8, all
numbers little-endian:

    <part>.dictionary.codewords   u16 [n]
    <part>.dictionary.row_off     i32 [rows + 1]    rows = … · N
    <part>.dictionary.head        0 "fbqd"   4 version u8   5 axes u8   6 zero u16   8 P(0) f64
                                 16 K u64   24 CRC32C of the part's bytes u32
                                 28 shape of the part u64 [axes], then zlib's CRC-32 of the head u32

Measured on 4096 × 4096 random ternaries, bits a weight, everything stored counted:

    P(0)    entropy    dictionary    rans32 of five in a byte
    0.885    0.630       0.744         0.648          of these 0.008 and 0.014 index rows and chunks
    0.80     0.922       1.130         0.937

A codeword costs 16 bits for at most 28 weights: 0.571 bits a weight, however sparse they are. This is a
reference: numpy, no kernel. The writer (`export/writer.py`) takes it for a part only where it is
smaller than rans32: where there are few weights, for it stores no frequencies and no states.
"""

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

import google_crc32c
import numpy as np
import torch

from ..errors import FormatError
from ..formats.ternary import PER_BYTE, TOP_BYTE, pack_ternaries, unpack_ternaries
from .chunks import Damage

NAME = "dictionary"
SUFFIX = f".{NAME}."
PLANES = ("codewords", "row_off", "head")
VERSION = 1
ZEROS = 0.885  # P(t = 0) that the codewords were chosen for
N_CODEWORDS = 1 << 16
MAX_PAIRS = 14
_SYMBOLS = 9
_ROOT = N_CODEWORDS  # node of the trie that stands for no pair at all
_MAGIC = b"fbqd"
_FIXED = struct.Struct("<4sBBHdQI")
_BLOCK = 1 << 22  # pairs encoded, and ternaries decoded, at a time


@dataclass(frozen=True)
class Table:
    """The code. entries: u32 [2^16, 2]. pairs: u8 [2^16], of each codeword. ternaries: u8 [2^16, 28],
    zero behind the last. child: int32 [2^16 + 1, 9], the codeword that one more pair makes of a
    codeword, -1 for none; the last row is where a codeword begins."""

    entries: np.ndarray
    pairs: np.ndarray
    ternaries: np.ndarray
    child: np.ndarray


@dataclass(frozen=True)
class Rows:
    """Coded rows: codewords u16 [n], row_off int32 [N + 1]."""

    codewords: np.ndarray
    row_off: np.ndarray

    @property
    def n_bytes(self) -> int:
        """Stored bytes."""
        return int(self.codewords.nbytes + self.row_off.nbytes)


# ---- the table ------------------------------------------------------------------------------------


@cache
def table() -> Table:
    """The 2^16 codewords; made once, in a third of a second."""
    keys = _ranked_keys()
    digits = keys[:, None] // 10 ** np.arange(MAX_PAIRS - 1, -1, -1) % 10  # 0: no pair, else + 1
    pairs = (digits > 0).sum(1)
    symbols = np.maximum(digits - 1, 0)
    first, second = symbols % 3, symbols // 3
    ternaries = np.stack([first, second], -1).reshape(len(keys), -1).astype(np.uint8)
    nibbles = (first | second << 2).reshape(-1, 2, 7) << 4 * np.arange(1, 8)
    entries = (nibbles.sum(-1) | pairs[:, None]).astype(np.uint32)
    return Table(entries, pairs.astype(np.uint8), ternaries, _children(keys, digits, pairs))


def _ranked_keys() -> np.ndarray:
    """int64 [2^16]: the most probable sequences, best first. A key holds one decimal digit for each
    of 14 places, the first pair highest: 0 for no pair, else its symbol + 1; so keys order sequences
    as their pairs do, a prefix before what it begins."""
    shares = np.array([ZEROS, (1 - ZEROS) / 2, (1 - ZEROS) / 2])
    of_pair = (shares * shares[:, None]).reshape(-1)
    probability, key = np.ones(1), np.zeros(1, np.int64)
    found_probability, found_key = [], []
    least = 0.0
    for place in range(MAX_PAIRS - 1, -1, -1):
        longer = (probability[:, None] * of_pair).reshape(-1)
        longer_key = (key[:, None] + np.arange(1, _SYMBOLS + 1) * 10**place).reshape(-1)
        keep = longer >= least  # what falls short now, and all that it begins, is never needed
        probability, key = longer[keep], longer_key[keep]
        found_probability.append(probability)
        found_key.append(key)
        known = np.concatenate(found_probability)
        if known.size > N_CODEWORDS:
            least = float(np.partition(known, -N_CODEWORDS)[-N_CODEWORDS])
    known, keys = np.concatenate(found_probability), np.concatenate(found_key)
    return keys[np.lexsort((keys, -known))[:N_CODEWORDS]]


def _children(keys: np.ndarray, digits: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The trie: every codeword is entered as a child of the one without its last pair."""
    places = 10 ** (MAX_PAIRS - pairs.astype(np.int64))  # of the last pair
    last = digits[np.arange(len(keys)), pairs - 1]
    shorter = keys - last * places
    order = np.argsort(keys)
    at = np.minimum(np.searchsorted(keys, shorter, sorter=order), len(keys) - 1)
    parent = np.where(shorter == 0, _ROOT, order[at])
    child = np.full((N_CODEWORDS + 1, _SYMBOLS), -1, np.int32)
    child[parent, last - 1] = np.arange(len(keys))
    return child


# ---- rows of ternaries ----------------------------------------------------------------------------


def encode(ternaries: np.ndarray) -> Rows:
    """Codewords of `ternaries` u8 [N, K] in 0 … 2, each row by itself, each codeword as long as can be.

    FormatError for other values or shapes, and for 2^31 codewords or more.
    """
    if ternaries.ndim != 2 or ternaries.dtype != np.uint8:
        raise FormatError(f"dictionary codes u8 [N, K], got {ternaries.dtype} {ternaries.shape}")
    if ternaries.size and int(ternaries.max()) > 2:
        raise FormatError(f"dictionary codes ternaries 0 to 2, got {int(ternaries.max())}")
    n_rows, k = ternaries.shape
    step = max(1, _BLOCK // max(1, (k + 1) // 2))
    blocks = [_encode_block(ternaries[at : at + step]) for at in range(0, n_rows, step)]
    counts = np.concatenate([np.zeros(1, np.int64), *(counts for _, counts in blocks)])
    row_off = np.cumsum(counts)
    if int(row_off[-1]) >= 1 << 31:
        raise FormatError(
            f"dictionary: {int(row_off[-1])} codewords, row_off counts to {2**31 - 1}; use rans32"
        )
    codewords = np.concatenate([np.zeros(0, np.uint16), *(words for words, _ in blocks)])
    return Rows(codewords, row_off.astype(np.int32))


def _encode_block(ternaries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codewords of some rows, one after the other, and how many each row has. All rows take one pair a
    step; where the trie has no such child, the codeword ends before the pair and the next begins."""
    symbols = _pair_symbols(ternaries)
    n_pairs, n_rows = symbols.shape
    child = table().child.reshape(-1)
    begin = table().child[_ROOT]
    words = np.empty((n_pairs, n_rows), np.uint16)  # the codeword that ends behind pair p - 1 ...
    ends = np.zeros((n_pairs, n_rows), bool)  # ... if one does
    if not n_pairs:
        return np.zeros(0, np.uint16), np.zeros(n_rows, np.int64)
    node = begin[symbols[0]]
    for at in range(1, n_pairs):
        longer = child[node * _SYMBOLS + symbols[at]]
        ended = longer < 0
        words[at - 1], ends[at - 1] = node, ended
        node = np.where(ended, begin[symbols[at]], longer)
    words[-1], ends[-1] = node, True
    return words.T[ends.T], ends.sum(0)


def _pair_symbols(ternaries: np.ndarray) -> np.ndarray:
    """u8 [pairs, N], a pair of all rows contiguous; an odd K is followed by a zero."""
    if ternaries.shape[1] % 2:
        ternaries = np.pad(ternaries, ((0, 0), (0, 1)))
    return np.ascontiguousarray((ternaries[:, 0::2] + 3 * ternaries[:, 1::2]).T)


def decode(rows: Rows, shape: tuple[int, int]) -> np.ndarray:
    """Ternaries u8 [N, K]. Damage, naming the row, unless offsets are in order and the codewords of
    every row make K ternaries. Nothing is allocated before that is known."""
    n_rows, k = shape
    ends = _checked_ends(rows, n_rows, (k + 1) // 2)
    out = np.empty((n_rows, k), np.uint8)
    step = max(1, _BLOCK // max(1, 2 * MAX_PAIRS * (k + 1) // 2))
    for first in range(0, n_rows, step):
        last = min(first + step, n_rows)
        words = rows.codewords[ends[first] : ends[last]]
        inside = np.arange(2 * MAX_PAIRS) < 2 * table().pairs[words][:, None]
        block = table().ternaries[words][inside].reshape(last - first, -1)
        out[first:last] = block[:, :k]
        if k % 2 and block[:, k].any():
            raise Damage(-1, f"row {first + int(block[:, k].argmax())}: behind its end is no zero")
    return out


def _checked_ends(rows: Rows, n_rows: int, n_pairs: int) -> np.ndarray:
    """`row_off`, found to be right for rows of `n_pairs` each."""
    off, words = rows.row_off.astype(np.int64), rows.codewords
    if off.shape != (n_rows + 1,) or words.dtype != np.uint16 or words.ndim != 1:
        raise Damage(-1, f"row_off {off.shape} or codewords {words.dtype} do not fit {n_rows} rows")
    if off[0] != 0 or off[-1] != words.size:
        raise Damage(-1, f"row_off goes from {off[0]} to {off[-1]}, codewords are {words.size}")
    if (np.diff(off) < 0).any():
        raise Damage(-1, f"row {int((np.diff(off) < 0).argmax())}: its end lies before its start")
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(table().pairs[words], dtype=np.int64)])
    held = np.diff(total[off])
    if (held != n_pairs).any():
        row = int((held != n_pairs).argmax())
        raise Damage(-1, f"row {row}: its codewords hold {held[row]} pairs, {n_pairs} are wanted")
    return off


# ---- parts of the format `ternary` ------------------------------------------------------------------


def encode_part(codes: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    """Planes of a part `codes` u8 [..., N, ⌈K/5⌉] of weights with K columns, as they are stored.

    Padding that is not zero (another writer's) is coded as if it were columns. FormatError for bytes
    of 243 and above, which the format refuses, too.
    """
    n_bytes = codes.shape[-1]
    if codes.dtype != torch.uint8 or codes.dim() < 2 or not 0 <= n_bytes * PER_BYTE - k < PER_BYTE:
        raise FormatError(
            f"dictionary codes u8 [..., N, bytes] of K = {k}, got {codes.dtype} {list(codes.shape)}"
        )
    if codes.numel() and int(codes.max()) > TOP_BYTE:
        raise FormatError(f"dictionary: codes must be at most {TOP_BYTE}, got {int(codes.max())}")
    ternaries = unpack_ternaries(codes.reshape(-1, n_bytes)).numpy()
    held = n_bytes * PER_BYTE if ternaries[:, k:].any() else k
    rows = encode(ternaries[:, :held])
    return {
        "codewords": _plane(rows.codewords.astype("<u2")),
        "row_off": _plane(rows.row_off.astype("<i4")),
        "head": _plane(np.frombuffer(_head(codes, held), np.uint8)),
    }


def decode_part(planes: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The part u8 [..., N, ⌈K/5⌉], bit for bit; Damage where any byte of the planes was changed."""
    missing = [name for name in PLANES if name not in planes]
    if missing:
        raise Damage(-1, f"plane {SUFFIX}{missing[0]} is missing")
    shape, k, wanted = parse_head(planes["head"].numpy().tobytes())
    n_rows = prod(shape[:-1])
    words, off = planes["codewords"].numpy(), planes["row_off"].numpy()
    if words.size % 2 or off.size != 4 * (n_rows + 1):
        raise Damage(-1, f"{words.size} B of codewords, {off.size} B of row_off for {n_rows} rows")
    rows = Rows(words.view("<u2").astype(np.uint16), off.view("<i4").astype(np.int32))
    ternaries = torch.from_numpy(decode(rows, (n_rows, k)))
    padding = shape[-1] * PER_BYTE - k
    codes = pack_ternaries(torch.nn.functional.pad(ternaries, (0, padding))).view(shape)
    if google_crc32c.value(codes.numpy()) != wanted:
        raise Damage(-1, "the checksum of the decoded codes differs")
    return codes


def _head(codes: torch.Tensor, k: int) -> bytes:
    crc = google_crc32c.value(codes.contiguous().numpy())
    body = _FIXED.pack(_MAGIC, VERSION, codes.dim(), 0, ZEROS, k, crc)
    body += struct.pack(f"<{codes.dim()}Q", *codes.shape)
    return body + struct.pack("<I", zlib.crc32(body))


def parse_head(data: bytes) -> tuple[tuple[int, ...], int, int]:
    """Shape of the part, K, and the CRC32C of the part's bytes; Damage if they are not sound."""
    if len(data) < _FIXED.size + 4 or data[:4] != _MAGIC:
        raise Damage(-1, f"no head of a dictionary-coded part ({data[:8]!r})")
    if data[4] != VERSION:
        raise Damage(
            -1, f"coded by version {data[4]} of {NAME}, this fewbit reads {VERSION}; upgrade it"
        )
    if struct.unpack("<I", data[-4:])[0] != zlib.crc32(data[:-4]):
        raise Damage(-1, "the head's checksum differs")
    _, _, n_axes, zero, zeros, k, crc = _FIXED.unpack_from(data)
    if len(data) != _FIXED.size + 8 * n_axes + 4 or n_axes < 2 or zero:
        raise Damage(-1, f"a head of {len(data)} bytes for {n_axes} axes")
    if zeros != ZEROS:
        raise Damage(-1, f"coded for P(0) = {zeros}, this fewbit reads {ZEROS}")
    shape = struct.unpack_from(f"<{n_axes}Q", data, _FIXED.size)
    if not 0 <= shape[-1] * PER_BYTE - k < PER_BYTE or min(shape) < 1:
        raise Damage(-1, f"the head contradicts itself: {list(shape)} bytes, {k} columns")
    return shape, k, crc


def _plane(array: np.ndarray) -> torch.Tensor:
    """The array's bytes, in memory of their own."""
    return torch.from_numpy(np.array(array.view(np.uint8)))
