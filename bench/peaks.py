"""Peak rates of the GPU at hand, measured: what the other benches take shares of.

    python -m bench.peaks [-o peaks.json]

    copy     a device-to-device copy; bytes read and written
    read     the faster of a sum over fp32 and a bf16 matrix times a vector; bytes read
    fp16, bf16   8192 × 8192 × 8192 by cuBLAS        int8   the same by `torch._int_mm`
    fp8      the same by `torch._scaled_mm`, where the GPU has it
    launch   one kernel that does nothing to speak of, in a CUDA graph of 400

Inputs are random: zeros draw less power and run at higher clocks. Rates follow from medians. A row that
could not be measured says why. Shares that other benches state are of the larger of `copy` and `read`.

Not yet run on a GPU.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.cuda_timing import Replay, Spread, measure, missing, needs_text, told

SIZE = 8192  # M, N and K of the products
_BIG_BYTES = 4 << 30  # of what is copied or read, if there is room
_LAUNCHES = 400
_FP8_SINCE = (8, 9)


@dataclass(frozen=True)
class MeasuredPeaks:
    """bytes_per_second: of memory, None if it was not measured. ops_per_second: of bf16, fp16, int8,
    fp8 where measured; a multiply-add is two. launch_seconds: of one node of a CUDA graph."""

    bytes_per_second: float | None = None
    launch_seconds: float | None = None
    ops_per_second: dict[str, float] = field(default_factory=dict)

    def roofline(self, n_bytes: float, ops: float, kind: str) -> float | None:
        """Least seconds for so many bytes and operations of `kind`; None if a rate is not known."""
        peak, bandwidth = self.ops_per_second.get(kind), self.bytes_per_second
        if peak is None or bandwidth is None:
            return None
        return max(n_bytes / bandwidth, ops / peak, self.launch_seconds or 0.0)


def peaks_of(rows: Iterable[dict[str, Any]]) -> MeasuredPeaks:
    """The peaks that rows of `rows` tell; rows without a rate are passed over."""
    rates = {row["peak"]: float(row["rate"]) for row in rows if row.get("rate")}
    memory = [rates[name] for name in ("copy", "read") if name in rates]
    kinds = ("bf16", "fp16", "int8", "fp8")
    return MeasuredPeaks(
        bytes_per_second=max(memory, default=None),
        launch_seconds=1 / rates["launch"] if "launch" in rates else None,
        ops_per_second={kind: rates[kind] for kind in kinds if kind in rates},
    )


# ---- what is measured -----------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """One peak. amount: bytes, operations or launches of a call; make() -> the calls to time, of
    which the fastest counts."""

    name: str
    unit: str
    amount: float
    make: Callable[[], list[Callable[[], Any]]]


def probes(free_bytes: int, capability: tuple[int, int]) -> list[Probe]:
    """What can be measured on such a GPU; sizes fit its free memory."""
    big = min(_BIG_BYTES, free_bytes // 4) // (1 << 20) * (1 << 20)
    ops = 2.0 * SIZE**3
    found = [
        Probe("copy", "B/s", 2.0 * big, lambda: _copies(big)),
        Probe("read", "B/s", float(big), lambda: _reads(big)),
        Probe("bf16", "op/s", ops, lambda: _float_products(torch.bfloat16)),
        Probe("fp16", "op/s", ops, lambda: _float_products(torch.float16)),
        Probe("int8", "op/s", ops, _int8_products),
        Probe("launch", "1/s", float(_LAUNCHES), _launches),
    ]
    if capability >= _FP8_SINCE:
        found.insert(5, Probe("fp8", "op/s", ops, _fp8_products))
    return found


def _copies(n_bytes: int) -> list[Callable[[], Any]]:
    source = torch.randint(-128, 128, (n_bytes,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return [lambda: target.copy_(source)]


def _reads(n_bytes: int) -> list[Callable[[], Any]]:
    numbers = torch.randn(n_bytes // 4, device="cuda")
    matrix = torch.randn(n_bytes // (2 * SIZE), SIZE, device="cuda", dtype=torch.bfloat16)
    vector = torch.randn(SIZE, device="cuda", dtype=torch.bfloat16)
    return [numbers.sum, lambda: matrix @ vector]


def _float_products(dtype: torch.dtype) -> list[Callable[[], Any]]:
    a, b = (torch.randn(SIZE, SIZE, device="cuda", dtype=dtype) for _ in range(2))
    return [lambda: a @ b.T]


def _int8_products() -> list[Callable[[], Any]]:
    a, b = (
        torch.randint(-128, 128, (SIZE, SIZE), device="cuda", dtype=torch.int8) for _ in range(2)
    )
    return [lambda: torch._int_mm(a, b.T)]


def _fp8_products() -> list[Callable[[], Any]]:
    a, b = (torch.randn(SIZE, SIZE, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")

    def product(fast: bool) -> torch.Tensor:
        return torch._scaled_mm(
            a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    return [lambda: product(True), lambda: product(False)]


def _launches() -> list[Callable[[], Any]]:
    number = torch.zeros(1, device="cuda")

    def many() -> None:
        for _ in range(_LAUNCHES):
            number.add_(1.0)

    return [many]


# ---- rows -----------------------------------------------------------------------------------


def rows() -> Iterator[dict[str, Any]]:
    """One row for each peak: peak, unit, rate, and the spread of a call; or `error`."""
    free, _ = torch.cuda.mem_get_info()
    for probe in probes(free, torch.cuda.get_device_capability()):
        row: dict[str, Any] = {"peak": probe.name, "unit": probe.unit}
        try:
            replays = {str(i): Replay([call]) for i, call in enumerate(probe.make())}
            yield row | rated(probe, measure(replays))
        except RuntimeError as error:  # out of memory and missing operators are such
            yield row | {"error": told(error)}
        torch.cuda.empty_cache()


def rated(probe: Probe, found: dict[str, Spread]) -> dict[str, Any]:
    """Rate and spread of the fastest call."""
    best = min(found.values(), key=lambda spread: spread.median)
    return {"rate": probe.amount / best.median, **best.as_dict()}


def row_text(row: dict[str, Any]) -> str:
    """`copy      3.21 TB/s`."""
    if "error" in row:
        return f"{row['peak']:<8s} not measured: {row['error']}"
    if row["peak"] == "launch":
        return f"{row['peak']:<8s} {1e6 / row['rate']:7.2f} us"
    return f"{row['peak']:<8s} {row['rate'] / 1e12:7.2f} T{row['unit']}"


def main() -> int:
    """Print the peaks; write them to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    lacking = missing(triton=False)
    if lacking:
        print(needs_text("bench.peaks", lacking), file=sys.stderr)
        return 2
    found = []
    for row in rows():
        found.append(row)
        print(row_text(row), flush=True)
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if any("error" in row for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
