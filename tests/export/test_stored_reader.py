"""A lossless checkpoint read like its source."""

import torch
from safetensors.torch import load_file

from fewbit.export.stored_reader import StoredReader
from fewbit.quant.pipeline import quantize
from fewbit.quant.stored import open_stored
from planted import bundled_model


def test_it_reads_like_the_source(tmp_path):
    quantize(bundled_model(), tmp_path / "out", recipe="lossless")
    stored = open_stored(tmp_path / "out")
    found = StoredReader.open(stored.folder, stored.headers, stored.contents(), stored.manifest)
    source = load_file(bundled_model() / "model.safetensors")
    assert found.tensors.keys() == source.keys()
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        assert torch.equal(found.read(name), source[name])
    assert "quantization_config" not in found.config and found.config["model_type"] == "llama"
    names = {path.name for path in found.extra_files}
    assert names == {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
