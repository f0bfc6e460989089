"""Weights recognised in matrix products."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from fewbit.calibrate.model import ModelGraph
from fewbit.calibrate.uses import Use, WatchWeights
from tiny_models import ARCHITECTURES, MemorySource, make_tokens, save

N, K, E = 5, 7, 3
Seen = list[tuple[Use, torch.Tensor]]


def _watch(
    run: Callable[[], torch.Tensor], **parameters: torch.Tensor
) -> tuple[Seen, torch.Tensor]:
    seen: Seen = []
    with WatchWeights(parameters, lambda use, x: seen.append((use, x))):
        result = run()
    assert torch.equal(result, run())
    return seen, result


X = torch.randn(4, K)
NK = torch.randn(N, K)
KN = torch.randn(K, N)
BIAS = torch.randn(N)


@pytest.mark.parametrize(
    ("run", "transposed"),
    [
        (lambda: functional.linear(X, NK), False),
        (lambda: functional.linear(input=X, weight=NK, bias=BIAS), False),
        (lambda: functional.linear(X, KN.t()), True),
        (lambda: X @ KN, True),
        (lambda: X @ NK.t(), False),
        (lambda: X @ NK.transpose(0, 1), False),
        (lambda: torch.matmul(X, KN), True),
        (lambda: torch.matmul(X, other=NK.mT), False),
        (lambda: X.matmul(KN), True),
        (lambda: torch.mm(X, KN), True),
        (lambda: X.mm(NK.T), False),
        (lambda: torch.addmm(BIAS, X, KN), True),
        (lambda: torch.addmm(BIAS, X, NK.T), False),
        (lambda: torch.addmm(BIAS, mat1=X, mat2=KN), True),
    ],
)
def test_products_with_a_matrix(run: Callable[[], torch.Tensor], transposed: bool) -> None:
    seen, _ = _watch(run, nk=NK, kn=KN)
    assert [use for use, _ in seen] == [Use("kn" if transposed else "nk", None, transposed)]
    assert seen[0][1] is X


@pytest.mark.parametrize("size", [(1, 7), (7, 1), (1, 1), (6, 6)])
def test_degenerate_and_square_matrices_keep_their_orientation(size: tuple[int, int]) -> None:
    weight = torch.randn(size)
    x, y = torch.randn(2, size[1]), torch.randn(2, size[0])
    assert _watch(lambda: functional.linear(x, weight), w=weight)[0][0][0].transposed is False
    seen, _ = _watch(lambda: y @ weight, w=weight)
    if size != (1, 1):  # one number has no orientation
        assert seen[0][0].transposed is True


def test_experts_one_by_one_also_with_a_tensor_as_index() -> None:
    stack = torch.nn.Parameter(torch.randn(E, N, K))
    index = torch.tensor([2])[0]
    seen, _ = _watch(lambda: functional.linear(X, stack[index]), w=stack)
    assert [use for use, _ in seen] == [Use("w", 2, False)]
    wide = torch.randn(E, K, N)
    seen, _ = _watch(lambda: X @ wide[1], w=wide)
    assert [use for use, _ in seen] == [Use("w", 1, True)]


@pytest.mark.parametrize("function", ["bmm", "matmul", "baddbmm", "broadcast"])
def test_all_experts_at_once(function: str) -> None:
    stack, x = torch.randn(E, N, K), torch.randn(E, 4, K)
    run = {
        "bmm": lambda: torch.bmm(x, stack.mT),
        "matmul": lambda: torch.matmul(x, stack.transpose(1, 2)),
        "baddbmm": lambda: torch.baddbmm(torch.zeros(E, 1, N), x, stack.mT),
        "broadcast": lambda: X @ stack.mT,
    }[function]
    seen, _ = _watch(run, w=stack)
    assert [use for use, _ in seen] == [Use("w", expert, False) for expert in range(E)]
    for expert, (_, got) in enumerate(seen):
        assert torch.equal(got, X if function == "broadcast" else x[expert])


def test_parts_and_copies_and_other_operands_are_not_reported() -> None:
    weight = torch.randn(6, 6)
    for run in (
        lambda: functional.linear(X[:, :6], weight[:3]),
        lambda: functional.linear(X[:, :6], weight[3:]),
        lambda: functional.linear(X[:, :3], weight[:, :3]),
        lambda: functional.linear(X[:, :6], weight.clone()),
        lambda: weight @ X[:, :6].T,
        lambda: functional.linear(X, NK),
    ):
        assert _watch(run, w=weight)[0] == []


def test_a_cast_weight_counts_as_the_weight() -> None:
    router = torch.randn(N, K).bfloat16()
    seen, _ = _watch(lambda: functional.linear(X, router.type(torch.float32)), w=router)
    assert [use for use, _ in seen] == [Use("w", None, False)]

    def cast_and_forget() -> torch.Tensor:
        router.float()  # freed at once: its address may be given to anything
        return functional.linear(X, torch.ones(N, K))

    assert _watch(cast_and_forget, w=router)[0] == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_use_has_the_inputs_that_the_orientation_says(arch: str, tmp_path: Path) -> None:
    source = MemorySource(save(arch, tmp_path))
    graph = ModelGraph(source.config, source, torch.float32, torch.device("cpu"))
    item = graph.start(make_tokens(2, 16), 2)[0]
    for index in range(len(graph.block_names)):
        graph.materialize(index)
        parameters = graph.block_parameters(index)
        seen, item.hidden = _watch(partial(graph.run, index, item), **parameters)
        for use, x in seen:
            k = parameters[use.parameter].shape[-2 if use.transposed else -1]
            assert x.shape[-1] == k, use
            assert use.transposed == (arch == "gpt_oss" and use.expert is not None)
        matrices = {name for name, weight in parameters.items() if weight.dim() >= 2}
        unused = matrices - {use.parameter for use, _ in seen}
        assert all("conv1d" in name or name.endswith("_bias") for name in unused), unused
        graph.release(index)


def test_every_token_reaches_its_experts(tmp_path: Path) -> None:
    source = MemorySource(save("mixtral", tmp_path))
    graph = ModelGraph(source.config, source, torch.float32, torch.device("cpu"))
    item = graph.start(make_tokens(2, 16), 2)[0]
    graph.materialize(0)
    tokens = 0

    def count(use: Use, x: torch.Tensor) -> None:
        nonlocal tokens
        if use.parameter.endswith("gate_up_proj"):
            tokens += x.shape[0]

    with WatchWeights(graph.block_parameters(0), count):
        graph.run(0, item)
    assert tokens == 2 * 16 * 2  # two experts for each token
