"""Devices by name, and the dtype that calibration runs in."""

import pytest
import torch

from fewbit.quant import device as device_module
from fewbit.quant.device import calibration_dtype, resolve_device
from fewbit.quant.errors import RecipeError

CPU = torch.device("cpu")


def test_auto_is_a_gpu_if_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == expected
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize("name", ["tpu", "", "cuda:99", "meta", "cpu:x"])
def test_unknown_devices_are_named(name):
    with pytest.raises(RecipeError, match="device"):
        resolve_device(name)


@pytest.mark.parametrize("native", [True, False])
def test_bf16_only_where_the_processor_multiplies_it(native, monkeypatch):
    monkeypatch.setattr(device_module, "_cpu_multiplies_bf16", lambda: native)
    expected = torch.bfloat16 if native else torch.float32
    assert calibration_dtype(CPU, torch.bfloat16) == expected
    assert calibration_dtype(CPU, torch.float16) == torch.float32
    assert calibration_dtype(CPU, torch.float32) == torch.float32
    assert calibration_dtype(torch.device("cuda"), torch.float16) == torch.float16
