"""One line for each distinct plan, and a warning where a plan is poor."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from fake_kernels import fake, only, pack
from fewbit.quant import dispatch
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.fused import fuse
from fewbit.quant.kernel import Problem
from fewbit.quant.kernel_summary import kernel_summary, log_summary, model_problems, plans
from fewbit.quant.linear import QuantLinear
from fewbit.quant.machine import load_device

BF16 = torch.bfloat16
OPTIONS = IntGroupOptions(4, 32)
H200 = load_device("h200")


def layer(n: int, k: int, activation: str | None = None) -> QuantLinear:
    options = IntGroupOptions(8, "row") if activation else OPTIONS
    return QuantLinear.from_packed(pack(torch.randn(n, k), options), None, BF16, activation)


def test_equal_layers_are_counted_and_shared_products_are_one() -> None:
    model = nn.ModuleDict({"a": layer(64, 32), "b": layer(64, 32), "c": layer(32, 64)})
    q, k = layer(64, 32, "int8_token"), layer(32, 32, "int8_token")
    model["q"], model["k"] = q, k
    fuse((q, k))
    found = model_problems(model)
    assert sorted((p.n, p.k, p.activation, count) for p, count in found.items()) == [
        (32, 64, None, 1),
        (64, 32, None, 2),
        (96, 32, "int8_token", 1),
    ]
    text = kernel_summary(model)
    assert text.splitlines()[0].startswith("2 x linear int_group bits=4 group=32")
    assert text.count(" x linear ") == 3 and "M = 1 " in text


def test_ranges_follow_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    grows = replace(fake("grows", 0.0), seconds=lambda p: p.m_bucket * 1e-7)
    only(monkeypatch, grows, fake("flat", 1e-6))
    problem = Problem("int_group", OPTIONS, 1, 1, 64, 64, BF16, "cpu")
    (line,) = plans({problem: 7})
    found = [(rung.first, rung.last, rung.chosen) for rung in line.rungs]
    assert found == [(1, 8, "grows"), (9, None, "flat")]
    assert "7 x linear" in line.text() and "M = 1 to 8 " in line.text()
    assert "M = 9 ..." in line.text() and line.warnings == ()


def test_poor_plans_are_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("int_group", OPTIONS, 1, 1, 8192, 8192, BF16, "cuda", machine=H200)
    only(monkeypatch, fake("good", 8e-6))
    assert plans({problem: 1})[0].warnings == ()
    only(monkeypatch, fake("poor", 80e-6))
    (first, *_) = plans({problem: 1})[0].warnings
    assert first.startswith("M = 1: ") and first.endswith(" of the limit")
    only(monkeypatch)
    assert "nothing but `reference` fits" in plans({problem: 1})[0].warnings[0]


def test_the_log_is_for_those_who_listen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.ModuleDict({"a": layer(64, 32)})
    only(monkeypatch)
    asked: list[None] = []
    whole = dispatch.kernels

    def kernels() -> object:
        asked.append(None)
        return whole()

    monkeypatch.setattr(dispatch, "kernels", kernels)
    with caplog.at_level(logging.WARNING, "fewbit"):
        log_summary(model)
    assert not asked and not caplog.records
    with caplog.at_level(logging.INFO, "fewbit"):
        log_summary(model)
    levels = [record.levelname for record in caplog.records]
    assert levels[0] == "INFO" and "WARNING" in levels and asked
