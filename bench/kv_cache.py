"""The packed KV cache on the CPU: its bytes, and the time of a decode step, against the library's.

    python -m bench.kv_cache -o bench/results/kv_cache.json [--threads 1]

Two random bf16 Llamas of two layers with 32 heads on 8 key-value heads, of 128 and of 64 numbers;
hidden 1024, inner 2816, a vocabulary of 256, so that linears and logits do not hide the attention.
Sides, for caches of T tokens:

    stock     `DynamicCache` and "sdpa"
    int4      `int4_head` pages for keys and values, nothing dense
    kv4       the same with the newest 64 and the first 4 tokens dense, as the recipes have it
    lossless  `dense_head` pages: the cost of pages and of attention in runs, without 4 bits

Bytes. Every side is filled with the same T tokens; the ratio is that of `n_bytes` to element size
times number of elements of the stock cache's tensors. Room is reserved for T tokens, as `generate()`
does, or for none ("unreserved": storage that grew by half). Reported bytes are compared with those
of all storages that the cache object leads to.

Time. One token through the whole model, in turns; caches grow by one token at each. `floor` is the
stock step with an empty cache; attention_ms is what a side takes beyond it. Physical limit of that:
the cache read once, at the speed at which memory copies.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from bench.decode import machine
from bench.int8_linear import SHARED, memory_bandwidth
from fewbit.quant.kv_cache import KVCache
from fewbit.quant.kv_install import install
from fewbit.quant.kv_policy import KVPolicy, parse_kv

LAYERS, HEADS, KV_HEADS = 2, 32, 8
_CHUNK = 512  # tokens cached at once while a cache is filled
_SKIPPED = {"starts"}  # host positions of padding, 8 bytes a row: not cached data, not in n_bytes


def policy(page_format: str, residual: int = 0, sink: int = 0) -> KVPolicy:
    """Keys and values alike."""
    use = {"format": page_format}
    return parse_kv({"key": use, "value": use, "residual": residual, "sink": sink}, "bench")


POLICIES = {
    "int4": policy("int4_head"),
    "kv4": policy("int4_head", 64, 4),
    "lossless": policy("dense_head"),
}


def llama(head_dim: int, n_tokens: int) -> LlamaForCausalLM:
    """A random bf16 model."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=LAYERS, vocab_size=256,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=head_dim,
        max_position_embeddings=n_tokens, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def fill(cache: Any, n_tokens: int, head_dim: int) -> Any:
    """The cache with n random tokens in every layer, the same for every cache."""
    generator = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        for start in range(0, n_tokens, _CHUNK):
            shape = (2, 1, KV_HEADS, min(_CHUNK, n_tokens - start), head_dim)
            keys, values = torch.randn(shape, generator=generator).bfloat16()
            cache.update(keys, values, layer)
    return cache


def tensors(value: Any, name: str = "") -> Iterator[torch.Tensor]:
    """Every tensor that an object of our cache leads to."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict) or type(value).__module__.startswith("fewbit.quant.kv"):
        fields = value if isinstance(value, dict) else vars(value)
        for key, item in fields.items():
            if key not in _SKIPPED:
                yield from tensors(item)


def allocated(cache: KVCache) -> int:
    """Bytes of all different storages."""
    storages = [tensor.untyped_storage() for tensor in tensors(cache)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def stock_bytes(cache: DynamicCache) -> int:
    """Element size times elements."""
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return sum(part.element_size() * part.numel() for part in parts)


def packed(config: Any, side: str, reserve: int) -> KVCache:
    """An empty cache of one of the policies, for a model whose attention takes handles."""
    return KVCache(config, POLICIES[side], reserve)


def bytes_row(config: Any, n_tokens: int) -> dict[str, Any]:
    """Bytes of every side; RuntimeError if one reports what it has not allocated."""
    head_dim = config.head_dim
    stock = stock_bytes(fill(DynamicCache(config=config), n_tokens, head_dim))
    row: dict[str, Any] = {"head_dim": head_dim, "tokens": n_tokens, "stock_bytes": stock}
    for side in POLICIES:
        for name, reserve in ((side, n_tokens), (f"{side}_unreserved", 0)):
            cache = fill(packed(config, side, reserve), n_tokens, head_dim)
            if cache.n_bytes != allocated(cache):
                raise RuntimeError(
                    f"{name}: the cache reports {cache.n_bytes} bytes and holds {allocated(cache)}"
                )
            row[f"{name}_bytes"] = cache.n_bytes
            row[f"{name}_ratio"] = cache.n_bytes / stock
    row["reported_equals_allocated"] = True  # else we would not be here
    cells = "  ".join(
        f"{side} {row[f'{side}_ratio']:.4f} ({row[f'{side}_unreserved_ratio']:.4f} unreserved)"
        for side in POLICIES
    )
    print(
        f"  D={head_dim} T={n_tokens:<5d} stock {stock / 1e6:.2f} MB   ratios {cells}", flush=True
    )
    return row


def step_seconds(
    sides: dict[str, tuple[LlamaForCausalLM, Any]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of one token through each (model, cache), in turns."""
    token = torch.zeros(1, 1, dtype=torch.int64)
    found: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds + 2):
        for side, (model, cache) in sides.items():
            start = time.perf_counter()
            model(token, past_key_values=cache)
            if turn >= 2:  # the first ones warm up
                found[side].append(time.perf_counter() - start)
    return found


def step_row(models: tuple[Any, Any], n_tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a decode step of every side."""
    stock, ours = models
    config, head_dim = stock.config, stock.config.head_dim
    sides: dict[str, tuple[Any, Any]] = {
        "floor": (stock, DynamicCache(config=config)),
        "stock": (stock, fill(DynamicCache(config=config), n_tokens, head_dim)),
    }
    for side in POLICIES:
        cache = packed(ours.config, side, n_tokens + rounds + 2)
        sides[side] = (ours, fill(cache, n_tokens, head_dim))
    n_bytes = {side: pair[1].n_bytes for side, pair in sides.items() if side in POLICIES}
    n_bytes["stock"] = stock_bytes(sides["stock"][1])
    speed = memory_bandwidth()
    found = step_seconds(sides, rounds)
    best = {side: min(times) * 1e3 for side, times in found.items()}
    median = {side: statistics.median(times) * 1e3 for side, times in found.items()}
    row: dict[str, Any] = {"head_dim": head_dim, "tokens": n_tokens}
    row |= {"memory_gb_per_second": speed, "floor_ms": best["floor"]}
    for side in ("stock", *POLICIES):
        row[side] = {
            "best_ms": best[side],
            "median_ms": median[side],
            "attention_ms": best[side] - best["floor"],
            "attention_median_ms": median[side] - median["floor"],
            "limit_ms": n_bytes[side] / speed["copy"] / 1e6,
            "stock_over_this": best["stock"] / best[side],
            "stock_over_this_medians": median["stock"] / median[side],
        }
    print_step(row)
    return row


def print_step(row: dict[str, Any]) -> None:
    """One line: best and median of the step, and attention against its limit."""
    cells = "  ".join(
        f"{side} {cell['best_ms']:.2f}/{cell['median_ms']:.2f} "
        f"(attention {cell['attention_ms']:.2f}, limit {cell['limit_ms']:.2f})"
        for side, cell in row.items()
        if side in ("stock", *POLICIES)
    )
    print(
        f"  D={row['head_dim']} T={row['tokens']:<5d} floor {row['floor_ms']:.2f}  {cells} ms",
        flush=True,
    )


def both_models(head_dim: int, most_tokens: int) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """The same weights under "sdpa" and under our attention."""
    stock = llama(head_dim, most_tokens)
    ours = copy.deepcopy(stock)
    install(ours, POLICIES["int4"])
    return stock, ours


def tables(head_dims: Sequence[int], lengths: Sequence[int], rounds: int) -> dict[str, Any]:
    """Both tables."""
    models = {d: both_models(d, max(lengths) + rounds + 2) for d in head_dims}
    cases = [(d, n_tokens) for d in head_dims for n_tokens in lengths]
    print("bytes, as a ratio to the bf16 DynamicCache")
    sizes = [bytes_row(models[d][0].config, n_tokens) for d, n_tokens in cases]
    print("one decode step, best/median")
    return {"bytes": sizes, "step": [step_row(models[d], t, rounds) for d, t in cases]}


def main() -> None:
    """Print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    started = time.perf_counter()
    result: dict[str, Any] = {"machine": machine(), "note": SHARED}
    with torch.inference_mode():
        result |= tables(args.head_dims, args.lengths, args.rounds)
    result["load_average_after"] = os.getloadavg()[0]
    result["seconds"] = time.perf_counter() - started
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
