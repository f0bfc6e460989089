"""Rows as 8-bit integers: bit-equal to the definition, whatever the blocks; no memory besides."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.kernels_triton import _int8_rows, _triton
from fewbit.quant.errors import NoKernelError
from fewbit.quant.formats.int8_token import ACTIVATION
from fewbit.quant.kernel import RowsProblem
from fewbit.quant.machine import load_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16)
PROBLEM = RowsProblem(
    "quantize_rows", None, 4096, 4096, torch.bfloat16, "cuda", load_device("h200")
)
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")


def rounded(
    x: torch.Tensor, width: int | None = None, config: tuple[int, int, int] = (256, 1, 4)
) -> tuple[torch.Tensor, ...]:
    """codes, scale, totals of x."""
    tensors = (x.to(DEVICE), None, None)
    results = _int8_rows.run("plain", tensors, False, width or x.shape[1], config)
    return tuple(result.cpu() for result in results[:3])


@needs_triton
@settings(max_examples=40, deadline=None)
@given(
    m=st.sampled_from([0, 1, 2, 7, 16, 33]),
    k=st.integers(1, 700),
    extra=st.sampled_from([0, 5, 256]),
    config=st.sampled_from([(256, 1, 4), (256, 4, 2), (1024, 1, 8), (1024, 2, 4)]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_bit_equal_to_the_definition(
    m: int, k: int, extra: int, config: tuple[int, int, int], dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * 10.0 ** (
        torch.rand(m, 1, generator=generator) * 6 - 3
    )
    x[:, :: max(1, k // 3)] *= 40
    x = x.to(dtype)
    x[: m // 3] = 0
    codes, scale, totals = rounded(x, k + extra, config)
    expected = ACTIVATION.round(x)
    assert torch.equal(codes[:, :k], expected.codes) and not codes[:, k:].any()
    assert torch.equal(scale, expected.scale)
    assert torch.equal(totals, expected.codes.sum(-1, keepdim=True, dtype=torch.int32))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_go_to_the_even_code(dtype: torch.dtype) -> None:
    """With amax = 127 the factor is one, and x.5 is a tie."""
    x = torch.arange(-127, 127.5, 0.5)[None].to(dtype)
    codes, scale, _ = rounded(x)
    assert scale.item() == 1.0
    assert torch.equal(codes[0], x[0].float().round().to(torch.int8))


@needs_triton
def test_products_round_before_they_are_added() -> None:
    """Values whose exact product with 127 / amax lies beside a tie that the rounded product hits."""
    torch.manual_seed(0)
    x = torch.randn(64, 256).half()
    top = x.float().abs().amax(-1, keepdim=True)
    product = x.float() * (127 / top)
    exact = x.double() * (torch.full_like(top, 127) / top).double()
    assert bool((product.double() != exact).any())
    assert torch.equal(rounded(x)[0], ACTIVATION.round(x).codes)


@needs_triton
@pytest.mark.parametrize("config", [(256, 1, 4), (512, 2, 4)])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_damaged_rows_get_scales_that_are_not_finite(
    bad: float, config: tuple[int, int, int]
) -> None:
    x = torch.randn(3, 400).bfloat16()
    clean = rounded(x, config=config)
    x[1, 399] = bad
    codes, scale, totals = rounded(x, config=config)
    assert not torch.isfinite(scale[1]) and torch.isfinite(scale[[0, 2]]).all()
    for found, was in zip((codes, scale, totals), clean, strict=True):
        assert torch.equal(found[[0, 2]], was[[0, 2]])
    assert codes[1, 399] == 0


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_and_largest_rows(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([[0.0] * 5, [1e-7] * 5, [largest, -largest, 1, 0, 2]]).to(dtype)
    codes, scale, _ = rounded(x)
    expected = ACTIVATION.round(x)
    assert torch.equal(codes, expected.codes) and torch.equal(scale, expected.scale)
    assert torch.isfinite(scale).all() and codes[2, :2].tolist() == [127, -127]


@needs_triton
def test_memory_beside_the_rows_is_neither_read_nor_written() -> None:
    block = torch.full((6, 320), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    block[1:4, 7:307] = torch.randn(3, 300).bfloat16()
    x = block[1:4, 7:307]
    buffers = [torch.full((4096,), 99, dtype=torch.int8, device=DEVICE)]
    buffers += [torch.full((16,), 99, dtype=d, device=DEVICE) for d in (torch.float32, torch.int32)]
    codes, scale, totals = buffers[0][:1536].view(3, 512), *(b[:3].view(3, 1) for b in buffers[1:])
    for rows, block_size in ((4, 512), (2, 256)):
        _int8_rows.round_rows[(-(-3 // rows),)](
            x, x, x, codes, scale, totals, x, x, 3, 300, 512, 320, 320, 300.0, 0.0,
            ROWS=rows, BLOCK=block_size, WHOLE=block_size == 512, KIND="plain",
            OTHER=False, UNIT=False, KEEP=False, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        expected = ACTIVATION.round(x)
        assert torch.equal(codes[:, :300], expected.codes) and not codes[:, 300:].any()
        assert torch.equal(scale, expected.scale)
        assert all(bool((b[t.numel() :] == 99).all()) for b, t in zip(
            buffers, (codes, scale, totals), strict=True))  # fmt: skip


@needs_triton
def test_rows_in_any_order_of_memory() -> None:
    x = torch.randn(40, 9).half().to(DEVICE)
    for view in (x.T, x[::2], x[:, 3:]):
        codes, scale, *_ = _int8_rows.run(
            "plain", (view, None, None), False, view.shape[1], (256, 1, 1)
        )
        expected = ACTIVATION.round(view)
        assert torch.equal(codes, expected.codes) and torch.equal(scale, expected.scale)


def test_codes_cannot_be_narrower_than_rows() -> None:
    with pytest.raises(NoKernelError, match="64 values cannot be 32 wide"):
        _int8_rows.empty_results(torch.zeros(1, 64), 32, False, False)


def test_refusals() -> None:
    assert _int8_rows.refuse(PROBLEM) == ()
    for change, code in (
        ({"dtype": torch.float32}, "DTYPE"),
        ({"device": "cpu", "machine": load_device("cpu")}, "ARCH"),
    ):
        (reason,) = _int8_rows.refuse(replace(PROBLEM, **change))
        assert reason.code == code and reason.text and reason.fix


@pytest.mark.parametrize("k", [1, 100, 256, 4096, 14336, 16384, 16385, 65536, 200_000])
@pytest.mark.parametrize("m", [1, 8, 4096])
def test_configs_hold_what_registers_hold(m: int, k: int) -> None:
    found = _int8_rows.configs(replace(PROBLEM, m_bucket=m, k=k))
    assert 1 <= len(found) <= 40 and len(set(found)) == len(found)
    assert found == _int8_rows.configs(replace(PROBLEM, m_bucket=m, k=k))
    for config in found:
        choice = dict(config)
        assert choice["rows"] == 1 or choice["rows"] < m
        assert choice["rows"] * choice["block"] // choice["warps"] <= 2048
        assert (choice["block"] >= k) == (k <= 16384)
    default = dict(_int8_rows.default_config(m, k))
    assert default["block"] // default["warps"] <= 2048 and default["rows"] == 1


def test_many_rows_take_longer_and_spills_forever() -> None:
    from fewbit.quant.kernel import Compiled

    config = _int8_rows.default_config(4096, 4096)
    seconds = [_int8_rows.seconds(replace(PROBLEM, m_bucket=m), config) for m in (1, 256, 4096)]
    assert seconds == sorted(seconds) and seconds[0] < seconds[2]
    least = 4096 * 4096 * 3 / PROBLEM.machine.bandwidth_bytes_per_second
    assert least <= seconds[2] <= 3 * least
    spilled = Compiled(64, 8, 0, 128, "")
    assert _int8_rows.seconds(PROBLEM, config, spilled) == float("inf")
    assert _int8_rows.seconds(replace(PROBLEM, machine=None), config) == 1.0


COMPILED = """
from dataclasses import replace
from fewbit.kernels_triton import _int8_rows
from fewbit.quant.kernel import RowsProblem
import torch
for op, k, config in (
    ("rmsnorm_quantize", 16384, (("block", 16384), ("rows", 1), ("warps", 8))),
    ("silu_mul_quantize", 28672, (("block", 8192), ("rows", 1), ("warps", 8))),
):
    problem = RowsProblem(op, None, 4096, k, torch.bfloat16, "cuda")
    assert config in _int8_rows.configs(problem)
    found = _int8_rows.compiled(problem, config, (9, 0), True, False, True)
    assert found.stack_bytes == 0 and found.registers <= 255, found
    print(found.registers)
"""


@needs_triton
def test_the_heaviest_configs_compile_without_spills() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2
