"""Sums over a report's rows, classes of tensors, expert counts, JSON."""

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest

from fewbit.export.report_facts import (
    KeptTensor,
    Provenance,
    Report,
    TensorReport,
    tensor_class,
)


def row(name: str, **changes: Any) -> TensorReport:
    plain = TensorReport(
        name=name,
        shape=(8, 32),
        format="int_group",
        options={"bits": 4, "group": 32, "symmetric": True, "scale": "fp16"},
        bits_per_weight=4.5,
        n_bytes=144,
        relative_error=0.08,
        output_error=0.05,
        seconds=0.25,
        block="model.layers.0",
    )
    return replace(plain, **changes)


def report(*rows: TensorReport, **changes: Any) -> Report:
    provenance = Provenance(
        recipe="w4a16",
        recipe_text='{"name": "w4a16"}',
        source="org/model",
        revision="abc",
        fingerprint="f00",
        seed=3,
        calibration={"source": "bundled", "samples": 2},
        versions={"torch": "2.9"},
        command="fewbit quantize org/model -o out",
    )
    kept = (
        KeptTensor("model.embed_tokens.weight", 4096, "an embedding, norm or convolution"),
        KeptTensor("model.norm.weight", 64, "not the weight of a matrix product"),
    )
    return replace(Report(provenance, rows, kept, 12.5, 3_000_000), **changes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", "attention"),
        ("model.layers.3.self_attn.q_norm.weight", "norm"),
        ("model.layers.3.self_attn.sinks", "attention"),
        ("model.layers.3.linear_attn.in_proj_qkvz", "attention"),
        ("gpt_neox.layers.0.attention.query_key_value", "attention"),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h", "mlp"),
        ("model.layers.3.mlp.gate_proj", "mlp"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("model.layers.3.mlp.shared_expert_gate.weight", "router"),
        ("model.layers.3.block_sparse_moe.experts.7.w2", "experts"),
        ("model.layers.3.mlp.experts.gate_up_proj", "experts"),
        ("model.layers.3.mlp.shared_experts.up_proj", "experts"),
        ("model.layers.3.input_layernorm.weight", "norm"),
        ("transformer.h.3.ln_1.weight", "norm"),
        ("model.embed_tokens.weight", "embedding"),
        ("gpt_neox.embed_in.weight", "embedding"),
        ("embed_out.weight", "head"),
        ("lm_head.weight", "head"),
        ("model.visual.blocks.0.attn.qkv.weight", "other"),
        ("something", "other"),
    ],
)
def test_class_of_a_tensor(name: str, expected: str) -> None:
    assert tensor_class(name) == expected


def test_totals_follow_from_rows() -> None:
    found = report(
        row("model.layers.0.self_attn.q_proj"),
        row("model.layers.0.mlp.down_proj", shape=(4, 8, 32), n_bytes=1024),
    )
    assert found.n_weights == 256 + 1024
    assert found.quantized_bytes == 144 + 1024
    assert found.kept_bytes == 4160
    assert found.bits_per_weight == pytest.approx(8 * 1168 / 1280)
    assert found.bytes_by_class == {
        "embedding": {"quantized": 0, "unquantized": 4096},
        "mlp": {"quantized": 1024, "unquantized": 0},
        "attention": {"quantized": 144, "unquantized": 0},
        "norm": {"quantized": 0, "unquantized": 64},
    }
    assert next(iter(found.bytes_by_class)) == "embedding"  # largest first
    assert report().bits_per_weight == 0.0


def test_worst_uses_the_output_error_where_there_is_one() -> None:
    found = report(
        row("a", relative_error=0.9, output_error=0.01),
        row("b", relative_error=0.2, output_error=None),
        row("c", relative_error=0.1, output_error=0.3),
    )
    assert [item.name for item in found.worst(2)] == ["c", "b"]


def test_fallbacks_name_their_tensor() -> None:
    found = report(row("a"), row("b", fallbacks=("rounded to nearest: no tokens", "twice")))
    assert found.fallbacks == ("b: rounded to nearest: no tokens", "b: twice")


def test_expert_counts_from_stacks_and_from_single_experts() -> None:
    single = [
        row(f"model.layers.1.mlp.experts.{expert}.{kind}_proj", tokens=tokens)
        for expert, tokens in ((10, 5), (2, 0), (1, 7))
        for kind in ("gate", "up")
    ]
    stack = row("model.layers.0.mlp.experts.down_proj", tokens=(4, 0))
    found = report(stack, *single, row("model.layers.1.self_attn.q_proj", tokens=12))
    assert found.experts == {
        "model.layers.0.mlp.experts": [4, 0],
        "model.layers.1.mlp.experts": [7, 0, 5],
    }


def test_a_row_comes_back_from_its_journal_form() -> None:
    stored = {
        "name": "a", "shape": [2, 8, 32], "format": "int_group", "options": {"bits": 3},
        "bits_per_weight": 3.5, "n_bytes": 224, "n_weights": 512, "relative_error": 0.2,
        "output_error": None, "block": "layer", "fallbacks": ["x"], "seconds": 0.5,
        "tokens": [3, 4],
    }  # fmt: skip
    found = TensorReport.from_row(json.loads(json.dumps(stored)))
    assert (found.shape, found.fallbacks, found.tokens) == ((2, 8, 32), ("x",), (3, 4))
    assert found.n_weights == 512
    assert found.error == 0.2
    del stored["tokens"]
    assert TensorReport.from_row(stored).tokens is None


def test_json_has_the_promised_keys() -> None:
    found = report(row("a", fallbacks=("f",))).to_json()
    json.dumps(found, allow_nan=False)
    tensor = found["tensors"]["a"]
    assert {"format", "bits_per_weight", "relative_error", "output_error", "seconds"} <= set(tensor)
    assert "name" not in tensor
    assert found["totals"]["bits_per_weight"] == 4.5
    assert found["totals"]["bytes"] == 144 + 4160
    assert found["peak_resident_bytes"] == 3_000_000
    assert found["wall_seconds"] == 12.5
    assert found["versions"] == {"torch": "2.9"}
    assert found["recipe"]["sha256"] == hashlib.sha256(b'{"name": "w4a16"}').hexdigest()
    assert found["source"] == {"name": "org/model", "revision": "abc", "fingerprint": "f00"}
    assert found["fallbacks"] == ["a: f"]
    assert found["kept"]["model.norm.weight"]["n_bytes"] == 64


def test_json_writes_no_nan() -> None:
    found = report(row("a", relative_error=float("nan"))).to_json()
    assert found["tensors"]["a"]["relative_error"] is None
    json.dumps(found, allow_nan=False)
