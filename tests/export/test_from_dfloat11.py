"""Published and own folders as dense tensors: the same bits, bounded memory, damage named."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from dfloat11_oracle import normal, weights
from safetensors.torch import load_file, save_file

from fewbit.export import from_dfloat11
from fewbit.export.checkpoint import Checkpoint
from fewbit.export.dfloat11 import CODED, encode_unit
from fewbit.export.from_dfloat11 import DFloat11Checkpoint, is_dfloat11
from fewbit.export.to_dfloat11 import write_dfloat11
from fewbit.quant.errors import CheckpointError

BUNDLED = Path(str(files("fewbit.quant"))) / "data" / "tiny-llama"
H, INNER = 16, 40
SHAPES = {
    "self_attn.q_proj": (32, H), "self_attn.k_proj": (8, H), "self_attn.v_proj": (8, H),
    "self_attn.o_proj": (H, 32),
    "mlp.gate_proj": (INNER, H), "mlp.up_proj": (INNER, H), "mlp.down_proj": (H, INNER),
}  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The bundled model, written by us. Not to be changed."""
    folder = tmp_path_factory.mktemp("own") / "out"
    write_dfloat11(Checkpoint.open(BUNDLED), folder)
    return folder


def copied(own, tmp_path):
    return Path(shutil.copytree(own, tmp_path / "copy"))


def unit_of(values):
    return {
        name: torch.from_numpy(part.copy())
        for name, part in encode_unit([value.reshape(-1) for value in values]).items()
    }


def published(folder, single=False, layers=2, **config):
    """A folder as the published compressor leaves it: no shapes, no metadata, no index."""
    dense, shards = {}, {}
    for layer in range(layers):
        module = f"model.layers.{layer}"
        values = {
            path: normal(shape[0] * shape[1], seed=layer).reshape(shape)
            for path, shape in SHAPES.items()
        }
        dense |= {f"{module}.{path}.weight": value for path, value in values.items()}
        unit = unit_of(list(values.values()))
        shards[module] = {f"{module}.{name}": part for name, part in unit.items()}
        shards[module][f"{module}.input_layernorm.weight"] = torch.ones(H).bfloat16()
    for module in ("lm_head", "model.embed_tokens"):
        dense[f"{module}.weight"] = normal(30 * H, seed=len(module)).reshape(30, H)
        unit = unit_of([dense[f"{module}.weight"]])
        shards[module] = {f"{module}.{name}": part for name, part in unit.items()}
    shards["model"] = {"model.norm.weight": torch.ones(H).bfloat16()}
    folder.mkdir()
    if single:
        everything = {name: part for shard in shards.values() for name, part in shard.items()}
        save_file(everything, folder / "model.safetensors")
    else:
        for module, tensors in shards.items():
            save_file(tensors, folder / f"{module.replace('.', '_')}.safetensors")
    dfloat11 = {
        "version": "0.2.0", "threads_per_block": [512], "bytes_per_thread": 8,
        "pattern_dict": {"lm_head": [], "model.embed_tokens": [], r"model.layers.\d+": list(SHAPES)},
    }  # fmt: skip
    tree = {"model_type": "llama", "hidden_size": H, "num_hidden_layers": layers} | config
    (folder / "config.json").write_text(json.dumps(tree | {"dfloat11_config": dfloat11}))
    return dense


def bits(tensor):
    assert tensor.dtype == torch.bfloat16
    return tensor.view(torch.int16).numpy().view(np.uint16)


# --- what is read ---------------------------------------------------------------------------------


def test_our_export_comes_back_to_the_bit(own):
    source, found = Checkpoint.open(BUNDLED), DFloat11Checkpoint.open(own)
    assert found.tensors.keys() == source.tensors.keys()
    for name, info in source.tensors.items():
        assert (found.tensors[name].shape, found.tensors[name].dtype) == (info.shape, info.dtype)
        assert torch.equal(found.read(name).view(torch.int16), source.read(name).view(torch.int16))
    assert found.config == source.config
    assert {path.name for path in found.extra_files} == {path.name for path in source.extra_files}
    parts = [load_file(path) for path in own.glob("*.safetensors")]
    assert found.total_bytes == sum(t.nbytes for tensors in parts for t in tensors.values())
    assert found.tensors["lm_head.weight"].encoding == "dfloat11"
    assert found.tensors["model.norm.weight"].encoding == "plain"
    assert is_dfloat11(json.loads((own / "config.json").read_text()))
    assert not is_dfloat11(found.config)


@pytest.mark.parametrize("single", [True, False])
def test_published_folders(tmp_path, single):
    """One file or many, patterns with bare dots, shapes from hidden_size and sizes alone."""
    dense = published(tmp_path / "in", single)
    found = DFloat11Checkpoint.open(tmp_path / "in")
    assert len(found.tensors) == len(dense) + 3
    for name, expected in dense.items():
        assert found.tensors[name].shape == expected.shape
        assert np.array_equal(bits(found.read(name)), expected)
    assert torch.equal(found.read("model.norm.weight"), torch.ones(H).bfloat16())


def test_rows_of_a_tensor(own):
    source, found = Checkpoint.open(BUNDLED), DFloat11Checkpoint.open(own)
    name = "model.layers.2.mlp.down_proj.weight"
    for start, stop in ((0, 0), (0, 1), (17, 101), (255, 256), (0, None)):
        expected = source.read(name, start, stop)
        assert torch.equal(found.read(name, start, stop), expected)
    with pytest.raises(IndexError, match=r"rows \[0, 257\) are outside \[0, 256\)"):
        found.read(name, 0, 257)


def test_the_coded_bytes_of_one_unit_are_kept(own, monkeypatch):
    read = []
    original = from_dfloat11.read_entry
    monkeypatch.setattr(
        from_dfloat11, "read_entry", lambda *args: read.append(args[1]) or original(*args)
    )
    found = DFloat11Checkpoint.open(own)
    read.clear()
    for layer in (0, 1):
        for path in SHAPES:
            found.read(f"model.layers.{layer}.{path}.weight")
    assert read == [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in CODED]


def test_bits_of_odd_values_are_kept(tmp_path):
    """Minus zero and subnormals; NaN where a unit is dense."""
    published(tmp_path / "in")
    odd = np.resize(np.array([0, 0x8000, 1, 0x807F, 0x3F80], np.uint16), (30, H))
    unit = unit_of([odd])
    path = tmp_path / "in" / "lm_head.safetensors"
    save_file({f"lm_head.{name}": part for name, part in unit.items()}, path)
    norm = torch.full((H,), float("nan")).bfloat16()
    save_file({"model.norm.weight": norm}, tmp_path / "in" / "model.safetensors")
    found = DFloat11Checkpoint.open(tmp_path / "in")
    assert np.array_equal(bits(found.read("lm_head.weight")), odd)
    assert np.array_equal(bits(found.read("model.norm.weight")), bits(norm))


def test_shapes_of_a_model_that_transformers_knows(tmp_path):
    """A pattern of names beyond the usual ones: fc1 and fc2 of OPT."""
    shapes = {"fc1": (24, H), "fc2": (H, 24)}
    values = [normal(24 * H, seed=s).reshape(shape) for s, shape in enumerate(shapes.values())]
    module = "model.decoder.layers.0"
    (tmp_path / "in").mkdir()
    tensors = {f"{module}.{name}": part for name, part in unit_of(values).items()}
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    config = {
        "model_type": "opt", "hidden_size": H, "ffn_dim": 24, "num_hidden_layers": 1,
        "vocab_size": 8, "word_embed_proj_dim": H, "num_attention_heads": 2,
        "dfloat11_config": {"threads_per_block": [512], "bytes_per_thread": 8, "version": "0.5.0",
                            "pattern_dict": {r"model\.decoder\.layers\.\d+": ["fc1", "fc2"]}},
    }  # fmt: skip
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    found = DFloat11Checkpoint.open(tmp_path / "in")
    for value, (name, shape) in zip(values, shapes.items(), strict=True):
        assert found.tensors[f"{module}.{name}.weight"].shape == shape
        assert np.array_equal(bits(found.read(f"{module}.{name}.weight")), value)
    config["ffn_dim"] = 23
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"fc1.weight has 384 elements, and no shape that fits"
    ):
        DFloat11Checkpoint.open(tmp_path / "in")


# --- what is refused ------------------------------------------------------------------------------


def edited(folder, change):
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(dfloat11_config=3), "dfloat11_config is 3, an object is needed"),
        (lambda c: c["dfloat11_config"].update(bytes_per_thread=4), r"bytes_per_thread 4, \[512\]"),
        (
            lambda c: c["dfloat11_config"].update(threads_per_block=[256]),
            r"threads_per_block \[256\]",
        ),
        (lambda c: c["dfloat11_config"].update(pattern_dict=["a"]), "lists of names are needed"),
        (
            lambda c: c["dfloat11_config"].update(pattern_dict={"a": [1]}),
            "lists of names are needed",
        ),
        (lambda c: c["dfloat11_config"].update(pattern_dict={"(": []}), "bad pattern '\\('"),
        (lambda c: c["dfloat11_config"].update(pattern_dict={"a" * 2000: []}), "2000 characters"),
        (
            lambda c: c["dfloat11_config"]["pattern_dict"].pop("lm_head"),
            "lm_head matches no pattern",
        ),
        (
            lambda c: c["dfloat11_config"]["pattern_dict"].update(lm_head=["a", "b"]),
            r"split_positions is torch.int64 \[0\], int64 \[1\] is needed for the 2 weights",
        ),
        (lambda c: c.update(hidden_size=17), "no shape that fits them is known"),
        (lambda c: c.pop("hidden_size"), "no shape that fits them is known"),
        (lambda c: c.update(num_hidden_layers=3), r"holds nothing of model.layers.2; download the"),
    ],
)
def test_damaged_configs(tmp_path, change, message):
    published(tmp_path / "in")
    edited(tmp_path / "in", change)
    with pytest.raises(CheckpointError, match=message):
        DFloat11Checkpoint.open(tmp_path / "in")


def test_missing_files(tmp_path):
    published(tmp_path / "in", layers=3)
    (tmp_path / "in" / "model_layers_1.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"holds nothing of model.layers.1; download the missing"
    ):
        DFloat11Checkpoint.open(tmp_path / "in")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config.json is not valid JSON"):
        DFloat11Checkpoint.open(tmp_path / "empty")
    shutil.copy(tmp_path / "in" / "config.json", tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"holds files without any tensor"):
        DFloat11Checkpoint.open(tmp_path / "empty")


def test_a_missing_part_and_a_missing_tensor(tmp_path, own):
    folder = copied(own, tmp_path)
    tensors = load_file(folder / "lm_head.safetensors")
    del tensors["lm_head.gaps"]
    save_file(tensors, folder / "lm_head.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.safetensors: lm_head.gaps is missing"):
        DFloat11Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=r"no tensor 'lm_hed.weight' \(did you mean 'lm_head"):
        DFloat11Checkpoint.open(own).read("lm_hed.weight")


def test_a_tensor_twice(tmp_path, own):
    folder = copied(own, tmp_path)
    shutil.copy(folder / "model.safetensors", folder / "more.safetensors")
    with pytest.raises(
        CheckpointError, match=r"is in .*model.safetensors and in .*more.safetensors"
    ):
        DFloat11Checkpoint.open(folder)
    save_file({"lm_head.weight": torch.zeros(2, 2)}, folder / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is stored twice"):
        DFloat11Checkpoint.open(folder)


def test_damage_names_file_tensor_and_block(tmp_path, own):
    folder = copied(own, tmp_path)
    path = folder / "model_layers_4.safetensors"
    tensors = load_file(path)
    tensors["model.layers.4.gaps"][320 * 5 + 3] ^= 0xFF
    save_file(tensors, path, {"fewbit_shapes": "no JSON"})
    found = DFloat11Checkpoint.open(folder)
    message = r"model_layers_4.safetensors: model.layers.4.gaps disagrees .*, block 5; the file"
    with pytest.raises(CheckpointError, match=message):
        for name in SHAPES:
            found.read(f"model.layers.4.{name}.weight")
    assert found.read("model.layers.4.mlp.down_proj.weight").shape == (256, 768), "blocks behind it"


def test_random_damage_of_a_file(tmp_path):
    """Bytes of a shard, header included: named errors or tensors of the promised shapes."""
    published(tmp_path / "in", layers=1)
    path = tmp_path / "in" / "model_layers_0.safetensors"
    good, random, errors = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(150):
        damaged = bytearray(good)
        for at in random.integers(0, len(good), 3).tolist():
            damaged[at] = int(random.integers(0, 256))
        path.write_bytes(bytes(damaged[: len(good) - int(random.integers(0, 2))]))
        try:
            found = DFloat11Checkpoint.open(tmp_path / "in")
            for name, info in found.tensors.items():
                assert found.read(name).shape == info.shape
        except CheckpointError as error:
            errors += 1
            assert str(tmp_path / "in") in str(error), error
    assert errors > 100


def test_the_fingerprint_follows_config_and_headers(tmp_path, own):
    first = DFloat11Checkpoint.open(own).fingerprint
    folder = copied(own, tmp_path)
    assert DFloat11Checkpoint.open(folder).fingerprint == first
    edited(folder, lambda config: config.update(use_cache=False))
    assert DFloat11Checkpoint.open(folder).fingerprint != first


def test_a_constant_head(tmp_path):
    published(tmp_path / "in")
    unit = unit_of([weights([127] * 30 * H).reshape(30, H)])
    path = tmp_path / "in" / "lm_head.safetensors"
    save_file({f"lm_head.{name}": part for name, part in unit.items()}, path)
    found = bits(DFloat11Checkpoint.open(tmp_path / "in").read("lm_head.weight"))
    assert (found >> 7 & 255 == 127).all()
