"""Decodes tensors coded by `rans32` on a GPU, to the bytes of the CPU's decoder.

    streams = upload(group, kind, layout, freq, "cuda")     once
    decode_rans32(streams, out)                             as often as wanted

A stream (a plane of a chunk) is a warp; `_rans32.py` has the algorithm. Where only the first plane is
coded, which is how floating-point weights are stored, one kernel writes elements at once: for BF16 it
reads 1.3 bytes and writes 2. Otherwise planes are decoded to a workspace of n bytes each, and a second
kernel merges them. Bytes of raw planes that are carried by states (`quant/codecs/chunks.py`) are put
in place by the kernel of streams. Chunks lie in the output as the layout says: in a run, or as a tile
of 64 rows and 256 columns.

Whatever the streams hold, nothing is read or written out of bounds: shapes, frequencies and layout are
checked here, the rest by the kernel. A stream that does not end as it must raises a flag, of which
`check` makes the named error. Checksums of decoded bytes are not compared; the CPU's decoder does that,
and loading can (`verify`).

`DeviceTensor` is a whole coded tensor for `quant/resident.py`.
Not yet run on a GPU. Deliberately not here: encoding, and what lies on disk (`quant/codecs/`).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..quant.codecs import frequencies
from ..quant.codecs.chunks import (
    CARRIED,
    CHUNK,
    LANES,
    Damage,
    Group,
    Layout,
    carried,
    raw_offsets,
)
from ..quant.codecs.planes import Kind
from ..quant.cost_model import Tiling, Work, launch_seconds
from ..quant.errors import CheckpointError, NoKernelError
from ..quant.kernel import Compiled, Config, Kernel, Reason, RowsProblem
from ..quant.packed import PackedTensor
from . import _rans32
from ._compile import compile_variant, source_hash
from ._rans32 import (
    BAD_END,
    BAD_INDEX,
    BAD_MODE,
    BLOCK,
    INTEGERS,
    MAX_REGISTERS,
    PAIRED,
    decode_stream,
    merge_chunk,
    variants,
)
from ._triton import interpreted, off_gpu

_CODED_BITS = 2.6  # of an exponent in trained weights
_INSTRUCTIONS = 50  # of a lane, for an element
_SAID = {
    BAD_INDEX: "its index runs backwards, beyond the words, to an odd byte, or ends with a mode",
    BAD_END: "the coder does not end where it must",
    BAD_MODE: "its length, state or padding is not that of its mode",
}


# ---- layout ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Streams:
    """C chunks of a coded tensor with J coded and R raw planes, on one device.

    words: u8. index: int64 [C·J + 1]. state: int32 [C·J, 32]. tables: int32 [J, 4096]. raw: u8, that of
    a `Group` behind 64 zeros. starts: int64 [C], first element of each chunk in the output. coded:
    which planes of `kind` are coded. n: elements. piece, stride: in elements, as in `rans32.Layout`.
    reach: bytes of output.
    """

    words: torch.Tensor
    index: torch.Tensor
    state: torch.Tensor
    tables: torch.Tensor
    raw: torch.Tensor
    starts: torch.Tensor
    kind: Kind
    coded: tuple[bool, ...]
    n: int
    piece: int
    stride: int
    reach: int

    @property
    def n_bytes(self) -> int:
        """Bytes that the streams take on their device."""
        parts = (self.words, self.index, self.state, self.tables, self.raw, self.starts)
        return sum(part.nbytes for part in parts)


def upload(
    group: Group, kind: Kind, layout: Layout, freq: np.ndarray, device: torch.device | str
) -> Streams:
    """The chunks of `group` on `device`; arguments as of `rans32.decode`. freq: u16 [n_planes, 256].

    Damage if parts have other shapes than these, ValueError for other frequencies and layouts; what
    streams hold is judged by decoding.
    """
    coded = frequencies.check(freq, kind.n_planes)
    group.check(layout, int(coded.sum()), int((~coded).sum()))
    width = kind.n_planes  # also the bytes of an element
    _check_layout(layout, width)
    tables = np.array([frequencies.slots(row) for row in freq[coded]], np.uint32)
    return Streams(
        words=_sent(group.words[: group.words.size // 2 * 2], np.uint8, device),
        index=_sent(group.index, np.int64, device),
        state=_sent(group.state, np.int32, device),
        tables=_sent(tables.reshape(-1, frequencies.TOTAL), np.int32, device),
        raw=_sent(np.concatenate((np.zeros(CARRIED, np.uint8), group.raw)), np.uint8, device),
        starts=_sent(layout.starts // width, np.int64, device),
        kind=kind,
        coded=tuple(coded.tolist()),
        n=layout.n_elements,
        piece=layout.piece,
        stride=layout.stride // width,
        reach=_reach(layout, width),
    )


def _check_layout(layout: Layout, width: int) -> None:
    """ValueError for what the kernel's addresses cannot say."""
    piece, sizes = layout.piece, layout.sizes
    short = np.any(sizes[:-1] != CHUNK)
    odd = piece < LANES or piece & (piece - 1)
    near = bool(np.any(sizes > piece)) and layout.stride < piece * width
    uneven = layout.stride % width or np.any(layout.starts % width)
    if short or odd or near or uneven:
        raise ValueError(
            f"chunks must hold {CHUNK} elements but the last, in pieces of a power of two of at "
            f"least {LANES} that do not overlap; got sizes {sizes[:3]}, pieces of {piece} elements, "
            f"{layout.stride} bytes apart"
        )


def _reach(layout: Layout, width: int) -> int:
    """Bytes of the output up to the last that is written."""
    if not len(layout.sizes):
        return 0
    pieces, inside = np.divmod(layout.sizes.astype(np.int64) - 1, layout.piece)
    return int((layout.starts + pieces * layout.stride + inside * width).max()) + width


def _sent(array: np.ndarray, dtype: type, device: torch.device | str) -> torch.Tensor:
    """The bytes of `array` as `dtype` on `device`; a copy on the CPU, too, as they may be in a file."""
    return torch.from_numpy(np.array(array, order="C").view(dtype)).to(device)


# ---- launch ---------------------------------------------------------------------------------


def decode(streams: Streams, out: torch.Tensor) -> torch.Tensor:
    """Fills `out`, contiguous bytes or elements on the device of `streams`; flags int32 [C, J], 0 where
    a stream ended as it must. Does not wait for the GPU; NoKernelError if `out` does not fit."""
    flat = out.detach().view(-1).view(torch.uint8)
    if flat.numel() < streams.reach or flat.device != streams.words.device:
        raise NoKernelError(
            f"decode_rans32: {flat.numel()} bytes on {flat.device} cannot take {streams.reach} bytes "
            f"decoded on {streams.words.device}; give a buffer of the whole tensor there"
        )
    with torch.cuda.device_of(flat):
        flags: torch.Tensor = torch.ops.fewbit.decode_rans32(
            streams.words, streams.index, streams.state, streams.tables, streams.raw,
            streams.starts, flat, int(streams.kind), list(streams.coded), streams.n,
            streams.piece, streams.stride,
        )  # fmt: skip
    return flags


def check(flags: torch.Tensor) -> None:
    """Waits for the GPU; Damage names the first chunk whose stream did not end as it must."""
    found = flags.cpu()
    bad = found.nonzero()
    if len(bad):
        chunk, plane = bad[0].tolist()
        reason = _SAID[int(found[chunk, plane])]
        raise Damage(
            chunk, f"coded plane {plane}: {reason} ({len(bad)} of {found.numel()} streams)"
        )


def decode_rans32(streams: Streams, out: torch.Tensor) -> None:
    """Fills `out` as `decode` does, and waits; Damage if a stream did not end as it must."""
    check(decode(streams, out))


@dataclass(eq=False)
class DeviceTensor:
    """A coded tensor on one device, as `resident.keep_coded` takes it. name: for errors.

    The first decoding is waited for and checked: what lies on the device does not change afterwards.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    streams: Streams
    checked: bool = False

    @property
    def n_bytes(self) -> int:
        """Of the streams."""
        return self.streams.n_bytes

    def decode_into(self, out: torch.Tensor) -> None:
        """Fill `out`, contiguous, of `dtype` and `shape`, on the current stream. CheckpointError names
        the chunk that is damaged, NoKernelError what does not fit."""
        if out.dtype != self.dtype or tuple(out.shape) != self.shape or not out.is_contiguous():
            raise NoKernelError(
                f"{self.name} is decoded to contiguous {self.dtype} {list(self.shape)}, got "
                f"{out.dtype} {list(out.shape)} of strides {out.stride()}; give an empty tensor"
            )
        flags = decode(self.streams, out)
        if self.checked:
            return
        try:
            check(flags)
        except Damage as damage:
            raise CheckpointError(
                f"{self.name}: {damage}; it is damaged: fetch or quantize again"
            ) from damage
        self.checked = True


def _run(
    words: torch.Tensor,
    index: torch.Tensor,
    state: torch.Tensor,
    tables: torch.Tensor,
    raw: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    kind: int,
    coded: Sequence[bool],
    n: int,
    piece: int,
    stride: int,
) -> torch.Tensor:
    n_chunks, n_coded, width = len(starts), sum(coded), Kind(kind).n_planes
    flags = words.new_zeros(n_chunks, n_coded, dtype=torch.int32)
    if n_chunks == 0:
        return flags
    pair = kind in PAIRED
    target = out[: out.numel() // width * width].view(INTEGERS[width])
    pairs = words.view(torch.int16) if words.numel() else words.new_empty(0, dtype=torch.int16)
    given = (pairs, index, state, tables)

    carries = int(0 < n_coded < width)  # the first coded plane, a byte of the first raw one

    def stream(
        plane: int, rest: torch.Tensor, at: torch.Tensor, into: torch.Tensor, *order: int
    ) -> None:
        fused = into is target
        decode_stream[(n_chunks,)](
            *given, rest, at, into, flags, n, words.numel(), order[1], n_coded, plane,
            carries if plane == 0 else 0,
            PLANES=width if fused else 1, PAIR=fused and pair, PIECE=order[0],
            PTX=not interpreted(), num_warps=1, num_stages=1, maxnreg=MAX_REGISTERS,
        )  # fmt: skip

    if coded[0] and n_coded == 1:
        stream(0, raw, starts, target, piece, stride)
        return flags
    planes = words.new_empty(width, n)
    flat = torch.arange(0, n, CHUNK, device=words.device)
    raw_rows = [row for row, is_coded in zip(planes, coded, strict=True) if not is_coded]
    _unfold(raw[CARRIED:], raw_rows, n, n_coded)
    made_rows = [row for row, is_coded in zip(planes, coded, strict=True) if is_coded]
    for plane, row in enumerate(made_rows):
        stream(plane, raw_rows[0] if carries else raw, flat, row.view(torch.int8), CHUNK, 0)
    merge_chunk[(n_chunks, CHUNK // BLOCK)](
        planes, starts, target, n, stride,
        PLANES=width, PAIR=pair, PIECE=piece, BLOCK=BLOCK, num_warps=4, num_stages=1,
    )  # fmt: skip
    return flags


def _unfold(raw: torch.Tensor, rows: Sequence[torch.Tensor], n: int, n_coded: int) -> None:
    """Fill `rows` [R], u8 [n] each, from raw planes that lie chunk by chunk; not what is carried."""
    n_full, n_raw = n // CHUNK, len(rows)
    last = raw_offsets(np.full(n_full, CHUNK), n_coded, n_raw)[-1]
    for size, first, part in ((CHUNK, 0, raw[:last]), (n % CHUNK, n_full * CHUNK, raw[last:])):
        absent, at = carried(size, n_coded, n_raw), 0
        chunks = part.view(-1, size * n_raw - absent) if part.numel() else part
        for number, row in enumerate(rows if part.numel() else ()):
            skipped = 0 if number else absent
            into = row[first : first + len(chunks) * size].view(-1, size)[:, skipped:]
            into.copy_(chunks[:, at : at + size - skipped])
            at += size - skipped


def _fake(
    words: torch.Tensor,
    index: torch.Tensor,
    state: torch.Tensor,
    tables: torch.Tensor,
    raw: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    kind: int,
    coded: Sequence[bool],
    n: int,
    piece: int,
    stride: int,
) -> torch.Tensor:
    return words.new_empty(starts.shape[0], sum(coded), dtype=torch.int32)


LIB = torch.library.Library("fewbit", "FRAGMENT")
LIB.define(
    "decode_rans32(Tensor words, Tensor index, Tensor state, Tensor tables, Tensor raw, "
    "Tensor starts, Tensor(a!) out, int kind, bool[] coded, int n, int piece, int stride) -> Tensor"
)
LIB.impl("decode_rans32", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fewbit::decode_rans32", _fake, lib=LIB)


# ---- record ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodeOptions:
    """Facts of an op "decode_rans32", whose rows are chunks. kind: name of a `planes.Kind`. fused: only
    its first plane is coded. tiled: chunks are tiles of 64 rows and 256 columns."""

    kind: str = "BF16"
    fused: bool = True
    tiled: bool = True


def _refuse(problem: RowsProblem) -> tuple[Reason, ...]:
    return tuple(off_gpu(problem))


def _prepare(packed: PackedTensor, dtype: torch.dtype) -> None:
    raise NoKernelError("decode_rans32 has no packed weight to prepare; `upload` makes its layout")


def _launch(out: torch.Tensor, streams: Streams, config: Config) -> torch.Tensor:
    return decode(streams, out)


def _configs(problem: RowsProblem) -> tuple[Config, ...]:
    """One: a warp for each stream."""
    return ((("warps", 1),),)


def _seconds(problem: RowsProblem, config: Config, compiled: Compiled | None = None) -> float:
    """By memory or by instructions, whichever takes longer; 1 s for an unknown machine."""
    if problem.machine is None:
        return 1.0
    width, n = Kind[problem.options.kind].n_planes, problem.m_bucket * CHUNK
    moved = n * (2 * width - 1 + _CODED_BITS / 8)
    work = Work(bytes=moved, ops=0.0, kind="fp32", alu=n * _INSTRUCTIONS)
    tiling = Tiling(
        blocks=problem.m_bucket,
        threads=32,
        in_flight_bytes=LANES * width,
        registers=40,
        smem_bytes=0,
    )
    return launch_seconds(work, tiling, problem.machine, compiled)


def _compile(problem: RowsProblem, config: Config, cc: tuple[int, int]) -> tuple[Compiled, ...]:
    """The kernel of streams, and the one that merges where it does."""
    options: DecodeOptions = problem.options
    piece = 256 if options.tiled else CHUNK
    found = variants(Kind[options.kind], options.fused, piece)
    return tuple(compile_variant(variant, cc) for variant in found)


KERNEL = Kernel(
    name="triton_decode_rans32",
    refuse=_refuse,
    prepare=_prepare,
    launch=_launch,
    seconds=_seconds,
    op="decode_rans32",
    configs=_configs,
    compile=_compile,
    source=source_hash(_rans32, sys.modules[__name__]),
)
