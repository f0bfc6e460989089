"""Shared products: bit-equal to single layers, never stale, and gone when they do not pay."""

import copy
import gc
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fewbit.quant import cpu_int8, dispatch
from fewbit.quant.errors import FormatError
from fewbit.quant.format import find_format
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.formats.int_two_level import IntTwoLevelOptions
from fewbit.quant.fused import Group, find_groups, fuse, join_rows
from fewbit.quant.hadamard import Hadamard
from fewbit.quant.kernel import Kernel
from fewbit.quant.linear import QuantLinear
from fewbit.quant.packed import PackedTensor, Term

BF16 = torch.bfloat16
W4 = IntTwoLevelOptions(group=32)
K = 64
pytestmark = pytest.mark.skipif(
    all(cpu_int8._trial(kernel.name) is not None for kernel in cpu_int8.KERNELS),
    reason="no integer operator works on this processor",
)


def pack(n: int, name: str = "int_two_level", options: object = W4) -> PackedTensor:
    known = find_format(name)
    weight = torch.randn(n, K) * 0.1 + 0.02
    scales = known.fit(weight, options)
    codes, _ = known.round(weight, scales, 0, options)
    return PackedTensor((n, K), (Term(name, options, known.pack(codes, scales, options)),))


def layer(n: int, **keys: object) -> QuantLinear:
    keys = {"activation": "int8_token", **keys}
    packed = pack(n, *keys.pop("weight", ()))
    return QuantLinear.from_packed(packed, torch.randn(n) if n % 2 else None, BF16, **keys)


def trio(**keys: object) -> list[QuantLinear]:
    torch.manual_seed(0)
    return [layer(48, **keys), layer(17, **keys), layer(16, **keys)]


def alone(layers: list[QuantLinear], x: torch.Tensor) -> list[torch.Tensor]:
    """What copies, which are not fused, answer."""
    with torch.no_grad():
        return [copy.deepcopy(item)(x) for item in layers]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Output widths of all integer products."""
    seen: list[int] = []
    known = dict(dispatch.kernels())

    def counted(kernel: Kernel) -> Kernel:
        def launch(x: torch.Tensor, layout: object) -> torch.Tensor:
            y = kernel.launch(x, layout)
            seen.append(y.shape[1])
            return y

        return Kernel(
            kernel.name, kernel.refuse, kernel.prepare, launch, kernel.seconds, kernel.priority,
            activation=kernel.activation,
        )  # fmt: skip

    table = {n: counted(k) if k.activation else k for n, k in known.items()}
    for module in ("fewbit.quant.dispatch.kernels", "fewbit.quant.fused.kernels"):
        monkeypatch.setattr(module, lambda: table)
    return seen


@pytest.mark.parametrize("lead", [(1,), (3,), (1, 1), (2, 17), ()])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"inputs": (Hadamard(K, 5),)},
        {"weight": ("int_two_level", IntTwoLevelOptions(group="row"))},
        {"weight": ("int_group", IntGroupOptions(8, "row"))},
    ],
)
def test_one_product_bit_equal_to_single_layers(
    keys: dict[str, object], lead: tuple[int, ...], launches: list[int]
) -> None:
    layers = trio(**keys)
    x = torch.randn(*lead, K).to(BF16)
    wanted = alone(layers, x)
    launches.clear()
    fuse(layers)
    found = [item(x) for item in layers]
    assert launches == [48 + 17 + 16]
    assert same(found, wanted)
    assert all(y.is_contiguous() and y.shape[:-1] == lead for y in found)
    pointers = {y.untyped_storage().data_ptr() for y in found}
    assert len(pointers) == 3


def test_any_order_and_any_number_of_rows(launches: list[int]) -> None:
    layers = trio()
    fuse(layers)
    for m in (1, 2, 5, 1, 40, 1):
        x = torch.randn(m, K).to(BF16)
        wanted = alone(layers, x)
        launches.clear()
        order = torch.randperm(3).tolist()
        found = {i: layers[i](x) for i in order}
        assert launches == [81]
        assert same([found[i] for i in range(3)], wanted)


def write(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(-2)


def write_a_view(x: torch.Tensor) -> torch.Tensor:
    x[0, 3:5] += 7
    return x


def swap_memory(x: torch.Tensor) -> torch.Tensor:
    x.data = torch.randn_like(x)
    return x


def write_under_detach(x: torch.Tensor) -> torch.Tensor:
    x.detach().add_(1)
    return x


@pytest.mark.parametrize(
    "change",
    [
        write,
        write_a_view,
        swap_memory,
        write_under_detach,
        lambda x: x.clone(),
        lambda x: x + 1,
        lambda x: x.float(),
        lambda x: x[:1],
        lambda x: x.flip(0),
    ],
)
def test_another_or_a_changed_x_is_never_answered_from_memory(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    layers = trio()
    fuse(layers)
    x = torch.randn(4, K).to(BF16)
    layers[0](x)
    z = change(x)
    assert same([item(z) for item in layers[1:]], alone(layers, z)[1:])


def test_x_that_dies_leaves_nothing_behind() -> None:
    layers = trio()
    group = fuse(layers)
    for _ in range(5):
        x = torch.randn(4, K).to(BF16)
        wanted = alone(layers, x)[0]
        assert torch.equal(layers[0](x), wanted)
        outputs = group._local.last.outputs
        assert len(outputs) == 2
        del x
        assert not outputs


def test_each_call_gets_a_tensor_of_its_own() -> None:
    layers = trio()
    fuse(layers)
    x = torch.randn(1, K).to(BF16)
    wanted = alone(layers, x)
    for _ in range(3):
        for item, expected in zip(layers, wanted, strict=True):
            y = item(x)
            assert torch.equal(y, expected)
            y.zero_()


@pytest.mark.parametrize("member", [0, 1, 2])
def test_a_changed_weight_is_never_answered_from_memory(member: int) -> None:
    layers = trio()
    fuse(layers)
    x = torch.randn(3, K).to(BF16)
    before = [item(x) for item in layers]
    layers[0](x)
    layers[member].scale_row.mul_(2)
    wanted = alone(layers, x)
    assert not torch.equal(wanted[member], before[member])
    assert same([item(x) for item in layers], wanted)
    layers[member].scale_row = layers[member].scale_row / 4
    assert same([item(x) for item in layers], alone(layers, x))
    layers[member].load_state_dict(layer(layers[member].out_features).state_dict())
    assert same([item(x) for item in layers], alone(layers, x))


def test_casting_and_moving_members() -> None:
    layers = trio()
    fuse(layers)
    model = nn.ModuleList(layers)
    for cast in (model.float, model.half, lambda: model.to("cpu"), model.bfloat16):
        cast()
        x = torch.randn(3, K).to(layers[0].dtype)
        assert same([item(x) for item in layers], alone(layers, x))


def test_a_gradient_is_computed_alone() -> None:
    layers = trio()
    fuse(layers)
    x = torch.randn(3, K, requires_grad=True)
    layers[0](x).sum().backward()
    assert torch.allclose(x.grad, layers[0].float().weight.sum(0).expand(3, K), atol=1e-4)
    with torch.no_grad():
        found = [item(x) for item in layers]
    assert same(found, alone(layers, x))
    y = layers[1](x)
    assert y.requires_grad and torch.equal(y.detach(), found[1])


def test_inference_mode_shares_too(launches: list[int]) -> None:
    """x made there has no version counter: its values are compared."""
    layers = trio()
    fuse(layers)
    with torch.inference_mode():
        for _ in range(3):
            x = torch.randn(3, K).to(BF16)
            launches.clear()
            found = [item(x) for item in layers]
            assert launches == [81] and not layers[0].shared._local.last.copy
            assert same(found, alone(layers, x.clone()))
    assert not any(item._runners for item in layers)


def write_data(x: torch.Tensor) -> torch.Tensor:
    x.data.mul_(3)
    return x


@pytest.mark.parametrize("made", ["inside", "outside"])
@pytest.mark.parametrize("change", [write, write_a_view, write_data, torch.clone])
def test_inference_mode_is_never_answered_from_memory_either(
    change: Callable[[torch.Tensor], torch.Tensor], made: str
) -> None:
    if made == "outside" and change is write_data:
        pytest.skip("escapes the version counter, as documented")
    layers = trio()
    fuse(layers)
    outside = torch.randn(3, K).to(BF16)
    with torch.inference_mode():
        x = outside.clone() if made == "inside" else outside
        layers[0](x)
        z = change(x)
        assert same([item(z) for item in layers[1:]], alone(layers, z.clone())[1:])


def test_any_layout_of_memory_is_compared_in_inference_mode(launches: list[int]) -> None:
    layers = trio()
    fuse(layers)
    with torch.inference_mode():
        wide = torch.randn(4, 3 * K).to(BF16)
        flat = torch.randn(4 * K + 1).to(BF16)
        inputs = (
            wide[:, 1 : K + 1],
            torch.randn(K, 4).to(BF16).T,
            flat[1:].view(4, K),
            flat[: 4 * K].view(4, K),
        )
        for x in inputs:
            launches.clear()
            found = [item(x) for item in layers]
            assert launches == [81]
            assert same(found, alone(layers, x.clone()))
            layers[0](x)
            x[-1, -1] += 1
            assert same([item(x) for item in layers[1:]], alone(layers, x.clone())[1:])


def test_damaged_rows_in_inference_mode() -> None:
    layers = trio()
    fuse(layers)
    with torch.inference_mode():
        x = torch.randn(2, K).to(BF16)
        x[1, 3] = float("nan")
        found = [item(x) for item in layers]
    assert all(torch.isfinite(y[0]).all() and not torch.isfinite(y[1]).any() for y in found)


def test_modes_are_not_crossed() -> None:
    """What was computed in inference mode cannot be saved for a backward pass outside of it."""
    layers = trio()
    fuse(layers)
    x = torch.randn(3, K).to(BF16)
    for made in (x, None):
        with torch.inference_mode():
            z = x.clone() if made is None else made
            layers[0](z)
        with torch.no_grad():
            y = layers[2](z)  # without a bias: just what the group answers
        assert not y.is_inference()
        scale = torch.ones(y.shape[-1], dtype=BF16, requires_grad=True)
        (y * scale).sum().backward()
        assert torch.allclose(scale.grad, y.sum(0), rtol=0.02, atol=0.02)


def test_a_dead_x_of_inference_mode_leaves_nothing_behind() -> None:
    layers = trio()
    group = fuse(layers)
    with torch.inference_mode():
        x = torch.randn(4, K).to(BF16)
        layers[0](x)
        last = group._local.last
        assert len(last.outputs) == 2 and len(last.copy) == 1
        del x
        assert not last.outputs and not last.copy


def test_one_layout_for_all_dtypes_and_modes() -> None:
    layers = trio()
    group = fuse(layers)
    for dtype in (torch.float32, BF16, torch.float16):
        x = torch.randn(3, K).to(dtype)
        assert same([item(x) for item in layers], alone(layers, x))
        with torch.inference_mode():
            z = x.clone()
            [item(z) for item in layers]
    assert len(group._layouts) == 1
    assert not any(item._runners for item in layers)


def test_cold_layers_work_under_autocast() -> None:
    layers = [item.float() for item in trio()]
    x = torch.randn(3, K)
    wanted = alone(layers, x)
    fuse(layers)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        found = [item(x) for item in layers]
    assert [y.dtype for y in found] == [torch.float32] * 3
    assert same(found, wanted)


def test_autocast_and_plain_calls_do_not_exchange_outputs() -> None:
    """The transform of the input follows autocast, and so do its results."""
    layers = [item.float() for item in trio(inputs=(Hadamard(K, 5),))]
    x = torch.randn(3, K)
    wanted = alone(layers, x)
    fuse(layers)
    with torch.autocast("cpu", BF16):
        layers[0](x)
    assert same([item(x) for item in layers[1:]], wanted[1:])


def test_threads_do_not_share_results() -> None:
    layers = trio()
    fuse(layers)
    inputs = [torch.randn(m, K).to(BF16) for m in (1, 3, 9, 20)]
    wanted = [alone(layers, x) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(30):
            if not same([item(inputs[index]) for item in layers], wanted[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_not_fused_and_work(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    layers = trio()
    fuse(layers)
    x = torch.randn(3, K).to(BF16)
    wanted = [item(x) for item in layers]
    twins = duplicate(nn.ModuleList(layers))
    assert all(twin.shared is None for twin in twins)
    assert same([twin(x) for twin in twins], wanted)
    twins[0].scale_row.zero_()
    assert same([item(x) for item in layers], wanted)
    fuse(list(twins))
    assert same([twin(x) for twin in twins], alone(list(twins), x))


def test_a_member_that_is_gone_ends_the_group() -> None:
    layers = trio()
    fuse(layers)
    x = torch.randn(3, K).to(BF16)
    wanted = [item(x) for item in layers]
    del layers[1]
    gc.collect()
    assert same([item(x) for item in layers], [wanted[0], wanted[2]])
    assert all(item.shared is None for item in layers)


def test_fusing_again_ends_the_first_group() -> None:
    layers = trio()
    first = fuse(layers)
    second = fuse(layers[:2])
    assert first is not second and layers[2].shared is None
    x = torch.randn(2, K).to(BF16)
    assert same([item(x) for item in layers], alone(layers, x))
    assert layers[0].shared is second


def test_different_inputs_end_the_group() -> None:
    layers = trio()
    fuse(layers)
    for _ in range(40):
        x = torch.randn(1, K).to(BF16)
        assert torch.equal(layers[0](x), alone(layers, x)[0])
    assert all(item.shared is None for item in layers)
    shared = trio()
    group = fuse(shared)
    for _ in range(40):
        x = torch.randn(1, K).to(BF16)
        for item in shared:
            item(x)
    assert all(item.shared is group for item in shared)


def test_the_layout_of_the_group_replaces_those_of_members() -> None:
    layers = trio()
    x = torch.randn(2, K).to(BF16)
    for item in layers:
        item(x)
    assert all(item._runners for item in layers)
    fuse(layers)
    for item in layers:
        item(x)
    assert not any(item._runners for item in layers)
    assert sorted(layers[0].state_dict()) == sorted(trio()[0].state_dict())


def test_another_choice_of_kernel_goes_alone(
    monkeypatch: pytest.MonkeyPatch, launches: list[int]
) -> None:
    monkeypatch.setenv("FEWBIT_KERNEL", "dense_cached")
    layers = trio()
    fuse(layers)
    x = torch.randn(3, K).to(BF16)
    assert same([item(x) for item in layers], alone(layers, x))
    assert not launches


def test_empty_inputs() -> None:
    layers = trio()
    fuse(layers)
    assert [tuple(item(torch.empty(0, K, dtype=BF16)).shape) for item in layers] == [
        (0, 48),
        (0, 17),
        (0, 16),
    ]


def test_what_cannot_be_fused_is_named() -> None:
    one, two = layer(16), layer(16)
    with pytest.raises(FormatError, match="two or more different layers, got 1"):
        fuse([one])
    with pytest.raises(FormatError, match="different layers, got 2"):
        fuse([one, one])
    with pytest.raises(FormatError, match="activation = None"):
        fuse([layer(16, activation=None), layer(16, activation=None)])
    for other in (
        layer(16, activation=None),
        layer(16, inputs=(Hadamard(K),)),
        layer(16, weight=("int_two_level", IntTwoLevelOptions(group=64))),
        layer(16, weight=("int_group", IntGroupOptions(8, "row"))),
    ):
        with pytest.raises(FormatError, match="must have the same"):
            fuse([one, two, other])
    assert one.shared is None


class Block(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, item in layers.items():
            self.add_module(name, item)


def test_groups_are_found_among_siblings() -> None:
    q, k, v, o = (layer(16) for _ in range(4))
    gate, up = layer(32), layer(32)
    other = layer(16, weight=("int_group", IntGroupOptions(8, "row")))
    model = nn.ModuleList(
        [
            Block(q_proj=q, k_proj=k, v_proj=v, o_proj=o),
            Block(gate_proj=gate, up_proj=up, down_proj=layer(16)),
            Block(q_proj=layer(16), k_proj=other, v_proj=nn.Linear(K, 16)),
            Block(q_proj=layer(16, activation=None), k_proj=layer(16, activation=None)),
        ]
    )
    assert find_groups(model) == [(q, k, v), (gate, up)]
    assert isinstance(fuse(find_groups(model)[0]), Group)
    assert find_groups(model) == [(gate, up)]
    mixed = Block(q_proj=layer(16), k_proj=layer(16), v_proj=other)
    assert [len(group) for group in find_groups(mixed)] == [2]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("int_two_level", W4),
        ("int_two_level", IntTwoLevelOptions(group="row", dialect="zero")),
        ("int_group", IntGroupOptions(3, 16, symmetric=False)),
    ],
)
def test_joined_rows_decode_to_the_rows(name: str, options: object) -> None:
    weights = [pack(n, name, options) for n in (5, 1, 8)]
    joined = join_rows(weights)
    known = find_format(name)
    known.check(joined.terms[0].parts, (14, K), options)
    rows = [known.unpack(w.terms[0].parts, w.shape, options) for w in weights]
    assert torch.equal(known.unpack(joined.terms[0].parts, (14, K), options), torch.cat(rows))
