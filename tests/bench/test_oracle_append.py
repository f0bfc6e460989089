"""Checks of kernels that write pages: torch's way passes, wrong bytes fail."""

from dataclasses import replace

import pytest
import torch

from bench.oracle_append import (
    SPOTS,
    Spot,
    empty_pages,
    lanes,
    moved,
    rope_lanes,
    rotated_channels,
    tables,
)
from bench.oracle_check import Place
from fewbit.quant.formats.int4_head import Int4HeadOptions
from fewbit.quant.kernel import Kernel
from fewbit.quant.kv_write import AppendOptions, append, rotate
from fewbit.quant.machine import load_device

FEW = Place("cpu", load_device("h100"), reduced=True)


def checks(launch, place=FEW):
    kernel = Kernel(
        "stand_in", lambda p: (), lambda p, d: None, launch, lambda p: 1.0, op="append_kv"
    )
    return [check for lane in lanes(kernel, place) for step in lane if (check := step())]


def test_torch_passes_everywhere():
    found = checks(append)
    assert len(found) == 2 * 3 * 2 * 3 and {check.tolerance for check in found} == {0.0, 1e-3}
    for check in found[::2]:
        assert check.error() == 0.0, check.case


def elsewhere(pages, keys, values, first, rope):
    append(pages, keys, values, first, rope)
    pages.keys["codes"][-1, 0, -1] = 0


def one_code(pages, keys, values, first, rope):
    append(pages, keys, values, first, rope)
    position = int(first[0]) if isinstance(first, torch.Tensor) else first
    page = pages.table[0, position // 64]
    pages.values["codes"][page, 0, position % 64, 0] ^= 0x70


def unrotated(pages, keys, values, first, rope):
    append(pages, keys, values, first, None)


def next_slot(pages, keys, values, first, rope):
    append(pages, keys, values, first + 1, rope)


@pytest.mark.parametrize("launch", [elsewhere, one_code, unrotated, next_slot])
def test_wrong_bytes_fail(launch):
    found = [check for check in checks(launch) if "rope=half" in check.case]
    assert {"fit=range", "fit=search"} <= {word for c in found for word in c.case.split()}
    assert all(check.error() > check.tolerance for check in found)


def rope_checks(launch):
    kernel = Kernel("stand_in", lambda p: (), lambda p, d: None, launch, lambda p: 1.0, op="rope")
    return [check for lane in rope_lanes(kernel, FEW) for step in lane if (check := step())]


def test_rotations_must_be_equal_bit_by_bit():
    found = rope_checks(rotate)
    assert len(found) == 2 * 2 * 3 and all(check.error() == 0.0 for check in found)

    def other_style(x, rope):
        return rotate(x, replace(rope, style="pairs" if rope.style == "half" else "half"))

    for launch in (other_style, lambda x, rope: x):
        assert all(check.error() > 0 for check in rope_checks(launch))


def test_some_checks_rotate_half_of_the_channels():
    assert {rotated_channels(SPOTS[0], index) for index in range(4)} == {64, 128}


def test_pages_are_ones_in_any_order():
    spot = Spot(4, 2, 64, 1, 0)
    options = AppendOptions(
        "int4_head", Int4HeadOptions(), "int4_head", Int4HeadOptions(), 2, 64, 64
    )
    pages = empty_pages(options, spot, torch.float16)
    assert sorted(pages.table.flatten().tolist()) == list(range(12))
    assert pages.table.flatten().tolist() != list(range(12))
    assert (pages.keys["codes"] == 255).all() and torch.isnan(pages.values["scale"]).all()
    other = moved(pages, "cpu")
    other.keys["codes"].zero_()
    assert (pages.keys["codes"] == 255).all()


def test_tables_differ_for_each_row_and_token():
    rope = tables(Spot(2, 1, 8, 3, 0), torch.float32, "pairs", 8)
    assert rope.cos.shape == (2, 3, 8) and len(rope.cos.flatten(0, 1).unique(dim=0)) == 6


def test_spots_fit_their_pages():
    assert all(spot.first + spot.n_new <= 3 * 64 for spot in SPOTS)
    assert any(spot.first // 64 != (spot.first + spot.n_new - 1) // 64 for spot in SPOTS)
    full = checks(append, replace(FEW, reduced=False))
    assert len(full) == 2 * 3 * 2 * len(SPOTS)
