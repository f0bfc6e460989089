"""What kernels compute on packed words, emulated exactly: four byte lanes in one 32-bit register.

A word holds eight 4-bit codes; two masks make two words of four lanes, one code a byte:

    bit   31..28 27..24 23..20 19..16 15..12 11..8  7..4  3..0
    word    c7     c6     c5     c4     c3    c2     c1    c0
    even    0      c6     0      c4     0     c2     0     c0       word & 0x0F0F0F0F
    odd     0      c7     0      c5     0     c3     0     c1       (word >> 4) & 0x0F0F0F0F

All four lanes of w8 = code · s2 + o then cost one multiply-add on the whole register:

    A = (128 + o) · 0x01010101  mod 2^32          once for each group; may come from o < −128
    u = lanes · s2 + A          mod 2^32          lane j of u is 128 + w8 of lane j

Why lanes do not disturb each other: as integers, u = Σ_j (code_j · s2 + 128 + o) · 256^j + m · 2^32. If
every sum lies in 0 … 255, i.e. w8 in −128 … 127, that is the base-256 expansion of u mod 2^32, which is
unique; what the terms were does not matter. Only codes that occur need to fit.

    signed    u ^ 0x80808080          flips the top bit of each byte: w8 as int8; s8 × s8 products
    unsigned  u as it is: 128 + w8    u8 × s8 products, then Σ q·w8 = Σ q·u − 128 · Σ q

One scale a row, signed codes: lanes in the high nibble (`high_lanes`) are 16 · code as int8, without
any arithmetic; 1/16 goes into the scale.

Words are int64 tensors holding 0 … 2^32 − 1. This is the reference for kernels, not a fast path.
"""

import torch

LOW_NIBBLES = 0x0F0F0F0F
HIGH_NIBBLES = 0xF0F0F0F0
SIGN_BITS = 0x80808080
_EVERY_LANE = 0x01010101
_WORD = 0xFFFFFFFF


def pack_words(codes: torch.Tensor) -> torch.Tensor:
    """Words int64 [..., n/8] of codes 0 … 15 [..., n]; code 0 in the lowest nibble."""
    eights = codes.long().unflatten(-1, (-1, 8))
    return (eights << torch.arange(0, 32, 4, device=codes.device)).sum(-1)


def lanes(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Words of four byte lanes: codes 0, 2, 4, 6 and codes 1, 3, 5, 7."""
    return words & LOW_NIBBLES, (words >> 4) & LOW_NIBBLES


def high_lanes(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Words of four byte lanes with codes in the high nibbles: 0, 2, 4, 6 and 1, 3, 5, 7."""
    return (words << 4) & HIGH_NIBBLES, words & HIGH_NIBBLES


def lane_offset(offset: torch.Tensor) -> torch.Tensor:
    """A for an integer offset o: 128 + o in every lane, mod 2^32."""
    return ((128 + offset.long()) * _EVERY_LANE) & _WORD


def scaled(lane_words: torch.Tensor, step: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
    """u = lanes · s2 + A mod 2^32, one integer multiply-add; `addend` from `lane_offset`."""
    return (lane_words * step.long() + addend) & _WORD


def signed_bytes(words: torch.Tensor) -> torch.Tensor:
    """w8 int64 [..., 4] of u: flip the sign bits, read each byte as int8, lowest lane first."""
    return as_int8(words ^ SIGN_BITS)


def unsigned_bytes(words: torch.Tensor) -> torch.Tensor:
    """Bytes 0 … 255 int64 [..., 4] of words, lowest lane first."""
    return (words.unsqueeze(-1) >> torch.arange(0, 32, 8, device=words.device)) & 0xFF


def as_int8(words: torch.Tensor) -> torch.Tensor:
    """Bytes −128 … 127 int64 [..., 4] of words, lowest lane first."""
    found = unsigned_bytes(words)
    return found - 256 * (found >> 7)


def unsigned_product(inputs: torch.Tensor, biased: torch.Tensor) -> torch.Tensor:
    """Σ_k q·w8 for int8 inputs q [M, K] and biased bytes 128 + w8 [N, K]: int64 [M, N]."""
    q = inputs.long()
    return q @ biased.long().mT - 128 * q.sum(-1, keepdim=True)
