"""Where chunks lie, and refusals of layouts and groups that do not fit."""

import pickle

import numpy as np
import pytest

from fewbit.quant.codecs.chunks import (
    CHUNK,
    LANES,
    Damage,
    Group,
    Layout,
    carried,
    flat_layout,
    raw_offsets,
)  # fmt: skip
from fewbit.quant.codecs.planes import Kind


def layout(starts, sizes, piece=CHUNK, stride=0):
    return Layout(np.array(starts, np.int64), np.array(sizes, np.int32), piece, stride)


@pytest.mark.parametrize("n, sizes", [
    (0, []), (1, [1]), (CHUNK, [CHUNK]), (CHUNK + 1, [CHUNK, 1]), (2 * CHUNK - 1, [CHUNK, CHUNK - 1]),
])  # fmt: skip
def test_flat_chunks_follow_each_other(n, sizes):
    found = flat_layout(n, Kind.FP32)
    assert found.sizes.tolist() == sizes
    assert found.starts.tolist() == [4 * CHUNK * i for i in range(len(sizes))]
    assert found.n_elements == n
    found.check(4 * n, Kind.FP32)
    if n:
        with pytest.raises(ValueError, match="ends behind"):
            found.check(4 * n - 1, Kind.FP32)


def test_a_tile_ends_with_its_last_piece():
    tile = layout([512], [64 * 256], 256, 4096)
    end = 512 + 63 * 4096 + 512
    tile.check(end, Kind.BF16)
    with pytest.raises(ValueError, match=f"buffer's {end - 1} bytes"):
        tile.check(end - 1, Kind.BF16)
    short = layout([0], [257], 256, 4096)  # one whole piece and one element
    short.check(4096 + 2, Kind.BF16)
    with pytest.raises(ValueError, match="ends behind"):
        short.check(4096 + 1, Kind.BF16)


@pytest.mark.parametrize("wrong, message", [
    (layout([-1], [1]), "starts before"),
    (layout([1 << 62], [1]), "ends behind"),
    (layout([0], [0]), "1 to 16384 elements, got 0..0"),
    (layout([0], [CHUNK + 1]), "got 16385..16385"),
    (layout([0, 0], [1]), "must be"),
    (layout([0], [2], 1, 1 << 48), "stride 281474976710656"),
    (layout([0], [2], 0, 1), "piece 0"),
    (layout([0], [2], 1, -1), "stride -1"),
    (Layout(np.zeros(1, np.int32), np.ones(1, np.int32), 1, 1), "starts int32"),
])  # fmt: skip
def test_impossible_layouts_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong.check(1 << 20, Kind.BYTE)


def test_damage_names_the_chunk_and_survives_other_processes():
    damage = pickle.loads(pickle.dumps(Damage(3, "the reason")))
    assert (damage.chunk, damage.reason, str(damage)) == (3, "the reason", "chunk 3: the reason")
    assert str(Damage(-1, "the reason")) == "the reason"


@pytest.mark.parametrize("field", ["raw", "words", "index", "state", "crc"])
def test_a_group_of_wrong_shapes_or_dtypes_is_damage(field):
    arrays = {
        "raw": np.zeros(40000 - 3 * 64, np.uint8), "words": np.zeros(10, np.uint8),
        "index": np.zeros(4, np.uint64), "state": np.zeros((3, LANES), np.uint32),
        "crc": np.zeros(3, np.uint32),
    }  # fmt: skip
    chunks = flat_layout(40000, Kind.BF16)
    Group(**arrays).check(chunks, 1, 1)
    for wrong in (arrays[field].astype(np.int64), arrays[field][None], arrays[field][..., :-1]):
        if field == "words" and wrong.dtype == np.uint8 and wrong.ndim == 1:
            continue  # their length is no one's business but the index's
        with pytest.raises(Damage, match=f"{field} is"):
            Group(**{**arrays, field: wrong}).check(chunks, 1, 1)


@pytest.mark.parametrize("size, n_coded, n_raw, wanted", [
    (CHUNK, 1, 1, 64), (64, 1, 1, 64), (63, 1, 1, 0), (64, 0, 1, 0), (64, 1, 0, 0), (64, 3, 5, 64),
])  # fmt: skip
def test_what_a_chunk_carries(size, n_coded, n_raw, wanted):
    assert carried(size, n_coded, n_raw) == wanted
    sizes = np.array([size, CHUNK, size], np.int32)
    full = n_raw * CHUNK - carried(CHUNK, n_coded, n_raw)
    stored = n_raw * size - wanted
    assert raw_offsets(sizes, n_coded, n_raw).tolist() == [
        0,
        stored,
        stored + full,
        2 * stored + full,
    ]


def test_full_chunks_have_a_fixed_stride_in_raw():
    sizes = flat_layout(5 * CHUNK + 63, Kind.FP32).sizes
    offsets = raw_offsets(sizes, 2, 2)
    assert offsets[:6].tolist() == [c * (2 * CHUNK - 64) for c in range(6)]
    assert offsets[6] - offsets[5] == 2 * 63
    assert raw_offsets(sizes[:0], 2, 2).tolist() == [0]
