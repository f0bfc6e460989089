"""Products of few tokens on the fp32 units against float64; what is refused, chosen, compiled."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.kernels_triton import _triton, int_group_gemm
from fewbit.kernels_triton.int_group_gemv import KERNEL, configs, launch, prepare, seconds
from fewbit.quant.errors import NoKernelError
from fewbit.quant.format import dequantize
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.kernel import Compiled, Config, Problem
from fewbit.quant.machine import device_names, load_device
from fewbit.quant.packed import PackedTensor, Term
from packed_weights import outlier_weight, pack, poisoned, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBLEM = Problem(
    "int_group", IntGroupOptions(), 1, 1, 8192, 8192, torch.bfloat16, "cuda",
    machine=load_device("h200"),
)  # fmt: skip
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}
GROUPS = (16, 32, 64, 128, "row")
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def config(tokens: int = 4, block_n: int = 64, split_k: int = 1, stages: int = 2) -> Config:
    return (
        ("tokens", tokens), ("block_n", block_n), ("warps", 4), ("stages", stages),
        ("split_k", split_k),
    )  # fmt: skip


def check(
    m: int, n: int, k: int, options: IntGroupOptions, dtype: torch.dtype, choice: Config
) -> None:
    packed = pack(outlier_weight(n, k), "int_group", options)
    x = poisoned(m, k, dtype, DEVICE)
    y = launch(x, prepare(on_device(packed), dtype), choice)
    assert (tuple(y.shape), y.dtype, y.is_contiguous()) == ((m, n), dtype, True)
    exact = x.cpu().double() @ dequantize(packed).double().T
    assert relative_error(y, exact) <= TOLERANCE[dtype] if m else y.numel() == 0


def on_device(packed: PackedTensor) -> PackedTensor:
    (term,) = packed.terms
    parts = {name: part.to(DEVICE) for name, part in term.parts.items()}
    return PackedTensor(packed.shape, (Term(term.format, term.options, parts),))


@needs_triton
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_and_group(bits: int, group: int | str) -> None:
    """Both dtypes of x and of scales, with zero points and without, in turn."""
    turn = bits + GROUPS.index(group)
    options = IntGroupOptions(bits, group, turn % 2 == 0, ("fp16", "bf16")[turn // 2 % 2])
    dtype = (torch.float16, torch.bfloat16)[(bits + turn // 3) % 2]
    check(1, 70, 200, options, dtype, config(1, split_k=2))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "tokens"), [(0, 1), (1, 1), (1, 4), (2, 2), (3, 4), (4, 4)])
def test_every_number_of_tokens(m: int, tokens: int, dtype: torch.dtype) -> None:
    check(m, 130, 264, IntGroupOptions(4, 64, symmetric=False), dtype, config(tokens, 128, 3, 1))


@needs_triton
@settings(max_examples=8, deadline=None)
@given(
    m=st.integers(1, 4),
    n=st.integers(1, 200),
    k=st.integers(1, 400),
    bits=st.integers(2, 8),
    group=st.sampled_from(GROUPS),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    split=st.integers(1, 5),
)
def test_any_shape(
    m: int, n: int, k: int, bits: int, group: int | str, symmetric: bool, dtype: torch.dtype,
    split: int,
) -> None:  # fmt: skip
    check(m, n, k, IntGroupOptions(bits, group, symmetric), dtype, config(split_k=split))


@needs_triton
def test_it_is_closer_than_tensor_cores_need_be() -> None:
    """Everything is fp32: what is lost is the rounding of y, 2^-11 at most."""
    packed = pack(outlier_weight(96, 640), "int_group", IntGroupOptions(4, 128))
    x = poisoned(1, 640, torch.float16, DEVICE)
    y = launch(x, prepare(on_device(packed), torch.float16), config(1)).cpu().double()
    exact = x.cpu().double() @ dequantize(packed).double().T
    assert ((y - exact).abs() <= exact.abs() * 2.0**-11 + 1e-4 * exact.abs().max()).all()


@needs_triton
def test_parts_of_k_are_added_in_a_fixed_order() -> None:
    packed = on_device(pack(outlier_weight(64, 1024), "int_group", IntGroupOptions()))
    x, layout = poisoned(2, 1024, torch.float16, DEVICE), prepare(packed, torch.float16)
    once, again = (launch(x, layout, config(split_k=8)) for _ in range(2))
    assert torch.equal(once, again)


@needs_triton
def test_more_tokens_are_an_error() -> None:
    layout = prepare(on_device(pack(outlier_weight(16, 64), "int_group", IntGroupOptions())), None)
    x = torch.zeros(3, 64, dtype=torch.float16, device=DEVICE)
    with pytest.raises(NoKernelError, match="at most 2 tokens, got 3"):
        launch(x, layout, config(2))


@needs_triton
def test_compilers_see_one_op() -> None:
    layout = prepare(on_device(pack(outlier_weight(20, 48), "int_group", IntGroupOptions())), None)
    x = torch.randn(2, 48, device=DEVICE).half()
    args = (x, layout.planes, layout.scale, None, 20, 4, 128, [2, 64, 4, 1, 1])
    torch.library.opcheck(
        torch.ops.fewbit.int_group_gemv.default, args, test_utils=("test_schema", "test_faketensor")
    )


# ---- what may be asked ----------------------------------------------------------------------


def test_refusals() -> None:
    assert not KERNEL.refuse(PROBLEM) and not KERNEL.refuse(PROBLEM.at(4))
    (reason,) = KERNEL.refuse(PROBLEM.at(8))
    assert reason.code == "SHAPE_M" and "got a bucket of 8" in reason.text and reason.fix
    both = KERNEL.refuse(replace(PROBLEM.at(16), dtype=torch.float32))
    assert {reason.code for reason in both} == {"SHAPE_M", "DTYPE"}


@pytest.mark.parametrize("name", [n for n in device_names() if n != "cpu"])
def test_every_problem_has_configs_that_fit(name: str) -> None:
    for m in (1, 2, 4):
        for n, k in ((8192, 8192), (1, 1), (1000, 1032)):
            problem = replace(PROBLEM.at(m), n=n, k=k, machine=load_device(name))
            found = configs(problem)
            assert found and len(set(found)) == len(found) and found == configs(problem)
            for choice in map(dict, found):
                assert choice["tokens"] == m and -(-n // 128) * 128 % choice["block_n"] == 0
            assert min(seconds(problem, choice) for choice in found) < 1


def test_estimates() -> None:
    """Bound by memory at best; more tokens cost more; spilled registers rule a config out."""
    best = [min(seconds(p, c) for c in configs(p)) for p in map(PROBLEM.at, (1, 2, 4))]
    assert 8192**2 * 0.53 / 4.8e12 < best[0] < best[1] < best[2]
    assert seconds(PROBLEM, config(1), Compiled(128, 8, 0, 128, "")) == float("inf")
    assert seconds(replace(PROBLEM, machine=None), config(1)) == 1.0


def test_tensor_cores_win_at_4_tokens() -> None:
    four = PROBLEM.at(4)
    other = min(int_group_gemm.seconds(four, c) for c in int_group_gemm.configs(four))
    assert other < min(seconds(four, c) for c in configs(four))


COMPILE = """
import torch
from fewbit.kernels_triton.int_group_gemv import KERNEL
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.kernel import Problem
names = ("tokens", "block_n", "warps", "stages", "split_k")
for cc, options, dtype, numbers in (
    ((9, 0), IntGroupOptions(), torch.bfloat16, (1, 128, 4, 1, 2)),
    ((8, 0), IntGroupOptions(5, 64, False), torch.float16, (2, 64, 4, 2, 1)),
):
    problem = Problem("int_group", options, 1, numbers[0], 4096, 4096, dtype, "cuda")
    product, sums = KERNEL.compile(problem, tuple(zip(names, numbers)), cc)
    opcodes = dict(product.opcodes)
    assert not {"HMMA", "HGMMA"} & set(opcodes) and opcodes["FFMA"] > 60
    print(cc, product.stack_bytes, product.registers, product.threads, sums.stack_bytes)
"""


@needs_triton
def test_it_compiles_without_spills_and_tensor_cores() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(") 0 " in line and line.endswith(" 0") for line in lines), lines
