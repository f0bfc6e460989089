"""Samples of what weights and attention see."""

from pathlib import Path

import pytest
import torch

from fewbit.calibrate.model import ModelGraph
from fewbit.calibrate.observe import first_rows, observe, watch_attention
from tiny_models import make_tokens
from transforming import CPU, open_source


def graph_of(arch: str, folder: Path) -> ModelGraph:
    source = open_source(arch, folder)
    graph = ModelGraph(source.config, source, torch.float32, CPU)
    graph.materialize(0)
    return graph


def test_rows_and_heads_have_the_models_shapes(tmp_path: Path) -> None:
    graph = graph_of("llama", tmp_path)
    inputs = graph.start(make_tokens(4, 20), 2)
    seen = observe(graph, 0, inputs, 60)  # one batch of two windows, then one window
    prefix = "model.layers.0."
    assert seen.rows[f"{prefix}mlp.down_proj.weight"].shape == (60, 96)
    assert seen.rows[f"{prefix}self_attn.q_proj.weight"].shape == (60, 64)
    assert seen.attention is not None
    assert seen.attention.q.shape == (3, 4, 20, 24)
    assert seen.attention.k.shape == seen.attention.v.shape == (3, 2, 20, 24)
    assert seen.attention.scaling == pytest.approx(24**-0.5)


def test_keys_are_seen_after_rope_and_values_as_projected(tmp_path: Path) -> None:
    graph = graph_of("llama", tmp_path)
    inputs = graph.start(make_tokens(1, 20), 1)
    seen = observe(graph, 0, inputs, 20)
    assert seen.attention is not None
    x = seen.rows["model.layers.0.self_attn.k_proj.weight"]
    layer = graph.block(0).self_attn  # type: ignore[union-attr]
    k, v = (w(x).view(20, 2, 24).transpose(0, 1) for w in (layer.k_proj, layer.v_proj))
    torch.testing.assert_close(seen.attention.v[0], v)
    torch.testing.assert_close(seen.attention.k[0, :, 0], k[:, 0])  # position 0 is not turned
    assert not torch.allclose(seen.attention.k[0, :, 5], k[:, 5])


def test_experts_are_seen_one_by_one(tmp_path: Path) -> None:
    graph = graph_of("mixtral", tmp_path)
    seen = observe(graph, 0, graph.start(make_tokens(4, 20), 4), 80)
    rows = [value for key, value in seen.rows.items() if ".w2." in key]
    assert sum(value.shape[0] for value in rows) == 160  # two experts for each token


def test_what_attention_gets_can_be_changed_and_is_the_library_s_again_after(
    tmp_path: Path,
) -> None:
    graph = graph_of("llama", tmp_path)
    item = graph.start(make_tokens(1, 20), 1)[0]
    before = graph.run(0, item)
    with watch_attention(graph, lambda module, q, k, v: (k, torch.zeros_like(v))):
        changed = graph.run(0, item)
    with watch_attention(graph, lambda module, q, k, v: (k, v)):
        same = graph.run(0, item)
    assert not torch.allclose(changed, before)
    assert torch.equal(same, before) and torch.equal(graph.run(0, item), before)


def test_a_part_of_a_batch_gives_the_same_rows(tmp_path: Path) -> None:
    graph = graph_of("mistral", tmp_path)
    item = graph.start(make_tokens(3, 20), 3)[0]
    whole = graph.run(0, item)
    torch.testing.assert_close(graph.run(0, first_rows(item, 2)), whole[:2])
    assert first_rows(item, 3) is item
