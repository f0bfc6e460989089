"""The oracle itself, against float64 and against autograd of a dense weight."""

import pytest
import torch

from fewbit.quant import reference
from fewbit.quant.activation import RoundedRows, find_activation
from fewbit.quant.format import IntegerForm
from fewbit.quant.formats.int_group import FORMAT, IntGroupOptions
from fewbit.quant.kernel import Problem
from fewbit.quant.packed import PackedTensor, Term


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


def decode_by_hand(packed: PackedTensor) -> torch.Tensor:
    """float64 weight, element by element from the stored bits."""
    n, k = packed.shape
    weight = torch.zeros(n, k, dtype=torch.float64)
    for term in packed.terms:
        bits = term.options.bits
        group = FORMAT.group_size(k, term.options)
        for row in range(n):
            stream = int.from_bytes(bytes(term.parts["codes"][row].tolist()), "little")
            for column in range(k):
                code = stream >> (column * bits) & (2**bits - 1)
                scale = float(term.parts["scale_group"][row, column // group])
                zero = 2 ** (bits - 1)
                if not term.options.symmetric:
                    zero = int(term.parts["zero_group"][row, column // group])
                weight[row, column] += (code - zero) * scale
    return weight


@pytest.mark.parametrize(
    "options",
    [
        (IntGroupOptions(4, 16),),
        (IntGroupOptions(3, 16, symmetric=False),),
        (IntGroupOptions(5, "row", scale="bf16"),),
        (IntGroupOptions(2, 32), IntGroupOptions(3, 16, symmetric=False)),
    ],
)
def test_linear_is_the_product_with_the_decoded_weight(
    options: tuple[IntGroupOptions, ...],
) -> None:
    torch.manual_seed(0)
    packed = pack(torch.randn(5, 41), *options)
    weight = decode_by_hand(packed)
    x = torch.randn(2, 3, 41)
    y = reference.linear(x, packed)
    assert y.shape == (2, 3, 5) and y.dtype == torch.float32
    assert torch.allclose(y.double(), x.double() @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_weight_is_rounded_once_to_the_dtype_of_x(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    packed = pack(torch.randn(8, 32), IntGroupOptions(2, 32), IntGroupOptions(3, 32))
    weight = decode_by_hand(packed).float().to(dtype)
    x = torch.randn(3, 32).to(dtype)
    expected = torch.nn.functional.linear(x, weight)
    y = reference.linear(x, packed)
    assert y.dtype == dtype
    assert torch.equal(y, expected)


def test_gradient_reaches_x() -> None:
    torch.manual_seed(2)
    packed = pack(torch.randn(4, 16), IntGroupOptions(4, 16))
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: reference.linear(value, packed), (x,))


def test_backward_keeps_no_dense_weight() -> None:
    """Between forward and backward only x may be alive, not a copy of the weight."""
    packed = pack(torch.randn(64, 64), IntGroupOptions(4, 64))
    x = torch.randn(2, 64, requires_grad=True)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t
    ):
        y = reference.linear(x, packed)
    y.sum().backward()
    assert (64, 64) not in kept
    expected = reference.dense(packed, torch.float32).sum(0).expand(2, 64)
    assert torch.allclose(x.grad, expected, rtol=1e-5, atol=1e-5)


def test_experts_decode_with_their_leading_axis() -> None:
    torch.manual_seed(3)
    weight = torch.randn(3, 4, 16)
    whole = reference.dense(pack(weight, IntGroupOptions(4, 16)), torch.float32)
    for expert in range(3):
        alone = reference.dense(pack(weight[expert], IntGroupOptions(4, 16)), torch.float32)
        assert torch.equal(whole[expert], alone)


def test_the_kernel_never_refuses() -> None:
    kernel = reference.KERNEL
    for dtype in (torch.float64, torch.float16):
        for device in ("cpu", "cuda", "meta"):
            problem = Problem("any", IntGroupOptions(), 7, 4096, 3, 5, dtype, device)
            assert kernel.refuse(problem) == ()
            assert kernel.seconds(problem) > 0
    packed = pack(torch.randn(4, 16), IntGroupOptions())
    x = torch.randn(2, 16)
    y = kernel.launch(x, kernel.prepare(packed, x.dtype))
    assert torch.equal(y, reference.linear(x, packed))


# ---- inputs rounded to an activation format ----------------------------------------------------

ROW8 = IntGroupOptions(8, "row")
INT8 = find_activation("int8_token")


def by_int64(rows: RoundedRows, form: IntegerForm) -> torch.Tensor:
    """The text of the module, one element at a time."""
    y = torch.empty(rows.codes.shape[0], form.codes.shape[0])
    for m in range(y.shape[0]):
        total = rows.scale[m] * rows.codes[m].long().sum().float()
        for n in range(y.shape[1]):
            a = (rows.codes[m].long() * form.codes[n].long()).sum().float()
            value = (a * form.scale[n]) * rows.scale[m]
            if form.offset is not None:
                value = value + form.offset[n] * total
            y[m, n] = value
    return y


@pytest.mark.parametrize("offset", [False, True])
def test_integer_product_in_the_stated_order(offset: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    form = IntegerForm(
        torch.randint(-128, 128, (9, 3001), dtype=torch.int8),
        torch.randn(9, 1) * 0.01,
        torch.randn(9, 1) if offset else None,
    )
    rows = INT8.round(torch.randn(7, 3001) + 1)
    wanted = by_int64(rows, form)
    assert torch.equal(reference.integer_linear(rows, form), wanted)
    monkeypatch.setattr(reference, "_BLOCK_WEIGHTS", 2 * 3001)  # the last block has one row
    assert torch.equal(reference.integer_linear(rows, form), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_inputs_times_integers(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    packed = pack(torch.randn(6, 50), ROW8)
    x = torch.randn(2, 3, 50).to(dtype)
    y = reference.linear(x, packed, "int8_token")
    assert y.dtype == dtype and y.shape == (2, 3, 6)
    form = FORMAT.integer_form(packed.terms[0].parts, packed.shape, ROW8)
    assert torch.equal(y, reference.integer_linear(INT8.round(x), form).to(dtype))
    exact = INT8.round(x).decode(torch.float64) @ decode_by_hand(packed).T
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert float((y.double() - exact).norm() / exact.norm()) < tolerance


@pytest.mark.parametrize(
    "options",
    [(IntGroupOptions(4, 16),), (IntGroupOptions(8, "row", symmetric=False),), (ROW8, ROW8)],
)
def test_weights_without_integer_form_still_get_rounded_inputs(
    options: tuple[IntGroupOptions, ...],
) -> None:
    torch.manual_seed(6)
    packed = pack(torch.randn(5, 48), *options)
    x = torch.randn(4, 48)
    y = reference.linear(x, packed, "int8_token")
    assert torch.equal(y, reference.linear(INT8.round(x).decode(torch.float32), packed))
    assert not torch.equal(y, reference.linear(x, packed))


@pytest.mark.parametrize("options", [ROW8, IntGroupOptions(4, 16)])
def test_gradients_pass_rounding_straight_through(options: IntGroupOptions) -> None:
    packed = pack(torch.randn(4, 32), options)
    x = torch.randn(3, 32, requires_grad=True)
    upstream = torch.randn(3, 4)
    reference.linear(x, packed, "int8_token").backward(upstream)
    assert torch.allclose(x.grad, upstream @ reference.dense(packed, torch.float32), atol=1e-5)


def test_zero_and_huge_rows_stay_finite() -> None:
    packed = pack(torch.randn(4, 32) * 0.01, ROW8)
    x = torch.zeros(2, 32)
    x[1] = 65504
    for dtype in (torch.float32, torch.float16):
        y = reference.linear(x.to(dtype), packed, "int8_token")
        assert torch.isfinite(y).all() and y[0].eq(0).all() and y[1].abs().sum() > 0
