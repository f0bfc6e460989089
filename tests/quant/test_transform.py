"""Transforms in a whole run: output keeps the function, resumes, is refused before it is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.calibrate.edits import Edit, Fill, Side
from fewbit.calibrate.protocol import plan_passes
from fewbit.export.checkpoint import Checkpoint
from fewbit.export.report import summary_text
from fewbit.quant import blockwise
from fewbit.quant.errors import CalibrationError, RecipeError
from fewbit.quant.load import load
from fewbit.quant.pipeline import quantize
from fewbit.quant.transform import EDITS, EditStore, transform_model
from tiny_models import make_tokens, save
from tiny_tokenizer import save_tokenizer

CPU = torch.device("cpu")
ROTATED = """
[[pass]]
name = "fold_norms"
[[pass]]
name = "rotate"
edges = {edges}
{more}
[weights]
format = "int_group"
bits = 8
group = 16
"""


def recipe(folder: Path, edges: list[str], more: str = "") -> str:
    path = folder / "rotated.toml"
    path.write_text(ROTATED.format(edges=json.dumps(edges), more=more))
    return str(path)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(make_tokens(2, 20)).logits.float()


def original(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("more", ["", '[[pass]]\nname = "gptq"'], ids=["data-free", "calibrated"])
@pytest.mark.parametrize(
    ("arch", "edges"),
    [
        ("llama", ["residual", "value_heads", "down_proj"]),
        ("llama_tied", ["residual"]),
        ("qwen2", ["residual", "value_heads"]),
        ("mixtral", ["residual", "value_heads"]),
    ],
)
def test_a_loaded_model_has_the_originals_function(
    arch: str, edges: list[str], more: str, tmp_path: Path
) -> None:
    source = save_tokenizer(save(arch, tmp_path / "src"))
    out = tmp_path / "out"
    report = quantize(source, out, recipe=recipe(tmp_path, edges, more), samples=4, length=16)
    wanted, found = logits(original(source)), logits(load(out, device="cpu"))
    # 8-bit weights in groups of 16: what is left is their rounding, which may move an expert
    limit = 0.06 if arch == "mixtral" else 0.02
    assert float((found - wanted).norm() / wanted.norm()) < limit
    config = json.loads((out / "config.json").read_text())
    assert config.get("tie_word_embeddings", False) is False
    assert not [path for path in out.iterdir() if EDITS.match(path.name)]
    if arch == "llama_tied":
        n_bytes = 131 * 64 * 4
        assert f"lm_head.weight: {n_bytes:,} bytes more, untied from" in summary_text(report)


def test_online_transforms_are_recorded_and_run(tmp_path: Path) -> None:
    source, out = save("llama", tmp_path / "src"), tmp_path / "out"
    quantize(source, out, recipe=recipe(tmp_path, ["down_proj"]))
    tensors = json.loads((out / "config.json").read_text())["quantization_config"]["tensors"]
    (entry,) = [value for key, value in tensors.items() if "down_proj" in key]
    assert entry["input"] == [{"op": "hadamard", "order": 96, "seed": 0}]


def test_a_transform_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    source, out = save("gemma2", tmp_path / "src"), tmp_path / "out"
    with pytest.raises(RecipeError, match=r"pass rotate cannot run on Gemma2\w+: .*post-norm"):
        quantize(source, out, recipe=recipe(tmp_path, ["residual"]))
    assert not out.exists()


def test_a_transform_that_changes_the_function_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewbit.calibrate.passes import fold_norms

    source, out = save("llama", tmp_path / "src"), tmp_path / "out"
    monkeypatch.setattr(fold_norms, "fold", lambda norm, view: [Edit(Side(norm.gain), Fill(1.0))])
    with pytest.raises(CalibrationError, match="'fold_norms and rotate' would change the function"):
        quantize(source, out, recipe=recipe(tmp_path, ["value_heads"]))
    assert not out.exists()


def test_without_transforms_nothing_is_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save("llama", tmp_path))
    made = transform_model(checkpoint, plan_passes([("nearest", {})]), 0, CPU)
    assert made.edges is None and not made.online
    assert not any(made.source.is_edited(name) for name in checkpoint.tensors)


def test_lost_edits_are_named(tmp_path: Path) -> None:
    store = EditStore(tmp_path)
    store.save("model.layers.0", [Edit(Side("x.weight"), Fill(1.0))])
    (edit,) = store.load("model.layers.0")
    assert edit.side.key == "x.weight"
    assert all(EDITS.match(path.name) for path in tmp_path.iterdir())
    with pytest.raises(CalibrationError, match="start over with --restart"):
        store.load("model.layers.1")


class Killed(Exception):
    pass


def test_an_interrupted_run_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tokenizer(save("llama", tmp_path / "src"))
    more = '[[pass]]\nname = "smooth"\nedges = ["down_proj"]\n[[pass]]\nname = "gptq"'
    path = recipe(tmp_path, ["residual", "value_heads"], more)
    how: dict[str, Any] = {"recipe": path, "samples": 4, "length": 16}
    quantize(source, tmp_path / "whole", **how)
    real = blockwise.transform_block

    def killed(graph: Any, index: int, *rest: Any) -> Any:
        if index == 1:
            raise Killed
        return real(graph, index, *rest)

    from fewbit.quant import transform

    before = transform.transform_block
    monkeypatch.setattr(blockwise, "transform_block", killed)
    with pytest.raises(Killed):
        quantize(source, tmp_path / "out", **how)
    assert [p.name for p in (tmp_path / "out").iterdir() if EDITS.match(p.name)] == [
        "fewbit.model.layers.0.edits"
    ]
    monkeypatch.setattr(blockwise, "transform_block", before)
    quantize(source, tmp_path / "out", **how)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    assert not [p for p in (tmp_path / "out").iterdir() if EDITS.match(p.name)]
