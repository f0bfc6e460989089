"""Scores token rows: losses of one model, or of two together with their distance.

A row of R tokens yields R − 1 predictions. With p the model's distribution, r the reference's and y
the next token, in float32 from the logits on:

    loss    −log p(y)
    KL      Σ_v r(v) · (log r(v) − log p(v))
    agree   both have the same most likely token

With `step`, the scored model reads a row a few tokens at a time through its cache, so that a packed
KV cache is in the loop: whole rows never read back what they stored. The reference reads whole rows.

Logits become log-probabilities a few rows at a time, so what is needed beyond the logits themselves
does not grow with rows × vocabulary. Both models run side by side on the same rows; nothing is
spilled to disk, and no figure is averaged here over more than a window.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .errors import CheckpointError

_CHUNK = 1 << 22  # log-probabilities made at once: 16 MB in float32
_BATCH_LOGITS = 1 << 23  # logits of one forward, except that it holds at least one window

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Measured:
    """What one pass over the windows yields.

    window_losses, reference_window_losses: nats per prediction, float64 [windows].
    kl: nats, float32 [predictions]. top1_agreement: 0 to 1. None without a reference.
    """

    window_losses: torch.Tensor
    n_predictions: int
    reference_window_losses: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    top1_agreement: float | None = None


def evaluate_model(
    model: Any,
    windows: torch.Tensor,
    reference_model: Any | None = None,
    *,
    batch: int | None = None,
    step: int | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Run `model` (and `reference_model`) over token rows int64 [windows, R].

    batch: rows in a forward; None chooses by memory. step: tokens that `model` reads at a time
    through its cache; None is whole rows without one. CheckpointError: ids beyond the vocabulary,
    vocabularies that differ, NaN or Inf logits, no cache where `step` needs one.
    """
    _check_vocabulary(model, windows, reference_model)
    n_windows, row = windows.shape
    size = batch or max(1, min(16, _BATCH_LOGITS // (row * _vocabulary(model))))
    losses: list[torch.Tensor] = []
    reference_losses: list[torch.Tensor] = []
    kls: list[torch.Tensor] = []
    n_agree = 0
    for start in range(0, n_windows, size):
        rows = windows[start : start + size]
        logits = _logits(model, rows) if step is None else _stepwise_logits(model, rows, step)
        others = None if reference_model is None else _logits(reference_model, rows)
        for index, window in enumerate(rows):
            scored = _Score.of(logits[index], None if others is None else others[index], window)
            _require_finite(scored.loss, start + index)
            losses.append(scored.loss.mean())
            if scored.reference_loss is not None:
                reference_losses.append(scored.reference_loss.mean())
                kls.append(scored.kl)
                n_agree += scored.n_agree
        if progress is not None:
            progress(min(start + size, n_windows), n_windows)
    n_predictions = n_windows * (row - 1)
    if reference_model is None:
        return Measured(torch.stack(losses), n_predictions)
    return Measured(
        torch.stack(losses),
        n_predictions,
        torch.stack(reference_losses),
        torch.cat(kls),
        n_agree / n_predictions,
    )


@dataclass(frozen=True)
class _Score:
    """One window. loss, reference_loss: float64 [R − 1] on the CPU. kl: float32 [R − 1]."""

    loss: torch.Tensor
    reference_loss: torch.Tensor | None
    kl: torch.Tensor
    n_agree: int

    @staticmethod
    def of(logits: torch.Tensor, others: torch.Tensor | None, window: torch.Tensor) -> "_Score":
        """Score logits [R, V] of a window [R], a few rows at a time."""
        targets = window[1:].to(logits.device).unsqueeze(1)
        parts: list[tuple[torch.Tensor, ...]] = []
        n_agree = 0
        for rows in _row_chunks(targets.shape[0], logits.shape[-1]):
            p = torch.log_softmax(logits[rows].float(), dim=-1)
            loss = -p.gather(1, targets[rows]).squeeze(1)
            if others is None:
                parts.append((loss,))
                continue
            r = torch.log_softmax(others[rows].float(), dim=-1)
            other_loss = -r.gather(1, targets[rows]).squeeze(1)
            n_agree += int((p.argmax(dim=-1) == r.argmax(dim=-1)).sum())
            # xlogy-like care is not needed: log r is finite, and r = 0 makes the term exactly 0.
            parts.append((loss, other_loss, (r.exp() * (r - p)).sum(dim=-1)))
        joined = [torch.cat(column).cpu() for column in zip(*parts, strict=True)]
        if others is None:
            return _Score(joined[0].double(), None, torch.empty(0), 0)
        return _Score(joined[0].double(), joined[1].double(), joined[2], n_agree)


def _row_chunks(n_rows: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, _CHUNK // vocabulary)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def _logits(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Logits [batch, R, V] of token rows [batch, R]."""
    with torch.no_grad():
        output = model(input_ids=rows.to(model.device), use_cache=False)
    return output.logits


def _stepwise_logits(model: Any, rows: torch.Tensor, step: int) -> torch.Tensor:
    """Logits [batch, R, V] of token rows [batch, R], `step` tokens at a time through the cache."""
    from .kv_install import new_cache

    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise CheckpointError(
            f"{type(model).__name__} reads no key-value cache, so it cannot be scored step by step; "
            f"leave out --decode"
        )
    cache = new_cache(model, max_tokens=rows.shape[1])
    parts = []
    with torch.no_grad():
        for ids in rows.to(model.device).split(step, dim=1):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            parts.append(output.logits)
    return torch.cat(parts, dim=1)


def _require_finite(loss: torch.Tensor, window: int) -> None:
    if not bool(torch.isfinite(loss).all()):
        raise CheckpointError(
            f"the model's logits hold NaN or Inf in window {window} of the text; its weights are "
            f"damaged, or its dtype overflows (then load it with dtype float32)"
        )


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _check_vocabulary(model: Any, windows: torch.Tensor, reference: Any | None) -> None:
    size, top = _vocabulary(model), int(windows.max())
    if top >= size:
        raise CheckpointError(
            f"the tokenizer yields id {top}, but the model's vocabulary has {size} entries; "
            f"the tokenizer belongs to another model"
        )
    if reference is not None and _vocabulary(reference) != size:
        raise CheckpointError(
            f"the models' vocabularies differ ({size} and {_vocabulary(reference)} entries); "
            f"--against needs the model that this one was made from"
        )
