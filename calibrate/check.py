"""Proof that a transform kept a block's function: the block is run before and after, in float32.

    max |f'(h Q) − f(h) Q| ≤ tolerance · max |f(h)|        Q: the change of residual basis, or 1

Where one channel of the residual is ten thousand times as large as the others, float32 itself is less
exact than that; there the change is compared with what rounding alone makes.

A transform that fails is refused by name, with the difference that it made. Sources in float64 are
checked in float64.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..quant.errors import CalibrationError
from ..quant.hadamard import Hadamard
from .edits import Source
from .model import BlockInput, LayerCall, ModelGraph
from .observe import first_rows

TOLERANCE = 1e-4  # one block's output in float32; whole models are held to 1e-5 by the tests
_TIMES_NOISE = 8.0
_ROWS = 1


def block_output(
    graph: ModelGraph,
    index: int,
    item: BlockInput,
    original: Source | None = None,
    basis: Hadamard | None = None,
) -> torch.Tensor:
    """What block `index` adds to the hidden state of a small part of `item`; fp32 [b, T, H].

    original: the untransformed source, to run that model's block instead; basis: of the residual in
    `item`, which the original model does not have.
    """
    module = graph.wide_block(index, original)
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    part = _widened(first_rows(item, _ROWS), dtype)
    if original is not None and basis is not None:
        part.hidden = basis.apply_transposed(part.hidden)
    return graph.run(index, part, module) - part.hidden


def require_same(
    before: torch.Tensor,
    after: torch.Tensor,
    name: str,
    block: str,
    basis: Hadamard | None = None,
    floor: Callable[[], float] = lambda: 0.0,
) -> None:
    """CalibrationError unless `after` is `before` in the new basis.

    floor: relative change that rounding alone makes there; asked for only if the tolerance is missed.
    """
    wanted = before if basis is None else basis.apply(before)
    error = _relative(after, wanted)
    if error <= TOLERANCE:
        return
    noise = floor()
    if not error <= _TIMES_NOISE * noise:
        raise CalibrationError(
            f"pass {name!r} would change the function of {block}: its output moves by {error:.1e} "
            f"of its largest value, {TOLERANCE:.0e} is allowed (rounding alone moves it by "
            f"{noise:.0e}); this architecture uses these weights in a way that the pass does not "
            f"know; leave the pass out of the recipe, or use --recipe w4a16"
        )


def rounding_noise(graph: ModelGraph, index: int, item: BlockInput) -> float:
    """How much what block `index` adds moves, relative to its largest value, when each number of the
    hidden state moves by what float32 rounds off in a few operations."""
    generator = torch.Generator().manual_seed(0)
    wiggle = torch.rand(item.hidden.shape, generator=generator).to(item.hidden.device) - 0.5
    size = item.hidden.float().abs().amax(-1, keepdim=True)
    moved = replace(item, hidden=item.hidden.float() + wiggle * size * 2.0**-22)
    still = replace(item, hidden=item.hidden.float())
    outputs = [block_output(graph, index, part) for part in (still, moved)]
    return _relative(outputs[1], outputs[0])


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max()) / max(float(wanted.abs().max()), 1e-30)


def _widened(item: BlockInput, dtype: torch.dtype) -> BlockInput:
    """Hidden state and everything else that is floating point, in `dtype`."""

    def widen(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, dict):
            return {key: widen(entry) for key, entry in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(widen(entry) for entry in value)
        return value

    calls = tuple(LayerCall(widen(call.args), widen(call.kwargs)) for call in item.calls)
    return BlockInput(item.hidden.to(dtype, copy=True), calls)
