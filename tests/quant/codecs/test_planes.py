"""Elements <-> byte planes: the table of bits, inverses, refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbit.quant.codecs.planes import Kind, kind_of, merge, split
from fewbit.quant.errors import FormatError


@pytest.mark.parametrize(
    "dtype, kind, n_planes",
    [
        (torch.bfloat16, Kind.BF16, 2), (torch.float16, Kind.HALF, 2), (torch.int16, Kind.HALF, 2),
        (torch.float32, Kind.FP32, 4), (torch.int32, Kind.WORD, 4), (torch.int64, Kind.LONG, 8),
        (torch.float64, Kind.LONG, 8), (torch.complex64, Kind.LONG, 8), (torch.int8, Kind.BYTE, 1),
        (torch.uint8, Kind.BYTE, 1), (torch.bool, Kind.BYTE, 1), (torch.float8_e4m3fn, Kind.BYTE, 1),
    ],
)  # fmt: skip
def test_kinds_of_dtypes(dtype, kind, n_planes):
    assert kind_of(dtype) is kind
    assert kind.n_planes == n_planes == dtype.itemsize


def test_wide_elements_are_refused_by_name():
    with pytest.raises(FormatError, match="complex128 have 16 bytes"):
        kind_of(torch.complex128)


def test_numbers_of_kinds_are_what_files_store():
    assert [kind.value for kind in Kind] == [0, 1, 2, 3, 4, 5]
    assert [kind.name for kind in Kind] == ["BYTE", "BF16", "HALF", "FP32", "WORD", "LONG"]


def test_planes_of_bf16_to_the_bit():
    every = np.arange(65536, dtype="<u2")
    exponent, rest = split(every.view(np.uint8), Kind.BF16)
    np.testing.assert_array_equal(exponent, (every >> 7) & 255)
    np.testing.assert_array_equal(rest, ((every >> 8) & 128) | (every & 127))


def test_planes_of_one_number():
    minus_three = np.frombuffer(np.float32(-3.0000002).tobytes(), np.uint8)  # c0400001
    assert split(minus_three, Kind.FP32)[:, 0].tolist() == [0x80, 0xC0, 0x00, 0x01]
    assert split(minus_three, Kind.WORD)[:, 0].tolist() == [0xC0, 0x40, 0x00, 0x01]
    assert split(minus_three, Kind.HALF).tolist() == [[0x00, 0xC0], [0x01, 0x40]]
    eight = np.arange(8, dtype=np.uint8)
    assert split(eight, Kind.LONG)[:, 0].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


@given(st.sampled_from(Kind), st.binary(max_size=400))
def test_merge_undoes_split(kind, data):
    elements = np.frombuffer(data[: len(data) // 8 * 8], np.uint8)
    planes = split(elements, kind)
    assert planes.shape == (kind.n_planes, elements.size // kind.n_planes)
    np.testing.assert_array_equal(merge(planes, kind), elements)


def test_what_is_no_array_of_elements_is_refused():
    with pytest.raises(FormatError, match="multiple of 4 bytes"):
        split(np.zeros(6, np.uint8), Kind.FP32)
    with pytest.raises(FormatError, match="1-D uint8"):
        split(np.zeros((2, 4), np.uint8), Kind.FP32)
    with pytest.raises(FormatError, match=r"\[2, n\]"):
        merge(np.zeros((3, 4), np.uint8), Kind.HALF)
