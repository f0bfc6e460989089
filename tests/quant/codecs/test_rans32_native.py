"""The binding: what it passes on when arrays lie oddly, threads, and codes that become errors.

Streams, damage and sizes are tested with every engine in test_rans32.py.
"""

from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
import pytest

from fewbit.quant.codecs import rans32_native
from fewbit.quant.codecs.chunks import Damage, Group, Layout, flat_layout
from fewbit.quant.codecs.frequencies import normalize
from fewbit.quant.codecs.planes import Kind
from fewbit.quant.native import compiler

pytestmark = pytest.mark.skipif(compiler.library() is None, reason=str(compiler.why_not()))


def exponents(n, seed=0):
    return np.random.default_rng(seed).binomial(30, 0.3, n).astype(np.uint8)


def shifted(array):
    """The same values at an address that is not a multiple of their size."""
    buffer = np.empty(array.nbytes + 1, np.uint8)[1:]
    buffer[:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    return buffer.view(array.dtype).reshape(array.shape)


def test_arrays_of_any_address_and_stride():
    symbols = exponents(50001)
    layout, freq = flat_layout(50001, Kind.BYTE), normalize(np.bincount(symbols, minlength=256))
    freq = np.repeat(freq[None], 2, axis=1)[:, ::2]
    group = rans32_native.encode(shifted(symbols), Kind.BYTE, layout, freq)
    moved = Group(
        *(shifted(getattr(group, name)) for name in ("raw", "words", "index", "state", "crc"))
    )
    out = shifted(np.zeros_like(symbols))
    rans32_native.decode(moved, out, Kind.BYTE, layout, freq)
    np.testing.assert_array_equal(out, symbols)


def test_checksums_are_crc32c():
    library = compiler.library()
    assert library.fewbit_crc32c(0, b"123456789", 9) & 0xFFFFFFFF == 0xE3069283
    data = np.random.default_rng(0).integers(0, 256, 70000, np.uint8).tobytes()
    for n in (*range(70), 2047, 2048, 16383, 16384, 65537):
        assert library.fewbit_crc32c(0, data, n) & 0xFFFFFFFF == google_crc32c.value(data[:n])
    halves = library.fewbit_crc32c(library.fewbit_crc32c(0, data, 1000), data[1000:], 9000)
    assert halves & 0xFFFFFFFF == google_crc32c.value(data[:10000])


def test_threads_code_at_the_same_time():
    parts = [exponents(70000, seed) for seed in range(16)]
    layout = flat_layout(70000, Kind.BYTE)
    freq = normalize(np.bincount(np.concatenate(parts), minlength=256))[None]

    def there_and_back(part):
        out = np.empty_like(part)
        group = rans32_native.encode(part, Kind.BYTE, layout, freq)
        rans32_native.decode(group, out, Kind.BYTE, layout, freq)
        return out

    with ThreadPoolExecutor(4) as pool:
        for part, out in zip(parts, pool.map(there_and_back, parts), strict=True):
            np.testing.assert_array_equal(out, part)


def test_codes_become_errors():
    with pytest.raises(Damage, match="chunk 4: the checksum"):
        rans32_native._raise(7, 4)
    with pytest.raises(MemoryError):
        rans32_native._raise(9)
    with pytest.raises(ValueError, match="code 8"):
        rans32_native._raise(8)
    rans32_native._raise(0)


def test_words_that_need_more_room_than_expected_get_it():
    """Frequencies of other data: 8 bits a symbol where half a bit was promised."""
    symbols = np.random.default_rng(0).integers(0, 256, 300001, np.uint8)
    freq = np.ones(256, np.uint16)
    freq[7] = 4096 - 255
    layout = flat_layout(symbols.size, Kind.BYTE)
    assert rans32_native._likely_bytes(freq, symbols.size) < symbols.size / 5
    group = rans32_native.encode(symbols, Kind.BYTE, layout, freq[None])
    assert group.words.size >= symbols.size
    out = np.empty_like(symbols)
    rans32_native.decode(group, out, Kind.BYTE, layout, freq[None])
    np.testing.assert_array_equal(out, symbols)


def test_what_c_refuses_is_put_into_words():
    """Layouts and frequencies are checked in C alone; nothing is read or written before."""
    data = exponents(100)
    freq, layout = normalize(np.bincount(data, minlength=256))[None], flat_layout(100, Kind.BYTE)
    group = rans32_native.encode(data, Kind.BYTE, layout, freq)
    calls = (
        lambda layout, freq: rans32_native.encode(data, Kind.BYTE, layout, freq),
        lambda layout, freq: rans32_native.decode(group, data.copy(), Kind.BYTE, layout, freq),
    )
    for call in calls:
        with pytest.raises(ValueError, match="a chunk ends behind the buffer's 100 bytes"):
            call(Layout(layout.starts + 1, layout.sizes, layout.piece, 0), freq)
        with pytest.raises(ValueError, match="must be int64 and int32"):
            call(Layout(layout.starts, layout.starts, layout.piece, 0), freq)
        with pytest.raises(ValueError, match="plane 0 sum to 4095"):
            call(layout, np.where(freq == freq.max(), freq - 1, freq).astype(np.uint16))
        with pytest.raises(ValueError, match=r"must be uint16 \[1, 256\]"):
            call(layout, freq[0])
    for size in (0, -1, -200, -(2**31)):
        wrong = Layout(layout.starts, np.array([size], np.int32), layout.piece, 0)
        with pytest.raises(ValueError, match="chunks have 1 to 16384 elements"):
            rans32_native.encode(data, Kind.BYTE, wrong, freq)
        with pytest.raises(ValueError, match="chunks have 1 to 16384 elements"):
            rans32_native.count(data, Kind.BYTE, wrong)


def test_the_engine_is_at_most_what_the_environment_allows(monkeypatch):
    monkeypatch.setenv("FEWBIT_NATIVE_ISA", "scalar")
    assert rans32_native.engine_name() == "scalar"
    monkeypatch.delenv("FEWBIT_NATIVE_ISA")
    assert rans32_native.engine_name() in compiler.ISA_NAMES
