"""Where stored modules go in a graph, and that nothing is ever left to chance."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit import quant
from fewbit.quant.errors import CheckpointError
from fewbit.quant.linear import ExpertView, FusedExperts, QuantLinear
from fewbit.quant.placement import packed_modules, place
from fewbit.quant.stored import open_stored
from tiny_models import make_config, make_tokens, save


def quantized(arch, folder, overrides=""):
    recipe = folder / "recipe.toml"
    base = '[weights]\nformat = "int_group"\nbits = 8\ngroup = "row"\n'
    recipe.write_text(base + overrides)
    quant.quantize(save(arch, folder / "source"), folder / "out", recipe=str(recipe))
    return folder / "out"


def skeleton(arch, **changes):
    from transformers import AutoModelForCausalLM

    config = make_config(arch)
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, experts_implementation="eager")


def logits(model):
    with torch.no_grad():
        return model(make_tokens()).logits


def reference_logits(folder):
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(folder / "source"))


def distance(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def quiet_load(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = quant.load(folder)
    return model, [str(w.message) for w in caught if w.category is RuntimeWarning]


def test_linear_layers(tmp_path):
    model = skeleton("qwen2")
    plan = place(model, open_stored(quantized("qwen2", tmp_path)))
    layer = model.model.layers[1].self_attn.q_proj
    assert isinstance(layer, QuantLinear) and layer.bias is not None
    assert {b.device.type for b in layer.buffers()} == {"meta"}
    assert plan.part_names["model.layers.1.self_attn.q_proj.codes"] == (
        "model.layers.1.self_attn.q_proj.codes"
    )
    assert not plan.decoded and not plan.has_experts and len(plan.modules) == 14


def test_fused_experts_stand_at_the_parameter(tmp_path):
    model = skeleton("gpt_oss")
    plan = place(model, open_stored(quantized("gpt_oss", tmp_path)))
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, FusedExperts) and plan.has_experts
    assert tuple(experts.gate_up_proj.shape) == (4, 64, 96)  # the graph wants [E, K, N]
    assert experts.gate_up_proj.logical_shape == (4, 96, 64)


def test_single_experts_keep_their_names_after_renaming(tmp_path):
    model = skeleton("mixtral")
    plan = place(model, open_stored(quantized("mixtral", tmp_path)))
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, ExpertView)
    assert experts.gate_up_proj.children == ("w1", "w3")
    source = "model.layers.0.block_sparse_moe.experts.3.w1.codes"
    assert plan.part_names[source] == "model.layers.0.mlp.experts.3.w1.codes"


MIXED = "[[override]]\nmatch = 're:.*layers\\.1.*experts\\.2\\.w3$'\nweights = false\n"


def test_a_partly_quantized_stack_is_decoded_and_said(tmp_path):
    out = quantized("mixtral", tmp_path, MIXED)
    model, said = quiet_load(out)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert len(said) == 1 and said[0].startswith(name)
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert isinstance(first.gate_up_proj, ExpertView)
    assert isinstance(second.gate_up_proj, torch.nn.Parameter)
    assert isinstance(second.down_proj, ExpertView)
    assert distance(logits(model), reference_logits(tmp_path)) < 0.03
    dense = load_file(tmp_path / "source" / "model.safetensors")
    kept = dense["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    assert torch.equal(second.gate_up_proj[2, 96:], kept)  # that one never was quantized
    assert not torch.equal(
        second.gate_up_proj[2, :96], dense["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    )
    model.save_pretrained(tmp_path / "again")
    again, said = quiet_load(tmp_path / "again")
    assert not said and torch.equal(logits(again), logits(model))


def test_transposed_convolutions_are_decoded(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=131, n_embd=64, n_layer=1, n_head=4, n_positions=64,
                        bos_token_id=1, eos_token_id=2)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "source")
    quant.quantize(tmp_path / "source", tmp_path / "out", recipe="w8a16")
    model, said = quiet_load(tmp_path / "out")
    assert len(said) == 4 and "c_attn" in said[0]
    assert not packed_modules(model)
    assert distance(logits(model), reference_logits(tmp_path)) < 0.03


def test_a_head_that_the_file_holds_apart_is_not_tied(tmp_path):
    """Quantized beside an embedding that the configuration ties it to: two tensors, two values."""
    folder = save("llama", tmp_path / "source")
    recipe = tmp_path / "all.toml"
    recipe.write_text('[weights]\nformat = "int_group"\nbits = 8\ngroup = "row"\nignore = []\n')
    quant.quantize(folder, tmp_path / "out", recipe=str(recipe))
    model = skeleton("llama", tie_word_embeddings=True)
    model.tie_weights()
    assert model.all_tied_weights_keys
    place(model, open_stored(tmp_path / "out"))
    assert isinstance(model.lm_head, QuantLinear) and not model.all_tied_weights_keys
    model = quant.load(tmp_path / "out")
    assert isinstance(model.lm_head, QuantLinear)
    assert distance(logits(model), reference_logits(tmp_path)) < 0.04


def test_a_quantized_head_that_is_the_embedding_too(tmp_path):
    """Only the head is stored, and the embedding is tied to it: it is decoded for both."""
    source = save("llama_tied", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    recipe = tmp_path / "all.toml"
    recipe.write_text('[weights]\nformat = "int_group"\nbits = 8\ngroup = "row"\nignore = []\n')
    quant.quantize(source, tmp_path / "out", recipe=str(recipe))
    model, said = quiet_load(tmp_path / "out")
    assert any("lm_head" in text for text in said)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert distance(logits(model), reference_logits(tmp_path)) < 0.06


def test_a_parameter_without_a_value_is_refused(tmp_path):
    """The library would only warn, and fill it with random numbers."""
    out = quantized("llama", tmp_path)
    without = Path(shutil.copytree(out, tmp_path / "without"))
    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, without / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"becomes model\.layers\.1\.input_layernorm\.weight"):
        quant.load(without, verify=False)


def test_a_config_of_another_model_is_refused(tmp_path):
    stored = open_stored(quantized("llama", tmp_path))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\..*another model"):
        place(skeleton("llama", num_hidden_layers=3), stored)
    with pytest.raises(CheckpointError, match=r"\(64, 96\).*\(64, 80\)"):
        place(skeleton("llama", intermediate_size=80), stored)


def test_a_class_with_a_head_of_its_own_is_refused(tmp_path):
    from transformers import AutoModelForSequenceClassification

    with pytest.raises(CheckpointError, match=r"score\.weight"):
        AutoModelForSequenceClassification.from_pretrained(quantized("llama", tmp_path))


def test_the_model_without_its_head(tmp_path):
    """Prefixes are dropped, as for dense tensors."""
    from transformers import AutoModel

    out = quantized("llama", tmp_path)
    base = AutoModel.from_pretrained(out)
    assert isinstance(base.layers[0].mlp.up_proj, QuantLinear)
    with torch.no_grad():
        expected = quant.load(out).model(make_tokens()).last_hidden_state
        assert torch.equal(base(make_tokens()).last_hidden_state, expected)
