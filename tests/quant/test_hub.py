"""Folders, hub ids, and manifests that the hub library left behind; no network."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from fewbit.quant.errors import CheckpointError
from fewbit.quant.hub import fetch, fetch_manifest


class FakeHub:
    """Answers for one repository out of a folder; `asked` lists what it was asked for."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.asked = []

    def hf_hub_download(self, repo_id, filename, **options):
        self.asked.append((repo_id, filename, options))
        path = self.folder / filename
        if not path.exists():
            raise LocalEntryNotFoundError(f"{filename} is not in the cache")
        return str(path)

    def snapshot_download(self, repo_id, allow_patterns):
        self.asked.append((repo_id, tuple(allow_patterns), {}))
        return str(self.folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def write_config(folder, quantization):
    config = {"model_type": "llama", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_is_itself(tmp_path, hub):
    assert fetch(tmp_path) == tmp_path and fetch(str(tmp_path)) == tmp_path
    assert fetch(tmp_path / "absent") == tmp_path / "absent"
    assert not hub.asked


def test_a_hub_id_is_downloaded_without_pickles(tmp_path, hub):
    write_config(tmp_path, {"quant_method": "fewbit"})
    assert fetch("org/model-w4") == tmp_path
    assert hub.asked[0][:2] == ("org/model-w4", "config.json")
    assert "*.safetensors" in hub.asked[1][1] and "*.bin" not in hub.asked[1][1]


def test_a_foreign_model_costs_only_its_config(tmp_path, hub):
    write_config(tmp_path, {"quant_method": "awq"})
    with pytest.raises(CheckpointError, match=r"org/model is a checkpoint of quant_method 'awq'"):
        fetch("org/model")
    assert len(hub.asked) == 1


def test_an_unreachable_id(hub):
    with pytest.raises(CheckpointError, match="'org/none' is neither a folder here nor"):
        fetch("org/none")


def snapshot(tmp_path):
    folder = tmp_path / "cache" / "models--org--my-model" / "snapshots" / "abc123"
    folder.mkdir(parents=True)
    return folder


def test_the_manifest_is_fetched_from_the_same_commit(tmp_path, hub):
    folder = snapshot(tmp_path)
    (tmp_path / "fewbit.json").write_text("{}")
    fetch_manifest(folder)
    options = hub.asked[0][2]
    assert hub.asked[0][:2] == ("org/my-model", "fewbit.json")
    assert options["revision"] == "abc123" and options["subfolder"] is None
    assert options["cache_dir"] == (tmp_path / "cache").as_posix()


def test_the_manifest_is_not_fetched_twice_nor_for_a_folder(tmp_path, hub):
    fetch_manifest(tmp_path)
    folder = snapshot(tmp_path)
    (folder / "fewbit.json").write_text("{}")
    fetch_manifest(folder)
    assert not hub.asked


def test_a_manifest_out_of_reach_is_an_error(tmp_path, hub):
    with pytest.raises(CheckpointError, match=r"fewbit\.json.*cannot be fetched"):
        fetch_manifest(snapshot(tmp_path))


def test_a_repository_without_manifest_is_none(tmp_path, monkeypatch):
    def absent(*args, **options):
        raise RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
    folder = snapshot(tmp_path)
    fetch_manifest(folder)
