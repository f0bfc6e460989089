"""4-bit weights times 8-bit inputs on the CPU, against bf16 torch, in one run, with cold weights.

    python -m bench.int8_linear -o bench/results/int8_linear.json [--threads 1]

The first table: one product y[M, N] = x[M, K] · Ŵᵀ with N = K. Sides, timed in turns:

    bf16      `F.linear` on a dense bf16 weight                       2 bytes a weight are read
    w4a8      `int_two_level` g128 with `int8_token`, a layer's call:  1 byte, decoded at load
              x is rounded, multiplied by the kernel that the dispatcher chose, and scaled
    round     the rounding of x alone, which w4a8 contains
    int_mm    bare `torch._int_mm` on codes that are there already     1 byte
    w4a16     int4pack, `int_group` 4 bits g128; refused beyond 32 rows  ½ byte

The second table: q, k and v of 4096 + 1024 + 1024 rows that get the same x, with and without `fuse`.

Every side's weights are rotated over several last-level caches. GB/s counts the weight as it is
laid out for the product, beside what the memory copies at; TOPS count two operations per multiply-add.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from bench.decode import COLD_BYTES, W4, Timing, interleave, machine, random_packed, rotate
from fewbit.quant import cpu
from fewbit.quant.dispatch import problem_of
from fewbit.quant.formats.int8_token import ACTIVATION
from fewbit.quant.formats.int_two_level import IntTwoLevel, IntTwoLevelOptions
from fewbit.quant.fused import fuse
from fewbit.quant.linear import QuantLinear
from fewbit.quant.packed import PackedTensor, Term

OPTIONS = IntTwoLevelOptions(4, 128)
QKV = (4096, 1024, 1024)
QKV_K = 4096
INT4PACK = next(kernel for kernel in cpu.KERNELS if kernel.name == "int4pack")
SHARED = "other work ran on this machine at the same time; compare within a row, best beside median"
_CALLS = 3  # of one side in a round


def memory_bandwidth() -> dict[str, float]:
    """GB/s of this moment: `copy` of 256 MB counts bytes read and written, `read` sums fp32."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    n_bytes = source.numel() * source.element_size()
    found = interleave({"copy": lambda: target.copy_(source), "read": source.sum}, 8, 1)
    return {
        "copy": 2 * n_bytes / found["copy"].best / 1e6,
        "read": n_bytes / found["read"].best / 1e6,
    }


def two_level_packed(n: int, k: int) -> PackedTensor:
    """A weight of random codes, whose second level never leaves int8."""
    parts: dict[str, torch.Tensor] = {}
    for name, spec in IntTwoLevel().part_specs((n, k), OPTIONS).items():
        if name == "codes":
            parts[name] = torch.randint(0, 256, spec.shape, dtype=torch.uint8)
        elif name == "scale_row":
            parts[name] = torch.full(spec.shape, k**-0.5 / 64, dtype=spec.dtype)
    groups = torch.randint(1, 16, (n, k // int(OPTIONS.group)))
    parts["scale_group"] = groups.to(torch.uint8)
    parts["offset_group"] = (-7 * groups).to(torch.int8)
    return PackedTensor((n, k), (Term("int_two_level", OPTIONS, parts),))


def w4a8_layer(packed: PackedTensor) -> QuantLinear:
    """The layer of a model whose recipe rounds inputs."""
    return QuantLinear.from_packed(packed, None, torch.bfloat16, ACTIVATION.name)


def n_copies(n_bytes: int) -> int:
    """Weights of this size that exceed the caches together."""
    return max(3, -(-COLD_BYTES // n_bytes))


def figures(
    found: dict[str, Timing], sizes: dict[str, float], macs: int, gb_per_second: float
) -> dict[str, dict[str, float]]:
    """Milliseconds, and for sides that multiply, GB/s, its share of the copy's, and TOPS."""
    table = {}
    for name, timing in found.items():
        cell = {"best_ms": timing.best, "median_ms": timing.median}
        if name in sizes:
            speed = sizes[name] / timing.best / 1e6
            cell |= {"gb_per_second": speed, "share_of_copy": speed / gb_per_second}
            cell |= {"tops": 2 * macs / timing.best / 1e9}
            cell |= {"bf16_over_this": found["bf16"].best / timing.best}
            cell |= {"bf16_over_this_medians": found["bf16"].median / timing.median}
        table[name] = cell
    return table


def n_rounds(m: int, rounds: int) -> int:
    """Fewer for products that take long."""
    return rounds if m <= 32 else max(4, rounds // 3)


def linear_rows(size: int, ms: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """The first table, N = K = size."""
    n_weights = size * size
    dense = [
        torch.randn(size, size).mul_(size**-0.5).bfloat16() for _ in range(n_copies(2 * n_weights))
    ]
    layers = [w4a8_layer(two_level_packed(size, size)) for _ in range(n_copies(n_weights))]
    integers = [
        torch.randint(-128, 128, (size, size), dtype=torch.int8) for _ in range(n_copies(n_weights))
    ]
    groups = [random_packed(size, size, W4) for _ in range(n_copies(n_weights // 2))]
    four_bit = [INT4PACK.prepare(packed, torch.bfloat16) for packed in groups]
    sizes = {"bf16": 2.0 * n_weights, "w4a8": n_weights, "int_mm": n_weights}
    sizes["w4a16"] = groups[0].n_bytes
    rows = []
    for m in ms:
        x = torch.randn(m, size).bfloat16()
        codes = ACTIVATION.round(x).codes
        sides: dict[str, Callable[[], Any]] = {
            "bf16": rotate([partial(functional.linear, x, weight) for weight in dense]),
            "w4a8": rotate([partial(layer, x) for layer in layers]),
            "round": partial(ACTIVATION.round, x),
            "int_mm": rotate([partial(torch._int_mm, codes, weight.T) for weight in integers]),
        }
        if not INT4PACK.refuse(problem_of(groups[0], m, torch.bfloat16, "cpu")):
            sides["w4a16"] = rotate([partial(INT4PACK.launch, x, layout) for layout in four_bit])
        for layer in layers:
            layer(x)  # derives its layout
        bandwidth = memory_bandwidth()["copy"]
        found = interleave(sides, n_rounds(m, rounds), _CALLS)
        kernel = layers[0].runners()[0].explain(m, torch.bfloat16, "cpu").chosen
        row = {"n": size, "k": size, "m": m, "kernel": kernel, "copy_gb_per_second": bandwidth}
        rows.append(row | figures(found, sizes, m * n_weights, bandwidth))
        print_row(rows[-1])
    return rows


def qkv_rows(ms: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """The second table: one step is q(x), k(x) and v(x) of one layer."""
    n_weights = sum(QKV) * QKV_K
    packed = [[two_level_packed(n, QKV_K) for n in QKV] for _ in range(n_copies(n_weights))]
    alone = [[w4a8_layer(weight) for weight in layer] for layer in packed]
    fused = [[w4a8_layer(weight) for weight in layer] for layer in packed]
    for layers in fused:
        fuse(layers)
    dense = [
        [partial(functional.linear, weight=torch.randn(n, QKV_K).bfloat16()) for n in QKV]
        for _ in range(n_copies(2 * n_weights))
    ]
    sizes = {"bf16": 2.0 * n_weights, "alone": n_weights, "fused": n_weights}
    stacks = {"bf16": dense, "alone": alone, "fused": fused}
    rows = []
    for m in ms:
        x = torch.randn(m, QKV_K).bfloat16()
        sides = {
            name: rotate([partial(all_of, layers, x) for layers in stack])
            for name, stack in stacks.items()
        }
        for layers in (*alone, *fused):
            all_of(layers, x)  # derives layouts
        bandwidth = memory_bandwidth()["copy"]
        found = interleave(sides, n_rounds(m, rounds), _CALLS)
        row = {"n": list(QKV), "k": QKV_K, "m": m, "copy_gb_per_second": bandwidth}
        row |= {"alone_over_fused": found["alone"].best / found["fused"].best}
        row |= {"alone_over_fused_medians": found["alone"].median / found["fused"].median}
        rows.append(row | figures(found, sizes, m * n_weights, bandwidth))
        print_row(rows[-1])
    if any(layer.shared is None for layers in fused for layer in layers):
        raise RuntimeError("a group ended itself while it was timed: `fused` is not fused")
    return rows


def all_of(layers: Sequence[Callable[[torch.Tensor], Any]], x: torch.Tensor) -> None:
    """Every layer on the same x."""
    for layer in layers:
        layer(x)


def print_row(row: dict[str, Any]) -> None:
    """One line: best milliseconds, TOPS and share of the copy's bandwidth of every side."""
    cells = [
        f"{name} {cell['best_ms']:.3f}"
        + (f" ({cell['tops']:.2f} TOPS {cell['share_of_copy']:.0%})" if "tops" in cell else "")
        for name, cell in row.items()
        if isinstance(cell, dict)
    ]
    ours = row.get("w4a8") or row["fused"]
    print(
        f"  N={row['n']} M={row['m']:<4d} {row.get('kernel', ''):<12s} {'  '.join(cells)} ms   "
        f"bf16/ours {ours['bf16_over_this']:.2f} (medians {ours['bf16_over_this_medians']:.2f})",
        flush=True,
    )


def main() -> None:
    """Print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 32, 128, 512])
    parser.add_argument("--sizes", type=int, nargs="*", default=[2048, 4096])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    started = time.perf_counter()
    result: dict[str, Any] = {"machine": machine(), "note": SHARED}
    result["memory_gb_per_second"] = memory_bandwidth()
    print(f"{args.threads} threads, memory {result['memory_gb_per_second']} GB/s, best times")
    with torch.no_grad():  # not inference_mode: its tensors cannot be shared by fused layers
        result["linear"] = [
            row for size in args.sizes for row in linear_rows(size, args.rows, args.rounds)
        ]
        print(f"q, k, v of {QKV} rows, K = {QKV_K}: one product, or one each")
        result["qkv"] = qkv_rows(args.rows, args.rounds)
    result["load_average_after"] = os.getloadavg()[0]
    result["seconds"] = time.perf_counter() - started
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
