"""What a weight remembers of its choices: plans, layouts, rounding, shapes."""

import gc
import time
from dataclasses import replace

import pytest
import torch

from fake_kernels import fake, only, pack
from fewbit.quant import cpu, dispatch, reference
from fewbit.quant.activation import find_activation
from fewbit.quant.errors import NoKernelError
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.hadamard import Hadamard
from fewbit.quant.kernel import Kernel, Problem
from fewbit.quant.ladder import Candidate
from fewbit.quant.packed import PackedTensor
from fewbit.quant.runner import Runner

BF16 = torch.bfloat16
vectorised = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch's packed operators need AVX2 or AVX-512",
)


@pytest.fixture(autouse=True)
def no_forced_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWBIT_KERNEL", raising=False)


@vectorised
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_runner_agrees_with_the_reference_at_every_bucket(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packed = pack(torch.randn(48, 96), IntGroupOptions(4, 32, symmetric=False))
    runner = Runner(packed)
    for m in (1, 3, 4, 5, 16, 33, 130):
        x = torch.randn(m, 96).to(dtype)
        exact = x.double() @ reference.dense(packed, torch.float64).T
        error = float((runner.linear(x).double() - exact).norm() / exact.norm())
        assert error < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,), (2, 0), (1, 1, 1)])
def test_runner_takes_any_leading_shape(lead: tuple[int, ...]) -> None:
    packed = pack(torch.randn(16, 32), IntGroupOptions(4, 32))
    x = torch.randn(*lead, 32)
    y = Runner(packed).linear(x)
    assert y.shape == (*lead, 16) and y.dtype == x.dtype
    assert torch.allclose(y, reference.linear(x, packed), rtol=1e-6, atol=1e-6)


def test_runner_takes_strided_inputs() -> None:
    packed = pack(torch.randn(16, 32), IntGroupOptions(4, 32))
    wide = torch.randn(4, 3, 64).to(BF16)
    for x in (wide[..., ::2], wide[..., :32].transpose(0, 1), wide[1:2, :1, 32:]):
        expected = reference.linear(x.contiguous(), packed).float()
        assert torch.allclose(Runner(packed).linear(x).float(), expected, rtol=0.03, atol=0.1)


def test_runner_refuses_a_stack() -> None:
    with pytest.raises(NoKernelError, match="take one expert"):
        Runner(pack(torch.randn(2, 4, 16), IntGroupOptions(4, 16)))


def test_plans_and_layouts_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[torch.dtype] = []
    kernel = replace(
        fake("counted", 1e-9),
        prepare=lambda packed, dtype: (prepared.append(dtype), packed)[1],
    )
    only(monkeypatch, kernel)
    asked: list[None] = []
    whole = dispatch.choice

    def choice(problem: Problem, ready: frozenset[str]) -> Candidate:
        asked.append(None)
        return whole(problem, ready)

    monkeypatch.setattr(dispatch, "choice", choice)
    runner = Runner(pack(torch.randn(16, 32), IntGroupOptions(4, 32)))
    for m in (1, 1, 7, 8, 1):
        runner.linear(torch.randn(m, 32))
    assert prepared == [torch.float32]  # one layout for both buckets
    assert len(asked) == 2  # the dispatcher is asked once for each bucket
    runner.linear(torch.randn(1, 32).to(BF16))
    assert prepared == [torch.float32, BF16]


def test_a_cached_weight_serves_later_buckets_when_the_budget_is_used_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "DENSE_BUDGET", cpu.DenseBudget(lambda: 0, limit=64 * 64 * 4))
    first, second = (Runner(pack(torch.randn(64, 64), IntGroupOptions(4, 64))) for _ in range(2))
    x = torch.randn(8, 64)
    first.linear(x)
    assert cpu.DENSE_BUDGET.room() == 0
    assert first.explain(500, torch.float32, "cpu").chosen == "dense_cached"
    assert second.explain(8, torch.float32, "cpu").chosen == "dense_chunked"
    assert torch.allclose(second.linear(x), reference.linear(x, second.packed), atol=1e-5)
    assert cpu.DENSE_BUDGET.held == 64 * 64 * 4
    del first
    gc.collect()
    assert cpu.DENSE_BUDGET.held == 0


def test_inputs_that_need_a_gradient_get_one() -> None:
    torch.manual_seed(1)
    packed = pack(torch.randn(16, 32), IntGroupOptions(4, 32))
    x = torch.randn(2, 3, 32, requires_grad=True)
    Runner(packed).linear(x).square().sum().backward()
    weight = reference.dense(packed, torch.float32)
    assert torch.allclose(x.grad, 2 * (x.detach() @ weight.T) @ weight, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not Runner(packed).linear(x).requires_grad


def test_a_planned_call_costs_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the kernel itself; the limit allows for a slow and busy machine."""
    y = torch.zeros(1, 16)
    only(monkeypatch, replace(fake("free", 1e-9), launch=lambda x, layout: y))
    runner = Runner(pack(torch.randn(16, 32), IntGroupOptions(4, 32)))
    x = torch.randn(1, 1, 32)
    runner.linear(x)
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            runner.linear(x)
        best = min(best, (time.perf_counter() - start) / 100)
    assert best < 20e-6


@pytest.mark.parametrize("options", [IntGroupOptions(8, "row"), IntGroupOptions(4, 16)])
@pytest.mark.parametrize("name", [None, "dense_cached", "dense_chunked", "reference"])
def test_every_kernel_computes_with_rounded_inputs(
    name: str | None, options: IntGroupOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding that is coarse enough to tell: one outlier takes the range of each row."""
    if name:
        monkeypatch.setenv("FEWBIT_KERNEL", name)
    torch.manual_seed(2)
    packed = pack(torch.randn(24, 48), options)
    x = torch.randn(5, 48)
    x[:, 7] = 400
    y = Runner(packed, "int8_token").linear(x)
    rounded = find_activation("int8_token").round(x).decode(torch.float32)
    assert torch.allclose(y, reference.linear(rounded, packed), rtol=1e-5, atol=1e-3)
    assert float((y - reference.linear(x, packed)).abs().max()) > 0.1
    if name == "reference":
        assert torch.equal(y, reference.linear(x, packed, "int8_token"))


def test_integer_kernels_get_x_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def launch(x: torch.Tensor, layout: object) -> torch.Tensor:
        seen.append(x)
        return x.new_zeros(x.shape[0], 16)

    plain = replace(fake("plain", 1e-9), launch=launch)
    integer = Kernel(
        "integer", plain.refuse, plain.prepare, launch, plain.seconds, activation="int8_token"
    )
    packed = pack(torch.randn(16, 32), IntGroupOptions(8, "row"))
    x = torch.randn(3, 32)
    for kernel in (plain, integer):
        only(monkeypatch, kernel)
        Runner(packed, "int8_token").linear(x)
    rounded = find_activation("int8_token").round(x).decode(torch.float32)
    assert torch.equal(seen[0], rounded) and torch.equal(seen[1], x)


def test_layouts_of_integer_kernels_serve_all_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[torch.dtype] = []
    plain = replace(
        fake("plain", 1e-9), prepare=lambda packed, dtype: (prepared.append(dtype), packed)[1]
    )
    integer = Kernel(
        "integer",
        plain.refuse,
        plain.prepare,
        plain.launch,
        plain.seconds,
        activation="int8_token",
    )
    for kernel, expected in ((plain, [torch.float32, BF16]), (integer, [torch.float32])):
        only(monkeypatch, kernel)
        prepared.clear()
        runner = Runner(pack(torch.randn(16, 32), IntGroupOptions(8, "row")), "int8_token")
        for dtype in (torch.float32, BF16, torch.float32):
            runner.linear(torch.randn(2, 32).to(dtype))
        assert prepared == expected


def test_autocast_reaches_neither_layouts_nor_integer_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, bool]] = []

    def note(where: str, value: torch.Tensor | PackedTensor) -> torch.Tensor | PackedTensor:
        seen.append((where, torch.is_autocast_enabled("cpu")))
        return value

    plain = replace(
        fake("plain", 1e-9),
        prepare=lambda packed, dtype: note("prepare", packed),
        launch=lambda x, layout: note("launch", x.new_zeros(x.shape[0], 16)),
    )
    integer = Kernel(
        "integer",
        plain.refuse,
        plain.prepare,
        plain.launch,
        plain.seconds,
        activation="int8_token",
    )
    packed = pack(torch.randn(16, 32), IntGroupOptions(8, "row"))
    for kernel, in_launch in ((plain, True), (integer, False)):
        only(monkeypatch, kernel)
        seen.clear()
        with torch.autocast("cpu", BF16):
            Runner(packed, "int8_token").linear(torch.randn(3, 32))
            assert torch.is_autocast_enabled("cpu")
        assert seen == [("prepare", False), ("launch", in_launch)]


@pytest.mark.parametrize("activation", [None, "int8_token"])
def test_inputs_are_transformed_before_they_are_rounded(activation: str | None) -> None:
    torch.manual_seed(3)
    turn = Hadamard(32, 9)
    weight = torch.randn(16, 32)
    packed = pack(turn.apply(weight), IntGroupOptions(8, "row"))
    x = torch.randn(2, 5, 32)
    y = Runner(packed, activation, (turn,)).linear(x)
    assert torch.equal(y, Runner(packed, activation).linear(turn.apply(x)))
    exact = x @ weight.T
    assert float((y - exact).norm() / exact.norm()) < 0.02
    leaf = x.clone().requires_grad_()
    Runner(packed, activation, (turn,)).linear(leaf).sum().backward()
    ones = torch.ones(2, 5, 16) @ weight
    assert float((leaf.grad - ones).norm() / ones.norm()) < 0.02
    assert Runner(packed, activation, (turn,)).linear(x[:0]).shape == (0, 5, 16)
