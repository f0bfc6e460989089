"""Products through torch's `_int_mm` are bit-equal to the reference, and share other layouts."""

from dataclasses import replace

import pytest
import torch

from fewbit.kernels_triton import _triton, int8_gemm, int8_library, int_two_level_gemm
from fewbit.quant import cpu_int8, reference
from fewbit.quant.format import find_format
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.formats.int_two_level import IntTwoLevelOptions
from fewbit.quant.kernel import Problem
from fewbit.quant.machine import load_device
from fewbit.quant.packed import PackedTensor, Term

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed"),
    pytest.mark.skipif(
        DEVICE == "cpu" and cpu_int8._trial("int8_mm") is not None,
        reason="_int_mm is not exact on this processor",
    ),
]
INT8, W4A8 = int8_library.KERNELS


def packed(name: str, options: object, n: int, k: int) -> PackedTensor:
    form = find_format(name)
    weight = torch.randn(n, form.padded_k(k, options), device=DEVICE)
    weight[:, k:] = 0
    weight[:, 3] *= 20
    scales = form.fit(weight, options)
    codes, _ = form.round(weight, scales, 0, options)
    return PackedTensor((n, k), (Term(name, options, form.pack(codes, scales, options)),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("kernel", "name", "options"),
    [
        (INT8, "int_group", IntGroupOptions(8, "row")),
        (INT8, "int_two_level", IntTwoLevelOptions(group="row")),
        *(
            (W4A8, "int_two_level", IntTwoLevelOptions(group=group, dialect=dialect))
            for group in (32, 64, 128, "row")
            for dialect in ("offset", "zero")
        ),
    ],
)
@pytest.mark.parametrize(("m", "n", "k"), [(17, 72, 200), (33, 40, 513)])
def test_bit_equal_to_the_reference(
    kernel: object, name: str, options: object, m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(m)
    weight = packed(name, options, n, k)
    x = torch.randn(m, k, device=DEVICE).to(dtype)
    x[:, 5] = 90
    layout = kernel.prepare(weight, dtype)
    arguments = (x, layout) if kernel.configs is None else (x, layout, kernel.configs(None)[0])
    assert torch.equal(kernel.launch(*arguments), reference.linear(x, weight, "int8_token"))


def test_layouts_are_those_of_other_kernels() -> None:
    assert INT8.prepare is int8_gemm.KERNEL.prepare
    assert W4A8.prepare is int_two_level_gemm.KERNEL.prepare


def test_few_rows_and_odd_columns_are_refused() -> None:
    problem = Problem(
        "int_two_level", IntTwoLevelOptions(), 1, 16, 100, 256, torch.bfloat16, "cuda",
        "int8_token", load_device("h200"),
    )  # fmt: skip
    assert {reason.code for reason in W4A8.refuse(problem)} == {"SHAPE_M", "SHAPE_N"}
    fits = replace(problem, m_bucket=24, n=104)
    assert not W4A8.refuse(fits)
    assert {reason.code for reason in INT8.refuse(fits)} == {"POLICY"}
    foreign = replace(fits, format="int_group", options=IntGroupOptions(8, "row"))
    assert {reason.code for reason in W4A8.refuse(foreign)} == {"FORMAT"}
    assert not INT8.refuse(foreign)


def test_estimates_count_the_expansion() -> None:
    problem = Problem(
        "int_two_level", IntTwoLevelOptions(), 1, 2048, 4096, 4096, torch.bfloat16, "cuda",
        "int8_token", load_device("h200"),
    )  # fmt: skip
    plain, expanded = INT8.seconds(problem), W4A8.seconds(problem, W4A8.configs(problem)[0])
    assert 43e-6 < plain < expanded < 100e-6


def test_the_operator_keeps_the_contract_of_operators() -> None:
    layout = W4A8.prepare(packed("int_two_level", IntTwoLevelOptions(), 24, 256), torch.float16)
    checks = ("test_schema", "test_faketensor")
    arguments = (layout.words, layout.steps, [64, 4])
    torch.library.opcheck(torch.ops.fewbit.expand_int8, arguments, test_utils=checks)
