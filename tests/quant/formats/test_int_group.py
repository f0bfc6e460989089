"""`int_group`: golden bytes, exact round trips, error bounds in float64, damaged parts."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.quant.errors import FormatError, RecipeError
from fewbit.quant.formats.int_group import (
    FORMAT,
    IntGroupOptions,
    pack_bits,
    unpack_bits,
)

GROUPS = (16, 32, 64, 128, "row")


def padded(weight: torch.Tensor, options: IntGroupOptions) -> torch.Tensor:
    extra = FORMAT.padded_k(weight.shape[-1], options) - weight.shape[-1]
    return torch.nn.functional.pad(weight, (0, extra))


def quantize(weight: torch.Tensor, options: IntGroupOptions):
    """(parts, values of the padded weight, scales)."""
    full = padded(weight, options)
    scales = FORMAT.fit(full, options)
    codes, values = FORMAT.round(full, scales, 0, options)
    return FORMAT.pack(codes, scales, options), values, scales


# Codes 0..7 hold the listed values; bytes were worked out by hand from the bit stream: code k
# fills bits k*b .. k*b+b-1, bit i of the stream is bit i % 8 of byte i // 8.
GOLDEN = {
    2: ([0, 1, 2, 3, 3, 2, 1, 0], [0b11_10_01_00, 0b00_01_10_11]),
    3: (
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0b10_001_000, 0b1_100_011_0, 0b111_110_10],
    ),
    4: ([0, 1, 2, 3, 12, 13, 14, 15], [0x10, 0x32, 0xDC, 0xFE]),
    5: (
        [1, 2, 4, 8, 16, 31, 0, 21],
        [0b010_00001, 0b0_00100_00, 0b0000_0100, 0b00_11111_1, 0b10101_000],
    ),
    6: ([1, 2, 4, 63, 32, 0, 0, 33], [0x81, 0x40, 0xFC, 0x20, 0x00, 0x84]),
    7: (
        [1, 2, 4, 8, 16, 32, 64, 127],
        [0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0xFF],
    ),
    8: ([0, 1, 2, 127, 128, 200, 254, 255], [0, 1, 2, 127, 128, 200, 254, 255]),
}


@pytest.mark.parametrize("bits", range(2, 9))
def test_golden_bytes(bits: int) -> None:
    codes, expected = GOLDEN[bits]
    packed = pack_bits(torch.tensor([codes], dtype=torch.uint8), bits)
    assert packed.tolist() == [expected]
    assert unpack_bits(packed, bits).tolist() == [codes]


def test_golden_weight_of_one_group() -> None:
    """Scale sign, middle zero and byte order together, on numbers exact in fp16."""
    options = IntGroupOptions(bits=4, group=16)
    weight = torch.tensor([[2.0, -1.75, 0.25, 0.0, *[0.5] * 12]])
    parts, _, _ = quantize(weight, options)
    # largest magnitude is +2, so the scale is -2/8; codes are 8 + w / -0.25
    assert parts["scale_group"].tolist() == [[-0.25]]
    assert parts["codes"].tolist() == [[0xF0, 0x87, *[0x66] * 6]]
    assert torch.equal(FORMAT.unpack(parts, (1, 16), options), weight)


def test_golden_asymmetric_group() -> None:
    options = IntGroupOptions(bits=2, group=16, symmetric=False)
    weight = torch.tensor([[-0.5, 0.0, 0.5, 1.0, *[0.0] * 12]])
    parts, _, _ = quantize(weight, options)
    assert parts["scale_group"].tolist() == [[0.5]]
    assert parts["zero_group"].tolist() == [[1]]
    assert parts["codes"].tolist() == [[0b11_10_01_00, *[0b01_01_01_01] * 3]]
    assert torch.equal(FORMAT.unpack(parts, (1, 16), options), weight)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "scale"),
    list(itertools.product(range(2, 9), GROUPS, (True, False), ("fp16", "bf16"))),
)
def test_round_trip_is_exact(bits: int, group: int | str, symmetric: bool, scale: str) -> None:
    options = IntGroupOptions(bits, group, symmetric, scale)
    torch.manual_seed(bits)
    for shape in ((5, 131), (2, 3, 40)):
        parts, values, _ = quantize(torch.randn(shape), options)
        FORMAT.check(parts, shape, options)
        specs = FORMAT.part_specs(shape, options)
        assert {name: (p.dtype, tuple(p.shape)) for name, p in parts.items()} == {
            name: (spec.dtype, spec.shape) for name, spec in specs.items()
        }
        decoded = FORMAT.unpack(parts, shape, options)
        assert decoded.dtype == torch.float32
        assert torch.equal(decoded, values[..., : shape[-1]])
        stored = sum(part.numel() * part.element_size() for part in parts.values())
        assert FORMAT.bits(shape, options) == 8 * stored / torch.Size(shape).numel()


@settings(max_examples=150, deadline=None)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from(GROUPS),
    symmetric=st.booleans(),
    scale=st.sampled_from(["fp16", "bf16"]),
    k=st.integers(1, 200),
    n=st.integers(1, 4),
    exponent=st.integers(-8, 3),
    shift=st.floats(-2, 2),
    seed=st.integers(0, 2**31),
)
def test_error_is_at_most_half_a_step(
    bits: int,
    group: int | str,
    symmetric: bool,
    scale: str,
    k: int,
    n: int,
    exponent: int,
    shift: float,
    seed: int,
) -> None:
    """float64 oracle: |w − ŵ| ≤ |scale| / 2 wherever the code was not clipped, and where it was,
    ŵ is the end of the grid."""
    options = IntGroupOptions(bits, group, symmetric, scale)
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(n, k, generator=generator) + shift) * 10.0**exponent
    parts, _, _ = quantize(weight, options)
    decoded = FORMAT.unpack(parts, (n, k), options).double()
    size = FORMAT.group_size(k, options)
    step = parts["scale_group"].double().repeat_interleave(size, -1)[:, :k]
    zero = float(1 << (bits - 1))
    if not symmetric:
        zero = parts["zero_group"].double().repeat_interleave(size, -1)[:, :k]
    wanted = weight.double() / step + zero
    inside = (wanted > -0.5) & (wanted < 2**bits - 0.5)
    error = (weight.double() - decoded).abs()
    # the code is chosen in fp32: ties may fall on either side by its rounding
    assert bool((error <= step.abs() * (0.5 + 1e-4))[inside].all())
    ends = (wanted.clamp(0, 2**bits - 1) - zero) * step
    assert torch.allclose(decoded[~inside], ends[~inside], rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", ["fp16", "bf16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fitted_range_is_covered(bits: int, symmetric: bool, scale: str) -> None:
    """Only rounding of the stored scale may clip: by less than a step at fp16, never at 4 bits."""
    options = IntGroupOptions(bits, 64, symmetric, scale)
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    parts, _, _ = quantize(weight, options)
    step = parts["scale_group"].float().abs().repeat_interleave(64, -1)
    error = (weight - FORMAT.unpack(parts, (64, 128), options)).abs()
    # The symmetric grid has one value less on the side away from its largest weight.
    if not symmetric:
        assert bool((error <= 0.75 * step + 2**-8 * weight.abs()).all())
    else:
        assert bool((error <= step * (1 + 2**-8 * 2 ** (bits - 1))).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_rows_and_zero_groups_stay_zero(symmetric: bool) -> None:
    options = IntGroupOptions(4, 16, symmetric)
    weight = torch.randn(4, 48)
    weight[1] = 0
    weight[2, 16:32] = 0
    decoded = FORMAT.unpack(quantize(weight, options)[0], (4, 48), options)
    assert torch.equal(decoded[1], torch.zeros(48))
    assert torch.equal(decoded[2, 16:32], torch.zeros(16))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [3.0, -0.7, 1e-3])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_constant_groups(bits: int, value: float, symmetric: bool) -> None:
    """A constant sits at the end of the grid: only the scale's rounding remains."""
    options = IntGroupOptions(bits, 32, symmetric, "fp16")
    decoded = FORMAT.unpack(quantize(torch.full((2, 32), value), options)[0], (2, 32), options)
    # fp16 scales below 2^-14 are multiples of 2^-24
    limit = abs(value) * 2**-11 + (2**bits) * 2**-24
    assert float((decoded - value).abs().max()) <= limit


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale", ["fp16", "bf16"])
def test_tiny_weights(scale: str, symmetric: bool) -> None:
    """1e-12: bf16 keeps them, fp16 scales cannot (their step is 6e-8): they become zeros."""
    options = IntGroupOptions(8, 16, symmetric, scale)
    weight = torch.linspace(-1e-12, 1e-12, 16)[None]
    parts, _, _ = quantize(weight, options)
    FORMAT.check(parts, (1, 16), options)
    decoded = FORMAT.unpack(parts, (1, 16), options)
    if scale == "fp16":
        assert torch.equal(decoded, torch.zeros(1, 16))
    else:
        assert float((decoded - weight).abs().max()) <= 2e-14


@pytest.mark.parametrize("largest", [7e-3, 1e-3, 1e-4])
def test_small_8_bit_groups_keep_their_resolution(largest: float) -> None:
    """The scale largest/128 is a subnormal fp16 number; it must not be raised to the smallest
    normal one (6.1e-5), nor clip."""
    options = IntGroupOptions(8, 128, True, "fp16")
    torch.manual_seed(1)
    weight = torch.rand(8, 128) * 2 * largest - largest
    decoded = FORMAT.unpack(quantize(weight, options)[0], (8, 128), options)
    # half a step, or one for the far side of the grid, which has one value less
    step = largest / 128 + 2**-24
    assert float((weight - decoded).abs().max()) <= step * 1.001
    assert float((weight - decoded).norm()) <= 0.5 * step * weight.numel() ** 0.5


@pytest.mark.parametrize("symmetric", [True, False])
def test_scale_that_overflows_fp16(symmetric: bool) -> None:
    weight = torch.full((1, 16), 1e6)
    weight[0, 0] = -1e6
    with pytest.raises(FormatError, match="use scale = 'bf16'"):
        quantize(weight, IntGroupOptions(4, 16, symmetric, "fp16"))
    decoded = FORMAT.unpack(
        quantize(weight, options := IntGroupOptions(4, 16, symmetric, "bf16"))[0], (1, 16), options
    )
    assert float((decoded - weight).abs().max()) <= 1e6 / 7


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fit_refuses_nan_and_inf(bad: float) -> None:
    weight = torch.zeros(2, 16)
    weight[1, 3] = bad
    with pytest.raises(FormatError, match="NaN or Inf"):
        FORMAT.fit(weight, IntGroupOptions(4, 16))


def damage(parts: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    codes, scale, zero = parts["codes"], parts["scale_group"], parts["zero_group"]
    nan_scale, inf_scale, high_zero = scale.clone(), scale.clone(), zero.clone()
    nan_scale[1, 0], inf_scale[0, 1], high_zero[2, 1] = float("nan"), float("-inf"), 8
    return {
        "missing": {"codes": codes, "scale_group": scale},
        "extra": {**parts, "surplus": codes},
        "short codes": {**parts, "codes": codes[:, :-1]},
        "codes dtype": {**parts, "codes": codes.to(torch.int8)},
        "scale dtype": {**parts, "scale_group": scale.bfloat16()},
        "scale shape": {**parts, "scale_group": scale[:, :1]},
        "nan": {**parts, "scale_group": nan_scale},
        "inf": {**parts, "scale_group": inf_scale},
        "zero too high": {**parts, "zero_group": high_zero},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "parts must be"),
        ("extra", "parts must be"),
        ("short codes", "codes must be"),
        ("codes dtype", "codes must be"),
        ("scale dtype", "scale_group must be"),
        ("scale shape", "scale_group must be"),
        ("nan", "NaN or Inf"),
        ("inf", "NaN or Inf"),
        ("zero too high", "zero_group must be below 8, got 8"),
    ],
)
def test_damaged_parts_are_named(kind: str, message: str) -> None:
    options = IntGroupOptions(3, 16, symmetric=False)
    parts, _, _ = quantize(torch.randn(4, 32), options)
    FORMAT.check(parts, (4, 32), options)
    with pytest.raises(FormatError, match=message):
        FORMAT.check(damage(parts, kind), (4, 32), options)


@pytest.mark.parametrize(
    "keys",
    [
        {"bits": 1},
        {"bits": 9},
        {"bits": 4.0},
        {"bits": True},
        {"group": 48},
        {"group": "col"},
        {"group": True},
        {"symmetric": 1},
        {"scale": "fp32"},
    ],
)
def test_bad_options_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"int_group: .* got"):
        IntGroupOptions(**keys)  # type: ignore[arg-type]


def test_more_bits_err_less() -> None:
    torch.manual_seed(2)
    weight = torch.randn(16, 256)
    errors = []
    for bits in range(2, 9):
        options = IntGroupOptions(bits, 64)
        decoded = FORMAT.unpack(quantize(weight, options)[0], (16, 256), options)
        errors.append(float((decoded - weight).norm() / weight.norm()))
    assert all(later < 0.7 * earlier for earlier, later in itertools.pairwise(errors))
    assert errors[2] < 0.12 and errors[6] < 0.007
