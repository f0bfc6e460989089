"""The packed KV cache on the CPU: its bytes, and the time of a decode step, against the library's.

    python -m bench.kv_cache -o bench/results/kv_cache.json [--threads 1]

Two random bf16 Llamas of two layers with 32 heads on 8 key-value heads, of 128 and of 64 numbers;
hidden 1024, inner 2816, a vocabulary of 256, so that linears and logits do not hide the attention.
Sides, for caches of T tokens:

    stock     `DynamicCache` and "sdpa", which takes query heads one by one (seen in torch 2.13)
    grouped   `DynamicCache`, and torch's attention called with a group's query heads as its queries:
              the faster opponent, which the library does not choose for a single token
    int4      `int4_head` pages for keys and values, nothing dense
    kv4       the same with the newest 64 and the first 4 tokens dense, as the recipes have it
    lossless  `dense_head` pages: the cost of pages and of attention in runs, without 4 bits

Bytes. Every side is filled with the same T tokens; the ratio is that of `n_bytes` to element size
times number of elements of the stock cache's tensors. Room is reserved for T tokens, as `generate()`
does, or for none ("unreserved": storage that grew as it filled). Reported bytes are compared with those
of all storages that the cache object leads to.

Time. One token through the whole model, in turns; caches grow by one token at each. `floor` is the
stock step with an empty cache; attention_ms is what a side takes beyond it. Its physical limit: the
cache read once, at the speed at which memory copies.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM

from bench.decode import machine
from bench.int8_linear import SHARED, memory_bandwidth
from fewbit.quant.kv_cache import KVCache
from fewbit.quant.kv_install import install
from fewbit.quant.kv_policy import KVPolicy, parse_kv

LAYERS, HEADS, KV_HEADS = 2, 32, 8
HEAD_DIMS = (128, 64)
_CHUNK = 512  # tokens cached at once while a cache is filled


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


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor that an object of our cache leads to."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict) or type(value).__module__.startswith("fewbit.quant.kv"):
        fields = value if isinstance(value, dict) else vars(value)
        for item in fields.values():
            yield from tensors(item)


def allocated(cache: KVCache) -> int:
    """Bytes of all different storages."""
    storages = [tensor.untyped_storage() for tensor in tensors(cache)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def stock_bytes(cache: DynamicCache) -> int:
    """Element size times elements."""
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return sum(part.element_size() * part.numel() for part in parts)


def grouped_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """The library's attention interface for one token [1, H, 1, D] that sees all keys."""
    queries = query.view(1, KV_HEADS, -1, query.shape[-1])
    y = functional.scaled_dot_product_attention(queries, key, value, scale=module.scaling)
    return y.reshape(1, 1, query.shape[1], -1), None


def bytes_row(config: Any, n_tokens: int) -> dict[str, Any]:
    """Bytes of every side; RuntimeError if one reports what it has not allocated."""
    head_dim = config.head_dim
    stock = stock_bytes(fill(DynamicCache(config=config), n_tokens, head_dim))
    row: dict[str, Any] = {"head_dim": head_dim, "tokens": n_tokens, "stock_bytes": stock}
    for side in POLICIES:
        for name, reserve in ((side, n_tokens), (f"{side}_unreserved", 0)):
            cache = fill(KVCache(config, POLICIES[side], reserve), n_tokens, head_dim)
            if cache.n_bytes != (held := allocated(cache)):
                raise RuntimeError(f"{name}: reports {cache.n_bytes} bytes and holds {held}")
            row[f"{name}_bytes"] = cache.n_bytes
            row[f"{name}_ratio"] = cache.n_bytes / stock
    row["reported_equals_allocated"] = True
    cells = "  ".join(f"{name[:-6]} {row[name]:.4f}" for name in row if name.endswith("_ratio"))
    print(f"  D={head_dim} T={n_tokens:<5d} stock {stock / 1e6:.1f} MB, ratios {cells}", flush=True)
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


def step_row(models: dict[str, Any], n_tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a decode step of every side."""
    config, head_dim = models["stock"].config, models["stock"].config.head_dim
    caches: dict[str, Any] = {side: DynamicCache(config=config) for side in ("stock", "grouped")}
    for side, kept in POLICIES.items():
        caches[side] = KVCache(config, kept, n_tokens + rounds + 2)
    sides = {"floor": (models["stock"], DynamicCache(config=config))}
    n_bytes = {}
    for side, cache in caches.items():
        sides[side] = (models.get(side, models["ours"]), fill(cache, n_tokens, head_dim))
        n_bytes[side] = cache.n_bytes if side in POLICIES else stock_bytes(cache)
    speed = memory_bandwidth()
    found = step_seconds(sides, rounds)
    best = {side: min(times) * 1e3 for side, times in found.items()}
    median = {side: statistics.median(times) * 1e3 for side, times in found.items()}
    row: dict[str, Any] = {"head_dim": head_dim, "tokens": n_tokens, "floor_ms": best["floor"]}
    row["memory_gb_per_second"] = speed
    for side in caches:
        row[side] = {
            "best_ms": best[side],
            "median_ms": median[side],
            "attention_ms": best[side] - best["floor"],
            "limit_ms": n_bytes[side] / speed["copy"] / 1e6,
            "stock_over_this": best["stock"] / best[side],
            "grouped_over_this": best["grouped"] / best[side],
        }
    cells = "  ".join(
        f"{side} {best[side]:.2f}/{median[side]:.2f} "
        f"(attention {row[side]['attention_ms']:.2f}, limit {row[side]['limit_ms']:.2f})"
        for side in caches
    )
    print(f"  D={head_dim} T={n_tokens:<5d} floor {best['floor']:.2f}  {cells} ms", flush=True)
    return row


def three_models(head_dim: int, most_tokens: int) -> dict[str, LlamaForCausalLM]:
    """The same weights under "sdpa", under grouped attention and under ours."""
    models = {"stock": llama(head_dim, most_tokens)}
    models |= {name: copy.deepcopy(models["stock"]) for name in ("grouped", "ours")}
    AttentionInterface.register("bench_grouped", grouped_attention)
    models["grouped"].set_attn_implementation("bench_grouped")
    install(models["ours"], POLICIES["int4"])
    return models


def main() -> None:
    """Print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    started = time.perf_counter()
    result: dict[str, Any] = {"machine": machine(), "note": SHARED}
    with torch.inference_mode():
        models = {d: three_models(d, max(args.lengths) + args.rounds + 2) for d in HEAD_DIMS}
        cases = [(d, n_tokens) for d in HEAD_DIMS for n_tokens in args.lengths]
        print("bytes, as a ratio to the bf16 DynamicCache")
        result["bytes"] = [bytes_row(models[d]["stock"].config, t) for d, t in cases]
        print("one decode step, best/median")
        result["step"] = [step_row(models[d], t, args.rounds) for d, t in cases]
    result["load_average_after"] = os.getloadavg()[0]
    result["seconds"] = time.perf_counter() - started
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
