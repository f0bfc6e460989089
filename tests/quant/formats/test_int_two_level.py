"""`int_two_level`: the int8 range exhaustively, golden bytes, exact round trips, damaged parts."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.quant.errors import FormatError, RecipeError
from fewbit.quant.formats import int_two_level
from fewbit.quant.formats.int_two_level import FORMAT, IntTwoLevelOptions

OPTIONS = [
    IntTwoLevelOptions(4, group, dialect)
    for group, dialect in itertools.product((32, 64, 128, "row"), ("offset", "zero"))
]
GROUPED = [options for options in OPTIONS if options.group != "row"]


def padded(weight: torch.Tensor, options: IntTwoLevelOptions) -> torch.Tensor:
    extra = FORMAT.padded_k(weight.shape[-1], options) - weight.shape[-1]
    return torch.nn.functional.pad(weight, (0, extra))


def quantize(weight: torch.Tensor, options: IntTwoLevelOptions, scales=None):
    """(parts, values of the padded weight, scales)."""
    full = padded(weight, options)
    scales = FORMAT.fit(full, options) if scales is None else scales
    codes, values = FORMAT.round(full, scales, 0, options)
    return FORMAT.pack(codes, scales, options), values, scales


def decoded_integers(codes: torch.Tensor, scales, options: IntTwoLevelOptions) -> torch.Tensor:
    """Independent oracle in int64: codes [N, K] to w8, without any wrapping."""
    step = scales["scale_group"].long().repeat_interleave(int(options.group), -1)
    shift = scales[options.shift_part].long().repeat_interleave(int(options.group), -1)
    if options.dialect == "zero":
        return (codes.long() - shift) * step
    return codes.long() * step + shift


def every_range(largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs (min, max) of integers in [−largest, largest], min ≤ max."""
    ends = torch.arange(-largest, largest + 1, dtype=torch.float32)
    low, high = torch.meshgrid(ends, ends, indexing="ij")
    return low[low <= high], high[low <= high]


@pytest.mark.parametrize("dialect", ["offset", "zero"])
@pytest.mark.parametrize("largest", [119, 127])
def test_every_range_stays_in_int8_for_every_code_that_rounding_emits(largest, dialect) -> None:
    """Exhaustive over (min, max); targets far outside the range force the extreme codes, as error
    feedback does. Holds for every candidate of a search too."""
    options = IntTwoLevelOptions(4, 32, dialect)
    low, high = every_range(largest)
    row = torch.ones(len(low), 1, dtype=torch.float16)
    pushed = torch.tensor([-1e4, -300.0, -128, -64, 0, 64, 127, 300, 1e4]).repeat(4)[:32]
    for factor, shift in itertools.product(
        int_two_level._FACTORS, int_two_level._SHIFTS[options.dialect]
    ):
        if dialect == "zero":
            low, high = low.clamp(max=0), high.clamp(min=0)
        scales = int_two_level._grid(low[:, None], high[:, None], row, options, factor, shift)
        targets = pushed.expand(len(low), -1)
        codes, values = FORMAT.round(targets, scales, 0, options)
        integers = decoded_integers(codes, scales, options)
        assert int(integers.min()) >= -128 and int(integers.max()) <= 127
        assert torch.equal(values, integers.float())
        assert int(codes.max()) <= 15
        FORMAT.check(FORMAT.pack(codes, scales, options), (len(low), 32), options)
    if dialect == "offset":
        assert int(codes.min()) == 0 and int(codes.max()) == 15  # no code is lost to the range


def published_zero(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and zero point by the formula of published checkpoints."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = torch.floor((high - low) / 15 + 0.5).clamp(min=1)
    return step, torch.floor(-low / step + 0.5).clamp(0, 15)


def test_what_the_protective_range_and_the_clamp_are_for() -> None:
    """Without clamped codes: nearest codes of ±119 fit int8, of ±120 do not; other codes never do."""
    for largest, fits in ((119, True), (120, False)):
        low, high = every_range(largest)
        step, zero = published_zero(low, high)
        top = torch.floor(high / step + 0.5).add(zero).clamp(0, 15)
        bottom = torch.floor(low / step + 0.5).add(zero).clamp(0, 15)
        worst = float(((top - zero) * step).max()), float(((bottom - zero) * step).min())
        assert (worst[0] <= 127 and worst[1] >= -128) is fits, worst
        assert bool(
            (((15 - zero) * step) > 127).any()
        )  # code 15 of a group that should not emit it


@pytest.mark.parametrize("dialect", ["offset", "zero"])
def test_all_codes_of_all_integers(dialect: str) -> None:
    """Every stored (s2, o) or (s2, z): `check` accepts exactly what fits int8, and what it accepts
    `integer_form` decodes without wrapping."""
    options = IntTwoLevelOptions(4, 32, dialect)
    shifts = range(-128, 128) if dialect == "offset" else range(16)
    rows = torch.tensor(list(itertools.product(range(1, 18), shifts)))
    shift = rows[:, 1:].to(torch.int8 if dialect == "offset" else torch.uint8)
    scales = {
        "scale_row": torch.full((len(rows), 1), 0.5, dtype=torch.float16),
        "scale_group": rows[:, :1].to(torch.uint8),
        options.shift_part: shift,
    }
    for code in range(16):
        codes = torch.full((len(rows), 32), code, dtype=torch.uint8)
        integers = decoded_integers(codes, scales, options)
        fits = ((integers >= -128) & (integers <= 127)).all(-1)
        parts = FORMAT.pack(codes, scales, options)
        good = {name: part[fits] for name, part in parts.items()}
        shape = (int(fits.sum()), 32)
        FORMAT.check(good, shape, options)
        form = FORMAT.integer_form(good, shape, options)
        assert torch.equal(form.codes.long(), integers[fits])
        assert torch.equal(FORMAT.unpack(good, shape, options), integers[fits] * 0.5)
        if not bool(fits.all()):
            with pytest.raises(FormatError, match="codes must decode to -128 to 127"):
                FORMAT.check(parts, (len(rows), 32), options)


def test_golden_group() -> None:
    """Worked by hand: row maximum 11.9 gives s1 = fp16(0.1); the second group spans −1.5 … 0."""
    options = IntTwoLevelOptions(4, 32, "offset")
    first = [11.9, -11.9, *[0.0] * 30]
    second = [-1.5, 0.0, -1.0, -0.5, *[-1.5] * 28]
    parts, _, _ = quantize(torch.tensor([first + second]), options)
    scale = float(torch.tensor(0.1).half())
    assert parts["scale_row"].tolist() == [[scale]]
    assert parts["scale_group"].tolist() == [[16, 1]]  # rnd(238/15) = 16, rnd(15/15) = 1
    # centred: 0 − 7.5·16 = −120; for the second −7.5 − 7.5 = −15
    assert parts["offset_group"].tolist() == [[-120, -15]]
    # codes: rnd(239/16) = 15, rnd(1/16) = 0, zeros rnd(120/16 = 7.5) = 8
    assert parts["codes"].tolist() == [[0x0F, *[0x88] * 15, 0xF0, 0xA5, *[0x00] * 14]]
    decoded = FORMAT.unpack(parts, (1, 64), options)
    integers = [[120, -120, *[8] * 30, -15, 0, -10, -5, *[-15] * 28]]
    assert torch.equal(decoded, torch.tensor(integers) * torch.tensor(scale))


def test_golden_row() -> None:
    """Row of −3.75 … 3.75: step 0.5, exact in fp16, in both dialects."""
    weight = torch.tensor([[-3.75, 3.75, -3.25, 0.25, 0.75, 1.25, 1.75, 2.25]])
    options = IntTwoLevelOptions(4, "row", "offset")
    parts, _, _ = quantize(weight, options)
    assert parts["scale_row"].tolist() == [[0.5]] and parts["offset_row"].tolist() == [[-3.75]]
    assert parts["codes"].tolist() == [[0xF0, 0x81, 0xA9, 0xCB]]
    assert torch.equal(FORMAT.unpack(parts, (1, 8), options), weight)
    form = FORMAT.integer_form(parts, (1, 8), options)
    assert form.codes.tolist() == [[-8, 7, -7, 0, 1, 2, 3, 4]]
    assert form.offset.tolist() == [[0.25]]
    options = IntTwoLevelOptions(4, "row", "zero")
    parts, _, _ = quantize(weight - 0.25, options)
    assert parts["scale_row"].tolist() == [[0.5]] and parts["zero_row"].tolist() == [[8]]
    assert torch.equal(FORMAT.unpack(parts, (1, 8), options), weight - 0.25)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(5, 131), (2, 3, 40), (1, 8)])
def test_round_trip_is_exact(options: IntTwoLevelOptions, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
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
    found = FORMAT.padded_shape({n: tuple(p.shape) for n, p in parts.items()}, options)
    assert found == (*shape[:-1], FORMAT.padded_k(shape[-1], options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(5, 131), (2, 3, 40)])
def test_integer_form_is_the_weight(options: IntTwoLevelOptions, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    parts, _, _ = quantize(torch.randn(shape) + 0.3, options)
    form = FORMAT.integer_form(parts, shape, options)
    assert form.codes.dtype == torch.int8 and form.codes.shape == shape
    value = form.codes.double() * form.scale.double()
    if form.offset is not None:
        value = value + form.offset.double()
        assert bool((form.offset.abs() <= 9 * form.scale).all())
    decoded = FORMAT.unpack(parts, shape, options).double()
    assert torch.allclose(value, decoded, rtol=3e-7, atol=1e-6 * float(form.scale.max()))


def test_bits_of_the_default() -> None:
    """4 + 8/128 + 8/128 + 16/K."""
    assert FORMAT.bits((64, 4096), IntTwoLevelOptions()) == 4 + 16 / 128 + 16 / 4096
    row = IntTwoLevelOptions(4, "row")
    assert FORMAT.bits((64, 4096), row) == 4 + 32 / 4096


GROUP_KINDS = ("random", "constant", "positive", "zero", "outlier", "subnormal", "ladder")


def group_of(kind: str, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(32, generator=generator)
    size = 10 ** float(torch.rand((), generator=generator) * 5 - 3)
    return {
        "random": values * size,
        "constant": values[:1].expand(32) * size,
        "positive": values.abs() * size + size,
        "zero": values * 0,
        "outlier": torch.cat([values[:31] * size, torch.tensor([300 * size])]),
        "subnormal": values * 1e-6,
        "ladder": torch.linspace(-1, 1, 32) * size,
    }[kind]


@settings(max_examples=200, deadline=None)
@given(
    options=st.sampled_from(OPTIONS),
    kinds=st.lists(st.sampled_from(GROUP_KINDS), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
)
def test_error_is_bounded_for_hard_groups(options, kinds, seed) -> None:
    """float64 oracle: half a step where the grid reaches, else the end of the grid; fitted grids
    miss the range by half of what rounding the step took from it, plus a unit for the shift."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.cat([group_of(kind, generator) for kind in kinds])[None]
    parts, _, _ = quantize(weight, options)
    FORMAT.check(parts, tuple(weight.shape), options)
    decoded = FORMAT.unpack(parts, tuple(weight.shape), options).double()
    assert bool(torch.isfinite(decoded).all())
    unit = parts["scale_row"].double()
    if options.group == "row":
        step = unit.expand_as(weight)
        reach = step + 2**-10 * weight.abs().max() + 16 * 2**-24
    else:
        step = unit * parts["scale_group"].double().repeat_interleave(int(options.group), -1)
        step = step[:, : weight.shape[-1]]
        # ≤ 3.75 units from the rounded step, 1 from the shift, 8 from the int8 range of offsets
        # on nearly constant groups; dialect "zero" moves its grid by up to half a step
        reach = 0.5 * step + (12.75 + 1e-3) * unit + 0.5 * step
    error = (weight.double() - decoded).abs()
    assert bool((error <= reach).all())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_zero_rows_and_zero_weights(options: IntTwoLevelOptions) -> None:
    weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    parts, _, _ = quantize(weight, options)
    decoded = FORMAT.unpack(parts, (3, 256), options)
    assert float(decoded[1].abs().max()) <= 8 * 2**-24  # a grid of the finest scale
    assert bool((parts["scale_row"] > 0).all())
    whole = quantize(torch.zeros(2, 256), options)[0]
    FORMAT.check(whole, (2, 256), options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [65504.0, 1e-7, 6e-5, 1.0])
def test_sizes_of_weights(options: IntTwoLevelOptions, size: float) -> None:
    """Up to the largest fp16 number finite and near; tiny rows are not clipped."""
    weight = torch.linspace(-size, size, 256).repeat(2, 1)
    parts, _, _ = quantize(weight, options)
    FORMAT.check(parts, (2, 256), options)
    error = (FORMAT.unpack(parts, (2, 256), options) - weight).abs().max()
    assert float(error) <= 1.01 * size / 15 + 9 * 2**-24


def test_scales_and_offsets_that_overflow_are_named() -> None:
    weight = torch.full((1, 128), 1e7)
    for options in (IntTwoLevelOptions(), IntTwoLevelOptions(4, "row", "zero")):
        with pytest.raises(FormatError, match=r"row scale of .* does not fit fp16"):
            FORMAT.fit(weight, options)
    with pytest.raises(FormatError, match=r"row offset of 1e\+07 does not fit fp16"):
        FORMAT.fit(weight, IntTwoLevelOptions(4, "row"))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(FormatError, match="NaN or Inf"):
            FORMAT.fit(torch.full((1, 128), bad), IntTwoLevelOptions())


def with_value(parts: dict[str, torch.Tensor], name: str, value: float) -> dict[str, torch.Tensor]:
    changed = parts[name].clone()
    changed[1, 0] = value
    return {**parts, name: changed}


@pytest.mark.parametrize(
    ("options", "damage", "message"),
    [
        (GROUPED[0], lambda p: {k: v for k, v in p.items() if k != "codes"}, "parts must be"),
        (GROUPED[0], lambda p: {**p, "extra": p["codes"]}, "parts must be"),
        (GROUPED[0], lambda p: {**p, "codes": p["codes"][:, :-1]}, "codes must be"),
        (GROUPED[0], lambda p: {**p, "scale_row": p["scale_row"].float()}, "scale_row must be"),
        (GROUPED[0], lambda p: with_value(p, "scale_row", float("inf")), "NaN or Inf"),
        (GROUPED[0], lambda p: with_value(p, "scale_row", 0.0), "must be positive, got 0.0"),
        (GROUPED[0], lambda p: with_value(p, "scale_group", 0), "must lie in 1 to 17, got 0"),
        (GROUPED[0], lambda p: with_value(p, "scale_group", 18), "must lie in 1 to 17"),
        (GROUPED[0], lambda p: with_value(p, "offset_group", 127), "decode to -128 to 127"),
        (GROUPED[1], lambda p: with_value(p, "zero_group", 16), "must lie in 0 to 15"),
        (OPTIONS[6], lambda p: with_value(p, "offset_row", float("nan")), "NaN or Inf"),
        (OPTIONS[7], lambda p: with_value(p, "zero_row", 16), "zero_row must lie in 0 to 15"),
    ],
)
def test_damaged_parts_are_named(options, damage, message) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    parts, _, _ = quantize(weight, options)
    FORMAT.check(parts, (4, 64), options)
    with pytest.raises(FormatError, match=message):
        FORMAT.check(damage(parts), (4, 64), options)


@pytest.mark.parametrize(
    "keys", [{"bits": 3}, {"bits": True}, {"group": 16}, {"group": "col"}, {"dialect": "a"}]
)
def test_bad_options_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"int_two_level: .* got"):
        IntTwoLevelOptions(**keys)  # type: ignore[arg-type]


def rms_after(weight: torch.Tensor, options: IntTwoLevelOptions, search: bool) -> float:
    """RMS weight error of fitted scales, or of the best candidate of each group."""
    size = FORMAT.group_size(weight.shape[-1], options)
    tried = FORMAT.candidates(weight, options) if search else [FORMAT.fit(weight, options)]
    errors = [
        (FORMAT.round(weight, scales, 0, options)[1] - weight).unflatten(-1, (-1, size)).square()
        for scales in tried
    ]
    best = torch.stack([error.sum(-1) for error in errors]).amin(0)
    return float((best.sum() / weight.numel()).sqrt())


@pytest.mark.parametrize("outlier", [False, True])
def test_candidates_beat_a_grid_of_float_scales(outlier: bool) -> None:
    """Integer steps cost something; choosing step and offset jointly wins back more: Gaussian .0927
    and one ×15 column .99 of what float scales over min … max reach, both published figures."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, 2048, generator=generator)
    if outlier:
        weight[:, 77] *= 15
    groups = weight.unflatten(-1, (-1, 128))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 15
    float_scales = (
        float((groups - ((groups - low) / step).round() * step - low).square().mean()) ** 0.5
    )
    options = IntTwoLevelOptions()
    fitted, searched = rms_after(weight, options, False), rms_after(weight, options, True)
    assert searched < 0.99 * float_scales
    assert searched < 0.935 * fitted
    if not outlier:
        assert searched < 0.0927


def test_candidates_keep_the_interface_of_a_search() -> None:
    """Best guess first; parts that are not stored for each group are equal in all."""
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(4))
    for options in OPTIONS:
        tried = list(FORMAT.candidates(weight, options))
        assert 15 <= len(tried) <= 60
        first = FORMAT.fit(weight, options)
        assert all(torch.equal(tried[0][name], part) for name, part in first.items())
        if options.group != "row":
            assert all(torch.equal(t["scale_row"], first["scale_row"]) for t in tried)
