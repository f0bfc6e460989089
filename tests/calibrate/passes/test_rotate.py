"""Rotations: function kept, outliers gone, heads untied, refusals by name."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.calibrate.passes.rotate import PASS, RotateOptions
from fewbit.quant.errors import CalibrationError, RecipeError
from transforming import PRESERVED, difference, open_source, refusal, transformed

FOLD: tuple[str, dict[str, Any]] = ("fold_norms", {})
# The tiny models' head size of 24 is an order that has a Hadamard matrix; so has their width of 64.
EDGES = (["residual"], ["value_heads"], ["residual", "value_heads"])


def uses(edges: list[str], **options: Any) -> list[tuple[str, dict[str, Any]]]:
    return [FOLD, ("rotate", {"edges": edges, **options})]


@pytest.mark.parametrize("edges", EDGES, ids=str)
@pytest.mark.parametrize("arch", PRESERVED)
def test_logits_are_kept_in_float32(arch: str, edges: list[str], tmp_path: Path) -> None:
    assert difference(arch, tmp_path, uses(edges), torch.float32) <= 1e-5


@pytest.mark.parametrize("arch", PRESERVED)
def test_logits_are_kept_in_float64(arch: str, tmp_path: Path) -> None:
    edges = ["residual", "value_heads"]
    assert difference(arch, tmp_path, uses(edges), torch.float64) <= 1e-10


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral", "llama_tied"])
def test_the_online_rotation_of_down_proj_keeps_logits(arch: str, tmp_path: Path) -> None:
    alone = [("rotate", {"edges": ["down_proj"]})]
    assert difference(arch, tmp_path, alone, torch.float32) <= 1e-5
    assert difference(arch, tmp_path, alone, torch.float64) <= 1e-10


def test_an_outlier_channel_of_the_residual_is_spread(tmp_path: Path) -> None:
    source = open_source("llama", tmp_path)
    source.tensors["model.embed_tokens.weight"][:, 5] *= 100
    made = transformed(source, uses(["residual"]))
    table = made.source.read("model.embed_tokens.weight")
    before = source.tensors["model.embed_tokens.weight"]
    assert float(before.abs().amax(-1).mean()) > 4 * float(table.abs().amax(-1).mean())
    torch.testing.assert_close(table.norm(dim=-1), before.norm(dim=-1))


def test_a_tied_head_becomes_a_tensor_of_its_own(tmp_path: Path) -> None:
    source = open_source("llama_tied", tmp_path)
    assert "lm_head.weight" not in source.tensors
    made = transformed(source, uses(["residual"]))
    assert made.config["tie_word_embeddings"] is False
    assert made.source.tensors["lm_head.weight"].shape == (131, 64)
    head, table = (made.source.read(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
    assert not torch.equal(head, table)


def test_a_tied_head_may_be_left_tied(tmp_path: Path) -> None:
    source = open_source("llama_tied", tmp_path / "tied")
    made = transformed(source, uses(["residual"], untie=False))
    assert made.basis is None and not made.source.copies
    assert not made.source.is_edited("model.embed_tokens.weight")
    free = open_source("llama", tmp_path / "free")
    assert transformed(free, uses(["residual"], untie=False)).basis is not None


def test_seeds_give_different_signs_and_none_gives_none(tmp_path: Path) -> None:
    source = open_source("llama", tmp_path)
    plain = transformed(source, uses(["value_heads"], signs=False))
    signed = transformed(source, uses(["value_heads"]))
    key = "model.layers.0.self_attn.v_proj.weight"
    assert not torch.equal(plain.source.read(key), signed.source.read(key))


@pytest.mark.parametrize(
    ("arch", "edges", "what"),
    [
        ("gemma2", ["residual"], "post-norm"),
        ("gpt_neox", ["residual"], "no RMSNorm"),
        ("phi3", ["value_heads"], "separate q, k, v"),
        ("deepseek_v3", ["value_heads"], "separate q, k, v"),
        ("mixtral", ["down_proj"], "experts"),
    ],
)
def test_what_cannot_be_rotated_is_refused(
    arch: str, edges: list[str], what: str, tmp_path: Path
) -> None:
    assert what in refusal(PASS, RotateOptions(edges), arch, tmp_path)


def test_unfolded_gains_are_refused(tmp_path: Path) -> None:
    source = open_source("llama", tmp_path)
    with pytest.raises(CalibrationError, match="fold_norms before it"):
        transformed(source, [("rotate", {"edges": ["residual"]})])


@pytest.mark.parametrize("edges", [[], ["heads"], "residual", None])
def test_edges_are_checked(edges: Any) -> None:
    with pytest.raises(RecipeError, match="residual, value_heads, down_proj"):
        RotateOptions(edges)
