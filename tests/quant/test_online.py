"""Transforms of inputs: by themselves on a CPU and under a gradient, by the chosen kernel on a GPU."""

from dataclasses import replace

import pytest
import torch

from fewbit.quant import dispatch, online
from fewbit.quant.dispatch import explain
from fewbit.quant.hadamard import Hadamard
from fewbit.quant.kernel import Kernel, RowsProblem
from fewbit.quant.machine import load_device
from fewbit.quant.online import hadamard_launch, transformed
from fewbit.quant.reference import HADAMARD

TURN = Hadamard(64, 5)


class Doubled:
    """A transform that is no Hadamard."""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_on_a_cpu_a_transform_applies_itself() -> None:
    x = torch.randn(3, 2, 128)
    assert torch.equal(transformed(TURN, x), TURN.apply(x))
    assert torch.equal(transformed(Doubled(), x), 2 * x)
    leaf = x.clone().requires_grad_()
    transformed(TURN, leaf).square().sum().backward()
    assert leaf.grad is not None and torch.allclose(leaf.grad, 2 * x, atol=1e-5)


def test_the_choice_is_made_once_for_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[RowsProblem] = []
    told: list[object] = []

    def launch(x: torch.Tensor, layout: object, config: object) -> torch.Tensor:
        told.append(config)
        return layout.apply(x)  # type: ignore[attr-defined]

    config = (("warps", 4),)
    fast = Kernel(
        "fast", lambda p: (), lambda t, d: t, launch, lambda p, c, made=None: 1e-9,
        op="hadamard", configs=lambda problem: (config,),
    )  # fmt: skip
    table = {"fast": fast, "hadamard_torch": HADAMARD}
    monkeypatch.setattr(dispatch, "kernels", lambda: table)
    whole = dispatch.choice

    def choice(problem: RowsProblem) -> object:
        asked.append(problem)
        return whole(problem)

    monkeypatch.setattr(dispatch, "choice", choice)
    monkeypatch.setattr(online, "this_device", lambda backend: load_device("h200"))
    hadamard_launch.cache_clear()
    x = torch.randn(5, 128)
    for _ in range(3):
        y = hadamard_launch(TURN, 8, 128, torch.float32, "cuda", ())(x)
        assert torch.equal(y, TURN.apply(x))
    hadamard_launch.cache_clear()
    assert len(asked) == 1 and told == [config] * 3
    assert asked[0].options == TURN and asked[0].m_bucket == 8 and asked[0].k == 128


def test_plain_torch_takes_what_nothing_else_takes() -> None:
    on_cpu = RowsProblem("hadamard", TURN, 1, 128, torch.float64, "cpu", load_device("cpu"))
    assert explain(on_cpu).chosen == "hadamard_torch"
    on_gpu = replace(on_cpu, dtype=torch.bfloat16, device="cuda", machine=load_device("h200"))
    assert explain(on_gpu).chosen == "triton_hadamard"
