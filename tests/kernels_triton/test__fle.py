"""The layout is the stored parts; what is refused; what a plan says."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fewbit.kernels_triton import _fle, fle_decode, fle_gemv
from fewbit.quant.errors import NoKernelError
from fewbit.quant.formats.fle import FleOptions, to_fle
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.kernel import Problem
from fewbit.quant.machine import load_device
from fewbit.quant.packed import PackedTensor
from fle_weights import spread_weight
from packed_weights import outlier_weight, pack

PROBLEM = Problem(
    "fle4", FleOptions(), 1, 1, 4096, 4096, torch.bfloat16, "cuda", machine=load_device("h200")
)  # fmt: skip
FLAT = torch.ones(4, 8).bfloat16()


@pytest.mark.parametrize("bits", [4, 3])
def test_a_layout_takes_no_memory(bits: int) -> None:
    packed = to_fle(spread_weight(70, 100), bits)
    layout = _fle.prepare(packed, torch.bfloat16)
    held = {part.untyped_storage().data_ptr() for _, part in packed.named_parts()}
    assert {part.untyped_storage().data_ptr() for part in layout.tensors} == held
    assert (layout.n, layout.k, layout.bits) == (70, 100, bits)
    assert fle_decode.prepare is fle_gemv.prepare, "kernels share one layout"


@pytest.mark.parametrize("bits", [4, 3])
def test_lists_without_entries_have_stand_ins(bits: int) -> None:
    layout = _fle.prepare(to_fle(FLAT, bits), torch.bfloat16)
    types = _fle.list_types(bits)
    names = {torch.uint8: "*u8", torch.int32: "*i32", torch.int16: "*i16"}
    told = [names[part.dtype] for part in layout.tensors]
    assert all(part.numel() for part in layout.tensors)
    assert told == list(types.values()) or (bits, told[4]) == (3, "*i16")


def test_other_weights() -> None:
    other = pack(outlier_weight(8, 64), "int_group", IntGroupOptions())
    with pytest.raises(NoKernelError, match="one term of fle4 or fle3"):
        _fle.prepare(other, torch.bfloat16)
    (term,) = to_fle(FLAT, 4).terms
    with pytest.raises(NoKernelError, match=r"got fle4 \+ fle4"):
        _fle.prepare(PackedTensor((4, 8), (term, term)), torch.bfloat16)


def codes(change: dict[str, Any]) -> set[str]:
    return {reason.code for reason in _fle.refusals(replace(PROBLEM, **change))}


def test_refusals() -> None:
    assert codes({}) == codes({"format": "fle3", "activation": "int8_token"}) == set()
    assert codes({"dtype": torch.float16}) == {"DTYPE"}
    assert codes({"n_terms": 2}) == {"TERMS"}
    assert codes({"format": "int_group", "options": IntGroupOptions()}) == {"FORMAT"}
    assert codes({"device": "cpu", "machine": None}) >= {"ARCH"}


def test_bytes_of_a_weight() -> None:
    assert _fle.packed_bytes(PROBLEM) == 4096 * 4096 * 1.5 + 4 * 64 * 64
    odd = replace(PROBLEM, format="fle3", n=65, k=65)
    assert _fle.tiles_of(odd) == (2, 2) and _fle.packed_bytes(odd) == 65 * 128 * 1.375 + 16
