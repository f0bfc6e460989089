"""`dense_head` changes no bit."""

import pytest
import torch

from fewbit.quant.formats.dense_head import PAGE_FORMAT, DenseHeadOptions

OPTIONS = DenseHeadOptions()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_exact_in_every_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0, 0] = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-7, -3.0, 2.0])
    parts = PAGE_FORMAT.encode(x, OPTIONS)
    (spec,) = PAGE_FORMAT.part_specs(7, dtype, OPTIONS).values()
    assert (spec.dtype, spec.shape) == (dtype, (7,))
    assert parts["values"].dtype == dtype
    assert torch.equal(PAGE_FORMAT.decode(parts, dtype, OPTIONS).nan_to_num(), x.nan_to_num())
    assert PAGE_FORMAT.decode(parts, torch.float32, OPTIONS).dtype == torch.float32
