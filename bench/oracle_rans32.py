"""Checks of the kernels that decode `rans32`, against the CPU's decoder: every byte is equal.

    kinds     bytes, bf16, halves, fp32, 32-bit and 64-bit words
    planes    the first one coded, all of them, the last one, none
    orders    flat, with tails of 1 to 64 elements; tiles of 64 rows and 256 columns; short pieces
    streams   coded, constant, raw, mixed in one tensor, with and without bytes that states carry
    damage    a flipped bit of states, states that carry what is nowhere to go, an index that lies,
              words cut off: flagged, nothing written outside, and what is behind the words changes
              nothing

Memory behind the output holds a pattern that must survive.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import inf

import numpy as np
import torch

from bench.oracle_check import Check, Lane, Place, poison_free_memory
from fewbit.kernels_triton.decode_rans32 import DecodeOptions, upload
from fewbit.quant.codecs import rans32
from fewbit.quant.codecs.planes import Kind
from fewbit.quant.codecs.rans32 import CHUNK, Group, Layout, flat_layout
from fewbit.quant.dispatch import m_bucket
from fewbit.quant.kernel import Config, Kernel, RowsProblem

PATTERN, BEHIND = 0xA5, 4096  # bytes behind the output
_PLANES = ("first", "all", "last", "none")
_TAIL = 41  # elements, in the smallest check


@dataclass(frozen=True)
class Spot:
    """A layout of `n` elements. order: "flat", "tile" (64 rows of 256 · `across` columns) or "piece"
    (runs of 32 elements, 50 apart, in one chunk)."""

    order: str
    n: int
    across: int = 1

    def layout(self, kind: Kind) -> Layout:
        """As `rans32` takes it."""
        width = kind.n_planes
        if self.order == "flat":
            return flat_layout(self.n, kind)
        if self.order == "piece":
            return Layout(np.zeros(1, np.int64), np.array([self.n], np.int32), 32, 50 * width)
        bands, columns = self.n // (CHUNK * self.across), 256 * self.across
        starts = [
            (band * 64 * columns + at * 256) * width
            for band in range(bands)
            for at in range(self.across)
        ]
        sizes = np.full(len(starts), CHUNK, np.int32)
        return Layout(np.array(starts, np.int64), sizes, 256, columns * width)


SPOTS = (
    Spot("flat", 1),
    Spot("flat", CHUNK * 5 + 31),
    Spot("tile", CHUNK * 12, 3),
    Spot("piece", 1000),
    Spot("flat", 33),
    Spot("flat", CHUNK + 64),
    Spot("flat", CHUNK * 700),
    Spot("tile", CHUNK * 256, 16),
)
_FEW = (Spot("flat", _TAIL), Spot("piece", 100), Spot("flat", 1), Spot("flat", 64))


def lanes(kernel: Kernel, place: Place) -> list[Lane]:
    """One lane for each kind, and one of damage."""
    spots = _FEW if place.reduced else SPOTS
    found: list[Lane] = [
        [
            partial(_check, kernel, kind, planes, spots[(at + turn) % len(spots)], place)
            for at in range(len(spots))
            for turn, planes in enumerate(_PLANES)
        ]
        for kind in (Kind.BF16, Kind.BYTE, Kind.HALF, Kind.FP32, Kind.WORD, Kind.LONG)
    ]
    damaged = [partial(_damage_check, kernel, name, place) for name in _DAMAGE]
    return [*found, damaged]


def _check(kernel: Kernel, kind: Kind, planes: str, spot: Spot, place: Place) -> Check | None:
    options = DecodeOptions(kind.name, planes == "first", spot.order == "tile")
    size = m_bucket(-(-spot.n // CHUNK))
    problem = RowsProblem(kernel.op, options, size, CHUNK, torch.bfloat16, "cuda", place.machine)
    if kernel.refuse(problem):
        return None
    (config,) = kernel.configs(problem) if kernel.configs else ((),)
    case = f"{kind.name} {planes} {spot.order} n={spot.n}"
    error = partial(_error, kernel, config, kind, planes, spot, place)
    return Check(kernel.name, config, case, 0.0, error)


# ---- sound streams --------------------------------------------------------------------------


def planted(n: int, kind: Kind) -> np.ndarray:
    """u8 [n · bytes]: normal numbers; a chunk in three is constant, one in three of even bytes."""
    rng = np.random.default_rng(n)
    dtypes = {Kind.BF16: torch.bfloat16, Kind.HALF: torch.float16, Kind.FP32: torch.float32}
    if kind in dtypes:
        normal = torch.from_numpy(rng.standard_normal(n, np.float32) * 0.03)
        data = normal.to(dtypes[kind]).view(torch.uint8).numpy().copy()
    else:
        data = rng.geometric(0.3, n * kind.n_planes).clip(0, 255).astype(np.uint8)
    span = CHUNK * kind.n_planes
    for at in range(span, data.size, 3 * span):
        data[at : at + span] = np.tile(data[at : at + kind.n_planes], CHUNK)[: data.size - at]
        even = data[at + span : at + 2 * span]
        even[:] = rng.integers(0, 256, even.size)
    return data


def coded_planes(kind: Kind, planes: str) -> list[int]:
    """Numbers of the planes that are coded."""
    last = kind.n_planes - 1
    return {"first": [0], "all": list(range(last + 1)), "last": [last], "none": []}[planes]


def _error(
    kernel: Kernel, config: Config, kind: Kind, planes: str, spot: Spot, place: Place
) -> float:
    """Share of wrong bytes; infinity for a flag, or for a byte that was not to be written."""
    layout = spot.layout(kind)
    room = int(layout.starts.max()) + int(layout.stride) * (spot.n // layout.piece + 1)
    data = planted(max(spot.n, room // kind.n_planes + 64), kind)
    counts = rans32.count(data, kind, layout)
    freq = np.zeros((kind.n_planes, 256), np.uint16)
    for plane in coded_planes(kind, planes):
        freq[plane] = rans32.normalize(counts[plane])
    group = rans32.encode(data, kind, layout, freq)
    wanted = np.full(data.size + BEHIND, PATTERN, np.uint8)
    rans32.decode(group, wanted[: data.size], kind, layout, freq)
    poison_free_memory(place.device)
    streams = upload(group, kind, layout, freq, place.device)
    out = torch.full((wanted.size,), PATTERN, dtype=torch.uint8, device=place.device)
    flags = kernel.launch(out, streams, config)
    if flags.any():
        return inf
    return float((out.cpu().numpy() != wanted).mean())


# ---- damaged ones ---------------------------------------------------------------------------


def _sound() -> tuple[np.ndarray, np.ndarray, Group]:
    """500 bytes, their frequencies, and the stream that is to be damaged."""
    data = planted(500, Kind.BYTE)
    layout = flat_layout(data.size, Kind.BYTE)
    freq = rans32.normalize(rans32.count(data, Kind.BYTE, layout)[0])[None]
    return data, freq, rans32.encode(data, Kind.BYTE, layout, freq)


def _carrying(group: Group) -> Group:
    """The stream that the same bytes have as the upper halves of words, which carries lower ones."""
    data, freq, _ = _sound()
    halves = np.stack((data ^ 255, data), axis=1).reshape(-1)
    layout = flat_layout(data.size, Kind.HALF)
    found = rans32.encode(halves, Kind.HALF, layout, np.concatenate((freq, freq * 0)))
    return replace(found, raw=group.raw)


def _flipped_state(group: Group) -> Group:
    state = group.state.copy()
    state[0, 7] ^= 1 << 21
    return replace(group, state=state)


def _beyond(group: Group) -> Group:
    index = group.index.copy()
    index[1:] += np.uint64(1 << 50)
    return replace(group, index=index)


def _backwards(group: Group) -> Group:
    return replace(group, index=group.index[::-1].copy())


def _cut(group: Group) -> Group:
    index = group.index.copy()
    index[1:] = index[:1] + np.uint64(8)
    return replace(group, index=index)


_DAMAGE: dict[str, Callable[[Group], Group]] = {
    "a flipped bit of a state": _flipped_state,
    "states that carry bytes": _carrying,
    "an index beyond the words": _beyond,
    "an index that runs backwards": _backwards,
    "a stream that is cut off": _cut,
}


def _damage_check(kernel: Kernel, name: str, place: Place) -> Check:
    config: Config = (("warps", 1),)
    return Check(
        kernel.name, config, name, 0.0, partial(_damage_error, kernel, config, name, place)
    )


def _damage_error(kernel: Kernel, config: Config, name: str, place: Place) -> float:
    """0 if the stream is flagged, nothing is written behind the output, and what lies behind the
    words does not matter."""
    data, freq, sound = _sound()
    n, layout, group = data.size, flat_layout(data.size, Kind.BYTE), _DAMAGE[name](sound)
    found = []
    for behind in (0, 255):
        streams = upload(group, Kind.BYTE, layout, freq, place.device)
        words = torch.full((streams.words.numel() + BEHIND,), behind, dtype=torch.uint8)
        words[: streams.words.numel()] = streams.words.cpu()
        held = words.to(place.device)[: streams.words.numel()]
        out = torch.full((n + BEHIND,), PATTERN, dtype=torch.uint8, device=place.device)
        flags = kernel.launch(out, replace(streams, words=held), config)
        if not flags.any() or not bool((out[n:] == PATTERN).all()):
            return inf
        found.append(out.cpu())
    return float((found[0] != found[1]).double().mean())
