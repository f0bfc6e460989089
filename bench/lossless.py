"""Lossless coding on one core: ours beside zipnn and zstd-3, same process, same data, medians of 5.

    pip install zipnn==0.5.3 zstandard            optional: what is missing is said and left out
    python -m bench.lossless -o bench/results/lossless.json [--mib 128] [--cpu 0]

The first table, bf16: a matrix of 128 MiB, Gaussian with log-normal scales of the rows, and the tensors
of the bundled model, each coded by itself. Sides, in turns within a round:

    fewbit    encode: count symbols, choose frequencies, code.
              decode: into a buffer that is there, as a loader has it, and into a new one
    numpy     the same without a compiler, on at most 16 MiB
    zipnn     bytes -> bytes, one thread
    zstd-3    bytes -> bytes

Every side encodes 8 MiB at a time, and all that it made of a tensor is kept until the tensor is done,
as a writer keeps it: new pages are part of the time.

Sizes count everything that is stored: raw planes, words, index, states, checksums, frequencies, head.
GB/s are 10^9 bytes of bf16 a second. The second table: what other dtypes keep of their size, each by
the planes that save at least 3 %. Every side runs in one thread.
"""

import argparse
import importlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from bench.decode import machine
from fewbit.quant.codecs import rans32, rans32_numpy
from fewbit.quant.codecs.planes import Kind, kind_of
from fewbit.quant.codecs.rans32 import Group, flat_layout, normalize

MODEL = Path(__file__).resolve().parent.parent / "quant" / "data" / "tiny-llama"
ROUNDS = 5
GROUP_BYTES = 8 << 20
NUMPY_BYTES = 16 << 20
WORTH = 0.97
SMALL = 1024  # elements
HEAD_BYTES = 44  # of a matrix
SHARED = (
    "other work ran on this machine at the same time; compare within a table, best beside median"
)


@dataclass(frozen=True)
class Coded:
    """A buffer as ours stores it."""

    groups: list[Group]
    plain: np.ndarray | None
    freq: np.ndarray
    kind: Kind

    @property
    def n_bytes(self) -> int:
        """Stored."""
        if self.plain is not None:
            return self.plain.size
        arrays = [a for g in self.groups for a in (g.raw, g.words, g.index[:-1], g.state, g.crc)]
        return sum(a.nbytes for a in arrays) + 8 + table_bytes(self.freq) + HEAD_BYTES


@dataclass(frozen=True)
class Side:
    """One codec: bytes -> something -> bytes."""

    encode: Callable[[int], Any]  # of tensor number i
    decode: Callable[[Any], Any]
    size: Callable[[Any], int]
    check: Callable[[Any], bool]
    n_bytes: int
    n_tensors: int
    between: Callable[[], Any] = int  # rounds, not timed


def parts_of(data: np.ndarray) -> list[np.ndarray]:
    """The pieces in which files are written."""
    return [data[at : at + GROUP_BYTES] for at in range(0, data.size, GROUP_BYTES)]


def frequencies(engine: ModuleType, data: np.ndarray, kind: Kind) -> np.ndarray:
    """uint16 [n_planes, 256]; zeros for planes that save less than 3 %."""
    parts = parts_of(data)
    counts = engine.count(parts[0], kind, flat_layout(parts[0].size // kind.n_planes, kind))
    for part in parts[1:]:
        counts += engine.count(part, kind, flat_layout(part.size // kind.n_planes, kind))
    n = data.size // kind.n_planes
    bits = n * math.log2(n) - (counts * np.log2(np.maximum(counts, 1))).sum(axis=1)
    freq = np.zeros((kind.n_planes, 256), np.uint16)
    for plane in np.flatnonzero(bits < WORTH * 8 * n):
        freq[plane] = normalize(counts[plane])
    return freq


def encode(engine: ModuleType, data: np.ndarray, kind: Kind) -> Coded:
    """Both passes; what is small stays as it is, as in files."""
    if data.size < SMALL * kind.n_planes:
        return Coded([], data.copy(), np.empty(0), kind)
    freq = frequencies(engine, data, kind)
    groups: list[Group] = []
    for part in parts_of(data):
        layout = flat_layout(part.size // kind.n_planes, kind)
        groups.append(engine.encode(part, kind, layout, freq))
    return Coded(groups, None, freq, kind)


def table_bytes(freq: np.ndarray) -> int:
    """Of the plane `freq`: 32 of a bitmap for each coded plane, and 2 for each symbol that it uses."""
    return 32 * int(freq.any(axis=1).sum()) + 2 * int((freq > 0).sum())


def decode(engine: ModuleType, coded: Coded, out: np.ndarray) -> np.ndarray:
    """Into a buffer of the size that was coded."""
    kind = coded.kind
    if coded.plain is not None:
        np.copyto(out, coded.plain)
        return out
    for group, part in zip(coded.groups, parts_of(out), strict=True):
        engine.decode(group, part, kind, flat_layout(part.size // kind.n_planes, kind), coded.freq)
    return out


def our_side(engine: ModuleType, tensors: list[np.ndarray], fresh: bool = False) -> Side:
    """fresh: decode into memory that nobody has touched."""
    buffers = [np.zeros_like(data) for data in tensors]

    def decode_all(coded: list[Coded]) -> list[np.ndarray]:
        outs = [np.empty_like(data) for data in tensors] if fresh else buffers
        return [decode(engine, one, out) for one, out in zip(coded, outs, strict=True)]

    return Side(
        lambda i: encode(engine, tensors[i], Kind.BF16),
        decode_all,
        lambda coded: sum(min(one.n_bytes, t.size) for one, t in zip(coded, tensors, strict=True)),
        lambda found: all(map(np.array_equal, found, tensors)),
        sum(data.size for data in tensors),
        len(tensors),
    )


def peer_sides(tensors: list[np.ndarray]) -> dict[str, Side]:
    """zipnn and zstd, where they are installed."""
    sides = {}
    plain = [[part.tobytes() for part in parts_of(data)] for data in tensors]
    n_bytes, n_tensors = sum(data.size for data in tensors), len(tensors)

    def size(coded: list[list[bytes]]) -> int:
        return sum(len(one) for pieces in coded for one in pieces)

    def check(found: list[list[bytes]]) -> bool:
        return [[bytes(one) for one in pieces] for pieces in found] == plain

    if zipnn := installed("zipnn"):
        coder = zipnn.ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)
        spare: list[list[bytearray]] = []  # it rotates bits in its argument

        def renew() -> None:
            spare[:] = [[bytearray(one) for one in pieces] for pieces in plain]

        renew()
        sides["zipnn"] = Side(
            lambda i: [coder.compress(one) for one in spare[i]],
            lambda coded: [[coder.decompress(one) for one in pieces] for pieces in coded],
            size, check, n_bytes, n_tensors, renew,
        )  # fmt: skip
    if zstandard := installed("zstandard"):
        compressor, decompressor = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
        sides["zstd-3"] = Side(
            lambda i: [compressor.compress(one) for one in plain[i]],
            lambda coded: [[decompressor.decompress(one) for one in pieces] for pieces in coded],
            size, check, n_bytes, n_tensors,
        )  # fmt: skip
    return sides


def installed(name: str) -> ModuleType | None:
    """The module, or a line that says that it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"  {name} is left out: {error}")
        return None


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = call()
    return time.perf_counter() - started, found


def encode_all(side: Side) -> None:
    """Tensor after tensor; what was made of one is dropped before the next."""
    for i in range(side.n_tensors):
        side.encode(i)


def compare(sides: dict[str, Side]) -> dict[str, dict[str, float]]:
    """GB/s, bits a weight and share of the size, of every side; rounds go through all sides."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    table: dict[str, dict[str, float]] = {}
    coded = {}
    for name, side in sides.items():  # warms up, too
        coded[name] = [side.encode(i) for i in range(side.n_tensors)]
        side.between()
        if not side.check(side.decode(coded[name])):
            raise RuntimeError(f"{name} does not give back what it was given")
        share = side.size(coded[name]) / side.n_bytes
        table[name] = {"share": share, "bits_per_weight": 16 * share}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            encoding = seconds(lambda: encode_all(side))[0]  # noqa: B023
            decoding = seconds(lambda: side.decode(coded[name]))[0]  # noqa: B023
            side.between()
            times[name].append((encoding, decoding))
    for name, side in sides.items():
        for place, what in enumerate(("encode", "decode")):
            found = [pair[place] for pair in times[name]]
            table[name][f"{what}_gb_per_second"] = side.n_bytes / statistics.median(found) / 1e9
            table[name][f"{what}_best_gb_per_second"] = side.n_bytes / min(found) / 1e9
    return table


def bf16_row(name: str, tensors: list[np.ndarray]) -> dict[str, Any]:
    """One data set of the first table."""
    n_bytes = sum(data.size for data in tensors)
    print(f"{name}: {n_bytes / 1e6:.0f} MB of bf16")
    native = rans32_numpy if rans32.engine_name() == "numpy" else rans32
    sides = {"fewbit": our_side(native, tensors)}
    sides["fewbit, new buffer"] = our_side(native, tensors, True)
    sides["numpy"] = our_side(rans32_numpy, [data[:NUMPY_BYTES] for data in tensors])
    sides |= peer_sides(tensors)
    table = compare(sides)
    for side, cell in table.items():
        print(
            f"  {side:<20s} encode {cell['encode_gb_per_second']:6.3f} decode "
            f"{cell['decode_gb_per_second']:6.3f} GB/s (best {cell['encode_best_gb_per_second']:.3f}, "
            f"{cell['decode_best_gb_per_second']:.3f})  {cell['share']:.4f} of the size, "
            f"{cell['bits_per_weight']:.3f} bits a weight"
        )
    row: dict[str, Any] = {"data": name, "n_bytes": n_bytes, "sides": table}
    ours = table["fewbit"]
    for peer in ("zipnn", "zstd-3"):
        if peer in table:
            row[f"over_{peer}"] = {
                key: ours[key] / table[peer][key] for key in ours if key != "bits_per_weight"
            }
            print(
                f"  over {peer}: "
                + ", ".join(f"{k} {v:.3f}" for k, v in row[f"over_{peer}"].items())
            )
    return row


def gaussian(n_bytes: int) -> torch.Tensor:
    """fp32 [rows, 4096], rows of log-normal scale."""
    n_rows = n_bytes // 2 // 4096
    return torch.randn(n_rows, 4096) * torch.exp(0.3 * torch.randn(n_rows, 1)) * 0.02


def bundled_model() -> list[np.ndarray]:
    """The weights of the bundled model, bf16."""
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        tensors = [
            file.get_tensor(name).to(torch.bfloat16).reshape(-1) for name in sorted(file.keys())
        ]
    return [tensor.view(torch.uint8).numpy() for tensor in tensors]


def dtype_rows(weight: torch.Tensor) -> list[dict[str, Any]]:
    """The second table: one Gaussian matrix in other dtypes."""
    row_scale = weight.abs().amax(1, keepdim=True)
    codes = (weight / row_scale * 127).round().to(torch.int8)
    blocks = weight.unflatten(1, (-1, 128))
    nibbles = (blocks / blocks.abs().amax(-1, keepdim=True) * 7).round().flatten(1).to(torch.int8)
    nibbles = nibbles[:, ::2] + 8 | (nibbles[:, 1::2] + 8) << 4
    cases: Iterable[tuple[str, torch.Tensor]] = [
        ("fp16", weight.half()), ("fp32", weight), ("fp32 of bf16", weight.bfloat16().float()),
        ("fp8 e4m3, row scale", (weight / row_scale * 448).to(torch.float8_e4m3fn)),
        ("fp8 e5m2, row scale", (weight / row_scale * 57344).to(torch.float8_e5m2)),
        ("int8, row scale", codes), ("int4 pairs, g128", nibbles.contiguous()),
    ]  # fmt: skip
    rows = []
    for name, tensor in cases:
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        kind = kind_of(tensor.dtype)
        encoding, coded = seconds(lambda: encode(rans32, data, kind))  # noqa: B023
        out = np.zeros_like(data)
        decoding, found = seconds(lambda: decode(rans32, coded, out))  # noqa: B023
        if not (found == data).all():
            raise RuntimeError(f"{name} does not come back")
        row: dict[str, Any] = {"data": name, "share": coded.n_bytes / data.size}
        row["coded_planes"] = np.flatnonzero(coded.freq.sum(1)).tolist()
        row["encode_gb_per_second"] = data.size / encoding / 1e9
        row["decode_gb_per_second"] = data.size / decoding / 1e9
        rows.append(row)
        print(
            f"  {name:<20s} {row['share']:.4f} of the size, planes {row['coded_planes']} of "
            f"{kind.n_planes} coded; once: encode {row['encode_gb_per_second']:.2f}, decode "
            f"{row['decode_gb_per_second']:.2f} GB/s"
        )
    return rows


def main() -> None:
    """Print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--mib", type=int, default=128, help="size of the synthetic weights")
    parser.add_argument("--cpu", type=int, help="pin the process to this CPU")
    args = parser.parse_args()
    if args.cpu is not None:
        os.sched_setaffinity(0, {args.cpu})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, Any] = {"machine": machine(), "engine": rans32.engine_name(), "note": SHARED}
    print(f"engine {result['engine']}, one core, medians of {ROUNDS}")
    weight = gaussian(args.mib << 20)
    synthetic = weight.bfloat16().view(torch.uint8).reshape(-1).numpy()
    result["bf16"] = [
        bf16_row("gaussian, log-normal rows", [synthetic]), bf16_row("bundled model", bundled_model())
    ]  # fmt: skip
    print("other dtypes, one Gaussian matrix")
    result["dtypes"] = dtype_rows(weight[: 16 << 20 >> 12])
    result["load_average_after"] = os.getloadavg()[0]
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
