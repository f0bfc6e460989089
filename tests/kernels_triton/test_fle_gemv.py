"""Products of few tokens against float64; they are chosen only where they were measured."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.kernels_triton import _triton
from fewbit.kernels_triton.fle_gemv import KERNEL, configs, launch, prepare, refuse, seconds
from fewbit.quant.dispatch import explain
from fewbit.quant.errors import NoKernelError
from fewbit.quant.formats.fle import FleOptions
from fewbit.quant.kernel import Compiled, Config, Problem
from fewbit.quant.machine import load_device
from fewbit.quant.policy import Policy, parse_rules
from fle_weights import any_bits, spread_weight, stored, words
from packed_weights import poisoned, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBLEM = Problem(
    "fle4", FleOptions(), 1, 1, 4096, 4096, torch.bfloat16, "cuda", machine=load_device("h200")
)  # fmt: skip
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
both = pytest.mark.parametrize("bits", [4, 3])


def config(tokens: int, split_k: int = 1) -> Config:
    return ("tokens", tokens), ("warps", 4), ("stages", 2), ("split_k", split_k)


def product(weight: torch.Tensor, x: torch.Tensor, bits: int, chosen: Config) -> torch.Tensor:
    return launch(x.to(DEVICE), prepare(stored(weight, bits, DEVICE), torch.bfloat16), chosen).cpu()


def check(weight: torch.Tensor, m: int, bits: int, chosen: Config) -> None:
    """Within the rounding of y to bf16, for each row of the weight by itself."""
    x = poisoned(m, weight.shape[1], torch.bfloat16, "cpu")
    y = product(weight, x, bits, chosen)
    exact = x.double() @ weight.double().T
    assert y.dtype == torch.bfloat16 and tuple(y.shape) == (m, weight.shape[0])
    sizes = x.double().abs() @ weight.double().abs().T
    assert bool(((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 2.0**-18 * sizes).all())


# ---- numbers --------------------------------------------------------------------------------


@needs_triton
@both
@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(1, 140), k=st.integers(1, 300), m=st.integers(1, 8), split=st.integers(1, 4),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_any_shape(bits: int, n: int, k: int, m: int, split: int, seed: int) -> None:
    tokens = 1 << (m - 1).bit_length()
    check(spread_weight(n, k, 1.5, seed), m, bits, config(tokens, split))


@needs_triton
@both
def test_zeros_and_subnormals(bits: int) -> None:
    """Exponent 0 with a code of its own, and as an escape."""
    pruned = spread_weight(70, 130, 1.0)
    pruned[::2] = 0
    check(pruned, 3, bits, config(4))
    few = spread_weight(70, 130, 1.0)
    few[3, 5], few[64, 129] = 1e-39, -0.0
    check(few, 3, bits, config(4))


@needs_triton
@both
def test_every_weight_alone(bits: int) -> None:
    """Unit vectors as x: y is a column of the weight, every finite bf16 exactly."""
    weight = any_bits(66, 70)
    weight = torch.where(torch.isfinite(weight), weight, torch.zeros(()).bfloat16())
    columns = [0, 31, 32, 63, 64, 69]
    x = torch.zeros(len(columns), 70).bfloat16()
    x[range(len(columns)), columns] = 1
    y = product(weight, x, bits, config(8, 2))
    assert torch.equal(y + 0.0, weight[:, columns].T + 0.0)


@needs_triton
@both
def test_infinite_weights_show(bits: int) -> None:
    weight = torch.ones(4, 70).bfloat16()
    weight[1, 3], weight[2, 66] = float("inf"), float("nan")
    y = product(weight, torch.ones(1, 70).bfloat16(), bits, config(1))
    assert y[0].tolist()[:2] == [70.0, float("inf")] and y[0, 2].isnan() and y[0, 3] == 70


@needs_triton
@both
def test_a_row_does_not_depend_on_other_rows(bits: int) -> None:
    weight, x = spread_weight(70, 200), torch.randn(4, 200).bfloat16()
    together = product(weight, x, bits, config(4, 2))
    alone = torch.cat([product(weight, row[None], bits, config(4, 2)) for row in x])
    assert torch.equal(words(together), words(alone))


@needs_triton
def test_sizes_at_the_ends() -> None:
    layout = prepare(stored(spread_weight(20, 40), 4, DEVICE), torch.bfloat16)
    x = torch.randn(3, 40).bfloat16().to(DEVICE)
    assert tuple(launch(x[:0], layout, config(1)).shape) == (0, 20)
    with pytest.raises(NoKernelError, match="at most 2 tokens, got 3"):
        launch(x, layout, config(2))
    torch.library.opcheck(
        torch.ops.fewbit.fle_gemv.default,
        (x, layout.tensors, 20, 4, [4, 4, 1, 1]),
        test_utils=("test_schema", "test_faketensor"),
    )


@needs_triton
@both
def test_error_is_that_of_rounding_the_result(bits: int) -> None:
    weight, x = spread_weight(128, 1024, 0.3), torch.randn(2, 1024).bfloat16()
    y = product(weight, x, bits, config(2, 4))
    exact = x.double() @ weight.double().T
    rounded = relative_error(exact.bfloat16(), exact)
    print(f"fle{bits}: {relative_error(y, exact):.2e}, rounding alone {rounded:.2e}")
    assert relative_error(y, exact) <= 1.01 * rounded


# ---- what may be asked ----------------------------------------------------------------------


def test_it_runs_only_where_it_was_measured() -> None:
    """Also where its estimate is the best by far."""
    found = explain(PROBLEM)
    ours = min(seconds(PROBLEM, c) for c in configs(PROBLEM))
    assert ours < dict(found.eligible)[found.chosen] and found.chosen == "triton_fle_decode"
    (reason,) = found.refused[KERNEL.name]
    assert reason.code == "UNMEASURED" and "not measured" in found.text()
    forced = explain(PROBLEM, policy=Policy((parse_rules(KERNEL.name, "test"),)))
    assert forced.chosen == KERNEL.name and forced.config in configs(PROBLEM)


def test_refusals() -> None:
    assert not refuse(PROBLEM) and not refuse(PROBLEM.at(8))
    (reason,) = refuse(PROBLEM.at(16))
    assert reason.code == "SHAPE_M" and "at most 8 tokens" in reason.text


@pytest.mark.parametrize("k", [64, 1000, 4096, 28672, 1 << 20])
@pytest.mark.parametrize("n", [1, 4096, 1 << 18])
def test_configs(n: int, k: int) -> None:
    """There always are some, and programs have few tiles as long as K can be cut."""
    found = configs(replace(PROBLEM, n=n, k=k, m_bucket=8))
    assert found and len(set(found)) == len(found)
    splits = {dict(c)["split_k"] for c in found}
    assert all(dict(c)["tokens"] == 8 for c in found)
    across = -(-k // 64)
    assert max(-(-across // split) for split in splits) <= max(64, -(-across // 32))


def test_estimates() -> None:
    best = min(seconds(PROBLEM, c) for c in configs(PROBLEM))
    assert best > 4096**2 * 1.5 / 4.8e12
    assert min(seconds(PROBLEM.at(8), c) for c in configs(PROBLEM.at(8))) > best
    assert seconds(PROBLEM, config(1), Compiled(64, 8, 0, 128, "")) == float("inf")
    assert seconds(replace(PROBLEM, machine=None), config(1)) == 1.0


COMPILE = """
import torch
from fewbit.kernels_triton.fle_gemv import KERNEL
from fewbit.quant.formats.fle import FleOptions
from fewbit.quant.kernel import Problem
for cc in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
    for name in ("fle4", "fle3"):
        m, k = (8, 14336) if cc in ((8, 0), (9, 0)) else (1, 4096)
        problem = Problem(name, FleOptions(), 1, m, 4096, k, torch.bfloat16, "cuda")
        made = KERNEL.compile(problem, KERNEL.configs(problem)[-1 if cc == (9, 0) else 0], cc)
        print(cc, sum(part.stack_bytes for part in made), made[0].registers)
"""


@needs_triton
def test_it_compiles_without_spills() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5 * 2 and all(") 0 " in line for line in lines), lines
