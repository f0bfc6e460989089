"""The demo, on a few tokens: one table with measured figures, two texts, nothing left behind."""

import tempfile
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fewbit.quant import demo as demo_module
from fewbit.quant.demo import demo
from fewbit.quant.evaluate import evaluate
from fewbit.quant.inspect import inspect

MODEL = Path(demo_module.__file__).parent / "data" / "tiny-llama"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(demo_module, "LENGTH", 64)
    monkeypatch.setattr(demo_module, "NEW_TOKENS", 4)
    few = partial(evaluate, max_tokens=256)
    monkeypatch.setattr(import_module("fewbit.quant.evaluate"), "evaluate", few)
    yield
    torch.set_num_threads(before)


def test_one_table_and_two_texts(capsys, tmp_path):
    out = tmp_path / "out"
    assert demo(str(out), "w4a16-rtn") == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:1] == ["bits/weight"])
    original, quantized = lines[head + 1].split(), lines[head + 2].split()
    assert original[0] == "original" and quantized[0] == "w4a16-rtn"
    assert float(original[1]) == 16 and float(quantized[1]) == 4.125
    assert int(quantized[2].replace(",", "")) < int(original[2].replace(",", "")) / 2
    assert float(original[4]) == pytest.approx(1.0, abs=2e-3)  # bf16 against float32
    assert float(original[5]) < 1e-3 and float(original[6]) > 0.95
    assert 0.9 < float(quantized[4]) < 1.2 and float(quantized[5]) > 3 * float(original[5])
    assert float(original[7]) > 0 and float(quantized[7]) > 0
    texts = [line for line in lines if demo_module.PROMPT in line]
    assert [text.split("]")[0] for text in texts] == ["[original", "[w4a16-rtn"]
    assert inspect(out, verify=True).verified
    found = evaluate(out, against=MODEL, length=64, max_tokens=256)
    assert float(quantized[3]) == pytest.approx(found.perplexity, abs=1e-3)


def test_nothing_is_left_behind(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert demo(None, "identity") == 0
    assert list(tmp_path.iterdir()) == []
    assert "identity" in capsys.readouterr().out
