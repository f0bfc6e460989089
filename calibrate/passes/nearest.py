"""Nearest rounding: every weight goes to the closest value of its grid. Needs no data.

Works through row chunks that fit the processor's cache: measured, that is what makes the data-free
path faster than a disk. Uses the scales or range factors of an earlier search pass, if there are any.
"""

from dataclasses import dataclass

import torch

from ...quant.block import Block, Weight
from ...quant.format import Parts, find_format
from ...quant.packed import PackedTensor, Term
from ..protocol import Pass, Stats

CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class NearestOptions:
    """No keys."""


def run(block: Block, stats: Stats, options: NearestOptions) -> Block:
    """Round every weight of the block that is not packed yet."""
    for weight in block.weights:
        if weight.packed is None:
            weight.packed = round_nearest(weight)
    return block


def round_nearest(weight: Weight) -> PackedTensor:
    """The weight, each row chunk fitted, rounded and packed on its own.

    Sums Σ (w − ŵ)² and Σ w² on the way, while the chunk is in the cache (`Weight.measured`).
    """
    shape = tuple(weight.value.shape)
    wanted = weight.value if weight.target is None else weight.target
    rows = wanted.reshape(-1, shape[-1])
    clip = None if weight.clip is None else weight.clip.reshape(rows.shape[0], -1)
    scales = None
    if weight.scales is not None:
        scales = {name: part.flatten(0, -2) for name, part in weight.scales.items()}
    step = max(1, CHUNK_ELEMENTS // shape[-1])
    error = norm = 0.0
    chunks = []
    for start in range(0, rows.shape[0], step):
        span = slice(start, start + step)
        known = None if scales is None else {name: part[span] for name, part in scales.items()}
        limits = None if clip is None else clip[span]
        parts, delta, size = _round_rows(weight, rows[span], known, limits)
        chunks.append(parts)
        error, norm = error + delta, norm + size
    if weight.target is None:
        weight.measured.update(squared_error=error, squared_norm=norm)
    joined = {
        name: torch.cat([chunk[name] for chunk in chunks]).unflatten(0, shape[:-1])
        for name in chunks[0]
    }
    return PackedTensor(shape, (Term(weight.format, weight.options, joined),), weight.transposed)


def _round_rows(
    weight: Weight, rows: torch.Tensor, scales: Parts | None, clip: torch.Tensor | None
) -> tuple[Parts, float, float]:
    """Stored parts, Σ (w − ŵ)² and Σ w² of some rows; `scales` replace fitting within `clip`."""
    store = find_format(weight.format)
    missing = store.padded_k(rows.shape[-1], weight.options) - rows.shape[-1]
    padded = torch.nn.functional.pad(rows.float(), (0, missing)) if missing else rows.float()
    if scales is None:
        scales = store.fit(padded, weight.options, clip)
    codes, values = store.round(padded, scales, 0, weight.options)
    delta, flat = values.sub_(padded).flatten(), padded.flatten()
    parts = store.pack(codes, scales, weight.options)
    return parts, float(torch.dot(delta, delta)), float(torch.dot(flat, flat))


PASS = Pass(
    name="nearest",
    kind="round",
    Options=NearestOptions,
    needs=lambda options: (),
    refuse=lambda architecture, options: None,
    run=run,
)
