"""Packaged shapes against their models' sizes, and the products of checkpoints."""

import json

import pytest
import torch

import tiny_models
from fewbit.quant.cli import main
from fewbit.quant.errors import CheckpointError, RecipeError
from fewbit.quant.kernel_report import parse_layer
from fewbit.quant.machine import load_device
from fewbit.quant.model_shapes import (
    attention_problems,
    checkpoint_problems,
    layers_of,
    linear_problems,
    load_shapes,
    parse_shapes,
    shapes_names,
)

H200 = load_device("h200")
GOOD = {
    "title": "t",
    "linears": {"q": [64, 32], "k": [32, 32], "v": [32, 32], "o": [32, 64]},
    "attention": {"heads": 4, "kv_heads": 2, "head_dim": 16},
    "source": "made up",
}


@pytest.mark.parametrize("name", shapes_names())
def test_packaged_shapes_are_consistent(name: str) -> None:
    found = load_shapes(name)
    heads, (hidden, inner) = found.attention, found.linears["o"]
    assert inner == heads.heads * heads.head_dim and found.title
    if "qkv" not in found.linears:
        assert found.linears["q"] == (inner, hidden)
        assert found.linears["k"] == (heads.kv_heads * heads.head_dim, hidden)
        assert found.linears["v"] == found.linears["k"]
        assert found.linears["gate"] == found.linears["up"] == found.linears["down"][::-1]
    joined = found.joined()
    assert joined[0] == (inner + 2 * heads.kv_heads * heads.head_dim, hidden)
    assert (2 * found.linears["down"][1], hidden) in joined and found.linears["down"] in joined
    assert len(joined) == len(set(joined)) == 4


def test_llama3_8b_by_the_figures_that_everybody_knows() -> None:
    found = load_shapes("llama3-8b")
    assert found.joined() == [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    assert found.apart() == [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]


def test_products_are_joined_where_inputs_are_rounded() -> None:
    layers = [parse_layer("int_group", "none"), parse_layer("int_two_level", "int8_token")]
    plain, rounded = (
        [(p.n, p.k) for p in linear_problems(load_shapes("llama3-8b"), [layer], H200)]
        for layer in layers
    )
    assert (6144, 4096) in rounded and (6144, 4096) not in plain and (1024, 4096) in plain


def test_attention_of_one_and_of_sixteen() -> None:
    found = attention_problems(load_shapes("llama3-8b"), "int4_head", H200)
    assert [(p.n_rows, p.kv_heads, p.group, p.head_dim) for p in found] == [
        (1, 8, 4, 128), (16, 8, 4, 128),
    ]  # fmt: skip


def test_formats_of_recipes_once() -> None:
    layers = layers_of(("w4a16", "w4a16-rtn", "w8a8"))
    assert len(layers) == 2 and layers[1].activation == "int8_token"
    assert len(layers_of()) == 4


@pytest.mark.parametrize(
    ("name", "message"), [("kv4", "quantizes no weights"), ("w4a61", "did you mean 'w4a16'")]
)
def test_formats_that_are_none(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        layers_of((name,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linears": {}}, "linears must be a table"),
        ({"linears": {"q": [64]}}, r"linears.q must be \[N, K\]"),
        ({"linears": {"q": [64, 0]}}, "whole number from 1"),
        ({"linears": {"q": [64, 1.5]}}, "got 1.5"),
        ({"linears": {"q": [64, True]}}, "got True"),
        ({"attention": {"heads": 4, "kv_heads": 3, "head_dim": 16}}, "multiple of kv_heads"),
        ({"attention": {"heads": 4}}, "attention: must be a table of heads"),
        ({"extra": 1}, "got "),
    ],
)
def test_wrong_shapes_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_shapes("mine", json.dumps(GOOD | change))


def test_unknown_shapes(tmp_path) -> None:
    with pytest.raises(RecipeError, match=r"unknown shapes 'llama3-8B'.*did you mean 'llama3-8b'"):
        load_shapes("llama3-8B")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_shapes(str(tmp_path / "none.json"))
    with pytest.raises(RecipeError, match="not valid JSON"):
        parse_shapes("mine", "[" * 100_000)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(GOOD))
    assert load_shapes(str(path)).joined() == [(128, 32), (32, 64)]


# ---- checkpoints ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_models.save("llama", tmp_path_factory.mktemp("source"))


def quantized(source, out, *flags: str):
    assert main(["quantize", str(source), "-o", str(out), "--quiet", *flags]) == 0
    return out


def test_a_weight_only_checkpoint_runs_products_apart(source, tmp_path) -> None:
    out = quantized(source, tmp_path / "out", "--recipe", "w4a16-rtn")
    config = json.loads((out / "config.json").read_text())
    found = checkpoint_problems(out, H200)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    sizes = {(problem.n, problem.k) for problem in found}
    assert {(inner, hidden), (hidden, inner)} <= sizes and (2 * inner, hidden) not in sizes
    assert all(p.activation is None and p.format == "int_group" for p in found)
    assert {p.dtype for p in found} <= {torch.bfloat16, torch.float16, torch.float32}
    assert all(p.machine == H200 and p.device == "cuda" and p.m_bucket == 1 for p in found)


def test_a_checkpoint_with_rounded_inputs_joins_siblings(source, tmp_path) -> None:
    flags = ("--recipe", "w8a8", "--samples", "2", "--length", "8", "--device", "cpu")
    from tiny_tokenizer import save_tokenizer

    save_tokenizer(source)
    out = quantized(source, tmp_path / "out", *flags)
    config = json.loads((out / "config.json").read_text())
    found = checkpoint_problems(out, H200)
    sizes = {(problem.n, problem.k) for problem in found}
    inner, hidden = config["intermediate_size"], config["hidden_size"]
    assert (2 * inner, hidden) in sizes and (inner, hidden) not in sizes
    assert all(problem.activation == "int8_token" for problem in found)


def test_no_checkpoint_of_ours(source, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint_problems(tmp_path / "none", H200)
    with pytest.raises(CheckpointError, match="is an unquantized checkpoint"):
        checkpoint_problems(source, H200)
