"""SmoothAttention: function kept, pairs found from data, planted scales taken out, refusals."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fewbit.calibrate.edges import AttentionEdge, BlockEdges, find_edges
from fewbit.calibrate.edits import EditedSource, Side, scale_pair
from fewbit.calibrate.model import ModelGraph
from fewbit.calibrate.observe import AttentionSample, Observation
from fewbit.calibrate.passes.smooth_attention import PASS, mismatch, rope_pairs
from fewbit.calibrate.protocol import BlockView
from fewbit.quant.errors import CalibrationError, RecipeError
from fewbit.quant.kv_policy import parse_kv
from fewbit.quant.transform import BlockFacts
from tiny_models import make_tokens
from transforming import (
    CPU,
    PRESERVED,
    RowSource,
    difference,
    model_logits,
    open_source,
    refusal,
    transformed,
)

KV = parse_kv({"key": {"format": "int4_head"}, "value": {"format": "int4_head"}}, "kv")
FACTS = BlockFacts({}, None, KV, 7)
OPTIONS = PASS.Options()
HEADS, KV_HEADS, DIM, HIDDEN, TOKENS = 4, 2, 16, 32, 96


@pytest.mark.parametrize("arch", PRESERVED)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("alpha", ["search", 0.3])
def test_logits_are_kept(arch, dtype, most, alpha, tmp_path):
    assert difference(arch, tmp_path, [("smooth_attention", {"alpha": alpha})], dtype) <= most


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_logits_are_kept_with_searched_factors(arch, tmp_path):
    source = open_source(arch, tmp_path, torch.float64)
    made = transformed(source, [("smooth_attention", {})], torch.float64, FACTS)
    wanted = model_logits(source.config, source, torch.float64)
    found = model_logits(made.config, made.source, torch.float64)
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-10


def turned(x, rotary, neighbours):
    """x [n, h, D] turned by RoPE at positions 0 … n − 1, in float64."""
    x = x.double()
    half = rotary // 2
    first = torch.arange(0, rotary, 2) if neighbours else torch.arange(half)
    second = first + (1 if neighbours else half)
    angle = torch.arange(x.shape[0]).double()[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    out = x.clone()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out.float()


def view(rotary=DIM, neighbours=False, k_scale=None, kv=KV, kind="plain", seed=0):
    """A view of one attention layer made here, with RoPE of the wanted kind."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, HIDDEN, generator=g)
    weights = {
        "q": torch.randn(HEADS * DIM, HIDDEN, generator=g) / HIDDEN**0.5,
        "k": torch.randn(KV_HEADS * DIM, HIDDEN, generator=g) / HIDDEN**0.5,
        "kb": torch.randn(KV_HEADS * DIM, generator=g),
        "v": torch.randn(KV_HEADS * DIM, HIDDEN, generator=g) / HIDDEN**0.5,
    }
    if k_scale is not None:
        weights["k"] *= k_scale.view(-1, 1)
        weights["kb"] *= k_scale.view(-1)
        queries = k_scale.view(KV_HEADS, DIM).repeat_interleave(HEADS // KV_HEADS, 0)
        weights["q"] /= queries.reshape(-1, 1)
    k = turned(
        (x @ weights["k"].mT + weights["kb"]).view(TOKENS, KV_HEADS, DIM), rotary, neighbours
    )
    q = turned((x @ weights["q"].mT).view(TOKENS, HEADS, DIM), rotary, neighbours)
    if kind == "shifted":  # what attention gets is not what was projected
        k = k + torch.randn(k.shape, generator=g)
    v = (x @ weights["v"].mT).view(TOKENS, KV_HEADS, DIM)
    sample = AttentionSample(*(t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)), DIM**-0.5)
    edge = AttentionEdge(
        (Side("q", -2),), (Side("k", -2), Side("kb")), (Side("v", -2),), Side("o", -1),
        None, None, HEADS, KV_HEADS, DIM, rotary,
    )  # fmt: skip
    block = BlockEdges("layers.0", (), (), edge, (), (), (), ())
    seen = Observation({"k": x, "q": x}, sample)
    model = SimpleNamespace(architecture="MadeForCausalLM")
    return BlockView(block, model, seen, lambda key: weights[key], {}, None, kv, 0), weights


@pytest.mark.parametrize("rotary", [DIM, DIM // 2, 0])
@pytest.mark.parametrize("neighbours", [False, True])
def test_pairs_are_told_from_the_keys(rotary, neighbours):
    made, _ = view(rotary, neighbours)
    pair = rope_pairs(made, made.edges.attention, made.seen.attention)
    half = rotary // 2
    for i in range(half):
        first, second = (2 * i, 2 * i + 1) if neighbours else (i, i + half)
        assert pair[first] == pair[second]
    assert len(set(pair.tolist())) == DIM - half


def test_pairs_of_another_model_do_not_match():
    made, weights = view(neighbours=True)
    sample = made.seen.attention
    before = (made.seen.rows["k"] @ weights["k"].mT + weights["kb"]).view(-1, KV_HEADS, DIM)
    after = sample.k[0].transpose(0, 1)
    channel = torch.arange(DIM)
    assert mismatch(before, after, channel // 2) < 1e-3
    assert mismatch(before, after, channel % (DIM // 2)) > 0.1


def test_keys_that_are_not_those_projected_are_refused():
    made, _ = view(kind="shifted")
    with pytest.raises(CalibrationError, match=r"smooth_attention cannot run on Made.*layers\.0"):
        PASS.edits(made, OPTIONS)


def test_attention_that_cannot_be_watched_is_refused():
    made, _ = view()
    blind = replace(made, seen=Observation(made.seen.rows, None))
    with pytest.raises(CalibrationError, match="cannot be watched"):
        PASS.edits(blind, OPTIONS)


def edited(made, weights):
    """Weights after the edits of the pass."""
    found = {key: value.clone() for key, value in weights.items()}
    for edit in PASS.edits(made, OPTIONS):
        edit.apply(found[edit.side.key])
    return found


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("rotary", [DIM, DIM // 2])
def test_logits_of_made_attention_are_kept_under_rope(rotary, neighbours):
    made, weights = view(rotary, neighbours)
    found = edited(made, weights)
    x, sample = made.seen.rows["k"], made.seen.attention
    k = turned((x @ found["k"].mT + found["kb"]).view(-1, KV_HEADS, DIM), rotary, neighbours)
    q = turned((x @ found["q"].mT).view(-1, HEADS, DIM), rotary, neighbours)
    assert not torch.allclose(found["k"], weights["k"], rtol=0.05)

    def logits(q, k):
        return q @ k.repeat_interleave(HEADS // KV_HEADS, 0).mT

    wanted = logits(sample.q[0], sample.k[0])
    torch.testing.assert_close(
        logits(q.transpose(0, 1), k.transpose(0, 1)), wanted, rtol=1e-4, atol=1e-4
    )


def planting(pairs=3, factor=16.0):
    scale = torch.ones(KV_HEADS, 2, DIM // 2)
    scale[0, :, :pairs] = factor
    scale[1, :, 1] = factor
    return scale.view(KV_HEADS, DIM)


def test_planted_scales_disappear():
    clean, planted = edited(*view()), edited(*view(k_scale=planting()))
    for key in ("q", "k", "kb"):
        torch.testing.assert_close(planted[key], clean[key], rtol=1e-4, atol=1e-6)


def test_shared_gains_take_the_factors_of_all_heads():
    made, weights = view()
    gains = {**weights, "qg": torch.ones(DIM), "kg": torch.ones(DIM)}
    edge = replace(made.edges.attention, q_gain="qg", k_gain="kg")
    blocks = replace(made.edges, attention=edge)
    made = replace(made, edges=blocks, read=lambda key: gains[key])
    found = edited(made, gains)
    assert torch.equal(found["k"], weights["k"]) and torch.equal(found["q"], weights["q"])
    torch.testing.assert_close(found["qg"] * found["kg"], torch.ones(DIM))
    assert float(found["kg"].std()) > 0.01
    assert torch.equal(found["kg"][: DIM // 2], found["kg"][DIM // 2 :])


def logit_error(made, weights, found):
    """Squared logit error with the edited keys stored in 4 bit, of one head each."""
    from fewbit.calibrate.search import stored_vectors

    x, sample = made.seen.rows["k"], made.seen.attention
    k = turned((x @ found["k"].mT + found["kb"]).view(-1, KV_HEADS, DIM), DIM, False)
    q = turned((x @ found["q"].mT).view(-1, HEADS, DIM), DIM, False).transpose(0, 1)
    delta = (stored_vectors(k, KV.key) - k).transpose(0, 1).repeat_interleave(2, 0)
    assert sample is not None
    return float((q @ delta.mT).square().mean())


def test_error_drops_where_keys_are_loud():
    made, weights = view(k_scale=planting())
    assert logit_error(made, weights, edited(made, weights)) < 0.1 * logit_error(
        made, weights, weights
    )


def test_without_a_policy_factors_are_the_balanced_ones():
    made, weights = view(kv=None)
    found = edited(made, weights)
    x = made.seen.rows["k"]
    k = turned((x @ found["k"].mT + found["kb"]).view(-1, KV_HEADS, DIM), DIM, False)
    q = turned((x @ found["q"].mT).view(-1, HEADS, DIM), DIM, False)

    def energy(y):  # of each KV head's pairs, on average over its heads and tokens
        return y.view(TOKENS, KV_HEADS, -1, 2, DIM // 2).square().mean((0, 2, 3))

    torch.testing.assert_close(energy(k), energy(q), rtol=1e-3, atol=1e-5)


def test_planted_model_becomes_the_clean_one(tmp_path):
    source = open_source("llama", tmp_path, torch.float32)
    edges = find_edges(ModelGraph(source.config, source, torch.float32, CPU), make_tokens(1, 24))
    attention = edges.blocks[0].attention
    scale = torch.ones(attention.kv_heads, 2, attention.head_dim // 2)
    scale[0, :, 3], scale[1, :, 5] = 16, 16
    scale = scale.view(attention.kv_heads, -1)
    planted = RowSource(tmp_path)
    seen = EditedSource(planted)
    queries = scale.repeat_interleave(attention.heads // attention.kv_heads, 0).flatten()
    seen.add(scale_pair((), attention.k, scale.flatten()) + scale_pair(attention.q, (), queries))
    planted.tensors = {name: seen.read(name).clone() for name in seen.tensors}
    uses = [("smooth_attention", {})]
    clean = transformed(source, uses, facts=FACTS).source
    other = transformed(planted, uses, facts=FACTS).source
    for side in (*attention.q, *attention.k):
        wanted, found = clean.read(side.key), other.read(side.key)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(source.read(side.key), wanted, rtol=1e-2)


@pytest.mark.parametrize("arch", ["deepseek_v3", "phi3", "gpt_neox"])
def test_attention_without_separate_projections_is_refused(arch, tmp_path):
    assert "separate projections q, k, v and o" in refusal(PASS, OPTIONS, arch, tmp_path)


@pytest.mark.parametrize("alpha", ["best", -0.1, 1.5, True, None])
def test_bad_alpha_is_named(alpha):
    with pytest.raises(RecipeError, match="smooth_attention: alpha must be 0 to 1"):
        PASS.Options(alpha=alpha)
