"""Which exponents have codes, codes as bytes, and where the escapes are: what `fle.py` stores.

4 bits: byte 32·t + j of a row holds column 64·t + j in bits 3..0 and column 64·t + 32 + j in bits 7..4,
so that a run of bytes is two runs of columns, and no bits change places when it is widened.
3 bits: plane p holds bit p of every code; bit i of byte j of a row is column 8·j + i.

Columns are a multiple of 64. Escapes are codes 0; they are listed tile by tile of 64 x 64, tiles of the
first 64 rows first, and within a tile row by row.
Deliberately not here: parts, and the words that codes become.
"""

import torch
from torch.nn import functional

TILE = 64  # rows and columns
_HALF = TILE // 2
_ZERO_SHARE = 64  # one in so many exponents is 0 where 0 gets a code of its own
_BIT_0 = 0x0101010101010101  # of each byte
_GATHER = 0x0102040810204080


def window_of(counts: torch.Tensor, most: int) -> tuple[int, int]:
    """(base, width) where each exponent occurs counts [256] times and the largest code is `most`."""
    if int(counts[0]) * _ZERO_SHARE <= int(counts.sum()):
        return _best_window(counts, most), most
    return 1 + _best_window(counts[1:], most - 1), most - 1


def _best_window(counts: torch.Tensor, width: int) -> int:
    """First of the `width` neighbouring values that occur most often; the least such."""
    return int(counts.unfold(0, width, 1).sum(-1).argmax())


def bytes_of_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [N, Kp] -> uint8 [N, Kp/2] for 4 bits, [3, N, Kp/8] for 3."""
    return _bytes_of_nibbles(codes) if bits == 4 else _bytes_of_planes(codes)


def codes_of_bytes(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `bytes_of_codes`."""
    return _nibbles(stored) if bits == 4 else _of_planes(stored)


def _bytes_of_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """[N, Kp] -> [N, Kp/2]; column 64·t + j and the one 32 after it share byte 32·t + j."""
    halves = codes.unflatten(1, (-1, 2, _HALF))
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1)


def _nibbles(stored: torch.Tensor) -> torch.Tensor:
    """Inverse of `_bytes_of_nibbles`."""
    tiles = stored.unflatten(1, (-1, _HALF))
    return torch.stack((tiles & 15, tiles >> 4), dim=2).flatten(1)


def _bytes_of_planes(codes: torch.Tensor) -> torch.Tensor:
    """[N, Kp] -> [3, N, Kp/8]; bit i of a byte is column i of its eight."""
    eights = codes.view(torch.int64)  # a byte each
    # The product moves bit 0 of byte i to bit 56 + i; what it carries elsewhere is dropped.
    planes = [(((eights >> p) & _BIT_0) * _GATHER >> 56).to(torch.uint8) for p in range(3)]
    return torch.stack(planes)


def _of_planes(stored: torch.Tensor) -> torch.Tensor:
    """Inverse of `_bytes_of_planes`."""
    bit = torch.arange(8, dtype=torch.uint8, device=stored.device)
    ones = [(((plane.unsqueeze(-1) >> bit) & 1) << p).flatten(1) for p, plane in enumerate(stored)]
    return ones[0] | ones[1] | ones[2]


def escapes_of(codes: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """((row, column) int64 of each code 0 of [N, Kp], in the order of the lists; offset [T + 1])."""
    across = codes.shape[1] // TILE
    is_zero = functional.pad(codes == 0, (0, 0, 0, -codes.shape[0] % TILE))
    tiles = is_zero.view(-1, TILE, across, TILE).transpose(1, 2).reshape(-1, TILE * TILE)
    at = tiles.flatten().nonzero().squeeze(1)
    tile, place = at // (TILE * TILE), at % (TILE * TILE)
    counts = torch.bincount(tile, minlength=tiles.shape[0])
    row = tile // across * TILE + place // TILE
    column = tile % across * TILE + place % TILE
    return (row, column), functional.pad(counts.cumsum(0), (1, 0)).int()


def tile_position(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """64 · row + column within the tile, int16."""
    return (row % TILE * TILE + column % TILE).to(torch.int16)
