"""Units, patterns and files of architectures; ties; what is refused before anything is read."""

import re
from types import SimpleNamespace

import pytest
import torch

from fewbit.export.decode import TensorInfo
from fewbit.export.dfloat11_plan import make_plan
from fewbit.quant.errors import CheckpointError

LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def source(tensors, config=None, extra_files=()):
    """Anything with tensors, config, extra_files and read is a source."""
    infos = {
        name: TensorInfo(name, tuple(t.shape), t.dtype, t.nbytes, "plain")
        for name, t in tensors.items()
    }

    def read(name, start=0, stop=None):
        return tensors[name][start:stop] if tensors[name].ndim else tensors[name]

    return SimpleNamespace(tensors=infos, config=config or {}, extra_files=extra_files, read=read)


def random(*shape, dtype=torch.bfloat16):
    return (torch.randn(*shape) * 0.02).to(dtype)


def small(attributes=LLAMA, n_layers=2, prefix="model.layers", ends=True):
    """Tensors in the order of a file: names sorted, norms and a bias among them."""
    torch.manual_seed(0)
    tensors = {}
    for layer in range(n_layers):
        for attribute in attributes:
            tensors[f"{prefix}.{layer}.{attribute}.weight"] = random(24, 16)
        tensors[f"{prefix}.{layer}.input_layernorm.weight"] = torch.ones(16).bfloat16()
        tensors[f"{prefix}.{layer}.self_attn.q_proj.bias"] = random(24)
    tensors["model.norm.weight"] = torch.ones(16).bfloat16()
    if ends:
        tensors["model.embed_tokens.weight"] = random(50, 16)
        tensors["lm_head.weight"] = random(50, 16)
    return dict(sorted(tensors.items()))


PHI = ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")


@pytest.mark.parametrize(
    ("attributes", "prefix", "pattern", "expected"),
    [
        (LLAMA, "model.layers", r"model\.layers\.\d+", LLAMA),
        (LLAMA, "language_model.model.layers", r"language_model\.model\.layers\.\d+", LLAMA),
        (PHI, "model.layers", r"model\.layers\.\d+", PHI),
        (("attn.wo", "attn.wqkv", "mlp.w2"), "layers", r"layers\.\d+", None),
        (
            ("mlp.experts.0.up_proj", "mlp.gate", "mlp.experts.1.up_proj", "self_attn.q_norm"),
            "model.layers",
            r"model\.layers\.\d+",
            ("mlp.experts.0.up_proj", "mlp.experts.1.up_proj"),
        ),
    ],
)
def test_patterns_of_architectures(attributes, prefix, pattern, expected):
    """Published order where it is known, else that of the file; routers and norms are no linears."""
    tensors = small(attributes, n_layers=11, prefix=prefix, ends=False)
    plan = make_plan(source(tensors))
    assert plan.pattern_dict == {pattern: list(expected or attributes)}
    assert list(plan.units) == [f"{prefix}.{layer}" for layer in range(11)]
    for module in plan.units:
        assert re.fullmatch(pattern, module)


def test_layers_that_differ_get_patterns_of_their_own():
    tensors = small(("self_attn.q_proj", "mlp.up_proj"), n_layers=3, ends=False)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    plan = make_plan(source(tensors))
    assert plan.pattern_dict == {
        r"model\.layers\.(?:0|2)": ["self_attn.q_proj", "mlp.up_proj"],
        r"model\.layers\.(?:1)": ["self_attn.q_proj"],
    }


def test_tied_embeddings_without_a_head():
    tensors = small()
    del tensors["lm_head.weight"]
    plan = make_plan(source(tensors))
    assert plan.files["model"] == ["model.embed_tokens.weight", "model.norm.weight"]


def test_a_tie_that_is_none_is_refused():
    config = {"text_config": {"tie_word_embeddings": True}}
    with pytest.raises(
        CheckpointError, match=r"ties lm_head.weight to model.embed_tokens.weight, but"
    ):
        make_plan(source(small(), config))


def test_minus_zero_is_not_zero_in_a_tie():
    tensors = small()
    tensors["model.embed_tokens.weight"] = torch.zeros(50, 16).bfloat16()
    tensors["lm_head.weight"] = -torch.zeros(50, 16).bfloat16()
    with pytest.raises(CheckpointError, match="but they differ"):
        make_plan(source(tensors, {"tie_word_embeddings": True}))


def test_no_layers():
    with pytest.raises(CheckpointError, match="no decoder layers were found"):
        make_plan(source({"h.0.attn.c_attn.weight": random(4, 4)}))
