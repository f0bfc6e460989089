"""Triton where there is one, a stand-in where there is none, and the reasons that follow."""

import subprocess
import sys
from dataclasses import replace

import torch

from fewbit.kernels_triton import _triton
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.kernel import Problem
from fewbit.quant.machine import load_device

H200 = load_device("h200")
PROBLEM = Problem(
    "int_group", IntGroupOptions(), 1, 1, 64, 64, torch.bfloat16, "cuda", machine=H200
)

# What happens on a machine without Triton: every kernel module imports, refuses and is listed.
WITHOUT = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
from dataclasses import replace
import torch
from fewbit.kernels_triton import _triton
from fewbit.quant.dispatch import explain, kernels
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.kernel import Problem
from fewbit.quant.machine import load_device
assert not _triton.AVAILABLE and not _triton.interpreted()
assert "triton" not in sys.modules
ours = [k for k in kernels().values() if k.name.startswith("triton_")]
problem = Problem("int_group", IntGroupOptions(), 1, 1, 64, 64, torch.bfloat16, "cuda")
for kernel in ours:
    if kernel.op == "linear":
        codes = [reason.code for reason in kernel.refuse(problem)]
        assert "TOOLCHAIN" in codes, (kernel.name, codes)
here = replace(problem, machine=replace(load_device("h200"), present=True))
found = explain(here)
assert found.chosen == "reference"
described = explain(replace(problem, machine=load_device("h200")))
print(len(ours), described.chosen)
"""


def test_without_triton_kernels_refuse_here_and_are_described_elsewhere() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, chosen = done.stdout.split()
    assert int(count) >= 4 and chosen.startswith("triton_")


def test_the_stand_in_answers_what_modules_ask() -> None:
    absent = _triton._Absent()
    assert absent.constexpr is absent and absent.float32(1, x=2) is absent and absent[3] is absent


def test_other_devices_and_old_gpus_are_refused() -> None:
    assert not list(_triton.off_gpu(PROBLEM))
    (reason,) = _triton.off_gpu(replace(PROBLEM, device="cpu", machine=load_device("cpu")))
    assert reason.code == "ARCH" and "got cpu" in reason.text
    old = replace(H200, cc=(7, 5))
    (reason,) = _triton.off_gpu(replace(PROBLEM, machine=old))
    assert reason.code == "ARCH" and "got 7.5" in reason.text
