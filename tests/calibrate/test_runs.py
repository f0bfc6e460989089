"""Paused runs against reruns: the same statistics and hidden states, bit for bit."""

from pathlib import Path

import pytest
import torch

from fewbit.calibrate.collect import operands, stages
from fewbit.calibrate.model import ModelGraph
from fewbit.calibrate.runs import PausedRun, PausedRuns, Reruns, Stream, paused_bytes, start_runs
from fewbit.calibrate.structure import find_structure
from tiny_models import MemorySource, make_tokens, save

BLOCK = 1


class Setting:
    """Block 1 of a tiny model with two streams that differ."""

    def __init__(self, folder: Path, arch: str, dtype: torch.dtype) -> None:
        source = MemorySource(save(arch, folder, dtype=dtype))
        self.graph = ModelGraph(source.config, source, dtype, torch.device("cpu"))
        windows = make_tokens(6, 12, seed=1)
        self.inputs = self.graph.start(windows, 2)
        originals = self.graph.start(windows, 2)
        for item in self.inputs:
            item.hidden = item.hidden * 1.25
        module = self.graph.materialize(BLOCK)
        structure = find_structure(self.graph, BLOCK, self.inputs[0])
        found = operands(structure, self.graph.block_parameters(BLOCK))
        self.stages = [s for s in stages(found) if s.experts is None]
        twin = ModelGraph(source.config, source, dtype, torch.device("cpu"))
        self.quantized = Stream(self.graph, BLOCK, module, self.inputs)
        self.original = Stream(twin, BLOCK, twin.materialize(BLOCK), originals)

    def spoil(self, number: int) -> None:
        """Change the weights of a stage, as rounding does."""
        parameters = self.quantized.parameters()
        with torch.no_grad():
            for operand in self.stages[number].operands:
                parameters[operand.parameter].mul_(0.75)


def go(setting, runs):
    found = []
    try:
        for number in range(len(setting.stages)):
            found.append(runs.statistics(number))
            setting.spoil(number)
        runs.finish()
    finally:
        runs.close()
    return found, [item.hidden for item in setting.inputs]


@pytest.mark.parametrize("arch", ["llama", "gemma2", "phi3", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paused_and_rerun_are_bit_equal(arch, dtype, tmp_path):
    results = []
    for kind in (PausedRuns, Reruns):
        setting = Setting(tmp_path / kind.__name__, arch, dtype)
        assert len(setting.stages) >= 3
        results.append(go(setting, kind(setting.quantized, setting.original, setting.stages)))
    (paused, paused_hidden), (rerun, rerun_hidden) = results
    for a, b in zip(paused, rerun, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].tokens == b[key].tokens == 72
            assert torch.equal(a[key].hessian, b[key].hessian)
            assert torch.equal(a[key].drift, b[key].drift)
            assert a[key].drift.abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(paused_hidden, rerun_hidden, strict=True))


def test_choice_follows_memory_and_experts(tmp_path):
    dense = Setting(tmp_path / "dense", "llama", torch.float32)
    needed = paused_bytes([dense.quantized, dense.original], dense.stages)
    assert needed > 0
    at = start_runs(dense.quantized, dense.original, dense.stages, needed)
    below = start_runs(dense.quantized, dense.original, dense.stages, needed - 1)
    assert isinstance(at, PausedRuns)
    assert isinstance(below, Reruns)
    at.close()
    moe = Setting(tmp_path / "moe", "mixtral", torch.float32)
    structure = find_structure(moe.graph, BLOCK, moe.inputs[0])
    with_experts = list(stages(operands(structure, moe.graph.block_parameters(BLOCK))))
    assert isinstance(start_runs(moe.quantized, None, with_experts, 1 << 40), Reruns)


def test_abandoned_runs_end_and_errors_come_out(tmp_path):
    setting = Setting(tmp_path, "llama", torch.float32)
    runs = PausedRuns(setting.quantized, None, setting.stages)
    runs.statistics(0)
    runs.close()  # must not hang
    before = setting.inputs[0].hidden
    setting.inputs[0].hidden = before[..., :-1]
    runs = PausedRuns(setting.quantized, None, setting.stages)
    with pytest.raises(RuntimeError):
        runs.statistics(0)
    runs.close()


def test_stages_out_of_order_are_refused(tmp_path):
    setting = Setting(tmp_path, "llama", torch.float32)
    numbers = {o.parameter: i for i, s in enumerate(setting.stages) for o in s.operands}
    run = PausedRun(setting.quantized, 0, numbers)
    with pytest.raises(RuntimeError, match="expected to stop at stage 2, stopped at 0"):
        run.to_stage(2)
    run.close()
