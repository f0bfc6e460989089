"""Checks of rans32 decoders: the kernel passes in the interpreter, wrong ones fail."""

from dataclasses import replace

import numpy as np
import pytest

from bench.oracle_check import Place
from bench.oracle_rans32 import SPOTS, Spot, coded_planes, lanes, planted
from fewbit.kernels_triton import _triton
from fewbit.kernels_triton.decode_rans32 import KERNEL
from fewbit.quant.codecs.planes import Kind
from fewbit.quant.codecs.rans32 import CHUNK
from fewbit.quant.machine import load_device

FEW = Place("cpu", load_device("h100"), reduced=True)
runs = pytest.mark.skipif(not _triton.interpreted(), reason="Triton's interpreter is not on")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def checks(launch=KERNEL.launch):
    kernel = replace(KERNEL, launch=launch)
    return [check for lane in lanes(kernel, FEW) for step in lane if (check := step())]


@runs
def test_the_kernel_passes():
    found = checks()
    assert len(found) == 6 * 4 * 4 + 5
    for check in [*found[:16], *found[16::7], *found[-5:]]:
        assert check.error() == 0.0, check.case


def unflagged(out, streams, config):
    return KERNEL.launch(out, streams, config) * 0


def one_bit(out, streams, config):
    flags = KERNEL.launch(out, streams, config)
    out[0] ^= 1
    return flags


def behind(out, streams, config):
    flags = KERNEL.launch(out, streams, config)
    out[-1] = 0
    return flags


@runs
@pytest.mark.parametrize(
    ("launch", "damaged"), [(unflagged, True), (one_bit, False), (behind, False), (behind, True)]
)
def test_wrong_kernels_fail(launch, damaged):
    found = checks(launch)
    for check in found[-5:] if damaged else found[:4]:
        assert check.error() > 0, check.case


def test_layouts_of_spots_lie_apart():
    for spot in SPOTS:
        layout = spot.layout(Kind.HALF)
        assert layout.n_elements == spot.n
    tile = Spot("tile", CHUNK * 6, 3).layout(Kind.HALF)
    assert tile.starts.tolist() == [0, 512, 1024, 98304, 98816, 99328] and tile.stride == 1536


def test_planted_chunks_are_of_three_sorts():
    data = planted(CHUNK * 3, Kind.BYTE).reshape(3, CHUNK)
    assert len(np.unique(data[1])) == 1 and len(np.unique(data[2])) == 256
    assert 10 < len(np.unique(data[0])) < 100
    assert coded_planes(Kind.FP32, "all") == [0, 1, 2, 3] and coded_planes(Kind.FP32, "last") == [3]
