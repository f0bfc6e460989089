"""Nearest rounding: every weight goes to the closest value of its grid. Needs no data.

Works through row chunks that fit the processor's cache: measured, that is what makes the data-free
path faster than a disk. Uses the range factors of an earlier search pass when there are any.
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
    """The weight, each row chunk fitted, rounded and packed on its own."""
    shape = tuple(weight.value.shape)
    rows = weight.value.reshape(-1, shape[-1])
    clip = None if weight.clip is None else weight.clip.reshape(rows.shape[0], -1)
    step = max(1, CHUNK_ELEMENTS // shape[-1])
    chunks = [
        _round_rows(weight, rows[i : i + step], None if clip is None else clip[i : i + step])
        for i in range(0, rows.shape[0], step)
    ]
    parts = {
        name: torch.cat([chunk[name] for chunk in chunks]).unflatten(0, shape[:-1])
        for name in chunks[0]
    }
    return PackedTensor(shape, (Term(weight.format, weight.options, parts),), weight.transposed)


def _round_rows(weight: Weight, rows: torch.Tensor, clip: torch.Tensor | None) -> Parts:
    store = find_format(weight.format)
    missing = store.padded_k(rows.shape[-1], weight.options) - rows.shape[-1]
    padded = torch.nn.functional.pad(rows.float(), (0, missing)) if missing else rows.float()
    scales = store.fit(padded, weight.options, clip)
    codes, _ = store.round(padded, scales, 0, weight.options)
    return store.pack(codes, scales, weight.options)


PASS = Pass(
    name="nearest",
    kind="round",
    Options=NearestOptions,
    needs=lambda options: (),
    refuse=lambda architecture, options: None,
    run=run,
)
