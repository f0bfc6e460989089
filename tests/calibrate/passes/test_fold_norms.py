"""Folding norm gains: function kept, gains gone, refusals by name."""

from pathlib import Path

import pytest
import torch

from fewbit.calibrate.passes.fold_norms import PASS, FoldNormsOptions
from transforming import PRESERVED, difference, open_source, refusal, transformed

USES = [("fold_norms", {})]


@pytest.mark.parametrize("arch", [*PRESERVED, "phi3", "gemma2", "gemma3_text", "qwen3_moe"])
def test_logits_are_kept_in_float32(arch: str, tmp_path: Path) -> None:
    assert difference(arch, tmp_path, USES, torch.float32) <= 1e-5


@pytest.mark.parametrize("arch", PRESERVED)
def test_logits_are_kept_in_float64(arch: str, tmp_path: Path) -> None:
    assert difference(arch, tmp_path, USES, torch.float64) <= 1e-10


@pytest.mark.parametrize(("arch", "neutral"), [("llama", 1.0), ("gemma2", 0.0)])
def test_gains_become_neutral(arch: str, neutral: float, tmp_path: Path) -> None:
    made = transformed(open_source(arch, tmp_path), USES)
    assert made.edges is not None
    for block in made.edges.blocks:
        assert len(block.norms) == 2
        for norm in block.norms:
            assert bool((made.source.read(norm.gain) == neutral).all())


def test_a_gain_of_zero_is_folded(tmp_path: Path) -> None:
    source = open_source("llama", tmp_path)
    gain = source.tensors["model.layers.0.input_layernorm.weight"]
    gain[3] = 0.0
    made = transformed(source, USES)
    q = made.source.read("model.layers.0.self_attn.q_proj.weight")
    assert bool((q[:, 3] == 0).all())
    assert float(made.source.read("model.layers.0.input_layernorm.weight")[3]) == 1.0


def test_a_norm_with_a_bias_is_refused(tmp_path: Path) -> None:
    assert "bias" in refusal(PASS, FoldNormsOptions(), "gpt_neox", tmp_path)
