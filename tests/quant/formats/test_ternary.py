"""`ternary`: golden bytes, exact round trips, a float64 oracle, damaged parts, and the whole way."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.calibrate.matrices import expert_key
from fewbit.calibrate.passes import clip_search, gptq
from fewbit.calibrate.passes.nearest import round_nearest
from fewbit.calibrate.protocol import Moments
from fewbit.quant.block import Block, Weight
from fewbit.quant.errors import FormatError, RecipeError
from fewbit.quant.format import Parts, dequantize
from fewbit.quant.formats.ternary import (
    FORMAT,
    TernaryOptions,
    pack_ternaries,
    unpack_ternaries,
)
from fewbit.quant.linear import QuantLinear
from fewbit.quant.load import load
from fewbit.quant.pipeline import quantize
from fewbit.quant.recipe import load_recipe
from fewbit.quant.verify import verify_checkpoint
from tiny_models import make_tokens, save
from tiny_tokenizer import save_tokenizer

OPTIONS = TernaryOptions()
THIS_FORMAT = 'weights={format = "ternary"}'  # the whole table: the old format's keys go, too


def stored(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """Parts of the nearest rounding, and its values with the padding."""
    missing = FORMAT.padded_k(weight.shape[-1], OPTIONS) - weight.shape[-1]
    full = torch.nn.functional.pad(weight, (0, missing))
    scales = FORMAT.fit(full, OPTIONS)
    codes, values = FORMAT.round(full, scales, 0, OPTIONS)
    return FORMAT.pack(codes, scales, OPTIONS), values


# ---- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "byte"),
    [
        ([0, 0, 0, 0, 0], 0),
        ([1, 0, 0, 0, 0], 1),
        ([2, 1, 0, 0, 0], 5),
        ([0, 0, 1, 0, 0], 9),
        ([0, 0, 0, 2, 0], 54),
        ([0, 0, 0, 0, 1], 81),
        ([1, 1, 1, 1, 1], 121),
        ([2, 2, 2, 2, 2], 242),
    ],
)
def test_golden_bytes(codes: list[int], byte: int) -> None:
    packed = pack_ternaries(torch.tensor([codes], dtype=torch.uint8))
    assert packed.dtype == torch.uint8 and packed.tolist() == [[byte]]
    assert unpack_ternaries(packed).tolist() == [codes]


def test_golden_weight() -> None:
    """Levels, thresholds at half a level, ties and padding together, on numbers exact in bf16."""
    weight = torch.tensor([[-1.0, 3.0, 1.5, 1.75, -0.5, -0.75, 0.0]])
    parts, _ = stored(weight)
    assert parts["levels"].dtype == torch.bfloat16
    assert parts["levels"].tolist() == [[-1.0, 3.0]]
    # codes 1 2 0 2 0 | 1 0 and padding: both ties are zeros
    assert parts["codes"].tolist() == [[1 + 3 * 2 + 27 * 2, 1]]
    expected = torch.tensor([[-1.0, 3.0, 0.0, 3.0, 0.0, -1.0, 0.0]])
    assert torch.equal(FORMAT.unpack(parts, (1, 7), OPTIONS), expected)


def test_all_243_bytes_are_distinct_and_come_back() -> None:
    codes = torch.tensor(list(itertools.product(range(3), repeat=5)), dtype=torch.uint8)
    packed = pack_ternaries(codes)
    assert sorted(packed.flatten().tolist()) == list(range(243))
    assert torch.equal(unpack_ternaries(packed), codes)


# ---- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 131), (2, 3, 40), (1, 1), (4, 5), (3, 6)])
def test_round_trip_is_exact(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    parts, values = stored(torch.randn(shape))
    FORMAT.check(parts, shape, OPTIONS)
    specs = FORMAT.part_specs(shape, OPTIONS)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in specs.items()
    }
    decoded = FORMAT.unpack(parts, shape, OPTIONS)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, values[..., : shape[-1]])
    n_bytes = sum(part.numel() * part.element_size() for part in parts.values())
    assert FORMAT.bits(shape, OPTIONS) == 8 * n_bytes / torch.Size(shape).numel()


@settings(max_examples=100, deadline=None)
@given(
    k=st.integers(1, 60),
    n=st.integers(1, 4),
    exponent=st.integers(-30, 30),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 2**31),
)
def test_no_other_code_is_nearer(k: int, n: int, exponent: int, shift: float, seed: int) -> None:
    """float64 oracle over the three values of each row; those are its rounded ends and zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(n, k, generator=generator) + shift) * 10.0**exponent
    parts, _ = stored(weight)
    FORMAT.check(parts, (n, k), OPTIONS)
    levels = parts["levels"].double()
    ends = torch.stack([weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)], -1)
    assert bool(((levels - ends).abs() <= ends.abs() * 2**-8).all())
    choices = torch.cat([levels, torch.zeros(n, 1)], -1)
    distance = (weight.double().unsqueeze(-1) - choices.unsqueeze(1)).abs()
    error = (weight.double() - FORMAT.unpack(parts, (n, k), OPTIONS).double()).abs()
    assert torch.equal(error, distance.amin(-1))


def test_gaussian_rows_are_mostly_zero() -> None:
    """P(0) of nearest rounding depends on the row's length only by its extremes: √(2 ln K) / 2."""
    torch.manual_seed(0)
    shares = []
    for k in (128, 2048):
        parts, _ = stored(torch.randn(256, k))
        codes = unpack_ternaries(parts["codes"])[:, :k]
        shares.append(float((codes == 0).float().mean()))
    assert 0.78 < shares[0] < 0.85 and 0.90 < shares[1] < 0.94


@pytest.mark.parametrize("row", [[0.0] * 7, [2.0] * 7, [-3.0] * 7, [5.0, 0.25, 1.0, 0, 0, 0, 0]])
def test_rows_on_one_side_of_zero(row: list[float]) -> None:
    weight = torch.tensor([row])
    parts, _ = stored(weight)
    FORMAT.check(parts, (1, 7), OPTIONS)
    expected = torch.where(weight.abs() > weight.abs().max() / 2, weight, torch.zeros(()))
    assert torch.equal(FORMAT.unpack(parts, (1, 7), OPTIONS), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_fit_refuses_what_bf16_cannot_hold(bad: float) -> None:
    weight = torch.zeros(2, 10)
    weight[1, 3] = bad
    with pytest.raises(FormatError, match=r"ternary: a level of .* does not fit bf16"):
        FORMAT.fit(weight, OPTIONS)


def test_clip_shrinks_both_levels() -> None:
    weight = torch.tensor([[-4.0, 0, 0, 0, 2.0], [-1.0, 0, 0, 0, 8.0]])
    clip = torch.tensor([[0.5], [1.0]])
    assert FORMAT.fit(weight, OPTIONS, clip)["levels"].tolist() == [[-2.0, 1.0], [-1.0, 8.0]]


def test_candidates_begin_with_the_range_and_one_of_them_errs_less() -> None:
    torch.manual_seed(3)
    weight = torch.randn(16, 640)
    errors = []
    for scales in FORMAT.candidates(weight, OPTIONS):
        codes, values = FORMAT.round(weight, scales, 0, OPTIONS)
        FORMAT.check(FORMAT.pack(codes, scales, OPTIONS), (16, 640), OPTIONS)
        errors.append(float((values - weight).norm() / weight.norm()))
    first = next(iter(FORMAT.candidates(weight, OPTIONS)))
    assert torch.equal(first["levels"], FORMAT.fit(weight, OPTIONS)["levels"])
    assert errors[0] > 0.6 and min(errors) < 0.5  # a search is worth its time here
    assert errors[-1] > min(errors), "the best share lies inside what is tried"


def test_rounding_any_run_of_columns_agrees_with_the_whole() -> None:
    wide = torch.randn(2, 6, 250, generator=torch.Generator().manual_seed(2))
    scales = FORMAT.fit(wide * 0.7, OPTIONS)
    codes, values = FORMAT.round(wide, scales, 0, OPTIONS)
    assert codes.dtype == torch.uint8
    for start, stop in ((0, 1), (5, 6), (10, 140), (249, 250)):
        found = FORMAT.round(wide[..., start:stop], scales, start, OPTIONS)
        assert torch.equal(found[0], codes[..., start:stop])
        assert torch.equal(found[1], values[..., start:stop])
    columns = torch.stack([wide[0, :, 3:4], wide[1, :, 200:201]])
    found = FORMAT.round(columns, scales, torch.tensor([3, 200]), OPTIONS)
    assert torch.equal(found[0], torch.stack([codes[0, :, 3:4], codes[1, :, 200:201]]))
    transposed = wide.mT.contiguous().mT
    assert torch.equal(FORMAT.round(transposed, scales, 0, OPTIONS)[1], values)


# ---- cutting and shapes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "start", "stop"),
    [(0, 1, 3), (1, 2, 4), (-2, 0, 1), (2, 0, 5), (-1, 30, 63), (2, 10, 20)],
)
def test_slices_decode_to_slices(axis: int, start: int, stop: int) -> None:
    shape = (3, 5, 63)
    parts, _ = stored(torch.randn(shape))
    cut = FORMAT.slice(parts, shape, OPTIONS, axis, start, stop)
    index = [slice(None)] * 3
    index[axis] = slice(start, stop)
    expected = FORMAT.unpack(parts, shape, OPTIONS)[tuple(index)]
    FORMAT.check(cut, tuple(expected.shape), OPTIONS)
    assert torch.equal(FORMAT.unpack(cut, tuple(expected.shape), OPTIONS), expected)


@pytest.mark.parametrize(
    ("axis", "start", "stop"), [(1, 3, 10), (1, 0, 7), (0, 0, 5), (0, 2, 2), (1, 0, 99), (0, -1, 2)]
)
def test_impossible_slices_are_refused(axis: int, start: int, stop: int) -> None:
    parts, _ = stored(torch.randn(4, 23))
    with pytest.raises(FormatError, match=r"ternary: .*cut"):
        FORMAT.slice(parts, (4, 23), OPTIONS, axis, start, stop)


@pytest.mark.parametrize("shape", [(8,), (0, 16), (4, 0), ()])
def test_impossible_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match=r"ternary stores .* positive size"):
        FORMAT.part_specs(shape, OPTIONS)
    with pytest.raises(FormatError, match="ternary: codes must be"):
        FORMAT.padded_shape({}, OPTIONS)


def test_padding_fills_bytes() -> None:
    for k in (1, 5, 6, 300):
        padded = FORMAT.padded_k(k, OPTIONS)
        assert padded % 5 == 0 and k <= padded < k + 5
        specs = FORMAT.part_specs((2, 3, k), OPTIONS)
        shapes = {name: spec.shape for name, spec in specs.items()}
        assert FORMAT.padded_shape(shapes, OPTIONS) == (2, 3, padded)
        assert FORMAT.group_size(k, OPTIONS) == padded


def damage(parts: Parts, kind: str) -> Parts:
    codes, levels = parts["codes"], parts["levels"]
    high_byte, nan, inf, above, below = (
        codes.clone(), levels.clone(), levels.clone(), levels.clone(), levels.clone(),
    )  # fmt: skip
    high_byte[2, 1] = 243
    nan[1, 0], inf[0, 1], above[3, 0], below[3, 1] = float("nan"), float("inf"), 0.5, -0.5
    return {
        "missing": {"codes": codes},
        "extra": {**parts, "surplus": codes},
        "short codes": {**parts, "codes": codes[:, :-1]},
        "codes dtype": {**parts, "codes": codes.to(torch.int8)},
        "levels dtype": {**parts, "levels": levels.half()},
        "levels shape": {**parts, "levels": levels[:, :1]},
        "byte": {**parts, "codes": high_byte},
        "nan": {**parts, "levels": nan},
        "inf": {**parts, "levels": inf},
        "low above": {**parts, "levels": above},
        "high below": {**parts, "levels": below},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "parts must be"),
        ("extra", "parts must be"),
        ("short codes", "codes must be"),
        ("codes dtype", "codes must be"),
        ("levels dtype", "levels must be"),
        ("levels shape", "levels must be"),
        ("byte", "codes must be at most 242, got 243"),
        ("nan", "NaN or Inf"),
        ("inf", "NaN or Inf"),
        ("low above", "low ≤ 0 ≤ high, got low up to 0.5"),
        ("high below", "low ≤ 0 ≤ high, got .* high down to -0.5"),
    ],
)
def test_damaged_parts_are_named(kind: str, message: str) -> None:
    parts, _ = stored(torch.randn(4, 32))
    FORMAT.check(parts, (4, 32), OPTIONS)
    with pytest.raises(FormatError, match=message):
        FORMAT.check(damage(parts, kind), (4, 32), OPTIONS)


def test_there_are_no_keys_and_no_integer_form() -> None:
    with pytest.raises(RecipeError, match="unknown key 'group'; allowed: none"):
        load_recipe("w4a16-rtn", ['weights={format = "ternary", group = 32}'])
    parts, _ = stored(torch.randn(2, 5))
    assert FORMAT.integer_form(parts, (2, 5), OPTIONS) is None


# ---- with the passes ------------------------------------------------------------------------------


def loss(weight: Weight, hessian: torch.Tensor, packed: torch.Tensor) -> float:
    delta = (weight.value - packed).double()
    return float(((delta @ hessian.double()) * delta).sum())


@pytest.mark.parametrize("shape", [(32, 128), (3, 16, 63)])
def test_gptq_errs_less_than_nearest_and_a_clip_search_less_again(shape: tuple[int, ...]) -> None:
    """Output error in float64; with correlated inputs, padding and experts."""
    generator = torch.Generator().manual_seed(5)
    k = shape[-1]
    x = torch.randn(2000, k, generator=generator) @ torch.randn(k, k, generator=generator)
    moments = Moments(x.mT @ x / 2000, 2000)
    keys = ["x"] if len(shape) == 2 else [expert_key("x", expert) for expert in range(shape[0])]
    stats = dict.fromkeys(keys, moments)
    losses = []
    for search in (False, True):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(6))
        weight = Weight("w", value, "ternary", OPTIONS, input_key="x")
        block = Block("b", [weight])
        if search:
            clip_search.PASS.run(block, stats, clip_search.ClipSearchOptions(lowest=0.4))
        else:
            losses.append(loss(weight, moments.hessian, dequantize(round_nearest(weight))))
        gptq.PASS.run(block, stats, gptq.GptqOptions())
        assert weight.packed is not None and weight.fallbacks == []
        FORMAT.check(weight.packed.terms[0].parts, shape, OPTIONS)
        losses.append(loss(weight, moments.hessian, dequantize(weight.packed)))
    assert losses[1] < 0.7 * losses[0]
    assert losses[2] < losses[1]


@pytest.mark.parametrize("arch", ["llama", "mixtral"])
@pytest.mark.parametrize("recipe", ["w4a16-rtn", "w4a16"])
def test_quantize_then_load(arch: str, recipe: str, tmp_path: Path) -> None:
    """Stored parts are valid, and the loaded model multiplies with exactly what they decode to."""
    source, out = save_tokenizer(save(arch, tmp_path / "source")), tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("We hold these tokens to be self-evident. " * 40)
    how: dict[str, Any] = {}
    settings = [THIS_FORMAT]
    if recipe == "w4a16":
        how = {"calib": str(text), "samples": 4, "length": 16}
        settings.append("pass.gptq.min_tokens=1")
    report = quantize(source, out, recipe=recipe, settings=settings, device="cpu", **how)
    modules = verify_checkpoint(out).modules
    assert {spec.spec.terms[0][0] for spec in modules.values()} == {"ternary"}
    assert all(0.1 < row.relative_error < 1.5 for row in report.tensors)
    model = load(out, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        assert bool(model(make_tokens()).logits.isfinite().all())
    layer = next(item for item in model.modules() if isinstance(item, QuantLinear))
    weight = dequantize(layer.packed)
    assert all(len(row.unique()) <= 3 for row in weight)
    x = torch.randn(3, layer.in_features)
    assert torch.allclose(layer(x), x @ weight.mT, atol=1e-5)
