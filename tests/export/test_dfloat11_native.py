"""The C engine against numpy: the same bytes, the same refusals, nothing else touched."""

from dataclasses import replace

import numpy as np
import pytest
from dfloat11_oracle import normal, weights

from fewbit.export.dfloat11 import encode_unit, open_unit
from fewbit.export.dfloat11_code import make_code
from fewbit.export.dfloat11_native import native
from fewbit.export.dfloat11_numpy import NUMPY, Slice, Target
from fewbit.quant.errors import FormatError
from fewbit.quant.native.compiler import why_not

NATIVE = native()
pytestmark = pytest.mark.skipif(NATIVE is None, reason=str(why_not()))


@pytest.mark.parametrize("n", [1, 3, 4, 5, 4_095, 4_096, 4_097, 20_000])
def test_counts_and_slices(n):
    """From an odd bit on, into buffers whose other bytes must stay as they are."""
    values = normal(n, seed=n)
    assert np.array_equal(NATIVE.count(values), NUMPY.count(values))
    code = make_code(NUMPY.count(values))
    found = []
    for engine in (NATIVE, NUMPY):
        target = Target(
            np.zeros(n + 3, ">u8"), np.full(1_024, 99, np.uint8), np.zeros(3, np.uint32)
        )
        target.words[0] = 1 << 63
        sign_mantissa = np.full(n + 2, 7, np.uint8)
        engine.encode(Slice(values, 1, 1, sign_mantissa[1:-1]), code, target)
        found.append((target.words, target.gaps, target.positions, sign_mantissa))
    for ours, theirs in zip(*found, strict=True):
        assert np.array_equal(ours, theirs)
    assert found[0][3][[0, -1]].tolist() == [7, 7] and found[0][1][0] == 99


def test_gaps():
    gaps = np.random.default_rng(0).integers(0, 32, 4_096, dtype=np.uint8)
    assert np.array_equal(NATIVE.pack(gaps), NUMPY.pack(gaps))


@pytest.mark.parametrize("n", [1, 12_000, 60_000])
def test_decoding_writes_its_elements_only(n):
    values = normal(n)
    stream = open_unit(encode_unit([values]), "x")
    out = np.full(n + 2, 0xABCD, np.uint16)
    assert NATIVE.decode(stream, 0, len(stream.positions) - 1, out[1:-1]) == NUMPY.decode(
        stream, 0, len(stream.positions) - 1, np.empty(n, np.uint16)
    )
    assert np.array_equal(out[1:-1], values) and out[[0, -1]].tolist() == [0xABCD] * 2


def test_a_block_of_one_bit_codes_fills_its_buffer():
    values = weights([127] * 70_000)
    stream = open_unit(encode_unit([values]), "x")
    out = np.empty(70_000, np.uint16)
    status, bit = NATIVE.decode(stream, 0, 3, out)
    assert (status, bit) == (0, 70_000)
    assert np.array_equal(out, values)


def test_arrays_must_be_contiguous():
    with pytest.raises(FormatError, match=r"a contiguous array of uint16 .* strides \(4,\)"):
        NATIVE.count(np.zeros(8, np.uint16)[::2])
    with pytest.raises(FormatError, match=r"a contiguous array of uint16 .* this one is int8"):
        NATIVE.count(np.zeros(8, np.int8))


def test_sizes_are_those_of_the_stream():
    """Whatever C would read or write behind an array's end."""
    values = normal(60_000)
    stream = open_unit(encode_unit([values]), "x")
    n, n_blocks = len(values), len(stream.positions) - 1
    out = np.empty(n, np.uint16)
    for changed in (
        {"encoded": stream.encoded[:4096]},
        {"gaps": stream.gaps[:-1]},
        {"positions": stream.positions[::-1].copy()},
        {"sign_mantissa": stream.sign_mantissa[:-1]},
    ):
        with pytest.raises(FormatError, match=r"are needed|do not ascend"):
            NATIVE.decode(replace(stream, **changed), 0, n_blocks, out)
    for begin, end in ((-1, 1), (0, n_blocks + 1), (1, 1)):
        with pytest.raises(FormatError, match=f"blocks {begin} to {end} were asked for"):
            NATIVE.decode(stream, begin, end, out)
    with pytest.raises(FormatError, match="decoded elements has 59999 entries, 60000 are needed"):
        NATIVE.decode(stream, 0, n_blocks, out[:-1])
