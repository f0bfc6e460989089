"""`torch.compile` sees one operator for a quantized layer, and runs what the eager layer runs."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from fake_kernels import pack
from fewbit.quant.errors import FormatError
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.linear import QuantLinear

N, K = 48, 32


def layer(activation: str | None = None, bias: bool = True) -> QuantLinear:
    options = IntGroupOptions(8, "row") if activation else IntGroupOptions(4, 32)
    return QuantLinear.from_packed(
        pack(torch.randn(N, K), options),
        torch.randn(N) if bias else None,
        torch.float32,
        activation,
    )


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("activation", [None, "int8_token"])
def test_one_graph_serves_every_number_of_rows(activation: str | None) -> None:
    model = nn.Sequential(layer(activation), nn.GELU(), nn.Linear(N, 4))
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(sum("quant_linear" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for m in (3, 5, 130):
            x = torch.randn(2, m, K)
            assert torch.equal(compiled(x), model(x))
    assert graphs == [1]


def test_the_operator_keeps_the_contract_of_operators() -> None:
    held = layer()
    x = torch.randn(2, 3, K)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fewbit.quant_linear, (x, held.number, N), test_utils=checks)


def test_a_changed_weight_is_noticed_without_compiling_again() -> None:
    held = layer(bias=False)
    compiled = torch.compile(held, backend="eager", fullgraph=True)
    x = torch.randn(3, K)
    with torch.no_grad():
        before = compiled(x)
        held.get_buffer("scale_group").mul_(2)
        after = compiled(x)
    assert torch.allclose(after, 2 * before)


def test_copies_and_pickles_are_layers_of_their_own() -> None:
    held = layer(bias=False)
    twins = [held, copy.deepcopy(held), pickle.loads(pickle.dumps(held))]
    assert len({twin.number for twin in twins}) == 3
    x = torch.randn(2, K)
    twins[1].get_buffer("scale_group").mul_(2)
    first, doubled, third = (torch.compile(twin, backend="eager")(x) for twin in twins)
    assert torch.allclose(doubled, 2 * first) and torch.equal(first, third)


def test_gradients_reach_the_input_of_a_compiled_layer() -> None:
    held = layer()
    x = torch.randn(2, K, requires_grad=True)
    (expected,) = torch.autograd.grad(held(x).square().sum(), x)
    (found,) = torch.autograd.grad(torch.compile(held, backend="eager")(x).square().sum(), x)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_gone_is_named() -> None:
    held = layer()
    number = held.number
    del held
    gc.collect()
    with pytest.raises(FormatError, match=f"layer {number} of a compiled graph is gone"):
        torch.ops.fewbit.quant_linear(torch.randn(1, K), number, N)
