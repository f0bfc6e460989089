"""Every CPU kernel against the reference, its refusals, and the memory budget."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbit.quant import cpu, reference
from fewbit.quant.errors import NoKernelError
from fewbit.quant.formats.int_group import FORMAT, IntGroupOptions
from fewbit.quant.kernel import Kernel, Problem
from fewbit.quant.packed import PackedTensor, Term

KERNELS = {kernel.name: kernel for kernel in cpu.KERNELS}
BF16 = torch.bfloat16
FITS = Problem("int_group", IntGroupOptions(), 1, 4, 64, 256, BF16, "cpu")
vectorised = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch's packed operators need AVX2 or AVX-512",
)


def pack(weight: torch.Tensor, *options: IntGroupOptions) -> PackedTensor:
    """One term for each of `options`, each rounding what the earlier ones left."""
    terms, rest = [], weight
    for option in options:
        extra = FORMAT.padded_k(weight.shape[-1], option) - weight.shape[-1]
        full = torch.nn.functional.pad(rest, (0, extra))
        scales = FORMAT.fit(full, option)
        codes, values = FORMAT.round(full, scales, 0, option)
        terms.append(Term("int_group", option, FORMAT.pack(codes, scales, option)))
        rest = rest - values[..., : weight.shape[-1]]
    return PackedTensor(tuple(weight.shape), tuple(terms))


def run(kernel: Kernel, packed: PackedTensor, x: torch.Tensor) -> torch.Tensor:
    return kernel.launch(x, kernel.prepare(packed, x.dtype))


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def codes_of(problem: Problem, name: str) -> set[str]:
    return {reason.code for reason in KERNELS[name].refuse(problem)}


def agrees_with_float64(name: str, packed: PackedTensor, m: int) -> None:
    """The kernel's bf16 result errs no more than twice what the reference errs, both against
    float64; weights and inputs have a mean and outliers, so that offsets count."""
    n, k = packed.shape
    x = torch.randn(m, k) + 0.5
    x[:, ::17] *= 20
    x = x.to(BF16)
    exact = x.double() @ reference.dense(packed, torch.float64).T
    problem = replace(FITS, options=packed.terms[0].options, n=n, k=k)
    assert KERNELS[name].refuse(problem) == ()
    y = run(KERNELS[name], packed, x)
    assert y.shape == (m, n) and y.dtype == BF16
    assert relative(y, exact) <= 2 * relative(reference.linear(x, packed), exact) + 1e-4


@vectorised
@pytest.mark.parametrize("m", [1, 3, 4, 17])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, "row"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_int4pack(bits: int, group: int | str, symmetric: bool, m: int) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(80, 256) + 0.7
    agrees_with_float64("int4pack", pack(weight, IntGroupOptions(bits, group, symmetric)), m)


@vectorised
@pytest.mark.parametrize("n", [16, 48, 64, 112])
@pytest.mark.parametrize("k", [31, 130, 999])
def test_int4pack_pads_k_and_takes_partial_row_blocks(n: int, k: int) -> None:
    torch.manual_seed(n + k)
    agrees_with_float64("int4pack", pack(torch.randn(n, k), IntGroupOptions(4, 32, False)), 2)


@vectorised
def test_int4pack_packs_in_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting the rows of a large weight must not change the operator's layout."""
    packed = pack(torch.randn(208, 64), IntGroupOptions(4, 32))
    whole = KERNELS["int4pack"].prepare(packed, BF16)
    monkeypatch.setattr(cpu, "_BLOCK_WEIGHTS", 64 * 64)
    cut = KERNELS["int4pack"].prepare(packed, BF16)
    assert torch.equal(whole.weight, cut.weight)
    assert torch.equal(whole.scale_zero, cut.scale_zero)


@vectorised
@pytest.mark.parametrize("m", [1, 4, 17])
@pytest.mark.parametrize("k", [8, 40, 72, 256, 1001])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_int8pack(bits: int, k: int, m: int) -> None:
    """Row lengths that are no multiple of 32 crash the bare operator."""
    torch.manual_seed(k)
    agrees_with_float64("int8pack", pack(torch.randn(37, k) + 0.7, IntGroupOptions(bits, "row")), m)


@pytest.mark.parametrize("name", ["dense_cached", "dense_chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("m", [1, 5, 40])
def test_dense_kernels_multiply_by_the_reference_weight(
    name: str, dtype: torch.dtype, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_BLOCK_WEIGHTS", 1000)  # several blocks, the last one short
    torch.manual_seed(m)
    packed = pack(torch.randn(23, 131), IntGroupOptions(3, 32), IntGroupOptions(4, 64, False))
    x = torch.randn(m, 131).to(dtype)
    exact = x.double() @ reference.dense(packed, dtype).double().T
    y = run(KERNELS[name], packed, x)
    assert y.dtype == dtype
    assert relative(y, exact) <= {torch.float32: 1e-6, BF16: 4e-3, torch.float16: 5e-4}[dtype]
    if name == "dense_cached":
        layout = KERNELS[name].prepare(packed, dtype)
        assert torch.equal(layout.weight, reference.dense(packed, dtype))


@vectorised
@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"dtype": torch.float32}, "DTYPE"),
        ({"dtype": torch.float16}, "DTYPE"),
        ({"m_bucket": 48}, "SHAPE_M"),
        ({"n": 72}, "SHAPE_N"),
        ({"n_terms": 2}, "TERMS"),
        ({"device": "cuda"}, "ARCH"),
        ({"options": IntGroupOptions(5, 128)}, "BITS"),
        ({"activation": "int8_token"}, "ACTIVATION"),
        ({"options": IntGroupOptions(4, 16)}, "GROUP"),
        ({"options": IntGroupOptions(4, "row"), "k": 200}, "GROUP"),
        ({"format": "other", "options": object()}, "FORMAT"),
    ],
)
def test_int4pack_refuses(change: dict[str, object], code: str) -> None:
    assert codes_of(FITS, "int4pack") == set()
    assert codes_of(replace(FITS, **change), "int4pack") == {code}


@vectorised
@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"dtype": torch.float32}, "DTYPE"),
        ({"m_bucket": 128}, "SHAPE_M"),
        ({"n_terms": 3}, "TERMS"),
        ({"device": "cuda"}, "ARCH"),
        ({"options": IntGroupOptions(8, 128)}, "GROUP"),
        ({"activation": "int8_token"}, "ACTIVATION"),
        ({"options": IntGroupOptions(8, "row", symmetric=False)}, "ZERO"),
        ({"format": "other", "options": object()}, "FORMAT"),
    ],
)
def test_int8pack_refuses(change: dict[str, object], code: str) -> None:
    fits = replace(FITS, options=IntGroupOptions(8, "row"), n=37)
    assert codes_of(fits, "int8pack") == set()
    assert codes_of(replace(fits, **change), "int8pack") == {code}


@vectorised
def test_all_violated_conditions_are_listed() -> None:
    worst = replace(
        FITS, dtype=torch.float32, m_bucket=4096, n=7, options=IntGroupOptions(8, 16), n_terms=2
    )
    assert codes_of(worst, "int4pack") == {
        "DTYPE",
        "SHAPE_M",
        "SHAPE_N",
        "TERMS",
        "BITS",
        "GROUP",
    }
    reasons = KERNELS["int4pack"].refuse(worst)
    assert all(reason.text and reason.fix for reason in reasons)


def test_processor_without_wide_vectors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert codes_of(FITS, "int4pack") == {"ARCH"}


def test_estimates_put_the_crossovers_where_they_were_measured() -> None:
    """Packed operators up to M = 4, dense above; without memory, packed up to M = 32."""
    for fits, packed in (
        (FITS, "int4pack"),
        (replace(FITS, options=IntGroupOptions(8, "row")), "int8pack"),
    ):
        big = replace(fits, n=4096, k=4096)
        for m in (1, 2, 4, 8, 16, 32):
            problem = replace(big, m_bucket=m)
            seconds = {name: kernel.seconds(problem) for name, kernel in KERNELS.items()}
            assert (seconds[packed] < seconds["dense_cached"]) == (m <= 4)
            assert seconds[packed] < seconds["dense_chunked"]
            assert seconds["dense_chunked"] < reference.KERNEL.seconds(problem)


def test_denied_operators_are_never_launched() -> None:
    """A denied operator is named in the list of reasons and nowhere else."""
    source = Path(cpu.__file__).read_text()
    for name, reason in cpu.DENIED_OPS.items():
        operator = name.removeprefix("aten::")
        assert source.count(operator) == 1
        assert reason.code == "DENIED" and reason.text and reason.fix


class Layout:
    """Something that can be collected."""


def test_budget_is_half_of_what_would_be_free_without_the_cache() -> None:
    free = 1000
    budget = cpu.DenseBudget(lambda: free - budget.held)
    assert budget.room() == 500
    first, second = Layout(), Layout()
    budget.take(first, 300)
    assert (budget.held, budget.room()) == (300, 200)
    with pytest.raises(NoKernelError, match="201 bytes does not fit the 200 bytes left"):
        budget.take(second, 201)
    budget.take(second, 200)
    assert budget.room() == 0
    del first
    gc.collect()
    assert (budget.held, budget.room()) == (200, 300)


def test_budget_shrinks_when_others_take_memory() -> None:
    free = [1000]
    budget = cpu.DenseBudget(lambda: free[0])
    owner = Layout()
    budget.take(owner, 400)
    free[0] = 100
    assert budget.room() == 0  # half of 400 + 100 is less than what is held


def test_cached_weights_are_counted_while_they_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "DENSE_BUDGET", cpu.DenseBudget(lambda: 0, limit=20_000))
    packed = pack(torch.randn(32, 64), IntGroupOptions(4, 64))
    problem = replace(FITS, n=32, k=64, dtype=torch.float32)
    kernel = KERNELS["dense_cached"]
    layouts = [kernel.prepare(packed, torch.float32)]
    assert cpu.DENSE_BUDGET.held == 32 * 64 * 4
    layouts.append(kernel.prepare(packed, torch.float32))
    assert {reason.code for reason in kernel.refuse(problem)} == {"MEMORY"}
    with pytest.raises(NoKernelError, match="use dense_chunked"):
        kernel.prepare(packed, torch.float32)
    assert cpu.DENSE_BUDGET.held == 2 * 32 * 64 * 4
    layouts.clear()
    gc.collect()
    assert cpu.DENSE_BUDGET.held == 0
    assert kernel.refuse(problem) == ()


def test_available_memory_is_plausible() -> None:
    assert 1 << 20 < cpu.available_memory() < 1 << 50
