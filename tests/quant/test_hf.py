"""The adapter: names, saving, what the library is told, and what it is not allowed to do."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from fewbit import quant
from fewbit.export.metadata import MANIFEST, ModuleSpec, build_quantization_config
from fewbit.quant import hf, publish
from fewbit.quant.errors import CheckpointError
from fewbit.quant.format import find_format
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.hf import FewbitConfig, FewbitQuantizer
from fewbit.quant.linear import FusedExperts
from fewbit.quant.verify import header_checksums, verify_checkpoint
from tiny_models import make_tokens, save


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral_for_hf")
    quant.quantize(save("mixtral", folder / "source"), folder / "out", recipe="w8a16")
    return folder / "out"


def logits(model):
    with torch.no_grad():
        return model(make_tokens()).logits


def test_the_configuration_comes_back_as_it_was(mixtral):
    written = json.loads((mixtral / "config.json").read_text())["quantization_config"]
    assert FewbitConfig.from_dict(dict(written)).to_dict() == written
    newer = {**written, "sparsity": 2}
    assert FewbitConfig.from_dict(newer).to_dict() == newer  # refused when opened, not forgotten


def test_registering_twice_changes_nothing():
    hf.register()
    hf.register()
    assert AUTO_QUANTIZER_MAPPING["fewbit"] is FewbitQuantizer


def test_what_the_quantizer_says_of_itself(mixtral):
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    quantizer = model.hf_quantizer
    assert quantizer.is_serializable() is True and quantizer.is_trainable is False
    assert model.is_quantized and model.config.quantization_config.quant_method == "fewbit"
    assert quantizer._stored is None and quantizer._plan is None  # nothing keeps the files open


def test_experts_run_one_by_one(mixtral):
    model = AutoModelForCausalLM.from_pretrained(mixtral, experts_implementation="grouped_mm")
    assert model.config._experts_implementation == "eager"


def test_a_dense_model_is_not_quantized_on_the_way_in(tmp_path):
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(
            save("llama", tmp_path / "dense"), quantization_config=FewbitConfig()
        )


def test_a_state_dict_is_refused(mixtral):
    config = AutoConfig.from_pretrained(mixtral)
    cls = transformers.MixtralForCausalLM
    with pytest.raises(CheckpointError, match="state dict"):
        cls.from_pretrained(
            None, config=config, state_dict=load_file(mixtral / "model.safetensors")
        )


def test_saved_config_and_files_are_whole(mixtral, tmp_path):
    model = quant.load(mixtral)
    model.save_pretrained(tmp_path / "again")
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (mixtral, tmp_path / "again")
    )
    assert before == after
    assert verify_checkpoint(tmp_path / "again").modules == verify_checkpoint(mixtral).modules


def test_saving_the_graphs_own_layout(mixtral, tmp_path):
    model = quant.load(mixtral)
    model.save_pretrained(tmp_path / "graph", save_original_format=False)
    assert any(
        ".mlp.experts.0.w1." in k for k in load_file(tmp_path / "graph" / "model.safetensors")
    )
    again = quant.load(tmp_path / "graph")
    assert torch.equal(logits(again), logits(model))


def test_saving_over_the_files_that_are_mapped(mixtral, tmp_path):
    import shutil

    folder = Path(shutil.copytree(mixtral, tmp_path / "copy"))
    model = quant.load(folder)
    model.save_pretrained(folder)
    expected = logits(model)
    assert (folder / MANIFEST).exists()  # of the old files: the new ones carry their own checksums
    assert torch.equal(logits(quant.load(folder)), expected)


def test_exceptions_in_the_manifest_come_back_into_the_config(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "MAX_INLINE_EXCEPTIONS", 0)
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[weights]\nformat = "int_group"\nbits = 8\ngroup = 64\n'
        "[[override]]\nmatch = 're:.*up_proj$'\nweights = { bits = 6 }\n"
    )
    quant.quantize(save("qwen2", tmp_path / "source"), tmp_path / "out", recipe=str(recipe))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    exceptions = json.loads((tmp_path / "out" / MANIFEST).read_text())["exceptions"]
    assert not config["tensors"] and len(exceptions) >= 2  # bits of up_proj, columns of down_proj
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.model.layers[0].mlp.up_proj.terms[0][1].bits == 6
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert config["tensors"] == exceptions
    assert torch.equal(logits(quant.load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("cls", [transformers.AutoModel, AutoModelForCausalLM])
def test_parts_are_saved_under_their_source_names(cls, tmp_path):
    """Exceptions are found by them, and the library drops prefixes when a base model is saved."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[weights]\nformat = "int_group"\nbits = 8\ngroup = 64\n'
        "[[override]]\nmatch = 're:.*layers.1.*up_proj$'\nweights = { bits = 6 }\n"
    )
    quant.quantize(save("qwen2", tmp_path / "source"), tmp_path / "out", recipe=str(recipe))
    model = cls.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    parts = {key for key in stored if key.endswith(("codes", "scale_group"))}
    assert parts <= saved.keys() and len(parts) == 28
    assert all(torch.equal(saved[key], stored[key]) for key in parts)
    again = cls.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(make_tokens())[0], model(make_tokens())[0])


def pack(weight, options):
    store = find_format("int_group")
    scales = store.fit(weight, options)
    codes, values = store.round(weight, scales, 0, options)
    return store.pack(codes, scales, options), values


def test_names_that_only_the_table_knows(tmp_path):
    """The library renames `input_linear.weight` to a fused expert stack, but no part of it."""
    config = AutoConfig.for_model(
        "granitemoe", vocab_size=131, hidden_size=64, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(config).eval()
    dense.save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    options = IntGroupOptions(bits=8, group=16)
    spec = ModuleSpec((("int_group", options),))
    names = [key for key in tensors if re.search(r"(input|output)_linear\.weight$", key)]
    for key in names:
        parts, values = pack(tensors.pop(key), options)
        tensors.update({key.replace("weight", part): tensor for part, tensor in parts.items()})
        target = "gate_up_proj" if "input" in key else "down_proj"
        experts = dense.model.layers[0].block_sparse_moe.experts
        getattr(experts, target).data.copy_(values)
    assert len(names) == 2
    modules = {key.removesuffix(".weight"): spec for key in names}
    out = tmp_path / "out"
    out.mkdir()
    quantization = build_quantization_config("by hand", modules)
    document = json.loads((tmp_path / "source" / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**document, "quantization_config": quantization}))
    sums = header_checksums(tensors, quantization)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt", **sums})

    model = quant.load(out)
    assert isinstance(model.model.layers[0].block_sparse_moe.experts.gate_up_proj, FusedExperts)
    assert torch.allclose(logits(model), logits(dense), rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert torch.equal(logits(quant.load(tmp_path / "again")), logits(model))


def test_scales_survive_modules_that_are_kept_in_fp32(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"down_proj", "norm"})
    quant.quantize(save("llama", tmp_path / "source"), tmp_path / "out", recipe="w8a16")
    model = quant.load(tmp_path / "out", dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.down_proj.scale_group.dtype == torch.float16
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
