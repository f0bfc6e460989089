"""Source tensors against graph parameters: what the library itself loads is the reference."""

from pathlib import Path

import pytest
import torch

from fewbit.quant.errors import CheckpointError
from fewbit.quant.names import NameMap, Slot, slot_view
from tiny_models import ARCHITECTURES, MemorySource, make_config, make_model, save


def _shapes(source: MemorySource) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in source.tensors.items()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_parameter_is_assembled_as_the_library_loads_it(arch: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = MemorySource(save(arch, tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    names = NameMap(make_model(arch), _shapes(source))
    used: set[str] = set()
    for parameter, expected in loaded.state_dict().items():
        sources = names.sources(parameter)
        if not sources:
            assert parameter == "lm_head.weight" and loaded.config.tie_word_embeddings
            continue
        used.update(sources)
        assert torch.equal(names.assemble(parameter, source.read), expected), parameter
        for key in sources:
            slot = names.slot(key)
            assert slot is not None and slot.parameter == parameter and slot.quantizable
            assert torch.equal(slot_view(expected, slot), source.tensors[key]), key
    assert used == set(source.tensors)


def test_slots_of_experts_and_their_renaming(tmp_path: Path) -> None:
    names = NameMap(make_model("mixtral"), _shapes(MemorySource(save("mixtral", tmp_path))))
    key = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    assert names.slot(key) == Slot(stack, expert=3, rows=(96, 192))
    assert names.slot(key.replace("w3", "w1")) == Slot(stack, expert=3, rows=(0, 96))
    assert names.module_key(key) == "model.layers.1.mlp.experts.3.w3.weight"
    down = names.slot("model.layers.0.block_sparse_moe.experts.2.w2.weight")
    assert down == Slot("model.layers.0.mlp.experts.down_proj", expert=2)
    plain = "model.layers.0.self_attn.q_proj.weight"
    assert names.slot(plain) == Slot(plain) and names.module_key(plain) == plain


def test_ten_experts_and_more_keep_their_numbers() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model("mixtral", num_local_experts=12, **sizes, **heads)
    model = AutoModelForCausalLM.from_config(config)
    prefix = "model.layers.0.block_sparse_moe.experts"
    names = NameMap(model, {f"{prefix}.{e}.w2.weight": (8, 8) for e in range(12)})
    for expert in range(12):
        slot = names.slot(f"{prefix}.{expert}.w2.weight")
        assert slot is not None and slot.expert == expert


def test_prefix_of_the_base_model_is_added() -> None:
    model = make_model("mixtral")
    stack = "model.layers.1.mlp.experts"
    shapes = {
        f"layers.1.block_sparse_moe.experts.{e}.{w}.weight": (96, 64)
        for e in range(4)
        for w in ("w1", "w3")
    }
    names = NameMap(model, {**shapes, "norm.weight": (64,)})
    assert names.slot("norm.weight") == Slot("model.norm.weight")
    assert names.module_key("norm.weight") == "model.norm.weight"
    key = "layers.1.block_sparse_moe.experts.0.w1.weight"
    assert names.slot(key) == Slot(f"{stack}.gate_up_proj", 0, (0, 96))
    assert names.module_key(key) == f"{stack}.0.w1.weight"


def test_what_the_graph_does_not_take_has_no_slot() -> None:
    model = make_model("deepseek_v3")
    extra = {
        "model.layers.3.eh_proj.weight": (64, 128),
        "model.layers.3.mlp.experts.0.gate_proj.weight": (40, 64),
        "vision_tower.patch.weight": (8, 8),
    }
    names = NameMap(model, {**extra, "model.norm.weight": (64,)})
    assert [names.slot(key) for key in extra] == [None] * 3
    assert names.slot("model.norm.weight") == Slot("model.norm.weight")


def test_tied_head_has_no_source_and_cannot_be_assembled() -> None:
    names = NameMap(make_model("llama_tied"), {"model.embed_tokens.weight": (131, 64)})
    assert names.sources("lm_head.weight") == ()
    with pytest.raises(CheckpointError, match=r"becomes lm_head\.weight"):
        names.assemble("lm_head.weight", lambda key: torch.empty(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": (65,)}, r"model\.norm\.weight .*\(65,\).*\(64,\)"),
        (
            {"model.layers.0.mlp.experts.1.up_proj.weight": (39, 64)},
            r"up_proj\.weight \(40, 64\).*\(39, 64\)",
        ),
        ({"model.layers.1.mlp.experts.2.up_proj.weight": None}, "each of its tensors"),
        ({"model.layers.1.mlp.experts.3.down_proj.weight": None}, r"\(3, 64, 40\)"),
        ({"model.layers.1.mlp.experts.0.down_proj.weight": (64, 41)}, "must agree"),
    ],
)
def test_wrong_or_missing_shapes_are_refused(
    changes: dict[str, tuple[int, ...] | None], message: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config = make_config("qwen3_moe")
    config.mlp_only_layers = []
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    shapes = _shapes(MemorySource(tmp_path))
    for name, shape in changes.items():
        del shapes[name]
        if shape is not None:
            shapes[name] = shape
    with pytest.raises(CheckpointError, match=message):
        NameMap(model, shapes)


def _with_mapping(monkeypatch: pytest.MonkeyPatch, *converters: object) -> None:
    from transformers import conversion_mapping

    monkeypatch.setattr(
        conversion_mapping, "get_model_conversion_mapping", lambda model: list(converters)
    )


def test_other_conversions_are_carried_out_but_not_quantizable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.core_model_loading import Chunk, Transpose, WeightConverter

    gate_up = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    _with_mapping(
        monkeypatch,
        WeightConverter("mlp.gate_up.weight", gate_up, [Chunk(dim=0)]),
        WeightConverter("mlp.down.weight", "mlp.down_proj.weight", [Transpose(0, 1)]),
    )
    layer = "model.layers.0."
    tensors = {
        f"{layer}mlp.gate_up.weight": torch.randn(192, 64),
        f"{layer}mlp.down.weight": torch.randn(96, 64),
    }
    names = NameMap(make_model("llama"), {key: tuple(t.shape) for key, t in tensors.items()})
    fused, down = tensors.values()
    for parameter, expected in (
        ("mlp.gate_proj", fused[:96]),
        ("mlp.up_proj", fused[96:]),
        ("mlp.down_proj", down.T),
    ):
        made = names.assemble(f"{layer}{parameter}.weight", tensors.__getitem__)
        assert torch.equal(made, expected), parameter
    slots = [names.slot(key) for key in tensors]
    assert all(slot is not None and not slot.quantizable for slot in slots)
    assert names.sources(f"{layer}mlp.up_proj.weight") == (f"{layer}mlp.gate_up.weight",)


def test_plain_concatenation_places_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import Concatenate, WeightConverter

    parts = ["attn.q.weight", "attn.k.weight", "attn.v.weight"]
    _with_mapping(
        monkeypatch,
        WeightConverter(parts, "self_attn.qkv_proj.weight", [Concatenate(dim=0)]),
    )
    layer = "model.layers.1."
    tensors = {
        f"{layer}{part}": torch.randn(rows, 64)
        for part, rows in zip(parts, (64, 32, 32), strict=True)
    }
    names = NameMap(make_model("phi3"), {key: tuple(t.shape) for key, t in tensors.items()})
    target = f"{layer}self_attn.qkv_proj.weight"
    assert names.slot(f"{layer}attn.k.weight") == Slot(target, None, (64, 96))
    assert torch.equal(
        names.assemble(target, tensors.__getitem__), torch.cat(list(tensors.values()))
    )


def test_slot_view_is_logical_whatever_the_graph_holds() -> None:
    whole = torch.arange(2 * 3 * 4).view(2, 3, 4)  # [E, K, N]
    view = slot_view(whole, Slot("w", expert=1, rows=(1, 3)), transposed=True)
    assert torch.equal(view, whole[1, :, 1:3].T)
    view.zero_()
    assert int((whole[1] == 0).sum()) == 6
