"""CPU decode of a 4-bit model against bf16 torch, in one run, with cold weights.

    python -m bench.decode -o bench/results/decode_cpu.json [--layers 8] [--threads 2]

A random Llama-shaped stack (hidden 2048, inner 5632, 32 heads on 4 key-value heads, one head of
32,000 rows) is built twice: with `nn.Linear` in bf16 and with `QuantLinear` holding `int_group`
4 bits g128, kernels chosen by the dispatcher. Every layer has its own weights, several times the
last-level cache in all, so that each step reads them from memory. The table gives the time of all
linear layers of a step for several numbers of rows M (M = 1 is decoding one sequence); norms,
attention and sampling cost the same in both and are left out.

The two sides are timed in turns, and the best and the median of the rounds are reported: on a
shared machine the best is what the machine can do. Kernels by shape follow: each kernel alone on
N = K, weights rotated.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbit.quant import cpu
from fewbit.quant.dispatch import problem_of
from fewbit.quant.formats.int_group import FORMAT, IntGroupOptions
from fewbit.quant.linear import QuantLinear
from fewbit.quant.packed import PackedTensor, Term

HIDDEN, INNER, KEY_VALUE, VOCABULARY = 2048, 5632, 256, 32000
SHAPES = (  # (N, K) of a layer's linears, in order of use
    (HIDDEN, HIDDEN),
    (KEY_VALUE, HIDDEN),
    (KEY_VALUE, HIDDEN),
    (HIDDEN, HIDDEN),
    (INNER, HIDDEN),
    (INNER, HIDDEN),
    (HIDDEN, INNER),
)
W4 = IntGroupOptions(4, 128)
W8 = IntGroupOptions(8, "row")
COLD_BYTES = 160 << 20  # rotate each kernel's weights over this much, several last-level caches


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one step: best and median of the rounds."""

    best: float
    median: float


def random_packed(n: int, k: int, options: IntGroupOptions) -> PackedTensor:
    """A weight of random codes; the scales make activations keep their size."""
    parts: dict[str, torch.Tensor] = {}
    for name, spec in FORMAT.part_specs((n, k), options).items():
        if name == "codes":
            parts[name] = torch.randint(0, 256, spec.shape, dtype=torch.uint8)
        else:
            step = k**-0.5 / (1 << (options.bits - 2))
            parts[name] = torch.full(spec.shape, step, dtype=spec.dtype)
    return PackedTensor((n, k), (Term("int_group", options, parts),))


def dense_linear(packed: PackedTensor) -> nn.Linear:
    """bf16 torch on the same weight."""
    n, k = packed.shape
    layer = nn.Linear(k, n, bias=False, device="meta")
    weight = FORMAT.unpack(packed.terms[0].parts, packed.shape, packed.terms[0].options)
    layer.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    return layer


def interleave(sides: dict[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, Timing]:
    """Time each side in every round, so that both see the same state of the machine."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            for _ in range(calls):
                run()
            seconds[name].append((time.perf_counter() - start) / calls * 1e3)
    return {name: Timing(min(found), statistics.median(found)) for name, found in seconds.items()}


def step(layers: Sequence[nn.Module], inputs: dict[int, torch.Tensor]) -> Callable[[], None]:
    """One pass over all layers; every layer multiplies the input of its width."""
    pairs = [(layer, inputs[layer.in_features]) for layer in layers]  # type: ignore[index]

    def run() -> None:
        for layer, x in pairs:
            layer(x)

    return run


def decode_table(n_layers: int, ms: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Rows of the first table; see the module's text."""
    shapes = [*(SHAPES * n_layers), (VOCABULARY, HIDDEN)]
    packed = [random_packed(n, k, W4) for n, k in shapes]
    dense = [dense_linear(weight) for weight in packed]
    low = [QuantLinear.from_packed(weight, None, torch.bfloat16) for weight in packed]
    rows = []
    for m in ms:
        inputs = {k: torch.randn(m, k).to(torch.bfloat16) for k in (HIDDEN, INNER)}
        sides = {"bf16": step(dense, inputs), "w4a16": step(low, inputs)}
        found = interleave(sides, rounds if m <= 16 else max(3, rounds // 4), 1)
        plan = low[0].runners()[0].explain(m, torch.bfloat16, "cpu").chosen
        rows.append(
            {
                "m": m,
                "kernel": plan,
                "bf16_ms": found["bf16"].best,
                "w4a16_ms": found["w4a16"].best,
                "bf16_tokens_per_second": m * 1e3 / found["bf16"].best,
                "w4a16_tokens_per_second": m * 1e3 / found["w4a16"].best,
                "speedup": found["bf16"].best / found["w4a16"].best,
                "speedup_of_medians": found["bf16"].median / found["w4a16"].median,
            }
        )
        print_decode(rows[-1])
    return rows


def kernel_rows(size: int, ms: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Every eligible kernel of `cpu.py` on N = K = size beside bf16 torch."""
    rows = []
    for options in (W4, W8):
        n_cold = max(3, COLD_BYTES // (size * size * options.bits // 8))
        weights = [random_packed(size, size, options) for _ in range(n_cold)]
        n_dense = max(3, COLD_BYTES // (size * size * 2))
        dense = [dense_linear(weight) for weight in weights[:n_dense]]
        for m in ms:
            x = torch.randn(m, size).to(torch.bfloat16)
            sides: dict[str, Callable[[], Any]] = {
                "bf16": rotate([partial(layer, x) for layer in dense])
            }
            problem = problem_of(weights[0], m, torch.bfloat16, "cpu")
            for kernel in cpu.KERNELS:
                if kernel.refuse(problem):
                    continue
                held = weights[:3] if kernel.name == "dense_chunked" else weights
                held = held[:n_dense] if kernel.name == "dense_cached" else held
                layouts = [kernel.prepare(weight, torch.bfloat16) for weight in held]
                sides[kernel.name] = rotate(
                    [partial(kernel.launch, x, layout) for layout in layouts]
                )
            found = interleave(sides, rounds, 3)
            row = {"bits": options.bits, "size": size, "m": m}
            row |= {f"{name}_ms": timing.best for name, timing in found.items()}
            rows.append(row)
            cells = "  ".join(f"{name} {timing.best:.3f}" for name, timing in found.items())
            print(f"  w{options.bits} N=K={size} M={m:<4d} {cells} ms")
    return rows


def rotate(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """A call that takes the next of `calls` each time."""
    position = 0

    def run() -> Any:
        nonlocal position
        position = (position + 1) % len(calls)
        return calls[position]()

    return run


def print_decode(row: dict[str, Any]) -> None:
    """One line of the first table."""
    print(
        f"  M={row['m']:<4d} {row['kernel']:<13s} bf16 {row['bf16_ms']:9.2f} ms "
        f"({row['bf16_tokens_per_second']:8.1f} tok/s)   w4a16 {row['w4a16_ms']:9.2f} ms "
        f"({row['w4a16_tokens_per_second']:8.1f} tok/s)   speedup {row['speedup']:.2f} "
        f"(medians {row['speedup_of_medians']:.2f})"
    )


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    """Print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 128])
    parser.add_argument("--sizes", type=int, nargs="*", default=[2048, 4096])
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result: dict[str, Any] = {"machine": machine(), "hidden": HIDDEN, "layers": args.layers}
    print(f"all linears of a step, {args.layers} layers, {torch.get_num_threads()} threads")
    with torch.inference_mode():
        result["decode"] = decode_table(args.layers, args.rows, args.rounds)
        print("each kernel alone, weights rotated")
        result["kernels"] = [
            row for size in args.sizes for row in kernel_rows(size, args.rows, args.rounds)
        ]
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
