"""Block-by-block execution against the whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.calibrate.model import ModelGraph
from fewbit.quant.errors import CalibrationError, CheckpointError
from tiny_models import ARCHITECTURES, MemorySource, make_tokens, save

CPU = torch.device("cpu")


def _open(arch: str, folder: Path, dtype: torch.dtype = torch.float32) -> ModelGraph:
    source = MemorySource(save(arch, folder, dtype=dtype))
    return ModelGraph(source.config, source, dtype, CPU)


def _logits(graph: ModelGraph, tokens: torch.Tensor, batch: int) -> torch.Tensor:
    inputs = graph.start(tokens, batch)
    for index in range(len(graph.block_names)):
        graph.materialize(index)
        for item in inputs:
            item.hidden = graph.run(index, item)
        graph.release(index)
    return torch.cat([graph.finish(item.hidden) for item in inputs])


def _reference(folder: Path, tokens: torch.Tensor, **how: Any) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **how)
    with torch.no_grad():
        return model(tokens).logits


def _held(graph: ModelGraph) -> list[str]:
    return [name for name, item in graph._model.named_parameters() if not item.is_meta]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_blocks_in_turn_give_the_models_logits(arch: str, tmp_path: Path) -> None:
    graph = _open(arch, tmp_path)
    tokens = make_tokens(3, 20)
    logits = _logits(graph, tokens, batch=2)
    torch.testing.assert_close(logits, _reference(tmp_path, tokens), rtol=1e-5, atol=1e-5)
    assert _held(graph) == []


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        ("gemma3_text", torch.bfloat16),
        ("gpt_oss", torch.float16),  # norms stay in fp32
        ("deepseek_v3", torch.bfloat16),  # correction bias stays in fp32
        ("qwen3_next", torch.bfloat16),
    ],
)
def test_sixteen_bit_graphs_are_bit_equal(arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    graph = _open(arch, tmp_path, dtype)
    tokens = make_tokens(2, 12)
    expected = _reference(tmp_path, tokens, dtype=dtype, experts_implementation="eager")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    dtypes = {name: tensor.dtype for name, tensor in graph._model.state_dict().items()}
    assert dtypes == {name: tensor.dtype for name, tensor in loaded.items()}
    assert torch.equal(_logits(graph, tokens, batch=2), expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sources_are_sorted_into_blocks(arch: str, tmp_path: Path) -> None:
    graph = _open(arch, tmp_path)
    blocks = [graph.block_sources(index) for index in range(len(graph.block_names))]
    everything = [*graph.outer_sources(), *(name for block in blocks for name in block)]
    assert len(everything) == len(set(everything))
    assert set(everything) == set(MemorySource(tmp_path).tensors)
    for name, block in zip(graph.block_names, blocks, strict=True):
        assert block and all(key.startswith(f"{name}.") for key in block)
    assert not any(".layers." in key for key in graph.outer_sources())


def test_only_the_block_at_work_is_held(tmp_path: Path) -> None:
    source = MemorySource(save("mixtral", tmp_path))
    graph = ModelGraph(source.config, source, torch.float32, CPU)
    assert not source.reads
    inputs = graph.start(make_tokens(), 2)
    assert set(source.reads) == {"model.embed_tokens.weight"} and _held(graph) == []
    graph.materialize(1)
    assert all(name.startswith("model.layers.1.") for name in _held(graph))
    assert set(source.reads) - {"model.embed_tokens.weight"} == set(graph.block_sources(1))
    graph.run(1, inputs[0])
    graph.release(1)
    assert _held(graph) == []


def test_what_the_graph_does_not_take_is_carried(tmp_path: Path) -> None:
    source = MemorySource(save("llama", tmp_path))
    source.tensors["mtp.head.weight"] = torch.zeros(3, 3)
    graph = ModelGraph(source.config, source, torch.float32, CPU)
    assert graph.carried_sources() == ("mtp.head.weight",)
    assert "mtp.head.weight" not in graph.outer_sources()


def test_a_head_stored_instead_of_the_tied_embedding_is_used(tmp_path: Path) -> None:
    source = MemorySource(save("llama_tied", tmp_path))
    tokens = make_tokens()
    expected = _reference(tmp_path, tokens)
    source.tensors["lm_head.weight"] = source.tensors.pop("model.embed_tokens.weight")
    graph = ModelGraph(source.config, source, torch.float32, CPU)
    torch.testing.assert_close(_logits(graph, tokens, 2), expected)


def test_batches_share_masks_and_positions(tmp_path: Path) -> None:
    graph = _open("gpt_oss", tmp_path)  # its eager attention gets masks
    first, second, last = graph.start(make_tokens(5, 20), 2)
    for one, other in zip(first.calls, second.calls, strict=True):
        masks = one.kwargs["attention_mask"], other.kwargs["attention_mask"]
        assert isinstance(masks[0], torch.Tensor) and masks[0] is masks[1]
        assert one.kwargs["position_embeddings"][0] is other.kwargs["position_embeddings"][0]
    assert last.hidden.shape == (1, 20, 64)
    kinds = [call.kwargs["attention_mask"] for call in first.calls]
    assert not torch.equal(kinds[0], kinds[1])  # a sliding and a full layer


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "mixtral", "qwen3_moe", "gpt_oss"])
def test_set_weight_writes_every_source_where_it_belongs(arch: str, tmp_path: Path) -> None:
    source = MemorySource(save(arch, tmp_path))
    graph = ModelGraph(source.config, source, torch.float32, CPU)
    item = graph.start(make_tokens(), 2)[0]
    index = len(graph.block_names) - 1
    graph.materialize(index)
    expected = graph.run(index, item)
    matrices = [name for name in graph.block_sources(index) if source.tensors[name].dim() >= 2]
    for scale in (0.0, 1.0):
        for name in matrices:
            stacked = arch == "gpt_oss" and source.tensors[name].dim() == 3
            value = source.tensors[name] * scale
            graph.set_weight(name, value.mT if stacked else value, transposed=stacked)
        assert torch.equal(graph.run(index, item), expected) == bool(scale)
    zeroed = [name for name in matrices if not source.tensors[name].any()]
    assert zeroed == [], "the source's own tensors were written to"


def test_set_weight_touches_its_slot_only(tmp_path: Path) -> None:
    graph = _open("mixtral", tmp_path)
    graph.materialize(0)
    stack = graph.block_parameters(0)["model.layers.0.mlp.experts.gate_up_proj"]
    before = stack.clone()
    name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    graph.set_weight(name, torch.zeros(96, 64))
    changed = (stack != before).nonzero()
    assert changed[:, 0].unique().tolist() == [2]
    assert changed[:, 1].unique().tolist() == list(range(96, 192))
    with pytest.raises(CalibrationError, match=r"\(96, 64\).*\(64, 96\)"):
        graph.set_weight(name, torch.zeros(64, 96))
    with pytest.raises(CalibrationError, match="not placed"):
        graph.set_weight("mtp.head.weight", torch.zeros(1, 1))


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_tensor_is_named_before_anything_runs(missing: str, tmp_path: Path) -> None:
    source = MemorySource(save("llama", tmp_path))
    del source.tensors[missing]
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        ModelGraph(source.config, source, torch.float32, CPU)
