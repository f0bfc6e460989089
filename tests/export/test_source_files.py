"""Finding a source: folders, hub ids, indexes, numbered sets, files to copy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fewbit.export.source_files import find_weights, is_extra, list_files, locate, read_json
from fewbit.quant.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = "model.safetensors.index.json"


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def index(folder: Path, weight_map: object, name: str = INDEX) -> Path:
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def names(paths: tuple[Path, ...]) -> list[str]:
    return [path.name for path in paths]


@pytest.mark.parametrize(
    ("present", "read"),
    [
        (["model.safetensors"], ["model.safetensors"]),
        (["b.safetensors", "a.safetensors"], ["a.safetensors", "b.safetensors"]),
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (
            [
                "model-00002-of-00002.safetensors",
                "model-00001-of-00002.safetensors",
                "consolidated.safetensors",
            ],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
    ],
)
def test_which_files_count_without_an_index(
    tmp_path: Path, present: list[str], read: list[str]
) -> None:
    found = find_weights(touch(tmp_path, *present))
    assert names(found.paths) == read
    assert sorted(names(found.unindexed) + read) == sorted(present)
    assert (found.index_text, found.weight_map) == (b"", {})


@pytest.mark.parametrize("index_name", [INDEX, "diffusion_pytorch_model.safetensors.index.json"])
def test_an_index_decides(tmp_path: Path, index_name: str) -> None:
    touch(tmp_path, "a.safetensors", "sub/b.safetensors", "extra.safetensors")
    weight_map = {"x": "sub/b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}
    found = find_weights(index(tmp_path, weight_map, index_name))
    assert found.paths == (tmp_path / "a.safetensors", tmp_path / "sub/b.safetensors")
    assert names(found.unindexed) == ["extra.safetensors"]
    assert found.weight_map == weight_map
    assert found.index_text == (tmp_path / index_name).read_bytes()


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "weight_map is None"),
        ({}, "weight_map is {}"),
        ([1], r"weight_map is \[1\]"),
        ({"x": 3}, "places 'x' in 3"),
        ({"x": ""}, "places 'x' in ''"),
        ({"x": "/etc/a.safetensors"}, "inside the folder"),
        ({"x": "../a.safetensors"}, "inside the folder"),
        ({"x": "a.bin"}, "only safetensors files"),
        ({"x": "none.safetensors"}, r"1 missing file\(s\): 'none.safetensors'"),
        ({"x": "a\0.safetensors"}, "missing"),
        ({"x": "\ud800.safetensors"}, "missing"),
        ({"x": "x" * 5000 + ".safetensors"}, "missing"),
    ],
)
def test_a_bad_index_is_named(tmp_path: Path, weight_map: object, message: str) -> None:
    index(touch(tmp_path, "a.safetensors"), weight_map)
    with pytest.raises(CheckpointError, match=message) as caught:
        find_weights(tmp_path)
    assert INDEX in str(caught.value)


def test_several_indexes_are_ambiguous(tmp_path: Path) -> None:
    touch(tmp_path, "a.safetensors")
    for name in ("x.safetensors.index.json", "y.safetensors.index.json"):
        index(tmp_path, {"x": "a.safetensors"}, name)
    with pytest.raises(CheckpointError, match=r"several indexes: x.*y"):
        find_weights(tmp_path)
    assert names(find_weights(index(tmp_path, {"x": "a.safetensors"})).paths) == ["a.safetensors"]


def test_an_incomplete_numbered_set(tmp_path: Path) -> None:
    touch(tmp_path, "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"not model-00002-of-00003\.safetensors"):
        find_weights(tmp_path)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        (
            ["pytorch_model.bin", "x.json"],
            r"pickle weights only .pytorch_model\.bin.*save_pretrained",
        ),
        (["model.gguf"], "holds no"),
        (["unet/a.safetensors", "vae/b.safetensors"], "subfolders: unet, vae"),
        ([], "not a checkpoint"),
    ],
)
def test_folders_without_weights(tmp_path: Path, present: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_weights(touch(tmp_path, *present))


def test_files_to_copy(tmp_path: Path) -> None:
    wanted = ["LICENSE", "README.md", "chat_template.jinja", "generation_config.json"]
    wanted += ["merges.txt", "tokenizer.json", "tokenizer.model"]
    unwanted = ["config.json", INDEX, "modeling_x.py", "a.bin", "a.pt", "a.gguf", "a.safetensors"]
    unwanted += [".gitattributes", "hf_quant_config.json", "fewbit.json", "sub/vocab.json"]
    touch(tmp_path, *wanted, *unwanted)
    (tmp_path / "broken.json").symlink_to(tmp_path / "gone")
    assert [path.name for path in list_files(tmp_path) if is_extra(path)] == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "holds a list"),
        (b"\xff{}", "not valid JSON"),
        (b"[" * 100_000, "nests too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_bad_json_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(tmp_path / "config.json")
    assert "config.json" in str(caught.value)


def test_published_configs_may_hold_infinity(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert read_json(tmp_path / "config.json")[1] == {"time_step_limit": [0.0, float("inf")]}


def test_folders(tmp_path: Path) -> None:
    assert locate(str(tmp_path), None) == (tmp_path, None)
    snapshot = tmp_path / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    assert locate(str(snapshot), None) == (snapshot, COMMIT)
    with pytest.raises(CheckpointError, match="revision 'main' was asked of the folder"):
        locate(str(tmp_path), "main")
    with pytest.raises(CheckpointError, match="is not a folder"):
        locate(str(touch(tmp_path, "file") / "file"), None)
    for path in ("/none/such/path", "a/b/c", "./a", "name", "", "a b/c", "a\0b"):
        if path != "":
            with pytest.raises(CheckpointError, match="does not exist and is no hub id"):
                locate(path, None)


SCRIPT = """
import sys
from fewbit.export.source_files import locate
from fewbit.quant.errors import CheckpointError
asked = [("org/name", None), ("org/name", "v1"), ("org/name", "gone"), ("org/x", None)]
for name, revision in asked:
    try:
        folder, commit = locate(name, revision)
        print(folder.name, commit)
    except CheckpointError as error:
        print(error)
"""


def test_hub_ids_from_the_cache_without_a_network(tmp_path: Path) -> None:
    """The cache as the hub library lays it out; a new process, because it reads HF_* on import."""
    repository = tmp_path / "hub" / "models--org--name"
    touch(repository / "snapshots" / COMMIT, "model.safetensors")
    for ref in ("main", "v1"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(COMMIT)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"{COMMIT} {COMMIT}"] * 2
    assert len(lines) == 4, done.stdout
    for line, name in zip(lines[2:], ("org/name", "org/x"), strict=True):
        assert line.startswith(f"no folder {name!r} here, and the hub gives no such model")
        assert "hf auth login" in line


def test_a_pipe_in_place_of_json_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_json(tmp_path / "config.json")
