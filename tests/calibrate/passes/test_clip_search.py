"""Clip search: the factor kept is the best of its grid, by an independent float64 search."""

import pytest
import torch

from fewbit.calibrate.passes.clip_search import PASS, ClipSearchOptions
from fewbit.calibrate.passes.nearest import round_nearest
from fewbit.calibrate.protocol import Moments
from fewbit.quant.block import Block, Weight
from fewbit.quant.errors import RecipeError
from fewbit.quant.format import dequantize, find_format

STORE = find_format("int_group")


def setting(seed=0, group=32):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(6, 64, generator=generator)
    value[:, ::17] *= 4  # outliers that are worth clipping
    x = torch.randn(500, 64, generator=generator) * torch.rand(64, generator=generator)
    options = STORE.Options(bits=3, group=group)
    weight = Weight("w", value, "int_group", options, input_key="x")
    return weight, {"x": Moments(x.mT @ x / 500, 500)}


def brute_force(weight, hessian, factors, size):
    best = torch.empty(6, 64 // size)
    for group in range(64 // size):
        columns = slice(group * size, (group + 1) * size)
        h = hessian[columns, columns].double()
        errors = []
        for factor in factors:
            clip = torch.full((6, 64 // size), factor)
            scales = STORE.fit(weight.value, weight.options, clip)
            _, rounded = STORE.round(weight.value, scales, 0, weight.options)
            delta = (weight.value - rounded)[:, columns].double()
            errors.append(((delta @ h) * delta).sum(-1))
        best[:, group] = torch.tensor(factors)[torch.stack(errors).argmin(0)]
    return best


@pytest.mark.parametrize(("group", "size"), [(32, 32), (16, 16), ("row", 64)])
def test_factors_are_the_best_of_the_grid(group, size):
    weight, stats = setting(group=group)
    options = ClipSearchOptions(lowest=0.5, steps=5)
    PASS.run(Block("b", [weight]), stats, options)
    factors = torch.linspace(1.0, 0.5, 6).tolist()
    expected = brute_force(weight, stats["x"].hessian, factors, size)
    assert torch.equal(weight.clip, expected)
    assert (weight.clip < 1).any()


def test_search_lowers_the_weight_error_without_data():
    weight, _ = setting()
    plain = (weight.value - dequantize(round_nearest(weight))).square().sum()
    PASS.run(Block("b", [weight]), {}, ClipSearchOptions(data_free=True))
    assert (weight.value - dequantize(round_nearest(weight))).square().sum() < 0.95 * plain


def test_experts_get_factors_of_their_own():
    weight, stats = setting()
    fused = Weight(
        "f", torch.stack([weight.value, weight.value * 2]), "int_group", weight.options,
        input_key="e",
    )  # fmt: skip
    PASS.run(Block("b", [fused]), {"e[0]": stats["x"]}, ClipSearchOptions())
    PASS.run(Block("b", [weight]), stats, ClipSearchOptions())
    assert fused.clip.shape == (2, 6, 2)
    assert torch.equal(fused.clip[0], weight.clip)


@pytest.mark.parametrize("keys", [{"lowest": 1.5}, {"steps": 0}, {"data_free": 1}])
def test_bad_options_are_named(keys):
    with pytest.raises(RecipeError, match=next(iter(keys))):
        ClipSearchOptions(**keys)
