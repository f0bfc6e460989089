"""`fewbit kernels` as a command: the table, one explanation, and what it refuses."""

import json

import pytest
import torch

from fewbit.quant.cli import main
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.kernel_report import (
    Layer,
    kernel_report,
    parse_layer,
    parse_shape,
    recipe_layers,
)
from fewbit.quant.recipe import WeightRule


@pytest.fixture(autouse=True)
def no_forced_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWBIT_KERNEL", raising=False)


def test_one_shape_on_a_described_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["kernels", "--shape", "33x28672x4096", "--gpu", "h200", "--format", "int_group"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "N=28672 K=4096 M<=48 bfloat16 cuda (NVIDIA H200 SXM 141 GB sm_90)" in lines[0]
    assert lines[1].startswith(" CHOSEN triton_int_group {block_m ")
    assert " us estimated, for M = " in lines[1]
    assert any("int4pack: ARCH runs on the CPU, got cuda (NVIDIA H200" in line for line in lines)
    assert lines[-1].startswith(" limit  memory 13.3 us estimated; triton_int_group reaches")


def test_json_of_one_shape(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["kernels", "--shape", "1X4096x4096", "--gpu", "cpu", "--json", "-"]
    assert main([*command, "--format", "int_group:bits=4,group=64", "--dtype", "float32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"problem", "chosen", "eligible", "refused", "limit"} <= set(found)
    assert "group=64" in found["problem"] and found["chosen"] == "dense_cached"
    assert found["refused"]["int4pack"][0]["code"] == "DTYPE"
    assert found["limit"]["bound"] == "compute" and 0 < found["limit"]["share"] < 1
    assert found["machine"]["name"] == "cpu" and found["activation"] is None


def test_this_machine_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--shape", "1x64x64", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["present"] is True
    if not torch.cuda.is_available():
        assert found["limit"] is None and found["activation"] == "int8_token"


def test_table_of_all_recipes(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--gpu", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    layers = recipe_layers()
    assert len(lines) == len(layers) + 3 and len(layers) >= 6
    (row,) = (line for line in lines if line.split()[1:4] == ["bits=8", "group=row", "int8_token"])
    assert row.count("int8_onednn") == 4 and row.count("%") == 4
    (row,) = (line for line in lines if line.startswith("int_group bits=4 group=128 "))
    assert "int4pack" in row and row.count("dense_cached") == 3
    path = tmp_path / "table.json"
    assert main(["kernels", "--gpu", "cpu", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert len(found["table"]) == 4 * len(layers)
    assert all({"problem", "chosen", "limit"} <= set(entry) for entry in found["table"])


def test_table_of_one_format(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["kernels", "--op", "linear", "--gpu", "cpu", "--format", "int_two_level"]
    assert main([*command, "--activation", "int8_token"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith("int_two_level bits=4 group=128  int8_token")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shape", "1x2"], "--shape must be MxNxK"),
        (["--shape", "0x16x16"], "--shape must be MxNxK"),
        (["--shape", "-1x16x16"], None),
        (["--shape", "1x16x99999999999999999999"], "--shape must be MxNxK"),
        (["--shape", "axbxc"], "got 'axbxc'"),
        (["--format", "int_grup"], "did you mean 'int_group'"),
        (["--format", "int_group:bitz=3"], "did you mean 'bits'"),
        (["--format", "int_group:bits=9"], "bits must be a whole number 2 to 8"),
        (["--format", "int_group:bits"], "'bits' must be KEY=VALUE"),
        (["--activation", "int8_tokens"], "did you mean 'int8_token'"),
        (["--gpu", "h20"], "did you mean 'h200'"),
        (["--op", "atend"], "did you mean 'attend'"),
        (["--op", "attend"], "give --shape"),
        (["--op", "attend", "--shape", "1x2x3"], "--shape must be BxQxHxGxDxT"),
        (
            ["--op", "attend", "--shape", "1x1x1x1x1x1", "--activation", "none"],
            "is for --op linear",
        ),
        (["--op", "hadamard", "--shape", "1x64x64"], "--shape must be MxK"),
        (["--op", "hadamard", "--shape", "1x64", "--format", "int_group"], "is for weights and"),
        (["--gpu", "none.json"], "cannot be read"),
    ],
)
def test_bad_requests_are_one_line(
    flags: list[str], message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if message is None:  # argparse takes it for a flag
        with pytest.raises(SystemExit) as stop:
            main(["kernels", *flags])
        assert stop.value.code == 2
        return
    assert main(["kernels", *flags]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert message in printed.err and "RecipeError" in printed.err


@pytest.mark.parametrize("flags", [["--dtype", "int8"], ["--rows", "3"]])
def test_wrong_usage(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["kernels", *flags])
    assert stop.value.code == 2


def test_a_forced_kernel_that_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEWBIT_KERNEL", "dense_cached")
    assert main(["kernels", "--shape", "1x64x64", "--gpu", "cpu"]) == 0
    assert "CHOSEN dense_cached" in capsys.readouterr().out
    assert main(["kernels", "--shape", "1x64x64", "--gpu", "b200"]) == 1
    assert "NoKernelError: FEWBIT_KERNEL: dense_cached cannot run" in capsys.readouterr().err


def test_layers_by_flags() -> None:
    layer = parse_layer("int_group:bits=3,symmetric=false", None)
    assert layer == Layer(WeightRule("int_group", IntGroupOptions(3, symmetric=False)), None)
    assert str(layer) == "int_group bits=3 group=128 symmetric=False"
    assert parse_layer(None, None).activation == "int8_token"
    assert parse_layer(None, "none").activation is None
    assert parse_shape("16x4096X11008") == (16, 4096, 11008)


def test_times_and_shares_are_labelled_estimates() -> None:
    text = kernel_report(gpu="h100")[1]
    assert "times are estimates" in text.splitlines()[0]
