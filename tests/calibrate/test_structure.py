"""Structure found by running a block, for every architecture and for invented blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewbit.calibrate.model import BlockInput, LayerCall, ModelGraph
from fewbit.calibrate.structure import Structure, find_structure
from tiny_models import ARCHITECTURES, MemorySource, make_tokens, save

CPU = torch.device("cpu")
ONE_PLUS = ("gemma2", "gemma3_text", "qwen3_next")


def _structures(arch: str, folder: Path, dtype: torch.dtype = torch.float32) -> list[Structure]:
    source = MemorySource(save(arch, folder, dtype=dtype))
    graph = ModelGraph(source.config, source, dtype, CPU)
    item = graph.start(make_tokens(4, 16), 4)[0]
    found = []
    for index in range(len(graph.block_names)):
        graph.materialize(index)
        found.append(find_structure(graph, index, item))
        item.hidden = graph.run(index, item)
        graph.release(index)
    return found


def _facts(structure: Structure) -> dict[str, tuple[str, str | None]]:
    """Short parameter name -> (role, name of the norm that feeds it)."""
    return {
        use.parameter.split(".", 3)[3].removesuffix(".weight"): (
            use.role,
            use.norm.name.rpartition(".")[2] if use.norm else None,
        )
        for use in (*structure.linears, *structure.experts)
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_norms_are_verified_and_of_the_right_kind(arch: str, tmp_path: Path) -> None:
    kind = "rms1p" if arch in ONE_PLUS else "layernorm" if arch == "gpt_neox" else "rms"
    for structure in _structures(arch, tmp_path):
        norms = [use.norm for use in (*structure.linears, *structure.experts) if use.norm]
        assert {norm.kind for norm in norms} == {kind}
        assert {norm.bias for norm in norms} == {arch == "gpt_neox"}
        assert all(0 < norm.eps < 1e-4 for norm in norms)
        assert len({norm.name for norm in norms}) == (4 if arch == "deepseek_v3" else 2)


ATTENTION = {
    "self_attn.q_proj": ("linear", "input_layernorm"),
    "self_attn.k_proj": ("linear", "input_layernorm"),
    "self_attn.v_proj": ("linear", "input_layernorm"),
    "self_attn.o_proj": ("linear", None),
}


def _gated(norm: str, prefix: str = "mlp") -> dict[str, tuple[str, str | None]]:
    return {
        f"{prefix}.gate_proj": ("linear", norm),
        f"{prefix}.up_proj": ("linear", norm),
        f"{prefix}.down_proj": ("linear", None),
    }


def _experts(router: str) -> dict[str, tuple[str, str | None]]:
    return {
        f"mlp.{router}": ("router", "post_attention_layernorm"),
        "mlp.experts.gate_up_proj": ("experts", "post_attention_layernorm"),
        "mlp.experts.down_proj": ("experts", None),
    }


EXPECTED = {
    "llama": ATTENTION | _gated("post_attention_layernorm"),
    "gemma2": ATTENTION | _gated("pre_feedforward_layernorm"),
    "phi3": {
        "self_attn.qkv_proj": ("linear", "input_layernorm"),
        "self_attn.o_proj": ("linear", None),
        "mlp.gate_up_proj": ("linear", "post_attention_layernorm"),
        "mlp.down_proj": ("linear", None),
    },
    "mixtral": ATTENTION | _experts("gate"),
    "qwen3_moe": ATTENTION | _experts("gate"),
    "gpt_oss": ATTENTION | _experts("router"),
    "deepseek_v3": {
        "self_attn.q_a_proj": ("linear", "input_layernorm"),
        "self_attn.q_b_proj": ("linear", "q_a_layernorm"),
        "self_attn.kv_a_proj_with_mqa": ("linear", "input_layernorm"),
        "self_attn.kv_b_proj": ("linear", "kv_a_layernorm"),
        "self_attn.o_proj": ("linear", None),
    }
    | _experts("gate")
    | _gated("post_attention_layernorm", "mlp.shared_experts"),
    "qwen3_next": ATTENTION
    | _experts("gate")
    | _gated("post_attention_layernorm", "mlp.shared_expert")
    | {"mlp.shared_expert_gate": ("router", "post_attention_layernorm")},
}


@pytest.mark.parametrize("arch", sorted(EXPECTED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_roles_and_feeding_norms(arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert _facts(_structures(arch, tmp_path, dtype)[-1]) == EXPECTED[arch]


def test_linear_attention_is_seen_and_its_convolution_is_not(tmp_path: Path) -> None:
    structure = _structures("qwen3_next", tmp_path)[0]
    facts = _facts(structure)
    assert facts["linear_attn.in_proj_qkvz"] == ("linear", "input_layernorm")
    assert facts["linear_attn.in_proj_ba"] == ("linear", "input_layernorm")
    assert facts["linear_attn.out_proj"] == ("linear", None)
    assert structure.unseen == ("model.layers.0.linear_attn.conv1d.weight",)


def test_weights_of_one_input_share_a_key(tmp_path: Path) -> None:
    structure = _structures("llama", tmp_path)[0]
    keys: dict[str, list[str]] = {}
    for use in structure.linears:
        keys.setdefault(use.input_key, []).append(use.parameter.split(".")[-2])
    groups = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert list(keys.values()) == groups
    shared = _structures("qwen3_next", tmp_path)[3]
    router = shared.find("model.layers.3.mlp.gate.weight")
    expert = shared.find("model.layers.3.mlp.shared_expert.up_proj.weight")
    stack = shared.find("model.layers.3.mlp.experts.gate_up_proj")
    assert router is not None and expert is not None and stack is not None
    assert router.input_key == expert.input_key != stack.input_key
    assert shared.find("model.layers.3.mlp.nothing") is None


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss"])
def test_orientation_of_stacks(arch: str, tmp_path: Path) -> None:
    structure = _structures(arch, tmp_path)[0]
    assert [use.transposed for use in structure.experts] == [arch == "gpt_oss"] * 2
    assert not any(use.transposed for use in structure.linears)


class _Doubled(nn.Module):
    """Looks like a norm, but doubles: no formula that we claim to know."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = _Doubled(6)
        self.plain = nn.RMSNorm(6, eps=1e-5)
        self.a, self.b, self.twice = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.before, self.after = (nn.Linear(6, 6, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        changed = self.plain(x)
        out = self.a(normed) + self.b(changed + 1e-3) + self.twice(normed) + self.before(changed)
        changed.mul_(0.5)
        return out + self.twice(changed) + self.after(changed)


class _OneBlock:
    """The part of `ModelGraph` that the tracer uses, around any module."""

    block_names = ("odd",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def block(self, index: int) -> nn.Module:
        return self.module

    def block_parameters(self, index: int) -> dict[str, torch.Tensor]:
        return {f"odd.{name}": item for name, item in self.module.named_parameters()}

    def run(self, index: int, inputs: BlockInput) -> torch.Tensor:
        with torch.no_grad():
            return self.module(inputs.hidden)


def test_nothing_is_claimed_that_the_numbers_do_not_show() -> None:
    graph: Any = _OneBlock(_Odd())
    call = LayerCall((), {})
    structure = find_structure(graph, 0, BlockInput(torch.randn(2, 5, 6), (call,)))
    uses = {use.parameter: use for use in structure.linears}
    first = uses["odd.a.weight"].norm
    assert first is not None and first.name == "odd.norm" and first.kind is None
    assert uses["odd.b.weight"].norm is None  # nearly a norm's output is not one
    assert uses["odd.twice.weight"].norm is None  # its second input is not a norm's output
    before = uses["odd.before.weight"].norm
    assert before is not None and (before.name, before.kind) == ("odd.plain", "rms")
    assert uses["odd.after.weight"].norm is None  # written to in between
    assert len({use.input_key for use in structure.linears}) == 5
