"""The bench of the GPU decoder, as far as it runs without one."""

import sys

import pytest
import torch

from bench import rans32_gpu
from bench.rans32_gpu import CASES, coded_weight, main, rows


def test_cases_are_of_real_sizes_and_of_all_orders():
    assert {case.dtype for case in CASES} >= {torch.bfloat16, torch.float16, torch.float32}
    block = next(case for case in CASES if case.name == "block")
    assert sum(n * k for n, k in block.shapes) == 218_103_808


def test_a_coded_weight_takes_two_thirds():
    weight, streams = coded_weight((256, 512), torch.bfloat16, (True, False), "cpu")
    assert streams.reach == weight.nbytes and streams.piece == 256 and streams.stride == 512
    assert 0.65 < (streams.n_bytes - 16384) / weight.nbytes < 0.69
    _, flat = coded_weight((33, 40), torch.bfloat16, (True, False), "cpu")
    assert flat.stride == 0 and flat.n == 33 * 40


def test_cases_that_do_not_fit_are_listed(monkeypatch):
    assert list(rows(0.0)) == [{"skipped": [case.name for case in CASES], "why": "time"}]
    monkeypatch.setattr(rans32_gpu, "CASES", CASES[:2])
    monkeypatch.setattr(rans32_gpu, "_timed", lambda case: {"bytes_per_second": 1.0})
    found = list(rows(10.0))
    assert [row["rans32"] for row in found] == ["bf16 tiles", "bf16 flat"]


def test_an_error_is_a_row(monkeypatch):
    def fail(case):
        raise RuntimeError("no memory")

    monkeypatch.setattr(rans32_gpu, "CASES", CASES[:1])
    monkeypatch.setattr(rans32_gpu, "_timed", fail)
    (row,) = rows(10.0)
    assert row["failed"] and "no memory" in row["why"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rans32_gpu"])
    assert main() == 2 and "cannot run here" in capsys.readouterr().err
