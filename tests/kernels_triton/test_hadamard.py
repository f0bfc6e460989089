"""Transforms by tensor cores against `Hadamard.apply` in float64: every form, order and direction."""

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.kernels_triton import _triton, hadamard
from fewbit.kernels_triton.hadamard import KERNEL, transform
from fewbit.quant.errors import NoKernelError
from fewbit.quant.hadamard import Hadamard
from fewbit.quant.kernel import Config, RowsProblem
from fewbit.quant.machine import load_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float32: 1e-6}
ORDERS = (1, 2, 4, 12, 20, 28, 64, 76, 96, 128, 256, 768, 1024, 4864)
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def rows(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(k))
    x[..., ::37] *= 50
    return x.to(DEVICE, dtype)


def check(x: torch.Tensor, form: Hadamard, config: Config | None = None) -> None:
    """Both directions."""
    for transposed in (False, True):
        layout = hadamard._prepare(form, x.dtype, transposed)
        found = transform(x, layout, config)
        assert found.shape == x.shape and found.dtype == x.dtype
        wide = x.double()
        wanted = form.apply_transposed(wide) if transposed else form.apply(wide)
        if x.numel():
            error = (found.double() - wanted).norm() / wanted.norm()
            assert error <= TOLERANCE[x.dtype], f"{form} {transposed}"


@needs_triton
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("order", ORDERS)
def test_orders(order: int, dtype: torch.dtype) -> None:
    blocks = 3 if order < 1000 else 1
    check(rows(2, order * blocks, dtype), Hadamard(order, seed=7))


@needs_triton
@pytest.mark.parametrize("order", [8192, 14336, 28672, 32768])
def test_large_orders(order: int) -> None:
    forms = {8192: "both", 14336: "both", 28672: "passes", 32768: "passes"}
    assert hadamard._form(order, torch.float16) == forms[order]
    check(rows(1, order, torch.float16), Hadamard(order, seed=7))


@needs_triton
@given(
    m=st.sampled_from([0, 1, 2, 7, 16, 33]),
    order=st.sampled_from([12, 16, 40, 128, 256]),
    blocks=st.integers(1, 3),
    seed=st.sampled_from([None, 0, 5]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
@settings(max_examples=20, deadline=None)
def test_rows_and_blocks(
    m: int, order: int, blocks: int, seed: int | None, dtype: torch.dtype
) -> None:
    check(rows(m, order * blocks, dtype), Hadamard(order, seed))


@needs_triton
@pytest.mark.parametrize("order", [64, 768, 28672])
def test_every_config_gives_the_same_numbers(order: int) -> None:
    form = Hadamard(order, seed=3)
    x = rows(1, order, torch.bfloat16)
    asked = RowsProblem("hadamard", form, 1, order, x.dtype, "cuda")
    assert KERNEL.configs is not None
    found = KERNEL.configs(asked)
    layout = hadamard._prepare(form, x.dtype)
    wanted = transform(x, layout, found[0])
    for config in found[1 :: max(1, len(found) // 6)]:
        torch.testing.assert_close(transform(x, layout, config), wanted, rtol=8e-3, atol=1e-3)


@needs_triton
def test_rows_that_are_a_slice_and_outputs_of_integers() -> None:
    """Small integers are exact in every step: each sum is compared without tolerance."""
    x = torch.randint(-4, 5, (5, 300), generator=torch.Generator().manual_seed(0))
    x = x.to(DEVICE, torch.float16)
    view = x[:, 20 : 20 + 256]
    assert not view.is_contiguous()
    found = transform(view, hadamard._prepare(Hadamard(64, 1), x.dtype))
    assert torch.equal(found.double(), Hadamard(64, 1).apply(view.double()))


@needs_triton
def test_the_transform_and_its_inverse_cancel() -> None:
    form = Hadamard(4864, seed=2)
    x = rows(1, 4864, torch.float32)
    there = transform(x, hadamard._prepare(form, x.dtype))
    back = transform(there, hadamard._prepare(form, x.dtype, True))
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-4)


@needs_triton
def test_compilers_see_one_operator() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = rows(3, 64, torch.float16)
    layout = hadamard._prepare(Hadamard(64, 1), x.dtype)
    operands = hadamard._operands(layout, x.dtype, x.device)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in (x, *operands)]
        shown = torch.ops.fewbit.triton_hadamard(*fake, [64, 1, 64], "before", [0, 16, 1])
    assert shown.shape == x.shape and shown.dtype == x.dtype


# ---- what may be asked, configs, estimates --------------------------------------------------


def problem(order: int = 4096, **changes: Any) -> RowsProblem:
    made = RowsProblem(
        "hadamard", Hadamard(order, 7), 16, order, torch.bfloat16, "cuda", load_device("h200")
    )
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("order", "changes", "code"),
    [
        (64, {"device": "cpu", "machine": load_device("cpu")}, "ARCH"),
        (64, {"dtype": torch.float64}, "DTYPE"),
        (64, {"k": 96}, "SHAPE_K"),
        (29568, {}, "SHAPE_K"),
    ],
)
def test_refusals(order: int, changes: dict[str, Any], code: str) -> None:
    assert KERNEL.refuse(problem()) == ()
    assert [reason.code for reason in KERNEL.refuse(problem(order, **changes))] == [code]


def test_an_order_without_factors_is_named() -> None:
    with pytest.raises(NoKernelError, match="29568"):
        hadamard._prepare(Hadamard(29568), torch.float16)


@pytest.mark.parametrize("order", [2, 128, 4096, 14336, 28672])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp16", "bf16", "fp32"])
def test_configs_and_estimates(order: int, dtype: torch.dtype) -> None:
    assert KERNEL.configs is not None
    asked = problem(order, dtype=dtype)
    found = KERNEL.configs(asked)
    assert found and len(set(found)) == len(found)
    assert all(0 < KERNEL.seconds(asked, config) < 1 for config in found)
    assert hadamard.default_config(asked.options, dtype) in found


_COMPILE = """
import torch
from fewbit.kernels_triton.hadamard import KERNEL
from fewbit.quant.hadamard import Hadamard
from fewbit.quant.kernel import RowsProblem
for order, config in ((128, (0, 32, 4)), (4096, (0, 0, 4)), (28672, (32, 16, 8))):
    asked = RowsProblem("hadamard", Hadamard(order, 7), 16, order, torch.bfloat16, "cuda")
    config = tuple(zip(("columns", "rows", "warps"), config))
    for found in KERNEL.compile(asked, config, (9, 0)):
        print(order, found.registers, found.smem_bytes, found.stack_bytes)
"""


@needs_triton
def test_compiles_without_a_gpu_and_without_spills() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all(line.split()[-1] == "0" for line in lines), done.stdout
