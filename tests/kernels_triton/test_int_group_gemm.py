"""Products on bit planes against float64, over shapes, groups, widths and dtypes; honest configs."""

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
from fewbit.kernels_triton.int_group_gemm import KERNEL, configs, launch, prepare, seconds
from fewbit.quant.format import dequantize
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.kernel import Compiled, Config, Problem
from fewbit.quant.machine import device_names, load_device
from fewbit.quant.packed import PackedTensor, Term
from packed_weights import outlier_weight, pack, poisoned, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = load_device("h200")
PROBLEM = Problem(
    "int_group", IntGroupOptions(), 1, 16, 8192, 8192, torch.bfloat16, "cuda", machine=H200
)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}
GROUPS = (16, 32, 64, 128, "row")
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def config(block_m: int = 16, block_n: int = 64, split_k: int = 1) -> Config:
    return (
        ("block_m", block_m), ("block_n", block_n), ("warps", 4), ("stages", 3),
        ("split_k", split_k),
    )  # fmt: skip


def on_device(packed: PackedTensor) -> PackedTensor:
    (term,) = packed.terms
    parts = {name: part.to(DEVICE) for name, part in term.parts.items()}
    return PackedTensor(packed.shape, (Term(term.format, term.options, parts),))


def check(
    m: int, n: int, k: int, options: IntGroupOptions, dtype: torch.dtype, choice: Config
) -> None:
    packed = pack(outlier_weight(n, k), "int_group", options)
    x = poisoned(m, k, dtype, DEVICE)
    y = launch(x, prepare(on_device(packed), dtype), choice)
    assert (tuple(y.shape), y.dtype, y.is_contiguous()) == ((m, n), dtype, True)
    exact = x.cpu().double() @ dequantize(packed).double().T
    assert relative_error(y, exact) <= TOLERANCE[dtype] if m else y.numel() == 0


# ---- numbers --------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_and_group(bits: int, group: int | str) -> None:
    """Both dtypes of x and of scales, with zero points and without, in turn."""
    turn = bits + GROUPS.index(group)
    options = IntGroupOptions(bits, group, turn % 2 == 0, ("fp16", "bf16")[turn // 2 % 2])
    dtype = (torch.float16, torch.bfloat16)[(bits + turn // 3) % 2]
    check(5, 70, 200, options, dtype, config(split_k=2))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [0, 1, 2, 7, 16, 33])
def test_every_number_of_tokens(m: int, dtype: torch.dtype) -> None:
    check(m, 130, 264, IntGroupOptions(4, 64, symmetric=False), dtype, config(split_k=3))


@needs_triton
@settings(max_examples=12, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 200),
    k=st.integers(1, 400),
    bits=st.integers(2, 8),
    group=st.sampled_from(GROUPS),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    tile=st.sampled_from([(8, 64), (16, 128), (32, 64)]),
    split=st.integers(1, 5),
)
def test_any_shape(
    m: int, n: int, k: int, bits: int, group: int | str, symmetric: bool, dtype: torch.dtype,
    tile: tuple[int, int], split: int,
) -> None:  # fmt: skip
    check(m, n, k, IntGroupOptions(bits, group, symmetric), dtype, config(*tile, split))


@needs_triton
def test_parts_of_k_are_added_in_a_fixed_order() -> None:
    """Twice the same bits; one part and many differ by rounding only."""
    packed = on_device(pack(outlier_weight(64, 1024), "int_group", IntGroupOptions()))
    x = poisoned(3, 1024, torch.float16, DEVICE)
    layout = prepare(packed, torch.float16)
    once, again, whole = (launch(x, layout, config(split_k=s)) for s in (8, 8, 1))
    assert torch.equal(once, again)
    assert relative_error(once, whole) < 1e-3


@needs_triton
def test_many_tiles_of_tokens_are_all_made() -> None:
    """More than 8 tiles of M, so that tiles come in groups, the last one short."""
    packed = on_device(pack(outlier_weight(130, 64), "int_group", IntGroupOptions(4, 32)))
    layout = prepare(packed, torch.float16)
    x = poisoned(83, 64, torch.float16, DEVICE)
    y = launch(x, layout, config(8))
    exact = x.cpu().double() @ dequantize(packed).cpu().double().T
    assert relative_error(y, exact) <= 2e-3
    assert all(relative_error(a, b) <= 5e-3 for a, b in zip(y, exact, strict=True))


@needs_triton
def test_a_damaged_token_spoils_no_other() -> None:
    packed = on_device(pack(outlier_weight(20, 136), "int_group", IntGroupOptions()))
    x = torch.ones(3, 136, dtype=torch.float16, device=DEVICE)
    x[1, 135] = float("inf")
    y = launch(x, prepare(packed, torch.float16), config(split_k=2))
    assert torch.isfinite(y[[0, 2]]).all() and not torch.isfinite(y[1]).any()


@needs_triton
def test_large_scales_do_not_overflow_with_small_inputs() -> None:
    """bf16 scales beyond the range of fp16 multiply sums in fp32, not operands."""
    weight = outlier_weight(16, 128) * 2.0**24
    packed = pack(weight, "int_group", IntGroupOptions(4, 128, scale="bf16"))
    x = torch.randn(2, 128).half() * 2.0**-10
    y = launch(x.to(DEVICE), prepare(on_device(packed), torch.float16), config())
    assert relative_error(y, x.double() @ dequantize(packed).double().T) <= 2e-3


# ---- the op ---------------------------------------------------------------------------------


@needs_triton
def test_compilers_see_one_op() -> None:
    layout = prepare(on_device(pack(outlier_weight(20, 48), "int_group", IntGroupOptions())), None)
    x = torch.randn(3, 48, device=DEVICE).half()
    args = (x, layout.planes, layout.scale, None, 20, 4, 128, [16, 64, 4, 3, 1])
    torch.library.opcheck(
        torch.ops.fewbit.int_group_gemm.default, args, test_utils=("test_schema", "test_faketensor")
    )


# ---- configs and estimates ------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in device_names() if n != "cpu"])
@pytest.mark.parametrize("options", [IntGroupOptions(), IntGroupOptions(7, 16, False)])
def test_every_problem_has_configs_that_fit(name: str, options: IntGroupOptions) -> None:
    gpu = load_device(name)
    for m in (1, 16, 24, 64, 192, 4096):
        for n, k in ((8192, 8192), (1, 1), (1000, 1032)):
            problem = replace(PROBLEM, options=options, m_bucket=m, n=n, k=k, machine=gpu)
            found = configs(problem)
            assert found and len(set(found)) == len(found) and found == configs(problem)
            rows = -(-n // 128) * 128
            for choice in map(dict, found):
                assert rows % choice["block_n"] == 0
                assert choice["split_k"] <= -(-k // 128)
            assert min(seconds(problem, choice) for choice in found) < 1


def test_there_are_hundreds_of_configs_from_few_binaries() -> None:
    binaries = set()
    for m in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 1024):
        found = configs(replace(PROBLEM, m_bucket=m))
        assert (100 if m <= 128 else 20) <= len(found) <= 400
        binaries |= {choice[:-1] for choice in found}
    assert len(binaries) <= 60


@pytest.mark.parametrize(("version", "least"), [("3.2.0", 16), ("3.6.0", 8), ("3.10.1", 8)])
def test_old_compilers_want_16_tokens(
    version: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_triton, "VERSION", version)
    assert min(dict(choice)["block_m"] for choice in configs(PROBLEM.at(1))) == least


def test_estimates_know_what_is_measured_elsewhere() -> None:
    """Not below the limit of memory; parts of K help where tiles are few, and where they are many
    they do not; a spilled register rules a config out."""
    bandwidth = H200.bandwidth_bytes_per_second
    best = min(seconds(PROBLEM, choice) for choice in configs(PROBLEM))
    assert 8192**2 * 0.53 / bandwidth < best < 2 * 8192**2 * 0.53 / bandwidth
    few = replace(PROBLEM, n=1024)
    assert seconds(few, config(16, 128, 8)) < seconds(few, config(16, 128, 1))
    many = replace(PROBLEM, n=65536, m_bucket=1024)
    assert seconds(many, config(128, 128, 1)) < seconds(many, config(128, 128, 8))
    assert seconds(PROBLEM, config(), Compiled(128, 8, 0, 128, "")) == float("inf")
    assert seconds(replace(PROBLEM, machine=None), config()) == 1.0


def test_wider_codes_take_longer() -> None:
    times = [
        min(seconds(problem, choice) for choice in configs(problem))
        for problem in (replace(PROBLEM, options=IntGroupOptions(bits)) for bits in range(2, 9))
    ]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("tile", "cc", "copies"),
    [
        ((16, 128, 4), (9, 0), 1),
        ((16, 64, 8), (9, 0), 2),
        ((8, 128, 4), (9, 0), 1),  # too few tokens for a warp group
        ((16, 128, 4), (8, 0), 1),
        ((64, 128, 8), (8, 0), 2),  # 4 warps along N, 2 along M
    ],
)
def test_warps_that_decode_the_same(
    tile: tuple[int, int, int], cc: tuple[int, int], copies: int
) -> None:
    assert int_group_gemm._copies(*tile, cc) == copies


# ---- compilation ----------------------------------------------------------------------------

COMPILE = """
from dataclasses import replace
import torch
from fewbit.kernels_triton.int_group_gemm import KERNEL
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.kernel import Problem
names = ("block_m", "block_n", "warps", "stages", "split_k")
for cc, options, dtype, numbers in (
    ((9, 0), IntGroupOptions(), torch.float16, (16, 128, 4, 4, 2)),
    ((8, 0), IntGroupOptions(8, "row", False), torch.bfloat16, (8, 128, 4, 3, 1)),
    ((10, 0), IntGroupOptions(3, 64, True, "bf16"), torch.bfloat16, (16, 64, 4, 3, 1)),
):
    problem = Problem("int_group", options, 1, 16, 4096, 4096, dtype, "cuda")
    product, sums = KERNEL.compile(problem, tuple(zip(names, numbers)), cc)
    print(cc, product.stack_bytes, product.registers, product.threads, sums.stack_bytes)
"""


@needs_triton
def test_it_compiles_without_spills() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(") 0 " in line and line.endswith(" 0") for line in lines), lines


def test_the_record_is_found() -> None:
    from fewbit.quant.dispatch import kernels

    assert kernels()["triton_int_group"] is KERNEL and len(KERNEL.source) == 16


def refusal_codes(change: dict[str, Any]) -> set[str]:
    return {reason.code for reason in KERNEL.refuse(replace(PROBLEM, **change))}


def test_refusals() -> None:
    assert refusal_codes({}) == refusal_codes({"n": 7, "k": 5, "m_bucket": 4096}) == set()
    assert refusal_codes({"activation": "int8_token"}) == set()  # it comes rounded
    assert refusal_codes({"dtype": torch.float32, "device": "cpu"}) == {"DTYPE", "ARCH"}
