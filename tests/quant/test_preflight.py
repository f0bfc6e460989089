"""Before the work: disk and memory that do not suffice are named with figures."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from fewbit.quant import preflight
from fewbit.quant.errors import CheckpointError
from fewbit.quant.preflight import (
    RESIDENT_BYTES,
    check_resources,
    hidden_bytes,
    peak_resident_bytes,
    text_config,
)

GB = 10**9


def checkpoint(total=4 * GB, **config):
    tensors = {
        "a.weight": SimpleNamespace(shape=(total // 8 // 2,)),
        "down.weight": SimpleNamespace(shape=(4096, 11008)),
    }
    return SimpleNamespace(
        as_stored=False,
        name="org/model", total_bytes=total, n_parameters=total // 2, tensors=tensors,
        dtype=torch.bfloat16, config={"hidden_size": 4096, "num_hidden_layers": 32} | config,
    )  # fmt: skip


def windows(samples, length):
    return SimpleNamespace(windows=torch.zeros(samples, length, dtype=torch.int8))


@pytest.fixture
def machine(monkeypatch):
    """Sets free disk and free memory."""

    def has(disk=1000 * GB, memory=1000 * GB):
        usage = shutil._ntuple_diskusage(2 * disk, disk, disk)
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
        monkeypatch.setattr(preflight, "_available_memory", lambda: memory)

    return has


def test_one_line_says_what_the_run_takes(machine, tmp_path):
    machine(disk=81 * GB)
    line = check_resources(tmp_path, GB, checkpoint(), None)
    assert line.startswith("org/model: 4.0 GB in, 1.0 GB out; disk 1.1 GB of 81.0 GB;")
    assert line.endswith("about 20 s")  # 4 GB at the measured 200 MB/s
    assert "\n" not in line


def test_disk(machine, tmp_path):
    machine(disk=1_050_000_000)
    with pytest.raises(CheckpointError, match=r"needs 1\.1 GB of disk, 1\.1 GB are free"):
        check_resources(tmp_path, GB, checkpoint(), None)
    (tmp_path / "model.safetensors.partial").write_bytes(b"x" * 20_000_000)
    check_resources(tmp_path, GB, checkpoint(), None)  # what is there counts


def test_the_folder_need_not_exist(tmp_path):
    check_resources(tmp_path / "a" / "b", 1000, checkpoint(), None)
    assert not (tmp_path / "a").exists()


def test_memory(machine, tmp_path):
    machine(memory=GB // 4)
    with pytest.raises(CheckpointError, match=r"250\.0 MB are available; use a machine with more"):
        check_resources(tmp_path, GB, checkpoint(), None)
    with pytest.raises(CheckpointError, match="data-free recipe"):
        check_resources(tmp_path, GB, checkpoint(), windows(128, 512))
    machine(memory=None)  # a system that does not say
    check_resources(tmp_path, GB, checkpoint(), windows(128, 512))


def test_activations_that_wait_count_until_they_are_computed_again_instead(machine, tmp_path):
    own = 2 * 1024 * (11008 + 4 * 4096) * 2  # both models, widest input and four hidden states
    few, many = windows(2, 512), windows(128, 512)
    assert preflight._paused_bytes(checkpoint(), few) == own
    assert preflight._paused_bytes(checkpoint(), many) > preflight.PAUSED_BYTES
    gap = preflight._memory_needed(checkpoint(), few) - preflight._memory_needed(checkpoint(), many)
    hidden = hidden_bytes(checkpoint(), many) - hidden_bytes(checkpoint(), few)
    assert gap == own - hidden


def test_hidden_states_of_two_models_in_fp32():
    assert hidden_bytes(checkpoint(), None) == 0
    assert hidden_bytes(checkpoint(), windows(3, 5)) == 2 * 3 * 5 * 4096 * 4
    nested = checkpoint(text_config={"hidden_size": 10})
    assert hidden_bytes(nested, windows(3, 5)) == 2 * 3 * 5 * 10 * 4
    silent = checkpoint(hidden_size=None)
    assert hidden_bytes(silent, windows(3, 5)) >= hidden_bytes(checkpoint(), windows(3, 5))


def test_spilled_states_need_disk_not_memory(machine, tmp_path):
    large = windows(1024, 2048)
    spilled = hidden_bytes(checkpoint(), large)
    assert spilled > 4 * RESIDENT_BYTES
    machine(disk=spilled)
    with pytest.raises(CheckpointError, match="of disk"):
        check_resources(tmp_path, GB, checkpoint(), large)
    machine(disk=spilled + 2 * GB, memory=8 * GB)
    check_resources(tmp_path, GB, checkpoint(), large)


def test_this_machine_says_how_much_memory_it_has():
    available = preflight._available_memory()
    assert available is None or 10**7 < available < 10**16


@pytest.mark.parametrize("inner", [None, "text", 3])
def test_text_config_is_the_config_where_there_is_no_inner_one(inner):
    config = {"a": 1, "text_config": inner}
    assert text_config(config) is config


def test_peak_memory_follows_what_is_touched():
    before = peak_resident_bytes()
    block = torch.ones(before // 4 + (64 << 20) // 4)
    assert peak_resident_bytes() >= before + (32 << 20)
    assert block.numel() > 0
