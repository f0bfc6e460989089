"""Facts are complete and JSON; each problem is found in facts that have it, with its remedy."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.quant import doctor as module
from fewbit.quant.doctor import doctor, doctor_text, find_problems

SOUND: dict[str, Any] = {
    "system": {
        "machine": "x86_64", "isa": "AVX512", "threads": 8, "cores": 8, "memory_bytes": 32e9,
    },
    "disk": {"here": {"path": "/data", "free_bytes": 90e9}},
    "packages": {"triton": None, "cupy-cuda12x": None},
    "unmet": [],
    "gpus": [],
    "driver": None,
    "cuda": None,
    "compiler": "cc: 12",
    "native": {"engine": "avx2", "path": "/c/f.so", "why_not": None, "off": False},
    "kernels": {"error": None},
}  # fmt: skip
GPU = {"name": "H", "architecture": "sm90", "memory_bytes": 80e9}
WITH_GPU = {
    "driver": "550", "cuda": "12.4", "gpus": [GPU],
    "packages": {"triton": "3.2", "cupy-cuda12x": "13"},
}  # fmt: skip
_MERGED = ("system", "kernels", "native")


def problems(**changes: Any) -> list[dict[str, str]]:
    facts = copy.deepcopy(SOUND)
    for key, value in changes.items():
        facts[key] = {**facts[key], **value} if key in _MERGED else value
    return find_problems(facts)


def test_a_sound_machine_has_no_problem_with_or_without_a_gpu() -> None:
    assert problems() == []
    assert problems(**WITH_GPU) == []


@pytest.mark.parametrize(
    ("changes", "problem", "remedy"),
    [
        ({"unmet": [("torch>=2.6", "2.1")]}, "needs torch>=2.6, found 2.1", "'torch>=2.6'"),
        ({"unmet": [("numpy>=1", None)]}, "needs numpy>=1, found none", "pip install 'numpy>=1'"),
        ({"driver": "550"}, "this torch is built for the CPU only", "CUDA build of torch"),
        ({"driver": "450", "cuda": "12.4"}, "(CUDA 12.4) sees no GPU", "update the driver"),
        (
            {**WITH_GPU, "packages": {"triton": None, "cupy-cuda12x": "13"}},
            "triton is missing",
            "pip install 'fewbit[triton]'",
        ),
        (
            {**WITH_GPU, "packages": {"triton": "3", "cupy-cuda12x": None}},
            "cupy-cuda12x is missing",
            "pip install 'fewbit[cuda]'",
        ),
        ({**WITH_GPU, "compiler": None}, "no C compiler", "install gcc"),
        ({"system": {"isa": "DEFAULT"}}, "torch uses DEFAULT on this CPU", "slower"),
        ({"system": {"threads": 1}}, "1 of 8 cores", "OMP_NUM_THREADS"),
        ({"system": {"memory_bytes": 1e9}}, "1.0 GB of memory", "more memory"),
        ({"disk": {"here": {"path": "/d", "free_bytes": 1e9}}}, "1.0 GB free on", "-o"),
        (
            {"native": {"engine": "numpy", "path": None, "why_not": "no compiler; install gcc"}},
            "numpy, some twenty times slower: no compiler; install gcc",
            "make wheel",
        ),
        ({"kernels": {"error": "FEWBIT_KERNEL=x"}}, "FEWBIT_KERNEL=x", "unset FEWBIT_KERNEL"),
    ],
)
def test_each_problem_is_found_with_its_remedy(
    changes: dict[str, Any], problem: str, remedy: str
) -> None:
    found = problems(**changes)
    assert len(found) == 1
    assert problem in found[0]["problem"]
    assert remedy in found[0]["remedy"]


def test_who_asks_for_numpy_gets_it_without_a_complaint() -> None:
    native = {"engine": "numpy", "path": None, "why_not": "FEWBIT_NATIVE=off asks", "off": True}
    assert problems(native=native) == []


def test_other_processors_are_not_blamed_for_lacking_avx() -> None:
    assert problems(system={"machine": "aarch64", "isa": "DEFAULT"}) == []


def test_facts_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWBIT_KERNEL", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    facts = doctor()
    json.dumps(facts, allow_nan=False)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["packages"]["transformers"] is not None
    assert "pytest" not in facts["packages"]  # a test tool, not a need
    assert facts["unmet"] == []
    assert facts["system"]["cores"] == os.cpu_count()
    assert facts["system"]["memory_bytes"] > 1e8
    assert facts["disk"]["here"] == {
        "path": str(Path.cwd()), "free_bytes": pytest.approx(facts["disk"]["here"]["free_bytes"]),
    }  # fmt: skip
    assert facts["environment"]["HF_HUB_OFFLINE"] == "1"
    native = facts["native"]
    assert (native["engine"] == "numpy") == (native["path"] is None) == bool(native["why_not"])
    kernels = facts["kernels"]
    assert set(kernels["chosen"]) == {"w4 m=1", "w4 m=512", "w8 m=1", "w8 m=512"}
    assert "reference" in kernels["usable"]
    assert all(name in kernels["usable"] for name in kernels["chosen"].values())
    assert kernels["error"] is None


def test_a_forced_kernel_that_does_not_exist_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBIT_KERNEL", "referense")
    facts = doctor()
    assert facts["kernels"]["forced"] == "referense"
    assert any("'referense' names no kernel" in item["problem"] for item in facts["problems"])


def test_a_requirement_that_is_not_met_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=99", "absent-package>=1 ; extra == 'x'", "numpy>=1"]
    monkeypatch.setattr(module, "requires", lambda name: needs)
    assert doctor()["unmet"] == [("torch>=99", torch.__version__)]


def test_text_shows_facts_and_problems() -> None:
    facts = doctor()
    facts["problems"] = []
    facts["packages"]["triton"] = None
    text = doctor_text(facts)
    assert text.endswith("no problems found")
    assert "triton          missing (optional): pip install 'fewbit[triton]'" in text
    assert facts["system"]["cpu"] in text
    facts["native"] = {"engine": "avx2", "path": "/c/f.so", "why_not": None, "off": False}
    assert "native      avx2: /c/f.so\n" in doctor_text(facts)
    facts["native"] |= {"engine": "numpy", "path": None, "why_not": "no compiler; install gcc"}
    assert "native      numpy: no compiler; install gcc\n" in doctor_text(facts)
    facts["problems"] = [{"problem": "it is broken", "remedy": "mend it"}]
    assert doctor_text(facts).endswith("problems\n  it is broken\n    -> mend it")
    facts.update(gpus=[GPU], driver="driver 550", cuda="12.4")
    assert "gpu         H, sm90, 80.0 GB" in doctor_text(facts)
