"""The check notices a changed function, and nothing else."""

from pathlib import Path

import pytest
import torch

from fewbit.calibrate.check import (
    TOLERANCE,
    block_output,
    require_same,
    rounding_noise,
)
from fewbit.calibrate.edits import Edit, EditedSource, Rotate, Scale, Side, scale_pair
from fewbit.calibrate.model import ModelGraph
from fewbit.quant.errors import CalibrationError
from fewbit.quant.hadamard import Hadamard
from tiny_models import make_tokens
from transforming import CPU, open_source

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


def outputs(edits: list[Edit], folder: Path, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    source = open_source("llama", folder)
    edited = EditedSource(source)
    edited.add(edits)
    graph = ModelGraph(source.config, edited, dtype, CPU)
    item = graph.start(make_tokens(2, 16), 2)[0]
    return block_output(graph, 0, item, source), block_output(graph, 0, item)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kept_function_passes_whatever_the_graphs_dtype(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    edits = scale_pair([Side(UP, -2)], [Side(DOWN, -1)], torch.logspace(-2, 2, 96).double())
    before, after = outputs(edits, tmp_path, dtype)
    require_same(before, after, "smooth", "block 0")
    assert before.dtype == torch.float32 and float(before.abs().max()) > 0.1


@pytest.mark.parametrize("change", ["one side only", "one factor wrong"])
def test_a_changed_function_is_refused_by_name(change: str, tmp_path: Path) -> None:
    factors = torch.logspace(-1, 1, 96).double()
    edits = scale_pair([Side(UP, -2)], [Side(DOWN, -1)], factors)
    if change == "one side only":
        edits = edits[:1]
    else:
        slip = torch.ones(96).double()
        slip[7] = 1.01
        edits.append(Edit(Side(DOWN, -1), Scale(slip)))
    before, after = outputs(edits, tmp_path, torch.float32)
    with pytest.raises(CalibrationError, match="'smooth' would change the function of block 0"):
        require_same(before, after, "smooth", "block 0")


def test_a_new_basis_is_allowed_for_only_if_declared() -> None:
    basis, before = Hadamard(16, 5), torch.randn(2, 3, 16)
    require_same(before, basis.apply(before), "rotate", "x", basis)
    with pytest.raises(CalibrationError):
        require_same(before, basis.apply(before), "rotate", "x")


def test_the_original_runs_in_its_own_basis(tmp_path: Path) -> None:
    source = open_source("llama", tmp_path)
    edited, basis = EditedSource(source), Hadamard(64, 1)
    edited.add([Edit(Side("model.embed_tokens.weight", -1), Rotate(basis))])
    plain = ModelGraph(source.config, source, torch.float32, CPU)
    turned = ModelGraph(source.config, edited, torch.float32, CPU)
    a, b = (g.start(make_tokens(1, 16), 1)[0] for g in (plain, turned))
    wanted = block_output(plain, 0, a)
    torch.testing.assert_close(block_output(turned, 0, b, source, basis), wanted)


def test_what_rounding_alone_moves_is_allowed_for(tmp_path: Path) -> None:
    source = open_source("llama", tmp_path)
    graph = ModelGraph(source.config, source, torch.float32, CPU)
    item = graph.start(make_tokens(1, 16), 1)[0]
    assert rounding_noise(graph, 0, item) < 1e-5
    item.hidden *= 3e4  # next to such a residual, what the block adds loses its last digits
    noise = rounding_noise(graph, 0, item)
    assert noise > TOLERANCE
    before = block_output(graph, 0, item)
    moved = before * (1 + 4 * noise)
    require_same(before, moved, "rotate", "x", floor=lambda: noise)
    with pytest.raises(CalibrationError, match="rounding alone moves it by"):
        require_same(before, before * (1 + 20 * noise), "rotate", "x", floor=lambda: noise)


def test_the_noise_is_asked_for_only_if_the_tolerance_is_missed() -> None:
    def never() -> float:
        raise AssertionError("asked")

    require_same(torch.ones(2), torch.ones(2) * (1 + 1e-6), "rotate", "x", floor=never)


def test_nan_does_not_pass() -> None:
    before = torch.ones(2)
    with pytest.raises(CalibrationError):
        require_same(before, torch.tensor([1.0, float("nan")]), "rotate", "x")
