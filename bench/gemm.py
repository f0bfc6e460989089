"""Linear layers on a GPU: every eligible kernel beside cuBLAS, torch's int8 and fp8 products, peers.

    python -m bench.gemm [--quick] [-o gemm.json]        all shapes take some minutes
    python -m bench.gemm --gpu h200 --estimate           on any machine: what the cost model says

One row for each (shape, M, side): median, 10th and 90th percentile of a call, the share of the roofline

    t = max(bytes / bandwidth, operations / peak, launch)     bytes = weight + x + y, peaks as measured

and the time of bf16 over its own. Weights are cold, calls run in CUDA graphs, sides take turns
(`cuda_timing.py`). A kernel of ours runs with the config that the dispatcher prefers, tuned tables
included, and is verified first; one that fails is reported and not timed. Ours round x themselves where
the layer says so; `_int_mm` and `_scaled_mm` get rounded inputs for nothing.

`reference` is left out: it decodes the weight at every call. Not yet run on a GPU.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import peaks as measured
from bench.cuda_timing import Replay, kernel_errors, measure, missing, needs_text, spoils_cuda, told
from bench.gpu_tables import estimate_text, gemm_text
from bench.peaks import MeasuredPeaks
from bench.peers_gpu import BASELINE, PEER_ERRORS, PEERS, Peer, Product
from fewbit.quant.dispatch import explain, explain_here, m_bucket
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.formats.int_two_level import IntTwoLevelOptions
from fewbit.quant.kernel import AnyProblem, Device, Problem
from fewbit.quant.ladder import Candidate
from fewbit.quant.machine import limit_of, load_device, this_device
from fewbit.quant.policy import Policy, parse_rules
from fewbit.quant.timed_case import Case, Weights, copies_of
from fewbit.quant.tuned import current_tables

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """One weight [N, K] of a model."""

    name: str
    n: int
    k: int


@dataclass(frozen=True)
class Layer:
    """How a weight is stored, and what its inputs are rounded to."""

    name: str
    format: str
    options: Any
    activation: str | None = None

    @property
    def kind(self) -> str:
        """Of the operations, a key of measured peaks."""
        return "bf16" if self.activation is None else "int8"


SHAPES = (  # the one of the acceptance first, then by use
    Shape("llama3-70b o", 8192, 8192),
    Shape("llama3-8b gate+up", 28672, 4096),
    Shape("llama3-8b down", 4096, 14336),
    Shape("llama3-8b qkv", 6144, 4096),
    Shape("llama3-8b o", 4096, 4096),
    Shape("llama3-70b qkv", 10240, 8192),
    Shape("llama3-70b down", 8192, 28672),
    Shape("llama3-70b gate+up", 57344, 8192),
)
ROWS = (1, 4, 16, 32, 64, 128, 256, 1024, 2048, 4096)
LAYERS = (
    Layer("w4a16", "int_group", IntGroupOptions(4, 128)),
    Layer("w8a8", "int_group", IntGroupOptions(8, "row"), "int8_token"),
    Layer("w4a8", "int_two_level", IntTwoLevelOptions(4, 128), "int8_token"),
    Layer("w8a16", "int_group", IntGroupOptions(8, "row")),
    Layer("w3a16", "int_group", IntGroupOptions(3, 128)),
)
QUICK_SHAPES, QUICK_ROWS, QUICK_LAYERS = SHAPES[:3], (1, 16, 64, 256, 2048), LAYERS[:3]
_LEFT_OUT = ("reference", "attend_torch")
_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Plan:
    """What is timed."""

    shapes: Sequence[Shape]
    rows: Sequence[int]
    layers: Sequence[Layer]


def plan(quick: bool) -> Plan:
    """All of it, or what fits into a minute or two."""
    if quick:
        return Plan(QUICK_SHAPES, QUICK_ROWS, QUICK_LAYERS)
    return Plan(SHAPES, ROWS, LAYERS)


def problem_of(layer: Layer, shape: Shape, m: int, machine: Device) -> Problem:
    """The problem that the dispatcher sees."""
    return Problem(
        format=layer.format,
        options=layer.options,
        n_terms=1,
        m_bucket=m_bucket(m),
        n=shape.n,
        k=shape.k,
        dtype=_DTYPE,
        device=machine.backend,
        activation=layer.activation,
        machine=machine,
    )


def candidates(problem: AnyProblem) -> list[Candidate]:
    """Each eligible kernel with the config that the dispatcher prefers for it, the chosen one first."""
    found = explain_here(problem)
    names = [name for name, _ in found.eligible if name not in (*_LEFT_OUT, found.chosen)]
    forced = [
        explain(
            problem,
            policy=Policy((parse_rules(name, "bench.gemm"),)),
            tables=current_tables(),
        ).candidate
        for name in names
    ]
    chosen = [] if found.chosen in _LEFT_OUT else [found.candidate]
    return [*chosen, *forced]


# ---- sides ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """Something that is timed at one shape and M, with what its share is counted from."""

    name: str
    replay: Replay
    weight_bytes: int
    kind: str
    facts: Row


class Timed:
    """All sides at one shape; weights, layouts and peers' modules are made once for all M."""

    def __init__(
        self, shape: Shape, layers: Sequence[Layer], machine: Device, device: str = "cuda"
    ) -> None:
        self.shape, self.layers, self.machine = shape, layers, machine
        self.failures: dict[str, str] = {}
        self._device = torch.device(device)
        self._weights = {
            layer.name: Weights(
                problem_of(layer, shape, 1, machine), self._device, machine.l2_bytes
            )
            for layer in layers
        }
        self._peers: dict[str, list[Product]] = {}

    def sides(self, m: int) -> Iterator[Side | Row]:
        """Each side at M rows; a row that says why instead of one that cannot run."""
        x = torch.randn(m, self.shape.k, device=self._device, dtype=_DTYPE)
        for peer in PEERS:
            yield self._peer_side(peer, x)
        for layer in self.layers:
            problem = problem_of(layer, self.shape, m, self.machine)
            case = Case(problem, self._weights[layer.name], self._device)
            for candidate in candidates(problem):
                yield self._our_side(layer, case, candidate)

    def _peer_side(self, peer: Peer, x: torch.Tensor) -> Side | Row:
        n, k = self.shape.n, self.shape.k
        why = peer.refusal(x.shape[0], n, k, self.machine.cc or (0, 0))
        if why is None:
            why = self.failures.get(peer.name)
        if why is not None:
            return {"side": peer.name, "why": why}
        try:
            products = self._products(peer)
            replay = Replay([partial(product, x) for product in products])
        except PEER_ERRORS as error:
            if spoils_cuda(told(error)):
                raise
            self.failures[peer.name] = told(error)
            return {"side": peer.name, "why": told(error)}
        return Side(peer.name, replay, peer.weight_bytes(n, k), peer.kind, {})

    def _products(self, peer: Peer) -> list[Product]:
        """The peer's function for each copy of the weight."""
        n, k = self.shape.n, self.shape.k
        if peer.name not in self._peers:
            copies = copies_of(peer.weight_bytes(n, k), self.machine.l2_bytes)
            made = []
            for _ in range(copies):
                weight = torch.randn(n, k, device=self._device, dtype=_DTYPE).mul_(k**-0.5)
                made.append(peer.build(weight))
            self._peers[peer.name] = made
        return self._peers[peer.name]

    def _our_side(self, layer: Layer, case: Case, candidate: Candidate) -> Side | Row:
        name = f"{layer.name} {candidate.kernel}"
        facts: Row = {"kernel": candidate.kernel, "config": dict(candidate.config)}
        try:
            facts["relative_error"] = case.verify(candidate)
            replay = Replay(case.calls(candidate))
        except kernel_errors() as error:
            if spoils_cuda(told(error)):
                raise
            full = isinstance(error, torch.OutOfMemoryError)
            return {"side": name, "why": told(error), "failed": not full, **facts}
        n_bytes = self._weights[layer.name].packed[0].n_bytes
        return Side(name, replay, n_bytes, layer.kind, facts)


@torch.no_grad()
def rows(plan: Plan, peaks: MeasuredPeaks, seconds: float) -> Iterator[Row]:
    """Timings, shape by shape and M by M, as far as `seconds` go; then what was not reached."""
    deadline, machine = time.monotonic() + seconds, this_device("cuda")
    left_out = []
    for shape in plan.shapes:
        timed: Timed | None = None
        for m in plan.rows:
            if time.monotonic() > deadline:
                left_out.append(f"{shape.name} M={m}")
                continue
            try:
                timed = timed or Timed(shape, plan.layers, machine)
                yield from timed_rows(timed, m, peaks)
            except torch.OutOfMemoryError as error:
                yield {"shape": shape.name, "m": m, "why": told(error)}
        del timed
        torch.cuda.empty_cache()
    if left_out:
        yield {"skipped": left_out, "why": "time"}


def timed_rows(timed: Timed, m: int, peaks: MeasuredPeaks) -> list[Row]:
    """Rows of all sides at one M."""
    where: Row = {"shape": timed.shape.name, "n": timed.shape.n, "k": timed.shape.k, "m": m}
    found = list(timed.sides(m))
    sides = {side.name: side for side in found if isinstance(side, Side)}
    spreads = measure({name: side.replay for name, side in sides.items()})
    out: list[Row] = [where | row for row in found if not isinstance(row, Side)]
    for name, side in sides.items():
        seconds = spreads[name].median
        baseline = spreads[BASELINE].median if BASELINE in spreads else None
        shares = figures(timed.shape, m, side.weight_bytes, side.kind, peaks, seconds)
        ratio = {} if baseline is None else {"bf16_over_this": baseline / seconds}
        out.append(where | {"side": name} | spreads[name].as_dict() | shares | ratio | side.facts)
    return out


def figures(
    shape: Shape, m: int, weight_bytes: int, kind: str, peaks: MeasuredPeaks, seconds: float
) -> Row:
    """bytes, TOPS and GB/s of a call that took `seconds`, the roofline in microseconds and its share;
    the last two only where peaks are known."""
    n_bytes = weight_bytes + m * (shape.k + shape.n) * _DTYPE.itemsize
    ops = 2.0 * m * shape.n * shape.k
    found: Row = {
        "weight_bytes": weight_bytes,
        "gb_per_second": n_bytes / seconds / 1e9,
        "tops": ops / seconds / 1e12,
    }
    roofline = peaks.roofline(n_bytes, ops, kind)
    if roofline is not None:
        found |= {"roofline_us": 1e6 * roofline, "share": roofline / seconds}
    return found


# ---- estimates ------------------------------------------------------------------------------


def estimates(plan: Plan, machine: Device) -> Iterator[Row]:
    """What the cost model says of each shape, layer and M on a described machine; nothing is run."""
    for shape in plan.shapes:
        for layer in plan.layers:
            for m in plan.rows:
                found = explain_here(problem_of(layer, shape, m, machine))
                seconds = dict(found.eligible)[found.chosen]
                limit = limit_of(found.problem, seconds)
                yield {
                    "shape": shape.name,
                    "n": shape.n,
                    "k": shape.k,
                    "m": m,
                    "layer": layer.name,
                    "kernel": found.chosen,
                    "config": dict(found.config),
                    "estimated_us": 1e6 * seconds,
                    "limit_us": 1e6 * limit.seconds if limit else None,
                    "share": limit.share if limit else None,
                }


def main() -> int:
    """Print the tables, write the JSON; 2 where there is no GPU, 1 if a kernel of ours failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="three shapes, five numbers of rows")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--gpu", help="a described machine, for --estimate")
    parser.add_argument("--estimate", action="store_true", help="the cost model's times; no GPU")
    args = parser.parse_args()
    todo = plan(args.quick)
    if args.estimate:
        machine = load_device(args.gpu) if args.gpu else this_device()
        found = list(estimates(todo, machine))
        print(estimate_text(found, str(machine)))
    elif lacking := missing():
        remedy = "`python -m bench.gemm --gpu h200 --estimate` prints the cost model's times."
        print(needs_text("bench.gemm", lacking, remedy), file=sys.stderr)
        return 2
    else:
        peak_rows = list(measured.rows())
        found = list(rows(todo, measured.peaks_of(peak_rows), 60 * args.minutes))
        print(gemm_text(found))
        found = [*peak_rows, *found]
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if any(row.get("failed") for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
