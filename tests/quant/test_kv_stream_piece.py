"""Pieces: vectors and tensors there and back, sizes against entropies, and pieces that lie."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.quant.codecs import rans32
from fewbit.quant.kv_stream_codes import BINS, dequantize, n_symbols, quantize
from fewbit.quant.kv_stream_frame import Reader, StreamError
from fewbit.quant.kv_stream_piece import (
    _streams,
    decode_tensor,
    decode_vectors,
    encode_tensor,
    encode_vectors,
)
from fewbit.quant.kv_stream_predict import residuals
from fewbit.quant.kv_stream_profile import SideTable, group_slices, profile
from kv_prefixes import layers, random_layers, tables

DTYPES = [torch.uint8, torch.int64, torch.bfloat16, torch.float16, torch.float32]


def side() -> SideTable:
    return profile(lambda: [random_layers(1)]).layers[0][0]


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_vectors_come_back_as_their_codes_say(bins: int, dtype: torch.dtype) -> None:
    keys = random_layers(1, dtype=dtype)[0][0]
    piece = Reader(encode_vectors(keys, bins, side()), "piece")
    found = decode_vectors(piece, 2, 40, bins, side(), dtype)
    assert torch.equal(found, dequantize(*quantize(keys, bins), bins, 3, dtype))


def test_a_piece_costs_what_its_tables_say_and_little_more() -> None:
    """Cross entropy + 136 bytes a chunk of the coder (two of them) + maxima of at most 10 bits."""
    for (key_table, value_table), pair in zip(tables().layers, layers(256), strict=True):
        for table, vectors in zip((key_table, value_table), pair, strict=True):
            codes = quantize(vectors, 16)[0].numpy()
            symbols = residuals(codes, table.predictor, 16)[:, :, table.order]
            bits = 0.0
            for group, positions in enumerate(group_slices(128)):
                share = table.frequencies[16][group] / 4096
                bits -= np.log2(share[symbols[:, :, positions]]).sum()
            size = len(encode_vectors(vectors, 16, table))
            assert bits / 8 < size < bits / 8 * 1.003 + 2 * 136 + 3 + 256 * 10 / 8


def test_what_states_carry_comes_back_whatever_the_mode_of_their_stream() -> None:
    """bf16 of random mantissas: exponents constant in chunk 0, as coded in 1, too rare to code in 2."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 128, (2 * 40000,), generator=generator)
    words |= torch.tensor([120 << 7]).expand(len(words))
    words[16384:32768] += torch.randint(0, 4, (16384,), generator=generator) << 7
    words[32768:49152] ^= torch.randint(0, 256, (16384,), generator=generator) << 7
    tensor = words.to(torch.int16).view(torch.bfloat16)
    data = encode_tensor(tensor)
    assert len(data) < 2 * len(tensor)
    found = decode_tensor(Reader(data, "piece"), (len(tensor),), torch.bfloat16)
    assert found.view(torch.int16).equal(tensor.view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 5, 16384, 16385, 40000])
def test_tensors_come_back_bit_for_bit(dtype: torch.dtype, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    normal = torch.randn(n, generator=generator)
    for x in (normal * 30, torch.zeros(n), normal.sign()):
        tensor = x.to(dtype)
        data = encode_tensor(tensor)
        assert len(data) <= n * dtype.itemsize + 1 + 4 * (n // 16384 + 1)
        found = decode_tensor(Reader(data, "piece"), (n, 1), dtype)
        assert found.dtype == dtype and found.shape == (n, 1)
        assert torch.equal(found.flatten().view(torch.uint8), tensor.view(torch.uint8))


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=600), dtype=st.sampled_from(DTYPES))
def test_any_bytes_come_back(data: bytes, dtype: torch.dtype) -> None:
    n = len(data) // dtype.itemsize
    words = torch.frombuffer(bytearray(data + bytes(8)), dtype=torch.uint8)[: n * dtype.itemsize]
    found = decode_tensor(Reader(encode_tensor(words.clone().view(dtype)), "piece"), (n,), dtype)
    assert torch.equal(found.view(torch.uint8), words)


def test_exponents_are_coded_and_mantissas_are_not() -> None:
    x = torch.randn(65536, generator=torch.Generator().manual_seed(0)).bfloat16()
    data = encode_tensor(x)
    assert data[0] == 1  # plane 0 alone
    assert 0.65 < len(data) / (2 * x.numel()) < 0.68


@settings(max_examples=300, deadline=None)
@given(
    at=st.integers(0, 10**6), change=st.integers(1, 255), cut=st.booleans(), lossless=st.booleans()
)
def test_a_piece_that_lies_gives_an_error_or_values_of_its_shape(
    at: int, change: int, cut: bool, lossless: bool
) -> None:
    """Checksums of frames are beside the point here: what if a liar made them?"""
    keys, table = random_layers(1)[0][0], side()
    data = bytearray(encode_tensor(keys) if lossless else encode_vectors(keys, 16, table))
    at %= len(data)
    data[at] ^= change
    piece = Reader(bytes(data[:at] if cut else data), "here")
    try:
        if lossless:
            found = decode_tensor(piece, tuple(keys.shape), keys.dtype)
        else:
            found = decode_vectors(piece, 2, 40, 16, table, keys.dtype)
    except StreamError as error:
        assert str(error).startswith("here")
    else:
        assert found.shape == keys.shape and not cut


def test_lies_that_are_named() -> None:
    table, shape = side(), (2, 40, 24)
    data = encode_vectors(torch.zeros(2, 3, 40, 8), 16, table)
    with pytest.raises(StreamError, match="maxima of 17 bits, must be 1 to 16"):
        decode_vectors(Reader(data[:2] + b"\x11" + data[3:], "x"), 2, 40, 16, table, torch.float32)
    with pytest.raises(StreamError, match="1 bytes too many"):
        decode_vectors(Reader(data + b"\0", "x"), 2, 40, 16, table, torch.float32)
    with pytest.raises(StreamError, match="plane mask 0x2 of 1 planes"):
        decode_tensor(Reader(b"\x02" + bytes(100), "x"), shape, torch.uint8)
    with pytest.raises(StreamError, match="frequencies of plane 0 sum to 5"):
        row = b"\x01" + bytes(31) + b"\x05\0"  # one symbol, of 5 in 4096
        decode_tensor(Reader(b"\x01" + row + bytes(10000), "x"), shape, torch.uint8)


def test_a_shape_that_lies_allocates_nothing() -> None:
    """2^60 elements: an attempt to allocate them would be a MemoryError."""
    for data in (encode_tensor(torch.zeros(100)), encode_tensor(torch.randn(100))):
        with pytest.raises(StreamError, match="early"):
            decode_tensor(Reader(data, "x"), (1 << 30, 1 << 30), torch.float32)
    data = encode_vectors(torch.zeros(2, 3, 40, 8), 16, side())
    with pytest.raises(StreamError, match="early"):
        decode_vectors(Reader(data, "x"), 1 << 30, 1 << 30, 16, side(), torch.float32)


def test_a_symbol_that_no_code_has_is_refused() -> None:
    """Tables give them no frequency, but a liar can store streams that need none."""
    table = side()
    for bins in BINS:
        assert (table.frequencies[bins][:, n_symbols(bins) :] == 0).all()
    data = encode_vectors(random_layers(1)[0][0], 16, table)
    maxima = data[: 3 + -(-80 * data[2] // 8)]
    symbols = np.random.default_rng(0).integers(0, 256, 2 * 40 * 24).astype(np.uint8)
    raw = rans32.encode_symbols(symbols, np.full(256, 16, np.uint16))
    assert raw.index[0] >> np.uint64(62) == rans32.Mode.RAW
    with pytest.raises(StreamError, match="x: symbol 255 of 15"):
        decode_vectors(Reader(maxima + _streams(raw), "x"), 2, 40, 16, table, torch.float32)
