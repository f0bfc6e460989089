"""QServe layout: golden bytes from the address formulas, identities, and the two orders of s2."""

from hashlib import sha256

import pytest
import torch

from fewbit.export.qserve_layout import (
    choose_group_order,
    pack_codes,
    pack_groups,
    read_linear,
    unpack_codes,
    unpack_groups,
    write_linear,
)
from fewbit.quant.errors import CheckpointError, FormatError
from fewbit.quant.formats.int_two_level import FORMAT, IntTwoLevelOptions


def pattern(n: int, k: int) -> torch.Tensor:
    """Codes that tell rows, columns and their product apart."""
    rows, columns = torch.arange(n).unsqueeze(-1), torch.arange(k)
    return ((7 * rows + 3 * columns + rows * columns // 5) % 16).to(torch.uint8)


def by_formula(codes: torch.Tensor) -> bytes:
    """One nibble at a time, straight from the address formula."""
    n_rows, n_columns = codes.shape
    stored = bytearray(n_rows * n_columns // 2)
    for n in range(n_rows):
        for k in range(n_columns):
            lane = (n % 8) * 4 + (k % 16) // 4
            byte = (k // 16 % 2) * 8 + (n // 8 % 2) * 4 + k % 4
            address = ((n // 32) * (n_columns // 32) + k // 32) * 512 + lane * 16 + byte
            stored[address] |= int(codes[n, k]) << (4 if n % 32 >= 16 else 0)
    return bytes(stored)


def test_golden_bytes_of_codes() -> None:
    """Made once by a scalar loop over the formula, outside of this project."""
    stored = pack_codes(pattern(64, 256))
    assert stored.dtype == torch.int8 and stored.shape == (64, 128)
    data = stored.numpy().tobytes()
    assert data[:16].hex() == "0063c62988fc71f53093f65941c64acf"
    assert data[4096:4112].hex() == "00c9925c88634e29966f29f2b8937e59"
    assert data[-8:].hex() == "927d58334d3a3633"
    assert sha256(data).hexdigest()[:32] == "4fa5b33216a2b90d4662772781790355"


@pytest.mark.parametrize("shape", [(32, 32), (96, 64), (64, 160)])
def test_codes_follow_the_formula_and_come_back(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    codes = torch.randint(0, 16, shape, generator=generator).to(torch.uint8)
    stored = pack_codes(codes)
    assert stored.numpy().tobytes() == by_formula(codes)
    assert torch.equal(unpack_codes(stored), codes)


def test_golden_order_of_scales() -> None:
    numbers = torch.arange(64, dtype=torch.int8).unsqueeze(-1)
    quads, pairs = pack_groups(numbers, "quads")[0], pack_groups(numbers, "pairs")[0]
    assert quads[:9].tolist() == [0, 8, 16, 24, 1, 9, 17, 25, 2]
    assert quads[32:36].tolist() == [32, 40, 48, 56]
    assert pairs[:6].tolist() == [0, 8, 1, 9, 2, 10]
    assert pairs[14:20].tolist() == [7, 15, 16, 24, 17, 25]
    for n in range(64):
        assert quads[n // 32 * 32 + (n % 8) * 4 + (n % 32) // 8] == n
        assert pairs[n // 32 * 32 + (n % 32) // 16 * 16 + (n % 8) * 2 + n // 8 % 2] == n


@pytest.mark.parametrize("order", ["quads", "pairs"])
def test_scales_come_back(order: str) -> None:
    values = torch.randint(-128, 128, (96, 5), dtype=torch.int8)
    stored = pack_groups(values, order)
    assert stored.shape == (5, 96) and stored.is_contiguous()
    assert torch.equal(unpack_groups(stored, order), values)


def quantized(options: IntTwoLevelOptions) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(64, 2, generator=generator).mul(3).exp()  # rows and groups of unlike ranges
    weight = torch.randn(64, 256, generator=generator) * sizes.repeat_interleave(128, -1)
    scales = FORMAT.fit(weight, options)
    codes, _ = FORMAT.round(weight, scales, 0, options)
    return weight, FORMAT.pack(codes, scales, options)


@pytest.mark.parametrize("order", ["quads", "pairs"])
@pytest.mark.parametrize("group", [128, "row"])
def test_a_linear_comes_back(group: int | str, order: str) -> None:
    options = IntTwoLevelOptions(4, group)
    _, parts = quantized(options)
    stored = write_linear(parts, order)
    kinds = {name: (part.dtype, tuple(part.shape)) for name, part in stored.items()}
    expected = {"qweight": (torch.int8, (64, 128)), "s1_scales": (torch.float16, (64,))}
    if group == "row":
        assert kinds == expected | {"s1_szeros": (torch.float16, (64,))}
    else:
        assert kinds == expected | dict.fromkeys(("s2_scales", "s2_zeros"), (torch.int8, (2, 64)))
    found = read_linear(stored, order)
    FORMAT.check(found, (64, 256), options)
    for name, part in parts.items():
        assert torch.equal(found[name], part)


def test_zeros_of_rows_are_those_of_the_epilogue() -> None:
    """w = s1·code − s1_szeros."""
    options = IntTwoLevelOptions(4, "row")
    _, parts = quantized(options)
    stored = write_linear(parts)
    scale, zeros = stored["s1_scales"].float()[:, None], stored["s1_szeros"].float()[:, None]
    expected = unpack_codes(stored["qweight"]).float() * scale - zeros
    assert torch.equal(FORMAT.unpack(parts, (64, 256), options), expected)


@pytest.mark.parametrize("written", ["quads", "pairs"])
def test_the_order_of_s2_is_flagged_or_chosen_by_loss(written: str) -> None:
    options = IntTwoLevelOptions()
    weight, parts = quantized(options)
    stored = write_linear(parts, written)
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(1))

    def loss(order: str) -> float:
        read = FORMAT.unpack(read_linear(stored, order), (64, 256), options)
        return float((x @ (read - weight).T).square().mean() / (x @ weight.T).square().mean())

    other = "pairs" if written == "quads" else "quads"
    assert loss(written) < 0.02  # flagged: the weight itself
    assert loss(other) > 0.2  # misread: valid numbers of wrong rows
    assert choose_group_order(loss) == written


def test_orders_that_cannot_be_told_are_refused() -> None:
    assert choose_group_order(lambda order: {"quads": float("nan"), "pairs": 3.0}[order]) == "pairs"
    for value in (1.0, float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match="name the order"):
            choose_group_order(lambda order, value=value: value)


def test_impossible_shapes_are_named() -> None:
    with pytest.raises(FormatError, match="N in multiples of 32, got 40"):
        pack_codes(torch.zeros(40, 32, dtype=torch.uint8))
    with pytest.raises(FormatError, match="K in multiples of 32, got 48"):
        unpack_codes(torch.zeros(32, 24, dtype=torch.int8))
    with pytest.raises(FormatError, match="group_order must be 'quads' or 'pairs', got 'rows'"):
        pack_groups(torch.zeros(32, 1), "rows")
    options = IntTwoLevelOptions(4, 64)
    with pytest.raises(FormatError, match="groups of 128 columns, got 4 groups for K = 256"):
        write_linear(quantized(options)[1])
