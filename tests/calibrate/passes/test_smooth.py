"""Output smoothing: function kept, planted scales taken out, error lowered, refusals."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fewbit.calibrate.edges import AttentionEdge, BlockEdges, MlpEdge, NormEdge
from fewbit.calibrate.edits import Side
from fewbit.calibrate.observe import AttentionSample, Observation
from fewbit.calibrate.passes.smooth import PASS, refuse
from fewbit.calibrate.protocol import BlockView
from fewbit.calibrate.search import rounded_input, rounded_weight, stored_vectors
from fewbit.quant.errors import RecipeError
from fewbit.quant.format import find_format
from fewbit.quant.kv_policy import parse_kv
from fewbit.quant.transform import BlockFacts
from transforming import PRESERVED, difference, model_logits, open_source, refusal, transformed

KV = parse_kv({"key": {"format": "int4_head"}, "value": {"format": "int4_head"}}, "kv")
RULE = ("int_two_level", find_format("int_two_level").Options(group=32))
ALL_EDGES = ["down_proj", "o_proj", "qkv", "gate_up"]
HEADS, KV_HEADS, DIM, HIDDEN, INNER, TOKENS = 4, 2, 16, 32, 64, 128


@pytest.mark.parametrize("arch", PRESERVED)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("edge", ALL_EDGES)
def test_logits_are_kept(arch, dtype, most, edge, tmp_path):
    assert difference(arch, tmp_path, [("smooth", {"edges": [edge]})], dtype) <= most


def facts(source, kv=KV, skip=()):
    """Everything that is a matrix of a block gets the rule."""
    rules = {
        name: RULE
        for name, tensor in source.tensors.items()
        if tensor.dim() == 2 and ".layers." in name and not any(part in name for part in skip)
    }
    return BlockFacts(rules, "int8_token", kv, 7)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "mixtral"])
@pytest.mark.parametrize("alpha", ["search", 0.2])
def test_logits_are_kept_with_searched_factors(arch, alpha, tmp_path):
    source = open_source(arch, tmp_path, torch.float64)
    uses = [("smooth", {"edges": ALL_EDGES, "alpha": alpha})]
    made = transformed(source, uses, torch.float64, facts(source))
    wanted = model_logits(source.config, source, torch.float64)
    found = model_logits(made.config, made.source, torch.float64)
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-10


def view(up_scale=None, v_scale=None, kv=KV, rules=("up", "down", "v", "o"), seed=0, experts=1):
    """A block's view made here: a gated MLP, and attention with two query heads to a KV head."""
    g = torch.Generator().manual_seed(seed)

    def matrix(n, k):
        return torch.randn(n, k, generator=g) / k**0.5

    weights = {
        "up": matrix(INNER, HIDDEN), "gate": matrix(INNER, HIDDEN), "down": matrix(HIDDEN, INNER),
        "v": matrix(KV_HEADS * DIM, HIDDEN), "vb": torch.randn(KV_HEADS * DIM, generator=g),
        "o": matrix(HIDDEN, HEADS * DIM),
    }  # fmt: skip
    if up_scale is not None:
        weights["up"] *= up_scale.unsqueeze(1)
        weights["down"] /= up_scale
    if v_scale is not None:
        weights["v"] *= v_scale.unsqueeze(1)
        weights["vb"] *= v_scale
        weights["o"] /= v_scale.view(KV_HEADS, -1).repeat_interleave(2, 0).flatten()
    x = torch.randn(TOKENS, HIDDEN, generator=g)
    inner = torch.nn.functional.silu(x @ weights["gate"].mT) * (x @ weights["up"].mT)
    q = torch.randn(1, HEADS, TOKENS, DIM, generator=g)
    k = torch.randn(1, KV_HEADS, TOKENS, DIM, generator=g)
    v = (x @ weights["v"].mT + weights["vb"]).view(1, TOKENS, KV_HEADS, DIM).transpose(1, 2)
    sample = AttentionSample(q, k, v, DIM**-0.5)
    heads = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    rows = {"down": inner, "o": heads[0].transpose(0, 1).flatten(1), "up": x}
    mlp = MlpEdge((Side("gate", -2),), (Side("up", -2),), Side("down", -1), INNER)
    edge = AttentionEdge(
        (Side("q", -2),), (Side("k", -2),), (Side("v", -2), Side("vb")), Side("o", -1),
        None, None, HEADS, KV_HEADS, DIM, DIM,
    )  # fmt: skip
    block = BlockEdges("layers.0", (), (), edge, (mlp,) * experts, (), (), ())
    made = BlockView(
        block, SimpleNamespace(architecture="Made"), Observation(rows, sample),
        lambda key: weights[key], dict.fromkeys(rules, RULE), "int8_token", kv, 0,
    )  # fmt: skip
    return made, weights


def edited(made, weights, edge, **options):
    """Weights after the edits of the pass."""
    found = {key: value.clone() for key, value in weights.items()}
    for edit in PASS.edits(made, PASS.Options(edges=[edge], **options)):
        edit.apply(found[edit.side.key])
    return found


def down_error(made, weights):
    """Relative squared error of down's output, everything rounded."""
    x = made.seen.rows["up"]
    inner = torch.nn.functional.silu(x @ weights["gate"].mT) * (x @ weights["up"].mT)
    rounded = rounded_input(inner, "int8_token") @ rounded_weight(weights["down"], RULE).mT
    wanted = inner @ weights["down"].mT
    return float((rounded - wanted).square().sum() / wanted.square().sum())


def value_error(made, weights):
    """Relative squared error of o's output, values read from the cache."""
    x, sample = made.seen.rows["up"], made.seen.attention
    v = (x @ weights["v"].mT + weights["vb"]).view(1, TOKENS, KV_HEADS, DIM).transpose(1, 2)

    def attend(v):
        heads = torch.nn.functional.scaled_dot_product_attention(
            sample.q, sample.k, v, is_causal=True, enable_gqa=True
        )
        return heads[0].transpose(0, 1).flatten(1)

    wanted = attend(v) @ weights["o"].mT
    heads = rounded_input(attend(stored_vectors(v, KV.value)), "int8_token")
    found = heads @ rounded_weight(weights["o"], RULE).mT
    return float((found - wanted).square().sum() / wanted.square().sum())


def planted(size, factor, every=9):
    scale = torch.ones(size)
    scale[::every] = factor
    return scale


def test_planted_up_rows_disappear_and_the_error_with_them():
    made, weights = view(up_scale=planted(INNER, 64.0))
    clean_view, clean = view()
    found, wanted = edited(made, weights, "down_proj"), edited(clean_view, clean, "down_proj")
    for key in ("up", "down"):
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-6)
    assert torch.equal(found["gate"], weights["gate"])
    assert down_error(made, found) < 0.2 * down_error(made, weights)
    assert down_error(clean_view, wanted) <= down_error(clean_view, clean)


@pytest.mark.parametrize("kv", [KV, None])
def test_planted_values_disappear_and_the_error_with_them(kv):
    made, weights = view(v_scale=planted(KV_HEADS * DIM, 8.0), kv=kv)
    clean_view, clean = view(kv=kv)
    found, wanted = edited(made, weights, "o_proj"), edited(clean_view, clean, "o_proj")
    for key in ("v", "vb", "o"):
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-6)
    assert value_error(made, found) < 0.5 * value_error(made, weights)


def test_query_heads_of_a_group_share_factors():
    made, weights = view()
    found = edited(made, weights, "o_proj", alpha=0.4)
    rows = found["v"][:, 0] / weights["v"][:, 0]
    columns = (found["o"][0] / weights["o"][0]).view(KV_HEADS, 2, DIM)
    torch.testing.assert_close(columns[:, 0], columns[:, 1])
    torch.testing.assert_close(columns[:, 0].flatten() * rows, torch.ones(KV_HEADS * DIM))
    torch.testing.assert_close(found["vb"] / weights["vb"], rows)
    assert float(rows.std()) > 0.01


@pytest.mark.parametrize("left", ["up", "down"])
def test_factors_are_powers_of_two_where_a_weight_stays_wide(left):
    rules = [name for name in ("up", "down") if name != left]
    made, weights = view(rules=rules)
    found = edited(made, weights, "down_proj", alpha=0.4)
    factors = found["down"][0] / weights["down"][0]
    assert torch.equal(factors.log2(), factors.log2().round()) and float(factors.std()) > 0
    whole, weights = view()
    factors = edited(whole, weights, "down_proj", alpha=0.4)["down"][0] / weights["down"][0]
    assert not torch.equal(factors.log2(), factors.log2().round())


def norm_view(kind="rms"):
    made, weights = view(rules=("up", "gate"))
    weights["gain"] = torch.rand(HIDDEN, generator=torch.Generator().manual_seed(3)) + 0.5
    weights["gain"] = weights["gain"].bfloat16().float()
    readers = (Side("gate", -1), Side("up", -1))
    norm = NormEdge("gain", None, kind, readers)
    rows = {**made.seen.rows, "gate": made.seen.rows["up"]}
    seen = Observation(rows, made.seen.attention)
    return replace(made, edges=replace(made.edges, norms=(norm,)), seen=seen), weights


def test_gains_stay_numbers_that_sixteen_bits_hold():
    made, weights = norm_view()
    found = edited(made, weights, "gate_up", alpha=0.6)
    assert not torch.allclose(found["gain"], weights["gain"], rtol=0.01)
    torch.testing.assert_close(found["gain"].bfloat16().float(), found["gain"], rtol=1e-6, atol=0)
    torch.testing.assert_close(found["gain"] * found["up"], weights["gain"] * weights["up"])


def test_gains_that_count_from_one_are_refused():
    made, _ = norm_view("rms1p")
    edges = SimpleNamespace(blocks=(made.edges,))
    sentence = refuse(edges, PASS.Options(edges=["gate_up"]))
    assert sentence == "edge gate_up: gain multiplies by something else than its gain"
    assert refuse(edges, PASS.Options(edges=["qkv"])) is not None
    assert refuse(edges, PASS.Options(edges=["down_proj", "o_proj"])) is None


def test_starved_experts_are_left_alone():
    made, _ = view(experts=2)
    few = {**made.seen.rows, "down": made.seen.rows["down"][:8]}
    starved = replace(made, seen=Observation(few, made.seen.attention))
    assert PASS.edits(starved, PASS.Options(edges=["down_proj"])) == []
    assert PASS.edits(made, PASS.Options(edges=["down_proj"], alpha=0.3)) != []


def test_dead_channels_stay_finite():
    made, weights = view()
    made.seen.rows["down"][:, 5] = 0
    weights["down"][:, 7] = 0
    weights["up"][9] = 0
    found = edited(made, weights, "down_proj")
    assert all(bool(value.isfinite().all()) for value in found.values())


@pytest.mark.parametrize(
    ("arch", "edge", "text"),
    [
        ("phi3", "down_proj", "separate gate, up and down"),
        ("gpt_neox", "down_proj", "separate gate, up and down"),
        ("deepseek_v3", "o_proj", "separate projections q, k, v and o"),
        ("gemma2", "gate_up", "something else than its gain"),
    ],
)
def test_architectures_without_the_edge_are_refused(arch, edge, text, tmp_path):
    assert text in refusal(PASS, PASS.Options(edges=[edge]), arch, tmp_path)


@pytest.mark.parametrize(
    "options", [{"edges": ["up_proj"]}, {"edges": []}, {"edges": "down_proj"}, {"alpha": 2}]
)
def test_bad_options_are_named(options):
    with pytest.raises(RecipeError, match=f"smooth: {next(iter(options))} must be"):
        PASS.Options(**options)
