"""Golden decisions: what the dispatcher chooses on every described machine, stored and stable.

`python tests/quant/test_decisions.py` writes the file anew, after a change that is meant to move them.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbit.quant import dispatch
from fewbit.quant.dispatch import Explanation, explain, kernels
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.kernel import AttentionProblem, Kernel, Problem, Reason
from fewbit.quant.kernel_report import Layer, attention_for, problem_for, recipe_layers
from fewbit.quant.machine import device_names, load_device
from fewbit.quant.recipe import WeightRule

GOLDEN = Path(__file__).parent / "golden_decisions.json"
M = (1, 4, 16, 64, 128, 2048)
BF16 = torch.bfloat16


def cases() -> list[tuple[Layer, tuple[int, int, int], torch.dtype]]:
    """Every shipped pair of formats at six M, and odd ones: dtypes, options, ragged sizes."""
    usual = [(layer, (m, 4096, 4096), BF16) for layer in recipe_layers() for m in M]
    odd = (
        (IntGroupOptions(2, 32), (1, 4096, 14336), BF16),
        (IntGroupOptions(4, 16), (1, 4096, 4096), BF16),
        (IntGroupOptions(4, 128, symmetric=False), (8, 28672, 4096), BF16),
        (IntGroupOptions(8, "row", symmetric=False), (1, 4096, 4096), BF16),
        (IntGroupOptions(4, 128), (1, 4100, 4000), torch.float16),
        (IntGroupOptions(4, 128), (16, 4096, 4096), torch.float32),
        (IntGroupOptions(4, 128), (3, 72, 40), BF16),
    )
    return usual + [(Layer(WeightRule("int_group", o), None), *rest) for o, *rest in odd]


# Rows, new tokens, KV heads, query heads for each, channels, tokens.
ATTENTION = ((1, 1, 8, 4, 128, 1024), (16, 1, 8, 8, 128, 32768), (2, 8, 2, 1, 64, 300))


def problems() -> dict[str, dict[str, Problem | AttentionProblem]]:
    """Machine -> what the problem says -> problem."""
    found: dict[str, dict[str, Problem | AttentionProblem]] = {}
    for name in device_names():
        machine = load_device(name)
        posed: list[Problem | AttentionProblem] = [
            problem_for(layer, shape, dtype, machine) for layer, shape, dtype in cases()
        ]
        posed += [attention_for("int4_head", shape, BF16, machine) for shape in ATTENTION]
        found[name] = {str(replace(p, machine=None)): p for p in posed}
    return found


def summary(found: Explanation) -> str:
    """`int4pack 1-4 > dense_cached > ...; memory 216.0 us; no int8pack: ARCH GROUP, ...`."""
    limit = found.limit
    bound = f"{limit.bound} {limit.seconds * 1e6:.3g} us" if limit else "no limit"
    chosen = f"{found.candidate} {found.first}-{found.last or ''}"
    order = [chosen, *(name for name, _ in found.eligible if name != found.chosen)]
    refused = ", ".join(
        f"{name}: {' '.join(reason.code for reason in reasons)}"
        for name, reasons in sorted(found.refused.items())
    )
    return f"{' > '.join(order)}; {bound}; no {refused}"


def decisions() -> dict[str, dict[str, str]]:
    return {
        name: {text: summary(explain(problem)) for text, problem in posed.items()}
        for name, posed in problems().items()
    }


def encoded() -> str:
    return json.dumps(decisions(), indent=1) + "\n"


def test_decisions_are_the_stored_ones() -> None:
    stored = json.loads(GOLDEN.read_text())
    found = decisions()
    assert len(found) == 8 and all(len(entries) >= 40 for entries in found.values())
    assert list(found) == list(stored)
    for name, entries in found.items():
        assert entries == stored[name], f"on {name}"


def test_described_machines_are_judged_by_their_facts_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The memory, the instructions and the trials of this machine have no part in it."""
    before = decisions()
    monkeypatch.setattr(dispatch.cpu, "DENSE_BUDGET", dispatch.cpu.DenseBudget(lambda: 0, limit=0))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(dispatch.cpu_int8, "_trial", lambda name: "fails")
    assert decisions() == before


def test_a_kernel_that_does_not_apply_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    no = (Reason("ARCH", "needs more, got less", "buy"),)
    never = Kernel(
        "a_never", lambda p: no, lambda w, d: w, lambda x, w: x, lambda p: 0.0, priority=99
    )
    for table in (
        {"a_never": never, **kernels()},
        {**kernels(), "a_never": never},
        dict(reversed(kernels().items())),
    ):
        with monkeypatch.context() as patch:
            before = {p: explain(p) for p in problems()["cpu"].values()}
            patch.setattr(dispatch, "kernels", lambda table=table: table)
            for problem, was in before.items():
                now = explain(problem)
                assert (now.chosen, now.eligible, now.limit) == (
                    was.chosen, was.eligible, was.limit,
                )  # fmt: skip
                assert set(now.refused) - {"a_never"} == set(was.refused)


def test_reasons_are_there_if_and_only_if_a_kernel_is_refused() -> None:
    for posed in problems().values():
        for problem in posed.values():
            found = explain(problem)
            eligible = {name for name, _ in found.eligible}
            for name, kernel in kernels().items():
                if kernel.op != problem.op:
                    assert name not in eligible and name not in found.refused
                    continue
                reasons = tuple(kernel.refuse(problem))
                assert bool(reasons) == (name in found.refused) == (name not in eligible)
            for reasons in found.refused.values():
                for reason in reasons:
                    assert reason.code and reason.text and reason.fix
                    assert "got " in reason.text or reason.code in ("DENIED", "INTEGERS")


def test_gpus_are_refused_by_their_architecture() -> None:
    on_cpu = ("int4pack", "int8pack", "dense_cached", "dense_chunked", "int8_onednn", "int8_mm")
    for name, posed in problems().items():
        for problem in posed.values():
            refused = explain(problem).refused
            for kernel in on_cpu if problem.op == "linear" else ():
                codes = [reason.code for reason in refused.get(kernel, ())]
                assert ("ARCH" in codes) == (name != "cpu"), (name, kernel)


def test_no_choice_beats_the_limit() -> None:
    for posed in problems().values():
        for problem in posed.values():
            limit = explain(problem).limit
            assert limit is not None and 0 < limit.share <= 1.0, problem


def test_a_poorer_cpu_gets_fewer_kernels() -> None:
    (problem,) = [p for text, p in problems()["cpu"].items() if "row" in text and "M<=1 " in text
                  and "int_group" in text and "int8_token" in text]  # fmt: skip
    assert explain(problem).chosen == "int8_onednn" and problem.machine
    old = replace(problem, machine=replace(problem.machine, isa=("avx2",)))
    assert [reason.code for reason in explain(old).refused["int8_onednn"]] == ["ARCH"]
    assert "with VNNI, got AVX2 without" in explain(old).refused["int8_onednn"][0].text
    small = replace(problem, machine=replace(problem.machine, memory_bytes=1 << 20))
    assert explain(small).chosen == "dense_chunked"
    assert explain(small).refused["dense_cached"][0].code == "MEMORY"


def test_two_processes_agree_to_the_byte() -> None:
    script = "import test_decisions, sys; sys.stdout.write(test_decisions.encoded())"
    found = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(GOLDEN.parent)}
        answer = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, check=True
        )
        found.append(answer.stdout)
    assert found[0] == found[1] == GOLDEN.read_bytes()


if __name__ == "__main__":
    GOLDEN.write_text(encoded())
