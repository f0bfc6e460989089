"""Integer kernels: bit-equal to the oracle, and refusing what they cannot do."""

import gc
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from fewbit.quant import cpu, cpu_int8, reference
from fewbit.quant.activation import RoundedRows
from fewbit.quant.errors import NoKernelError
from fewbit.quant.format import IntegerForm, find_format
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.formats.int_two_level import IntTwoLevelOptions
from fewbit.quant.kernel import Problem
from fewbit.quant.linear import QuantLinear
from fewbit.quant.packed import PackedTensor, Term

BF16 = torch.bfloat16
KERNELS = {kernel.name: kernel for kernel in cpu_int8.KERNELS}
W4A8 = Problem(
    "int_two_level", IntTwoLevelOptions(), 1, 4, 64, 256, BF16, "cpu", activation="int8_token"
)
WEIGHTS = [
    ("int_two_level", IntTwoLevelOptions()),
    ("int_two_level", IntTwoLevelOptions(group=32, dialect="zero")),
    ("int_two_level", IntTwoLevelOptions(group="row")),
    ("int_two_level", IntTwoLevelOptions(group="row", dialect="zero")),
    ("int_group", IntGroupOptions(8, "row")),
    ("int_group", IntGroupOptions(3, "row")),
]


def works(name: str) -> pytest.MarkDecorator:
    fault = cpu_int8._trial(name)
    return pytest.mark.skipif(fault is not None, reason=f"{name} {fault}")


BOTH = [pytest.param(name, marks=works(name)) for name in KERNELS]


def pack(weight: torch.Tensor, name: str, options: object) -> PackedTensor:
    known = find_format(name)
    extra = known.padded_k(weight.shape[-1], options) - weight.shape[-1]
    full = torch.nn.functional.pad(weight, (0, extra))
    scales = known.fit(full, options)
    codes, _ = known.round(full, scales, 0, options)
    return PackedTensor(
        tuple(weight.shape), (Term(name, options, known.pack(codes, scales, options)),)
    )


def codes_of(problem: Problem, name: str = "int8_onednn") -> set[str]:
    return {reason.code for reason in KERNELS[name].refuse(problem)}


@pytest.fixture(autouse=True)
def enough_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu, "DENSE_BUDGET", cpu.DenseBudget(lambda: 0, limit=1 << 30))
    yield
    gc.collect()


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize(("weight_format", "options"), WEIGHTS)
def test_bit_equal_to_the_oracle(
    name: str, dtype: torch.dtype, weight_format: str, options: object
) -> None:
    """Ragged sizes, M on both sides of every unrolling, a mean and outliers."""
    torch.manual_seed(0)
    for n, k in ((1, 8), (7, 5), (33, 77), (48, 256)):
        packed = pack(torch.randn(n, k) * 0.05 + 0.02, weight_format, options)
        layout = KERNELS[name].prepare(packed, dtype)
        for m in (1, 2, 3, 17, 64, 257):
            x = torch.randn(m, k) + 0.3
            x[:, ::11] *= 30
            x[m // 2] = 0
            x = x.to(dtype)
            y = KERNELS[name].launch(x, layout)
            assert y.dtype == dtype and y.shape == (m, n)
            assert torch.equal(y, reference.linear(x, packed, "int8_token"))
            assert torch.isfinite(y).all() and y[m // 2].eq(0).all()


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("weight", [127, -128])
def test_extremes_neither_saturate_nor_wrap(name: str, sign: int, weight: int) -> None:
    for k in (cpu_int8._MIN_K[name], 64, 1000, 30_001):
        codes = torch.full((3, k), weight, dtype=torch.int8)
        rows = RoundedRows(torch.full((2, k), 127 * sign, dtype=torch.int8), torch.ones(2, 1))
        form = IntegerForm(codes, torch.ones(3, 1))
        layout = cpu_int8._layout(form, name)
        y = cpu_int8._multiply(rows, layout, name, torch.float32)
        assert torch.equal(y, torch.full((2, 3), float(127 * sign * weight * k)))


@pytest.mark.parametrize("name", BOTH)
def test_sums_are_those_of_int64(name: str) -> None:
    """Sums beyond 2^24, where fp32 accumulation would round."""
    torch.manual_seed(1)
    x = torch.randint(-127, 128, (5, 20_000), dtype=torch.int8)
    weight = torch.randint(-128, 128, (9, 20_000), dtype=torch.int8)
    x[0], weight[0] = x[0].abs(), weight[0].clamp(min=0)
    exact = x.long() @ weight.long().T
    assert int(exact.abs().max()) > 1 << 25
    form = IntegerForm(weight, torch.ones(9, 1))
    y = cpu_int8._multiply(
        RoundedRows(x, torch.ones(5, 1)), cpu_int8._layout(form, name), name, torch.float32
    )
    assert torch.equal(y, exact.float())


@pytest.mark.parametrize("name", BOTH)
def test_results_do_not_depend_on_row_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(torch.randn(24, 64), "int_two_level", IntTwoLevelOptions(group="row"))
    x = torch.randn(37, 64).to(BF16)
    layout = KERNELS[name].prepare(packed, BF16)
    whole = KERNELS[name].launch(x, layout)
    monkeypatch.setattr(cpu_int8, "_BLOCK", 100)
    assert torch.equal(KERNELS[name].launch(x, layout), whole)
    for row in (0, 36):
        assert torch.equal(KERNELS[name].launch(x[row : row + 1], layout), whole[row : row + 1])


@pytest.mark.parametrize("name", BOTH)
def test_damaged_inputs_are_not_hidden(name: str) -> None:
    packed = pack(torch.randn(8, 32), "int_two_level", IntTwoLevelOptions(group=32))
    layout = KERNELS[name].prepare(packed, torch.float32)
    for bad in (float("nan"), float("inf")):
        x = torch.ones(2, 32)
        x[0, 3] = bad
        y = KERNELS[name].launch(x, layout)
        assert not torch.isfinite(y[0]).any() and torch.isfinite(y[1]).all()


@works("int8_onednn")
@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"activation": None}, "ACTIVATION"),
        ({"activation": "other"}, "ACTIVATION"),
        ({"n_terms": 2}, "TERMS"),
        ({"device": "cuda"}, "ARCH"),
        ({"k": 70_000}, "SHAPE_K"),
        ({"format": "int_group", "options": IntGroupOptions(4, 128)}, "INTEGERS"),
        ({"format": "int_group", "options": IntGroupOptions(8, "row", False)}, "INTEGERS"),
        ({"format": "unknown"}, "INTEGERS"),
    ],
)
def test_refusals(change: dict[str, object], code: str) -> None:
    assert codes_of(W4A8) == set()
    assert codes_of(replace(W4A8, dtype=torch.float32, m_bucket=4096, n=7, k=5)) == set()
    problem = replace(W4A8, **change)
    assert codes_of(problem) == {code}
    for reason in KERNELS["int8_onednn"].refuse(problem):
        assert reason.text and reason.fix


def test_int32_sums_bound_k() -> None:
    """The largest K that each accepts stays below 2^31 in the worst case, the next does not."""
    for name, worst in (("int8_onednn", 255 * 128), ("int8_mm", 127 * 128)):
        limit = cpu_int8._MAX_K[name]
        assert limit * worst < 2**31 <= (limit + 1) * worst
        assert "SHAPE_K" not in codes_of(replace(W4A8, k=limit), name)
        assert "SHAPE_K" in codes_of(replace(W4A8, k=limit + 1), name)


def test_one_column_is_left_to_the_operator_that_can() -> None:
    """`aten::_int_mm` returns uninitialized memory there."""
    problem = replace(W4A8, format="int_group", options=IntGroupOptions(8, "row"), k=1)
    assert "SHAPE_K" in codes_of(problem, "int8_mm")
    assert "SHAPE_K" not in codes_of(problem, "int8_onednn")


def test_a_faulty_operator_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_int8._trial.cache_clear()
    monkeypatch.setitem(
        cpu_int8._SUMS, "int8_mm", lambda codes, layout: cpu_int8._mm_sums(codes, layout) + 1
    )
    try:
        (reason,) = KERNELS["int8_mm"].refuse(W4A8)
        assert reason.code == "ARCH" and "exact integers" in reason.text
    finally:
        cpu_int8._trial.cache_clear()


def test_a_missing_operator_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(codes: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such operator\nmore lines")

    cpu_int8._trial.cache_clear()
    monkeypatch.setitem(cpu_int8._WEIGHT, "int8_onednn", missing)
    try:
        (reason,) = KERNELS["int8_onednn"].refuse(W4A8)
        assert (reason.code, reason.text) == ("ARCH", "is not available: no such operator")
    finally:
        cpu_int8._trial.cache_clear()


def test_other_processors_are_refused_untried(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_int8._trial.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(cpu_int8, "_layout", lambda form, name: pytest.fail("was tried"))
    try:
        (reason,) = KERNELS["int8_mm"].refuse(W4A8)
        assert reason.code == "ARCH" and "got DEFAULT" in reason.text
    finally:
        cpu_int8._trial.cache_clear()


@works("int8_mm")
def test_layouts_are_counted_while_they_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "DENSE_BUDGET", cpu.DenseBudget(lambda: 0, limit=3000))
    kernel = KERNELS["int8_mm"]
    packed = pack(torch.randn(32, 64), "int_two_level", IntTwoLevelOptions(group=64))
    layout = kernel.prepare(packed, BF16)
    assert cpu.DENSE_BUDGET.held == 32 * 64
    problem = replace(W4A8, n=32, k=64, options=IntTwoLevelOptions(group=64))
    assert codes_of(problem, "int8_mm") == {"MEMORY"}
    with pytest.raises(NoKernelError, match="use dense_chunked"):
        kernel.prepare(packed, BF16)
    del layout
    gc.collect()
    assert cpu.DENSE_BUDGET.held == 0 and codes_of(problem, "int8_mm") == set()


def test_a_weight_without_integers_cannot_be_prepared() -> None:
    packed = pack(torch.randn(4, 32), "int_group", IntGroupOptions(4, 32))
    with pytest.raises(NoKernelError, match="no integer form"):
        KERNELS["int8_mm"].prepare(packed, BF16)


def test_estimates_rank_as_measured() -> None:
    """oneDNN before int8_mm before dense at one row; at every M oneDNN first."""
    dense = {kernel.name: kernel for kernel in cpu.KERNELS}["dense_cached"]
    for m in (1, 8, 64, 1024):
        problem = replace(W4A8, n=2048, k=2048, m_bucket=m)
        ours = KERNELS["int8_onednn"].seconds(problem)
        assert ours <= KERNELS["int8_mm"].seconds(problem)
        assert ours < dense.seconds(problem)
    one = replace(W4A8, n=2048, k=2048, m_bucket=1)
    assert KERNELS["int8_mm"].seconds(one) < dense.seconds(one)


# ---- compilers ------------------------------------------------------------------------------


@works("int8_onednn")
def test_compilers_know_shape_and_dtype_of_the_product() -> None:
    args = (
        torch.empty(5, 64, dtype=torch.uint8, device="meta"),
        torch.empty(64, 7, dtype=torch.int8, device="meta"),
        torch.empty(7, device="meta"),
        torch.empty(7, dtype=torch.int32, device="meta"),
    )
    y = torch.ops.fewbit.onednn_int8_product(*args)
    assert (tuple(y.shape), y.dtype, y.device.type) == ((5, 7), torch.float32, "meta")
    form = IntegerForm(torch.ones(7, 64, dtype=torch.int8), torch.full((7, 1), 0.5))
    layout = cpu_int8._layout(form, "int8_onednn")
    shifted = torch.full((5, 64), 128 + 3, dtype=torch.uint8)
    y = torch.ops.fewbit.onednn_int8_product(shifted, layout.weight, layout.scale, layout.zero)
    assert torch.equal(y, torch.full((5, 7), 3 * 64 * 0.5))


@works("int8_onednn")
@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    reason="inductor needs a C++ compiler",
)
@pytest.mark.parametrize("warm", [True, False])
def test_compiled_layers_answer_as_before(warm: bool) -> None:
    torch.manual_seed(5)
    first, second = (
        QuantLinear.from_packed(
            pack(torch.randn(n, k) * 0.1, "int_two_level", IntTwoLevelOptions(group=32)),
            torch.randn(n),
            BF16,
            activation="int8_token",
        )
        for n, k in ((48, 64), (16, 48))
    )
    model = nn.Sequential(first, nn.SiLU(), second)
    x = torch.randn(3, 64).to(BF16)
    torch._dynamo.reset()
    with torch.no_grad():
        if warm:
            model(x)
        compiled = torch.compile(model, backend="inductor")
        for rows in (x, x[:1]):
            assert torch.allclose(compiled(rows), model(rows), rtol=0.02, atol=0.02)
        before = model(x)
        first.scale_row.mul_(2)
        assert not torch.allclose(before, model(x), rtol=0.1, atol=0.1)
        assert torch.allclose(compiled(x), model(x), rtol=0.02, atol=0.02)
