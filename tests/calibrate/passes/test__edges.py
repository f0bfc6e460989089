"""The recipe key `edges`, and what an edge must offer."""

from types import SimpleNamespace

import pytest
import torch

from fewbit.calibrate.edges import AttentionEdge, BlockEdges, MlpEdge
from fewbit.calibrate.edits import Side
from fewbit.calibrate.passes._edges import (
    MIN_TOKENS,
    missing_edge,
    read_beside,
    seen_mlps,
    wanted_edges,
)
from fewbit.quant.errors import RecipeError

ATTENTION = AttentionEdge((), (), (), Side("o"), None, None, 2, 2, 8, 8)


def mlp(name: str, turned: bool = False) -> MlpEdge:
    return MlpEdge((Side(f"{name}.gate", -2),), (Side(f"{name}.up", -2),), Side(name), 1, turned)


def block(*mlps: MlpEdge, attention: AttentionEdge | None = ATTENTION) -> BlockEdges:
    return BlockEdges("layer", (), (), attention, mlps, (), (), ())


def test_edges_come_as_a_tuple():
    assert wanted_edges("turn", ["b", "a"], ("a", "b", "c")) == ("b", "a")
    assert wanted_edges("turn", ("a",), ("a", "b")) == ("a",)


@pytest.mark.parametrize("edges", [[], "a", None, ["a", "z"], {"a"}])
def test_bad_edges_are_named(edges):
    with pytest.raises(RecipeError, match=r"^turn: edges must be a list of some of a, b; got"):
        wanted_edges("turn", edges, ("a", "b"))


def test_missing_edges_are_told_only_if_wanted():
    both = ("down_proj", "o_proj")
    assert missing_edge(block(mlp("d")), both) is None
    assert "layer has no gated MLP" in str(missing_edge(block(), both))
    assert "rotate turns" in str(missing_edge(block(mlp("d"), mlp("e", turned=True)), both))
    assert "layer has no attention" in str(missing_edge(block(mlp("d"), attention=None), both))
    assert missing_edge(block(), ("o_proj",)) is None
    assert missing_edge(block(mlp("d", turned=True), attention=None), ("qkv",)) is None


def test_experts_that_saw_too_little_are_left_out():
    rows = {"a": torch.ones(MIN_TOKENS, 4), "b": torch.ones(MIN_TOKENS - 1, 4)}
    seen = SimpleNamespace(rows=rows)

    def names(*mlps):
        view = SimpleNamespace(edges=block(*mlps), seen=seen)
        return [(found.down.key, x.shape[0]) for found, x in seen_mlps(view)]

    assert names(mlp("a"), mlp("b"), mlp("c")) == [("a", MIN_TOKENS)]
    assert names(mlp("b")) == [("b", MIN_TOKENS - 1)]  # no expert: it saw every token
    assert names(mlp("c")) == []


def test_tensors_are_read_in_fp32():
    view = SimpleNamespace(read={"w": torch.tensor([1.5], dtype=torch.float64)}.__getitem__)
    found = read_beside(view, Side("w"), torch.zeros(1))
    assert found.dtype == torch.float32 and found.tolist() == [1.5]
