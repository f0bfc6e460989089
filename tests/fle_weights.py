"""bf16 weights for tests of `fle` kernels: normal ones, and such as hold every pattern."""

import torch

from fewbit.quant.formats.fle import to_fle
from fewbit.quant.packed import PackedTensor


def spread_weight(n: int, k: int, spread: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Normal numbers in rows of unequal scales, bf16: both widths of codes have escapes."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(spread * torch.randn(n, 1, generator=generator))
    return (scale * torch.randn(n, k, generator=generator)).bfloat16()


def any_bits(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """bf16 of any bits at all, most of which escape."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-(2**15), 2**15, (n, k), generator=generator)
    return drawn.to(torch.int16).view(torch.bfloat16)


def words(weight: torch.Tensor) -> torch.Tensor:
    """int16 of bf16, for comparisons that know NaN and both zeros."""
    return weight.contiguous().view(torch.int16)


def stored(weight: torch.Tensor, bits: int, device: str) -> PackedTensor:
    """The weight with codes of `bits`, on `device`."""
    return to_fle(weight, bits).to(torch.device(device))
