"""Cuts: ranges inside an axis, whole columns, the same index in all parts."""

import pytest
import torch

from fewbit.quant.errors import FormatError
from fewbit.quant.formats._cuts import check_columns, cut_axis, cut_parts


def test_axes_count_from_either_end():
    assert [cut_axis("f", (3, 4, 5), axis, 0, 2) for axis in (0, -2, -1)] == [0, 1, 2]
    assert cut_axis("f", (3, 4, 5), -1, 4, 5) == 2


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 1), (0, 6)])
def test_ranges_outside_are_named(start, stop):
    with pytest.raises(FormatError, match=rf"f: cannot cut {start} to {stop} out of an axis of 5"):
        cut_axis("f", (3, 4, 5), -1, start, stop)


def test_parts_are_cut_alike():
    parts = {"a": torch.arange(24).view(2, 3, 4), "b": torch.arange(6).view(2, 3)}
    found = cut_parts(parts, 1, 1, 3)
    assert torch.equal(found["a"], parts["a"][:, 1:3])
    assert torch.equal(found["b"], parts["b"][:, 1:3])


def test_columns_are_whole():
    for start, stop in [(0, 5), (5, 10), (5, 12), (10, 12)]:
        check_columns("f", 12, start, stop, 5)
    for start, stop in [(1, 5), (0, 11), (5, 9)]:
        with pytest.raises(FormatError, match=rf"f: .* multiples of 5, got {start} to {stop}"):
            check_columns("f", 12, start, stop, 5)
