"""The writer: golden container bytes, resuming after any cut, named errors for damage."""

import errno
import json
import struct

import pytest
import torch
from safetensors.torch import load_file

from fewbit.export import journal as journal_module
from fewbit.export.chunked import crc32c
from fewbit.export.journal import JOURNAL
from fewbit.export.shards import UnitPlan, plan_shards, shard_names
from fewbit.export.writer import CheckpointWriter
from fewbit.quant.errors import CheckpointError
from fewbit.quant.format import PartSpec

IDENTITY = {"recipe": "r", "seed": 0}


def unit(index, rows=4):
    generator = torch.Generator().manual_seed(index)
    tensors = {
        f"u{index}.codes": torch.randint(0, 255, (rows, 3), dtype=torch.uint8, generator=generator),
        f"u{index}.scale": torch.randn(rows, generator=generator).half(),
    }
    plan = UnitPlan(f"u{index}", {n: PartSpec(t.dtype, tuple(t.shape)) for n, t in tensors.items()})
    return plan, tensors


def write_all(folder, units, stop_after=None, max_bytes=40, identity=None):
    writer = CheckpointWriter(folder, [plan for plan, _ in units], identity or IDENTITY, max_bytes)
    try:
        done = writer.open()
        for index in range(done, len(units)):
            if stop_after is not None and index >= stop_after:
                return writer
            tensors = units[index][1]
            writer.write_unit(
                ((n, t.split(2)) for n, t in tensors.items()), [{"name": f"u{index}"}]
            )
    finally:
        writer.abandon()
    return writer


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != JOURNAL}


def test_golden_bytes(tmp_path):
    tensor = torch.tensor([[1, 2], [3, 255]], dtype=torch.uint8)
    plan = UnitPlan("u", {"a.codes": PartSpec(torch.uint8, (2, 2))})
    write_all(tmp_path, [(plan, {"a.codes": tensor})])
    header = (
        b'{"__metadata__":{"format":"pt"},"a.codes":{"dtype":"U8","shape":[2,2],'
        b'"data_offsets":[0,4]}}'
    )
    padded = header.ljust(-(-len(header) // 8) * 8)
    expected = struct.pack("<Q", len(padded)) + padded + bytes([1, 2, 3, 255])
    assert (tmp_path / "model.safetensors").read_bytes() == expected


def test_reference_library_reads_the_same_tensors(tmp_path):
    units = [unit(i) for i in range(5)]
    write_all(tmp_path, units)
    names = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert names == shard_names(len(names)) and len(names) > 1
    found = {k: v for name in names for k, v in load_file(tmp_path / name).items()}
    expected = {k: v for _, tensors in units for k, v in tensors.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("stop", range(6))
@pytest.mark.parametrize("max_bytes", [1, 40, 10_000])
def test_interrupted_between_units_gives_the_same_bytes(tmp_path, stop, max_bytes):
    units = [unit(i) for i in range(5)]
    write_all(tmp_path / "whole", units, max_bytes=max_bytes)
    write_all(tmp_path / "cut", units, stop_after=stop, max_bytes=max_bytes)
    resumed = write_all(tmp_path / "cut", units, max_bytes=max_bytes)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")
    assert [row[0]["name"] for row in resumed.rows] == [f"u{i}" for i in range(5)]


def test_interrupted_inside_a_unit_loses_only_that_unit(tmp_path):
    units = [unit(i) for i in range(3)]
    write_all(tmp_path / "whole", units, max_bytes=10_000)
    write_all(tmp_path / "cut", units, stop_after=1, max_bytes=10_000)
    partial = tmp_path / "cut" / "model.safetensors.partial"
    with open(partial, "ab") as file:
        file.write(b"half a unit")
    assert write_all(tmp_path / "cut", units, stop_after=1, max_bytes=10_000).finished
    write_all(tmp_path / "cut", units, max_bytes=10_000)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


def test_torn_last_journal_line_is_dropped(tmp_path):
    units = [unit(i) for i in range(3)]
    write_all(tmp_path / "whole", units, max_bytes=10_000)
    write_all(tmp_path / "cut", units, stop_after=2, max_bytes=10_000)
    journal = tmp_path / "cut" / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-7])
    writer = CheckpointWriter(tmp_path / "cut", [p for p, _ in units], IDENTITY, 10_000)
    assert writer.open() == 1
    writer.abandon()
    write_all(tmp_path / "cut", units, max_bytes=10_000)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


def test_killed_between_rename_and_journal_line(tmp_path):
    units = [unit(i) for i in range(4)]
    write_all(tmp_path / "whole", units)
    write_all(tmp_path / "cut", units)
    journal = tmp_path / "cut" / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    for keep in range(1, len(lines)):
        journal.write_bytes(b"".join(lines[:keep]))
        write_all(tmp_path / "cut", units)
        assert files(tmp_path / "whole") == files(tmp_path / "cut"), keep


def test_every_flipped_journal_byte_is_an_error_or_harmless(tmp_path):
    units = [unit(i) for i in range(2)]
    write_all(tmp_path / "whole", units, max_bytes=10_000)
    write_all(tmp_path / "cut", units, stop_after=1, max_bytes=10_000)
    journal = tmp_path / "cut" / JOURNAL
    good = journal.read_bytes()
    named = 0
    for position in range(0, len(good), 3):
        damaged = bytearray(good)
        damaged[position] ^= 0x11
        journal.write_bytes(bytes(damaged))
        try:
            write_all(tmp_path / "cut", units, stop_after=1, max_bytes=10_000)
        except CheckpointError as error:
            named += "--restart" in str(error)
    assert named >= len(range(0, len(good), 3)) - 1
    journal.write_bytes(good)
    write_all(tmp_path / "cut", units, max_bytes=10_000)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


def test_other_identity_is_named(tmp_path):
    units = [unit(i) for i in range(2)]
    write_all(tmp_path, units, stop_after=1)
    with pytest.raises(CheckpointError, match="another seed: 0, now 7"):
        write_all(tmp_path, units, identity={"recipe": "r", "seed": 7})


def test_another_recipe_is_named_before_what_it_brings_along(tmp_path):
    units = [unit(i) for i in range(2)]
    calibrated = {"calibration": {"text": 1}, "recipe": {"bits": 4, "name": "w4a16"}}
    write_all(tmp_path, units, stop_after=1, identity=calibrated)
    other = {"calibration": None, "recipe": {"bits": 8, "name": "w8a16"}}
    with pytest.raises(CheckpointError, match=r"another recipe\.name: w4a16, now w8a16"):
        write_all(tmp_path, units, identity=other)


def test_extras_are_noted_once_and_do_not_disturb_resuming(tmp_path):
    units = [unit(i) for i in range(2)]
    for _ in range(2):
        writer = CheckpointWriter(tmp_path, [plan for plan, _ in units], IDENTITY, 40)
        writer.open()
        writer.note_extras(["tokenizer.json"])
        writer.note_extras([])
        writer.abandon()
        write_all(tmp_path, units, stop_after=1)
    lines = (tmp_path / JOURNAL).read_bytes().splitlines()
    assert [json.loads(line.rpartition(b"\t")[0])["event"] for line in lines].count("extras") == 1
    write_all(tmp_path, units)
    assert len(load_all(tmp_path)) == 4


def load_all(folder):
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def test_second_process_is_refused(tmp_path):
    plans = [unit(0)[0]]
    first = CheckpointWriter(tmp_path, plans, IDENTITY, 100)
    first.open()
    with pytest.raises(CheckpointError, match="another fewbit process"):
        CheckpointWriter(tmp_path, plans, IDENTITY, 100).open()
    first.abandon()


def test_strange_shard_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="no journal"):
        write_all(tmp_path, [unit(0)])
    assert (tmp_path / "model.safetensors").read_bytes() == b"x"


def test_full_disk_is_named_and_resumable(tmp_path, monkeypatch):
    units = [unit(i) for i in range(3)]
    write_all(tmp_path / "whole", units)
    real, calls = journal_module.os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    monkeypatch.setattr(journal_module.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"disk is full.*resume"):
        write_all(tmp_path / "cut", units)
    monkeypatch.undo()
    write_all(tmp_path / "cut", units)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


def test_tensors_outside_the_plan_are_refused(tmp_path):
    plan, tensors = unit(0)
    wrong = {name: tensor.float() for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match="planned"):
        write_all(tmp_path / "dtype", [(plan, wrong)])
    short = {name: tensor[:1] for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match="planned 12 bytes, computed 3"):
        write_all(tmp_path / "size", [(plan, short)])
    with pytest.raises(CheckpointError, match="planned but not written"):
        write_all(tmp_path / "missing", [(plan, dict(list(tensors.items())[:1]))])
    with pytest.raises(CheckpointError, match="out of plan"):
        write_all(tmp_path / "extra", [(plan, {**tensors, "more": torch.zeros(1)})])


def test_read_back_checks_the_checksum(tmp_path):
    units = [unit(i) for i in range(3)]
    writer = write_all(tmp_path, units, stop_after=2, max_bytes=10_000)
    assert torch.equal(writer.read_back(1, "u1.codes"), units[1][1]["u1.codes"])
    partial = tmp_path / "model.safetensors.partial"
    data = bytearray(partial.read_bytes())
    data[-1] ^= 1
    partial.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"u1\.scale is damaged"):
        writer.read_back(1, "u1.scale")


def test_shards_hold_whole_units():
    plans = [unit(i)[0] for i in range(5)]  # 20 bytes each
    assert plan_shards(plans, 45) == [[0, 1], [2, 3], [4]]
    assert plan_shards(plans, 1) == [[0], [1], [2], [3], [4]]


def test_crc32c_known_answer():
    assert crc32c(torch.tensor(list(b"123456789"), dtype=torch.uint8)) == "e3069283"
