"""Streams on a GPU: the CPU's bytes, and no access outside of them whatever they hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.kernels_triton import _triton
from fewbit.kernels_triton.decode_rans32 import (
    KERNEL,
    DecodeOptions,
    DeviceTensor,
    check,
    decode,
    decode_rans32,
    upload,
)
from fewbit.quant.codecs import rans32
from fewbit.quant.codecs.planes import Kind
from fewbit.quant.codecs.rans32 import CHUNK, Damage, Group, Layout, flat_layout
from fewbit.quant.errors import CheckpointError, NoKernelError
from fewbit.quant.kernel import RowsProblem
from fewbit.quant.machine import load_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = tuple(Kind)
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def weights(n: int, kind: Kind, seed: int = 0) -> np.ndarray:
    """u8 [n · bytes]: normal numbers of the kind's float dtype, or skewed bytes."""
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.standard_normal(n) * 0.03)
    dtypes = {Kind.BF16: torch.bfloat16, Kind.HALF: torch.float16, Kind.FP32: torch.float32}
    if kind in dtypes:
        return values.to(dtypes[kind]).view(torch.uint8).numpy()
    return rng.geometric(0.3, n * kind.n_planes).clip(0, 255).astype(np.uint8)


def frequencies(data: np.ndarray, kind: Kind, layout: Layout, coded: tuple[int, ...]) -> np.ndarray:
    freq = np.zeros((kind.n_planes, 256), np.uint16)
    counts = rans32.count(data, kind, layout)
    for plane in coded:
        freq[plane] = rans32.normalize(counts[plane])
    return freq


def decoded(group: Group, data: np.ndarray, kind: Kind, layout: Layout, freq: np.ndarray):
    """Bytes by the kernel, over bytes of 0xA5; what is outside of chunks must still be so."""
    out = torch.full((data.size,), 0xA5, dtype=torch.uint8, device=DEVICE)
    decode_rans32(upload(group, kind, layout, freq, DEVICE), out)
    return out.cpu().numpy()


def assert_round_trip(
    data: np.ndarray, kind: Kind, layout: Layout, coded: tuple[int, ...]
) -> Group:
    freq = frequencies(data, kind, layout, coded)
    group = rans32.encode(data, kind, layout, freq)
    wanted = np.full_like(data, 0xA5)
    rans32.decode(group, wanted, kind, layout, freq)
    found = decoded(group, data, kind, layout, freq)
    assert np.array_equal(found, wanted)
    return group


# ---- equal bytes ----------------------------------------------------------------------------


@needs_triton
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 400), st.sampled_from(KINDS), st.integers(0, 1000))
def test_every_kind_and_length(n: int, kind: Kind, seed: int) -> None:
    assert_round_trip(weights(n, kind, seed), kind, flat_layout(n, kind), (0,))


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_any_planes_may_be_coded(kind: Kind) -> None:
    n, last = 150, kind.n_planes - 1
    layout = flat_layout(n, kind)
    for coded in {(), (last,), tuple(range(kind.n_planes)), (0, last)}:
        planes = tuple(sorted(set(coded)))
        group = assert_round_trip(weights(n, kind), kind, layout, planes)
        n_raw = kind.n_planes - len(planes)
        assert group.raw.size == n_raw * n - 64 * bool(planes and n_raw)


@needs_triton
@pytest.mark.parametrize("n", [63, 64, 65, 96])
@pytest.mark.parametrize("kind", [Kind.BF16, Kind.HALF, Kind.FP32, Kind.WORD, Kind.LONG])
def test_64_bytes_of_the_first_raw_plane_come_from_the_states(kind: Kind, n: int) -> None:
    """Of the first coded plane, wherever either of them is."""
    layout, last = flat_layout(n, kind), kind.n_planes - 1
    data = np.random.default_rng(n).integers(0, 256, n * kind.n_planes).astype(np.uint8)
    for coded in {(0,), (last,), tuple(range(last)), tuple(range(1, last + 1))}:
        group = assert_round_trip(data, kind, layout, coded)
        assert group.raw.size == n * (kind.n_planes - len(coded)) - (64 if n >= 64 else 0)


@needs_triton
@pytest.mark.parametrize(("coded", "constant"), [(0, 0x7F800000), (1, 0x807F0000)])
def test_every_chunk_carries_whatever_its_stream_is(coded: int, constant: int) -> None:
    """A constant and a raw stream of fp32, and a coded one of a tail; three planes are raw."""
    rng, n = np.random.default_rng(coded), 2 * CHUNK + 70
    bits = rng.integers(0, 2**32, n).astype(np.uint32)
    bits[:CHUNK] = bits[:CHUNK] & ~np.uint32(constant) | np.uint32(constant & 0x3C3C0000)
    bits[2 * CHUNK :] = bits[:70]
    bits[-1] ^= constant
    group = assert_round_trip(bits.view(np.uint8), Kind.FP32, flat_layout(n, Kind.FP32), (coded,))
    assert (group.index[:-1] >> np.uint64(62)).tolist() == [1, 2, 0]
    assert group.raw.size == 3 * n - 3 * 64


@needs_triton
def test_all_bf16_patterns_and_a_tail_behind_whole_chunks() -> None:
    data = np.arange(65536, dtype=np.uint16)[: CHUNK + 45].view(np.uint8)
    layout = flat_layout(CHUNK + 45, Kind.BF16)
    group = assert_round_trip(data, Kind.BF16, layout, (0,))
    assert len(group.crc) == 2
    rest = np.arange(CHUNK + 45, 65536, 9, dtype=np.uint16)
    shuffled = np.random.default_rng(0).permutation(rest)
    assert_round_trip(shuffled.view(np.uint8), Kind.BF16, flat_layout(rest.size, Kind.BF16), (0,))


@needs_triton
def test_tiles_of_64_rows_and_256_columns() -> None:
    """The first tile is coded, the second constant."""
    rows = weights(64 * 512, Kind.BF16).view(np.uint16).reshape(64, 512).copy()
    rows[:, 256:] = 60 << 7 | np.arange(256) % 128
    data, starts = rows.reshape(-1).view(np.uint8), np.array([0, 512], np.int64)
    layout = Layout(starts, np.full(2, CHUNK, np.int32), 256, 1024)
    group = assert_round_trip(data, Kind.BF16, layout, (0,))
    assert (group.index[:-1] >> np.uint64(62)).tolist() == [0, 1]


@needs_triton
@pytest.mark.parametrize("kind", [Kind.BYTE, Kind.FP32])
def test_pieces_apart_leave_what_lies_between(kind: Kind) -> None:
    """Pieces of 32 elements in rows of 50; the last piece is short, and a whole LONG row is skipped."""
    width = kind.n_planes
    data = weights(50 * 9, kind)
    layout = Layout(np.array([7 * width]), np.array([32 * 8 + 5], np.int32), 32, 50 * width)
    assert_round_trip(data, kind, layout, (0,))
    assert_round_trip(data, kind, layout, tuple(range(width)))


def raw_stream(n: int) -> tuple[np.ndarray, np.ndarray, Group]:
    """Symbols that have no frequency, so that they are stored as they are."""
    data = np.random.default_rng(n).integers(0, 250, n).astype(np.uint8)
    freq = np.zeros((1, 256), np.uint16)
    freq[0, 250:252] = 4095, 1
    return data, freq, rans32.encode(data, Kind.BYTE, flat_layout(n, Kind.BYTE), freq)


@needs_triton
@pytest.mark.parametrize("n", [1, 2, 33, 700, 701])
def test_constant_and_raw_streams(n: int) -> None:
    layout = flat_layout(n, Kind.BYTE)
    group = assert_round_trip(np.full(n, 200, np.uint8), Kind.BYTE, layout, (0,))
    assert int(group.index[0]) >> 62 == 1 and group.words.size == 0
    if n > 1:  # one symbol is constant
        data, freq, group = raw_stream(n)
        assert int(group.index[0]) >> 62 == 2 and group.words.size == n + n % 2
        assert np.array_equal(decoded(group, data, Kind.BYTE, layout, freq), data)


@needs_triton
@pytest.mark.parametrize("kind", [Kind.BF16, Kind.WORD])
def test_nothing_is_something(kind: Kind) -> None:
    empty = np.zeros(0, np.uint8)
    freq = np.zeros((kind.n_planes, 256), np.uint16)
    layout = flat_layout(0, kind)
    group = rans32.encode(empty, kind, layout, freq)
    streams = upload(group, kind, layout, freq, DEVICE)
    assert decode(streams, torch.empty(0, dtype=torch.uint8, device=DEVICE)).shape == (0, 0)


@needs_triton
def test_out_may_have_any_dtype_and_more_room() -> None:
    data = weights(100, Kind.BF16)
    layout = flat_layout(100, Kind.BF16)
    freq = frequencies(data, Kind.BF16, layout, (0,))
    streams = upload(rans32.encode(data, Kind.BF16, layout, freq), Kind.BF16, layout, freq, DEVICE)
    out = torch.zeros(11, 10, dtype=torch.bfloat16, device=DEVICE)
    decode_rans32(streams, out)
    assert out.view(-1)[:100].view(torch.uint8).cpu().numpy().tobytes() == data.tobytes()
    assert not out[10].any()
    assert streams.raw.numel() == 64 + 100 - 64 and streams.reach == 200
    assert streams.n_bytes >= 100 + 4 * 4096 + 128


# ---- damage ---------------------------------------------------------------------------------


def one_stream(
    kind: Kind = Kind.BYTE, n: int = 300
) -> tuple[np.ndarray, Layout, np.ndarray, Group]:
    data, layout = weights(n, kind), flat_layout(n, kind)
    freq = frequencies(data, kind, layout, (0,))
    return data, layout, freq, rans32.encode(data, kind, layout, freq)


@needs_triton
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([Kind.BYTE, Kind.BF16]),
    st.sampled_from(["words", "index", "state"]),
    st.integers(0, 2**16),
    st.integers(1, 255),
)
def test_damage_is_found_where_the_cpu_finds_it_before_its_checksum(
    kind: Kind, part: str, place: int, flip: int
) -> None:
    data, layout, freq, group = one_stream(kind)
    changed = getattr(group, part).copy()
    flat = changed.view(np.uint8).reshape(-1)
    flat[place % flat.size] ^= flip
    broken = replace(group, **{part: changed})
    with pytest.raises(Damage) as by_cpu:
        rans32.decode(broken, np.empty_like(data), kind, layout, freq)
    streams = upload(broken, kind, layout, freq, DEVICE)
    flags = decode(streams, torch.empty(data.size, dtype=torch.uint8, device=DEVICE))
    if "checksum" not in by_cpu.value.reason:
        assert flags.any(), by_cpu.value.reason
        with pytest.raises(Damage, match="chunk 0: coded plane 0"):
            check(flags)


@needs_triton
@pytest.mark.parametrize("bad", [1 << 40, 10**18, 3])
def test_an_index_that_lies_reads_nothing(bad: int) -> None:
    data, layout, freq, group = one_stream()
    for entry in (0, 1):
        index = group.index.copy()
        index[entry] = bad
        streams = upload(replace(group, index=index), Kind.BYTE, layout, freq, DEVICE)
        flags = decode(streams, torch.empty(data.size, dtype=torch.uint8, device=DEVICE))
        with pytest.raises(Damage, match="index"):
            check(flags)


@needs_triton
@pytest.mark.parametrize("n_kept", [0, 2, 40])
def test_words_behind_the_end_are_not_read(n_kept: int) -> None:
    """What a truncated stream gives does not depend on the bytes behind it."""
    data, layout, freq, group = one_stream()
    index = np.array([0, n_kept], np.uint64)
    found = []
    for behind in (0x00, 0xFF):
        words = np.full(group.words.size, behind, np.uint8)
        words[:n_kept] = group.words[:n_kept]
        streams = upload(replace(group, index=index, words=words), Kind.BYTE, layout, freq, DEVICE)
        out = torch.empty(data.size, dtype=torch.uint8, device=DEVICE)
        with pytest.raises(Damage, match="does not end where it must"):
            decode_rans32(streams, out)
        found.append(out.cpu())
    assert torch.equal(*found)


@needs_triton
def test_a_shorter_or_longer_raw_stream_is_flagged() -> None:
    n = 301
    layout = flat_layout(n, Kind.BYTE)
    _, freq, group = raw_stream(n)
    words = group.words.copy()
    words[-1] = 1
    state = group.state.copy()
    state[0, 5] = 1
    index = group.index.copy()
    index[1] -= np.uint64(2)
    third = group.index.copy()
    third[0] |= np.uint64(3 << 62)
    for parts in ({"words": words}, {"state": state}, {"index": index}, {"index": third}):
        streams = upload(replace(group, **parts), Kind.BYTE, layout, freq, DEVICE)
        with pytest.raises(Damage, match="of its mode"):
            decode_rans32(streams, torch.empty(n, dtype=torch.uint8, device=DEVICE))


@needs_triton
@pytest.mark.parametrize("n", [63, 64, 300])
@pytest.mark.parametrize("value", [0, 60, None])
def test_bytes_that_are_nowhere_to_go_are_flagged(n: int, value: int | None) -> None:
    """States of a tensor of halves that carry its lower bytes, as those of a tensor of bytes."""
    data = weights(n, Kind.BYTE) if value is None else np.full(n, value, np.uint8)
    layout, freq = flat_layout(n, Kind.BYTE), np.zeros((2, 256), np.uint16)
    freq[0] = rans32.normalize(np.bincount(data, minlength=256))
    halves = np.stack((np.arange(n) + 1, data), axis=1).astype(np.uint8).reshape(-1)
    group = rans32.encode(halves, Kind.HALF, flat_layout(n, Kind.HALF), freq)
    alone = replace(group, raw=np.zeros(0, np.uint8))
    streams = upload(alone, Kind.BYTE, layout, freq[:1], DEVICE)
    out = torch.empty(n, dtype=torch.uint8, device=DEVICE)
    flags = decode(streams, out)
    assert out.cpu().numpy().tobytes() == data.tobytes()
    assert flags.tolist() == [[0 if n < 64 else 2 if value is None else 3]]
    with pytest.raises(Damage) as by_cpu:
        rans32.decode(alone, np.empty(n, np.uint8), Kind.BYTE, layout, freq[:1])
    assert ("checksum" in by_cpu.value.reason) == (n < 64)


@needs_triton
@pytest.mark.parametrize("bad", [256 << 16, 200 << 16, 1 << 16 | 1])
def test_states_of_constant_and_raw_streams_are_checked(bad: int) -> None:
    """All lanes hold one symbol; one of 256 is none, whichever lane has it. Raw ones hold none."""
    n = 300
    layout = flat_layout(n, Kind.BYTE)
    data = np.full(n, 201, np.uint8)
    freq = frequencies(data, Kind.BYTE, layout, (0,))
    constant = rans32.encode(data, Kind.BYTE, layout, freq)
    _, raw_freq, raw = raw_stream(n)
    for group, table in ((constant, freq), (raw, raw_freq)):
        for lanes in (slice(0, 1), slice(31, 32), slice(0, 32 if bad >> 16 != 200 else 31)):
            state = group.state.copy()
            state[0, lanes] = bad
            broken = replace(group, state=state)
            with pytest.raises(Damage) as by_cpu:
                rans32.decode(broken, np.empty(n, np.uint8), Kind.BYTE, layout, table)
            assert "checksum" not in by_cpu.value.reason
            with pytest.raises(Damage, match="of its mode"):
                decode_rans32(
                    upload(broken, Kind.BYTE, layout, table, DEVICE),
                    torch.empty(n, dtype=torch.uint8, device=DEVICE),
                )


@needs_triton
def test_a_state_that_no_encoder_leaves_is_flagged() -> None:
    """A lane at 0 becomes the next word, 0 again, when all words are used up."""
    layout, freq = flat_layout(32, Kind.BYTE), np.zeros((1, 256), np.uint16)
    freq[0, :2] = 2048
    crc = rans32.encode(np.zeros(32, np.uint8), Kind.BYTE, layout, freq).crc
    state = np.full((1, 32), 2 << 16, np.uint32)  # 2048 · (state >> 12) is 65536
    none = np.zeros(0, np.uint8)
    sound = Group(none, none, np.zeros(2, np.uint64), state, crc)
    out = np.ones(32, np.uint8)
    assert not decoded(sound, out, Kind.BYTE, layout, freq).any()
    state[0, 5] = 0
    broken = replace(sound, words=np.zeros(2, np.uint8), index=np.array([0, 2], np.uint64))
    with pytest.raises(Damage):
        rans32.decode(broken, out, Kind.BYTE, layout, freq)
    with pytest.raises(Damage, match="does not end where it must"):
        decoded(broken, out, Kind.BYTE, layout, freq)


@needs_triton
@pytest.mark.parametrize("mode", [1, 2, 3])
def test_the_end_of_the_index_has_no_mode(mode: int) -> None:
    data, layout, freq, group = one_stream()
    index = group.index | np.array([0, mode << 62], np.uint64)
    broken = replace(group, index=index)
    with pytest.raises(Damage) as by_cpu:
        rans32.decode(broken, np.empty_like(data), Kind.BYTE, layout, freq)
    assert "checksum" not in by_cpu.value.reason
    with pytest.raises(Damage, match="its index"):
        decoded(broken, data, Kind.BYTE, layout, freq)


@needs_triton
def test_words_that_are_cut_off_at_an_odd_byte_are_flagged() -> None:
    data, layout, freq, group = one_stream()
    streams = upload(replace(group, words=group.words[:-1]), Kind.BYTE, layout, freq, DEVICE)
    with pytest.raises(Damage, match="beyond the words"):
        decode_rans32(streams, torch.empty(data.size, dtype=torch.uint8, device=DEVICE))


@needs_triton
def test_the_chunk_that_is_named_is_the_damaged_one() -> None:
    data, n = np.full(2 * CHUNK + 40, 9, np.uint8), 2 * CHUNK + 40
    data[-40:] = np.random.default_rng(0).integers(0, 3, 40)
    layout = flat_layout(n, Kind.BYTE)
    freq = frequencies(data, Kind.BYTE, layout, (0,))
    group = rans32.encode(data, Kind.BYTE, layout, freq)
    state = group.state.copy()
    state[2, 3] ^= 1 << 20
    streams = upload(replace(group, state=state), Kind.BYTE, layout, freq, DEVICE)
    out = torch.empty(n, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(Damage, match=r"\(1 of 3 streams\)") as found:
        decode_rans32(streams, out)
    assert found.value.chunk == 2


# ---- what is refused ------------------------------------------------------------------------


def test_parts_of_another_shape_are_refused() -> None:
    _, layout, freq, group = one_stream()
    with pytest.raises(Damage, match="state"):
        upload(replace(group, state=group.state[:, :31]), Kind.BYTE, layout, freq, DEVICE)
    with pytest.raises(Damage, match="index"):
        upload(replace(group, index=group.index[:1]), Kind.BYTE, layout, freq, DEVICE)
    with pytest.raises(ValueError, match="sum to"):
        upload(group, Kind.BYTE, layout, freq // 2, DEVICE)
    streams = upload(group, Kind.BYTE, layout, freq, DEVICE)
    with pytest.raises(NoKernelError, match="cannot take 300 bytes"):
        decode(streams, torch.empty(299, dtype=torch.uint8, device=DEVICE))


@pytest.mark.parametrize(
    ("sizes", "piece", "stride"),
    [((5, CHUNK), CHUNK, 0), ((100,), 48, 100), ((100,), 16, 100), ((100,), 32, 31)],
)
def test_layouts_that_addresses_cannot_say_are_refused(sizes, piece, stride) -> None:
    n = sum(sizes)
    layout = Layout(np.zeros(len(sizes), np.int64), np.array(sizes, np.int32), piece, stride)
    freq = np.zeros((1, 256), np.uint16)
    index, state = np.zeros(1, np.uint64), np.zeros((0, 32), np.uint32)
    crc, none = np.zeros(len(sizes), np.uint32), np.zeros(0, np.uint8)
    group = Group(np.zeros(n, np.uint8), none, index, state, crc)
    with pytest.raises(ValueError, match="do not overlap"):
        upload(group, Kind.BYTE, layout, freq, DEVICE)


def problem(kind: str = "BF16", fused: bool = True, tiled: bool = True) -> RowsProblem:
    options = DecodeOptions(kind, fused, tiled)
    h200 = load_device("h200")
    return RowsProblem(KERNEL.op, options, 4096, CHUNK, torch.bfloat16, "cuda", h200)


def test_the_record_refuses_cpus_and_has_no_weight() -> None:
    assert KERNEL.refuse(problem()) == ()
    (reason,) = KERNEL.refuse(replace(problem(), device="cpu", machine=load_device("cpu")))
    assert reason.code == "ARCH"
    with pytest.raises(NoKernelError, match="upload"):
        KERNEL.prepare(None, torch.bfloat16)  # type: ignore[arg-type]
    assert KERNEL.seconds(replace(problem(), machine=None), ()) == 1.0
    bytes_per_second = 4096 * CHUNK * 2 / KERNEL.seconds(problem(), ())
    assert 1e11 < bytes_per_second < 4e12


# ---- compilers ------------------------------------------------------------------------------


def test_compilers_see_an_operator_with_the_shape_of_its_flags() -> None:
    data, layout, freq, group = one_stream()
    streams = upload(group, Kind.BYTE, layout, freq, "cpu")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        flags = decode(streams, torch.empty(data.size, dtype=torch.uint8))
    assert flags.shape == (1, 1) and flags.dtype == torch.int32


# ---- a whole tensor -------------------------------------------------------------------------


@needs_triton
def test_a_tensor_that_stays_coded() -> None:
    data = weights(60, Kind.BF16)
    layout = flat_layout(60, Kind.BF16)
    freq = frequencies(data, Kind.BF16, layout, (0,))
    group = rans32.encode(data, Kind.BF16, layout, freq)
    streams = upload(group, Kind.BF16, layout, freq, DEVICE)
    tensor = DeviceTensor("up.weight", torch.bfloat16, (6, 10), streams)
    out = torch.empty(6, 10, dtype=torch.bfloat16, device=DEVICE)
    for _ in range(2):
        out.zero_()
        tensor.decode_into(out)
        assert out.view(torch.uint8).cpu().numpy().tobytes() == data.tobytes() and tensor.checked
    assert tensor.n_bytes == streams.n_bytes
    for wrong in (out.T, out[:5], out.half(), torch.empty(10, 6, dtype=torch.bfloat16).T):
        with pytest.raises(NoKernelError, match=r"up\.weight is decoded to contiguous"):
            tensor.decode_into(wrong)
    state = group.state ^ np.uint32(1 << 19)
    broken = upload(replace(group, state=state), Kind.BF16, layout, freq, DEVICE)
    damaged = DeviceTensor("up.weight", torch.bfloat16, (6, 10), broken)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"up\.weight: chunk 0: .*quantize again"):
            damaged.decode_into(out)
