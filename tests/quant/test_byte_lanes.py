"""Packed-word arithmetic equals plain integers for every step, offset and code that fits int8."""

import itertools

import pytest
import torch

from fewbit.quant import byte_lanes as bl
from fewbit.quant.formats.int_two_level import FORMAT, IntTwoLevelOptions

WORD = 0xFFFFFFFF


def valid_pairs() -> torch.Tensor:
    """All (s2, o) for which at least one code fits int8; o beyond int8 too."""
    pairs = itertools.product(range(1, 18), range(-128 - 15 * 17, 128))
    return torch.tensor([(s, o) for s, o in pairs if 15 * s + o >= -128])


def test_words_and_lanes() -> None:
    words = bl.pack_words(torch.arange(8))
    assert int(words) == 0x76543210
    even, odd = bl.lanes(words)
    assert (int(even), int(odd)) == (0x06040200, 0x07050301)
    even, odd = bl.high_lanes(words)
    assert (int(even), int(odd)) == (0x60402000, 0x70503010)
    assert bl.unsigned_bytes(torch.tensor(0xFF00807F)).tolist() == [0x7F, 0x80, 0, 0xFF]
    assert bl.as_int8(torch.tensor(0xFF00807F)).tolist() == [127, -128, 0, -1]


@pytest.mark.parametrize("lane", range(4))
def test_both_forms_equal_the_reference_for_every_code(lane: int) -> None:
    """Each (s2, o), each code that fits in `lane`, beside the extreme codes that fit."""
    pairs = valid_pairs()
    step, offset = pairs[:, :1], pairs[:, 1:]
    w8 = torch.arange(16) * step + offset
    fits = (w8 >= -128) & (w8 <= 127)  # [pairs, code]
    lowest = fits.long().argmax(-1, keepdim=True)
    highest = 15 - fits.flip(-1).long().argmax(-1, keepdim=True)
    codes = torch.stack([lowest, highest, highest, lowest], -1).expand(-1, 16, -1).clone()
    codes[:, :, lane] = torch.arange(16)
    words = (codes << torch.arange(0, 32, 8)).sum(-1)
    biased = bl.scaled(words, step, bl.lane_offset(offset))
    expected = codes * step.unsqueeze(-1) + offset.unsqueeze(-1)
    assert int(fits.sum()) > 60_000
    assert torch.equal(bl.signed_bytes(biased)[fits], expected[fits])
    assert torch.equal(bl.unsigned_bytes(biased)[fits], expected[fits] + 128)
    # a lane that does not fit int8 spoils itself or a neighbour
    wrong = (bl.signed_bytes(biased) != expected).any(-1)
    assert torch.equal(wrong, ~fits)


def test_every_offset_of_the_format_and_every_code_combination_of_two_lanes() -> None:
    """Offsets as the format makes them: any code fits, so all 256 pairs of neighbouring codes."""
    pairs = [(s, o) for s in range(1, 18) for o in range(-128, 128 - 15 * s)]
    step, offset = torch.tensor(pairs).T.unsqueeze(-1).unbind()
    two = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    codes = torch.cat([two, two.flip(-1)], -1)
    words = (codes << torch.arange(0, 32, 8)).sum(-1)
    biased = bl.scaled(words, step, bl.lane_offset(offset))
    expected = codes * step.unsqueeze(-1) + offset.unsqueeze(-1)
    assert torch.equal(bl.signed_bytes(biased), expected)
    assert torch.equal(bl.unsigned_bytes(biased), expected + 128)


def test_the_addend_is_a_word() -> None:
    assert int(bl.lane_offset(torch.tensor(-128))) == 0
    assert int(bl.lane_offset(torch.tensor(127))) == WORD
    assert int(bl.lane_offset(torch.tensor(-129))) == WORD - bl._EVERY_LANE + 1


@pytest.mark.parametrize("dialect", ["offset", "zero"])
def test_products_of_a_stored_weight(dialect: str) -> None:
    """Codes of the format → words → both products, against its integer form in int64."""
    options = IntTwoLevelOptions(4, 32, dialect)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 96, generator=generator)
    scales = FORMAT.fit(weight, options)
    codes, _ = FORMAT.round(weight * 3, scales, 0, options)  # pushed outside of the fitted range
    parts = FORMAT.pack(codes, scales, options)
    reference = FORMAT.integer_form(parts, (9, 96), options).codes.long()
    step = scales["scale_group"].long().repeat_interleave(4, -1)  # four words in a group
    offset = scales[options.shift_part].long().repeat_interleave(4, -1)
    if dialect == "zero":
        offset = -offset * step
    stored = parts["codes"].view(torch.int32).long() & WORD  # the bytes on disk are these words
    assert torch.equal(bl.pack_words(codes), stored)
    halves = [bl.scaled(half, step, bl.lane_offset(offset)) for half in bl.lanes(stored)]
    signed = torch.stack([bl.signed_bytes(half) for half in halves], -1).flatten(-3)
    biased = torch.stack([bl.unsigned_bytes(half) for half in halves], -1).flatten(-3)
    assert torch.equal(signed, reference)
    inputs = torch.randint(-128, 128, (5, 96), generator=generator).to(torch.int8)
    assert torch.equal(bl.unsigned_product(inputs, biased), inputs.long() @ reference.mT)


def test_high_lanes_are_sixteen_times_signed_codes() -> None:
    codes = torch.randint(-8, 8, (5, 8))
    even, odd = bl.high_lanes(bl.pack_words(codes & 15))
    assert torch.equal(bl.as_int8(even).flatten(1), 16 * codes[:, 0::2])
    assert torch.equal(bl.as_int8(odd).flatten(1), 16 * codes[:, 1::2])
