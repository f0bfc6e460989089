"""Expanded weights are bit-equal to `reference.dense`; the product after it is torch's."""

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.kernels_triton import _triton, int_group_gemm
from fewbit.kernels_triton.dequantize import KERNEL, configs, dense, launch, prepare, seconds
from fewbit.quant import reference
from fewbit.quant.format import find_format
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.formats.int_two_level import IntTwoLevelOptions
from fewbit.quant.kernel import Compiled, Config, Problem
from fewbit.quant.machine import load_device
from fewbit.quant.packed import PackedTensor, Term
from packed_weights import outlier_weight, pack, poisoned

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBLEM = Problem(
    "int_group", IntGroupOptions(), 1, 2048, 8192, 8192, torch.bfloat16, "cuda",
    machine=load_device("h200"),
)  # fmt: skip
CONFIG: Config = (("block_n", 64), ("warps", 4))
DTYPES = (torch.float16, torch.bfloat16)
GROUPS = (16, 32, 64, 128, "row")
TWO_LEVEL = [
    IntTwoLevelOptions(group=group, dialect=dialect)
    for group in (32, 64, 128, "row")
    for dialect in ("offset", "zero")
]
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def on_device(packed: PackedTensor) -> PackedTensor:
    (term,) = packed.terms
    parts = {name: part.to(DEVICE) for name, part in term.parts.items()}
    return PackedTensor(packed.shape, (Term(term.format, term.options, parts),))


def check(packed: PackedTensor, dtype: torch.dtype) -> None:
    weight = dense(prepare(on_device(packed), dtype), dtype, CONFIG)
    assert weight.dtype == dtype and weight.stride(0) % 16 == 0 and weight.stride(1) == 1
    assert torch.equal(weight.cpu(), reference.dense(packed, dtype))


# ---- numbers --------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_and_group(bits: int, group: int | str) -> None:
    """Both dtypes of weights and of scales, with zero points and without, in turn."""
    turn = bits + GROUPS.index(group)
    options = IntGroupOptions(bits, group, turn % 2 == 0, ("fp16", "bf16")[turn // 2 % 2])
    check(pack(outlier_weight(70, 200), "int_group", options), DTYPES[(bits + turn // 3) % 2])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", TWO_LEVEL, ids=str)
def test_two_levels(options: IntTwoLevelOptions, dtype: torch.dtype) -> None:
    check(pack(outlier_weight(70, 200), "int_two_level", options), dtype)


@needs_triton
@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    bits=st.integers(2, 8),
    group=st.sampled_from(GROUPS),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-20, 20),
)
def test_any_shape(
    n: int, k: int, bits: int, group: int | str, symmetric: bool, dtype: torch.dtype, exponent: int
) -> None:
    """Weights of any size, those that are subnormal or infinite in fp16 among them."""
    options = IntGroupOptions(bits, group, symmetric, scale="bf16")
    check(pack(outlier_weight(n, k) * 2.0**exponent, "int_group", options), dtype)


@needs_triton
def test_every_code_of_every_second_level() -> None:
    """Rows are s2 = 1 … 17, columns all codes; offsets at both ends of int8."""
    options = IntTwoLevelOptions(group=32)
    steps = torch.arange(1, 18, dtype=torch.uint8).repeat(2).view(-1, 1)
    lowest = torch.full((17, 1), -128)
    offset = torch.cat([lowest, 127 - 15 * steps[:17].int()]).to(torch.int8)
    codes = (torch.arange(32) % 16).to(torch.uint8).expand(34, 32).contiguous()
    row = (torch.rand(34, 1) * 0.01 + 1e-4).half()
    scales = {"scale_row": row, "scale_group": steps, "offset_group": offset}
    parts = find_format("int_two_level").pack(codes, scales, options)
    packed = PackedTensor((34, 32), (Term("int_two_level", options, parts),))
    for dtype in DTYPES:
        check(packed, dtype)


@needs_triton
@pytest.mark.parametrize("m", [0, 1, 33])
def test_the_product_is_torchs(m: int) -> None:
    packed = pack(outlier_weight(37, 90), "int_group", IntGroupOptions(3, 32))
    x = poisoned(m, 90, torch.bfloat16, DEVICE)
    y = launch(x, prepare(on_device(packed), torch.bfloat16), CONFIG)
    assert tuple(y.shape) == (m, 37)
    expected = reference.linear(x, on_device(packed))
    assert torch.allclose(y, expected, rtol=0.01, atol=1e-3)


@needs_triton
def test_compilers_see_one_op() -> None:
    layout = prepare(on_device(pack(outlier_weight(20, 40), "int_group", IntGroupOptions())), None)
    args = (layout.planes, layout.scale, None, 20, 40, 4, 128, torch.float16, [64, 4])
    torch.library.opcheck(
        torch.ops.fewbit.expand_planes.default, args, test_utils=("test_schema", "test_faketensor")
    )


# ---- what may be asked ----------------------------------------------------------------------


def refusal_codes(change: dict[str, Any]) -> set[str]:
    return {reason.code for reason in KERNEL.refuse(replace(PROBLEM, **change))}


def test_refusals() -> None:
    assert refusal_codes({}) == set()
    two_level = {"format": "int_two_level", "options": IntTwoLevelOptions()}
    assert refusal_codes(two_level | {"activation": "int8_token"}) == set()
    assert refusal_codes({"format": "other", "options": None}) == {"FORMAT"}
    assert refusal_codes({"n_terms": 2, "dtype": torch.float32}) == {"TERMS", "DTYPE"}


def test_estimates_put_expansion_last_and_first() -> None:
    """Ahead of the other kernel with thousands of tokens, far behind with 16."""
    for m, ahead in ((16, False), (64, False), (4096, True)):
        problem = PROBLEM.at(m)
        ours = min(seconds(problem, c) for c in configs(problem))
        other = min(int_group_gemm.seconds(problem, c) for c in int_group_gemm.configs(problem))
        assert (ours < other) == ahead, (m, ours, other)


def test_estimates() -> None:
    """Traffic of 2.5 bytes a weight or more, then a product at three quarters of the peak."""
    best = min(seconds(PROBLEM, c) for c in configs(PROBLEM))
    least = 8192**2 * 2.53 / 4.8e12 + 2 * 2048 * 8192**2 / (0.75 * 989.5e12)
    assert least < best < 1.5 * least
    assert seconds(PROBLEM, CONFIG, Compiled(64, 8, 0, 128, "")) == float("inf")
    assert seconds(replace(PROBLEM, machine=None), CONFIG) == 1.0


COMPILE = """
import torch
from fewbit.kernels_triton.dequantize import KERNEL
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.formats.int_two_level import IntTwoLevelOptions
from fewbit.quant.kernel import Problem
config = (("block_n", 64), ("warps", 4))
for cc, name, options in (
    ((9, 0), "int_group", IntGroupOptions(7, 16, False)),
    ((12, 0), "int_two_level", IntTwoLevelOptions()),
):
    problem = Problem(name, options, 1, 512, 4096, 4096, torch.bfloat16, "cuda")
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
    assert len(lines) == 2 and all(") 0 " in line for line in lines), lines
