"""How a prefix's keys and values become few-valued codes, by level: the lossy half of a KV stream.

Of a token's vector, all heads of a layer together, c channels, in fp32:

    m     = bf16(max |x|)                      stored
    code  = round(x · C / m), clamped to ±C, plus C        0 … 2C, where C = bins / 2 − 1
    x̂     = (code − C) · (m / C)               a function of what is stored, and of nothing else

Bins by level and depth; a layer's depth is its number over the number of layers, so that the
rule, found on 32 layers (CacheGen's), holds for any number:

    level   keys: depth < 10/32   < 20/32   rest      values: depth < 2/32   rest
      1           16              16        12                16             12
      2           32              16        16                32             16
      3           32              32        32                32             32

bf16 holds every magnitude that the model can compute, so no maximum overflows; its rounding moves
the ends of the range by 2^-9 at most. A vector of zeros, or one so small that m / C underflows,
comes back as zeros. One with NaN or an infinity comes back all NaN: damage is not hidden.

No entropy coding here: that is `kv_stream_predict.py`, and `quant/codecs/`.
"""

from collections.abc import Sequence

import torch

from .errors import FormatError

Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values [B, heads, T, D]

LOSSLESS = 0
LEVELS = (1, 2, 3)  # the higher, the better
BINS = (12, 16, 32)  # that any level uses
_DEPTHS = 32
# level -> for keys and for values: (end of the depths in 32nds, bins)
_RULES: dict[int, tuple[tuple[tuple[int, int], ...], ...]] = {
    1: (((20, 16), (32, 12)), ((2, 16), (32, 12))),
    2: (((10, 32), (32, 16)), ((2, 32), (32, 16))),
    3: (((32, 32),), ((32, 32),)),
}


def bins_of(level: int, side: int, layer: int, n_layers: int) -> int:
    """Bins of keys (side 0) or values (side 1) of a layer; FormatError for an unknown level."""
    if level not in _RULES:
        raise FormatError(f"KV level must be one of {LEVELS}, got {level!r}; 0 is lossless")
    depth = _DEPTHS * layer
    return next(bins for end, bins in _RULES[level][side] if depth < end * n_layers)


def centre(bins: int) -> int:
    """C, the code of zero; codes are 0 … 2C."""
    return bins // 2 - 1


def n_symbols(bins: int) -> int:
    """Different codes: one fewer than bins."""
    return 2 * centre(bins) + 1


def quantize(vectors: torch.Tensor, bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [B, T, heads · D] and maxima bf16 [B, T] of vectors [B, heads, T, D]."""
    x = vectors.detach().transpose(1, 2).flatten(2).float()
    peak = x.abs().amax(dim=2)
    maxima = peak.bfloat16()
    maxima = torch.where(peak.isfinite(), maxima, torch.full_like(maxima, torch.nan))
    maxima = torch.where(maxima.isinf(), torch.full_like(maxima, _LARGEST_BF16), maxima)
    c = centre(bins)
    steps = _steps(maxima, c)
    ratio = torch.where(steps > 0, x / steps, 0)  # 0 too where the step is NaN
    codes = ratio.round_().clamp_(-c, c).add_(c)
    return codes.to(torch.uint8), maxima


def dequantize(
    codes: torch.Tensor, maxima: torch.Tensor, bins: int, n_heads: int, dtype: torch.dtype
) -> torch.Tensor:
    """Vectors [B, heads, T, D] in `dtype`, which saturate in fp16 rather than overflow."""
    c = centre(bins)
    x = codes.float().sub_(c).mul_(_steps(maxima, c))
    x = x.clamp_(-_LARGEST_FP16, _LARGEST_FP16) if dtype == torch.float16 else x
    return x.to(dtype).unflatten(2, (n_heads, -1)).transpose(1, 2).contiguous()


_LARGEST_BF16 = torch.finfo(torch.bfloat16).max
_LARGEST_FP16 = torch.finfo(torch.float16).max


def _steps(maxima: torch.Tensor, c: int) -> torch.Tensor:
    """m / C in fp32, [B, T, 1]."""
    return (maxima.float() / c).unsqueeze(2)


def as_decoded(layers: Sequence[Pair], level: int) -> list[Pair]:
    """What keys and values [B, heads, T, D] of all layers read after a stream of this level.

    Without coding and decoding anything; tests hold both ways to the same bits.
    """
    if level == LOSSLESS:
        return list(layers)
    found: list[Pair] = []
    for layer, pair in enumerate(layers):
        keys, values = (
            _rounded(vectors, bins_of(level, side, layer, len(layers)))
            for side, vectors in enumerate(pair)
        )
        found.append((keys, values))
    return found


def _rounded(vectors: torch.Tensor, bins: int) -> torch.Tensor:
    return dequantize(*quantize(vectors, bins), bins, vectors.shape[1], vectors.dtype)
