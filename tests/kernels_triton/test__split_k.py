"""Sums of parts: in order, to the bit, and nothing beside them."""

import pytest
import torch

from fewbit.kernels_triton import _split_k, _triton
from fewbit.quant.machine import load_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")


@pytest.mark.parametrize("spans", [1, 2, 7, 32, 86])
@pytest.mark.parametrize("split", [1, 2, 3, 8, 16, 100])
def test_every_part_has_spans_and_all_are_taken(spans: int, split: int) -> None:
    each, parts = _split_k.spans_of(spans, split)
    assert parts <= split and (parts - 1) * each < spans <= parts * each
    assert _split_k.spans_of(spans, parts) == (each, parts)  # so a config names what it gets


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("parts", "m", "stride"), [(2, 1, 16), (3, 7, 48), (16, 33, 80)])
def test_parts_are_added_in_order_and_rounded_once(
    parts: int, m: int, stride: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(parts)
    y = torch.empty(m, stride, dtype=dtype, device=DEVICE)
    work = _split_k.workspace(y, parts)
    work.copy_(torch.randn(parts, m, stride) * torch.tensor(10.0) ** torch.randint(-4, 4, (m, 1)))
    total = torch.zeros(m, stride, device=DEVICE)
    for part in work:
        total += part
    _split_k.finish(work, y)
    assert torch.equal(y, total.to(dtype))


@needs_triton
def test_numbers_beyond_the_end_stay() -> None:
    memory = torch.full((2000,), 7.0, dtype=torch.float16, device=DEVICE)
    y = memory[:1040].view(13, 80)
    _split_k.finish(torch.ones(2, 13, 80, device=DEVICE), y)
    assert y.eq(2).all() and memory[1040:].eq(7).all()


def test_one_part_needs_no_workspace_and_no_time() -> None:
    y = torch.ones(3, 16)
    work = _split_k.workspace(y, 1)
    assert work.numel() == 0
    _split_k.finish(work, y)
    assert y.eq(1).all()
    assert _split_k.finish_seconds(load_device("h200"), 48, 1) == 0.0


def test_more_parts_take_longer() -> None:
    h200 = load_device("h200")
    times = [_split_k.finish_seconds(h200, 1 << 20, parts) for parts in (2, 4, 16)]
    assert times == sorted(times) and times[0] > 1e-6
