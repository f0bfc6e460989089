"""A unit and back: golden bytes, an outside decoder, sizes around every limit, hostile tensors."""

import hashlib

import numpy as np
import pytest
from dfloat11_oracle import kernel, normal, ruler, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.export import dfloat11
from fewbit.export.dfloat11 import CODED, decode_range, decode_unit, encode_unit, open_unit
from fewbit.export.dfloat11_code import Unfit
from fewbit.export.dfloat11_native import native
from fewbit.export.dfloat11_numpy import NUMPY
from fewbit.quant.errors import CheckpointError

ENGINES = [engine for engine in (NUMPY, native()) if engine is not None]
engines = pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
FIBONACCI = [1, 1]
while len(FIBONACCI) < 24:
    FIBONACCI.append(FIBONACCI[-1] + FIBONACCI[-2])


# --- golden bytes ---------------------------------------------------------------------------------


@engines
def test_golden_unit(engine):
    """Bytes of the published compressor for 40 weights in two tensors."""
    found = encode_unit([ruler(40)[:16].reshape(4, 4), ruler(40)[16:]], engine)
    assert list(found) == list(CODED)
    assert found["encoded_exponent"].tobytes().hex() == "4c9e9938993d3276993f"
    assert found["sign_mantissa"].tobytes().hex() == (
        "9e3cda7817b553f18f2ecc6a08a745e3811fbe5cfa9836d57311af4eec8a28c66503a13fde7c1ab8"
    )
    assert found["output_positions"].tobytes().hex() == "0000000028000000"
    assert found["split_positions"].tolist() == [16]
    assert (found["gaps"].shape, found["gaps"].any()) == ((320,), False)
    root = [121] * 128 + [120] * 64 + [119] * 32 + [118] * 16 + [117] * 12 + [116] * 4
    assert sorted(found["luts"][0].tolist()) == sorted(root)
    assert found["luts"][1, 116:122].tolist() == [6, 5, 4, 3, 2, 1]


@engines
def test_golden_digests(engine):
    """Of the published compressor's bytes for 100,000 weights: 7 blocks, 3 tables, codes of 17 bits."""
    found = encode_unit([ruler(100_000)[:16], ruler(100_000)[16:]], engine)
    digests = {
        name: (part.shape, hashlib.sha256(part.tobytes()).hexdigest()[:32])
        for name, part in found.items()
    }
    assert digests == {
        "luts": ((4, 256), "d5ff2009e6bf0824e27d7ee8d4ab7a6d"),
        "encoded_exponent": ((25000,), "08803b8c0c23c13489c93bd022bd6d7a"),
        "sign_mantissa": ((100000,), "5382031582f8cf2a3194cf1b123c5748"),
        "output_positions": ((32,), "fe0959aa5d9ef31b01b4016dda4fa038"),
        "gaps": ((2240,), "90b003229086b792b37e1f856136d184"),
        "split_positions": ((1,), "5eb6da0e0e522104c6d50b0748e68937"),
    }
    assert np.array_equal(decode_unit(found, "x", engine), ruler(100_000))


CASES = {
    "one": ruler(1),
    "two": ruler(2),
    "constant": weights([127] * 33_000),
    "constant, a block": weights([127] * 32_768),
    "constant, a block and one": weights([127] * 32_769),
    "zeros": np.zeros(5_000, np.uint16),
    "minus zeros": np.array([0, 0x8000] * 500, np.uint16),
    "normal": normal(30_000),
    "skewed": weights(np.where(np.arange(70_000) % 9_973, 120, 77)),
    "uniform": weights(np.arange(9_600) % 200),
    "deep": weights(np.repeat(np.arange(24), FIBONACCI)),
    "deep, shuffled": weights(
        np.random.default_rng(0).permutation(np.repeat(np.arange(24), FIBONACCI))
    ),
    "all patterns": np.random.default_rng(0).permutation(
        np.array([w for w in range(65_536) if w >> 7 & 255 < 240], np.uint16)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_outside_decoder_reads_it(name):
    """The published kernel's thread logic, and both engines, whose tensors are the same bytes."""
    expected = CASES[name]
    units = [encode_unit([expected], engine) for engine in ENGINES]
    for other in units[1:]:
        for part in CODED:
            assert np.array_equal(units[0][part], other[part]), part
    assert np.array_equal(kernel(units[0]), expected)
    for engine in ENGINES:
        assert np.array_equal(decode_unit(units[0], "x", engine), expected), engine.name


def test_patterns_are_kept_to_the_bit():
    """-0, subnormals and the largest finite exponents below 240."""
    expected = np.array([0, 0x8000, 1, 0x8001, 0x007F, 0x3F80, 239 << 7 | 0x807F], np.uint16)
    assert decode_unit(encode_unit([expected]), "x").tolist() == expected.tolist()


@engines
def test_every_length(engine):
    for n in [*range(1, 140), *range(2_040, 2_060)]:
        expected = normal(n, seed=n)
        assert np.array_equal(
            decode_unit(encode_unit([expected], engine), "x", engine), expected
        ), n


def straddler(n_bits):
    """Weights whose codes take `n_bits`: mostly of one bit, and the last, the rarest, of 13."""
    rare = np.repeat(np.arange(12), 1 << np.arange(12))[::-1]
    length = encode_unit([weights(np.append([120] * 30_000, rare))])["luts"][-1].astype(int)
    assert (length[120], length[0]) == (1, 13)
    return weights(np.concatenate([[120] * (n_bits - length[rare].sum()), rare]))


@pytest.mark.parametrize("n_bits", [*range(32_766, 32_790), 65_536, 65_544])
def test_a_last_code_that_straddles_into_a_new_block(n_bits):
    """The stream's end passes the end of a block, at and inside bytes."""
    expected = straddler(n_bits)
    units = [encode_unit([expected], engine) for engine in ENGINES]
    assert all(np.array_equal(units[0][part], other[part]) for other in units for part in CODED)
    assert len(units[0]["encoded_exponent"]) == -(-n_bits // 8)
    assert np.array_equal(kernel(units[0]), expected)
    for engine in ENGINES:
        assert np.array_equal(decode_unit(units[0], "x", engine), expected)


@engines
def test_a_block_without_an_entry_of_its_own(engine):
    """The last code ends at the first whole byte of block 1, in which no code starts: one entry less,
    and no gap. One bit further there is an entry for the end mark, and a gap of 9."""
    expected = straddler(32_776)
    unit = encode_unit([expected], engine)
    assert (len(unit["encoded_exponent"]), len(unit["gaps"])) == (4_097, 640)
    assert unit["output_positions"].view("<u4").tolist() == [0, len(expected)]
    assert not unit["gaps"][320:].any()
    longer = dict(unit, output_positions=np.append(unit["output_positions"], entry(len(expected))))
    assert np.array_equal(decode_unit(longer, "x", engine), expected), "an entry is allowed too"
    further = encode_unit([straddler(32_777)], engine)
    n = len(expected) + 1
    assert further["output_positions"].view("<u4").tolist() == [0, n, n]
    assert further["gaps"][320] >> 3 == 9


def entry(n):
    return np.array([n], "<u4").view(np.uint8)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 239), min_size=1, max_size=12),
    st.integers(1, 4_000),
    st.integers(0, 99),
)
def test_any_exponents(alphabet, n, seed):
    shares = np.random.default_rng(seed).dirichlet(np.full(len(alphabet), 0.3))
    expected = weights(np.random.default_rng(seed).choice(alphabet, n, p=shares), seed)
    units = [encode_unit([expected[: n // 2], expected[n // 2 :]], engine) for engine in ENGINES]
    assert all(np.array_equal(units[0][part], other[part]) for other in units for part in CODED)
    assert np.array_equal(kernel(units[0]), expected)
    for engine in ENGINES:
        assert np.array_equal(decode_unit(units[0], "x", engine), expected)


# --- parts of a unit ------------------------------------------------------------------------------


@engines
def test_ranges_and_small_tasks(engine, monkeypatch):
    """Slices of 1,000 elements and ranges of 2 blocks: shared words, torn blocks, odd bounds."""
    expected = normal(110_000)
    whole = encode_unit([expected], engine)
    monkeypatch.setattr(dfloat11, "SLICE", 1_000)
    monkeypatch.setattr(dfloat11, "RANGE", 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    unit = encode_unit([expected[:3], expected[3:3], expected[3:]], engine)
    assert unit["split_positions"].tolist() == [3, 3]
    for part in ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps"):
        assert np.array_equal(unit[part], whole[part]), part
    stream = open_unit(unit, "x")
    bounds = [0, 1, 12_345, 55_555, 100_001, 109_998, 109_999, 110_000]
    for start in bounds:
        for stop in bounds:
            if start <= stop:
                found = decode_range(stream, start, stop, "x", engine)
                assert np.array_equal(found, expected[start:stop]), (start, stop)


def test_what_has_no_place():
    with pytest.raises(Unfit, match="it has 0 elements"):
        encode_unit([np.empty(0, np.uint16)])
    for bad in (0x7F80, 0xFFC1, 240 << 7):
        with pytest.raises(Unfit, match="1 values have an exponent of 240 or more"):
            encode_unit([np.array([0x3F80, bad], np.uint16)])


def test_bits_per_weight_of_normal_weights():
    """Order-0 bound 10.5: 8 + Huffman 2.6 + gaps 0.2 (published on a real layer: 10.873)."""
    unit = encode_unit([normal(1_000_000)])
    assert 10.6 < 8 * sum(part.nbytes for part in unit.values()) / 1e6 < 10.9


# --- damage ---------------------------------------------------------------------------------------


def small_unit():
    return encode_unit([normal(9_000), normal(5_000, seed=1)])


def outcome(parts, engine):
    """What is decoded, or None for a named error."""
    try:
        return decode_unit(parts, "model.layers.3", engine)
    except CheckpointError as error:
        assert "model.layers.3" in str(error) and "damaged" in str(error), error
        return None


@pytest.mark.parametrize("part", CODED)
def test_flipped_bytes(part):
    """Each byte: an error, or values whose damage a format without checksums cannot show. Engines
    agree on which. Gaps and positions are redundant, so that all their damage shows."""
    unit = small_unit()
    expected = decode_unit(unit, "x")
    raw = unit[part].tobytes()
    step = 1 if len(raw) < 3_000 else 17
    silent = 0
    for at in range(0, len(raw), step):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8 if at % 3 else 0xFF
        value = np.frombuffer(bytes(damaged), unit[part].dtype).reshape(unit[part].shape)
        found = [outcome(unit | {part: value}, engine) for engine in ENGINES]
        assert len({None if one is None else one.tobytes() for one in found}) == 1, at
        silent += found[0] is not None
        if found[0] is not None and part == "sign_mantissa":
            assert (found[0] != expected).sum() == 1, at
    if part in ("gaps", "output_positions"):
        assert silent == 0
    if part == "sign_mantissa":
        assert silent == len(range(0, len(raw), step))


@pytest.mark.parametrize("part", CODED)
def test_truncated_and_extended_tensors(part):
    unit = small_unit()
    sizes = {1, 4, 8, 320, 4_096} if part != "luts" else {1}
    for size in sizes:
        shorter = unit[part][:-size]
        longer = np.concatenate([unit[part], np.zeros_like(unit[part][:1]).repeat(size, axis=0)])
        for value in (shorter, longer, unit[part][:0]):
            if part == "split_positions" and len(value) <= 1:
                continue  # how many there should be is for the reader of the pattern to know
            for engine in ENGINES:
                assert outcome(unit | {part: value}, engine) is None, (size, value.shape)


def test_random_tensors_are_refused_or_decoded():
    """Noise of the right sizes: nothing but named errors and arrays."""
    unit, random = small_unit(), np.random.default_rng(5)
    for _ in range(60):
        part = CODED[random.integers(0, 5)]
        noise = random.integers(0, 256, unit[part].size, dtype=np.uint8).reshape(unit[part].shape)
        found = [outcome(unit | {part: noise}, engine) for engine in ENGINES]
        assert len({None if one is None else one.tobytes() for one in found}) == 1


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("luts", lambda p: p.astype(np.int16), r"x.luts is int16 \[[0-9]+, 256\], uint8"),
        ("gaps", lambda p: p.reshape(-1, 2), r"x.gaps is uint8 \[160, 2\]"),
        ("gaps", lambda p: p[:-1], "x.gaps has 319 bytes, 1 blocks need 320 each"),
        ("sign_mantissa", lambda p: p[:0], "x.sign_mantissa has 0 elements"),
        ("output_positions", lambda p: p[:3], "x.output_positions has 3 bytes, 1 blocks need 8"),
        ("output_positions", lambda p: p[::-1].copy(), "gives block 0 "),
        ("split_positions", lambda p: p + 999, r"split_positions does not ascend within 0 … 40"),
        ("encoded_exponent", lambda p: p[:-1], "codes"),
    ],
)
def test_errors_name_tensor_and_block(part, change, message):
    unit = encode_unit([ruler(40)[:16], ruler(40)[16:]])
    with pytest.raises(CheckpointError, match=message):
        decode_unit(unit | {part: change(unit[part])}, "x")


def test_a_missing_tensor():
    unit = small_unit()
    del unit["gaps"]
    with pytest.raises(CheckpointError, match=r"x.gaps is missing; download"):
        decode_unit(unit, "x")


@engines
def test_errors_name_the_block(engine):
    unit = encode_unit([normal(60_000)])
    damaged = unit["gaps"].copy()
    damaged[320 * 2 + 7] ^= 0xFF
    with pytest.raises(
        CheckpointError, match=r"layer.gaps disagrees .* block 2; the file is damaged"
    ):
        decode_unit(unit | {"gaps": damaged}, "layer", engine)


def test_positions_that_promise_other_elements():
    """Monotone and ending in n, but wrong."""
    unit = encode_unit([normal(60_000)])
    positions = unit["output_positions"].view("<u4").copy()
    positions[2] += 1
    for engine in ENGINES:
        with pytest.raises(CheckpointError, match=r"miscounts the codes of block 1"):
            decode_unit(unit | {"output_positions": positions.view(np.uint8)}, "x", engine)
