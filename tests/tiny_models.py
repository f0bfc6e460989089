"""Tiny random checkpoints of every covered architecture, small enough for a test to build one.

Two to four layers, hidden size 64, four experts. Sizes are all different where the architecture
lets them (heads, key-value heads, head size, widths), so that a mixed-up axis fails a test. Norm
weights and biases are not their trivial defaults, and matrices are scaled by 1/sqrt(K), so that
activations and logits are of order one and every parameter matters for the result.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

VOCAB = 131

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 24}
_UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
_TWO_KINDS = ["sliding_attention", "full_attention"]

# name -> (model_type, what differs from the common sizes)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_GQA, **_UNTIED}),
    "llama_tied": ("llama", {**_GQA, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_GQA, **_UNTIED, "sliding_window": 8}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2, **_UNTIED}),
    "qwen3": ("qwen3", {**_GQA, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"num_key_value_heads": 2, **_UNTIED}),
    "gemma2": ("gemma2", {**_GQA, "sliding_window": 8, "layer_types": _TWO_KINDS}),
    "gemma3_text": (
        "gemma3_text",
        {
            **_GQA,
            "num_hidden_layers": 3,
            "sliding_window": 8,
            "layer_types": [*_TWO_KINDS, "sliding_attention"],
        },
    ),
    "gpt_neox": ("gpt_neox", {**_UNTIED, "use_parallel_residual": True, "rotary_pct": 0.5}),
    "mixtral": (
        "mixtral",
        {**_GQA, **_UNTIED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_GQA,
            **_UNTIED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0],
            "num_hidden_layers": 3,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **_GQA,
            **_UNTIED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 48,
            "sliding_window": 8,
            "layer_types": _TWO_KINDS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_UNTIED,
            "num_key_value_heads": 4,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 40,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 28,
            "kv_lora_rank": 20,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            **_GQA,
            **_UNTIED,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 48,
            "decoder_sparse_step": 1,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 12,
            "linear_value_head_dim": 16,
        },
    ),
}

ARCHITECTURES: tuple[str, ...] = tuple(_CONFIGS)


def make_config(arch: str) -> Any:
    """The transformers configuration of `arch`."""
    from transformers import AutoConfig

    model_type, changes = _CONFIGS[arch]
    return AutoConfig.for_model(model_type, **{**_COMMON, **changes})


def make_model(arch: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model of `arch` in eval mode, deterministic in `seed`."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make_config(arch))
    generator = torch.Generator().manual_seed(seed)
    transposed = arch == "gpt_oss"  # its expert stacks are [E, K, N]
    # A tied table is the head too: rows of norm one keep the logits of order one.
    embedding_std = 1 / math.sqrt(model.config.hidden_size) if _is_tied(model) else 1.0
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "embed_" in name and tensor.dim() == 2 and "out" not in name:
                tensor.normal_(0, embedding_std, generator=generator)
            else:
                _fill(name, tensor, transposed, generator)
        for name, tensor in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.1, generator=generator)
    return model.to(dtype).eval()


def _is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _fill(name: str, tensor: torch.Tensor, transposed: bool, generator: torch.Generator) -> None:
    if tensor.dim() >= 2 and "bias" not in name:
        k = tensor.shape[-2] if transposed and tensor.dim() == 3 else tensor.shape[-1]
        tensor.normal_(0, 1 / math.sqrt(k), generator=generator)
    else:  # norms, biases, sinks, decays: keep the default's centre
        tensor.add_(torch.empty_like(tensor).normal_(0, 0.2, generator=generator))


def save(arch: str, folder: str | Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write a checkpoint of `arch` in the layout that published files have; its folder."""
    folder = Path(folder)
    make_model(arch, seed, dtype).save_pretrained(folder)
    return folder


def make_tokens(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, length], int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


class MemorySource:
    """All tensors of a saved checkpoint, read at once; `reads` counts how often each is asked."""

    def __init__(self, folder: str | Path) -> None:
        from safetensors.torch import load_file

        self.tensors: dict[str, torch.Tensor] = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            self.tensors.update(load_file(file))
        self.config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
        self.reads: Counter[str] = Counter()

    def read(self, name: str) -> torch.Tensor:
        """The tensor itself, not a copy, as a memory-mapped file would hand it out."""
        self.reads[name] += 1
        return self.tensors[name]
