"""Skeletons: real buffers, no parameters, named refusals."""

from pathlib import Path

import pytest
import torch

from fewbit.calibrate.skeleton import (
    build_skeleton,
    check_architecture,
    find_blocks,
    load_tokenizer,
)
from fewbit.quant.errors import CalibrationError
from tiny_models import ARCHITECTURES, make_config, make_model, save


def test_a_large_model_costs_no_memory() -> None:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 20}
    config = LlamaConfig(**sizes, num_attention_heads=64, num_key_value_heads=8)
    model = build_skeleton(config, torch.bfloat16)
    assert all(item.is_meta and item.dtype == torch.bfloat16 for item in model.parameters())
    assert sum(item.numel() for item in model.parameters()) > 10**10
    assert len(find_blocks(model)) == 20
    frequencies = model.model.rotary_emb.inv_freq
    assert not frequencies.is_meta and float(frequencies[0]) == 1.0


def test_buffers_are_those_of_the_real_model() -> None:
    for arch in ("gemma2", "gemma3_text", "phi3", "gpt_oss"):
        skeleton = dict(build_skeleton(make_config(arch), torch.float32).named_buffers())
        for name, expected in make_model(arch).named_buffers():
            assert torch.equal(skeleton[name], expected), (arch, name)


def test_how_the_source_was_stored_is_not_part_of_the_graph() -> None:
    config = make_config("llama").to_dict()
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config["attn_implementation"] = "flash_attention_2"
    model = build_skeleton(config, torch.float32)
    assert not hasattr(model.config, "quantization_config")
    assert "quantization_config" in config
    kept = make_config("llama")
    kept.quantization_config = {"quant_method": "fp8"}
    assert not hasattr(build_skeleton(kept, torch.float32).config, "quantization_config")
    assert kept.quantization_config == {"quant_method": "fp8"}


@pytest.mark.parametrize("model_type", ["no_such_model", None, "vit"])
def test_an_unknown_architecture_is_refused_by_name(model_type: str | None) -> None:
    with pytest.raises(CalibrationError, match=repr(model_type)):
        check_architecture({"model_type": model_type})


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("num_attention_heads", 0, "zero"),
        ("hidden_size", "abc", "hidden_size"),
        ("hidden_size", -1, "multiple"),
        ("num_hidden_layers", "4", "num_hidden_layers"),
        ("rope_parameters", [1], "rope_parameters"),
        ("layer_types", [1], "layer_types"),
        ("dtype", ["a"], ""),
        ("hidden_act", "zz", "zz"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_with_the_reason(
    key: str, value: object, reason: str
) -> None:
    with pytest.raises(CalibrationError, match=f"text model from model_type 'llama': .*{reason}"):
        check_architecture({**make_config("llama").to_dict(), key: value})


def test_covered_architectures_pass_the_check() -> None:
    for arch in ARCHITECTURES:
        check_architecture(make_config(arch).to_dict())


def test_a_missing_tokenizer_is_an_error_and_a_present_one_opens(tmp_path: Path) -> None:
    from fewbit import quant

    bundled = Path(quant.__file__).parent / "data" / "tiny-llama"
    assert load_tokenizer(bundled)("hello world")["input_ids"]
    save("llama", tmp_path)
    with pytest.raises(CalibrationError, match="no tokenizer opens"):
        load_tokenizer(tmp_path)
