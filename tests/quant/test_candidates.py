"""Candidates at one size and at all of them, and who comes first where one choice serves all."""

from dataclasses import replace

import pytest
import torch

from fake_kernels import fake
from fewbit.kernels_triton import _triton
from fewbit.kernels_triton.int_group_gemm import KERNEL as GEMM
from fewbit.quant import reference
from fewbit.quant.candidates import ladder_of, ranked, times_of
from fewbit.quant.dispatch import explain
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.formats.int_two_level import IntTwoLevelOptions
from fewbit.quant.kernel import Config, Kernel, Problem, Reason
from fewbit.quant.ladder import Candidate
from fewbit.quant.machine import load_device
from fewbit.quant.policy import Policy
from fewbit.quant.tuned import NO_TABLES

H200 = load_device("h200")
ONE = Policy((), True)
W4 = Problem("int_group", IntGroupOptions(), 1, 1, 4096, 4096, torch.bfloat16, "cuda", machine=H200)
W4A8 = replace(W4, format="int_two_level", options=IntTwoLevelOptions(), activation="int8_token")
W8A8 = replace(W4, options=IntGroupOptions(8, "row"), activation="int8_token")


def sized(name: str, m_invariant: bool) -> Kernel:
    """Offers a tile as large as M, and no other."""

    def configs(problem: Problem) -> tuple[Config, ...]:
        return ((("tile", problem.m_bucket),),)

    def seconds(problem: Problem, config: Config) -> float:
        return 1e-6 * max(problem.m_bucket, dict(config)["tile"])

    return replace(fake(name, 0.0), configs=configs, seconds=seconds, m_invariant=m_invariant)


def test_configs_of_other_sizes_count_where_one_serves_all() -> None:
    kernel = sized("sized", True)
    assert list(times_of((kernel,), W4, NO_TABLES)) == [Candidate("sized", (("tile", 1),))]
    assert len(times_of((kernel,), W4, NO_TABLES, True)) == len(W4.buckets)
    (rung,) = ladder_of((kernel,), W4, NO_TABLES, ONE, frozenset())
    assert rung.candidate == Candidate("sized", (("tile", 1),)) and rung.last == 4096


def test_what_does_not_depend_on_m_comes_first() -> None:
    fast, invariant = fake("fast", 1e-12), sized("sized", True)
    assert (
        ladder_of((fast, invariant), W4, NO_TABLES, ONE, frozenset())[0].candidate.kernel == "sized"
    )
    varying = sized("sized", False)
    assert ladder_of((fast, varying), W4, NO_TABLES, ONE, frozenset())[0].candidate.kernel == "fast"


@pytest.mark.parametrize(
    ("problem", "kernel"),
    [(W4, "triton_int_group"), (W4A8, "triton_w4a8"), (W8A8, "triton_int8")],
)
def test_one_choice_on_a_gpu_is_a_kernel_that_does_not_depend_on_m(
    problem: Problem, kernel: str
) -> None:
    chosen = {
        (found.chosen, found.config)
        for found in (explain(problem.at(size), policy=ONE) for size in problem.buckets)
    }
    assert len(chosen) == 1 and chosen.pop()[0] == kernel


@pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
def test_a_row_has_the_same_bits_in_any_batch() -> None:
    from fake_kernels import pack

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = explain(W4, policy=ONE).config
    layout = GEMM.prepare(pack(torch.randn(40, 256), IntGroupOptions(4, 128)), torch.float16)
    x = torch.randn(33, 256, device=device).half()
    whole = GEMM.launch(x, layout, config)
    for m in (1, 2, 7, 16):
        assert torch.equal(GEMM.launch(x[:m].contiguous(), layout, config), whole[:m])


def test_order_of_kernels() -> None:
    known = {"a": fake("a", 0.0), "b": fake("b", 0.0, 1), "c": fake("c", 0.0)}
    times = {Candidate("a"): 1.0, Candidate("b"): 1.02, Candidate("c"): 0.5}
    assert ranked(times, known) == (("c", 0.5), ("b", 1.02), ("a", 1.0))


def test_a_refusal_for_memory_does_not_count() -> None:
    full = fake("full", 1e-9, 0, Reason("MEMORY", "needs more, got less", "wait"))
    never = fake("never", 1e-9, 0, Reason("ARCH", "needs more, got less", "buy"))
    found = times_of((full, never, reference.KERNEL), W4, NO_TABLES)
    assert {candidate.kernel for candidate in found} == {"full", "reference"}
