"""Discovery of activation formats, sums of rounded rows, and integer forms of weights."""

import pytest
import torch

from fewbit.quant.activation import (
    RoundedRows,
    activations,
    find_activation,
    integer_form,
)
from fewbit.quant.dispatch import kernels
from fewbit.quant.errors import RecipeError
from fewbit.quant.format import IntegerForm
from fewbit.quant.formats.int_group import FORMAT, IntGroupOptions
from fewbit.quant.packed import PackedTensor, Term
from fewbit.quant.reference import integer_linear


def pack(weight: torch.Tensor, options: IntGroupOptions) -> PackedTensor:
    scales = FORMAT.fit(weight, options)
    codes, _ = FORMAT.round(weight, scales, 0, options)
    term = Term("int_group", options, FORMAT.pack(codes, scales, options))
    return PackedTensor(tuple(weight.shape), (term,))


def test_formats_are_found_by_name() -> None:
    assert find_activation("int8_token") is activations()["int8_token"]
    with pytest.raises(
        RecipeError, match=r"'int8_tokn' \(did you mean 'int8_token'\?\); known: int8"
    ):
        find_activation("int8_tokn")


def test_every_integer_kernel_names_a_known_activation() -> None:
    found = [kernel for kernel in kernels().values() if kernel.activation]
    assert found and all(kernel.activation in activations() for kernel in found)


def test_sums_do_not_wrap() -> None:
    """100000 codes of 127 are far beyond what int8 or fp16 sums hold."""
    codes = torch.full((2, 100_000), 127, dtype=torch.int8)
    codes[1] = -127
    rows = RoundedRows(codes, torch.tensor([[0.5], [2.0]]))
    assert rows.sums().tolist() == [[6_350_000.0], [-25_400_000.0]]


def test_decoding_rounds_once() -> None:
    rows = RoundedRows(torch.tensor([[127, -3]], dtype=torch.int8), torch.tensor([[1 / 3]]))
    exact = torch.tensor([[127, -3]]) * torch.tensor(1 / 3)
    assert torch.equal(rows.decode(torch.bfloat16), exact.to(torch.bfloat16))


def test_integer_form_of_one_term_only() -> None:
    packed = pack(torch.randn(4, 16), IntGroupOptions(4, "row"))
    form = integer_form(packed)
    assert form is not None and form.codes.dtype == torch.int8
    assert torch.allclose(
        form.codes * form.scale,
        FORMAT.unpack(packed.terms[0].parts, (4, 16), packed.terms[0].options),
    )
    assert integer_form(PackedTensor((4, 16), packed.terms * 2)) is None
    assert integer_form(pack(torch.randn(4, 16), IntGroupOptions(4, 16))) is None


def test_sum_of_the_rounded_row_cancels_rounding_error() -> None:
    """Gaussian weights as codes 0 to 15 with a row offset: with T from the rounded row, at most a
    third of the error that the sum of x leaves."""
    torch.manual_seed(0)
    x = torch.randn(64, 1024)
    codes = (torch.randn(128, 1024) * 2 + 7.5).round().clamp(0, 15).to(torch.int8)
    scale = torch.rand(128, 1) * 0.01 + 0.01
    form = IntegerForm(codes, scale, -7.5 * scale)
    exact = x.double() @ (codes.double() * scale.double() + form.offset.double()).T
    rows = find_activation("int8_token").round(x)
    ours = integer_linear(rows, form)
    plain = (
        integer_linear(rows, IntegerForm(codes, scale)) + x.sum(-1, keepdim=True) * form.offset.T
    )
    error, wanted = ((y.double() - exact).norm() for y in (ours, plain))
    assert error <= wanted / 3
