"""The device setting."""

import pytest
import torch
from fewbit.quant.device import resolve_device
from fewbit.quant.errors import RecipeError


def test_auto_and_cpu(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:7", "mps", ""])
def test_what_is_not_there_is_refused_by_name(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RecipeError, match="auto") as caught:
        resolve_device(device)
    assert repr(device) in str(caught.value)


def test_a_numbered_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
