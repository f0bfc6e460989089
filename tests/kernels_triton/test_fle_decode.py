"""Expanded weights have every bit of the original; products are torch's own, bit for bit."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.kernels_triton import _triton
from fewbit.kernels_triton.fle_decode import KERNEL, configs, dense, launch, prepare, seconds
from fewbit.quant.dispatch import explain
from fewbit.quant.formats.fle import FleOptions
from fewbit.quant.kernel import Compiled, Config, Problem
from fewbit.quant.machine import load_device
from fle_weights import any_bits, spread_weight, stored, words

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG: Config = (("warps", 4),)
PROBLEM = Problem(
    "fle4", FleOptions(), 1, 1, 8192, 8192, torch.bfloat16, "cuda", machine=load_device("h200")
)  # fmt: skip
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
both = pytest.mark.parametrize("bits", [4, 3])


def check(weight: torch.Tensor, bits: int, config: Config = CONFIG) -> None:
    found = dense(prepare(stored(weight, bits, DEVICE), torch.bfloat16), config)
    assert found.dtype == torch.bfloat16 and found.is_contiguous()
    assert torch.equal(words(found.cpu()), words(weight))


# ---- numbers --------------------------------------------------------------------------------


@needs_triton
@both
def test_all_patterns(bits: int) -> None:
    """NaN payloads, Inf, both zeros and subnormals among them."""
    pattern = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    order = torch.randperm(2**16, generator=torch.Generator().manual_seed(0))
    check(pattern[order].view(512, 128).view(torch.bfloat16), bits)


@needs_triton
@both
@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 200), k=st.integers(1, 200), seed=st.integers(0, 9), any_=st.booleans())
def test_any_shape(bits: int, n: int, k: int, seed: int, any_: bool) -> None:
    check(any_bits(n, k, seed) if any_ else spread_weight(n, k, 1.0, seed), bits)


@needs_triton
@both
def test_weights_without_escapes_and_with_a_code_for_zero(bits: int) -> None:
    check(torch.full((70, 70), -1.5).bfloat16(), bits)
    check(torch.zeros(65, 3).bfloat16(), bits)
    pruned = spread_weight(130, 130, 2.0)
    pruned[::3] = 0
    pruned[1::3, 5] = 1e-40  # subnormal
    check(pruned, bits)


@needs_triton
def test_more_escapes_in_a_tile_than_one_turn_writes() -> None:
    weight = torch.ones(64, 64).bfloat16()
    weight.view(-1)[5 : 5 + 97] = 2.0**70
    check(weight, 4)


@needs_triton
@both
@pytest.mark.parametrize("m", [0, 1, 33])
def test_the_product_is_torchs(bits: int, m: int) -> None:
    weight, x = spread_weight(90, 72, 0.5), torch.randn(m, 72).bfloat16()
    y = launch(x.to(DEVICE), prepare(stored(weight, bits, DEVICE), torch.bfloat16), CONFIG)
    wanted = torch.nn.functional.linear(x.to(DEVICE), weight.to(DEVICE))
    assert torch.equal(words(y), words(wanted))


@needs_triton
def test_compilers_see_one_op() -> None:
    layout = prepare(stored(spread_weight(20, 40), 4, DEVICE), torch.bfloat16)
    torch.library.opcheck(
        torch.ops.fewbit.expand_fle.default,
        (layout.tensors, 20, 40, 4, [4]),
        test_utils=("test_schema", "test_faketensor"),
    )


# ---- what may be asked ----------------------------------------------------------------------


def test_it_is_what_plans_choose_at_every_size() -> None:
    for name in ("fle4", "fle3"):
        for m in (1, 8, 512):
            assert explain(replace(PROBLEM, format=name, m_bucket=m)).chosen == "triton_fle_decode"


def test_estimates() -> None:
    """The traffic of 3.5 bytes a weight, then that of the product or its operations."""
    bandwidth = 4.8e12
    best = min(seconds(PROBLEM, config) for config in configs(PROBLEM))
    assert 8192**2 * 5.5 / bandwidth < best < 3 * 8192**2 * 5.5 / bandwidth
    many = PROBLEM.at(4096)
    assert min(seconds(many, c) for c in configs(many)) > best
    assert seconds(PROBLEM, CONFIG, Compiled(64, 8, 0, 128, "")) == float("inf")
    assert seconds(replace(PROBLEM, machine=None), CONFIG) == 1.0


COMPILE = """
import torch
from fewbit.kernels_triton.fle_decode import KERNEL
from fewbit.quant.formats.fle import FleOptions
from fewbit.quant.kernel import Problem
for cc in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
    for name in ("fle4", "fle3"):
        k = 1032 if cc in ((8, 9), (10, 0)) else 4096
        problem = Problem(name, FleOptions(), 1, 512, 4096, k, torch.bfloat16, "cuda")
        for config in KERNEL.configs(problem) if cc == (9, 0) else KERNEL.configs(problem)[1:2]:
            (made,) = KERNEL.compile(problem, config, cc)
            print(cc, made.stack_bytes, made.registers)
"""


@needs_triton
def test_it_compiles_without_spills() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * (4 + 3) and all(") 0 " in line for line in lines), lines
    assert KERNEL.source
