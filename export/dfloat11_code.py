"""DFloat11's Huffman code of bf16 exponents, and the byte-wise tables that its decoders walk.

The code is the published compressor's, to the bit, ties included. Its Huffman package orders nodes by
(count, first symbol of the node); the first symbol of a merged node is that of its smaller child, an
end mark EOF of count 1 is smaller than every symbol, and the smaller child's codes get a 0 in front.
While a code is longer than 32 bits, the k rarest exponents (k = 2, 3, …) are counted as 1. numpy's
`argpartition` names them, with the installed numpy's order of equal counts, as for the publisher.

`luts`, uint8 [k + 1, 256]: a row for each prefix of 8·d bits that longer codes share, sorted by d ≤ 3

    code 1011 0010 1                    row 0, the root        row t
         ^^^^ ^^^^ = prefix of row t    cell 0b10110010        cells 0b1_______
                   ^ fills 2⁷ cells     = 256 − t  (≥ 240)     = the exponent

and last the length of each exponent's code, 0 without one. EOF has no cells: where its code would fill
some, the value before is carried on, at the front of a row the last one of the row before. Valid
streams never reach them, but bits behind the last code may: a carried jump that would lead a decoder
in circles is replaced here by the row's own first value, as is the root's missing one (the published
compressor crashes there).

An exponent of 240 or more (|w| ≥ 2¹¹³, Inf, NaN) cannot be told from a jump, and there are at most 17
rows: `Unfit` says so. Not here: streams (`dfloat11.py`).
"""

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..quant.errors import CheckpointError, FormatError

LONGEST = 32  # bits of a code
FIRST_JUMP = 240  # cells from here on are 256 − row
MAX_TABLES = 257 - FIRST_JUMP
LOOKUP_BITS = 12
MAX_TOGETHER = 6  # symbols of one entry of `Lookup.many`
_EOF = -1

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Shorts = np.ndarray[Any, np.dtype[np.uint16]]
Words = np.ndarray[Any, np.dtype[np.uint64]]
Longs = np.ndarray[Any, np.dtype[np.int64]]
Table = dict[int, tuple[int, int]]  # symbol -> (bits, code)


class Unfit(FormatError):
    """DFloat11 has no place for these weights."""


@dataclass(frozen=True, eq=False)
class Code:
    """A code to write with. upper uint64 [256]: codes from bit 63 down; length uint8 [256].

    eof: EOF's code from bit 63 down. luts: as the format stores them.
    """

    upper: Words
    length: Bytes
    eof: int
    luts: Bytes


@dataclass(frozen=True, eq=False)
class Lookup:
    """A code to read with.

    length uint8 [256]: bits of each symbol's code. cells uint16 [k, 256]: symbol | length << 8,
    0x8000 | row for a jump, 0 for no code. first uint16 [65536]: the cell that 16 bits lead to.
    one uint16 [4096]: symbol | length << 8 of the code that 12 bits begin with, 0 if longer.
    many uint64 [4096]: as many whole codes as fit into 12 bits, at most 6: symbols in bytes 0 … 5,
    their number in byte 6, their bits in byte 7.
    """

    length: Bytes
    cells: Shorts
    first: Shorts
    one: Shorts
    many: Words


# --- making a code --------------------------------------------------------------------------------


def make_code(counts: Longs) -> Code:
    """The code for int64 [256] counts of exponents, at least one of them positive. Unfit: see above."""
    used = [int(symbol) for symbol in np.flatnonzero(counts)]
    if used[-1] >= FIRST_JUMP:
        n_bad = int(counts[FIRST_JUMP:].sum())
        raise Unfit(
            f"{n_bad} values have an exponent of {FIRST_JUMP} or more (the largest: {used[-1]}; "
            f"|w| ≥ 2**113, Inf or NaN), which its tables cannot tell from a jump"
        )
    table = limited_table({symbol: int(counts[symbol]) for symbol in used})
    length = np.zeros(256, np.uint8)
    upper = np.zeros(256, np.uint64)
    for symbol in used:
        bits, code = table[symbol]
        length[symbol] = bits
        upper[symbol] = code << (64 - bits)
    bits, code = table[_EOF]
    return Code(upper, length, code << (64 - bits), make_luts(table))


def limited_table(counts: dict[int, int]) -> Table:
    """Codes of at most 32 bits for `counts`, which are in ascending order of symbols."""
    table = huffman_table(counts)
    symbols, k = list(counts), 2
    frequencies = np.array(list(counts.values()))
    while max(bits for bits, _ in table.values()) > LONGEST:
        rarest = np.argpartition(frequencies, k)[:k]
        k += 1
        table = huffman_table(counts | {symbols[index]: 1 for index in rarest.tolist()})
    return table


def huffman_table(counts: dict[int, int]) -> Table:
    """Codes of `counts` and EOF, in the publisher's order of ties and of entries."""
    heap = [(count, symbol, [(symbol, 0, 0)]) for symbol, count in counts.items()]
    heap.append((1, _EOF, [(_EOF, 0, 0)]))
    heapq.heapify(heap)
    while len(heap) > 1:
        low, high = heapq.heappop(heap), heapq.heappop(heap)
        members = [(symbol, bits + 1, code) for symbol, bits, code in low[2]]
        members += [(symbol, bits + 1, code | 1 << bits) for symbol, bits, code in high[2]]
        heapq.heappush(heap, (low[0] + high[0], low[1], members))
    return {symbol: (bits, code) for symbol, bits, code in heap[0][2]}


def make_luts(table: Table) -> Bytes:
    """uint8 [k + 1, 256] of a code. Unfit if it needs more than 17 rows."""
    codes = {symbol: found for symbol, found in table.items() if symbol != _EOF}
    prefixes = list(dict.fromkeys([(0, 0), *(_prefix(*found) for found in codes.values())]))
    prefixes.sort(key=lambda prefix: prefix[0])
    if len(prefixes) > MAX_TABLES:
        raise Unfit(f"its code needs {len(prefixes)} tables, {MAX_TABLES} are allowed")
    rows = {prefix: row for row, prefix in enumerate(prefixes)}
    luts = np.zeros((len(prefixes) + 1, 256), np.uint8)
    carried = None
    for (depth, prefix), row in rows.items():
        starts = _cells(codes, rows, depth, prefix)
        if carried is None or _leads_back(carried, depth, prefixes):
            carried = starts[min(starts)]
        for cell in range(256):
            carried = starts.get(cell, carried)
            luts[row, cell] = carried
    for symbol, (bits, _) in codes.items():
        luts[-1, symbol] = bits
    return luts


def _prefix(bits: int, code: int) -> tuple[int, int]:
    """(whole bytes before the last one that holds bits of the code, their value)."""
    depth = (bits - 1) // 8
    return depth, code >> (bits - 8 * depth)


def _cells(
    codes: Table, rows: dict[tuple[int, int], int], depth: int, prefix: int
) -> dict[int, int]:
    """First cell -> value, of each code and jump of one row."""
    starts = {}
    for symbol, (bits, code) in codes.items():
        if bits <= 8 * depth or code >> (bits - 8 * depth) != prefix:
            continue
        if bits <= 8 * depth + 8:
            starts[code << (8 * depth + 8 - bits) & 255] = symbol
        else:
            following = code >> (bits - 8 * depth - 8)
            starts[following & 255] = 256 - rows[depth + 1, following]
    return starts


def _leads_back(value: int, depth: int, prefixes: list[tuple[int, int]]) -> bool:
    return value >= FIRST_JUMP and prefixes[256 - value][0] <= depth


# --- reading a code -------------------------------------------------------------------------------


def read_luts(luts: Bytes, where: str) -> Lookup:
    """What decoders of this package walk, for untrusted `luts`. CheckpointError names `where`.

    Checked: the shape; that every row but the root is reached, at one depth; that lengths are 1 … 32
    and make a Huffman code without EOF (the sum of 2^−bits is 1 − 2^−b); that each exponent fills
    as many cells as its length says. A cell that no code can reach decodes to an error.
    """
    if luts.ndim != 2 or luts.shape[1] != 256 or not 2 <= luts.shape[0] <= MAX_TABLES + 1:
        _fail(where, f"has the shape {list(luts.shape)}, [2 … {MAX_TABLES + 1}, 256] is allowed")
    lengths = luts[-1].astype(np.int64)
    _check_lengths(lengths, where)
    depth = _depths(luts, where)
    cells = np.zeros((len(luts) - 1, 256), np.uint16)
    for row, row_depth in enumerate(depth):
        values = luts[row].astype(np.int64)
        bits = lengths[values]
        coded = (values < FIRST_JUMP) & (bits > 8 * row_depth) & (bits <= 8 * row_depth + 8)
        cells[row][coded] = (values | bits << 8)[coded]
        target = 256 - values
        jump = (values >= FIRST_JUMP) & (target < len(depth))
        jump[jump] = np.array(depth)[target[jump]] == row_depth + 1
        cells[row][jump] = (0x8000 | target)[jump]
    _check_cells(cells, lengths, where)
    return _lookup(cells, lengths)


def _fail(where: str, found: str) -> None:
    raise CheckpointError(f"{where}: {found}; the file is damaged: download or export it again")


def _check_lengths(lengths: Longs, where: str) -> None:
    used = lengths[lengths > 0]
    if not used.size or lengths.max() > LONGEST:
        _fail(where, f"has codes of up to {lengths.max()} bits, 1 … {LONGEST} are allowed")
    if lengths[FIRST_JUMP:].any():
        _fail(where, f"gives a code to an exponent of {FIRST_JUMP} or more")
    free = (1 << LONGEST) - int((1 << (LONGEST - used)).sum())
    if free <= 0 or free & (free - 1):
        _fail(where, "has code lengths that belong to no Huffman code with an end mark")


def _depths(luts: Bytes, where: str) -> list[int]:
    """Bytes before each row's own. Rows are sorted by it, so one pass from the root finds all."""
    depth = [0] + [-1] * (len(luts) - 2)
    for row, values in enumerate(luts[:-1]):
        if depth[row] < 0 or depth[row] > 3:
            _fail(where, f"has the table {row}, which no table of up to 3 bytes before leads to")
        for target in np.unique(256 - values[values >= FIRST_JUMP].astype(np.int64)).tolist():
            if row < target < len(depth) and depth[target] < 0:
                depth[target] = depth[row] + 1
    return depth


def _check_cells(cells: Shorts, lengths: Longs, where: str) -> None:
    """EOF's cells may repeat a value, so at least as many as its code fills are asked of each."""
    filled = np.bincount(cells[(cells & 0x8000 == 0) & (cells > 0)] & 255, minlength=256)
    needed = np.where(lengths > 0, 1 << ((-lengths) % 8), 0)
    short = np.flatnonzero(filled < needed)
    if short.size:
        symbol = int(short[0])
        _fail(
            where, f"has {filled[symbol]} cells of exponent {symbol}, {needed[symbol]} belong to it"
        )


def _lookup(cells: Shorts, lengths: Longs) -> Lookup:
    """Bits not seen yet are tried as zeros and as ones: a code is the same for both, whereas half
    of EOF's code could look like the exponent that its cells repeat."""
    first = _first_cells(cells)
    unread = 1 << (16 - LOOKUP_BITS)
    one = first[::unread].copy()
    one[(one & 0x8000 > 0) | (one >> 8 > LOOKUP_BITS) | (one != first[unread - 1 :: unread])] = 0
    ahead, mask = np.arange(1 << LOOKUP_BITS), (1 << LOOKUP_BITS) - 1
    many = np.zeros(len(ahead), np.uint64)
    taken = np.zeros(len(ahead), np.int64)
    number = np.zeros(len(ahead), np.int64)
    fits = np.ones(len(ahead), bool)
    for place in range(MAX_TOGETHER):
        found = one[ahead << taken & mask].astype(np.int64)
        fits &= found == one[ahead << taken & mask | (1 << taken) - 1]
        fits &= (found > 0) & (taken + (found >> 8) <= LOOKUP_BITS)
        many |= np.where(fits, (found & 255) << 8 * place, 0).astype(np.uint64)
        taken += np.where(fits, found >> 8, 0)
        number += fits
    many |= (number << 48).astype(np.uint64) | taken.astype(np.uint64) << np.uint64(56)
    return Lookup(lengths.astype(np.uint8), cells, first, one, many)


def _first_cells(cells: Shorts) -> Shorts:
    ahead = np.arange(1 << 16)
    found = cells[0][ahead >> 8]
    deeper = found & 0x8000 > 0
    found[deeper] = cells[found[deeper] & 0x7FFF, ahead[deeper] & 255]
    return found
