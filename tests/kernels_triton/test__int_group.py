"""What the kernels of bit planes share: refusals, inputs that one binary takes, sizes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fewbit.kernels_triton import _int_group, dequantize, int_group_gemm, int_group_gemv
from fewbit.quant.errors import NoKernelError
from fewbit.quant.format import dequantize as dequantize_packed
from fewbit.quant.formats.int_group import IntGroupOptions, unpack_bits
from fewbit.quant.formats.int_two_level import IntTwoLevelOptions
from fewbit.quant.kernel import Problem
from fewbit.quant.machine import load_device
from fewbit.quant.packed import PackedTensor
from packed_weights import outlier_weight, pack

PROBLEM = Problem(
    "int_group", IntGroupOptions(), 1, 16, 4096, 4096, torch.bfloat16, "cuda",
    machine=load_device("h200"),
)  # fmt: skip


# ---- layout ---------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [16, 32, 64, 128, "row"])
def test_scales_and_zeros_lie_group_by_group(group: int | str) -> None:
    options = IntGroupOptions(5, group, symmetric=False, scale="bf16")
    packed = pack(outlier_weight(70, 200), "int_group", options)
    layout = _int_group.prepare(packed, torch.float16)
    parts = packed.terms[0].parts
    groups = 1 if group == "row" else 256 // int(group) + 1
    assert layout.scale.shape == layout.zero.shape == (groups, 128)
    assert (layout.scale.dtype, layout.zero.dtype) == (torch.bfloat16, torch.int16)
    stored = parts["scale_group"].shape[1]
    assert torch.equal(layout.scale[:stored, :70].T, parts["scale_group"])
    assert torch.equal(layout.zero[:stored, :70].T, parts["zero_group"].short())
    assert layout.scale[stored:].eq(0).all() and layout.scale[:, 70:].eq(0).all()
    assert (layout.n, layout.k, layout.bits) == (70, 200, 5)
    assert layout.group == (0 if group == "row" else group)


@pytest.mark.parametrize("dialect", ["offset", "zero"])
@pytest.mark.parametrize("group", [32, "row"])
def test_two_levels_become_a_scale_and_an_offset(group: int | str, dialect: str) -> None:
    """code · scale + offset is the weight, in float64 to the bit of fp32."""
    packed = pack(outlier_weight(9, 70), "int_two_level", IntTwoLevelOptions(4, group, dialect))
    layout = _int_group.prepare(packed, torch.float16)
    assert layout.scale.dtype == layout.zero.dtype == torch.float32
    codes = unpack_bits(packed.terms[0].parts["codes"], 4)[:, :70].double()
    of_column = torch.arange(70) // (70 if group == "row" else 32)
    scale, offset = (part[of_column, :9].T.double() for part in (layout.scale, layout.zero))
    assert torch.equal((codes * scale + offset).float(), dequantize_packed(packed))


def test_kernels_share_a_layout() -> None:
    kernels = (dequantize.KERNEL, int_group_gemm.KERNEL, int_group_gemv.KERNEL)
    assert {kernel.prepare for kernel in kernels} == {_int_group.prepare}
    packed = pack(outlier_weight(16, 64), "int_group", IntGroupOptions())
    layouts = [_int_group.prepare(packed, dtype) for dtype in (torch.float16, torch.bfloat16)]
    assert torch.equal(layouts[0].planes[0], layouts[1].planes[0])


def test_other_weights_have_no_planes() -> None:
    (term,) = pack(outlier_weight(16, 64), "int_group", IntGroupOptions()).terms
    both = PackedTensor((16, 64), (term, term))
    with pytest.raises(NoKernelError, match=r"one term .*, got int_group \+ int_group"):
        _int_group.prepare(both, torch.float16)
    other = PackedTensor((16, 64), (replace(term, format="int8_token"),))
    with pytest.raises(NoKernelError, match="got int8_token"):
        _int_group.prepare(other, torch.float16)


# ---- refusals and sizes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"dtype": torch.float32}, "DTYPE"),
        ({"n_terms": 2}, "TERMS"),
        ({"format": "int_two_level", "options": IntTwoLevelOptions()}, "FORMAT"),
        ({"device": "cpu", "machine": load_device("cpu")}, "ARCH"),
    ],
)
def test_refusals(change: dict[str, Any], code: str) -> None:
    assert not tuple(_int_group.refusals(PROBLEM))
    (reason,) = _int_group.refusals(replace(PROBLEM, **change))
    assert reason.code == code and reason.text and reason.fix


def test_every_violated_condition_is_told() -> None:
    problem = replace(PROBLEM, dtype=torch.float32, n_terms=3, options=None)
    assert {reason.code for reason in _int_group.refusals(problem)} == {"DTYPE", "TERMS", "FORMAT"}


@pytest.mark.parametrize(
    "options",
    [
        IntGroupOptions(4, 128),
        IntGroupOptions(3, 16, symmetric=False),
        IntGroupOptions(7, 32),
        IntGroupOptions(8, "row"),
    ],
)
def test_bytes_are_those_of_the_layout(options: IntGroupOptions) -> None:
    """But for the group that is there to be read ahead."""
    n, k = 130, 300
    layout = _int_group.prepare(pack(outlier_weight(n, k), "int_group", options), torch.float16)
    ahead = 1 if layout.group else 0
    groups = [part[: len(part) - ahead] for part in (layout.scale, layout.zero) if part is not None]
    held = sum(part.numel() * part.element_size() for part in (*layout.planes, *groups))
    assert _int_group.packed_bytes(replace(PROBLEM, options=options, n=n, k=k)) == held


# ---- launches -------------------------------------------------------------------------------


def test_rows_that_are_aligned_are_left_alone() -> None:
    x = torch.zeros(3, 64, dtype=torch.float16)
    assert _int_group.aligned(x) is x and _int_group.row_stride(x) == 64
    wide = torch.zeros(3, 96, dtype=torch.float16)[:, :64]
    assert _int_group.aligned(wide) is wide and _int_group.row_stride(wide) == 96
    one = torch.zeros(1, 72, dtype=torch.float16)[:, :64]
    assert _int_group.aligned(one) is one and _int_group.row_stride(one) == 64


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t[:, :24],  # K is no multiple of 16
        lambda t: t[:, 1:33],  # rows begin at odd addresses
        lambda t: t[:, :64:2],  # columns are apart
        lambda t: t[:, :32].T.contiguous().T,  # columns first
        lambda t: torch.as_strided(t, (3, 32), (40, 1)),  # rows do not begin at multiples
    ],
)
def test_other_rows_are_copied_once(make: Any) -> None:
    x = make(torch.randn(3, 72).half())
    copy = _int_group.aligned(x)
    k = x.shape[1]
    assert copy.data_ptr() % 16 == 0 and copy.stride(1) == 1 and copy.stride(0) % 16 == 0
    assert torch.equal(copy[:, :k], x) and copy[:, k:].eq(0).all()


@pytest.mark.parametrize("n", [1, 16, 17, 4096])
def test_results_have_n_columns_in_a_row(n: int) -> None:
    y = _int_group.empty_result(torch.zeros(5, 8), n)
    assert y.shape[1] % 16 == 0 and n <= y.shape[1] < n + 16
    cut = _int_group.result(y, n)
    assert cut.shape == (5, n) and cut.is_contiguous() and (cut is y) == (n % 16 == 0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_types_are_those_of_the_planes(bits: int) -> None:
    options = IntGroupOptions(bits, 64, symmetric=False, scale="bf16")
    layout = _int_group.prepare(pack(outlier_weight(8, 64), "int_group", options), torch.float16)
    names = {torch.int32: "*i32", torch.int16: "*i16", torch.bfloat16: "*bf16"}
    parts = (*_int_group.three(layout.planes), layout.scale, layout.zero)
    types = _int_group.weight_types(options)
    assert list(types) == ["first", "second", "third", "scale", "zero"]
    assert list(types.values()) == [names[part.dtype] for part in parts]
