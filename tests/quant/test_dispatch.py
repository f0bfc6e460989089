"""Choice of kernels: buckets, ranking, plans, rules, tables, explanations."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch

from fake_kernels import fake, only, pack
from fewbit.quant import cpu, cpu_int8, dispatch, reference
from fewbit.quant.dispatch import explain, kernels, m_bucket, problem_of
from fewbit.quant.errors import NoKernelError
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.kernel import M_BUCKETS, Compiled, Config, Kernel, Problem, Reason
from fewbit.quant.machine import load_device, this_device
from fewbit.quant.packed import PackedTensor
from fewbit.quant.policy import Policy, parse_rules, use_kernels
from fewbit.quant.runner import Runner
from fewbit.quant.tuned import Tables
from fewbit.quant.tuned_file import Layered
from fewbit.quant.tuned_table import Entry, Quarantined, Row, Table, fingerprint

BF16 = torch.bfloat16
W4 = Problem("int_group", IntGroupOptions(), 1, 1, 4096, 4096, BF16, "cpu")
vectorised = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch's packed operators need AVX2 or AVX-512",
)


@pytest.fixture(autouse=True)
def no_forced_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWBIT_KERNEL", raising=False)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "DENSE_BUDGET", cpu.DenseBudget(lambda: 0, limit=0))


@pytest.mark.parametrize(
    ("m", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (33, 48), (4096, 4096), (9999, 4096)]
)
def test_rows_round_up_to_a_bucket(m: int, bucket: int) -> None:
    assert m_bucket(m) == bucket


def test_all_kernels_are_known_by_their_names() -> None:
    assert {"int4pack", "int8pack", "dense_cached", "dense_chunked", "reference"} <= set(kernels())
    assert all(name == kernel.name for name, kernel in kernels().items())


@vectorised
@pytest.mark.parametrize("m", M_BUCKETS)
def test_default_plan_of_w4a16(m: int) -> None:
    chosen = explain(replace(W4, m_bucket=m)).chosen
    assert chosen == ("int4pack" if m <= 4 else "dense_cached")


@vectorised
@pytest.mark.parametrize("m", M_BUCKETS)
def test_default_plan_of_w8a16_by_row(m: int) -> None:
    problem = replace(W4, options=IntGroupOptions(8, "row"), m_bucket=m)
    assert explain(problem).chosen == ("int8pack" if m <= 4 else "dense_cached")


@vectorised
@pytest.mark.parametrize("m", M_BUCKETS)
@pytest.mark.usefixtures("no_memory")
def test_default_plan_without_memory(m: int) -> None:
    chosen = explain(replace(W4, m_bucket=m)).chosen
    assert chosen == ("int4pack" if m <= 32 else "dense_chunked")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("m", M_BUCKETS)
def test_other_dtypes_never_reach_the_packed_operators(dtype: torch.dtype, m: int) -> None:
    for options in (IntGroupOptions(), IntGroupOptions(8, "row")):
        found = explain(replace(W4, options=options, dtype=dtype, m_bucket=m))
        assert found.chosen == "dense_cached"
        assert {"int4pack", "int8pack"} <= set(found.refused)


def test_only_the_reference_runs_elsewhere() -> None:
    found = explain(replace(W4, device="meta"))
    assert found.chosen == "reference"
    assert [name for name, _ in found.eligible] == ["reference"]


def test_time_then_priority_then_name_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, fake("d", 1e-9), fake("a", 2e-9), fake("c", 1e-9, 1), fake("b", 1e-9, 1))
    found = explain(W4)
    assert [name for name, _ in found.eligible] == ["b", "c", "d", "a", "reference"]
    assert found.chosen == "b"


def test_estimates_within_three_percent_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    near = (fake("d", 1.029e-9), fake("c", 1.02e-9, 1), fake("b", 1.031e-9, 9), fake("e", 1e-9))
    for known in (near, near[::-1]):
        only(monkeypatch, *known)
        order = [name for name, _ in explain(W4).eligible]
        # c before e and d by priority, d before e by name; b is too slow to profit from its priority
        assert order == ["c", "d", "e", "b", "reference"]


def test_a_kernel_that_does_not_apply_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, fake("a", 2e-9))
    before = explain(W4)
    only(monkeypatch, fake("a", 2e-9), fake("b", 1e-9, 9, Reason("ARCH", "needs more", "buy")))
    after = explain(W4)
    assert (after.chosen, after.eligible) == (before.chosen, before.eligible)
    assert set(after.refused) - set(before.refused) == {"b"}


def test_every_kernel_is_either_eligible_or_refused_with_a_reason() -> None:
    for m in (1, 48):
        for dtype in (BF16, torch.float32):
            found = explain(replace(W4, m_bucket=m, dtype=dtype))
            eligible = {name for name, _ in found.eligible}
            assert not eligible & set(found.refused)
            ours = {name for name, kernel in kernels().items() if kernel.op == "linear"}
            assert eligible | set(found.refused) == ours | set(cpu.DENIED_OPS)
            assert all(reasons for reasons in found.refused.values())


def test_explanation_as_text_and_json() -> None:
    found = explain(replace(W4, dtype=torch.float32, m_bucket=48))
    text = found.text()
    assert text.splitlines()[0] == str(found.problem)
    assert " CHOSEN dense_cached" in text
    assert " no     int4pack: DTYPE" in text and " no     int4pack: SHAPE_M" in text
    assert "got torch.float32 (load the model with dtype=torch.bfloat16)" in text
    data = json.loads(json.dumps(found.as_dict()))
    assert data["chosen"] == "dense_cached" and data["forced"] is False
    assert [entry["kernel"] for entry in data["eligible"]][-1] == "reference"
    assert data["refused"]["int4pack"][0]["code"] == "DTYPE"


def test_the_limit_is_explained_where_rates_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    h200 = load_device("h200")
    only(monkeypatch, fake("half", 2 * 1.8018e-6 - 1e-6))
    found = explain(replace(W4, device="cuda", machine=h200))
    assert found.limit is not None and found.limit.bound == "memory"
    assert found.as_dict()["limit"] == {
        "bound": "memory", "seconds": found.limit.seconds, "share": found.limit.share,
        "estimated": True,
    }  # fmt: skip
    assert found.limit.share == pytest.approx(0.5, abs=2e-3)
    assert (
        found.text().splitlines()[-1] == " limit  memory 1.8 us estimated; half reaches 50% of it"
    )
    unknown = explain(W4)
    assert unknown.limit is None and unknown.as_dict()["limit"] is None
    assert unknown.text().splitlines()[-1].startswith(" limit  unknown")


def test_same_inputs_give_the_same_explanation() -> None:
    first, second = explain(W4), explain(W4)
    assert first.as_dict() == second.as_dict()


def test_forced_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(torch.randn(32, 64), IntGroupOptions(4, 32))
    x = torch.randn(2, 64)
    expected = Runner(packed).linear(x)
    for name in ("reference", "dense_chunked", "dense_cached"):
        monkeypatch.setenv("FEWBIT_KERNEL", name)
        runner = Runner(packed)
        found = runner.explain(2, x.dtype, "cpu")
        assert found.chosen == name and found.forced
        assert "forced by FEWBIT_KERNEL" in found.text()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.allclose(runner.linear(x), expected, rtol=1e-6, atol=1e-6)


def test_forced_kernel_that_refuses_lists_all_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBIT_KERNEL", "int4pack")
    runner = Runner(pack(torch.randn(30, 64), IntGroupOptions(4, 16)))
    with pytest.raises(NoKernelError) as error:
        runner.linear(torch.randn(2, 64))
    message = str(error.value)
    for part in ("int4pack: DTYPE", "int4pack: SHAPE_N", "int4pack: GROUP", "dense_cached"):
        assert part in message


def test_forced_denied_operator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBIT_KERNEL", "aten::_scaled_mm")
    with pytest.raises(NoKernelError, match="reference code on x86"):
        Runner(pack(torch.randn(16, 32), IntGroupOptions(4, 32))).linear(torch.randn(1, 32))


def test_forced_unknown_kernel_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBIT_KERNEL", "dense_cache")
    runner = Runner(pack(torch.randn(16, 32), IntGroupOptions(4, 32)))
    with pytest.raises(NoKernelError, match="did you mean 'dense_cached'"):
        runner.linear(torch.randn(1, 32))


def test_problem_of_a_weight() -> None:
    packed = pack(torch.randn(8, 40), IntGroupOptions(3, 16))
    assert problem_of(packed, 5, BF16, "cpu") == Problem(
        "int_group", IntGroupOptions(3, 16), 1, 8, 8, 40, BF16, "cpu", machine=this_device("cpu")
    )
    assert problem_of(packed, 5, BF16, "meta").machine is None


def test_falling_back_to_the_reference_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, fake("never", 1e-9, 0, Reason("ARCH", "no", "no")))
    dispatch._warn_fallback.cache_clear()
    packed = pack(torch.randn(16, 32), IntGroupOptions(4, 32))
    with pytest.warns(RuntimeWarning, match="no kernel runs int_group weights on cpu") as caught:
        for m in (1, 100):
            Runner(packed).linear(torch.randn(m, 32))
    assert len(caught) == 1
    dispatch._warn_fallback.cache_clear()


# ---- inputs rounded to an activation format ----------------------------------------------------

W8A8 = replace(W4, options=IntGroupOptions(8, "row"), activation="int8_token")
integers = pytest.mark.skipif(
    cpu_int8._trial("int8_onednn") is not None, reason="oneDNN's int8 product is no use here"
)


@integers
@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float16])
@pytest.mark.parametrize("m", M_BUCKETS)
def test_default_plan_of_integer_problems(m: int, dtype: torch.dtype) -> None:
    found = explain(replace(W8A8, m_bucket=m, dtype=dtype))
    assert found.chosen == "int8_onednn"
    assert {reason.code for reason in found.refused["int8pack"]} >= {"ACTIVATION"}


def test_an_explanation_shows_the_activation() -> None:
    found = explain(W8A8)
    assert "activation=int8_token" in found.text().splitlines()[0]
    data = json.loads(json.dumps(found.as_dict()))
    assert data["activation"] == "int8_token" and "activation=int8_token" in data["problem"]
    assert explain(W4).as_dict()["activation"] is None


def test_problem_of_rounded_inputs() -> None:
    packed = pack(torch.randn(8, 40), IntGroupOptions(3, 16))
    found = problem_of(packed, 5, BF16, "cpu", "int8_token")
    assert found == replace(problem_of(packed, 5, BF16, "cpu"), activation="int8_token")


# ---- plans, configs, rules, tables ---------------------------------------------------------------

SMALL, LARGE = (("block_m", 16),), (("block_m", 128),)


def open_kernel(name: str = "open", unit: float = 1e-6) -> Kernel:
    """A kernel with two configs: one grows with M, the other costs the same up to 64 rows."""

    def seconds(problem: Problem, config: Config, compiled: Compiled | None = None) -> float:
        m = problem.m_bucket
        return (10 + m if config == SMALL else 40 * -(-m // 64)) * unit

    def launch(x: torch.Tensor, layout: PackedTensor, config: Config) -> torch.Tensor:
        return reference.linear(x, layout) + dict(config)["block_m"]

    return replace(
        fake(name, 0.0),
        seconds=seconds,
        launch=launch,
        configs=lambda problem: (SMALL, LARGE),
        source="s1",
    )


def test_a_plan_has_a_config_for_each_range(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, open_kernel())
    found = explain(replace(W4, m_bucket=24))
    assert (found.chosen, found.config, found.first, found.last) == ("open", SMALL, 1, 24)
    assert " CHOSEN open {block_m 16} 34.0 us estimated, for M = 1 to 24" in found.text()
    found = explain(replace(W4, m_bucket=48))
    assert (found.config, found.first, found.last) == (LARGE, 25, None)
    assert "for M = 25 and more" in found.text()
    data = json.loads(json.dumps(found.as_dict()))
    assert data["config"] == {"block_m": 128} and data["sizes"] == [25, None]
    assert data["origin"] == "model"


def test_the_chosen_config_reaches_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, open_kernel(unit=1e-12))
    packed = pack(torch.randn(16, 32), IntGroupOptions(4, 32))
    for m, added in ((1, 16), (64, 128)):
        x = torch.randn(m, 32)
        y = Runner(packed).linear(x)
        assert torch.allclose(y, reference.linear(x, packed) + added, atol=1e-5)


def test_one_choice_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, open_kernel())
    one = Policy((), True)
    only(monkeypatch, open_kernel(unit=1e-12))
    chosen = {explain(replace(W4, m_bucket=m), policy=one).config for m in M_BUCKETS}
    assert len(chosen) == 1
    packed = pack(torch.randn(16, 32), IntGroupOptions(4, 32))
    x = torch.randn(40, 32)
    monkeypatch.setenv("FEWBIT_DETERMINISTIC", "1")
    whole = Runner(packed).linear(x)
    assert torch.equal(Runner(packed).linear(x[:1]).int(), whole[:1].int())


def test_rules_force_and_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, fake("fast", 1e-9), fake("slow", 2e-9))

    def chosen(rules: str, **changes: object) -> str:
        policy = Policy((parse_rules(rules, "test"),))
        return explain(replace(W4, **changes), policy=policy).chosen  # type: ignore[arg-type]

    assert chosen("linear@m<=16=slow") == "slow"
    assert chosen("linear@m<=16=slow", m_bucket=24) == "fast"
    assert chosen("!=fast") == "slow" and chosen("!=*a*") == "slow"
    found = explain(W4, policy=Policy((parse_rules("!=fast", "test"),)))
    assert [reason.code for reason in found.refused["fast"]] == ["DISABLED"]
    assert "left out by test: !=fast" in found.text()
    with pytest.raises(NoKernelError, match=r"no kernel is left for linear[\s\S]*reference: DISAB"):
        chosen("!=*")
    assert chosen("fast; !=fast") == "fast" and chosen("!=fast; fast") == "slow"
    with pytest.raises(NoKernelError, match=r"test: 'fats' names no kernel .did you mean 'fast'"):
        chosen("linear:w8a8=fats")


def test_use_kernels_holds_inside_only(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(torch.randn(16, 32), IntGroupOptions(4, 32))
    runner = Runner(packed)
    x = torch.randn(2, 32)
    only(monkeypatch, fake("plain", 1e-9), open_kernel())
    assert torch.equal(runner.linear(x), reference.linear(x, packed))
    with use_kernels("linear=open"):
        assert torch.allclose(runner.linear(x), reference.linear(x, packed) + 16, atol=1e-5)
    assert torch.equal(runner.linear(x), reference.linear(x, packed))


def table(**changes: object) -> Tables:
    """One complete row for W4 on an H200, by which `open` runs its small config everywhere."""
    entries = tuple(
        Entry(
            size=m, kernel="open", config=SMALL, us=5.0, p10=4.9, p90=5.1, ideal_us=2.0,
            model_us=10.0, runner_up="", source="s1", digest="", verified="rel 1.0e-04",
        )
        for m in M_BUCKETS
    )  # fmt: skip
    family = replace(W4, device="cuda").family
    row = Row(family, entries, "2026-11-24T00:00:00Z", ())
    of = fingerprint(load_device("h200"))
    assert of is not None
    held = Table(of, (replace(row, **changes),))  # type: ignore[arg-type]
    return Tables([Layered("user", "test.json", held)])


def on_h200(**changes: object) -> Problem:
    return replace(W4, device="cuda", machine=load_device("h200"), **changes)  # type: ignore[arg-type]


def test_a_tuned_row_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, open_kernel(), fake("other", 1e-9))
    found = explain(on_h200(m_bucket=64), tables=table())
    assert (found.chosen, found.config, found.origin) == ("open", SMALL, "table")
    assert "measured, for M = 1 and more" in found.text()
    assert explain(on_h200(m_bucket=64)).chosen == "other"
    ruled = explain(on_h200(), tables=table(), policy=Policy((parse_rules("other", "t"),)))
    assert ruled.chosen == "other"


def test_a_kernel_that_needs_proof_is_never_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the row of this very family, or a rule, chooses it; not even a near row does."""
    only(monkeypatch, replace(open_kernel(unit=1e-9), measured_only=True), fake("other", 1e-6))
    found = explain(on_h200())
    assert found.chosen == "other" and "open" not in dict(found.eligible)
    assert [reason.code for reason in found.refused["open"]] == ["UNMEASURED"]
    assert "open: UNMEASURED not measured to be 1.05 times as fast" in found.text()
    near = explain(on_h200(n=6144), tables=table())
    assert near.chosen == "other" and near.refused["open"][0].code == "UNMEASURED"
    measured = explain(on_h200(m_bucket=64), tables=table())
    assert (measured.chosen, measured.origin) == ("open", "table")
    assert "open" not in measured.refused
    for one_for_all in (False, True):
        forced = Policy((parse_rules("open", "t"),), one_for_all)
        assert explain(on_h200(), policy=forced).chosen == "open"
    assert explain(on_h200(), tables=table(), policy=Policy((), True)).chosen == "other"


def test_an_estimate_in_a_table_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, replace(open_kernel(unit=1e-9), measured_only=True), fake("other", 1e-6))
    entries = tuple(
        Entry(
            size=m, kernel="open", config=SMALL, us=5.0, p10=5.0, p90=5.0, ideal_us=2.0,
            model_us=5.0, runner_up="", source="s1", digest="", verified="", measured=False,
        )
        for m in M_BUCKETS
    )  # fmt: skip
    found = explain(on_h200(), tables=table(ladder=entries))
    assert found.chosen == "other" and found.refused["open"][0].code == "UNMEASURED"


def test_a_row_of_another_shape_corrects_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = replace(open_kernel("open"), seconds=lambda p, c, compiled=None: 1.2e-6)
    only(monkeypatch, slow, fake("other", 1e-6))
    assert explain(on_h200(n=8192)).chosen == "other"
    found = explain(on_h200(n=8192), tables=table())  # measured half of what the model said
    assert found.chosen == "open" and found.origin == "near"
    assert "estimated from a near shape" in found.text()
    assert explain(on_h200(n=16384), tables=table()).chosen == "other"


def test_an_edited_kernel_is_decided_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, replace(open_kernel(), source="s2"), fake("other", 1e-9))
    with pytest.warns(RuntimeWarning, match="stale"):
        assert explain(on_h200(), tables=table()).chosen == "other"


def test_two_processes_agree() -> None:
    script = (
        "import torch, json\n"
        "from fewbit.quant.dispatch import explain\n"
        "from fewbit.quant.kernel_report import problem_for, recipe_layers\n"
        "from fewbit.quant.machine import load_device\n"
        "h200 = load_device('h200')\n"
        "print(json.dumps([explain(problem_for(layer, (m, 6144, 4096), torch.bfloat16, h200))"
        ".as_dict() for layer in recipe_layers() for m in (1, 16, 2048)]))\n"
    )
    env = {**os.environ, "FEWBIT_AUTOTUNE": "off"}
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, check=True,
            env={**env, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1 and len(outputs.pop()) > 1000


def test_stronger_layers_defeat_weaker_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, fake("fast", 1e-9), fake("slow", 2e-9))
    forced, without = parse_rules("linear=fast", "strong"), parse_rules("!=fast", "weak")
    assert explain(W4, policy=Policy((forced, without))).chosen == "fast"
    assert explain(W4, policy=Policy((without, forced))).chosen == "slow"


def test_a_bare_name_speaks_of_its_own_op_only(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(fake("other", 1e-9), op="attend")
    only(monkeypatch, fake("fast", 1e-9), other)
    assert explain(W4, policy=Policy((parse_rules("other", "t"),))).chosen == "fast"
    with pytest.raises(NoKernelError, match=r"other cannot run .* it is for another op"):
        explain(W4, policy=Policy((parse_rules("linear=other", "t"),)))


def test_a_rule_about_other_problems_leaves_a_tuned_row_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only(monkeypatch, open_kernel(), fake("other", 1e-9))
    unrelated = Policy((parse_rules("attend=open", "t"),))
    found = explain(on_h200(m_bucket=64), tables=table(), policy=unrelated)
    assert (found.origin, found.config) == ("table", SMALL)
    assert dict(found.eligible)["open"] == pytest.approx(5e-6)
    forced = Policy((parse_rules("linear=open", "t"),))
    assert explain(on_h200(m_bucket=64), tables=table(), policy=forced).config == SMALL


def test_quarantined_kernels_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, open_kernel(), fake("other", 1e-9))
    of = fingerprint(load_device("h200"))
    assert of is not None
    tables = Tables(
        [Layered("user", "q", Table(of, (), (Quarantined("open", (), "s1", "DEATH"),)))]
    )
    found = explain(on_h200(), tables=tables)
    assert [reason.code for reason in found.refused["open"]] == ["QUARANTINED"]
    with pytest.raises(NoKernelError, match="open: QUARANTINED"):
        explain(on_h200(), tables=tables, policy=Policy((parse_rules("open", "t"),)))


def test_a_row_with_a_config_that_is_not_offered_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, replace(open_kernel(), configs=lambda problem: (LARGE,)))
    found = explain(on_h200(), tables=table())
    assert found.origin != "table" and found.config == LARGE


def test_one_choice_for_all_sizes_that_nothing_allows_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no = (Reason("SHAPE_M", "no, got", "no"),)
    small = replace(fake("small", 1e-9), refuse=lambda p: () if p.m_bucket < 64 else no)
    large = replace(fake("large", 1e-9), refuse=lambda p: no if p.m_bucket < 64 else ())
    only(monkeypatch, small, large)
    policy = Policy((parse_rules("!=reference", "t"),), True)
    with pytest.raises(NoKernelError, match="no kernel and config that rules leave"):
        explain(W4, policy=policy)


def test_a_forced_kernel_keeps_one_config_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, open_kernel())
    policy = Policy((parse_rules("open", "t"),), True)
    assert len({explain(replace(W4, m_bucket=m), policy=policy).config for m in M_BUCKETS}) == 1
