"""Decode attention on a GPU: packed pages beside bf16 `scaled_dot_product_attention`.

    python -m bench.attention [-o attention.json]

One row for each (batch × tokens, G, side); one new token a row of the batch, 8 KV heads, D = 128.

    int4_head   each eligible kernel, with the config that the dispatcher prefers, on the cache that the
                recipes make: pages, the newest 64 tokens and the first 4 as they were computed
    sdpa        on a dense cache, with `enable_gqa`, and with the heads of a group as queries of one
                head, which is the same attention; the faster one is the baseline of ratios

The share is that of the time in which measured bandwidth reads the cache once. Caches are rotated
through three times the L2, calls run in CUDA graphs, sides take turns; a kernel is verified first.

Deliberately not here: prompts, padding. Not yet run on a GPU.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from bench import peaks as measured
from bench.cuda_timing import (
    Replay,
    Spread,
    kernel_errors,
    measure,
    missing,
    needs_text,
    spoils_cuda,
    told,
)
from bench.gemm import candidates
from bench.gpu_tables import attention_text
from bench.oracle_check import row_error
from bench.peaks import MeasuredPeaks
from fewbit.quant import kv_softmax
from fewbit.quant.dispatch import kernels
from fewbit.quant.errors import FewbitError
from fewbit.quant.formats.int4_head import Int4HeadOptions
from fewbit.quant.kernel import AttentionProblem, Device
from fewbit.quant.kv_attention import problem_of
from fewbit.quant.kv_cache import PackedLayer
from fewbit.quant.kv_policy import KVPolicy, PageUse
from fewbit.quant.kv_view import KVView, Scoring
from fewbit.quant.ladder import Candidate
from fewbit.quant.machine import this_device
from fewbit.quant.runner import bound_launch
from fewbit.quant.timed_case import TOLERANCE, copies_of

Row = dict[str, Any]

CASES = ((16, 32768), (1, 32768), (16, 4096), (1, 1024))  # batch, tokens; the acceptance's first
GROUPS = (4, 8)
KV_HEADS, HEAD_DIM = 8, 128
_USE = PageUse("int4_head", Int4HeadOptions())
_POLICY = KVPolicy(_USE, _USE, residual=64, sink=4)
_DTYPE = torch.bfloat16
_CHUNK = 2048  # tokens encoded at once
_SDPA = ("sdpa enable_gqa", "sdpa grouped")


@dataclass(frozen=True)
class Call:
    """One new token of each of `batch` rows over `tokens` tokens, `group` query heads a KV head."""

    batch: int
    tokens: int
    group: int

    @property
    def where(self) -> Row:
        """What a row says of it."""
        return {
            "case": f"{self.batch} × {self.tokens}",
            "batch": self.batch,
            "tokens": self.tokens,
            "group": self.group,
            "kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
        }

    @property
    def dense_bytes(self) -> int:
        """Of keys and values in bf16."""
        return 2 * self.batch * KV_HEADS * self.tokens * HEAD_DIM * _DTYPE.itemsize

    def ops(self) -> float:
        """Of both products."""
        return 4.0 * self.batch * KV_HEADS * self.group * self.tokens * HEAD_DIM


@dataclass(frozen=True)
class Side:
    """name: in tables. bytes: that it must read. facts: kernel, config, error."""

    name: str
    replay: Callable[[], float]
    n_bytes: int
    facts: Row


# ---- caches ---------------------------------------------------------------------------------


def random_vectors(batch: int, tokens: int, device: str) -> torch.Tensor:
    """bf16 [batch, Hkv, tokens, D], normal."""
    shape = (batch, KV_HEADS, tokens, HEAD_DIM)
    return torch.randn(shape, device=device, dtype=_DTYPE)


def packed_view(call: Call, device: str) -> KVView:
    """What the newest token sees of a cache that was filled run by run."""
    layer = PackedLayer(_POLICY, reserve=call.tokens)
    before = call.tokens - 1
    for start in range(0, before, _CHUNK):
        n_new = min(_CHUNK, before - start)
        layer.update(*(random_vectors(call.batch, n_new, device) for _ in range(2)))
    handle, _ = layer.update(*(random_vectors(call.batch, 1, device) for _ in range(2)))
    view: KVView = handle.view
    return view


def copied(view: KVView) -> KVView:
    """The same cache in memory of its own."""
    pages, band = view.pages, view.band
    assert pages is not None and band is not None, "the recipes' cache has pages and a band"
    fresh = replace(
        pages,
        keys={name: part.clone() for name, part in pages.keys.items()},
        values={name: part.clone() for name, part in pages.values.items()},
        sink=None if pages.sink is None else (pages.sink[0].clone(), pages.sink[1].clone()),
    )
    return replace(view, pages=fresh, band=(band[0].clone(), band[1].clone()))


def stored_bytes(view: KVView) -> int:
    """Bytes of the tokens that are read: pages in use, band and sink."""
    pages, band = view.pages, view.band
    assert pages is not None and band is not None, "the recipes' cache has pages and a band"
    vectors = [*pages.keys.values(), *pages.values.values()]
    per_token = sum(part[0, 0, 0].numel() * part.element_size() for part in vectors)
    n_rows, kv_heads = view.shapes[0][:2]
    dense = sum(part.numel() * part.element_size() for part in (*band, *(pages.sink or ())))
    return n_rows * kv_heads * view.stored * per_token + dense


# ---- sides ----------------------------------------------------------------------------------


def sdpa_calls(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    """Both ways to ask torch for the attention of query [B, H, 1, D] over [B, Hkv, T, D]."""
    attend = functional.scaled_dot_product_attention
    grouped = query.view(query.shape[0], keys.shape[1], -1, query.shape[-1])
    return {
        _SDPA[0]: partial(attend, query, keys, values, enable_gqa=True),
        _SDPA[1]: partial(attend, grouped, keys, values),
    }


def sdpa_sides(call: Call, query: torch.Tensor, l2_bytes: int | None) -> list[Side | Row]:
    """torch on a dense cache."""
    copies, device = copies_of(call.dense_bytes, l2_bytes), query.device.type
    caches = [
        tuple(random_vectors(call.batch, call.tokens, device) for _ in range(2))
        for _ in range(copies)
    ]
    made = [sdpa_calls(query, keys, values) for keys, values in caches]
    found: list[Side | Row] = []
    for name in _SDPA:
        try:
            replay = Replay([calls[name] for calls in made])
        except RuntimeError as error:
            if spoils_cuda(told(error)):
                raise
            found.append({"side": name, "why": told(error)})
            continue
        found.append(Side(name, replay, call.dense_bytes, {}))
    return found


def verified(
    launch: Callable[..., torch.Tensor], view: KVView, query: torch.Tensor, scoring: Scoring
) -> float:
    """Relative error of the worst head; FewbitError beyond the tolerance."""
    wanted = kv_softmax.attend(view, query.float(), scoring)
    error, most = row_error(launch(view, query, scoring), wanted), TOLERANCE[query.dtype]
    if not error <= most:
        raise FewbitError(f"wrong: relative error must be <= {most:g}, got {error:.2e}")
    return error


def our_sides(call: Call, query: torch.Tensor, machine: Device) -> list[Side | Row]:
    """Every eligible kernel on the packed cache."""
    view = packed_view(call, query.device.type)
    scoring = Scoring(HEAD_DIM**-0.5, None, True, None, None)
    n_bytes = stored_bytes(view)
    views = [view, *(copied(view) for _ in range(copies_of(n_bytes, machine.l2_bytes) - 1))]
    assert view.pages is not None, "the recipes' cache has pages"
    here = problem_of(view, view.pages, query, scoring)
    problem = replace(here, device=machine.backend, machine=machine)
    return [
        _our_side(candidate, problem, views, (query, scoring), n_bytes)
        for candidate in candidates(problem)
    ]


def _our_side(
    candidate: Candidate,
    problem: AttentionProblem,
    views: Sequence[KVView],
    asked: tuple[torch.Tensor, Scoring],
    n_bytes: int,
) -> Side | Row:
    name = f"{problem.key} {candidate.kernel}"
    facts: Row = {"kernel": candidate.kernel, "config": dict(candidate.config)}
    launch: Callable[..., torch.Tensor] = bound_launch(
        kernels()[candidate.kernel], candidate.config
    )
    try:
        facts["relative_error"] = verified(launch, views[0], *asked)
        replay = Replay([partial(launch, view, *asked) for view in views])
    except kernel_errors() as error:
        if spoils_cuda(told(error)):
            raise
        full = isinstance(error, torch.OutOfMemoryError)
        return {"side": name, "why": told(error), "failed": not full, **facts}
    return Side(name, replay, n_bytes, facts)


# ---- rows -----------------------------------------------------------------------------------


@torch.no_grad()
def rows(peaks: MeasuredPeaks, seconds: float) -> Iterator[Row]:
    """Timings, case by case, as far as `seconds` go; then what was not reached."""
    deadline, machine = time.monotonic() + seconds, this_device("cuda")
    left_out = []
    for batch, tokens in CASES:
        for group in GROUPS:
            call = Call(batch, tokens, group)
            if time.monotonic() > deadline:
                left_out.append(f"{call.where['case']} G={group}")
                continue
            try:
                yield from call_rows(call, peaks, machine, "cuda")
            except torch.OutOfMemoryError as error:
                yield {**call.where, "side": "all", "why": told(error)}
            torch.cuda.empty_cache()
    if left_out:
        yield {"skipped": left_out, "why": "time"}


def call_rows(call: Call, peaks: MeasuredPeaks, machine: Device, device: str) -> list[Row]:
    """Rows of all sides of one call, on tensors of `device`."""
    shape = (call.batch, KV_HEADS * call.group, 1, HEAD_DIM)
    query = torch.randn(shape, device=device, dtype=_DTYPE)
    found = [*sdpa_sides(call, query, machine.l2_bytes), *our_sides(call, query, machine)]
    sides = [side for side in found if isinstance(side, Side)]
    spreads = measure({side.name: side.replay for side in sides})
    out: list[Row] = [call.where | row for row in found if not isinstance(row, Side)]
    baseline = fastest(spreads, _SDPA)
    for side in sides:
        out.append(call.where | figures(call, side, spreads[side.name], peaks, baseline))
    return out


def fastest(spreads: dict[str, Spread], names: Sequence[str]) -> float | None:
    """Median seconds of the fastest of these sides; None if none of them ran."""
    return min((spreads[name].median for name in names if name in spreads), default=None)


def figures(
    call: Call, side: Side, spread: Spread, peaks: MeasuredPeaks, baseline: float | None
) -> Row:
    """Times, bytes, GB/s, the share of the roofline, and bf16's time over this one."""
    found: Row = {"side": side.name, **spread.as_dict(), **side.facts, "bytes": side.n_bytes}
    found["gb_per_second"] = side.n_bytes / spread.median / 1e9
    roofline = peaks.roofline(side.n_bytes, call.ops(), "bf16")
    if roofline is not None:
        found |= {"roofline_us": 1e6 * roofline, "share": roofline / spread.median}
    return found if baseline is None else found | {"bf16_over_this": baseline / spread.median}


def main() -> int:
    """Print the tables, write the JSON; 2 where there is no GPU, 1 if a kernel of ours failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--minutes", type=float, default=10.0)
    args = parser.parse_args()
    lacking = missing()
    if lacking:
        print(needs_text("bench.attention", lacking), file=sys.stderr)
        return 2
    peak_rows = list(measured.rows())
    found = list(rows(measured.peaks_of(peak_rows), 60 * args.minutes))
    print(attention_text(found))
    if args.output:
        args.output.write_text(json.dumps([*peak_rows, *found], indent=1) + "\n")
    return 1 if any(row.get("failed") for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
