"""`fewbit eval`: what a model predicts on a text, and how far it is from another model.

The text is tokenised whole, without special tokens, and cut into windows of `length` tokens that do
not overlap; the incomplete last one is dropped. Families that need a start token (Gemma) get it in
front of every window. A row of R tokens yields R − 1 predictions. With p the model's distribution,
r the reference's and y the next token, in float32 from the logits on:

    perplexity      exp(mean over predictions of −log p(y))
    KL              Σ_v r(v) · (log r(v) − log p(v)), mean and 99th percentile over predictions
    top-1 agreement share of predictions where both have the same most likely token
    log_ratio_se    standard error of log(perplexity / reference perplexity): the losses of the two
                    models are paired window by window, which cancels how hard a window is

Logits are turned into log-probabilities a few rows at a time, so the extra memory does not grow with
window × vocabulary. The reference runs in float32, the model in the dtype it was loaded with.

Predictions are made from whole windows at once. Decoding token by token, where a quantized KV cache
is read back, is a different measurement and is not made here.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..calibrate.data import load_tokens, require_tokens, window_start
from .errors import CalibrationError, CheckpointError, FewbitError
from .generate import context_length, generation_settings, load_any, open_tokenizer

_DEFAULT_LENGTH = 2048
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


@dataclass(frozen=True)
class Evaluation:
    """The figures of `fewbit eval`; those that need a reference are None without one.

    tokens: predictions scored. seconds: of both models' forwards, without loading.
    bits_per_weight: of the quantized (or quantizable) weights. bytes: of the stored weights.
    """

    perplexity: float
    tokens: int
    seconds: float
    bits_per_weight: float
    bytes: int
    window_losses: tuple[float, ...]
    reference_perplexity: float | None = None
    perplexity_ratio: float | None = None
    log_ratio_se: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    reference_window_losses: tuple[float, ...] | None = None

    def to_json(self) -> dict[str, float | int]:
        """The figures alone: neither losses of single windows nor what was not measured."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {
            key: value
            for key, value in values.items()
            if value is not None and not key.endswith("window_losses")
        }


def evaluate(
    path: str | Path,
    against: str | Path | None = None,
    text: str | Path | None = None,
    length: int | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    decode: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Score the model in `path`, with `against` also its distance from that model.

    text: a .txt or .jsonl file; None is the bundled evaluation text. length: tokens in a window,
    default min(2048, context). max_tokens: only the first that many tokens of the text (whole
    windows). dtype: of `path`'s arithmetic, default its own. progress(windows done, windows).
    """
    if decode:
        raise FewbitError(
            "eval --decode is not available in this version; without it, whole windows are scored"
        )
    model, tokenizer = load_any(path, device, dtype), open_tokenizer(path)
    windows = evaluation_windows(model, tokenizer, text, length, max_tokens)
    reference = None if against is None else load_any(against, device, torch.float32)
    started = time.perf_counter()
    measured = evaluate_model(model, windows, reference, progress=progress)
    seconds = time.perf_counter() - started
    bits, n_bytes = _stored_size(path)
    return summarize(measured, seconds, bits, n_bytes)


def evaluation_windows(
    model: Any,
    tokenizer: Any,
    text: str | Path | None = None,
    length: int | None = None,
    max_tokens: int | None = None,
) -> torch.Tensor:
    """Token rows int64 [windows, length], or [windows, 1 + length] where a start token is needed.

    CalibrationError: a bad or too short text, a length below 2 or beyond the model's context.
    """
    context = context_length(model)
    if length is None:
        length = min(_DEFAULT_LENGTH, context or _DEFAULT_LENGTH)
    if length < 2 or (context is not None and length > context):
        raise CalibrationError(
            f"eval length must be 2 to {context or 'any number of'} tokens (the model's context), "
            f"got {length}"
        )
    tokens = load_tokens(text, tokenizer, "eval")
    require_tokens(tokens, length)
    if max_tokens is not None and max_tokens < length:
        raise CalibrationError(
            f"max-tokens {max_tokens} holds no window of {length} tokens; raise it or lower length"
        )
    n_windows = min(tokens.ids.numel(), max_tokens or tokens.ids.numel()) // length
    windows = tokens.ids[: n_windows * length].view(n_windows, length)
    start = window_start(model.config.model_type, tokenizer)
    if start is None:
        return windows
    return torch.cat([torch.full((n_windows, 1), start), windows], dim=1)


def evaluate_model(
    model: Any,
    windows: torch.Tensor,
    reference_model: Any | None = None,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Run `model` (and `reference_model`) over token rows int64 [windows, R].

    batch: rows in a forward; None chooses by memory. CheckpointError: ids beyond the vocabulary,
    vocabularies that differ, NaN or Inf logits.
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
        logits = _logits(model, rows)
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
    return output.logits  # type: ignore[no-any-return]


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


def summarize(
    measured: Measured, seconds: float, bits_per_weight: float, n_bytes: int
) -> Evaluation:
    """The figures of one pass; every window weighs the same, for all have the same length."""
    perplexity = _perplexity(measured.window_losses)
    losses = tuple(measured.window_losses.tolist())
    n_tokens = measured.n_predictions
    reference_losses = measured.reference_window_losses
    if reference_losses is None or measured.kl is None:
        return Evaluation(perplexity, n_tokens, seconds, bits_per_weight, n_bytes, losses)
    reference = tuple(reference_losses.tolist())
    return Evaluation(
        perplexity,
        n_tokens,
        seconds,
        bits_per_weight,
        n_bytes,
        losses,
        reference_perplexity=_perplexity(reference_losses),
        perplexity_ratio=math.exp(float((measured.window_losses - reference_losses).mean())),
        log_ratio_se=paired_standard_error(losses, reference),
        kl_mean=float(measured.kl.double().mean()),
        kl_p99=_percentile(measured.kl, 0.99),
        top1_agreement=measured.top1_agreement,
        reference_window_losses=reference,
    )


def _perplexity(window_losses: torch.Tensor) -> float:
    mean = float(window_losses.mean())
    if mean > 700:  # exp overflows; such logits mean nothing
        raise CheckpointError(f"mean loss {mean:.3g} nats: the model is damaged beyond measuring")
    return math.exp(mean)


def _percentile(values: torch.Tensor, share: float) -> float:
    """Smallest value that at least `share` of all values do not exceed."""
    rank = max(1, math.ceil(share * values.numel()))
    return float(values.kthvalue(rank).values)


def paired_standard_error(
    losses: Sequence[float], reference_losses: Sequence[float]
) -> float | None:
    """Standard error of mean(losses − reference_losses), in nats: that of the log perplexity ratio.

    One loss for each window, in the same order; None for fewer than two windows.
    """
    if len(losses) != len(reference_losses):
        raise ValueError(
            f"losses are paired by window, got {len(losses)} and {len(reference_losses)}"
        )
    if len(losses) < 2:
        return None
    gaps = torch.tensor(losses, dtype=torch.float64) - torch.tensor(
        reference_losses, dtype=torch.float64
    )
    return float(gaps.std(correction=1) / math.sqrt(len(losses)))


def decode_speed(model: Any, tokenizer: Any, n_new: int = 32) -> float:
    """Tokens per second of greedy decoding after a short prompt; the prompt itself is not timed."""
    ids = tokenizer("The quick brown fox", return_tensors="pt")["input_ids"].to(model.device)

    def run(n_tokens: int) -> float:
        config = generation_settings(model, n_tokens, temperature=0.0)
        config.min_new_tokens = n_tokens
        started = time.perf_counter()
        with torch.no_grad():
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
        found.tolist()  # waits for the device
        return time.perf_counter() - started

    run(2)  # first use: kernels lay out their weights
    first = run(1)
    return n_new / max(run(1 + n_new) - first, 1e-9)


def _stored_size(path: str | Path) -> tuple[float, int]:
    """(bits per weight, bytes) of the checkpoint in `path`."""
    from .inspect import inspect

    info = inspect(path)
    return info.bits_per_weight, info.bytes
