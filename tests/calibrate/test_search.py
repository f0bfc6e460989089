"""Probes of products and of attention, and the family of channel scales."""

import pytest
import torch

from fewbit.calibrate.observe import AttentionSample
from fewbit.calibrate.search import (
    Channels,
    around,
    attention_probe,
    make_probe,
    positive,
    power_of_two,
    rounded_input,
    rounded_weight,
    simplex,
    spread,
    stored_vectors,
)
from fewbit.quant.format import find_format
from fewbit.quant.kv_policy import parse_kv

RULE = ("int_two_level", find_format("int_two_level").Options(group=32))
PAGE = {"key": {"format": "int4_head"}, "value": {"format": "int4_head"}}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rounding_is_what_would_be_stored():
    weight = noise(8, 72)  # K is padded to 96
    store, options = find_format(RULE[0]), RULE[1]
    padded = torch.nn.functional.pad(weight, (0, 24))
    scales = store.fit(padded, options)
    codes, _ = store.round(padded, scales, 0, options)
    parts = store.pack(codes, scales, options)
    assert torch.equal(rounded_weight(weight, RULE), store.unpack(parts, (8, 72), options))
    assert rounded_weight(weight, None) is weight
    assert rounded_input(weight, None) is weight and stored_vectors(weight, None) is weight
    coarse = rounded_input(weight, "int8_token")
    bound = weight.abs().amax(-1, keepdim=True) / 254 * 1.001
    assert bool(((coarse - weight).abs() <= bound).all()) and not torch.equal(coarse, weight)


def test_probe_measures_the_product():
    x, weight = noise(64, 96), noise(16, 96, seed=1)
    probe = make_probe(x, weight, RULE, "int8_token")
    found = rounded_input(x, "int8_token") @ rounded_weight(weight, RULE).mT
    wanted = x @ weight.mT
    expected = float((found - wanted).square().sum() / wanted.square().sum())
    assert probe.ordered(None) == pytest.approx(expected, rel=1e-4)
    assert probe.scaled(torch.ones(96)) == pytest.approx(expected, rel=1e-4)
    # Without rounding, scaling and ordering change nothing.
    exact = make_probe(x, weight, None, None)
    assert exact.scaled(noise(96).exp()) < 1e-10
    assert exact.ordered(torch.randperm(96)) < 1e-10


def test_what_is_not_a_number_counts_as_infinite():
    probe = make_probe(noise(8, 32), noise(4, 32), RULE, None)
    assert probe.error(torch.full((8, 32), torch.nan), noise(4, 32)) == float("inf")


def test_probes_are_bounded():
    probe = make_probe(noise(3000, 64), noise(1 << 17, 64), None, None, n=64)
    assert probe.x.shape[0] == 512 and probe.weight.numel() == 1 << 17
    assert torch.equal(spread(torch.arange(10), 4), torch.tensor([0, 3, 6, 9]))


@pytest.mark.parametrize("point", simplex(4))
def test_factors_take_out_planted_scales(point):
    act, made, weight = (positive(noise(50, seed=i).exp()) for i in range(3))
    planted = torch.exp2(torch.randint(-3, 7, (50,)).double())
    clean = Channels(act, made, weight).factors(*point)
    other = Channels(act * planted, made * planted, weight / planted).factors(*point)
    torch.testing.assert_close(other, clean * planted)
    # On average, what makes a channel and what reads it are of one size.
    assert float((made / clean).log2().mean() - (weight * clean).log2().mean()) == pytest.approx(
        0, abs=1e-9
    )


def test_balanced_channels_stay_as_they_are():
    size = positive(noise(20).exp())
    factors = Channels(positive(noise(20, seed=1).exp()), size, size).factors(0.0, 0.5)
    torch.testing.assert_close(factors, torch.ones(20).double())


def test_dead_channels_count_as_the_others():
    found = positive(torch.tensor([0.0, 2.0, torch.nan, 8.0, torch.inf]))
    assert found.tolist() == pytest.approx([4.0, 2.0, 4.0, 8.0, 4.0])
    assert positive(torch.zeros(3)).tolist() == [1.0] * 3


def test_powers_of_two():
    exact = power_of_two(torch.tensor([0.7, 1.0, 1.4, 1.5, 3.0, 100.0]))
    assert exact.tolist() == [2.0**n for n in (-1, 0, 0, 1, 2, 7)]
    assert torch.equal(power_of_two(exact), exact)


def test_points_of_the_search():
    assert len(simplex(4)) == 15 and all(i + j <= 1 for i, j in simplex(4))
    assert (0.25, 0.875) not in around((0.25, 0.75), 0.125)
    assert (0.375, 0.625) in around((0.25, 0.75), 0.125)


def sample(length=40, windows=3):
    return AttentionSample(
        noise(windows, 4, length, 8), noise(windows, 2, length, 8, seed=1),
        noise(windows, 2, length, 8, seed=2), 8**-0.5,
    )  # fmt: skip


def test_attention_probe_attends_as_the_library_does():
    seen = sample()
    probe = attention_probe(seen, None, 80)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        seen.q[:2], seen.k[:2], seen.v[:2], is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(probe.output(), wanted.transpose(1, 2).flatten(2).flatten(0, 1))
    delta = noise(2, 2, 40, 8, seed=3)
    changed = torch.nn.functional.scaled_dot_product_attention(
        seen.q[:2], seen.k[:2], seen.v[:2] + delta, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(
        probe.output() + probe.value_change(delta),
        changed.transpose(1, 2).flatten(2).flatten(0, 1),
    )


def test_key_error_is_twice_the_divergence():
    seen = sample(windows=1)
    probe = attention_probe(seen, None, 40)
    delta = 1e-2 * noise(1, 2, 40, 8, seed=3)
    causal = torch.ones(40, 40).tril().bool()

    def logs(k):
        scores = seen.q @ k.repeat_interleave(2, 1).mT * seen.scaling
        return scores.masked_fill(~causal, -torch.inf).log_softmax(-1).double()

    before, after = logs(seen.k), logs(seen.k + delta)
    terms = (before.exp() * (before - after)).masked_fill(~causal, 0).sum((-1, -2))
    torch.testing.assert_close(
        probe.key_error(delta).double(), 2 * terms.view(2, 2).sum(-1), rtol=2e-2, atol=0
    )
    # What all keys have in common costs nothing.
    assert float(probe.key_error(torch.ones(1, 2, 40, 8)).max()) < 1e-9


def test_what_is_read_dense_costs_nothing():
    policy = parse_kv({**PAGE, "residual": 8, "sink": 2}, "kv")
    probe = attention_probe(sample(), policy, 40)
    far = torch.zeros(40, 40).bool()
    for query in range(40):
        far[query, 2 : max(query - 7, 2)] = True
    assert torch.equal(probe.far, far)
    near = torch.zeros(1, 2, 40, 8)
    near[:, :, :2], near[:, :, -8:] = 1e3, 1e3
    assert float(probe.key_error(near).abs().max()) == 0
    assert float(probe.value_change(near).abs().max()) == 0
    # Windows too short for that are taken to be stored whole.
    short = attention_probe(sample(length=16), policy, 16)
    assert torch.equal(short.far, torch.ones(16, 16).tril().bool())
