"""QQQ layout: golden words from the address formulas, and identities."""

from hashlib import sha256

import pytest
import torch

from fewbit.export.qqq_layout import (
    pack_channel_scales,
    pack_codes,
    pack_group_scales,
    unpack_channel_scales,
    unpack_codes,
    unpack_group_scales,
)
from fewbit.quant.errors import FormatError

NIBBLES = {False: (1, 3, 5, 7, 0, 2, 4, 6), True: (0, 4, 1, 5, 2, 6, 3, 7)}


def pattern(n: int, k: int, grouped: bool) -> torch.Tensor:
    """Codes that tell rows, columns and their product apart; signed ones as two's complement."""
    rows, columns = torch.arange(n).unsqueeze(-1), torch.arange(k)
    codes = (7 * rows + 3 * columns + rows * columns // 5) % 16
    if grouped:
        return codes.to(torch.uint8)
    return torch.where(codes > 7, codes - 16, codes).to(torch.int8)


def by_formula(codes: torch.Tensor, grouped: bool) -> torch.Tensor:
    """One nibble at a time, straight from the address formulas; int64 [K/16, 2N]."""
    n_rows, n_columns = codes.shape
    words = [[0] * (2 * n_rows) for _ in range(n_columns // 16)]
    for n in range(n_rows):
        for k in range(n_columns):
            word = (n // 64) * 128 + ((n % 8) * 4 + (k % 16) // 4) * 4 + (n // 16) % 4
            nibble = NIBBLES[grouped][(n // 8 % 2) * 4 + k % 4]
            words[k // 16][word] |= (int(codes[n, k]) & 15) << (4 * nibble)
    return torch.tensor(words)


# Made once by a scalar loop over the formulas, outside of this project.
GOLDEN = {
    False: (
        [0x95613C08, 0x2FC76F08, 0xC92E9308, 0x5294C608, 0x5823FFCA],
        0x33537394,
        "d48b67339190a32731431ab386b954ce",
    ),
    True: (
        [0x5C931860, 0xFF2678C0, 0x93C9E820, 0x265C4890, 0x8F5F3A2C],
        0x33373459,
        "117d7846094420cb7d727611441afc42",
    ),
}


@pytest.mark.parametrize("grouped", [False, True])
def test_golden_words(grouped: bool) -> None:
    words = pack_codes(pattern(64, 256, grouped), grouped)
    assert words.dtype == torch.int32 and words.shape == (16, 128)
    first, last, digest = GOLDEN[grouped]
    unsigned = words.long() & 0xFFFFFFFF
    assert unsigned[0, :5].tolist() == first
    assert int(unsigned[-1, -1]) == last
    assert sha256(words.numpy().tobytes()).hexdigest()[:32] == digest


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("shape", [(64, 16), (192, 48), (128, 128)])
def test_codes_follow_the_formula_and_come_back(shape: tuple[int, int], grouped: bool) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    low, high, dtype = (0, 16, torch.uint8) if grouped else (-8, 8, torch.int8)
    codes = torch.randint(low, high, shape, generator=generator).to(dtype)
    words = pack_codes(codes, grouped)
    assert torch.equal(words.long() & 0xFFFFFFFF, by_formula(codes, grouped))
    assert torch.equal(unpack_codes(words, grouped), codes)


def test_golden_order_of_scales() -> None:
    channel = pack_channel_scales(torch.arange(64.0))
    assert channel.shape == (1, 64)
    assert channel[0, :12].tolist() == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11]
    assert channel[0, 32:36].tolist() == [32, 33, 40, 41]
    group = pack_group_scales(torch.arange(128.0).unsqueeze(-1))
    assert group.shape == (1, 128)
    assert group[0, :10].tolist() == [0, 8, 16, 24, 32, 40, 48, 56, 1, 9]
    assert group[0, 64:67].tolist() == [64, 72, 80]


def test_scales_come_back() -> None:
    channel, group = torch.randn(192), torch.randn(192, 3).half()
    assert torch.equal(unpack_channel_scales(pack_channel_scales(channel)), channel)
    stored = pack_group_scales(group)
    assert stored.shape == (3, 192) and stored.is_contiguous()
    assert torch.equal(unpack_group_scales(stored), group)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(FormatError, match="N in multiples of 64, got 32"):
        pack_codes(torch.zeros(32, 16, dtype=torch.uint8), True)
    with pytest.raises(FormatError, match="K in multiples of 16, got 24"):
        pack_codes(torch.zeros(64, 24, dtype=torch.int8), False)
    with pytest.raises(FormatError, match=r"row codes must be torch.int8, got torch.uint8"):
        pack_codes(torch.zeros(64, 16, dtype=torch.uint8), False)
    with pytest.raises(FormatError, match="multiples of 32, got 20"):
        pack_channel_scales(torch.zeros(20))
