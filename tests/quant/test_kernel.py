"""A problem prints all that a kernel may refuse it for."""

from dataclasses import replace

import torch

from fewbit.quant.formats.fle import FleOptions
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.kernel import Device, Peaks, Problem

LAB = Device(
    name="lab", title="Lab GPU", backend="cuda", cc=(9, 0), isa=(), sms=8, smem_block_bytes=None,
    smem_sm_bytes=None, registers=None, l2_bytes=None, memory_bytes=None,
    bandwidth_bytes_per_second=None, launch_seconds=None, peak_ops_per_second=Peaks(), source="made",
)  # fmt: skip


def test_problem_prints_one_line() -> None:
    problem = Problem(
        format="int_group",
        options=IntGroupOptions(bits=3, group="row", symmetric=False),
        n_terms=1,
        m_bucket=48,
        n=4096,
        k=11008,
        dtype=torch.bfloat16,
        device="cpu",
    )
    assert str(problem) == (
        "linear int_group bits=3 group=row symmetric=False scale=fp16 N=4096 K=11008 M<=48 "
        "bfloat16 cpu"
    )


def test_number_of_terms_is_printed_if_it_matters() -> None:
    problem = Problem("int_group", IntGroupOptions(), 2, 1, 8, 16, torch.float32, "cuda")
    assert " terms=2 N=8 K=16 M<=1 float32 cuda" in str(problem)


def test_what_options_do_not_compare_is_no_part_of_a_family() -> None:
    few, many = (
        Problem("fle4", FleOptions(n), 1, 1, 8, 16, torch.bfloat16, "cuda") for n in (0, 9)
    )
    assert few == many and few.family == many.family == "linear fle4 N=8 K=16 * bfloat16 cuda"


def test_only_a_machine_elsewhere_is_described() -> None:
    problem = Problem("int_group", IntGroupOptions(), 1, 1, 8, 16, torch.float32, "cuda")
    assert problem.described is None
    elsewhere = replace(problem, machine=LAB)
    assert elsewhere.described is LAB and str(elsewhere).endswith(" cuda (Lab GPU sm_90)")
    assert replace(problem, machine=replace(LAB, present=True)).described is None
    assert hash(elsewhere) != hash(problem)
