"""One decode step of a whole random model in one CUDA graph: tokens a second, beside bf16 and memory.

    python -m bench.decode_step [--minutes 3]

Isolated kernels promise more than they serve, so whole steps (`decode_models.py`) of an 8B and a 70B
shape are captured and replayed, with `w4a8kv4` weights and cache, and in bf16. Weights are random and
lie apart, so that none is in a cache. Where a model does not fit, two counts of layers are measured and
the others take as long as these; the result says so. The share counts all bytes that a step must read
(weights of the layers, head, keys and values up to the position) at the bandwidth that a copy reaches
on this GPU.

Not yet run on a GPU; `tests/bench/test_decode_models.py` compares both steps at a small size.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.decode_models import Shape, Step, dense_step, packed_step
from fewbit.quant.errors import FewbitError

_REPLAYS = 30
SHAPES = (
    Shape("8B", 32, 4096, 14336, 32, 8, 128, 128256),
    Shape("70B", 80, 8192, 28672, 64, 8, 128, 128256),
)
CASES = ((1, 1024), (16, 1024), (16, 8192))  # rows, position


# ---- timing ---------------------------------------------------------------------------------


def seconds_of(step: Step, rows: int, hidden_size: int) -> float:
    """Median of replays of the captured step."""
    hidden = torch.randn(rows, hidden_size, dtype=torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            step(hidden)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step(hidden)
        times = []
        for _ in range(_REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


Make = Callable[[Shape, int, int, int, str], Step]
_MAKERS: dict[str, Make] = {"w4a8kv4": packed_step, "bf16": dense_step}


def layers_that_fit(shape: Shape, kind: str, rows: int, position: int, free_bytes: int) -> int:
    """All layers, or as many as take at most 80 % of the free memory, at least 2."""
    bytes_per_weight = 2.0 if kind == "bf16" else 0.56
    vector = 4 * shape.head_dim if kind == "bf16" else shape.head_dim + 8
    weights = sum(n * k for _, n, k in shape.linears) * bytes_per_weight
    cache = rows * shape.kv_heads * (position + 1) * vector
    room = 0.8 * free_bytes - 2 * shape.vocabulary * shape.hidden
    return max(2, min(shape.layers, int(room // (weights + cache))))


def measure(shape: Shape, kind: str, rows: int, position: int, bandwidth: float) -> dict[str, Any]:
    """One row of the result. bandwidth: bytes a second that the GPU reaches."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    n_layers = layers_that_fit(shape, kind, rows, position, free)
    few = max(1, n_layers // 2)
    times, n_bytes = {}, {}
    for count in dict.fromkeys((few, n_layers)):
        step = _MAKERS[kind](shape, count, rows, position, "cuda")
        times[count], n_bytes[count] = seconds_of(step, rows, shape.hidden), step.n_bytes
        del step
        torch.cuda.empty_cache()
    seconds, moved = whole(times, shape.layers), whole(n_bytes, shape.layers)
    return {
        "model": shape.name,
        "kind": kind,
        "rows": rows,
        "tokens": position + 1,
        "layers_measured": n_layers,
        "extrapolated": n_layers < shape.layers,
        "step_ms": seconds * 1e3,
        "tokens_per_second": rows / seconds,
        "gigabytes": moved / 1e9,
        "share_of_bandwidth": moved / bandwidth / seconds,
    }


def whole(of_layers: dict[int, float], n_layers: int) -> float:
    """What `n_layers` layers take, from two counts of layers (or from all of them)."""
    if n_layers in of_layers:
        return of_layers[n_layers]
    (few, first), (many, second) = sorted(of_layers.items())
    return second + (second - first) / (many - few) * (n_layers - many)


def copy_bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return 2 * source.numel() / best


def run(budget_seconds: float) -> dict[str, Any]:
    """Every case that begins within the budget; the others are listed as skipped. FewbitError
    without a GPU."""
    if not torch.cuda.is_available():
        raise FewbitError("a decode step is timed on an NVIDIA GPU, and torch sees none here")
    start, bandwidth = time.monotonic(), copy_bandwidth()
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for shape, case, kind in _cases():
        if time.monotonic() - start > budget_seconds:
            skipped.append(f"{shape.name} {kind} {case[0]} x {case[1]}")
            continue
        rows.append(measure(shape, kind, *case, bandwidth))
    return {"bandwidth": bandwidth, "rows": rows, "skipped": skipped, "speedup": speedups(rows)}


def _cases() -> Iterator[tuple[Shape, tuple[int, int], str]]:
    for case in CASES:
        for shape in SHAPES:
            for kind in _MAKERS:
                yield shape, case, kind


def speedups(rows: list[dict[str, Any]]) -> dict[str, float]:
    """bf16 time over ours, for each case that has both."""
    found = {(r["model"], r["rows"], r["tokens"], r["kind"]): r["step_ms"] for r in rows}
    return {
        f"{model} {n} x {tokens}": found[model, n, tokens, "bf16"] / ms
        for (model, n, tokens, kind), ms in found.items()
        if kind != "bf16" and (model, n, tokens, "bf16") in found
    }


def main(arguments: list[str]) -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description="decode steps of random models")
    parser.add_argument("--minutes", type=float, default=3.0)
    options = parser.parse_args(arguments)
    print(json.dumps(run(60 * options.minutes), indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
