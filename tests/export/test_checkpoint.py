"""The source as a whole: what opens, what is refused, and that damage never passes unnamed."""

import json
import random
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.export.checkpoint import Checkpoint
from fewbit.quant.errors import CheckpointError

BUNDLED = Path(str(files("fewbit.quant"))) / "data" / "tiny-llama"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


def make(folder: Path, *shards: Tensors, config: object = None, indexed: bool = True) -> Path:
    """A checkpoint of one file, or of several with or without an index."""
    folder.mkdir(exist_ok=True, parents=True)
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors")
    else:
        weight_map = {}
        for number, tensors in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file(tensors, folder / name)
            weight_map |= dict.fromkeys(tensors, name)
        if indexed:
            (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def two_shards() -> tuple[Tensors, Tensors]:
    torch.manual_seed(0)
    first = {"a.weight": torch.randn(6, 4).bfloat16(), "a.bias": torch.randn(6)}
    return first, {"b.weight": torch.randn(3, 4).half(), "steps": torch.tensor(7)}


def test_the_bundled_model() -> None:
    found = Checkpoint.open(BUNDLED)
    expected = load_file(BUNDLED / "model.safetensors")
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found.read(name), tensor), name
        assert found.tensors[name].shape == tuple(tensor.shape)
        assert found.tensors[name].encoding == "plain"
    assert found.total_bytes == sum(tensor.nbytes for tensor in expected.values())
    assert found.n_parameters == sum(tensor.numel() for tensor in expected.values())
    assert (found.dtype, found.tied_embeddings) == (torch.bfloat16, False)
    assert found.config == json.loads((BUNDLED / "config.json").read_text())
    assert (found.name, found.revision) == (str(BUNDLED), None)
    assert {"tokenizer.json", "generation_config.json"} <= {p.name for p in found.extra_files}


@pytest.mark.parametrize("indexed", [True, False])
def test_shards(tmp_path: Path, indexed: bool) -> None:
    shards = two_shards()
    found = Checkpoint.open(make(tmp_path, *shards, indexed=indexed))
    for name, tensor in (shards[0] | shards[1]).items():
        assert torch.equal(found.read(name), tensor)
    assert torch.equal(found.read("a.weight", 2, 5), shards[0]["a.weight"][2:5])
    assert [name.split(".")[0] for name in found.tensors] == ["a", "a", "steps", "b"]
    assert found.config == {}, "a folder of tensors needs no config"
    assert (found.dtype, found.tied_embeddings) == (torch.bfloat16, None)
    with pytest.raises(IndexError):
        found.read("a.weight", 2, 7)
    with pytest.raises(CheckpointError, match=r"no tensor 'a.weigh' \(did you mean 'a.weight'"):
        found.read("a.weigh")


def test_files_beside_the_index_are_listed_not_read(tmp_path: Path) -> None:
    make(tmp_path, *two_shards())
    save_file({"mtp.weight": torch.ones(2)}, tmp_path / "mtp.safetensors")
    found = Checkpoint.open(tmp_path)
    assert [path.name for path in found.unindexed_files] == ["mtp.safetensors"]
    assert "mtp.weight" not in found.tensors


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": "torch.float32"}, torch.float32),
        ({"dtype": "float8_e4m3fn"}, torch.bfloat16),
        ({"dtype": 3}, torch.bfloat16),
    ],
)
def test_dtype(tmp_path: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    assert Checkpoint.open(make(tmp_path, *two_shards(), config=config)).dtype == dtype


def test_tied_embeddings_of_a_nested_config(tmp_path: Path) -> None:
    config = {"text_config": {"tie_word_embeddings": True}}
    assert Checkpoint.open(make(tmp_path, *two_shards(), config=config)).tied_embeddings is True


# --- encoded sources ----------------------------------------------------------------------------


def test_fp8_source_with_its_own_block_size(tmp_path: Path) -> None:
    weight = torch.randn(20, 24).to(torch.float8_e4m3fn)
    tensors = {"w.weight": weight, "w.weight_scale_inv": torch.rand(3, 2) + 0.5}
    scale = tensors["w.weight_scale_inv"]
    quantization = {"quant_method": "fp8", "weight_block_size": [8, 16]}
    found = Checkpoint.open(make(tmp_path, tensors, config={"quantization_config": quantization}))
    factors = scale.repeat_interleave(8, 0)[:20].repeat_interleave(16, 1)[:, :24]
    expected = (weight.float() * factors).bfloat16()
    assert list(found.tensors) == ["w.weight"]
    assert torch.equal(found.read("w.weight"), expected)
    assert torch.equal(found.read("w.weight", 7, 9), expected[7:9])
    assert found.total_bytes == 20 * 24 + 6 * 4
    assert found.n_parameters == 20 * 24


def test_companions_may_lie_in_another_shard(tmp_path: Path) -> None:
    first = {"e.up_blocks": torch.randint(0, 256, (2, 3, 1, 16), dtype=torch.uint8)}
    second = {"e.up_scales": torch.full((2, 3, 1), 127, dtype=torch.uint8)}
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    found = Checkpoint.open(make(tmp_path, first, second, config=config))
    assert found.tensors["e.up"].shape == (2, 32, 3)
    low = first["e.up_blocks"][1, 2, 0, 0].item() & 15
    assert found.read("e.up", 1, 2)[0, 0, 2].item() == [0, 0.5, 1, 1.5, 2, 3, 4, 6][low & 7] * (
        -1 if low > 7 else 1
    )


def test_nan_in_an_encoded_source_is_named(tmp_path: Path) -> None:
    weight = torch.zeros(4, 4, dtype=torch.uint8)
    weight[2, 1] = 0x7F
    tensors = {"w.weight": weight.view(torch.float8_e4m3fn), "w.weight_scale": torch.ones(())}
    found = Checkpoint.open(make(tmp_path, tensors))
    assert found.read("w.weight", 0, 2).eq(0).all()
    with pytest.raises(CheckpointError, match=r"'w.weight' holds NaN or Inf \(1 of 16.*row 2"):
        found.read("w.weight")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"already \('gptq'\)"),
        ({"quantization_config": {"quant_method": "fewbit"}}, "is a fewbit checkpoint"),
        ({"quantization_config": {"bits": 4}}, r"already \(None\)"),
        ({"quantization_config": "awq"}, r"already \('awq'\)"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "already"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "already"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}}, "block"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}}, "is 128"),
    ],
)
def test_encodings_that_are_not_read(tmp_path: Path, config: object, message: str) -> None:
    make(tmp_path, *two_shards(), config=config)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_float8_without_a_scale_is_refused(tmp_path: Path) -> None:
    make(tmp_path, {"w.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match=r"'w.weight' is float8_e4m3fn .* without a scale"):
        Checkpoint.open(tmp_path)


def test_side_file_of_another_tool_is_refused(tmp_path: Path) -> None:
    make(tmp_path, *two_shards(), config={})
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json"):
        Checkpoint.open(tmp_path)


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_named(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    tensor = torch.ones(5, 3, dtype=dtype)
    tensor[3, 1] = value
    found = Checkpoint.open(make(tmp_path, {"w": tensor}))
    assert torch.equal(found.read("w", 0, 3), tensor[:3])
    for start in (0, 2):
        with pytest.raises(CheckpointError, match=r"'w' holds NaN or Inf .*first in row 3"):
            found.read("w", start)


def test_values_whose_sum_overflows_are_finite(tmp_path: Path) -> None:
    tensors = {
        "large": torch.full((4, 4), 3e38),
        "half": torch.full((300, 300), 60000.0, dtype=torch.float16),
        "both": torch.tensor([3e38, 3e38, -3e38, -3e38]),
        "scalar": torch.tensor(1.0),
        "empty": torch.empty(0, 3),
    }
    found = Checkpoint.open(make(tmp_path, tensors))
    for name, tensor in tensors.items():
        assert torch.equal(found.read(name), tensor)


def test_duplicate_tensor(tmp_path: Path) -> None:
    make(tmp_path, {"a": torch.ones(1)}, {"a": torch.ones(1)}, indexed=False)
    with pytest.raises(CheckpointError, match=r"tensor 'a' is in .*00001.* and in .*00002"):
        Checkpoint.open(tmp_path)


def test_an_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    make(tmp_path, *two_shards())
    index = json.loads((tmp_path / INDEX).read_text())
    for name in ("ghost", "a.weight"):
        changed = {**index["weight_map"], name: "model-00002-of-00002.safetensors"}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(CheckpointError, match=f"places '{name}' in .*does not hold it"):
            Checkpoint.open(tmp_path)


def test_tensors_that_the_index_forgets_are_kept(tmp_path: Path) -> None:
    make(tmp_path, *two_shards())
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["a.bias"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "a.bias" in Checkpoint.open(tmp_path).tensors


def test_a_truncated_shard(tmp_path: Path) -> None:
    make(tmp_path, *two_shards())
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors: truncated: file has"):
        Checkpoint.open(tmp_path)


def test_no_tensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="without any tensor"):
        Checkpoint.open(make(tmp_path, {}))


def edit_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": 1} ')


def edit_index(folder: Path) -> None:
    (folder / INDEX).write_text((folder / INDEX).read_text() + " ")


def edit_header(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b"a.bias", b"c.bias"))
    (folder / INDEX).write_text((folder / INDEX).read_text().replace("a.bias", "c.bias"))


@pytest.mark.parametrize("edit", [edit_config, edit_index, edit_header])
def test_fingerprint(tmp_path: Path, edit: Callable[[Path], None]) -> None:
    first = make(tmp_path / "first", *two_shards(), config={"a": 1})
    second = make(tmp_path / "second", *two_shards(), config={"a": 1})
    fingerprint = Checkpoint.open(first).fingerprint
    assert fingerprint == Checkpoint.open(second).fingerprint, "the place does not matter"
    assert len(fingerprint) == 64
    edit(first)
    assert Checkpoint.open(first).fingerprint != fingerprint


def test_random_damage_is_named_or_harmless(tmp_path: Path) -> None:
    """Flips and cuts of headers, index and config. Values of tensors are left alone: safetensors
    carries no checksums, so that only NaN and Inf can be seen there."""
    quantization = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    encoded = {
        "f.weight": torch.randn(6, 4).to(torch.float8_e4m3fn),
        "f.weight_scale_inv": torch.ones(2, 1),
        "e.up_blocks": torch.randint(0, 256, (2, 3, 1, 16), dtype=torch.uint8),
        "e.up_scales": torch.full((2, 3, 1), 127, dtype=torch.uint8),
    }
    config = {"dtype": "bfloat16", "quantization_config": quantization}
    good = make(tmp_path / "good", two_shards()[0], encoded, config=config)
    sizes = {path.name: path.stat().st_size for path in good.iterdir()}
    for header in Checkpoint.open(good).shards:
        sizes[header.path.name] = header.header_bytes
    rng = random.Random(1)
    outcomes = {"opened": 0, "refused": 0}
    for _ in range(400):
        folder = tmp_path / "damaged"
        shutil.copytree(good, folder)
        damaged = folder / rng.choice(sorted(sizes))
        content = bytearray(damaged.read_bytes())
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        else:
            place = rng.randrange(sizes[damaged.name])
            content[place] ^= 1 << rng.randrange(8)
        damaged.write_bytes(content)
        outcomes[attempt(folder)] += 1
        shutil.rmtree(folder)
    assert outcomes["opened"] > 0
    assert outcomes["refused"] > 200, outcomes


def attempt(folder: Path) -> str:
    """Open and read everything; whatever is raised must be the named error."""
    try:
        found = Checkpoint.open(folder)
        for name, info in found.tensors.items():
            tensor = found.read(name)
            assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
    except CheckpointError as error:
        assert str(folder) in str(error)
        return "refused"
    return "opened"
