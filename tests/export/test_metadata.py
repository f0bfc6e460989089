"""Config and manifest: what is written resolves back to what was meant; damage is named."""

import json
import random
from dataclasses import replace

import pytest

from fewbit.export.metadata import (
    MANIFEST,
    ModuleSpec,
    build_quantization_config,
    config_sha256,
    manifest_bytes,
    parse_quantization_config,
    read_manifest,
)
from fewbit.quant.errors import CheckpointError
from fewbit.quant.format import find_format
from fewbit.quant.hadamard import Hadamard

Options = find_format("int_group").Options


def term(**keys):
    return (("int_group", Options(**keys)),)


def modules():
    found = {}
    for layer in range(12):
        base = f"model.layers.{layer}"
        found[f"{base}.self_attn.q_proj"] = ModuleSpec(term())
        found[f"{base}.mlp.down_proj"] = ModuleSpec(term(), columns=700)
        found[f"{base}.mlp.experts.down_proj"] = ModuleSpec(term(bits=3), transposed=True)
    found["model.layers.3.self_attn.k_proj"] = ModuleSpec(term(bits=8, group="row"))
    return found


def test_config_resolves_every_module_back():
    config = json.loads(json.dumps(build_quantization_config("r", modules())))
    parsed = parse_quantization_config(config, "config.json")
    for name, spec in modules().items():
        assert parsed.spec_for(name) == spec, name
    assert len(config["tensors"]) == 3  # layers that differ alike are one pattern


def test_patterns_never_cover_a_module_that_differs():
    found = modules()
    found["model.layers.5.mlp.down_proj"] = ModuleSpec(term(), columns=701)
    parsed = parse_quantization_config(build_quantization_config("r", found), "c")
    for name, spec in found.items():
        assert parsed.spec_for(name) == spec, name


def test_golden_config():
    config = build_quantization_config("w4a16", {"a.b": ModuleSpec(term())})
    assert config == {
        "quant_method": "fewbit",
        "version": 1,
        "recipe": "w4a16",
        "default": {
            "terms": [{
                "format": "int_group", "bits": 4, "group": 128, "symmetric": True, "scale": "fp16",
            }]
        },
        "tensors": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2, this fewbit reads up to 1; upgrade"),
        ({"version": "1"}, "version must be a whole number"),
        ({"quant_method": "gptq"}, "must be 'fewbit', got 'gptq'"),
        ({"kw": {}}, "unknown keys"),
        ({"kv": {}}, "kv.key must be a table"),
        ({"kv": 4}, "kv must be an object"),
        ({"default": {"terms": [], "activation": {"format": "int9"}}}, "unknown activation"),
        ({"default": {"terms": [], "activation": "int8"}}, "activation must be a format"),
        ({"tensors": {"a": {"input": [{"op": "dct"}]}}}, "op must be 'hadamard'"),
        ({"tensors": {"a": {"input": {}}}}, "input must be a list"),
        ({"tensors": []}, "tensors must be an object"),
        ({"tensors": {"a": {"columns": -1}}}, "bad columns -1"),
        ({"tensors": {"a": {"colums": 1}}}, "expected an object with activation"),
        ({"tensors": {"re:(": {}}}, "bad pattern"),
        ({"default": {"terms": [{"format": "nf4"}]}}, "unknown format 'nf4'"),
        ({"default": {"terms": [{"format": "int_group", "bits": 99}]}}, "bits must be"),
        ({"default": {"terms": [{"format": 3}]}}, "unknown format '3'"),
        ({"default": None}, "expected an object"),
    ],
)
def test_bad_config_is_named(change, message):
    config = {**build_quantization_config("r", modules()), **change}
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        parse_quantization_config(config, "config.json")
    assert message in str(caught.value)


def test_a_lost_manifest_with_exceptions_is_noticed():
    config = build_quantization_config("r", modules())
    moved = {**config, "tensors": {}, "exceptions_in_manifest": len(config["tensors"])}
    parsed = parse_quantization_config(moved, "config.json", config["tensors"])
    assert parsed.spec_for("model.layers.0.mlp.down_proj").columns == 700
    for more in (None, {}):
        with pytest.raises(
            CheckpointError, match=r"3 exceptions lie in fewbit\.json, 0 were found"
        ):
            parse_quantization_config(moved, "config.json", more)


def test_manifest_round_trip_and_every_flip_is_seen(tmp_path):
    manifest = {"version": 1, "tensors": {"a": "00ff"}, "recipe": {"text": "ü\n"}}
    data = manifest_bytes(manifest)
    (tmp_path / MANIFEST).write_bytes(data)
    found = read_manifest(tmp_path)
    assert {k: v for k, v in found.items() if k != "crc32c"} == manifest
    generator = random.Random(0)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << generator.randrange(8)
        (tmp_path / MANIFEST).write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError, match="damaged"):
            read_manifest(tmp_path)
    for length in range(len(data)):
        (tmp_path / MANIFEST).write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            read_manifest(tmp_path)


def test_manifest_of_a_newer_version_and_absent(tmp_path):
    assert read_manifest(tmp_path) is None
    (tmp_path / MANIFEST).write_bytes(manifest_bytes({"version": 9}))
    with pytest.raises(CheckpointError, match="version 9"):
        read_manifest(tmp_path)


def test_config_hash_ignores_order_only():
    assert config_sha256({"a": 1, "b": 2}) == config_sha256({"b": 2, "a": 1})
    assert config_sha256({"a": 1}) != config_sha256({"a": 2})


def test_activations_inputs_and_caches_come_back():
    turn = Hadamard(96, 7)
    options = find_format("int_group").Options()
    plain = ModuleSpec((("int_group", options),), activation="int8_token")
    specs = {
        "model.layers.0.mlp.up_proj": plain,
        "model.layers.1.mlp.up_proj": plain,
        "model.layers.0.mlp.down_proj": replace(plain, inputs=(turn,)),
        "model.layers.1.mlp.down_proj": replace(plain, inputs=(turn,)),
        "model.layers.0.self_attn.q_proj": replace(plain, activation=None),
    }
    kv = {"key": {"format": "int4_head"}, "value": {"format": "int4_head"}, "sink": 4}
    config = build_quantization_config("r", specs, kv)
    assert config["default"]["activation"] == {"format": "int8_token"}
    assert len(config["tensors"]) == 2  # down_proj as one pattern, q_proj
    parsed = parse_quantization_config(json.loads(json.dumps(config)), "config.json")
    assert {name: parsed.spec_for(name) for name in specs} == specs
    assert parsed.kv is not None and parsed.kv.sink == 4
    assert "kv" not in build_quantization_config("r", specs)
