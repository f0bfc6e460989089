"""Compensation against the float64 least-squares solution, and what it leaves alone."""

import pytest
import torch

from fewbit.calibrate.passes.compensate import PASS, CompensateOptions
from fewbit.calibrate.protocol import Moments
from fewbit.quant.block import Block, Weight
from fewbit.quant.errors import RecipeError
from fewbit.quant.format import find_format

OPTIONS = find_format("int_group").Options(group=32)


def setting(n=6, k=40, tokens=400):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(tokens, k, generator=generator)
    now = before + 0.3 * torch.randn(tokens, k, generator=generator) + 0.2 * before.roll(1, -1)
    value = torch.randn(n, k, generator=generator)
    weight = Weight("w", value, "int_group", OPTIONS, input_key="x")
    drift = (before - now).mT @ now / tokens
    return weight, before.double(), now.double(), Moments(now.mT @ now / tokens, tokens, drift)


def test_target_is_the_damped_least_squares_solution():
    weight, before, now, moments = setting()
    options = CompensateOptions(damping=1e-6)
    PASS.run(Block("b", [weight]), {"x": moments}, options)
    wanted = before @ weight.value.double().mT
    expected = torch.linalg.lstsq(now, wanted).solution.mT
    value, share = weight.value.double(), 1 - 2 * 40 / 400  # of 400 tokens for 40 coefficients
    assert torch.allclose(weight.target.double(), value + share * (expected - value), atol=1e-3)
    miss = (now @ weight.target.double().mT - wanted).norm()
    assert miss < 0.9 * (now @ weight.value.double().mT - wanted).norm()


def test_strength_scales_the_step_and_the_value_stays():
    full, _, _, moments = setting()
    half, value = setting()[0], setting()[0].value
    PASS.run(Block("b", [full]), {"x": moments}, CompensateOptions())
    PASS.run(Block("b", [half]), {"x": moments}, CompensateOptions(strength=0.5))
    assert torch.allclose(full.target - value, 2 * (half.target - value), atol=1e-5)
    assert torch.equal(full.value, value)


@pytest.mark.parametrize(("tokens", "share"), [(60, 0.0), (80, 0.0), (160, 0.5), (8000, 0.99)])
def test_few_tokens_are_not_trusted(tokens, share):
    weight, _, _, moments = setting()
    counted = Moments(moments.hessian, tokens, moments.drift)
    all_of_it = Moments(moments.hessian, 10**9, moments.drift)
    PASS.run(Block("b", [weight]), {"x": counted}, CompensateOptions())
    step = weight.target - weight.value
    other = setting()[0]
    PASS.run(Block("b", [other]), {"x": all_of_it}, CompensateOptions())
    whole = other.target - other.value
    assert torch.allclose(step, share * whole, atol=1e-5)


def test_without_drift_or_with_a_broken_hessian_the_weight_stays():
    weight, _, _, moments = setting()
    plain = Moments(moments.hessian, moments.tokens)
    PASS.run(Block("b", [weight]), {"x": plain}, CompensateOptions())
    assert weight.target is None
    broken = Moments(-moments.hessian, moments.tokens, moments.drift)
    PASS.run(Block("b", [weight]), {"x": broken}, CompensateOptions())
    assert weight.target is None


def test_no_drift_means_no_change():
    weight, _, _, moments = setting()
    still = Moments(moments.hessian, moments.tokens, torch.zeros_like(moments.hessian))
    PASS.run(Block("b", [weight]), {"x": still}, CompensateOptions())
    assert torch.equal(weight.target, weight.value)


@pytest.mark.parametrize("keys", [{"strength": 0.0}, {"strength": 2.0}, {"damping": 0}])
def test_bad_options_are_named(keys):
    with pytest.raises(RecipeError, match=next(iter(keys))):
        CompensateOptions(**keys)
