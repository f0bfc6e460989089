"""Rules: what parses, what matches, which layer wins, and where they are read from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbit.quant.errors import RecipeError
from fewbit.quant.formats.int4_head import Int4HeadOptions
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.formats.int_two_level import IntTwoLevelOptions
from fewbit.quant.kernel import AttentionProblem, Problem, RowsProblem
from fewbit.quant.policy import (
    Policy,
    context_rules,
    current_policy,
    environment,
    parse_rules,
    use_kernels,
    weight_names,
)

BF16 = torch.bfloat16
W4 = Problem("int_group", IntGroupOptions(), 1, 16, 64, 64, BF16, "cuda")
W4A8 = Problem("int_two_level", IntTwoLevelOptions(), 1, 128, 64, 64, BF16, "cuda", "int8_token")
ATTEND = AttentionProblem(
    "int4_head", Int4HeadOptions(), "int4_head", Int4HeadOptions(), 1, 1, 8, 4, 128, 128, 4096,
    BF16, "cuda",
)  # fmt: skip


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("FEWBIT_KERNEL", "FEWBIT_KERNEL_FILE", "FEWBIT_DETERMINISTIC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def test_the_line_of_the_documentation() -> None:
    first, second = parse_rules("linear:w4a16@m<=64=mma_sk; !=triton_*", "here")
    assert (first.op, first.weights, first.relation, first.size) == ("linear", "w4a16", "<=", 64)
    assert first.kernel == "mma_sk" and not first.leaves_out and first.origin == "here"
    assert second.leaves_out and second.kernel == "triton_*" and second.op is None


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("x", (True, True, True)),
        ("linear=x", (True, True, False)),
        ("attend=x", (False, False, True)),
        ("linear:int_group=x", (True, False, False)),
        ("linear:w4a8=x", (False, True, False)),
        ("linear:w4a16@m<=16=x", (True, False, False)),
        ("linear@m<=15=x", (False, False, False)),
        ("linear@m>=17=x", (False, True, False)),
        ("linear@m=16=x", (True, False, False)),
        ("attend:int4_head@t>=4096=x", (False, False, True)),
        ("attend:dense_head=x", (False, False, False)),
    ],
)
def test_what_a_rule_is_about(text: str, matches: tuple[bool, ...]) -> None:
    (rule,) = parse_rules(text, "here")
    assert tuple(rule.matches(problem) for problem in (W4, W4A8, ATTEND)) == matches
    policy = Policy(((rule,),))
    assert [policy.forced(problem) is rule for problem in (W4, W4A8, ATTEND)] == list(matches)


@pytest.mark.parametrize(
    "text", ["linear:", "linear@m<64=x", "linear@=x", "a b=c d=e", "=x", "m<=64=x=y", "x;!="]
)
def test_what_is_no_rule_is_named(text: str) -> None:
    with pytest.raises(RecipeError, match=r"FEWBIT_KERNEL: .* is not a rule; a rule is KERNEL"):
        parse_rules(text, "FEWBIT_KERNEL")


def test_names_of_weights() -> None:
    assert weight_names(W4) == ("int_group", "w4a16")
    assert weight_names(W4A8) == ("int_two_level", "w4a8")
    assert weight_names(replace(W4, options=IntGroupOptions(3))) == ("int_group", "w3a16")
    assert weight_names(RowsProblem("quantize_rows", None, 1, 64, BF16, "cuda")) == ()


def test_patterns_leave_out_where_they_match() -> None:
    policy = Policy((parse_rules("linear:w4a16!=triton_*; !=dense_?ached", "here"),))
    assert policy.left_out(W4, "triton_int_group") and not policy.left_out(W4A8, "triton_int8")
    assert policy.left_out(W4A8, "dense_cached") and not policy.left_out(W4, "reference")
    assert policy.forced(W4) is None


def test_the_innermost_layer_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rules = tmp_path / "fewbit" / "kernels.txt"
    rules.parent.mkdir()
    rules.write_text("# mine\nlinear:w4a16 = from_file\nattend=from_file  # all of it\n")

    def names() -> list[str | None]:
        found = [current_policy().forced(problem) for problem in (W4, W4A8, ATTEND)]
        return [rule and rule.kernel for rule in found]

    assert names() == ["from_file", None, "from_file"]
    monkeypatch.setenv("FEWBIT_KERNEL", "linear=from_env")
    assert names() == ["from_env", "from_env", "from_file"]
    with use_kernels("linear:w4a8=outer"):
        assert names() == ["from_env", "outer", "from_file"]
        with use_kernels("linear:w4a8=inner"):
            assert names() == ["from_env", "inner", "from_file"]
        assert names()[1] == "outer" and len(context_rules()) == 1
    assert names() == ["from_env", "from_env", "from_file"] and context_rules() == ()
    called = current_policy().on_top(parse_rules("called", "the call"))
    assert called.forced(W4).origin == "the call"  # type: ignore[union-attr]


def test_the_files_name_can_be_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = tmp_path / "site.txt"
    given.write_text("!=reference")
    monkeypatch.setenv("FEWBIT_KERNEL_FILE", str(given))
    assert environment().left_out(W4, "reference").origin == str(given)  # type: ignore[union-attr]
    monkeypatch.setenv("FEWBIT_KERNEL_FILE", str(tmp_path / "missing.txt"))
    with pytest.raises(RecipeError, match=r"missing\.txt' cannot be read"):
        environment()


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment() == Policy()
    monkeypatch.setenv("FEWBIT_DETERMINISTIC", "1")
    assert environment().one_for_all_sizes
    monkeypatch.setenv("FEWBIT_DETERMINISTIC", "yes")
    with pytest.raises(RecipeError, match="FEWBIT_DETERMINISTIC must be 0 or 1, got 'yes'"):
        environment()
