"""Codes and tables: golden ties, the 32-bit limit, every cell set, and hostile tables."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.export.dfloat11_code import (
    Unfit,
    huffman_table,
    limited_table,
    make_code,
    make_luts,
    read_luts,
)
from fewbit.quant.errors import CheckpointError

EOF = -1
FIBONACCI = [1, 1]
while len(FIBONACCI) < 45:
    FIBONACCI.append(FIBONACCI[-1] + FIBONACCI[-2])


def counts_of(counts):
    found = np.zeros(256, np.int64)
    for symbol, count in counts.items():
        found[symbol] = count
    return found


def digest(text):
    return hashlib.sha256(text).hexdigest()[:32]


# Made with dahuffman 0.4.2. The order of entries matters too: that of tables follows from it.
@pytest.mark.parametrize(
    ("counts", "table"),
    [
        ({7: 5}, {EOF: (1, 0), 7: (1, 1)}),
        (
            {0: 1, 1: 1, 2: 1, 3: 1, 4: 1},
            {3: (2, 0), 4: (2, 1), EOF: (3, 4), 0: (3, 5), 1: (3, 6), 2: (3, 7)},
        ),
        (
            {3: 2, 9: 2, 11: 1, 12: 1, 200: 4},
            {200: (1, 0), 12: (3, 4), EOF: (4, 10), 11: (4, 11), 3: (3, 6), 9: (3, 7)},
        ),
        (
            {1: 3, 2: 3, 3: 3, 4: 3, 5: 3, 6: 3},
            {6: (2, 0), EOF: (3, 2), 1: (3, 3), 2: (3, 4), 3: (3, 5), 4: (3, 6), 5: (3, 7)},
        ),
    ],
)
def test_golden_tables(counts, table):
    assert list(huffman_table(counts).items()) == list(table.items())


def test_golden_limit_of_32_bits():
    """Fibonacci counts make the deepest code: 45 bits for 45 symbols and the end mark."""
    counts = dict(enumerate(FIBONACCI))
    assert max(bits for bits, _ in huffman_table(counts).values()) == 45
    table = limited_table(counts)
    lengths = [table[symbol][0] for symbol in range(45)]
    assert lengths == [32] * 5 + [31] * 13 + list(range(27, 0, -1))
    pairs = [table[symbol] for symbol in range(45)]
    assert digest(repr(pairs).encode()) == "cbd99a3bd9bde37049d795db29f6c3b8"
    luts = make_luts(table)
    assert (luts.shape, digest(luts.tobytes())) == ((5, 256), "9c5b511ca8f3941ec950c9c870002f9c")


def test_codes_are_those_of_the_package():
    package = pytest.importorskip("dahuffman")
    random = np.random.default_rng(1)
    for _ in range(60):
        n = int(random.choice([1, 2, 5, 40, 240]))
        symbols = sorted(random.choice(240, n, replace=False).tolist())
        counts = {symbol: int(2 ** random.integers(0, 12)) for symbol in symbols}
        codec = package.HuffmanCodec.from_frequencies(counts)
        theirs = codec.get_code_table().items()
        expected = [(s if isinstance(s, int) else EOF, code) for s, code in theirs]
        assert list(huffman_table(counts).items()) == expected, counts


def test_a_constant_gets_one_bit_and_a_full_table():
    """The published compressor crashes here: the root has no value for cell 0, the end mark's."""
    code = make_code(counts_of({7: 1000}))
    assert (code.upper[7], code.length[7], code.eof) == (1 << 63, 1, 0)
    assert code.luts.shape == (2, 256) and (code.luts[0] == 7).all()
    assert code.luts[1].tolist() == [0] * 7 + [1] + [0] * 248


def unary(n):
    """Codes 0, 10, 110, … of symbols 0 … n − 1."""
    return {symbol: (symbol + 1, (1 << symbol + 1) - 2) for symbol in range(n)}


def test_cells_of_the_end_mark_repeat_what_comes_before():
    """At the front of the last row lie the end mark's cells: the row before ends in 9."""
    ones = 0b1111111
    deep = {
        8: (9, ones << 2),
        9: (9, ones << 2 | 1),
        EOF: (9, ones << 2 | 2),
        10: (9, ones << 2 | 3),
    }
    luts = make_luts(unary(7) | deep)
    assert luts[0, 253:].tolist() == [6, 255, 254]
    assert luts[1].tolist() == [8] * 128 + [9] * 128
    assert luts[2].tolist() == [9] * 128 + [10] * 128
    assert luts[3, :11].tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 9, 9, 9]


def test_a_carried_jump_that_leads_back_is_not_carried():
    """All-ones is the deepest code, so that the root ends in the jump to the only other table; there
    the end mark comes first: carrying on would make its cells jump to themselves."""
    luts = make_luts(unary(8) | {EOF: (9, 0b111111110), 8: (9, 0b111111111)})
    assert luts[0, 255] == 255
    assert luts[1].tolist() == [8] * 256


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.integers(0, 239), st.integers(1, 2**40), min_size=1, max_size=60))
def test_tables_lead_each_code_to_its_symbol(counts):
    counts = dict(sorted(counts.items()))
    try:
        code = make_code(counts_of(counts))
    except Unfit:
        return
    lookup = read_luts(code.luts, "x.luts")
    assert (code.luts[:-1] < 240).sum() + (code.luts[:-1] > 256 - len(code.luts)).sum() == (
        code.luts[:-1].size
    ), "every cell is a symbol or a jump to a table"
    for symbol in counts:
        bits, upper = int(code.length[symbol]), int(code.upper[symbol])
        assert upper & (1 << 64 - bits) - 1 == 0
        for rest in (0, (1 << 64 - bits) - 1):
            assert walk(lookup.cells, upper | rest) == symbol | bits << 8


def walk(cells, ahead):
    cell = int(cells[0, ahead >> 56])
    for depth in range(1, 4):
        if cell & 0x8000:
            cell = int(cells[cell & 0x7FFF, ahead >> 56 - 8 * depth & 255])
    return cell


def test_lookups_of_12_bits():
    """As many whole codes as fit, but half an end mark is none, though its cells repeat a symbol."""
    code = make_code(counts_of({122: 40, 121: 20, 120: 10, 119: 1}))
    lookup = read_luts(code.luts, "x.luts")
    codes = {
        f"{int(code.upper[symbol]):064b}"[: code.length[symbol]]: symbol
        for symbol in (122, 121, 120, 119)
    }
    assert sorted(len(text) for text in codes) == [1, 2, 3, 4]
    end_mark = f"{code.eof:064b}"[:4]
    for ahead in range(1 << 12):
        left, symbols = f"{ahead:012b}", []
        while len(symbols) < 6 and (text := next(filter(left.startswith, codes), None)):
            symbols.append(codes[text])
            left = left[len(text) :]
        entry = int(lookup.many[ahead])
        found = [entry >> 8 * i & 255 for i in range(entry >> 48 & 255)]
        if not left.startswith(end_mark):
            assert (found, entry >> 56) == (symbols, 12 - len(left)), f"{ahead:012b}"
        assert found[: len(symbols)] == symbols


# --- refusals -------------------------------------------------------------------------------------


def test_exponents_that_look_like_jumps_are_refused():
    with pytest.raises(Unfit, match=r"5 values have an exponent of 240 or more \(the largest: 255"):
        make_code(counts_of({100: 9, 240: 2, 255: 3}))
    assert make_code(counts_of({239: 2})).length[239] == 1


def test_more_than_17_tables_are_refused():
    """Thirty pairs of siblings at depth 9 would need thirty tables."""
    counts = dict.fromkeys(range(200), 1) | {200: 2000, 201: 4000, 202: 8000}
    with pytest.raises(Unfit, match=r"its code needs [0-9]+ tables, 17 are allowed"):
        make_code(counts_of(counts))


def luts():
    return make_code(counts_of(dict(enumerate(FIBONACCI[:20])))).luts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:1], r"has the shape \[1, 256\]"),
        (lambda t: t[:, :255], r"has the shape \[4, 255\]"),
        (lambda t: np.repeat(t, 5, axis=0), r"has the shape \[20, 256\]"),
        (lambda t: t[0], r"has the shape \[256\]"),
        (lambda t: put(t, -1, 5, 33), r"codes of up to 33 bits"),
        (lambda t: put(t, -1, slice(None), 0), r"codes of up to 0 bits"),
        (lambda t: put(t, -1, 250, 3), r"gives a code to an exponent of 240 or more"),
        (lambda t: put(t, -1, 19, 2), r"belong to no Huffman code"),
        (lambda t: put(t, -1, 18, 1), r"belong to no Huffman code"),
        (lambda t: put(t, 0, 255, 0), r"has the table 1, which no table"),
        (lambda t: put(t, 0, 0, 3), r"has 127 cells of exponent 19, 128 belong to it"),
    ],
)
def test_damaged_tables(change, message):
    good = luts()
    assert read_luts(good, "x.luts").length[19] == 1
    with pytest.raises(CheckpointError, match=f"x.luts: .*{message}"):
        read_luts(change(good.copy()), "x.luts")


def put(table, row, column, value):
    table[row, column] = value
    return table


def test_a_jump_in_circles_is_no_code():
    ones = 0b1111111
    deep = {
        8: (9, ones << 2),
        9: (9, ones << 2 | 1),
        EOF: (9, ones << 2 | 2),
        10: (9, ones << 2 | 3),
    }
    table = make_luts(unary(7) | deep)
    table[2, :128] = 254  # where the end mark's cells are, to this row itself
    assert (read_luts(table, "x.luts").cells[2, :128] == 0).all()
