"""What is remembered of a source: headers to the last byte, and the texts that the output replaces."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fewbit.export.checkpoint import Checkpoint
from fewbit.export.originals import original_facts, originals_of
from fewbit.quant.errors import CheckpointError


def test_facts(tmp_path):
    save_file({"w": torch.zeros(3, 5)}, tmp_path / "odd name.safetensors", {"made": "elsewhere"})
    (tmp_path / "config.json").write_text('{"model_type":   "x"}\n')
    (tmp_path / "tokenizer.json").write_text("{}")
    found = original_facts(Checkpoint.open(tmp_path, as_stored=True))
    assert found["texts"] == {"config.json": '{"model_type":   "x"}\n'}
    raw = (tmp_path / "odd name.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert found["shards"] == {"odd name.safetensors": raw[8 : 8 + length].decode()}
    assert json.loads(json.dumps(found)) == found


def test_a_manifest_without_them_is_named():
    for manifest in (None, {}, {"original": 3}):
        with pytest.raises(CheckpointError, match=r"out does not say what its source looked like"):
            originals_of(manifest, "out")
