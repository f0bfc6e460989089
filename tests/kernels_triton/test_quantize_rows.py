"""Fused rounding: the value is the model's, its codes are those of the definition, bit for bit."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fewbit.kernels_triton import _triton, quantize_rows
from fewbit.kernels_triton.quantize_rows import (
    RmsNorm,
    RmsNormOptions,
    SiluMulOptions,
    SummedRows,
)
from fewbit.quant.activation import RoundedRows
from fewbit.quant.errors import NoKernelError
from fewbit.quant.formats.int8_token import ACTIVATION
from fewbit.quant.kernel import Config, RowsProblem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16)
KERNELS = {kernel.op: kernel for kernel in quantize_rows.KERNELS}
WHOLE: Config = (("block", 512), ("rows", 2), ("warps", 4))
BLOCKS: Config = (("block", 256), ("rows", 1), ("warps", 4))
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def tensor(*shape: int, dtype: torch.dtype, seed: int = 0, outliers: bool = True) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if outliers:
        x[..., ::37] *= 50
    return x.to(dtype).to(DEVICE)


def llama_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """As in transformers' LlamaRMSNorm."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return gain * wide.to(x.dtype)


def gemma_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """As in transformers' Gemma3RMSNorm."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (1.0 + gain.float())).type_as(x)


def assert_nearly_all_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for a few in a thousand, and those by two units in the last place at most."""
    unit = torch.finfo(found.dtype).eps
    wrong = found != expected
    assert wrong.float().mean() <= 0.005 if wrong.numel() else True
    apart = (found.float() - expected.float()).abs()
    assert bool((apart <= 2 * unit * expected.float().abs() + 1e-7).all())


def assert_rounded(rows: SummedRows, value: torch.Tensor) -> None:
    """Codes, scales and totals are those of `value`; columns beyond it are zero."""
    expected, k = ACTIVATION.round(value), value.shape[1]
    assert torch.equal(rows.codes[:, :k], expected.codes) and not rows.codes[:, k:].any()
    assert torch.equal(rows.scale, expected.scale)
    assert torch.equal(rows.totals, expected.codes.sum(-1, keepdim=True, dtype=torch.int32))
    assert torch.equal(rows.sums(), expected.sums())


@needs_triton
@settings(max_examples=25, deadline=None)
@given(
    m=st.sampled_from([0, 1, 2, 7, 16, 33]),
    k=st.integers(1, 512),
    dtype=st.sampled_from(DTYPES),
    config=st.sampled_from([WHOLE, BLOCKS]),
    unit=st.booleans(),
    residual=st.booleans(),
    seed=st.integers(0, 100),
)
def test_norm(
    m: int, k: int, dtype: torch.dtype, config: Config, unit: bool, residual: bool, seed: int
) -> None:
    x, gain = tensor(m, k, dtype=dtype, seed=seed), tensor(k, dtype=dtype, seed=seed + 1)
    other = tensor(m, k, dtype=dtype, seed=seed + 2) if residual else None
    norm = RmsNorm(gain, 1e-6, unit)
    done = quantize_rows.rmsnorm_quantize(x, norm, other, keep=True, width=k + 3, config=config)
    total = x if other is None else x + other
    expected = (gemma_norm if unit else llama_norm)(total, gain, 1e-6)
    assert done.value is not None and done.value.dtype == dtype
    assert_nearly_all_equal(done.value, expected)
    assert_rounded(done.rows, done.value)
    if other is None:
        assert done.total is None
    else:
        assert done.total is not None and torch.equal(done.total, total)


@needs_triton
@settings(max_examples=25, deadline=None)
@given(
    m=st.sampled_from([0, 1, 2, 7, 16, 33]),
    k=st.integers(1, 512),
    dtype=st.sampled_from(DTYPES),
    config=st.sampled_from([WHOLE, BLOCKS]),
    seed=st.integers(0, 100),
)
def test_gated(m: int, k: int, dtype: torch.dtype, config: Config, seed: int) -> None:
    gate, up = (tensor(m, k, dtype=dtype, seed=seed + i) for i in (0, 1))
    done = quantize_rows.silu_mul_quantize(gate, up, keep=True, width=k + 3, config=config)
    assert done.value is not None and done.total is None
    assert_nearly_all_equal(done.value, functional.silu(gate) * up)
    assert_rounded(done.rows, done.value)


@needs_triton
def test_a_gate_far_from_zero() -> None:
    gate = torch.tensor([[-200.0, -88.5, -20.0, 0.0, 20.0, 200.0, 3e38, -3e38]]).bfloat16()
    up = torch.full_like(gate, 1.0)
    done = quantize_rows.silu_mul_quantize(gate.to(DEVICE), up.to(DEVICE), keep=True)
    assert done.value is not None
    assert_nearly_all_equal(done.value.cpu(), functional.silu(gate))


@needs_triton
@pytest.mark.parametrize("config", [WHOLE, BLOCKS])
def test_what_is_kept_does_not_change_the_codes(config: Config) -> None:
    x, gain = tensor(5, 300, dtype=torch.bfloat16), tensor(300, dtype=torch.bfloat16, seed=1)
    norm = RmsNorm(gain, 1e-5)
    plain = quantize_rows.rmsnorm_quantize(x, norm, config=config)
    kept = quantize_rows.rmsnorm_quantize(x, norm, keep=True, config=config)
    assert plain.value is None and plain.total is None
    assert torch.equal(plain.rows.codes, kept.rows.codes)
    assert torch.equal(plain.rows.scale, kept.rows.scale)


@needs_triton
def test_damaged_rows_stay_damaged_and_alone() -> None:
    x, gain = tensor(3, 64, dtype=torch.float16), tensor(64, dtype=torch.float16, seed=1)
    clean = quantize_rows.rmsnorm_quantize(x, RmsNorm(gain, 1e-5)).rows
    for bad in (float("nan"), float("inf")):
        x[1, 5] = bad
        rows = quantize_rows.rmsnorm_quantize(x, RmsNorm(gain, 1e-5)).rows
        assert not torch.isfinite(rows.scale[1])
        assert torch.equal(rows.codes[[0, 2]], clean.codes[[0, 2]])
        gate = torch.ones_like(x)
        assert not torch.isfinite(quantize_rows.silu_mul_quantize(gate, x).rows.scale[1])


@needs_triton
def test_records_launch_what_the_functions_do() -> None:
    x, gain = tensor(4, 256, dtype=torch.bfloat16), tensor(256, dtype=torch.bfloat16, seed=1)
    config: Config = (("block", 256), ("rows", 1), ("warps", 2))
    rows = KERNELS["quantize_rows"].launch(x, None, config)
    assert_rounded(rows, x)
    norm = RmsNorm(gain, 1e-6)
    found = KERNELS["rmsnorm_quantize"].launch((x, x), norm, config)
    assert torch.equal(found.total, x + x)
    alone = KERNELS["rmsnorm_quantize"].launch(x, norm, config)
    assert torch.equal(alone.rows.codes, quantize_rows.rmsnorm_quantize(x, norm).rows.codes)
    both = KERNELS["silu_mul_quantize"].launch(x, None, (("block", 128), ("rows", 1), ("warps", 1)))
    gate, up = x.chunk(2, -1)
    pair = KERNELS["silu_mul_quantize"].launch((gate, up), None, config)
    assert both.rows.codes.shape == (4, 128)
    assert torch.equal(both.rows.codes, pair.rows.codes)


@needs_triton
def test_other_kernels_may_take_the_rows() -> None:
    x = tensor(3, 50, dtype=torch.bfloat16)
    rows = quantize_rows.quantize(x)
    assert isinstance(rows, RoundedRows) and rows.codes.shape == x.shape
    assert torch.equal(rows.decode(torch.float32), ACTIVATION.round(x).decode(torch.float32))


def test_a_gain_of_another_dtype_is_named() -> None:
    x = torch.ones(2, 32, dtype=torch.bfloat16)
    with pytest.raises(NoKernelError, match=r"gain must be torch.bfloat16 .* got torch.float32"):
        quantize_rows.rmsnorm_quantize(x, RmsNorm(torch.ones(32), 1e-6))


def test_there_is_no_weight_to_prepare() -> None:
    for kernel in quantize_rows.KERNELS:
        with pytest.raises(NoKernelError, match=kernel.op):
            kernel.prepare(None, torch.bfloat16)


@needs_triton
def test_compilers_see_shapes_without_running() -> None:
    x, gain = torch.randn(4, 256).bfloat16(), torch.randn(256).bfloat16()
    config = [256, 1, 2]
    ops = torch.ops.fewbit
    for op, arguments in (
        (ops.quantize_rows, (x, 256, config)),
        (ops.rmsnorm_quantize, (x, gain, x, 1e-6, False, True, 512, [512, 1, 2])),
        (ops.rmsnorm_quantize, (x, gain, None, 1e-6, True, False, 256, config)),
        (ops.silu_mul_quantize, (x, x, True, 256, config)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_triton
def test_problems_tell_what_is_asked() -> None:
    options = RmsNormOptions(residual=True)
    problem = RowsProblem("rmsnorm_quantize", options, 8, 64, torch.float16, "cuda")
    assert "residual=True keep=False" in str(problem)
    assert KERNELS["rmsnorm_quantize"].configs(problem)
    assert {kernel.name for kernel in quantize_rows.KERNELS} == {f"triton_{op}" for op in KERNELS}
    cpu = replace(problem, device="cpu", options=SiluMulOptions())
    assert [reason.code for reason in KERNELS["silu_mul_quantize"].refuse(cpu)] == ["ARCH"]


COMPILED = """
import torch
from fewbit.kernels_triton import _compile
from fewbit.kernels_triton.quantize_rows import KERNELS, RmsNormOptions, SiluMulOptions
from fewbit.quant.kernel import RowsProblem
build, texts = _compile._build, []

def spied(*arguments):
    made = build(*arguments)
    texts.append(made.asm["ptx"])
    return made

_compile._build = spied
asked = (None, RmsNormOptions(True, True, True), SiluMulOptions(True))
for kernel, options in zip(KERNELS, asked, strict=True):
    problem = RowsProblem(kernel.op, options, 16, 2048, torch.float16, "cuda")
    (found,) = kernel.compile(problem, kernel.configs(problem)[-1], (8, 9))
    assert found.stack_bytes == 0, found
    print("fma.rn.f32" in texts[-1], "div.rn.f32" in texts[-1], "ld.global.v4" in texts[-1])
"""


@needs_triton
def test_records_compile_what_their_problem_asks() -> None:
    """Nothing is fused, divisions are exact, loads take 16 bytes."""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["False True True"] * 3
