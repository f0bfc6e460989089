"""Choice of kernels: buckets, ranking, forcing, explanations, and what a runner remembers."""

import gc
import json
import time
import warnings
from dataclasses import replace

import pytest
import torch

from fewbit.quant import cpu, cpu_int8, dispatch, reference
from fewbit.quant.activation import find_activation
from fewbit.quant.dispatch import M_BUCKETS, Runner, explain, kernels, m_bucket, problem_of
from fewbit.quant.errors import NoKernelError
from fewbit.quant.formats.int_group import FORMAT, IntGroupOptions
from fewbit.quant.hadamard import Hadamard
from fewbit.quant.kernel import Kernel, Problem, Reason
from fewbit.quant.machine import load_device, this_device
from fewbit.quant.packed import PackedTensor, Term

BF16 = torch.bfloat16
W4 = Problem("int_group", IntGroupOptions(), 1, 1, 4096, 4096, BF16, "cpu")
vectorised = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch's packed operators need AVX2 or AVX-512",
)


def pack(weight: torch.Tensor, options: IntGroupOptions) -> PackedTensor:
    extra = FORMAT.padded_k(weight.shape[-1], options) - weight.shape[-1]
    full = torch.nn.functional.pad(weight, (0, extra))
    scales = FORMAT.fit(full, options)
    codes, _ = FORMAT.round(full, scales, 0, options)
    term = Term("int_group", options, FORMAT.pack(codes, scales, options))
    return PackedTensor(tuple(weight.shape), (term,))


@pytest.fixture(autouse=True)
def no_forced_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWBIT_KERNEL", raising=False)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "DENSE_BUDGET", cpu.DenseBudget(lambda: 0, limit=0))


def fake(name: str, seconds: float, priority: int = 0, *reasons: Reason) -> Kernel:
    return Kernel(
        name=name,
        refuse=lambda problem: reasons,
        prepare=lambda packed, dtype: packed,
        launch=reference.linear,
        seconds=lambda problem: seconds,
        priority=priority,
    )


def only(monkeypatch: pytest.MonkeyPatch, *known: Kernel) -> None:
    """Make `known` and the reference all the kernels that there are."""
    table = {kernel.name: kernel for kernel in (*known, reference.KERNEL)}
    monkeypatch.setattr(dispatch, "kernels", lambda: table)


@pytest.mark.parametrize(
    ("m", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (33, 48), (4096, 4096), (9999, 4096)]
)
def test_rows_round_up_to_a_bucket(m: int, bucket: int) -> None:
    assert m_bucket(m) == bucket


def test_all_kernels_are_known_by_their_names() -> None:
    assert {"int4pack", "int8pack", "dense_cached", "dense_chunked", "reference"} <= set(kernels())
    assert all(name == kernel.name for name, kernel in kernels().items())


@vectorised
@pytest.mark.parametrize("m", M_BUCKETS)
def test_default_plan_of_w4a16(m: int) -> None:
    chosen = explain(replace(W4, m_bucket=m)).chosen
    assert chosen == ("int4pack" if m <= 4 else "dense_cached")


@vectorised
@pytest.mark.parametrize("m", M_BUCKETS)
def test_default_plan_of_w8a16_by_row(m: int) -> None:
    problem = replace(W4, options=IntGroupOptions(8, "row"), m_bucket=m)
    assert explain(problem).chosen == ("int8pack" if m <= 4 else "dense_cached")


@vectorised
@pytest.mark.parametrize("m", M_BUCKETS)
@pytest.mark.usefixtures("no_memory")
def test_default_plan_without_memory(m: int) -> None:
    chosen = explain(replace(W4, m_bucket=m)).chosen
    assert chosen == ("int4pack" if m <= 32 else "dense_chunked")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("m", M_BUCKETS)
def test_other_dtypes_never_reach_the_packed_operators(dtype: torch.dtype, m: int) -> None:
    for options in (IntGroupOptions(), IntGroupOptions(8, "row")):
        found = explain(replace(W4, options=options, dtype=dtype, m_bucket=m))
        assert found.chosen == "dense_cached"
        assert {"int4pack", "int8pack"} <= set(found.refused)


def test_only_the_reference_runs_elsewhere() -> None:
    found = explain(replace(W4, device="meta"))
    assert found.chosen == "reference"
    assert [name for name, _ in found.eligible] == ["reference"]


def test_time_then_priority_then_name_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, fake("d", 1e-9), fake("a", 2e-9), fake("c", 1e-9, 1), fake("b", 1e-9, 1))
    found = explain(W4)
    assert [name for name, _ in found.eligible] == ["b", "c", "d", "a", "reference"]
    assert found.chosen == "b"


def test_estimates_within_three_percent_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    near = (fake("d", 1.029e-9), fake("c", 1.02e-9, 1), fake("b", 1.031e-9, 9), fake("e", 1e-9))
    for known in (near, near[::-1]):
        only(monkeypatch, *known)
        order = [name for name, _ in explain(W4).eligible]
        # c before e and d by priority, d before e by name; b is too slow to profit from its priority
        assert order == ["c", "d", "e", "b", "reference"]


def test_a_kernel_that_does_not_apply_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, fake("a", 2e-9))
    before = explain(W4)
    only(monkeypatch, fake("a", 2e-9), fake("b", 1e-9, 9, Reason("ARCH", "needs more", "buy")))
    after = explain(W4)
    assert (after.chosen, after.eligible) == (before.chosen, before.eligible)
    assert set(after.refused) - set(before.refused) == {"b"}


def test_every_kernel_is_either_eligible_or_refused_with_a_reason() -> None:
    for m in (1, 48):
        for dtype in (BF16, torch.float32):
            found = explain(replace(W4, m_bucket=m, dtype=dtype))
            eligible = {name for name, _ in found.eligible}
            assert not eligible & set(found.refused)
            assert eligible | set(found.refused) == set(kernels()) | set(cpu.DENIED_OPS)
            assert all(reasons for reasons in found.refused.values())


def test_explanation_as_text_and_json() -> None:
    found = explain(replace(W4, dtype=torch.float32, m_bucket=48))
    text = found.text()
    assert text.splitlines()[0] == str(found.problem)
    assert " CHOSEN dense_cached" in text
    assert " no     int4pack: DTYPE" in text and " no     int4pack: SHAPE_M" in text
    assert "got torch.float32 (load the model with dtype=torch.bfloat16)" in text
    data = json.loads(json.dumps(found.as_dict()))
    assert data["chosen"] == "dense_cached" and data["forced"] is False
    assert [entry["kernel"] for entry in data["eligible"]][-1] == "reference"
    assert data["refused"]["int4pack"][0]["code"] == "DTYPE"


def test_the_limit_is_explained_where_rates_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    h200 = load_device("h200")
    only(monkeypatch, fake("half", 2 * 1.8018e-6 - 1e-6))
    found = explain(replace(W4, device="cuda", machine=h200))
    assert found.limit is not None and found.limit.bound == "memory"
    assert found.as_dict()["limit"] == {
        "bound": "memory", "seconds": found.limit.seconds, "share": found.limit.share,
        "estimated": True,
    }  # fmt: skip
    assert found.limit.share == pytest.approx(0.5, abs=2e-3)
    assert (
        found.text().splitlines()[-1] == " limit  memory 1.8 us estimated; half reaches 50% of it"
    )
    unknown = explain(W4)
    assert unknown.limit is None and unknown.as_dict()["limit"] is None
    assert unknown.text().splitlines()[-1].startswith(" limit  unknown")


def test_same_inputs_give_the_same_explanation() -> None:
    first, second = explain(W4), explain(W4)
    assert first.as_dict() == second.as_dict()


def test_forced_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(torch.randn(32, 64), IntGroupOptions(4, 32))
    x = torch.randn(2, 64)
    expected = Runner(packed).linear(x)
    for name in ("reference", "dense_chunked", "dense_cached"):
        monkeypatch.setenv("FEWBIT_KERNEL", name)
        runner = Runner(packed)
        found = runner.explain(2, x.dtype, "cpu")
        assert found.chosen == name and found.forced
        assert "forced by FEWBIT_KERNEL" in found.text()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.allclose(runner.linear(x), expected, rtol=1e-6, atol=1e-6)


def test_forced_kernel_that_refuses_lists_all_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBIT_KERNEL", "int4pack")
    runner = Runner(pack(torch.randn(30, 64), IntGroupOptions(4, 16)))
    with pytest.raises(NoKernelError) as error:
        runner.linear(torch.randn(2, 64))
    message = str(error.value)
    for part in ("int4pack: DTYPE", "int4pack: SHAPE_N", "int4pack: GROUP", "dense_cached"):
        assert part in message


def test_forced_denied_operator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBIT_KERNEL", "aten::_scaled_mm")
    with pytest.raises(NoKernelError, match="reference code on x86"):
        Runner(pack(torch.randn(16, 32), IntGroupOptions(4, 32))).linear(torch.randn(1, 32))


def test_forced_unknown_kernel_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBIT_KERNEL", "dense_cache")
    runner = Runner(pack(torch.randn(16, 32), IntGroupOptions(4, 32)))
    with pytest.raises(NoKernelError, match="did you mean 'dense_cached'"):
        runner.linear(torch.randn(1, 32))


def test_problem_of_a_weight() -> None:
    packed = pack(torch.randn(8, 40), IntGroupOptions(3, 16))
    assert problem_of(packed, 5, BF16, "cpu") == Problem(
        "int_group", IntGroupOptions(3, 16), 1, 8, 8, 40, BF16, "cpu", machine=this_device("cpu")
    )
    assert problem_of(packed, 5, BF16, "meta").machine is None


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
    monkeypatch.setattr(dispatch, "forced_kernel", lambda: asked.append(None))
    runner = Runner(pack(torch.randn(16, 32), IntGroupOptions(4, 32)))
    for m in (1, 1, 7, 8, 1):
        runner.linear(torch.randn(m, 32))
    assert prepared == [torch.float32]  # one layout for both buckets
    assert len(asked) == 2  # the environment is read once for each plan
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


def test_falling_back_to_the_reference_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, fake("never", 1e-9, 0, Reason("ARCH", "no", "no")))
    dispatch._warn_fallback.cache_clear()
    packed = pack(torch.randn(16, 32), IntGroupOptions(4, 32))
    with pytest.warns(RuntimeWarning, match="no kernel runs int_group weights on cpu") as caught:
        for m in (1, 100):
            Runner(packed).linear(torch.randn(m, 32))
    assert len(caught) == 1
    dispatch._warn_fallback.cache_clear()


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


# ---- inputs rounded to an activation format ----------------------------------------------------

W8A8 = replace(W4, options=IntGroupOptions(8, "row"), activation="int8_token")
integers = pytest.mark.skipif(
    cpu_int8._trial("int8_onednn") is not None, reason="oneDNN's int8 product is no use here"
)


@integers
@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float16])
@pytest.mark.parametrize("m", M_BUCKETS)
def test_default_plan_of_integer_problems(m: int, dtype: torch.dtype) -> None:
    found = explain(replace(W8A8, m_bucket=m, dtype=dtype))
    assert found.chosen == "int8_onednn"
    assert {reason.code for reason in found.refused["int8pack"]} >= {"ACTIVATION"}


def test_an_explanation_shows_the_activation() -> None:
    found = explain(W8A8)
    assert "activation=int8_token" in found.text().splitlines()[0]
    data = json.loads(json.dumps(found.as_dict()))
    assert data["activation"] == "int8_token" and "activation=int8_token" in data["problem"]
    assert explain(W4).as_dict()["activation"] is None


def test_problem_of_rounded_inputs() -> None:
    packed = pack(torch.randn(8, 40), IntGroupOptions(3, 16))
    found = problem_of(packed, 5, BF16, "cpu", "int8_token")
    assert found == replace(problem_of(packed, 5, BF16, "cpu"), activation="int8_token")


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
