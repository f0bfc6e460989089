"""Slab by slab gives what a unit in one piece gives, with both engines."""

import os
import threading

import numpy as np
import pytest
import torch

from fewbit.export.dfloat11 import decode_range, encode_unit, open_unit
from fewbit.export.dfloat11_code import Unfit
from fewbit.export.dfloat11_encoder import UnitEncoder, in_threads
from fewbit.export.dfloat11_native import native
from fewbit.export.dfloat11_numpy import NUMPY
from fewbit.quant.errors import CheckpointError, FormatError
from fewbit.quant.native.threads import over_threads


@pytest.fixture(params=["native", "numpy"])
def using(request):
    found = native() if request.param == "native" else NUMPY
    if found is None:
        pytest.skip("no compiled library")
    return found


def weights_of(n, seed=0, scale=0.02):
    values = np.random.default_rng(seed).normal(0, scale, n).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def coded(slabs, using):
    """(encoder, parts) of a unit, signs and mantissas included."""
    encoder = UnitEncoder([len(slab) for slab in slabs], slabs.__getitem__, using)
    sign_mantissa = np.zeros(encoder.n, np.uint8)

    def put(first, data):
        sign_mantissa[first : first + len(data)] = data

    sizes = encoder.sizes
    assert list(encoder.encode(put)) == [len(slab) for slab in slabs if len(slab)]
    parts = encoder.parts() | {"sign_mantissa": sign_mantissa}
    assert {name: len(parts[name]) for name in sizes} == sizes, "known before anything is coded"
    return encoder, parts | {"split_positions": np.empty(0, np.int64)}


@pytest.mark.parametrize("cuts", [[], [1], [0, 7, 7, 4096], [16384, 30_000, 49_999, 50_000]])
def test_slabs_make_the_unit(using, cuts):
    weights = weights_of(50_000)
    slabs = np.split(weights, cuts)
    encoder, parts = coded(slabs, using)
    expected = encode_unit([weights], using)
    assert parts.keys() == expected.keys()
    for name, part in expected.items():
        assert part.dtype == parts[name].dtype and np.array_equal(part, parts[name]), name
    encoder.compare(open_unit(parts, "u"), lambda *span: decode_range(*span, "u", using))


@pytest.mark.parametrize("n", range(1, 140))
def test_every_end(using, n):
    """Ends inside and behind bytes and windows; sizes are those of what is made (see `coded`)."""
    weights = weights_of(n, n, scale=4.0)
    _, parts = coded([weights[: n // 2], weights[n // 2 :]], using)
    for name, part in encode_unit([weights], using).items():
        assert np.array_equal(part, parts[name]), name


def test_a_stream_that_ends_with_a_block(using):
    """Two symbols and the end mark: codes of one and two bits, so that any length can be met."""
    ones, twos = np.uint16(127 << 7), np.uint16(128 << 7)
    for n in range(32_760, 32_776):
        weights = np.full(n - 8, ones)
        weights[-8:] = twos
        _, parts = coded([weights[:20_000], weights[20_000:]], using)
        for name, part in encode_unit([weights], using).items():
            assert np.array_equal(part, parts[name]), (n, name)


def test_a_changed_bit_is_found(using):
    encoder, parts = coded([weights_of(30_000), weights_of(5000, 1)], using)
    parts["sign_mantissa"][31_000] ^= 0x80  # minus
    with pytest.raises(CheckpointError, match="same bits for the unit's elements 30000 to 34999"):
        encoder.compare(open_unit(parts, "u"), lambda *span: decode_range(*span, "u", using))


@pytest.mark.parametrize("slabs", [[], [np.empty(0, np.uint16)]])
def test_nothing_to_code(using, slabs):
    with pytest.raises(Unfit, match="0 elements"):
        UnitEncoder([len(slab) for slab in slabs], slabs.__getitem__, using)


def test_parts_before_anything_is_coded(using):
    encoder = UnitEncoder([50], [weights_of(50)].__getitem__, using)
    with pytest.raises(FormatError, match="no parts yet; run encode"):
        encoder.parts()


def test_weights_that_change_between_two_readings_stay_within_the_unit():
    """Their codes are longer than those that were counted: C would write behind its buffers."""
    if native() is None:
        pytest.skip("no compiled library")
    weights = weights_of(20_000, scale=4.0)
    rarest = weights[np.argmin(np.bincount(weights >> 7 & 255)[weights >> 7 & 255])]
    readings = iter((weights, np.full_like(weights, rarest)))
    encoder = UnitEncoder([20_000], lambda index: next(readings), native())
    with pytest.raises(FormatError, match=r"elements 0 to 19999 end in window .* export again"):
        list(encoder.encode(lambda first, data: None))


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_as_many_threads_as_torch_uses(three_threads, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    seen, gate = set(), threading.Barrier(3, timeout=20)

    def work(item):
        seen.add(threading.get_ident())
        gate.wait()
        return item

    assert list(in_threads(work, range(6))) == list(range(6))
    assert len(seen) == 3
    torch.set_num_threads(1)
    assert set(in_threads(lambda i: threading.get_ident(), range(4))) == {threading.get_ident()}


def test_work_may_use_threads_in_turn(three_threads):
    """In one pool all three would wait for what none is left to do."""

    def work(item):
        return sum(in_threads(abs, range(5))) + sum(over_threads(abs, range(item)))

    found = []
    outer = threading.Thread(target=lambda: found.extend(in_threads(work, range(9))), daemon=True)
    outer.start()
    outer.join(20)
    assert found == [10 + item * (item - 1) // 2 for item in range(9)]


def test_threads_keep_the_order_and_raise():
    assert list(in_threads(lambda i: i * i, range(1000))) == [i * i for i in range(1000)]
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda i: 1 // (i - 5), range(1000)))
