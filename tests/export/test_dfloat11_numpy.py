"""The numpy engine by itself: gaps, slices in any order, and what a range reports."""

import numpy as np
import pytest
from dfloat11_oracle import normal, ruler

from fewbit.export.dfloat11 import encode_unit, open_unit
from fewbit.export.dfloat11_code import make_code
from fewbit.export.dfloat11_numpy import (
    BAD_CODE,
    BAD_COUNT,
    BAD_GAP,
    FINE,
    NUMPY,
    Slice,
    Target,
    pack_gaps,
    unpack_gaps,
)


def test_gaps_are_five_bits_each_from_the_top():
    gaps = np.array([0b10001, 0b00110, 31, 0, 1, 2, 4, 8], np.uint8)
    packed = pack_gaps(gaps)
    text = "".join(f"{byte:08b}" for byte in packed.tolist())
    assert text == "1000100110111110000000001000100010001000"
    assert np.array_equal(unpack_gaps(packed), gaps)
    many = np.random.default_rng(0).integers(0, 32, 4_096, dtype=np.uint8)
    assert np.array_equal(unpack_gaps(pack_gaps(many)), many)
    assert np.array_equal(pack_gaps(many), np.packbits(np.unpackbits(many).reshape(-1, 8)[:, 3:]))


def test_slices_in_any_order_give_one_stream():
    """40 codes of the ruler; the bytes are golden in test_dfloat11.py."""
    weights = ruler(40)
    code = make_code(NUMPY.count(weights))
    lengths = code.length[weights >> 7 & 255].astype(int)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    target = Target(np.zeros(2, ">u8"), np.zeros(512, np.uint8), np.zeros(1, np.uint32))
    sign_mantissa = np.zeros(40, np.uint8)
    for first, stop in ((17, 33), (33, 40), (0, 5), (5, 17)):
        part = slice(first, stop)
        NUMPY.encode(
            Slice(weights[part], first, int(starts[first]), sign_mantissa[part]), code, target
        )
    assert target.words.tobytes().hex()[:18] == "4c9e9938993d327699"
    assert target.gaps[:2].tolist() == [0, int(starts[starts >= 64][0]) - 64]
    assert sign_mantissa.tobytes().hex()[:16] == "9e3cda7817b553f1"


def test_counts():
    counts = NUMPY.count(ruler(40))
    assert {e: int(counts[e]) for e in np.flatnonzero(counts)} == {
        121: 20, 120: 10, 119: 5, 118: 3, 117: 1, 116: 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: None, FINE),
        (lambda s: s.gaps.__setitem__(330, s.gaps[330] ^ 0xFF), BAD_GAP),
        (lambda s: s.positions.__setitem__(1, s.positions[1] + 1), BAD_COUNT),
        (lambda s: s.lookup.first.__setitem__(slice(None), 0), BAD_CODE),
    ],
)
def test_what_a_range_reports(change, expected):
    weights = normal(30_000)
    stream = open_unit(encode_unit([weights], NUMPY), "x")
    change(stream)
    out = np.zeros(30_000, np.uint16)
    status, where = NUMPY.decode(stream, 0, len(stream.positions) - 1, out)
    assert status == expected
    if status == FINE:
        assert np.array_equal(out, weights)
        assert -(-where // 8) == len(stream.encoded)
    if status == BAD_GAP:
        assert where // 512 == 1, "330 bytes of gaps lie in block 1"
