"""The plan: what is quantized, what is kept and why, from names and shapes alone."""

from dataclasses import dataclass

import pytest
import torch

from fewbit.quant.errors import CheckpointError
from fewbit.quant.layout import UNIT_BYTES, plan_tensors, split_by_bytes, unit_of
from fewbit.quant.recipe import load_recipe


@dataclass(frozen=True)
class Info:
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    n_bytes: int = 0


def plan(tensors, config=None, recipe="w4a16-rtn", settings=()):
    infos = {key: Info(shape) for key, shape in tensors.items()}
    return plan_tensors(load_recipe(recipe, settings), config or {}, infos)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.11.mlp.experts.7.w1.weight",
        "gpt_neox.layers.0.attention.query_key_value.weight",
        "transformer.h.0.attn.c_attn.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "model.layers.0.linear_attn.in_proj_qkvz.weight",
    ],
)
def test_matrices_are_quantized(key):
    tensor = plan({key: (256, 128)})[key]
    assert tensor.rule is not None
    assert tensor.module == key.removesuffix(".weight")
    assert set(tensor.specs()) == {f"{tensor.module}.codes", f"{tensor.module}.scale_group"}


@pytest.mark.parametrize(
    ("key", "shape", "reason"),
    [
        ("model.embed_tokens.weight", (256, 128), "embedding"),
        ("transformer.wte.weight", (256, 128), "embedding"),
        ("shared.weight", (256, 128), "embedding"),
        ("gpt_neox.embed_in.weight", (256, 128), "embedding"),
        ("model.layers.0.input_layernorm.weight", (128,), "matrix product"),
        ("model.layers.0.linear_attn.conv1d.weight", (128, 1, 4), "matrix product"),
        ("lm_head.weight", (256, 128), "recipe leaves it out"),
        ("model.layers.0.mlp.gate.weight", (8, 128), "recipe leaves it out"),
        ("model.layers.0.mlp.router.weight", (8, 128), "recipe leaves it out"),
        ("mtp.layers.0.mlp.up_proj.weight", (256, 128), "outside the language model"),
        ("model.visual.blocks.0.attn.qkv.weight", (256, 128), "outside the language model"),
        ("model.layers.9.mlp.up_proj.weight", (256, 128), "outside the language model"),
        ("model.layers.0.x.weight", (256, 4), "fewer than 16 columns"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (32,), "matrix product"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 128), "matrix product"),
    ],
)
def test_what_is_kept_and_why(key, shape, reason):
    tensor = plan({key: shape}, {"num_hidden_layers": 9})[key]
    assert tensor.rule is None
    assert reason in tensor.reason
    assert list(tensor.specs()) == [key]


def test_fused_experts_keep_their_orientation():
    key = "model.layers.0.mlp.experts.down_proj"
    plain = plan({key: (4, 64, 96)}, {"model_type": "qwen3_5_moe"})[key]
    swapped = plan({key: (4, 64, 96)}, {"model_type": "gpt_oss"})[key]
    assert (plain.shape, plain.transposed) == ((4, 64, 96), False)
    assert (swapped.shape, swapped.transposed) == ((4, 96, 64), True)
    assert swapped.source_shape == (4, 64, 96)


def test_formats_that_would_not_shrink_are_not_used():
    key = "model.layers.0.mlp.up_proj.weight"
    tensor = plan({key: (64, 17)}, settings=["weights.bits=8"])[key]
    assert tensor.rule is None
    assert "bits per weight" in tensor.reason


def test_a_part_must_not_overwrite_a_source_tensor():
    with pytest.raises(CheckpointError, match=r"a\.codes exists in the source"):
        plan({"a.weight": (64, 128), "a.codes": (4,)})


def test_runs_of_tensors_cover_everything_once():
    sizes = [UNIT_BYTES // 3] * 7 + [2 * UNIT_BYTES, 5]
    infos = {f"t{i}": Info((1,), n_bytes=size) for i, size in enumerate(sizes)}
    runs = split_by_bytes(list(infos), infos)
    assert [key for run in runs for key in run] == list(infos)
    assert all(sum(infos[k].n_bytes for k in run[:-1]) < UNIT_BYTES for run in runs)


def test_unit_names_its_stored_tensors():
    planned = plan({"a.weight": (64, 128), "a.bias": (64,)})
    assert list(unit_of("u", list(planned), planned).tensors) == [
        "a.codes", "a.scale_group", "a.bias",
    ]  # fmt: skip
