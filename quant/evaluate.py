"""`fewbit eval`: what a model predicts on a text, and how far it is from another model.

The text is tokenised whole, without special tokens, and cut into windows of `length` tokens that do
not overlap; the incomplete last one is dropped. Families that need a start token (Gemma) get it in
front of every window. From the losses of single predictions (`score.py`):

    perplexity      exp(mean loss)
    KL              mean and 99th percentile over predictions
    top-1 agreement share of predictions
    log_ratio_se    standard error of log(perplexity / reference perplexity): the losses of the two
                    models are paired window by window, which cancels how hard a window is

The reference runs in float32, the model in the dtype it was loaded with. Predictions are made from
whole windows at once, without a cache. With `decode` the model reads each window in short steps
through the cache that it generates with, packed if it has a KV policy; the figures are those of
single tokens up to rounding. The reference still reads whole windows, so that the distance is that
of everything the model does when it is used.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..calibrate.data import load_tokens, require_tokens, window_start
from ..export.checkpoint import Checkpoint
from ..export.source_files import locate
from .errors import CalibrationError, CheckpointError
from .generate import context_length, generation_settings, is_ours, load_any
from .inspect import inspect
from .layout import plan_tensors
from .load import load_tokenizer
from .recipe import load_recipe
from .score import Measured, Progress, evaluate_model

_DEFAULT_LENGTH = 2048
# Tokens. A tenth of the time of single tokens, and the same policy applied to the same distances; the
# order of sums differs, which moves the loss of a window by up to 6e-4 nats in fp32 and 2e-3 in
# bf16, in both directions: where a rounding tips a 4-bit code, and far less on average.
_DECODE_STEP = 16


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

    def text(self) -> str:
        """The figures, one a line."""
        rows = [("perplexity", f"{self.perplexity:.4f}"), ("tokens", f"{self.tokens:,}")]
        if self.reference_perplexity is not None:
            error = "" if self.log_ratio_se is None else f" ± {self.log_ratio_se:.5f}"
            rows += [
                ("reference perplexity", f"{self.reference_perplexity:.4f}"),
                ("perplexity ratio", f"{self.perplexity_ratio:.5f}{error}"),
                ("KL mean", f"{self.kl_mean:.6f}"),
                ("KL 99th percentile", f"{self.kl_p99:.6f}"),
                ("top-1 agreement", f"{self.top1_agreement:.4f}"),
            ]
        rows += [
            ("bits per weight", f"{self.bits_per_weight:.3f}"),
            ("bytes", f"{self.bytes:,}"),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        return "\n".join(f"{name:22s}{value}" for name, value in rows)


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
    windows). dtype: of `path`'s arithmetic, default its own. decode: through the model's cache, 16
    tokens at a time. progress(windows done, windows).
    """
    folder, _ = locate(str(path), None)
    bits, n_bytes = stored_size(folder)
    model, tokenizer = load_any(folder, device, dtype), load_tokenizer(folder)
    windows = evaluation_windows(model, tokenizer, text, length, max_tokens)
    reference = None if against is None else load_any(against, device, torch.float32)
    started = time.perf_counter()
    step = _DECODE_STEP if decode else None
    measured = evaluate_model(model, windows, reference, step=step, progress=progress)
    seconds = time.perf_counter() - started
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
    """Tokens per second of greedy decoding after a short prompt; the prompt itself is not timed.

    The best of three runs: other programs on the machine can only make one slower.
    """
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
    prompt = min(run(1) for _ in range(3))
    whole = min(run(1 + n_new) for _ in range(3))
    return n_new / max(whole - prompt, 1e-9)


def stored_size(folder: Path) -> tuple[float, int]:
    """(bits per weight, bytes of the weight files) of the checkpoint in `folder`.

    In a checkpoint that fewbit did not write, the weights that count are those that it would
    quantize, at what they take in the file.
    """
    if is_ours(folder):
        info = inspect(folder)
        return info.bits_per_weight, info.bytes
    source = Checkpoint.open(folder)
    plan = plan_tensors(load_recipe("w4a16"), source.config, source.tensors)
    linears = [source.tensors[key] for key, tensor in plan.items() if tensor.rule is not None]
    n_weights = sum(math.prod(info.shape) for info in linears)
    if not n_weights:
        raise CheckpointError(f"{folder} holds no weight of a matrix product; is it a model?")
    bits = 8 * sum(info.n_bytes for info in linears) / n_weights
    return bits, sum(shard.file_bytes for shard in source.shards)
