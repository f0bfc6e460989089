"""What formats with groups share: cutting, columns meeting their scales, stored scales, checks."""

import itertools

import pytest
import torch

from fewbit.quant.errors import FormatError
from fewbit.quant.formats._grouped import aligned, stored_scale, unit
from fewbit.quant.formats.int_group import FORMAT as INT_GROUP
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.formats.int_two_level import FORMAT as INT_TWO_LEVEL
from fewbit.quant.formats.int_two_level import IntTwoLevelOptions

CASES = [
    *(
        (INT_GROUP, IntGroupOptions(bits, group, symmetric))
        for bits, group, symmetric in itertools.product(range(2, 9), (16, "row"), (True, False))
    ),
    *(
        (INT_TWO_LEVEL, IntTwoLevelOptions(4, group, dialect))
        for group, dialect in itertools.product((32, 64, 128, "row"), ("offset", "zero"))
    ),
]
WIDE = torch.randn(2, 6, 256, generator=torch.Generator().manual_seed(2))


def named(value) -> str:
    return getattr(value, "name", None) or str(value)


def quantize(store, weight: torch.Tensor, options) -> dict[str, torch.Tensor]:
    missing = store.padded_k(weight.shape[-1], options) - weight.shape[-1]
    full = torch.nn.functional.pad(weight, (0, missing))
    scales = store.fit(full, options)
    return store.pack(store.round(full, scales, 0, options)[0], scales, options)


@pytest.mark.parametrize(("store", "options"), CASES, ids=named)
def test_padding_is_whole_groups(store, options) -> None:
    step = 8 if options.group == "row" else options.group
    assert unit(options) == step
    for k in (1, step, step + 1, 300):
        padded = store.padded_k(k, options)
        assert padded % step == 0 and k <= padded < k + step
        assert store.group_size(k, options) == (padded if options.group == "row" else step)
        specs = store.part_specs((2, 3, k), options)
        shapes = {name: spec.shape for name, spec in specs.items()}
        assert store.padded_shape(shapes, options) == (2, 3, padded)


@pytest.mark.parametrize(("store", "options"), CASES, ids=named)
def test_slices_decode_to_slices(store, options) -> None:
    shape, step = (3, 5, 300), unit(options)
    parts = quantize(store, torch.randn(shape), options)
    decoded = store.unpack(parts, shape, options)
    for axis, start, stop in (
        (0, 1, 3),
        (1, 2, 4),
        (-2, 0, 1),
        (2, 0, step),
        (-1, step, 300),
        (2, step, 2 * step),
    ):
        cut = store.slice(parts, shape, options, axis, start, stop)
        assert list(cut) == list(parts)
        index = [slice(None)] * 3
        index[axis] = slice(start, stop)
        expected = decoded[tuple(index)]
        store.check(cut, tuple(expected.shape), options)
        assert torch.equal(store.unpack(cut, tuple(expected.shape), options), expected)


@pytest.mark.parametrize(
    ("axis", "start", "stop"),
    [(1, 3, 32), (1, 0, 7), (0, 0, 5), (0, 2, 2), (1, 32, 999), (0, -1, 2)],
)
@pytest.mark.parametrize(
    ("store", "options"),
    [(INT_GROUP, IntGroupOptions(4, 16)), (INT_TWO_LEVEL, IntTwoLevelOptions(4, 32))],
)
def test_impossible_slices_are_refused(store, options, axis: int, start: int, stop: int) -> None:
    parts = quantize(store, torch.randn(4, 40), options)
    with pytest.raises(FormatError, match=f"{store.name}: .*cut"):
        store.slice(parts, (4, 40), options, axis, start, stop)


@pytest.mark.parametrize("shape", [(8,), (0, 16), (4, 0), ()])
@pytest.mark.parametrize(
    ("store", "options"), [(INT_GROUP, IntGroupOptions()), (INT_TWO_LEVEL, IntTwoLevelOptions())]
)
def test_impossible_shapes_are_refused(store, options, shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match=f"{store.name} stores .* positive size"):
        store.part_specs(shape, options)
    with pytest.raises(FormatError, match=f"{store.name}: codes must be"):
        store.padded_shape({}, options)


@pytest.mark.parametrize(("store", "options"), CASES, ids=named)
def test_rounding_any_run_of_columns_agrees_with_the_whole(store, options) -> None:
    scales = store.fit(WIDE * 0.7, options)
    codes, values = store.round(WIDE, scales, 0, options)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 1 << options.bits
    for start, stop in ((0, 1), (5, 6), (10, 140), (128, 256), (32, 96), (255, 256)):
        part_codes, part_values = store.round(WIDE[..., start:stop], scales, start, options)
        assert torch.equal(part_codes, codes[..., start:stop])
        assert torch.equal(part_values, values[..., start:stop])
    one_each = torch.tensor([3, 200])
    columns = torch.stack([WIDE[0, :, 3:4], WIDE[1, :, 200:201]])
    part_codes, part_values = store.round(columns, scales, one_each, options)
    assert torch.equal(part_codes, torch.stack([codes[0, :, 3:4], codes[1, :, 200:201]]))
    assert torch.equal(part_values, torch.stack([values[0, :, 3:4], values[1, :, 200:201]]))


@pytest.mark.parametrize(("store", "options"), CASES, ids=named)
def test_rounding_takes_any_memory_order(store, options) -> None:
    weight = torch.randn(256, 6).t()
    scales = store.fit(weight, options)
    codes, values = store.round(weight, scales, 0, options)
    expected = store.round(weight.contiguous(), scales, 0, options)
    assert torch.equal(codes, expected[0]) and torch.equal(values, expected[1])
    packed = store.pack(expected[0], scales, options)["codes"]
    assert torch.equal(store.pack(codes, scales, options)["codes"], packed)


def test_columns_meet_the_scales_of_their_groups() -> None:
    """Group g has scale 10 + g (second matrix: 20 + g); a part of the row stays as it is."""
    options = IntTwoLevelOptions(4, 32)
    by_group = torch.tensor([[[10, 11, 12, 13]], [[20, 21, 22, 23]]])
    scales = {"scale_row": torch.ones(2, 1, 1), "scale_group": by_group}

    def meet(start, n):
        columns = torch.zeros(2, 1, n)
        shaped, picked = aligned(columns, scales, start, options)
        size = torch.broadcast_to(picked["scale_group"], shaped.shape).reshape(columns.shape)
        assert torch.broadcast_shapes(picked["scale_row"].shape, shaped.shape) == shaped.shape
        return shaped.shape, size

    shape, size = meet(32, 64)
    assert shape == (2, 1, 2, 32) and size[0, 0].tolist() == [11] * 32 + [12] * 32
    shape, size = meet(96, 32)
    assert shape == (2, 1, 32) and size[1, 0].tolist() == [23] * 32
    shape, size = meet(30, 35)
    assert shape == (2, 1, 35) and size[0, 0].tolist() == [10] * 2 + [11] * 32 + [12]
    shape, size = meet(torch.tensor([31, 64]), 1)
    assert shape == (2, 1, 1) and size.flatten().tolist() == [10, 22]


def test_whole_rows_meet_their_one_scale() -> None:
    scales = {"scale_group": torch.full((2, 3, 1), 0.5)}
    for start in (0, 5, torch.tensor([1, 7])):
        columns = torch.zeros(2, 3, 1)
        shaped, picked = aligned(columns, scales, start, IntGroupOptions(4, "row"))
        assert shaped is columns and torch.equal(picked["scale_group"], scales["scale_group"])


def test_stored_scales_are_never_zero_and_small_ones_round_up() -> None:
    step = 2.0**-24
    scale = torch.tensor([0.0, 1e-12, 1.2 * step, -1.2 * step, 0.1, -0.1, 65504.0])
    found = stored_scale(scale, "fp16", "a scale", "cure")
    assert found.dtype == torch.float16
    assert found[:4].tolist() == [step, step, 2 * step, -2 * step]
    assert torch.equal(found[4:], scale[4:].half())
    tiny = torch.finfo(torch.bfloat16).smallest_normal
    wide = stored_scale(torch.tensor([0.0, 1e-12, 1e6]), "bf16", "a scale", "cure")
    assert wide.dtype == torch.bfloat16 and float(wide[0]) == tiny
    assert torch.equal(wide[1:], torch.tensor([1e-12, 1e6]).bfloat16())


@pytest.mark.parametrize("bad", [1e6, float("inf"), float("nan")])
def test_scales_that_do_not_fit_name_the_remedy(bad: float) -> None:
    with pytest.raises(FormatError, match=r"^a scale of .* does not fit fp16 .*; cure, or .* NaN"):
        stored_scale(torch.tensor([1.0, bad]), "fp16", "a scale", "cure")
