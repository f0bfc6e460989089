"""GPTQ against oracles: the exact column-by-column solution, nearest rounding, damaged statistics."""

import pytest
import torch

from fewbit.calibrate.matrices import Rounded, batches, matrices
from fewbit.calibrate.passes import gptq
from fewbit.calibrate.passes.gptq import PASS, GptqOptions
from fewbit.calibrate.passes.nearest import round_nearest
from fewbit.calibrate.protocol import Moments
from fewbit.quant.block import Block, Weight
from fewbit.quant.errors import RecipeError
from fewbit.quant.format import dequantize, find_format

STORE = find_format("int_group")


def correlated(k, tokens=2000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator)
    return Moments(x.mT @ x / tokens, tokens)


def make(n, k, key="x", bits=4, group=32, symmetric=True, experts=None, seed=1):
    shape = (n, k) if experts is None else (experts, n, k)
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / k**0.5
    options = STORE.Options(bits=bits, group=group, symmetric=symmetric)
    return Weight(f"w{seed}", value, "int_group", options, input_key=key)


def loss(weight, hessian, packed=None):
    delta = (weight.value - dequantize(packed or weight.packed)).double()
    return float(((delta @ hessian.double()) * delta).sum())


def oracle(weight, hessian, damping):
    """Optimal brain quantization in float64, one column at a time by explicit inversion."""
    w, h = weight.value.double().clone(), hessian.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    scales = STORE.fit(weight.value, weight.options)
    out, left = torch.empty_like(w), list(range(w.shape[1]))
    for column in range(w.shape[1]):
        inverse = torch.linalg.inv(h[left][:, left])
        _, value = STORE.round(w[:, column : column + 1].float(), scales, column, weight.options)
        error = (w[:, column] - value[:, 0]) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        out[:, column] = value[:, 0]
        left.pop(0)
    return out


def test_sweep_equals_the_float64_oracle():
    weight, moments = make(8, 96), correlated(96)
    options = GptqOptions(activation_order=False, sweeps=0)
    PASS.run(Block("b", [weight]), {"x": moments}, options)
    expected = oracle(weight, moments.hessian, options.damping).float()
    agree = (dequantize(weight.packed) - expected).abs() < 1e-6
    # A code differs only where fp32 and fp64 fall on two sides of a rounding boundary.
    assert agree.float().mean() > 0.97
    delta = weight.value.double() - expected.double()
    best = float(((delta @ moments.hessian.double()) * delta).sum())
    assert loss(weight, moments.hessian) == pytest.approx(best, rel=0.03)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_beats_nearest_by_far_and_refinement_helps(bits, symmetric):
    moments = correlated(128)
    losses = []
    for sweeps in (0, 1, 3):
        weight = make(64, 128, bits=bits, symmetric=symmetric)
        PASS.run(Block("b", [weight]), {"x": moments}, GptqOptions(sweeps=sweeps))
        losses.append(loss(weight, moments.hessian))
    nearest = loss(weight, moments.hessian, round_nearest(weight))
    assert losses[0] < 0.65 * nearest
    assert losses[2] <= losses[1] < losses[0]


def test_refinement_never_raises_the_damped_loss():
    weight, moments = make(16, 64), correlated(64)
    batch = next(batches(list(matrices(Block("b", [weight]), {"x": moments}))))
    scales = STORE.fit(batch.values(), batch.options)
    options = GptqOptions()
    problem = gptq.prepare(batch.values(), batch.hessians(), scales, STORE, batch.options, options)
    columns = gptq._columns(problem.order, 1)
    hessian = gptq._permute(problem.hessian, columns)
    dense = problem.weights.mT[:, columns[0]]
    codes, values = gptq._repay(problem, dense)
    previous = float("inf")
    for _ in range(4):
        delta = (dense - values).double()
        now = float((delta * (hessian.double() @ delta)).sum())
        assert now <= previous * (1 + 1e-6)
        previous = now
        codes, values = gptq._refine(problem, hessian, dense, codes, values)


def test_batching_changes_nothing():
    """Experts in one batch, rows of shared inputs in one matrix: the same codes as one by one."""
    stats = {f"e[{i}]": correlated(64, seed=i) for i in range(3)}
    fused = make(24, 64, key="e", experts=3)
    PASS.run(Block("b", [fused]), stats, GptqOptions())
    for index in range(3):
        single = Weight(
            "s", fused.value[index], "int_group", fused.options, input_key=f"e[{index}]"
        )
        PASS.run(Block("b", [single]), stats, GptqOptions())
        alone, together = dequantize(single.packed), dequantize(fused.packed)[index]
        assert (alone - together).abs().max() < 1e-6 or (alone == together).float().mean() > 0.99
    a, b = make(8, 64, key="e[0]", seed=5), make(12, 64, key="e[0]", seed=6)
    PASS.run(Block("b", [a, b]), stats, GptqOptions())
    alone = make(12, 64, key="e[0]", seed=6)
    PASS.run(Block("b", [alone]), stats, GptqOptions())
    assert (dequantize(alone.packed) == dequantize(b.packed)).float().mean() > 0.99


def test_dead_channels_and_padding_are_rounded_to_nearest():
    weight, moments = make(8, 40, group=32), correlated(40)
    moments.hessian[7, :] = moments.hessian[:, 7] = 0
    PASS.run(Block("b", [weight]), {"x": moments}, GptqOptions(sweeps=2))
    expected = dequantize(round_nearest(weight))[:, 7]
    assert torch.equal(dequantize(weight.packed)[:, 7], expected)
    assert weight.packed.shape == (8, 40)
    assert not weight.fallbacks


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda h: h.fill_(float("nan")), "NaN or Inf"),
        (lambda h: h.copy_(-torch.eye(len(h)) * 1e6), "could not be factorised"),
    ],
)
def test_unusable_hessian_falls_back_and_says_so(damage, words):
    weight, moments = make(8, 64), correlated(64)
    damage(moments.hessian)
    PASS.run(Block("b", [weight]), {"x": moments}, GptqOptions())
    assert torch.equal(dequantize(weight.packed), dequantize(round_nearest(weight)))
    assert len(weight.fallbacks) == 1
    assert words in weight.fallbacks[0]


def test_starved_expert_is_named_and_its_neighbours_are_not():
    weight = make(8, 64, key="e", experts=3)
    stats = {"e[0]": correlated(64), "e[2]": Moments(correlated(64, tokens=5).hessian, 5)}
    PASS.run(Block("b", [weight]), stats, GptqOptions())
    assert weight.fallbacks == [
        "expert 1: rounded to nearest: saw no calibration tokens",
        "expert 2: rounded to nearest: saw 5 calibration tokens, 32 are needed",
    ]
    nearest = dequantize(round_nearest(weight))
    found = dequantize(weight.packed)
    assert torch.equal(found[1], nearest[1])
    assert torch.equal(found[2], nearest[2])
    assert not torch.equal(found[0], nearest[0])


def test_rank_deficient_statistics_need_only_damping():
    weight, moments = make(8, 64), correlated(64, tokens=33)
    assert int(torch.linalg.matrix_rank(moments.hessian)) < 64
    PASS.run(Block("b", [weight]), {"x": moments}, GptqOptions())
    assert not weight.fallbacks
    assert loss(weight, moments.hessian) < loss(weight, moments.hessian, round_nearest(weight))


@pytest.mark.parametrize(
    "keys", [{"damping": 0}, {"damping": 2.0}, {"sweeps": -1}, {"activation_order": 1}]
)
def test_bad_options_are_named(keys):
    with pytest.raises(RecipeError, match=next(iter(keys))):
        GptqOptions(**keys)


def test_rounded_needs_every_expert():
    weight = make(4, 32, experts=2)
    with pytest.raises(KeyError):
        Rounded().pack(weight)
