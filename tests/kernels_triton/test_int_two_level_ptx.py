"""The PTX of `int_two_level_gemm.py`, for every code, step and offset.

Triton's interpreter runs no PTX. A small evaluator runs the text of the four snippets on 32-bit words.
"""

import re

import numpy as np
import pytest
import torch

from fewbit.kernels_triton import int_two_level_gemm
from fewbit.quant.byte_lanes import lane_offset

OPERATIONS = {
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
}


def evaluate(ptx: str, **registers: np.ndarray) -> np.ndarray:
    """$0 of a snippet in braces, on arrays of 32-bit words; registers by name without the dollar."""
    held = {f"${name[1:]}": value.astype(np.uint32) for name, value in registers.items()}
    body = re.fullmatch(r"\{ \.reg \.b32 t; (.*) \}", ptx)
    assert body is not None
    for statement in filter(None, (part.strip() for part in body[1].split(";"))):
        name, _, rest = statement.partition(" ")
        target, *sources = (operand.strip() for operand in rest.split(","))
        values = [held[s] if s in held else np.uint32(int(s, 0)) for s in sources]
        held[target] = OPERATIONS[name](*values).astype(np.uint32)
    return held["$0"]


def as_int8(words: np.ndarray) -> np.ndarray:
    """[..., 4], lowest byte first."""
    return np.ascontiguousarray(words).view(np.int8).reshape(*words.shape, 4)


def nibble_words() -> tuple[np.ndarray, np.ndarray]:
    """Words whose low nibbles take all pairs of neighbouring codes, between extremes, and these codes
    [., 4]. The high nibbles hold the complements."""
    a, b, edge = np.meshgrid(np.arange(16), np.arange(16), [0, 15], indexing="ij")
    codes = np.stack((edge, a, b, edge), -1).reshape(-1, 4)
    both = codes | (15 - codes) << 4
    return both @ (1 << np.arange(0, 32, 8)), codes


@pytest.mark.parametrize("dialect", ["offset", "zero"])
def test_ptx_of_scaled_codes_for_every_step_and_offset(dialect: str) -> None:
    """Every pair of neighbouring codes that fits int8, for every (s2, o) or (s2, z)."""
    words, codes = nibble_words()
    tested = 0
    for step in range(1, 18):
        for shift in range(-128, 128) if dialect == "offset" else range(16):
            offset = shift if dialect == "offset" else -shift * step
            bias = 256 + offset
            assert 0 <= bias < 512 and step < 32
            addend = (bias * 0x01010101 + 0x7F7F7F80) & 0xFFFFFFFF
            assert addend == int(lane_offset(torch.tensor(offset)))
            for ptx, held in (
                (int_two_level_gemm.LOW_PTX, codes),
                (int_two_level_gemm.HIGH_PTX, 15 - codes),
            ):
                w8 = held * step + offset
                fits = ((w8 >= -128) & (w8 <= 127)).all(-1)
                found = evaluate(
                    ptx, r1=words[fits], r2=np.full(1, step), r6=np.full(1, addend, np.uint32)
                )
                assert np.array_equal(as_int8(found), w8[fits])
                tested += int(fits.sum())
    assert tested > 10_000


def test_ptx_of_codes_in_high_halves() -> None:
    words, codes = nibble_words()
    for ptx, held in (
        (int_two_level_gemm.ROW_LOW_PTX, codes),
        (int_two_level_gemm.ROW_HIGH_PTX, 15 - codes),
    ):
        assert np.array_equal(as_int8(evaluate(ptx, r1=words)), 16 * held - 128)


def test_the_evaluator_notices_a_wrong_mask() -> None:
    words, codes = nibble_words()
    wrong = int_two_level_gemm.ROW_LOW_PTX.replace("0xF0F0F0F0", "0xF0F0F0E0")
    assert not np.array_equal(as_int8(evaluate(wrong, r1=words)), 16 * codes - 128)
