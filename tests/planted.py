"""The bundled model with outliers planted in its channels, without any change of its function.

    norm gains       × 32 on some channels, ÷ 32 in the columns of q, k, v (gate, up)
    keys             × 16 on some RoPE pairs of each KV head, queries ÷ 16
    values           × 8 on some channels of each KV head, ÷ 8 in the columns of o
    up_proj rows     × 64 on some channels, ÷ 64 in the columns of down

Factors are powers of two, so every float32 product has the very same bits before and after; only
formats that share a step among channels see a difference.
"""

import shutil
from pathlib import Path

import torch

GAIN, KEY, VALUE, UP = 32.0, 16.0, 8.0, 64.0


def bundled_model() -> Path:
    """Folder of the bundled model."""
    import fewbit.quant

    return Path(fewbit.quant.__file__).parent / "data" / "tiny-llama"


def plant(folder: Path, seed: int = 0) -> Path:
    """Write the planted model into `folder`; its folder."""
    import json

    from safetensors.torch import load_file, save_file

    source = bundled_model()
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for layer in range(config["num_hidden_layers"]):
            _plant_layer(tensors, f"model.layers.{layer}.", config, generator)
        save_file(tensors, file, {"format": "pt"})
    return folder


def _plant_layer(
    tensors: dict[str, torch.Tensor], prefix: str, config: dict[str, int], g: torch.Generator
) -> None:
    def scale_rows(name: str, factors: torch.Tensor) -> None:
        tensors[f"{prefix}{name}.weight"] *= factors.to(torch.bfloat16).unsqueeze(-1)

    def scale_columns(name: str, factors: torch.Tensor) -> None:
        tensors[f"{prefix}{name}.weight"] *= factors.to(torch.bfloat16)

    attention, mlp = "self_attn.", "mlp."
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, hidden = config["head_dim"], config["hidden_size"]
    for norm, readers in (
        ("input_layernorm", [f"{attention}{n}_proj" for n in "qkv"]),
        ("post_attention_layernorm", [f"{mlp}gate_proj", f"{mlp}up_proj"]),
    ):
        factors = _some(hidden, 16, GAIN, g)
        tensors[f"{prefix}{norm}.weight"] *= factors.to(torch.bfloat16)
        for reader in readers:
            scale_columns(reader, 1 / factors)
    pairs = torch.cat([_some(head_dim // 2, 4, KEY, g).repeat(2) for _ in range(kv_heads)])
    scale_rows(f"{attention}k_proj", pairs)
    scale_rows(f"{attention}q_proj", 1 / _for_queries(pairs, heads // kv_heads, head_dim))
    values = torch.cat([_some(head_dim, 6, VALUE, g) for _ in range(kv_heads)])
    scale_rows(f"{attention}v_proj", values)
    scale_columns(f"{attention}o_proj", 1 / _for_queries(values, heads // kv_heads, head_dim))
    ups = _some(config["intermediate_size"], 24, UP, g)
    scale_rows(f"{mlp}up_proj", ups)
    scale_columns(f"{mlp}down_proj", 1 / ups)


def _some(size: int, count: int, factor: float, generator: torch.Generator) -> torch.Tensor:
    """Ones, and `factor` in `count` places."""
    factors = torch.ones(size)
    factors[torch.randperm(size, generator=generator)[:count]] = factor
    return factors


def _for_queries(per_kv_head: torch.Tensor, group: int, head_dim: int) -> torch.Tensor:
    """Factors of KV heads, once for each query head."""
    return per_kv_head.view(-1, head_dim).repeat_interleave(group, dim=0).flatten()
