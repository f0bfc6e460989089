"""Channel reorder: function kept, done only where it helps, one order per KV head."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fewbit.calibrate.edges import AttentionEdge, BlockEdges, MlpEdge
from fewbit.calibrate.edits import Side
from fewbit.calibrate.observe import Observation
from fewbit.calibrate.passes.reorder import PASS
from fewbit.calibrate.protocol import BlockView
from fewbit.calibrate.search import rounded_weight
from fewbit.quant.errors import RecipeError
from fewbit.quant.format import find_format
from fewbit.quant.transform import BlockFacts
from transforming import PRESERVED, difference, model_logits, open_source, refusal, transformed

INT = find_format("int_two_level")
RULE = ("int_two_level", INT.Options(group=32))
ROW = ("int_two_level", INT.Options(group="row"))
HEADS, KV_HEADS, DIM, OUT, INNER, TOKENS = 4, 2, 64, 24, 128, 256


@pytest.mark.parametrize("arch", PRESERVED)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("edge", ["down_proj", "o_proj"])
def test_logits_are_kept(arch, dtype, most, edge, tmp_path):
    assert difference(arch, tmp_path, [("reorder", {"edges": [edge]})], dtype) <= most


@pytest.mark.parametrize("arch", ["llama", "qwen2", "mixtral"])
def test_logits_are_kept_with_searched_orders(arch, tmp_path):
    source = open_source(arch, tmp_path, torch.float64)
    names = [n for n, t in source.tensors.items() if t.dim() == 2 and ".layers." in n]
    facts = BlockFacts(dict.fromkeys(names, RULE), "int8_token", None, 7)
    edges = ["down_proj", "o_proj"]
    made = transformed(source, [("reorder", {"edges": edges})], torch.float64, facts)
    wanted = model_logits(source.config, source, torch.float64)
    found = model_logits(made.config, made.source, torch.float64)
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-10


def view(loud=True, rule=RULE, experts=1, seed=0):
    """A block whose down and o have loud columns here and there (in half of the channels)."""
    g = torch.Generator().manual_seed(seed)
    weights = {
        "up": torch.arange(INNER).float().view(-1, 1).repeat(1, 4),
        "gate": torch.arange(INNER).float().view(-1, 1).repeat(1, 4),
        "down": torch.randn(OUT, INNER, generator=g),
        "v": torch.arange(KV_HEADS * DIM).float().view(-1, 1).repeat(1, 4),
        "vb": torch.arange(KV_HEADS * DIM).float(),
        "o": torch.randn(OUT, HEADS * DIM, generator=g),
    }
    rows = {
        "down": torch.randn(TOKENS, INNER, generator=g),
        "o": torch.randn(TOKENS, HEADS * DIM, generator=g),
    }
    if loud:
        pick = torch.rand(INNER, generator=g) < 0.5
        weights["down"][:, pick] *= 8
        heads = torch.rand(KV_HEADS, 1, DIM, generator=g) < 0.5
        weights["o"][:, heads.expand(-1, HEADS // KV_HEADS, -1).flatten()] *= 8
    mlp = MlpEdge((Side("gate", -2),), (Side("up", -2),), Side("down", -1), INNER)
    edge = AttentionEdge(
        (Side("q", -2),), (Side("k", -2),), (Side("v", -2), Side("vb")), Side("o", -1),
        None, None, HEADS, KV_HEADS, DIM, DIM,
    )  # fmt: skip
    block = BlockEdges("layers.0", (), (), edge, (mlp,) * experts, (), (), ())
    made = BlockView(
        block, SimpleNamespace(architecture="Made"), Observation(rows, None),
        lambda key: weights[key], dict.fromkeys(weights, rule), "int8_token", None, 0,
    )  # fmt: skip
    return made, weights


def edited(made, weights, edge):
    found = {key: value.clone() for key, value in weights.items()}
    for edit in PASS.edits(made, PASS.Options(edges=[edge])):
        edit.apply(found[edit.side.key])
    return found


def error(x, weight):
    delta = x @ (rounded_weight(weight, RULE) - weight).mT
    return float(delta.square().sum())


def test_loud_channels_are_put_together_and_the_error_drops():
    made, weights = view()
    found = edited(made, weights, "down_proj")
    order = found["up"][:, 0].long()
    assert sorted(order.tolist()) == list(range(INNER)) and order.tolist() != list(range(INNER))
    assert torch.equal(found["gate"], found["up"])
    assert torch.equal(found["down"], weights["down"][:, order])
    x = made.seen.rows["down"]
    assert error(x[:, order], found["down"]) < 0.8 * error(x, weights["down"])


def test_heads_of_a_group_share_an_order():
    made, weights = view()
    found = edited(made, weights, "o_proj")
    order = found["vb"].long().view(KV_HEADS, DIM)
    assert torch.equal(found["v"][:, 0], found["vb"])
    assert all(sorted(part.tolist()) == list(range(i * DIM, (i + 1) * DIM))
               for i, part in enumerate(order))  # fmt: skip
    within = order % DIM
    heads = weights["o"].view(OUT, KV_HEADS, 2, DIM)
    wanted = torch.stack([heads[:, i, :, within[i]] for i in range(KV_HEADS)], 1)
    assert torch.equal(found["o"], wanted.reshape(OUT, -1))
    assert not torch.equal(within[0], torch.arange(DIM))


def test_equal_channels_are_left_in_order():
    made, weights = view(loud=False)
    made.seen.rows["down"][:] = 1.0
    weights["down"][:] = weights["down"][:, :1]
    assert PASS.edits(made, PASS.Options()) == []


@pytest.mark.parametrize("edge", ["down_proj", "o_proj"])
def test_rows_as_groups_are_left_in_order(edge):
    made, _ = view(rule=ROW)
    assert PASS.edits(made, PASS.Options(edges=[edge])) == []


def test_heads_within_a_group_are_left_in_order():
    rule = ("int_two_level", INT.Options(group=64))
    made, _ = view(rule=rule)
    assert PASS.edits(made, PASS.Options(edges=["o_proj"])) == []
    assert PASS.edits(made, PASS.Options(edges=["down_proj"])) != []


def test_weights_that_stay_wide_and_starved_experts_are_left_in_order():
    made, _ = view()
    others = {key: rule for key, rule in made.rules.items() if key not in ("down", "o")}
    wide = replace(made, rules=others)
    assert PASS.edits(wide, PASS.Options(edges=["down_proj", "o_proj"])) == []
    made, _ = view(experts=2)
    made.seen.rows["down"] = made.seen.rows["down"][:8]
    assert PASS.edits(made, PASS.Options()) == []


@pytest.mark.parametrize(
    ("arch", "edge", "text"),
    [
        ("phi3", "down_proj", "separate gate, up and down"),
        ("gpt_oss", "down_proj", "separate gate, up and down"),
        ("deepseek_v3", "o_proj", "separate projections q, k, v and o"),
    ],
)
def test_architectures_without_the_edge_are_refused(arch, edge, text, tmp_path):
    assert text in refusal(PASS, PASS.Options(edges=[edge]), arch, tmp_path)


@pytest.mark.parametrize("edges", [["qkv"], [], "down_proj"])
def test_bad_edges_are_named(edges):
    with pytest.raises(RecipeError, match="reorder: edges must be a list of some of"):
        PASS.Options(edges=edges)
