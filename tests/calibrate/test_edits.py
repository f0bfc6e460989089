"""Edits: what they do to a tensor, how a source reads through them, how they are kept."""

from pathlib import Path

import pytest
import torch

from fewbit.calibrate.edits import (
    Edit,
    EditedSource,
    Fill,
    Permute,
    Rotate,
    Scale,
    Side,
    edits_bytes,
    load_edits,
    scale_pair,
)
from fewbit.quant.errors import CheckpointError
from fewbit.quant.hadamard import Hadamard
from transforming import RowSource, open_source

GENERATOR = torch.Generator().manual_seed(0)
NAME = "model.layers.0.mlp.up_proj.weight"  # [96, 64]


@pytest.fixture
def source(tmp_path: Path) -> RowSource:
    return open_source("llama", tmp_path)


def test_each_change_is_what_its_formula_says() -> None:
    w = torch.randn(6, 8, generator=GENERATOR)
    factors, order = torch.rand(8, generator=GENERATOR).double() + 0.5, torch.randperm(8)
    turn = Hadamard(4, 7)
    for change, wanted in (
        (Scale(factors), w * factors.float()),
        (Scale(factors, 1.0), (w + 1) * factors.float() - 1),
        (Permute(order), w[:, order]),
        (Rotate(turn), w @ torch.block_diag(turn.matrix(), turn.matrix()).float()),
        (Fill(2.5), torch.full_like(w, 2.5)),
    ):
        got = w.clone()
        Edit(Side("w", -1), change).apply(got)
        torch.testing.assert_close(got, wanted)


def test_a_pair_of_scales_keeps_the_product() -> None:
    up, down = torch.randn(6, 5).double(), torch.randn(4, 6).double()
    x = torch.randn(3, 5).double()
    wanted = (x @ up.T) @ down.T
    edits = scale_pair([Side("up", -2)], [Side("down", -1)], torch.rand(6).double() + 0.1)
    for edit in edits:
        edit.apply(up if edit.side.key == "up" else down)
    torch.testing.assert_close((x @ up.T) @ down.T, wanted, rtol=1e-12, atol=1e-12)


def test_unedited_tensors_are_the_source_s_own(source: RowSource) -> None:
    edited = EditedSource(source)
    assert edited.read(NAME) is source.tensors[NAME] or torch.equal(
        edited.read(NAME), source.tensors[NAME]
    )
    assert not edited.is_edited(NAME)


@pytest.mark.parametrize("axis", [-1, -2])
def test_slabs_of_rows_are_rows_of_the_whole(source: RowSource, axis: int) -> None:
    edited = EditedSource(source)
    edited.add([Edit(Side(NAME, axis), Rotate(Hadamard(32, 3)))])
    whole = edited.read(NAME)
    slabs = [edited.read(NAME, start, start + 10) for start in range(0, 96, 10)]
    assert torch.equal(torch.cat(slabs), whole)
    assert whole.dtype == torch.float32


def test_the_source_is_never_written_to(source: RowSource) -> None:
    before = source.tensors[NAME].clone()
    edited = EditedSource(source)
    edited.add([Edit(Side(NAME, -2), Fill(0.0)), Edit(Side(NAME, -1), Fill(1.0))])
    read = edited.read(NAME)
    read.fill_(5.0)
    assert torch.equal(source.tensors[NAME], before)
    assert bool((edited.read(NAME) == 1.0).all())


def test_wide_and_narrow_sources_are_edited_in_their_own_precision(tmp_path: Path) -> None:
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        edited = EditedSource(open_source("llama", tmp_path / str(dtype), dtype))
        edited.add([Edit(Side(NAME, -1), Rotate(Hadamard(64, 3)))])
        assert edited.read(NAME).dtype == wanted


def test_a_copy_starts_unedited(source: RowSource) -> None:
    edited = EditedSource(source)
    edited.add([Edit(Side(NAME, -1), Fill(1.0))])
    edited.add_copy("copy", NAME)
    assert torch.equal(edited.read("copy"), source.tensors[NAME])
    assert "copy" in edited.tensors and edited.copies == {"copy": NAME}


def test_an_edit_of_nothing_is_refused(source: RowSource) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        EditedSource(source).add([Edit(Side("nowhere", -1), Fill(1.0))])


def test_kept_edits_do_the_same(source: RowSource, tmp_path: Path) -> None:
    edits = [
        Edit(Side(NAME, -1), Rotate(Hadamard(64, 3))),
        Edit(Side(NAME, -2), Permute(torch.arange(95, -1, -1))),
        Edit(Side(NAME, -2), Scale(torch.rand(96, generator=GENERATOR).double(), 1.0)),
        Edit(Side("model.norm.weight"), Fill(1.0)),
    ]
    edits.append(Edit(Side("model.layers.1.mlp.up_proj.weight", -2), edits[1].change))  # shared
    path = tmp_path / "kept"
    path.write_bytes(edits_bytes(edits))
    first, second = EditedSource(source), EditedSource(source)
    first.add(edits)
    second.add(load_edits(path))
    for name in (NAME, "model.norm.weight"):
        assert torch.equal(first.read(name), second.read(name))


def test_no_edits_are_kept_too(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_bytes(edits_bytes([]))
    assert load_edits(path) == []
