"""Device code by itself: words of codes become numbers, in PTX as in Triton; splits are summed."""

import re

import numpy as np
import pytest
import torch

from fewbit.kernels_triton import _attend_pages, _triton
from fewbit.kernels_triton._attend_pages import UNPACK, combine
from fewbit.kernels_triton._triton import jit, tl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
_OPERATIONS = {"and.b32": np.bitwise_and, "shr.u32": np.right_shift}


def run_ptx(text: str, n_results: int, *inputs: np.ndarray) -> list[np.ndarray]:
    """Results $0 … of a block of two-operand instructions on uint32; operands after them are inputs."""
    registers = {f"${n_results + i}": values for i, values in enumerate(inputs)}
    for line in re.split(r"[;\n]+", text.strip("{}\n ")):
        words = line.replace(",", " ").split()
        if not words or words[0].startswith(".reg"):
            continue
        name, target, first, second = words
        operand = registers[second] if second in registers else np.uint32(int(second, 0))
        registers[target] = _OPERATIONS[name](registers[first], operand)
    return [registers[f"${i}"] for i in range(n_results)]


def values_of(words: np.ndarray) -> list[np.ndarray]:
    """What channels 4j … 4j + 3 of words of 16 bits are as numbers, by the format's definition."""
    codes = [(words >> shift) & 15 for shift in (0, 4, 8, 12)]
    return [code * 2.0**power for code, power in zip(codes, (-24, -20, -24, -20), strict=True)]


def test_ptx_makes_every_word_of_codes_a_number() -> None:
    words = np.arange(1 << 16, dtype=np.uint32)
    other = words[::-1]
    found = run_ptx(UNPACK, 4, words | other << np.uint32(16))
    for results, low, high in zip(found, values_of(words), values_of(other), strict=True):
        pairs = results.astype("<u4").view("<f2").reshape(-1, 2)
        assert np.array_equal(pairs[:, 0].astype(np.float64), low)
        assert np.array_equal(pairs[:, 1].astype(np.float64), high)


@jit
def unpacked(words, out, PTX: tl.constexpr):
    at = tl.arange(0, 1024)
    c0, c1, c2, c3 = _attend_pages._codes(tl.load(words + at), PTX)
    tl.store(out + at, c0)
    tl.store(out + 1024 + at, c1)
    tl.store(out + 2048 + at, c2)
    tl.store(out + 3072 + at, c3)


@needs_triton
def test_triton_makes_every_word_of_codes_a_number() -> None:
    words = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(64, 1024)
    out = torch.empty(4, 1024, dtype=torch.float16, device=DEVICE)
    for part in words:
        unpacked[(1,)](part.to(DEVICE), out, not _triton.interpreted())
        wanted = values_of(part.numpy().view(np.uint16).astype(np.uint32))
        assert np.array_equal(out.cpu().numpy().astype(np.float64), np.stack(wanted))


@needs_triton
@pytest.mark.parametrize("n_splits", [2, 8, 9, 17])
@pytest.mark.parametrize("with_logits", [False, True])
def test_sum_of_splits(n_splits: int, with_logits: bool) -> None:
    """Sums under different maxima, one split without any token, one row without any."""
    n_rows, n_heads, dim = 6, 3, 20
    generator = torch.Generator().manual_seed(n_splits)
    tops = 8 * torch.randn(n_splits, n_rows, generator=generator)
    totals = torch.rand(n_splits, n_rows, generator=generator) + 0.5
    parts = torch.randn(n_splits, n_rows, dim, generator=generator)
    logits = torch.randn(n_heads, generator=generator)
    for empty in (np.s_[1], np.s_[:, 4]):
        tops[empty], totals[empty], parts[empty] = -1e30, 0.0, 0.0
    scales = torch.exp2(tops.double()).unsqueeze(-1)
    total = (scales[..., 0] * totals).sum(0)
    if with_logits:
        total = total + torch.exp(logits.double()).repeat(n_rows // n_heads) * 2.0**14
    wanted = torch.nan_to_num((scales * parts).sum(0) / total.unsqueeze(-1))
    work = torch.cat([tops.flatten(), totals.flatten(), parts.flatten()]).to(DEVICE)
    found = torch.empty(n_rows, dim, device=DEVICE)
    combine[(n_rows,)](
        work, logits.to(DEVICE), found, n_splits, n_rows, n_heads, int(with_logits),
        dim, 32, not _triton.interpreted(), num_warps=1,
    )  # fmt: skip
    torch.testing.assert_close(found.cpu(), wanted.float(), rtol=1e-5, atol=1e-6)
