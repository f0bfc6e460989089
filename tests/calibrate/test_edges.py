"""Edges of every covered architecture."""

from pathlib import Path

import pytest
import torch

from fewbit.calibrate.edges import ModelEdges, find_edges, kind_of_blocks
from fewbit.calibrate.edits import Side
from fewbit.calibrate.model import ModelGraph
from tiny_models import ARCHITECTURES, make_tokens
from transforming import CPU, open_source


def edges_of(arch: str, folder: Path) -> ModelEdges:
    source = open_source(arch, folder)
    return find_edges(ModelGraph(source.config, source, torch.float32, CPU), make_tokens(1, 24))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_has_edges_without_an_error(arch: str, tmp_path: Path) -> None:
    edges = edges_of(arch, tmp_path)
    assert len(edges.blocks) >= 2
    assert all(block.norms for block in edges.blocks)
    assert edges.final_norm is not None and "norm" in edges.final_norm


def test_llama_in_full(tmp_path: Path) -> None:
    edges = edges_of("llama", tmp_path)
    block = edges.blocks[1]
    prefix = "model.layers.1."
    assert [norm.gain for norm in block.norms] == [
        f"{prefix}input_layernorm.weight", f"{prefix}post_attention_layernorm.weight",
    ]  # fmt: skip
    assert [side.key for side in block.norms[0].readers] == [
        f"{prefix}self_attn.{n}_proj.weight" for n in "qkv"
    ]
    attention = block.attention
    assert attention is not None
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.rotary) == (
        4, 2, 24, 24,
    )  # fmt: skip
    assert attention.o == Side(f"{prefix}self_attn.o_proj.weight", -1)
    assert attention.q == (Side(f"{prefix}self_attn.q_proj.weight", -2),)
    (mlp,) = block.mlps
    assert mlp.down == Side(f"{prefix}mlp.down_proj.weight", -1)
    assert {side.key for side in block.writers} == {
        f"{prefix}self_attn.o_proj.weight", f"{prefix}mlp.down_proj.weight",
    }  # fmt: skip
    assert not block.other_norms and not block.unread
    assert (edges.head, edges.tied, edges.final_kind) == ("lm_head.weight", False, "rms")


def test_biases_belong_to_their_projections(tmp_path: Path) -> None:
    attention = edges_of("qwen2", tmp_path).blocks[0].attention
    assert attention is not None
    assert [side.key.rpartition(".")[2] for side in attention.k] == ["weight", "bias"]
    assert attention.k[1].axis == -1


def test_norms_between_projection_and_rope_are_found(tmp_path: Path) -> None:
    attention = edges_of("qwen3", tmp_path).blocks[0].attention
    assert attention is not None
    assert attention.k_gain == "model.layers.0.self_attn.k_norm.weight"


def test_experts_are_edges_of_their_own(tmp_path: Path) -> None:
    block = edges_of("mixtral", tmp_path).blocks[0]
    assert len(block.mlps) == 4
    readers = {side.key for side in block.norms[1].readers}
    assert any(key.endswith("gate.weight") for key in readers)  # the router reads it, too
    assert sum(".w1." in key or ".w3." in key for key in readers) == 8
    assert sum(".w2." in side.key for side in block.writers) == 4


def test_tied_heads_and_post_norms_are_seen(tmp_path: Path) -> None:
    tied = edges_of("llama_tied", tmp_path / "a")
    assert tied.tied and tied.head == "lm_head.weight"
    assert tied.embedding.key == "model.embed_tokens.weight"
    post = edges_of("gemma2", tmp_path / "b").blocks[0].other_norms
    assert [name.split(".")[3] for name in post] == [
        "post_attention_layernorm", "post_feedforward_layernorm",
    ]  # fmt: skip


@pytest.mark.parametrize("arch", ["phi3", "gpt_neox", "deepseek_v3"])
def test_what_is_fused_or_latent_is_not_an_attention_edge(arch: str, tmp_path: Path) -> None:
    assert all(block.attention is None for block in edges_of(arch, tmp_path).blocks)


def test_blocks_of_different_kinds_are_told_apart(tmp_path: Path) -> None:
    source = open_source("deepseek_v3", tmp_path)
    graph = ModelGraph(source.config, source, torch.float32, CPU)
    assert kind_of_blocks(graph) == {0: 0, 1: 1, 2: 1}
