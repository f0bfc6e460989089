"""Checks of attention over pages: torch's way passes, wrong answers fail."""

from dataclasses import replace

import pytest
import torch

from bench.oracle_attention import (
    CASES,
    GROUPS,
    TOKENS,
    Case,
    attention_problem,
    filled_view,
    lanes,
    plain_attention,
    scoring_of,
)
from bench.oracle_check import Place, row_error
from fewbit.quant import kv_softmax
from fewbit.quant.kernel import Kernel
from fewbit.quant.machine import load_device

PLACE = Place("cpu", load_device("h100"))
FEW = replace(PLACE, reduced=True)


def kernel(launch):
    return Kernel("stand_in", lambda p: (), lambda p, d: None, launch, lambda p: 1.0, op="attend")


def checks(launch, place=FEW, n_lanes=None):
    found = [step() for lane in lanes(kernel(launch), place)[:n_lanes] for step in lane]
    return [check for check in found if check is not None]


def test_torch_passes():
    found = checks(kv_softmax.attend)
    assert len(found) >= 12
    for check in found:
        assert check.error() <= check.tolerance, check.case


def test_wrong_answers_fail():
    def scaled(view, query, scoring):
        return kv_softmax.attend(view, query, replace(scoring, scaling=1.1 * scoring.scaling))

    def late(view, query, scoring):
        return kv_softmax.attend(view, query, scoring).roll(1, 1)

    for launch in (scaled, late):
        found = [check for check in checks(launch) if "T=300" in check.case and "G=4" in check.case]
        assert found and all(check.error() > check.tolerance for check in found)


def test_every_number_of_tokens_and_heads_is_used():
    lane = lanes(kernel(kv_softmax.attend), PLACE)[0]
    assert {step.args[4] for step in lane} == {(t, g) for t in TOKENS for g in GROUPS}
    assert {case.extras for case in CASES} == {(), ("mask",), ("softcap",), ("sinks",)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_a_call_that_torch_takes(case):
    view = filled_view("int4_head", case, 70, torch.float16, "cpu")
    shape = (case.n_rows, 2 * case.kv_heads, case.n_queries, case.head_dim)
    query = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    scoring = scoring_of(case, query.shape[1], 70, torch.float16, "cpu")
    found = kv_softmax.attend(view, query, scoring)
    assert found.shape == shape and torch.isfinite(found).all()
    problem = attention_problem("int4_head", case, 2, 70, torch.float16, PLACE)
    assert (problem.t_bucket, problem.group, problem.extras) == (128, 2, case.extras)


def test_masks_hide_the_padding_of_all_rows_but_the_first():
    mask = scoring_of(CASES[3], 4, 10, torch.float16, "cpu").mask
    assert mask.shape == (3, 1, 1, 10) and mask[0].all()
    assert [int(row.sum()) for row in mask] == [10, 6, 2]
    assert scoring_of(CASES[3], 4, 1, torch.float16, "cpu").mask.all()


def test_slots_behind_the_last_token_are_poisoned():
    case = Case("plain")
    view = filled_view("int4_head", case, 65, torch.float16, "cpu")
    scale = view.pages.keys["scale"]
    page = view.pages.table[0, 1]
    assert torch.isfinite(scale[page, :, 0]).all() and torch.isnan(scale[page, :, 1:]).all()


def test_the_oracle_in_fp64_agrees_with_torch_in_fp32():
    case = Case("plain", n_queries=3)
    view = filled_view("int4_head", case, 65, torch.float16, "cpu")
    query = torch.randn(2, 4, 3, 128)
    wanted = plain_attention(view, query, 0.1)
    scoring = replace(scoring_of(case, 4, 65, torch.float16, "cpu"), scaling=0.1)
    assert row_error(kv_softmax.attend(view, query, scoring), wanted) < 1e-5
