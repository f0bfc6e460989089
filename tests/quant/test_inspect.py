"""`inspect`: figures that can be counted by hand, from headers alone."""

import json
import subprocess
import sys

import pytest

from fewbit import quant
from fewbit.quant.errors import CheckpointError
from tiny_models import save


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    quant.quantize(save("llama", folder / "source"), folder / "out", recipe="w8a16")
    return folder / "out"


# Of one layer of the tiny llama: q, k, v, o, gate, up, down as (N, K).
LAYER = [(96, 64), (48, 64), (48, 64), (64, 96), (96, 64), (96, 64), (64, 96)]


def test_every_stored_byte_is_counted(out):
    found = quant.inspect(out)
    weights = 2 * sum(n * k for n, k in LAYER)
    stored = 2 * sum(n * k + 2 * n for n, k in LAYER)  # a byte for each code, an fp16 scale a row
    assert found.quantized_bytes == stored
    assert found.bits_per_weight == pytest.approx(8 * stored / weights)
    assert found.unquantized_bytes == 4 * (2 * 131 * 64 + 5 * 64)  # embedding, head, five norms
    assert found.bytes == (out / "model.safetensors").stat().st_size
    assert found.bytes == found.quantized_bytes + found.unquantized_bytes + found.header_bytes
    assert found.kv is None and found.verified is False


def test_tensors(out):
    tensors = quant.inspect(out).to_json()["tensors"]
    up = tensors["model.layers.0.mlp.up_proj"]
    assert up["formats"] == ("int_group",) and up["shape"] == (96, 64)
    assert up["bits_per_weight"] == pytest.approx(8 + 16 / 64)
    head = tensors["lm_head.weight"]
    assert head["formats"] == ("float32",) and head["bits_per_weight"] == 32.0
    assert len(tensors) == 14 + 7


def test_json_and_text(out):
    found = quant.inspect(out, verify=True)
    document = json.loads(json.dumps(found.to_json()))
    assert document["verified"] is True and document["recipe"] == "w8a16"
    assert document["source"]["name"] == "source"
    text = found.text()
    assert f"{found.bits_per_weight:.4f}" in text and "every checksum" in text
    assert "int_group" in text and "14 tensors" in text


def test_damage_is_only_seen_when_asked(out, tmp_path):
    import shutil

    folder = shutil.copytree(out, tmp_path / "copy")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert quant.inspect(folder).bits_per_weight > 8
    with pytest.raises(CheckpointError, match="checksum"):
        quant.inspect(folder, verify=True)


def test_after_save_pretrained(out, tmp_path):
    quant.load(out).save_pretrained(tmp_path / "again")
    before, after = quant.inspect(out), quant.inspect(tmp_path / "again", verify=True)
    assert after.tensors == before.tensors and after.verified
    assert after.recipe == "w8a16" and after.source is None


def test_nothing_quantized(tmp_path):
    quant.quantize(save("llama", tmp_path / "source"), tmp_path / "out", recipe="identity")
    found = quant.inspect(tmp_path / "out", verify=True)
    assert found.bits_per_weight == 0.0 and found.quantized_bytes == 0
    assert found.recipe == "identity"


def test_a_foreign_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="unquantized"):
        quant.inspect(save("llama", tmp_path / "source"))


def test_transformers_is_not_imported(out):
    code = (
        "import sys; from fewbit import quant; quant.inspect(sys.argv[1], verify=True); "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(out)]).returncode == 0
