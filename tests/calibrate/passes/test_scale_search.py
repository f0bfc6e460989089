"""Scale search: the mix kept is the best of the candidates, by an independent float64 search."""

import pytest
import torch

from fewbit.calibrate.passes import gptq, scale_search
from fewbit.calibrate.passes.nearest import round_nearest
from fewbit.calibrate.passes.scale_search import PASS, ScaleSearchOptions
from fewbit.calibrate.protocol import Moments
from fewbit.quant.block import Block, Weight
from fewbit.quant.errors import RecipeError
from fewbit.quant.format import dequantize, find_format

FORMATS = [
    ("int_two_level", {"group": 32}),
    ("int_two_level", {"group": 32, "dialect": "zero"}),
    ("int_two_level", {"group": "row"}),
    ("int_group", {"bits": 3, "group": 32}),
    ("int_group", {"bits": 3, "group": 32, "symmetric": False}),
]


def setting(name="int_two_level", keys=None, seed=0, n=6, k=64):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(n, k, generator=generator)
    value[:, ::17] *= 4  # outliers that are worth clipping
    mixing = torch.randn(k, k, generator=generator) * torch.rand(k, generator=generator)
    x = torch.randn(500, k, generator=generator) @ mixing
    options = find_format(name).Options(**(keys or {"group": 32}))
    weight = Weight(f"w{seed}", value, name, options, input_key="x")
    return weight, {"x": Moments(x.mT @ x / 500, 500)}


def errors_of(weight, scales, metric):
    """float64 error [N, groups] of nearest rounding; metric [K, K]."""
    store = find_format(weight.format)
    _, rounded = store.round(weight.value, scales, 0, weight.options)
    size = store.group_size(weight.value.shape[-1], weight.options)
    delta = (weight.value - rounded).double().unflatten(-1, (-1, size))
    found = []
    for group in range(delta.shape[1]):
        columns = slice(group * size, (group + 1) * size)
        h = metric[columns, columns].double()
        found.append(((delta[:, group] @ h) * delta[:, group]).sum(-1))
    return torch.stack(found, -1)


def metric_of(kind, hessian):
    if kind == "group":
        return hessian
    if kind == "data_free":
        return torch.eye(len(hessian))
    h = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    return torch.diag(1 / torch.linalg.inv(h).diagonal())


@pytest.mark.parametrize(("name", "keys"), FORMATS)
@pytest.mark.parametrize("kind", ["conditional", "group", "data_free"])
def test_every_group_gets_its_best_candidate(name, keys, kind):
    weight, stats = setting(name, keys)
    if kind == "data_free":
        PASS.run(Block("b", [weight]), {}, ScaleSearchOptions(data_free=True))
    else:
        PASS.run(Block("b", [weight]), stats, ScaleSearchOptions(metric=kind))
    metric = metric_of(kind, stats["x"].hessian)
    store = find_format(name)
    tried = list(store.candidates(weight.value, weight.options))
    every = torch.stack([errors_of(weight, scales, metric) for scales in tried])
    kept = errors_of(weight, weight.scales, metric)
    assert torch.allclose(kept, every.amin(0), rtol=1e-4)
    assert (every.argmin(0) != 0).any(), "the first guess was always best: nothing was tested"
    assert kept.sum() < every[0].sum()
    for part, spec in store.part_specs(tuple(weight.value.shape), weight.options).items():
        if part != "codes":
            assert (weight.scales[part].dtype, tuple(weight.scales[part].shape)) == (
                spec.dtype, spec.shape,
            )  # fmt: skip


def test_chunks_change_nothing(monkeypatch):
    weight, stats = setting(n=9)
    PASS.run(Block("b", [weight]), stats, ScaleSearchOptions())
    whole = weight.scales
    monkeypatch.setattr(scale_search, "CHUNK_ELEMENTS", 2 * 64)
    PASS.run(Block("b", [weight]), stats, ScaleSearchOptions())
    for name, part in whole.items():
        assert torch.equal(weight.scales[name], part)


def test_rounding_passes_use_the_scales():
    weight, stats = setting()
    weight.clip = torch.full((6, 2), 0.3)  # scales win over it
    PASS.run(Block("b", [weight]), stats, ScaleSearchOptions())
    nearest = round_nearest(weight)
    swept = gptq.PASS.run(Block("b", [weight]), stats, gptq.GptqOptions()).weights[0].packed
    for packed in (nearest, swept):
        for name, part in weight.scales.items():
            assert torch.equal(packed.terms[0].parts[name], part)


def test_shared_inputs_and_experts_get_scales_of_their_own():
    """Joined rows and batched experts find the same scales as alone; one expert without data too."""
    weight, stats = setting()
    other, _ = setting(seed=5, n=4)
    fused = Weight(
        "f", torch.stack([weight.value, weight.value * 2, weight.value.flip(0)]), weight.format,
        weight.options, input_key="e",
    )  # fmt: skip
    experts = {"e[0]": stats["x"], "e[1]": stats["x"]}
    PASS.run(Block("b", [weight, other, fused]), stats | experts, ScaleSearchOptions())
    alone, _ = setting()
    PASS.run(Block("b", [alone]), stats, ScaleSearchOptions())
    for name, part in alone.scales.items():
        assert torch.equal(weight.scales[name], part)
        assert torch.equal(fused.scales[name][0], part)
    assert fused.scales["scale_group"].shape == (3, 6, 2)
    free, _ = setting()
    free.value = fused.value[2]
    PASS.run(Block("b", [free]), {}, ScaleSearchOptions(data_free=True))
    assert torch.equal(fused.scales["offset_group"][2], free.scales["offset_group"])


def test_padding_does_not_vote():
    """K = 40 in groups of 32: only the 8 real columns of the last group count."""
    weight, stats = setting(k=40)
    PASS.run(Block("b", [weight]), stats, ScaleSearchOptions())
    full = torch.nn.functional.pad(weight.value, (0, 24))
    store = find_format(weight.format)
    metric = torch.zeros(64, 64, dtype=torch.float64)
    h = stats["x"].hessian.double()
    h = h + 0.01 * h.diagonal().sum() / 64 * torch.eye(40)
    metric[:40, :40] = torch.diag(1 / torch.linalg.inv(h).diagonal())
    wide = Weight("w", full, weight.format, weight.options)
    tried = [errors_of(wide, s, metric) for s in store.candidates(full, weight.options)]
    kept = errors_of(wide, weight.scales, metric)
    assert torch.allclose(kept, torch.stack(tried).amin(0), rtol=1e-4)


@pytest.mark.parametrize(
    "hessian", [torch.full((64, 64), float("nan")), -torch.eye(64), torch.zeros(64, 64)]
)
@pytest.mark.parametrize("metric", ["conditional", "group"])
def test_unusable_statistics_leave_valid_scales(hessian, metric):
    weight, _ = setting()
    PASS.run(Block("b", [weight]), {"x": Moments(hessian, 9)}, ScaleSearchOptions(metric=metric))
    packed = round_nearest(weight)
    find_format(weight.format).check(packed.terms[0].parts, (6, 64), weight.options)
    assert (dequantize(packed) - weight.value).abs().max() < 4


@pytest.mark.parametrize(
    "keys", [{"group": 64}, {"group": 64, "dialect": "zero"}, {"group": "row"}]
)
def test_search_and_gptq_beat_nearest_on_nearly_every_layer(keys):
    """Layer output error on random correlated layers; ≥ 95 % of them, and by a wide margin."""
    wins, ratios = 0, []
    for seed in range(20):
        weight, stats = setting(keys=keys, seed=seed, n=16, k=128)
        h = stats["x"].hessian.double()

        def loss(packed, weight=weight, h=h):
            delta = (weight.value - dequantize(packed)).double()
            return float(((delta @ h) * delta).sum())

        plain = loss(round_nearest(weight))
        block = PASS.run(Block("b", [weight]), stats, ScaleSearchOptions())
        found = loss(gptq.PASS.run(block, stats, gptq.GptqOptions()).weights[0].packed)
        wins += found < plain
        ratios.append(found / plain)
    assert wins >= 19
    assert sum(ratios) / len(ratios) < 0.5


@pytest.mark.parametrize("keys", [{"metric": "diag"}, {"data_free": 1}])
def test_bad_options_are_named(keys):
    with pytest.raises(RecipeError, match=next(iter(keys))):
        ScaleSearchOptions(**keys)


def test_statistics_are_asked_for_only_when_used():
    assert PASS.needs(ScaleSearchOptions()) == ("moments",)
    assert PASS.needs(ScaleSearchOptions(data_free=True)) == ()
