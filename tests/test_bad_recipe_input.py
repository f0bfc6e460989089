"""What the default recipe cannot take: one line that names what is missing, nothing written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from fewbit.quant.cli import main
from tiny_tokenizer import save_tokenizer

FAST = ("--samples", "2", "--length", "16", "--device", "cpu", "--quiet")
ROTATE = '[[pass]]\nname="fold_norms"\n[[pass]]\nname="rotate"\nedges={edges}\n'
WEIGHTS = '[weights]\nformat="int_two_level"\n'


def refused(capsys: Any, source: Path, out: Path, *more: str) -> str:
    """The single line of a `quantize` that must fail before it writes anything."""
    capsys.readouterr()
    code = main(["quantize", str(source), "-o", str(out), *FAST, *more])
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert code == 1 and len(lines) == 1, printed.err
    assert lines[0].startswith("fewbit: ") and "Traceback" not in printed.err
    assert not out.exists()
    return lines[0]


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def make(arch: str) -> Path:
        return save_tokenizer(tiny_models.save(arch, tmp_path / "source", torch.bfloat16))

    return make


@pytest.mark.parametrize(
    ("arch", "passname", "what"),
    [
        ("phi3", "smooth_attention", "separate projections q, k, v and o"),
        ("gpt_neox", "fold_norms", "a norm with a bias"),
        ("deepseek_v3", "smooth_attention", "separate projections q, k, v and o"),
        ("gpt_oss", "smooth", "no gated MLP with separate gate, up and down"),
    ],
)
def test_architectures_that_the_default_recipe_cannot_take(
    arch: str, passname: str, what: str, make: Any, tmp_path: Path, capsys: Any
) -> None:
    line = refused(capsys, make(arch), tmp_path / "out")
    assert f"pass {passname} cannot run on" in line and what in line
    assert f"--set pass.{passname}.skip=true" in line and "w4a16" in line


@pytest.mark.parametrize(
    ("arch", "edges", "what"),
    [
        ("gemma2", '["residual"]', "post-norm"),
        ("llama", '["residuals"]', "residual, value_heads, down_proj"),
        ("mixtral", '["down_proj"]', "experts are not rotated online"),
    ],
)
def test_rotations_that_do_not_fit(
    arch: str, edges: str, what: str, make: Any, tmp_path: Path, capsys: Any
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(ROTATE.format(edges=edges) + WEIGHTS)
    assert what in refused(capsys, make(arch), tmp_path / "out", "--recipe", str(recipe))


def test_two_transforms_of_one_edge(make: Any, tmp_path: Path, capsys: Any) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(ROTATE.format(edges='["down_proj"]') + '[[pass]]\nname="smooth"\n' + WEIGHTS)
    line = refused(capsys, make("llama"), tmp_path / "out", "--recipe", str(recipe))
    assert "pass smooth cannot run" in line and "run time" in line


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("kv.key.format=int4", "did you mean 'int4_head'"),
        ("kv.residual=-1", "whole number of tokens"),
        ("kv.prefill=exactly", "did you mean 'exact'"),
        ("kv.value.bits=3", "unknown key 'bits'"),
        ("activations.format=int4_token", "did you mean 'int8_token'"),
        ("weights.group=100", "group must be"),
        ("weights.dialect=a", "dialect must be"),
        ("pass.smooth.alpha=2", "alpha must be"),
        ("pass.smooth.edges=[]", "edges must be a list"),
        ("pass.rotate.untie=1", "untie must be true or false"),
        ("pass.scale_search.metric=l2", "metric must be"),
    ],
)
def test_keys_of_the_default_recipe(
    setting: str, what: str, make: Any, tmp_path: Path, capsys: Any
) -> None:
    assert what in refused(capsys, make("llama"), tmp_path / "out", "--set", setting)


def test_an_incomplete_checkpoint(make: Any, tmp_path: Path, capsys: Any) -> None:
    source = make("llama")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, source / "model.safetensors")
    assert "model.layers.1.self_attn.k_proj" in refused(capsys, source, tmp_path / "out")


@pytest.mark.parametrize("tensor", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(
    tensor: str, value: float, make: Any, tmp_path: Path, capsys: Any
) -> None:
    source = make("llama")
    tensors = load_file(source / "model.safetensors")
    tensors[tensor].view(-1)[3] = value
    save_file(tensors, source / "model.safetensors")
    assert tensor in refused(capsys, source, tmp_path / "out")


def test_a_matrix_of_zeros_is_quantized(make: Any, tmp_path: Path) -> None:
    source, out = make("llama"), tmp_path / "out"
    tensors = load_file(source / "model.safetensors")
    for name in ("self_attn.v_proj", "mlp.up_proj", "self_attn.k_proj"):
        tensors[f"model.layers.0.{name}.weight"].zero_()
    save_file(tensors, source / "model.safetensors")
    assert main(["quantize", str(source), "-o", str(out), *FAST,
                 "--set", "pass.gptq.min_tokens=1", "--set", "allow_fallback=true"]) == 0  # fmt: skip
    assert main(["inspect", str(out), "--verify"]) == 0
    from fewbit.quant.load import load

    with torch.no_grad():
        logits = load(out, device="cpu")(tiny_models.make_tokens(2, 9)).logits
    assert bool(torch.isfinite(logits).all())
