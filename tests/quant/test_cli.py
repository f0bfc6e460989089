"""The command: exit codes, what goes to stdout and stderr, and that it starts at once."""

import json
import shutil
import subprocess
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny_models
from fewbit.quant import cli
from fewbit.quant.cli import build_parser, main
from fewbit.quant.errors import FewbitError
from fewbit.quant.evaluate import evaluate
from fewbit.quant.recipe import recipe_names
from tiny_tokenizer import save_tokenizer

MODEL = Path(cli.__file__).parent / "data" / "tiny-llama"
SMALL = ("--samples", "4", "--length", "16", "--device", "cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "out"
    command = ["quantize", str(MODEL), "-o", str(out), "--recipe", "w8a16", "--quiet"]
    assert main(command) == 0
    return out


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A mixture of experts that sends no token to its last expert in layer 0."""
    from safetensors.torch import load_file, save_file

    folder = tiny_models.save("mixtral", tmp_path_factory.mktemp("experts"))
    tensors = load_file(folder / "model.safetensors")
    layer = "model.layers.0."
    # One coordinate is positive whatever the token, and only the last expert dislikes it.
    tensors["model.embed_tokens.weight"][:, 0] = 5.0
    tensors[layer + "self_attn.o_proj.weight"][0] = 0.0
    tensors[layer + "post_attention_layernorm.weight"][0] = 1.0
    tensors[layer + "block_sparse_moe.gate.weight"][:, 0] = 0.0
    tensors[layer + "block_sparse_moe.gate.weight"][3, 0] = -100.0
    save_file(tensors, folder / "model.safetensors")
    return save_tokenizer(folder)


def run(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_starts_without_heavy_imports():
    code = "import sys, fewbit.quant.cli as c; c.build_parser(); print('torch' in sys.modules)"
    started = time.perf_counter()
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
    assert time.perf_counter() - started < 5  # 0.2 s on an idle machine


def test_every_command_has_help(capsys):
    for command in (
        "quantize", "eval", "generate", "inspect", "recipes", "kernels", "autotune", "doctor", "demo",
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"usage: fewbit {command}" in capsys.readouterr().out


def test_flags_share_names_with_the_python_interface():
    from inspect import signature

    from fewbit.quant.pipeline import quantize

    options = vars(build_parser().parse_args(["quantize", "a", "-o", "b"]))
    keys = set(signature(quantize).parameters) - {"progress", "announce"}
    assert keys <= set(options)
    assert set(options) - keys == {"command", "debug", "quiet", "run"}


def test_recipes(capsys):
    code, out, _ = run(capsys, "recipes")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == recipe_names()
    code, out, _ = run(capsys, "recipes", "w4a16")
    assert code == 0 and 'name = "gptq"' in out
    code, out, err = run(capsys, "recipes", "w4a17")
    assert code == 1 and out == "" and "did you mean 'w4a16'" in err


def test_quantize_prints_progress_to_stderr_and_a_summary_to_stdout(capsys, tmp_path):
    code, out, err = run(
        capsys, "quantize", MODEL, "-o", tmp_path / "out", "--recipe", "w4a16-rtn", *SMALL
    )
    assert code == 0
    assert "42 weights quantized at 4.125 bits" in out
    assert "[1/1]" in err and "MB in" in err
    code, out, err = run(
        capsys, "quantize", MODEL, "-o", tmp_path / "quiet", "--recipe", "identity", "--quiet"
    )
    assert (code, out, err) == (0, "", "")


def test_a_starved_expert_ends_with_code_3(capsys, experts, tmp_path):
    out = tmp_path / "out"
    keys = ("--recipe", "w4a16", "--set", "pass.gptq.min_tokens=1", *SMALL)
    code, printed, err = run(capsys, "quantize", experts, "-o", out, *keys)
    assert code == 3
    name = "model.layers.0.block_sparse_moe.experts.3.w1"
    assert f"{name}: rounded to nearest: saw no calibration tokens" in printed
    last = err.splitlines()[-1]
    assert last.startswith("fewbit: 3 fallbacks") and "allow_fallback=true" in last
    report = json.loads((out / "report.json").read_text())
    tokens = report["experts"]["model.layers.0.block_sparse_moe.experts"]
    assert tokens[3] == 0 and sum(tokens) == 4 * 16 * 2
    assert main(["inspect", str(out), "--verify"]) == 0  # complete all the same
    allowed = ("--restart", "--set", "allow_fallback=true")
    code, printed, err = run(capsys, "quantize", experts, "-o", out, *keys, *allowed)
    assert code == 0 and "allow_fallback" not in err
    assert len(json.loads((out / "report.json").read_text())["fallbacks"]) == 3


@pytest.mark.parametrize(
    ("gate", "code", "line"),
    [
        ("gate.perplexity_ratio=2.0", 0, ""),
        ("gate.perplexity_ratio=0.5", 3, "perplexity_ratio is "),
        ("gate.mean_kl=1e-12", 3, "mean_kl is "),
    ],
)
def test_quality_gate(capsys, monkeypatch, tmp_path, gate, code, line):
    short = partial(evaluate, length=64, max_tokens=128)
    monkeypatch.setattr(import_module("fewbit.quant.evaluate"), "evaluate", short)
    keys = ("--recipe", "w8a16", "--device", "cpu", "--quiet", "--set", gate)
    found, _, err = run(capsys, "quantize", MODEL, "-o", tmp_path / "out", *keys)
    assert found == code, err
    assert line in err and ("quality gate" in err) == bool(code)


def test_inspect(capsys, quantized):
    code, out, _ = run(capsys, "inspect", quantized, "--verify")
    assert code == 0 and "every checksum and shape" in out
    code, out, err = run(capsys, "inspect", quantized, "--json", "-")
    found = json.loads(out)
    assert code == 0 and err == ""
    assert found["verified"] is False and found["kv"] is None
    assert 8.0 < found["bits_per_weight"] < 8.1
    name = "model.layers.0.self_attn.q_proj"
    assert found["tensors"][name]["formats"] == ["int_group"]
    assert found["tensors"][name]["shape"] == [256, 256]
    assert found["bytes"] == (quantized / "model.safetensors").stat().st_size


def test_eval(capsys, quantized, tmp_path):
    flags = ("--length", "64", "--max-tokens", "256", "--device", "cpu")
    code, out, _ = run(capsys, "eval", quantized, "--against", MODEL, *flags, "--json", "-")
    found = json.loads(out)
    assert code == 0
    assert {"perplexity", "tokens", "seconds", "bits_per_weight", "bytes", "kl_mean", "kl_p99",
            "reference_perplexity", "perplexity_ratio", "top1_agreement"} <= set(found)  # fmt: skip
    assert found["perplexity_ratio"] == pytest.approx(1.0, abs=0.01)
    target = tmp_path / "found.json"
    code, out, _ = run(capsys, "eval", quantized, *flags, "--json", target)
    assert code == 0 and "perplexity" not in out
    assert json.loads(target.read_text())["perplexity"] == pytest.approx(found["perplexity"])


def test_generate(capsys, quantized):
    flags = ("--prompt", "The people", "--max-new-tokens", "4", "--device", "cpu")
    code, out, _ = run(capsys, "generate", quantized, *flags)
    assert code == 0 and len(out.strip()) > 3
    assert run(capsys, "generate", quantized, *flags)[1] == out


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor", "--json", "-")
    assert code == 0 and isinstance(json.loads(out), dict)


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FewbitError, match="unknown recipe"):
        main(["--debug", "quantize", str(MODEL), "-o", str(tmp_path / "out"), "--recipe", "none"])


@pytest.mark.parametrize(("command", "more"), [("quantize", "; the same command resumes"),
                                               ("recipes", "")])  # fmt: skip
def test_interrupted(capsys, monkeypatch, command, more):
    def stop(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, f"_{command}", stop)
    arguments = ["a", "-o", "b"] if command == "quantize" else []
    code, out, err = run(capsys, command, *arguments)
    assert (code, out, err) == (130, "", f"fewbit: interrupted{more}\n")


def test_an_error_of_many_lines_becomes_one(capsys, monkeypatch):
    def fail(options):
        raise FewbitError("first\n  second\nthird")

    monkeypatch.setattr(cli, "_recipes", fail)
    assert run(capsys, "recipes")[2] == "fewbit: FewbitError: first second third\n"


def test_the_installed_command():
    command = shutil.which("fewbit", path=Path(sys.executable).parent)
    if command is None:
        pytest.skip("fewbit is not installed beside this Python")
    found = subprocess.run([command, "recipes"], capture_output=True, text=True, check=True)
    assert "w4a16" in found.stdout


def test_flags_count_for_the_gate_and_a_wrong_recipe_costs_no_work(capsys, monkeypatch, tmp_path):
    worked = []
    monkeypatch.setattr(
        import_module("fewbit.quant.pipeline"), "quantize", lambda *a, **k: worked.append(a)
    )
    keys = ("quantize", MODEL, "-o", tmp_path / "out", "--recipe", "w8a16")
    code, _, err = run(capsys, *keys, "--length", "3")
    assert code == 1 and "calibration.length must be a whole number ≥ 8, got 3" in err
    code, _, err = run(capsys, *keys, "--set", "gate.mean_kl=inf")
    assert code == 1 and "gate.mean_kl must be a finite number" in err
    assert not worked


def test_a_fallback_does_not_hide_a_failed_gate(capsys, monkeypatch, tmp_path):
    report = SimpleNamespace(fallbacks=["one"], allow_fallback=False)
    score = SimpleNamespace(perplexity_ratio=2.0, kl_mean=0.1)
    monkeypatch.setattr(import_module("fewbit.quant.pipeline"), "quantize", lambda *a, **k: report)
    monkeypatch.setattr(import_module("fewbit.quant.evaluate"), "evaluate", lambda *a, **k: score)
    keys = ("quantize", MODEL, "-o", tmp_path / "out", "--recipe", "w8a16", "--quiet")
    code, _, err = run(capsys, *keys, "--set", "gate.perplexity_ratio=1.5")
    assert code == 3 and "1 fallbacks" in err
    assert "perplexity_ratio is 2.0, the recipe allows 1.5" in err
