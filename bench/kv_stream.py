"""KV streams: bytes and quality of every level on the bundled model, and the speed of coding.

    python -m bench.kv_stream -o bench/results/kv_stream.json [--threads 1]

Tables are profiled on 16 × 1024 tokens of the calibration text; what is coded comes from the
evaluation text. Ratios are those of the same numbers in fp16.

Bytes. One chunk of 256 tokens, and 1024 tokens in chunks of 256. Beside the stream:

    private    the same codes, each channel with a table of its own in the stream: 66 bytes a channel
               and the channel's order-0 entropy, an ideal coder
    one_table  one shared table for the keys, one for the values of a layer, no means or correlations;
               their cross entropy, an ideal coder
    bits       of a code at level 2, cross entropies: one table for a layer's keys and one for its
               values; groups of sorted channels; and means; and correlations
    pages      `int4_head` pages of the packed cache, all tokens stored, at level 0: their own bytes,
               and those of the stream

Quality. A prefix of 512 tokens is coded and decoded, the model reads the 256 tokens behind it: the
ratio of perplexities with and without coding, and KL(without || with) per token in nats. Windows of
the evaluation text that do not overlap; the spread is the standard error over windows.

Speed. GB/s of fp16 numbers, both ways, best of several rounds: 4 layers of 8 heads of 128, 1024 tokens,
keys that follow one another with 0.7. Random numbers: their ratio says nothing about models.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

import fewbit.quant
from bench.decode import machine
from bench.int8_linear import SHARED
from fewbit.quant.codecs.rans32 import engine_name
from fewbit.quant.generate import load_any
from fewbit.quant.kv_cache import KVCache
from fewbit.quant.kv_policy import parse_kv
from fewbit.quant.kv_stream import decode_prefix, encode_prefix, fill_cache
from fewbit.quant.kv_stream_codes import LEVELS, Pair, as_decoded, bins_of, quantize
from fewbit.quant.kv_stream_predict import residuals
from fewbit.quant.kv_stream_profile import Tables, group_slices, profile, profile_model
from fewbit.quant.load import load_tokenizer

FOLDER = Path(fewbit.quant.__file__).parent / "data" / "tiny-llama"
ROWS, LENGTH = 16, 1024  # profiled
PREFIX, BEHIND = 512, 256
_PRIVATE_TABLE = 66  # bytes


def token_ids(text: str) -> torch.Tensor:
    """Tokens int64 [n] of a bundled text."""
    tokenizer = load_tokenizer(FOLDER)
    found = tokenizer((FOLDER.parent / f"{text}.txt").read_text(), return_tensors="pt")
    return found.input_ids[0]


def cached(model: Any, ids: torch.Tensor, cache: Any = None) -> Any:
    """The cache after the model has read tokens int64 [n]."""
    found = DynamicCache(config=model.config) if cache is None else cache
    model(ids.unsqueeze(0), past_key_values=found)
    return found


def pairs_of(cache: Any) -> list[Pair]:
    """Keys and values of every layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def fp16_bytes(pairs: list[Pair]) -> int:
    """Of the same numbers."""
    return sum(2 * part.numel() for pair in pairs for part in pair)


def entropy_bytes(codes: np.ndarray, shares: np.ndarray) -> float:
    """Cross entropy of codes [n] under shares [symbols]."""
    return float(-np.log2(shares[codes]).sum()) / 8


def private_bytes(pairs: list[Pair], level: int) -> float:
    """Codes with a table for each channel in the stream."""
    total = 0.0
    for layer, pair in enumerate(pairs):
        for side, vectors in enumerate(pair):
            codes, maxima = quantize(vectors, bins_of(level, side, layer, len(pairs)))
            total += 2 * maxima.numel()
            for channel in codes.flatten(0, 1).numpy().T:
                counts = np.bincount(channel)
                total += _PRIVATE_TABLE + entropy_bytes(channel, counts / counts.sum())
    return total


def ablation_row(
    tables: Tables, profiled: list[list[Pair]], pairs: list[Pair], level: int = 2
) -> dict[str, float]:
    """Bits of a code in steps, cross entropies of an ideal coder."""
    total: dict[str, float] = {}
    n_codes = 0
    for layer, (sides, pair) in enumerate(zip(tables.layers, pairs, strict=True)):
        for side, (table, vectors) in enumerate(zip(sides, pair, strict=True)):
            bins = bins_of(level, side, layer, len(pairs))
            known = [quantize(other[layer][side], bins)[0].numpy() for other in profiled]
            codes = quantize(vectors, bins)[0].numpy()
            n_codes += codes.size
            means = table.predictor.unconditional()
            whole, groups = [slice(None)], group_slices(codes.shape[2])
            for name, predictor, parts in (
                ("one_table", None, whole), ("groups", None, groups), ("means", means, groups),
                ("correlations", table.predictor, groups),
            ):  # fmt: skip
                symbols, seen = (
                    [x if predictor is None else residuals(x, predictor, bins) for x in found]
                    for found in ([codes], known)
                )
                for part in parts:
                    channels = table.order[part]
                    counted = np.concatenate([x[:, :, channels].ravel() for x in seen])
                    counts = np.bincount(counted, minlength=bins - 1) + 1
                    n_bytes = entropy_bytes(
                        symbols[0][:, :, channels].ravel(), counts / counts.sum()
                    )
                    total[name] = total.get(name, 0.0) + 8 * n_bytes
    row = {name: bits / n_codes for name, bits in total.items()}
    print("  bits of a code: " + "  ".join(f"{name} {bits:.3f}" for name, bits in row.items()))
    return row


def one_table_bytes(pairs: list[Pair], profiled: list[list[Pair]], level: int) -> float:
    """Codes with one shared table for keys, and one for values, of a layer."""
    total = 0.0
    for layer, pair in enumerate(pairs):
        for side, vectors in enumerate(pair):
            bins = bins_of(level, side, layer, len(pairs))
            known = [quantize(other[layer][side], bins)[0].numpy().ravel() for other in profiled]
            counts = np.bincount(np.concatenate(known), minlength=bins - 1) + 1
            codes, maxima = quantize(vectors, bins)
            total += 2 * maxima.numel()
            total += entropy_bytes(codes.numpy().ravel(), counts / counts.sum())
    return total


def bytes_rows(
    model: Any, tables: Tables, profiled: list[list[Pair]], ids: torch.Tensor
) -> list[dict[str, Any]]:
    """One row for each length and level."""
    rows = []
    for n_tokens in (256, 1024):
        pairs = pairs_of(cached(model, ids[:n_tokens]))
        plain = fp16_bytes(pairs)
        for level in (0, *LEVELS):
            row: dict[str, Any] = {"tokens": n_tokens, "level": level, "fp16_bytes": plain}
            row["bytes"] = len(encode_prefix(pairs, level, tables))
            if level and n_tokens == 256:
                row["private_ratio"] = plain / private_bytes(pairs, level)
                row["one_table_ratio"] = plain / one_table_bytes(pairs, profiled, level)
            row["ratio"] = plain / row["bytes"]
            row["bits"] = 16 / row["ratio"]
            rows.append(row)
            text = "  ".join(f"{k} {v:.3f}" for k, v in row.items() if isinstance(v, float))
            print(f"  {n_tokens:5d} tokens, level {level}: {row['bytes']:8d} bytes  {text}")
    return rows


def pages_row(model: Any, ids: torch.Tensor, n_tokens: int = 1024) -> dict[str, Any]:
    """`int4_head` pages at level 0."""
    use = {"format": "int4_head"}
    policy = parse_kv({"key": use, "value": use}, "bench")
    cache = cached(model, ids[:n_tokens], KVCache(model.config, policy, n_tokens, handles=False))
    row = {
        "tokens": n_tokens,
        "fp16_bytes": 2 * 2 * 2 * 64 * n_tokens * len(cache.layers),
        "page_bytes": cache.n_bytes,
        "bytes": len(encode_prefix(cache, 0)),
    }
    print(f"  pages: {row['page_bytes']} bytes, {row['bytes']} in the stream")
    return row


def quality_rows(
    model: Any, tables: Tables, ids: torch.Tensor, n_windows: int
) -> list[dict[str, Any]]:
    """One row for each level."""
    losses: dict[int, list[float]] = {level: [] for level in (0, *LEVELS)}
    distances: dict[int, list[float]] = {level: [] for level in losses}
    for window in ids[: n_windows * (PREFIX + BEHIND)].view(n_windows, -1):
        prefix = cached(model, window[:PREFIX])
        streams = {level: encode_prefix(prefix, level, tables) for level in losses}
        plain, expected = read_behind(model, prefix, window)
        for level, stream in streams.items():
            cache = DynamicCache(config=model.config)
            fill_cache(cache, stream, tables)
            loss, log = read_behind(model, cache, window)
            losses[level].append(loss - plain)
            distances[level].append(float((expected.exp() * (expected - log)).sum(-1).mean()))
    rows = []
    for level, found in losses.items():
        row = {
            "level": level,
            "windows": n_windows,
            "perplexity_ratio": math.exp(statistics.mean(found)),
            "standard_error": statistics.stdev(found) / math.sqrt(n_windows),
            "kl": statistics.mean(distances[level]),
        }
        rows.append(row)
        print(
            f"  level {level}: perplexity × {row['perplexity_ratio']:.4f} "
            f"± {row['standard_error']:.4f}, KL {row['kl']:.5f}"
        )
    return rows


def read_behind(model: Any, cache: Any, window: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean loss of the tokens behind the prefix, and log-probabilities [n, vocabulary]."""
    behind = window[PREFIX:].unsqueeze(0)
    log = model(behind, past_key_values=cache).logits[0].float().log_softmax(-1)
    return float(-log[:-1].gather(1, behind[0, 1:, None]).mean()), log


def random_prefix(n_tokens: int, layers: int = 4, seed: int = 0) -> list[Pair]:
    """Keys that follow one another, and values that do not."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(layers):
        keys, values = torch.randn(2, 1, 8, n_tokens, 128, generator=generator)
        for token in range(1, n_tokens):
            keys[:, :, token] = 0.7 * keys[:, :, token - 1] + 0.714 * keys[:, :, token]
        found.append((keys.bfloat16(), values.bfloat16()))
    return found


def best_seconds(work: Callable[[], object], rounds: int) -> float:
    """Of several rounds, after one that warms up."""
    work()
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


def speed_rows(rounds: int) -> list[dict[str, Any]]:
    """One row for each level, on numbers that every level reads back as it should."""
    profiled, pairs = random_prefix(512, seed=1), random_prefix(1024)
    tables, plain = profile(lambda: [profiled]), fp16_bytes(pairs)
    rows = []
    for level in (0, *LEVELS):
        data = encode_prefix(pairs, level, tables)
        found, expected = decode_prefix(data, tables), as_decoded(pairs, level)
        for pair, other in zip(found, expected, strict=True):
            if not all(torch.equal(a, b) for a, b in zip(pair, other, strict=True)):
                raise RuntimeError(f"level {level} reads other numbers than the uncoded path")
        encode = best_seconds(lambda level=level: encode_prefix(pairs, level, tables), rounds)
        decode = best_seconds(lambda data=data: decode_prefix(data, tables), rounds)
        row = {"level": level, "ratio": plain / len(data)}
        row |= {"encode_gb_s": plain / encode / 1e9, "decode_gb_s": plain / decode / 1e9}
        rows.append(row)
        print(f"  level {level}: encode {row['encode_gb_s']:.3f}, decode {row['decode_gb_s']:.3f}")
    return rows


def main() -> None:
    """Print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    result: dict[str, Any] = {"machine": machine(), "note": SHARED, "engine": engine_name()}
    with torch.inference_mode():
        model, ids = load_any(FOLDER, "cpu"), token_ids("eval")
        rows = token_ids("calib")[: ROWS * LENGTH].view(ROWS, LENGTH)
        tables = profile_model(model, rows)
        result["table_bytes"] = len(tables.to_bytes())
        profiled = [pairs_of(cached(model, row)) for row in rows]
        print("bytes")
        result["bytes"] = bytes_rows(model, tables, profiled, ids)
        pairs = pairs_of(cached(model, ids[:1024]))
        result["bits"] = ablation_row(tables, profiled, pairs)
        result["pages"] = pages_row(model, ids)
        print("quality of what follows")
        result["quality"] = quality_rows(model, tables, ids, args.windows)
        print(f"GB/s of fp16, {engine_name()}")
        result["speed"] = speed_rows(args.rounds)
    result["load_average_after"] = os.getloadavg()[0]
    result["seconds"] = time.perf_counter() - started
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
