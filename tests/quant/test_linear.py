"""Quantized layers and experts inside module trees and inside transformers' own expert modules."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from fewbit.quant import reference, runner
from fewbit.quant.errors import FormatError
from fewbit.quant.formats.int_group import FORMAT, IntGroupOptions
from fewbit.quant.hadamard import Hadamard
from fewbit.quant.linear import (
    ExpertView,
    FusedExperts,
    PackedWeight,
    QuantLinear,
    replace_parameter,
)
from fewbit.quant.packed import PackedTensor, Term

W4 = IntGroupOptions(4, 32)
W3 = IntGroupOptions(3, 16, symmetric=False)
BF16 = torch.bfloat16


def pack(weight: torch.Tensor, *options: IntGroupOptions, transposed: bool = False) -> PackedTensor:
    """One term for each of `options`, each rounding what the earlier ones left."""
    terms, rest = [], weight
    for option in options:
        extra = FORMAT.padded_k(weight.shape[-1], option) - weight.shape[-1]
        full = functional.pad(rest, (0, extra))
        scales = FORMAT.fit(full, option)
        codes, values = FORMAT.round(full, scales, 0, option)
        terms.append(Term("int_group", option, FORMAT.pack(codes, scales, option)))
        rest = rest - values[..., : weight.shape[-1]]
    return PackedTensor(tuple(weight.shape), tuple(terms), transposed)


def layer(n: int = 32, k: int = 64, dtype: torch.dtype = torch.float32, **keys: Any) -> QuantLinear:
    torch.manual_seed(n + k)
    bias = torch.randn(n) if keys.pop("bias", True) else None
    options = keys.pop("options", (W4,))
    return QuantLinear.from_packed(pack(torch.randn(n, k), *options, **keys), bias, dtype)


def dense_result(module: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    weight = reference.dense(module.packed, x.dtype)
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return functional.linear(x, weight, bias)


# ---- QuantLinear ----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (0,), (2, 0)])
def test_forward_of_any_leading_shape(lead: tuple[int, ...], bias: bool) -> None:
    module = layer(bias=bias)
    x = torch.randn(*lead, 64)
    y = module(x)
    assert y.shape == (*lead, 32) and y.dtype == torch.float32
    assert torch.allclose(y, dense_result(module, x), rtol=1e-6, atol=1e-5)


def test_state_dict_is_the_checkpoint() -> None:
    module = layer(options=(W4, W3))
    module(torch.randn(2, 64))
    module(torch.randn(40, 64))
    state = module.state_dict()
    assert sorted(state) == [
        "bias",
        "codes",
        "scale_group",
        "term1.codes",
        "term1.scale_group",
        "term1.zero_group",
    ]
    for name, part in module.packed.named_parts():
        assert torch.equal(state[name], part)


def test_empty_layer_loads_a_state_dict() -> None:
    source = layer(options=(W4, W3))
    terms = [("int_group", W4), ("int_group", W3)]
    target = QuantLinear((32, 64), terms, True, torch.float32)
    target.load_state_dict(source.state_dict())
    on_meta = QuantLinear((32, 64), terms, True, torch.float32, device="meta")
    assert on_meta.codes.is_meta and on_meta.bias.is_meta
    on_meta.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(5, 64)
    assert torch.equal(target(x), source(x))
    assert torch.equal(on_meta(x), source(x))


def test_loading_drops_layouts() -> None:
    """In place (the default) and by assignment."""
    module, other = layer(), layer()
    other.load_state_dict({**layer(n=32).state_dict(), "bias": torch.zeros(32)})
    other.codes.copy_(torch.randint(0, 255, other.codes.shape))
    x = torch.randn(6, 64)
    wanted = other(x)
    assert not torch.allclose(module(x), wanted)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), wanted)
    third = layer()
    third(x)
    third.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(third(x), wanted)


def test_writing_to_a_buffer_drops_layouts() -> None:
    module = layer(bias=False)
    x = torch.randn(6, 64)
    before = module(x)
    module.scale_group.mul_(2)
    assert torch.allclose(module(x), 2 * before, rtol=1e-6)
    module.scale_group = module.scale_group / 4
    assert torch.allclose(module(x), before / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda m: m.to(BF16), BF16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.to("cpu", BF16), BF16),
    ],
)
def test_stored_parts_keep_their_dtype(cast: Any, dtype: torch.dtype) -> None:
    module = layer(options=(W4, W3))
    before = {name: part.clone() for name, part in module.packed.named_parts()}
    holder = cast(nn.Sequential(module))
    assert module.dtype == module.bias.dtype == module.weight.dtype == dtype
    for name, part in module.packed.named_parts():
        assert part.dtype == before[name].dtype
        assert torch.equal(part, before[name])
    assert holder(torch.randn(3, 64, dtype=dtype)).dtype == dtype


def test_casting_there_and_back_loses_nothing() -> None:
    module = layer(bias=False)
    x = torch.randn(8, 64)
    before = module(x)
    assert torch.equal(module.to(BF16).float()(x), before)


def test_to_empty_keeps_dtypes() -> None:
    module = QuantLinear((32, 64), [("int_group", W4)], True, BF16, device="meta")
    module.to_empty(device="cpu")
    assert module.codes.device.type == "cpu"
    assert module.scale_group.dtype == torch.float16 and module.bias.dtype == BF16


def test_a_part_of_another_dtype_or_shape_is_named() -> None:
    module = layer()
    module._buffers["scale_group"] = module.scale_group.float()
    with pytest.raises(FormatError, match=r"int_group.scale_group must be torch.float16 \[32, 2\]"):
        module(torch.randn(1, 64))
    module = layer()
    module._buffers["codes"] = module.codes[:, :-1]
    with pytest.raises(FormatError, match=r"int_group\.codes must be"):
        module(torch.randn(1, 64))


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies_work_and_carry_no_layouts(duplicate: Any) -> None:
    module = layer(options=(W4, W3))
    x = torch.randn(6, 64)
    wanted = module(x)
    assert module._runners
    twin = duplicate(module)
    assert not twin._runners
    assert torch.equal(twin(x), wanted)
    twin.scale_group.zero_()
    assert torch.equal(module(x), wanted)


def test_saved_module_holds_the_stored_bytes_only() -> None:
    module = layer(n=64, k=256, bias=False)
    module(torch.randn(6, 256))
    file = io.BytesIO()
    torch.save(module, file)
    assert file.tell() < 64 * 256 * 0.75 + 6000  # a dense copy would be 64 KiB


def test_sizes_and_weight() -> None:
    module = layer(n=32, k=50)
    assert (module.out_features, module.in_features) == (32, 50)
    assert module.shape == (32, 50) and module.device.type == "cpu"
    assert torch.equal(module.weight, reference.dense(module.packed, torch.float32))
    assert "bits=4" in repr(module) and "32, 50" in repr(module)
    turned = layer(n=32, k=50, transposed=True)
    assert turned.shape == turned.weight.shape == (50, 32)
    assert (turned.out_features, turned.in_features) == (32, 50)
    assert turned(torch.randn(2, 50)).shape == (2, 32)


def test_gradient_reaches_the_input() -> None:
    module = layer()
    x = torch.randn(3, 64, requires_grad=True)
    module(x).sum().backward()
    assert torch.allclose(x.grad, module.weight.sum(0).expand(3, 64), rtol=1e-4, atol=1e-4)
    assert module.bias.grad is None
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_an_adapter_around_a_layer_trains() -> None:
    module = layer(bias=False)
    down, up = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)
    x = torch.randn(8, 64)
    module(x + up(down(x))).square().mean().backward()
    assert float(down.weight.grad.norm()) > 0 and float(up.weight.grad.norm()) > 0


def test_runs_in_inference_mode_and_after_it() -> None:
    with torch.inference_mode():
        module = layer()
        x = torch.randn(6, 64)
        inside = module(x)
    assert torch.equal(module(x.clone()), inside)


def test_bf16_results_are_close_at_one_row_and_at_many() -> None:
    module = layer(n=64, k=128, dtype=BF16)
    x = torch.randn(20, 128).to(BF16)
    exact = x.double() @ reference.dense(module.packed, torch.float64).T + module.bias.double()
    for y in (module(x), torch.cat([module(row[None]) for row in x])):
        assert float((y.double() - exact).norm() / exact.norm()) < 5e-3


# ---- rounded and transformed inputs -----------------------------------------------------------

ROW8 = IntGroupOptions(8, "row")
TURN = Hadamard(64, 11)


def rotated(inputs: tuple[Hadamard, ...] = (TURN,)) -> tuple[QuantLinear, torch.Tensor]:
    """A W8A8 layer behind a rotation, and the weight that it stands for."""
    torch.manual_seed(8)
    weight = torch.randn(32, 64)
    packed = pack(TURN.apply(weight) if inputs else weight, ROW8)
    bias = torch.randn(32)
    return QuantLinear.from_packed(packed, bias, torch.float32, "int8_token", inputs), weight


@pytest.mark.parametrize("inputs", [(), (TURN,)])
def test_layer_transforms_then_rounds(inputs: tuple[Hadamard, ...]) -> None:
    module, weight = rotated(inputs)
    x = torch.randn(7, 64)
    turned = TURN.apply(x) if inputs else x
    wanted = reference.linear(turned, module.packed, "int8_token") + module.bias
    assert torch.allclose(module(x), wanted, rtol=1e-5, atol=1e-5)  # equal, where integers run
    exact = functional.linear(x, weight, module.bias)
    assert 1e-4 < float((module(x) - exact).norm() / exact.norm()) < 0.02
    assert torch.equal(module.weight, reference.dense(module.packed, torch.float32))


def test_zero_rows_give_the_bias() -> None:
    module, _ = rotated()
    assert torch.equal(module(torch.zeros(2, 64)), module.bias.expand(2, 32))


def test_copies_keep_activation_and_inputs() -> None:
    module, _ = rotated()
    x = torch.randn(3, 64)
    wanted = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.activation == "int8_token" and twin.inputs == (TURN,)
        assert torch.equal(twin(x), wanted)
    assert sorted(module.state_dict()) == ["bias", "codes", "scale_group"]


def test_gradient_passes_rotation_and_rounding() -> None:
    module, weight = rotated()
    x = torch.randn(3, 64, requires_grad=True)
    module(x).sum().backward()
    wanted = weight.sum(0).expand(3, 64)
    assert float((x.grad - wanted).norm() / wanted.norm()) < 0.02


def test_bias_follows_the_dtype_of_rounded_layers() -> None:
    module, _ = rotated()
    x = torch.randn(3, 64)
    wanted = module(x)
    half = module.to(BF16)(x.to(BF16))
    assert half.dtype == BF16
    assert float((half.float() - wanted).norm() / wanted.norm()) < 0.02


def test_a_shared_product_may_decline() -> None:
    module, _ = rotated()
    x = torch.randn(3, 64)
    wanted = module(x)

    class Shared:
        answer: torch.Tensor | None = None

        def product(self, layer: QuantLinear, x: torch.Tensor) -> torch.Tensor | None:
            assert layer is module
            return self.answer

    module.shared = Shared()
    assert torch.equal(module(x), wanted)
    module.shared.answer = torch.zeros(3, 32)
    assert torch.equal(module(x), module.bias.expand(3, 32))
    assert copy.deepcopy(module).shared is None


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_transform_and_round(transposed: bool) -> None:
    torch.manual_seed(9)
    weight = torch.randn(3, 16, 64)
    packed = pack(TURN.apply(weight), ROW8, transposed=transposed)
    experts = FusedExperts.from_packed(packed, torch.float32, "int8_token", (TURN,))
    x = torch.randn(5, 64)
    y = x @ experts[1] if transposed else functional.linear(x, experts[1])
    one = PackedTensor(
        (16, 64), (Term("int_group", ROW8, {n: p[1] for n, p in packed.terms[0].parts.items()}),)
    )
    wanted = reference.linear(TURN.apply(x), one, "int8_token")
    assert torch.allclose(y, wanted, rtol=1e-5, atol=1e-5)
    exact = x @ weight[1].T
    assert float((y - exact).norm() / exact.norm()) < 0.02


def test_decoded_weights_of_transformed_inputs_are_refused() -> None:
    """They are in another basis: multiplying x by them would be silently wrong."""
    packed = pack(torch.randn(3, 16, 64), ROW8)
    experts = FusedExperts.from_packed(packed, torch.float32, None, (TURN,))
    x = torch.randn(3, 5, 64)
    for use in (
        lambda: torch.bmm(x, experts),
        lambda: experts[1:],
        lambda: experts[torch.tensor([0, 2])],
        lambda: torch.einsum("nk,bk->bn", experts[0], x[0]),
        lambda: x @ torch.abs(experts[0]),
    ):
        with pytest.raises(FormatError, match="choose the eager expert loop"):
            use()
    assert experts.dense().shape == (3, 16, 64)


def test_views_transform_and_round_by_their_layers() -> None:
    owner = nn.Module()
    module, _ = rotated()
    owner.add_module("0", nn.Module())
    owner.get_submodule("0").down_proj = module
    view = ExpertView(owner, 1, ("down_proj",))
    x = torch.randn(4, 64)
    assert torch.equal(functional.linear(x, view[0], module.bias), module(x))
    assert view.inputs == (TURN,)
    with pytest.raises(FormatError, match="eager expert loop"):
        view[:]


def test_linear_refuses_a_stack_and_experts_a_matrix() -> None:
    with pytest.raises(FormatError, match="linear layer"):
        QuantLinear((2, 8, 16), [("int_group", W4)], False, BF16)
    with pytest.raises(FormatError, match="stacked experts"):
        FusedExperts((8, 16), [("int_group", W4)], BF16)


# ---- experts --------------------------------------------------------------------------------


def stack(transposed: bool = False, dtype: torch.dtype = torch.float32) -> FusedExperts:
    torch.manual_seed(7)
    return FusedExperts.from_packed(pack(torch.randn(4, 24, 32), W4, transposed=transposed), dtype)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every product that goes through the dispatcher."""
    seen: list[int] = []
    whole = runner.Runner.linear

    def linear(self: runner.Runner, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[0])
        return whole(self, x)

    monkeypatch.setattr(runner.Runner, "linear", linear)
    return seen


@pytest.mark.parametrize("index", [2, -2, torch.tensor(2)])
def test_one_expert_multiplies_through_the_dispatcher(
    index: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = counting(monkeypatch)
    experts, x = stack(), torch.randn(5, 32)
    weight = experts.dense()[2]
    bias = torch.randn(24)
    handle = experts[index]
    assert isinstance(handle, PackedWeight) and handle.shape == (24, 32)
    for y in (
        functional.linear(x, handle),
        x @ handle.T,
        torch.matmul(x, handle.t()),
        x.matmul(handle.transpose(0, 1)),
    ):
        assert torch.allclose(y, x @ weight.T, rtol=1e-5, atol=1e-5)
    y = functional.linear(x, handle, bias=bias)
    assert torch.allclose(y, functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    assert seen == [5] * 5


def test_transposed_stack_multiplies_from_the_right(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counting(monkeypatch)
    experts, x = stack(transposed=True), torch.randn(5, 32)
    assert experts.shape == (4, 32, 24) and experts[1].shape == (32, 24)
    weight = experts.dense()[1]
    assert weight.shape == (32, 24)
    for y in (x @ experts[1], functional.linear(x, experts[1].T)):
        assert torch.allclose(y, x @ weight, rtol=1e-5, atol=1e-5)
    assert seen == [5, 5]


def test_other_functions_see_the_decoded_weight() -> None:
    experts = stack()
    weight = experts.dense()
    assert torch.equal(torch.abs(experts[3]), weight[3].abs())
    assert torch.equal(torch.einsum("nk,bk->bn", experts[0], torch.eye(32)), weight[0].T)
    assert torch.equal(torch.stack([experts[0], experts[1]]), weight[:2])
    assert torch.allclose(experts[0] @ torch.eye(32), weight[0])
    x = torch.randn(4, 5, 32)
    assert torch.allclose(torch.bmm(x, stack(transposed=True)), x @ weight.transpose(1, 2))
    # the wrong orientation for `linear`: decoded, multiplied as asked
    turned = functional.linear(torch.randn(2, 24), experts[0].T)
    assert turned.shape == (2, 32)


def test_slices_and_index_tensors_give_decoded_experts() -> None:
    experts = stack()
    weight = experts.dense()
    assert torch.equal(experts[1:3], weight[1:3])
    index = torch.tensor([[3, 0], [3, 3]])
    assert torch.equal(experts[index], weight[index])
    assert len(experts) == 4
    with pytest.raises(IndexError, match="expert 4 of 4"):
        experts[4]


def test_experts_keep_parts_and_follow_dtype_and_writes() -> None:
    experts, x = stack(), torch.randn(5, 32)
    before = x @ experts[1].T
    experts.scale_group[1] *= 2
    assert torch.allclose(x @ experts[1].T, 2 * before, rtol=1e-5)
    experts.to(BF16)
    assert experts.dtype == experts[0].dtype == BF16
    assert experts.scale_group.dtype == torch.float16
    assert sorted(experts.state_dict()) == ["codes", "scale_group"]
    assert experts.ndim == 3 and experts[0].ndim == 2 and not experts.requires_grad
    assert experts[0].device == experts.device == torch.device("cpu")


def mixtral() -> tuple[nn.Module, int, int]:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    from transformers import MixtralConfig

    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    return randomized(modeling.MixtralExperts(config)), 32, 48


def gpt_oss() -> tuple[nn.Module, int, int]:
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    from transformers import GptOssConfig

    config = GptOssConfig(
        hidden_size=32, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    return randomized(modeling.GptOssExperts(config)), 32, 48


def randomized(module: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-2] ** -0.5)
        parameter.requires_grad_(False)
    return module


def routed(hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """11 tokens, two of four experts each; expert 2 gets none."""
    torch.manual_seed(4)
    pairs = torch.tensor([[0, 1], [1, 3], [3, 0]])
    return torch.randn(11, hidden), pairs[torch.arange(11) % 3], torch.rand(11, 2)


def fuse(experts: nn.Module, *, transposed: bool) -> nn.Module:
    """Replace both parameters by packed stacks, and return a twin with the decoded ones."""
    twin = copy.deepcopy(experts)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name).detach()
        logical = weight.transpose(1, 2).contiguous() if transposed else weight
        holder = FusedExperts.from_packed(
            pack(logical, IntGroupOptions(4, 16), transposed=transposed), torch.float32
        )
        replace_parameter(experts, name, holder)
        getattr(twin, name).data.copy_(holder.dense())
    return twin


@pytest.mark.parametrize(("build", "transposed"), [(mixtral, False), (gpt_oss, True)])
def test_fused_experts_inside_transformers(
    build: Any, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, hidden, _ = build()
    original = copy.deepcopy(experts)
    twin = fuse(experts, transposed=transposed)
    state = experts.state_dict()
    assert {"gate_up_proj.codes", "down_proj.scale_group"} <= set(state)
    inputs = routed(hidden)
    seen = counting(monkeypatch)
    y = experts(*inputs)
    assert len(seen) == 6  # three busy experts, two products each
    wanted = twin(*inputs)
    assert float((y - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())
    assert float((y - original(*inputs)).norm() / wanted.norm()) > 1e-3  # it is quantized
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert torch.equal(other(*inputs), y)
    experts.to(BF16)
    half = experts(inputs[0].to(BF16), inputs[1], inputs[2].to(BF16))
    assert half.dtype == BF16
    assert float((half.float() - wanted).norm() / wanted.norm()) < 0.03


def split(experts: nn.Module) -> nn.Module:
    """Replace both parameters by views of per-expert layers, and return a decoded twin."""
    twin = copy.deepcopy(experts)
    for e in range(4):
        gate, up = experts.gate_up_proj[e].detach().chunk(2)
        child = nn.Module()
        for name, weight in (
            ("gate_proj", gate),
            ("up_proj", up),
            ("down_proj", experts.down_proj[e].detach()),
        ):
            packed = pack(weight.contiguous(), IntGroupOptions(4, 16))
            child.add_module(name, QuantLinear.from_packed(packed, None, torch.float32))
        experts.add_module(str(e), child)
    for name, children in (
        ("gate_up_proj", ("gate_proj", "up_proj")),
        ("down_proj", ("down_proj",)),
    ):
        view = ExpertView(experts, 4, children)
        replace_parameter(experts, name, view)
        getattr(twin, name).data.copy_(view.dense())
    return twin


def test_per_expert_layers_inside_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, hidden, width = mixtral()
    twin = split(experts)
    view = experts.gate_up_proj
    assert view.shape == (4, 2 * width, hidden) and view.dtype == torch.float32
    assert view[0].shape == (2 * width, hidden)
    state = experts.state_dict()
    assert "3.gate_proj.codes" in state and not any("gate_up" in name for name in state)
    inputs = routed(hidden)
    seen = counting(monkeypatch)
    y = experts(*inputs)
    assert len(seen) == 9  # three busy experts; gate, up, down
    wanted = twin(*inputs)
    assert float((y - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())


def test_views_follow_copies_and_moves() -> None:
    experts, hidden, _ = mixtral()
    split(experts)
    inputs = routed(hidden)
    wanted = experts(*inputs)
    for twin in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert twin.gate_up_proj.owner is twin
        assert torch.equal(twin(*inputs), wanted)
        twin.get_submodule("0.up_proj").scale_group.zero_()
        assert not torch.equal(twin(*inputs), wanted)
    assert torch.equal(experts(*inputs), wanted)
    experts.to(BF16)
    assert experts.gate_up_proj.dtype == experts.gate_up_proj[0].dtype == BF16
    assert experts.down_proj.device.type == "cpu"


def test_view_of_a_mixed_expert_is_refused() -> None:
    experts, hidden, _ = mixtral()
    split(experts)
    experts.get_submodule("1").gate_proj = nn.Linear(hidden, 48)
    with pytest.raises(FormatError, match="expert 1: gate_proj must be a QuantLinear, got Linear"):
        experts.gate_up_proj[1]


def test_turned_view_multiplies_from_the_right() -> None:
    experts, hidden, width = mixtral()
    split(experts)
    view = ExpertView(experts, 4, ("gate_proj", "up_proj"), transposed=True)
    assert view.shape == (4, hidden, 2 * width)
    x = torch.randn(3, hidden)
    assert torch.allclose(x @ view[1], x @ view.dense()[1], rtol=1e-5, atol=1e-5)


def test_initialization_leaves_experts_alone() -> None:
    """transformers initializes expert parameters by attribute name."""
    init = pytest.importorskip("transformers.initialization")
    experts = stack()
    before = experts.dense()
    init.normal_(experts, mean=0.0, std=1.0)
    assert torch.equal(experts.dense(), before)
