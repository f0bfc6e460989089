"""Prefixes of the bundled model for tests of KV streams: profiled on one text, coded on another."""

from functools import cache
from typing import Any

import torch
from transformers import DynamicCache

from fewbit.quant.generate import load_any
from fewbit.quant.kv_stream_codes import Pair
from fewbit.quant.kv_stream_profile import Tables, profile_model
from fewbit.quant.load import load_tokenizer
from planted import bundled_model

PROFILED, LENGTH = 8, 1024  # token rows profiled, and their length


@cache
def model() -> Any:
    """The bundled model, as it is stored: bf16."""
    return load_any(bundled_model(), "cpu")


@cache
def text_ids(name: str) -> torch.Tensor:
    """All tokens int64 [n] of a bundled text, "calib" or "eval"."""
    text = (bundled_model().parent / f"{name}.txt").read_text()
    return load_tokenizer(bundled_model())(text, return_tensors="pt").input_ids[0]


@cache
def tables() -> Tables:
    """Profiled on the calibration text."""
    return profile_model(model(), text_ids("calib")[: PROFILED * LENGTH].view(PROFILED, LENGTH))


def prompt(n_tokens: int, start: int = 0) -> torch.Tensor:
    """Tokens int64 [1, n] of the evaluation text."""
    return text_ids("eval")[start : start + n_tokens].unsqueeze(0)


def filled(ids: torch.Tensor, cache: Any = None) -> Any:
    """The cache, a `DynamicCache` unless given, after the model has read the tokens."""
    found = DynamicCache(config=model().config) if cache is None else cache
    with torch.no_grad():
        model()(ids, past_key_values=found)
    return found


@cache
def layers(n_tokens: int = 512, start: int = 0) -> tuple[Pair, ...]:
    """Keys and values bf16 [1, 2, n, 64] of every layer, of the evaluation text."""
    return tuple((x.keys, x.values) for x in filled(prompt(n_tokens, start)).layers)


def random_layers(
    n_layers: int = 2, rows: int = 2, tokens: int = 40, dtype: torch.dtype = torch.bfloat16
) -> list[Pair]:
    """Keys [rows, 3, tokens, 8] and values [rows, 2, tokens, 6] of every layer."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(rows, 3, tokens, 8, generator=generator).to(dtype),
            torch.randn(rows, 2, tokens, 6, generator=generator).to(dtype),
        )
        for _ in range(n_layers)
    ]


def same(found: Any, expected: Any) -> bool:
    """Whether all keys and values agree bit for bit, NaN included."""
    return len(found) == len(expected) and all(
        a.dtype == b.dtype and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for pair, other in zip(found, expected, strict=True)
        for a, b in zip(pair, other, strict=True)
    )  # fmt: skip
