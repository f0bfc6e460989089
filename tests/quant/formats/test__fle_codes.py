"""Codes of exponents as bytes, drawn by hand, and the order of escapes."""

import pytest
import torch

from fewbit.quant.formats._fle_codes import (
    TILE,
    bytes_of_codes,
    codes_of_bytes,
    escapes_of,
    tile_position,
)


def random_codes(n: int, columns: int, top: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n + columns)
    return torch.randint(0, top, (n, columns), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("n", "columns"), [(1, 64), (3, 64), (65, 128), (200, 192)])
@pytest.mark.parametrize("bits", [4, 3])
def test_bytes_hold_every_code(n: int, columns: int, bits: int) -> None:
    codes = random_codes(n, columns, 1 << bits)
    stored = bytes_of_codes(codes, bits)
    assert stored.numel() == n * columns * bits // 8
    assert torch.equal(codes_of_bytes(stored, bits), codes)


def test_a_byte_of_nibbles_is_two_columns_32_apart() -> None:
    codes = torch.zeros(1, 128, dtype=torch.uint8)
    codes[0, 64 + 5], codes[0, 64 + 32 + 5] = 3, 10
    stored = bytes_of_codes(codes, 4)
    assert stored[0].nonzero().tolist() == [[32 + 5]] and int(stored[0, 37]) == 0xA3


def test_bit_i_of_a_plane_is_column_i_of_eight() -> None:
    codes = torch.zeros(2, 64, dtype=torch.uint8)
    codes[1, 17] = 5  # planes 0 and 2, byte 2, bit 1
    stored = bytes_of_codes(codes, 3)
    assert stored.shape == (3, 2, 8)
    assert stored.nonzero().tolist() == [[0, 1, 2], [2, 1, 2]]
    assert stored[0, 1, 2] == stored[2, 1, 2] == 2


@pytest.mark.parametrize(("n", "columns"), [(1, 64), (64, 64), (70, 128), (130, 192)])
def test_escapes_come_tile_by_tile_and_row_by_row(n: int, columns: int) -> None:
    codes = random_codes(n, columns, 9)
    (row, column), offset = escapes_of(codes)
    wanted, counts = [], [0]
    for top in range(0, n, TILE):
        for left in range(0, columns, TILE):
            tile = (codes[top : top + TILE, left : left + TILE] == 0).nonzero().tolist()
            wanted += [[top + y, left + x] for y, x in tile]
            counts.append(len(wanted))
    assert torch.stack((row, column), 1).tolist() == wanted
    assert offset.tolist() == counts and offset.dtype == torch.int32
    position = tile_position(row, column)
    assert position.dtype == torch.int16
    assert position.tolist() == [y % 64 * 64 + x % 64 for y, x in wanted]
