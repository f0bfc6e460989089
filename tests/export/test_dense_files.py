"""Decoded tensors as an ordinary folder: shards, index, resuming."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewbit.export import dense_files
from fewbit.export.dense_files import write_dense
from fewbit.quant.errors import CheckpointError


@dataclass
class Source:
    """Tensors in memory; stops after some reads."""

    tensors: dict = field(
        default_factory=lambda: {f"t{i}": torch.full((64, 64), i) for i in range(6)}
    )
    config: dict = field(default_factory=lambda: {"model_type": "x"})
    extra_files: tuple[Path, ...] = ()
    left: int = 1000

    def read(self, name):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return self.tensors[name]


def held(folder):
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


@pytest.mark.parametrize("shard_bytes", [1 << 30, 70_000])
def test_all_tensors_are_written(tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(dense_files, "UNIT_BYTES", 40_000)
    monkeypatch.setattr(dense_files, "MAX_SHARD_BYTES", shard_bytes)
    extra = tmp_path / "tokenizer.json"
    extra.write_text("{}")
    names = write_dense(Source(extra_files=(extra,)), tmp_path / "out", "a")
    assert sorted(names) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert ("model.safetensors.index.json" in names) == (shard_bytes == 70_000)
    found = held(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in Source().tensors.items())


def test_an_interrupted_export_reads_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(dense_files, "UNIT_BYTES", 1)
    with pytest.raises(KeyboardInterrupt):
        write_dense(Source(left=3), tmp_path / "out", "a")
    assert not (tmp_path / "out" / "config.json").exists()
    rest = Source(left=3)
    with pytest.raises(CheckpointError, match=r"unfinished run with another from"):
        write_dense(rest, tmp_path / "out", "b")
    write_dense(rest, tmp_path / "out", "a")
    assert rest.left == 0 and len(held(tmp_path / "out")) == 6


def test_folders_of_others_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"exists and is not empty"):
        write_dense(Source(), tmp_path, "a")
