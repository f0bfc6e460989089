"""The packed step computes what the dense step computes, up to the rounding of inputs and cache."""

import pytest
import torch

from bench.decode_models import (
    DenseStep,
    Layer,
    PackedStep,
    Place,
    Shape,
    empty_cache,
    packed_step,
    place_at,
    random_weight,
)
from fewbit.kernels_triton import _triton, int_two_level_gemm
from fewbit.quant import reference
from fewbit.quant.formats.int_two_level import FORMAT, IntTwoLevelOptions
from fewbit.quant.kv_view import Paged
from fewbit.quant.kv_write import append
from fewbit.quant.packed import PackedTensor, Term
from fewbit.quant.page_format import find_page_format

pytestmark = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = Shape("tiny", 2, 256, 384, 4, 2, 64, 96)
OPTIONS = IntTwoLevelOptions(group=128)
ROWS, POSITION = 2, 70


def packed(n: int, k: int) -> PackedTensor:
    weight = torch.randn(n, k, device=DEVICE) * k**-0.5
    scales = FORMAT.fit(weight, OPTIONS)
    codes, _ = FORMAT.round(weight, scales, 0, OPTIONS)
    return PackedTensor((n, k), (Term(FORMAT.name, OPTIONS, FORMAT.pack(codes, scales, OPTIONS)),))


def decoded(pages: Paged) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, heads, T, D] of the first POSITION tokens and room for one."""
    found = []
    for use, parts in ((pages.key, pages.keys), (pages.value, pages.values)):
        vectors = find_page_format(use.format).decode(parts, torch.float32, use.options)
        rows = vectors[pages.table].transpose(1, 2).flatten(2, 3)
        found.append(rows[:, :, : POSITION + 1].contiguous())
    return found[0], found[1]


def both_steps() -> tuple[PackedStep, DenseStep]:
    torch.manual_seed(0)
    gains = tuple(1 + 0.1 * torch.randn(TINY.hidden, device=DEVICE) for _ in range(2))
    norm, head = (
        torch.ones(TINY.hidden, device=DEVICE),
        torch.randn(96, 256, device=DEVICE) / 16,
    )
    place = place_at(ROWS, POSITION, TINY, torch.float32, DEVICE)
    ours, theirs, pages, caches = [], [], [], []
    half = tuple(gain.half() for gain in gains)
    for _ in range(TINY.layers):
        weights = {name: packed(n, k) for name, n, k in TINY.linears}
        prepare = int_two_level_gemm.KERNEL.prepare
        ours.append(Layer({n: prepare(w, torch.float16) for n, w in weights.items()}, half))
        dense = {n: reference.dense(w, torch.float32) for n, w in weights.items()}
        theirs.append(Layer(dense, gains))
        cache = empty_cache(TINY, ROWS, POSITION + 1, DEVICE)
        size = (ROWS, TINY.kv_heads, POSITION, TINY.head_dim)
        old = (torch.randn(size, device=DEVICE), torch.randn(size, device=DEVICE))
        append(cache, *old, 0)
        pages.append(cache)
        caches.append(decoded(cache))
    fp16 = Place(ROWS, place.position, place_at(ROWS, POSITION, TINY, torch.float16, DEVICE).rope)
    return (
        PackedStep(TINY, ours, pages, norm.half(), head.half(), fp16),
        DenseStep(TINY, theirs, caches, norm, head, place),
    )


def test_both_steps_agree() -> None:
    ours, theirs = both_steps()
    hidden = torch.randn(ROWS, TINY.hidden, device=DEVICE)
    expected = theirs(hidden)
    found = ours(hidden.half()).float()
    assert found.shape == (ROWS, 96)
    assert float((found - expected).norm() / expected.norm()) < 0.04
    keys, _ = decoded(ours.caches[0])  # the new token is in the pages
    new = theirs.caches[0][0][:, :, POSITION]
    assert float((keys[:, :, POSITION] - new).norm() / new.norm()) < 0.12


def test_a_step_counts_the_bytes_that_it_reads() -> None:
    ours, theirs = both_steps()
    weights = sum(n * k for _, n, k in TINY.linears)
    vectors = 2 * ROWS * TINY.kv_heads * (POSITION + 1)
    dense = 2 * (weights * 4) + 96 * 256 * 4 + 2 * vectors * 64 * 4
    assert theirs.n_bytes == dense
    least = 2 * weights / 2 + 96 * 256 * 2 + 2 * vectors * 36
    assert least < ours.n_bytes < 1.35 * least


def test_random_weights_are_what_the_kernel_takes() -> None:
    made = random_weight(64, 384, DEVICE, torch.Generator(DEVICE).manual_seed(0))
    real = int_two_level_gemm.KERNEL.prepare(packed(64, 384), torch.float16)
    for name, part in vars(real).items():
        if isinstance(part, torch.Tensor):
            assert vars(made)[name].shape == part.shape and vars(made)[name].dtype == part.dtype


def test_a_random_model_gives_finite_logits() -> None:
    small = Shape("small", 1, 128, 128, 2, 1, 64, 32)
    step = packed_step(small, 1, 1, 3, DEVICE)
    logits = step(torch.randn(1, 128, device=DEVICE).to(torch.bfloat16))
    assert logits.shape == (1, 32) and bool(torch.isfinite(logits).all())
