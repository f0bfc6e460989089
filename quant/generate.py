"""`fewbit generate`: open a checkpoint, ours or an ordinary one, and continue a prompt.

A temperature of 0 takes the most likely token every time; above 0, token i is drawn with
probability softmax(logits / temperature)ᵢ from the whole vocabulary, by a seeded generator that
leaves the global random state as it was. Stop tokens and the cache policy are the checkpoint's own.

No chat template is applied: the prompt goes in as written, after the tokenizer's own start token.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..export.source_files import locate
from .device import resolve_device
from .errors import CheckpointError, RecipeError
from .load import load, load_tokenizer
from .stored import METHOD, read_config


def load_any(path: str | Path, device: str = "auto", dtype: torch.dtype | None = None) -> Any:
    """The transformers model in `path` (folder or hub id), ours or not, in evaluation mode.

    device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:i". dtype: of the arithmetic; None
    is the checkpoint's own. CheckpointError: not there, not a model, or weights are pickles.
    """
    target = resolve_device(device)
    folder, _ = locate(str(path), None)
    if is_ours(folder):
        with _quiet_loading():
            return load(folder, device=device, dtype=dtype)
    from transformers import AutoModelForCausalLM

    try:
        with _quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype or "auto", use_safetensors=True, local_files_only=True
            )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be opened as a language model: {str(error).strip().splitlines()[0]}"
        ) from error
    return model.to(target).eval()


def is_ours(folder: Path) -> bool:
    """Whether `config.json` in the folder says that fewbit wrote the checkpoint."""
    return bool(
        (read_config(folder).get("quantization_config") or {}).get("quant_method") == METHOD
    )


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without transformers' own progress bar, which would mix with the command's output."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def context_length(model: Any) -> int | None:
    """Longest sequence of the model in tokens; None if its configuration has no bound."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def generate(
    path: str | Path,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """The continuation of `prompt`, without the prompt, by the model in `path`.

    RecipeError: an empty prompt, a bad setting, or more tokens than the context holds.
    """
    folder, _ = locate(str(path), None)
    model, tokenizer = load_any(folder, device), load_tokenizer(folder)
    return continue_text(model, tokenizer, prompt, max_new_tokens, temperature, seed)


def continue_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """As `generate`, with a model and a tokenizer that are already open."""
    ids = _prompt_ids(model, tokenizer, prompt, max_new_tokens)
    if not 0 <= temperature < float("inf"):
        raise RecipeError(f"temperature must be 0 (greedy) or above, got {temperature}")
    config = generation_settings(model, max_new_tokens, temperature)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        mask = torch.ones_like(ids)
        tokens = model.generate(ids, attention_mask=mask, generation_config=config)
    return str(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))


def generation_settings(model: Any, max_new_tokens: int, temperature: float) -> Any:
    """The checkpoint's own generation settings with the sampling replaced."""
    config = copy.deepcopy(model.generation_config)
    config.max_length = None
    config.max_new_tokens = max_new_tokens
    config.do_sample = temperature > 0
    config.temperature = temperature if temperature > 0 else None
    config.top_k = 0 if temperature > 0 else None  # 0: the whole vocabulary
    config.top_p = config.min_p = config.typical_p = None
    if config.pad_token_id is None:  # one sequence is never padded, but generate() insists
        stops = config.eos_token_id
        config.pad_token_id = stops[0] if isinstance(stops, list) else stops
    return config


def _prompt_ids(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> torch.Tensor:
    """Token ids int64 [1, prompt tokens] on the model's device."""
    if max_new_tokens < 1:
        raise RecipeError(f"max-new-tokens must be at least 1, got {max_new_tokens}")
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise RecipeError("the prompt is empty and the tokenizer adds no start token; give a text")
    context = context_length(model)
    if context is not None and len(ids) + max_new_tokens > context:
        raise RecipeError(
            f"prompt ({len(ids)} tokens) and max-new-tokens ({max_new_tokens}) exceed the model's "
            f"context of {context}; shorten one"
        )
    return torch.tensor([ids], dtype=torch.int64, device=model.device)
