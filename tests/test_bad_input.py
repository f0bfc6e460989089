"""Bad input through the command: exit code 1, one line that says what, and nothing written.

Every case goes through `main([...])`. A message must name what was found and what to do; the output
folder must not hold a `config.json`, and must not exist at all where the fault shows before the work.
"""

import errno
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from fewbit.export import writer as writer_module
from fewbit.export.metadata import manifest_bytes, read_manifest
from fewbit.quant import pipeline, preflight
from fewbit.quant.cli import main
from tiny_tokenizer import save_tokenizer

FAST = ("--samples", "2", "--length", "16", "--device", "cpu", "--quiet")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model with a tokenizer; tests change copies of it."""
    folder = tiny_models.save("llama", tmp_path_factory.mktemp("source"), torch.bfloat16)
    return save_tokenizer(folder)


@pytest.fixture
def source(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "source"))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def refused(capsys, *arguments):
    """The single line of a command that must fail with exit code 1."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert code == 1, printed.err
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("fewbit: ")
    assert "Traceback" not in printed.err
    assert printed.out == ""
    return lines[0]


def quantize_refused(capsys, source, out, *more, recipe="w4a16-rtn"):
    return refused(capsys, "quantize", source, "-o", out, "--recipe", recipe, *FAST, *more)


def done(source, out, *more, recipe="w4a16-rtn"):
    command = ["quantize", str(source), "-o", str(out), "--recipe", recipe, *FAST, *more]
    assert main(command) == 0


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def put_weight(source, name, change):
    tensors = load_file(source / "model.safetensors")
    change(tensors[name])
    save_file(tensors, source / "model.safetensors")


# --- the source ---------------------------------------------------------------------------------


def test_missing_path(capsys, tmp_path, out):
    line = quantize_refused(capsys, tmp_path / "no" / "such" / "folder", out)
    assert "does not exist" in line and "give a folder" in line
    assert not out.exists()


def test_a_file_is_no_checkpoint(capsys, source, out):
    line = quantize_refused(capsys, source / "model.safetensors", out)
    assert "is not a folder" in line
    assert not out.exists()


def test_folder_without_weights(capsys, tmp_path, out):
    (tmp_path / "empty").mkdir()
    line = quantize_refused(capsys, tmp_path / "empty", out)
    assert "safetensors" in line
    assert not out.exists()


def test_pickled_weights_only(capsys, source, out):
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    line = quantize_refused(capsys, source, out)
    assert "pickle" in line and "pytorch_model.bin" in line and "convert" in line
    assert not out.exists()


@pytest.mark.parametrize("keep", [0, 7, 40, -1, -5000])
def test_truncated_shard(capsys, source, out, keep):
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    line = quantize_refused(capsys, source, out)
    assert "model.safetensors" in line
    assert not out.exists()


@pytest.mark.parametrize(
    "header", [b"{", b"[]" + b" " * 6, b'{"a": {"dtype": "F32"}}', b"\xff" * 16, b"null    "]
)
def test_corrupted_header(capsys, source, out, header):
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    line = quantize_refused(capsys, source, out)
    assert "model.safetensors" in line
    assert not out.exists()


def test_index_naming_a_missing_shard(capsys, source, out):
    names = load_file(source / "model.safetensors")
    absent = "model-00002-of-00002.safetensors"
    weight_map = dict.fromkeys(names, "model.safetensors") | {"lm_head.weight": absent}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    line = quantize_refused(capsys, source, out)
    assert absent in line
    assert not out.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("recipe", ["w4a16-rtn", "identity", "w4a16"])
def test_a_number_that_is_none_is_named(capsys, source, out, recipe, value):
    name = "model.layers.1.mlp.down_proj.weight"

    def spoil(tensor):
        tensor[3, 5] = value

    put_weight(source, name, spoil)
    line = quantize_refused(capsys, source, out, recipe=recipe)
    assert name.removesuffix(".weight") in line and "NaN or Inf" in line
    assert not (out / "config.json").exists()


def test_not_a_number_outside_the_blocks(capsys, source, out):
    put_weight(source, "model.norm.weight", lambda tensor: tensor.fill_(float("nan")))
    line = quantize_refused(capsys, source, out)
    assert "model.norm.weight" in line
    assert not (out / "config.json").exists()


def test_config_that_is_no_json(capsys, source, out):
    (source / "config.json").write_text('{"model_type": ')
    assert "config.json" in quantize_refused(capsys, source, out)
    assert not out.exists()


def test_config_of_another_model(capsys, source, out):
    edit(source / "config.json", lambda config: config.update(hidden_size=128))
    line = quantize_refused(capsys, source, out, recipe="w4a16")
    assert "config.json" in line
    assert not out.exists()


def test_incomplete_checkpoint(capsys, source, out):
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, source / "model.safetensors")
    line = quantize_refused(capsys, source, out, recipe="w4a16")
    assert "model.layers.1.self_attn.k_proj" in line
    assert not out.exists()


@pytest.mark.parametrize("change", [{"model_type": "frobnicator"}, {"model_type": None}])
def test_unknown_architecture(capsys, source, out, change):
    edit(source / "config.json", lambda config: config.update(change))
    line = quantize_refused(capsys, source, out, recipe="w4a16")
    assert str(change["model_type"]) in line and "without calibration" in line
    assert not out.exists()
    done(source, out)
    assert main(["inspect", str(out), "--verify"]) == 0


def test_a_source_of_fewbit(capsys, source, tmp_path, out):
    done(source, out)
    again = tmp_path / "again"
    assert "fewbit checkpoint" in quantize_refused(capsys, out, again)
    assert not again.exists()


def test_a_source_of_another_maker(capsys, source, out):
    quantization = {"quant_method": "gptq", "bits": 4}
    edit(source / "config.json", lambda config: config.update(quantization_config=quantization))
    line = quantize_refused(capsys, source, out)
    assert "gptq" in line and "original" in line
    assert not out.exists()


# --- recipe and flags ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "found", "remedy"),
    [
        ("weights.bit=3", "'bit'", "did you mean 'bits'"),
        ("weigts.bits=3", "'weigts'", "did you mean 'weights'"),
        ("weights.bits=9", "got 9", "2 to 8"),
        ("weights.bits=1", "got 1", "2 to 8"),
        ("weights.group=100", "got 100", "16, 32, 64, 128 or 'row'"),
        ("weights.group=[128]", "got [128]", "16, 32, 64, 128 or 'row'"),
        ("weights.scale=fp8", "got 'fp8'", "'fp16' or 'bf16'"),
        ("weights.scale=[1]", "got [1]", "'fp16' or 'bf16'"),
        ("weights.format=int_grou", "'int_grou'", "did you mean 'int_group'"),
        ("calibration.samplse=4", "'samplse'", "did you mean 'samples'"),
        ("pass.gptq.damping=0.1", "'gptq'", "it has"),
        ("weights.ignore=lm_head", "got 'lm_head'", "list of names"),
        ('weights.ignore=["re:("]', "'re:('", "valid pattern"),
        ('weights.ignore=["re:.*"]', "none of its", "weights.ignore"),
        ("allow_fallback=perhaps", "got 'perhaps'", "must be a bool"),
        ("gate.perplexity_ratio=-1", "got -1", "≥ 0"),
        ("nothing", "got 'nothing'", "key=value"),
    ],
)
def test_settings(capsys, source, out, setting, found, remedy):
    line = quantize_refused(capsys, source, out, "--set", setting)
    assert found in line and remedy in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[weights\nbits = 4", "not valid TOML"),
        ('[[pass]]\nname = "gptq"\n', "no [weights]"),
        ('[[pass]]\nname = "gtpq"\n[weights]\nformat = "int_group"\n', "did you mean 'gptq'"),
        ("[weights]\nbits = 4\n", "format"),
        ('[[override]]\nmatch = "x"\nweights = 4\n', "override"),
    ],
)
def test_recipe_files(capsys, source, out, tmp_path, text, found):
    recipe = tmp_path / "my.toml"
    recipe.write_text(text)
    assert found in quantize_refused(capsys, source, out, recipe=str(recipe))
    assert not out.exists()


def test_recipe_files_that_cannot_be_read(capsys, source, out, tmp_path):
    assert "does not exist" in quantize_refused(capsys, source, out, recipe="no.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    line = quantize_refused(capsys, source, out, recipe=str(tmp_path / "bytes.toml"))
    assert "not UTF-8" in line
    assert "did you mean 'w4a16'" in quantize_refused(capsys, source, out, recipe="w4a61")


@pytest.mark.parametrize(
    ("flags", "found", "allowed"),
    [
        (("--device", "tpu"), "'tpu'", "auto, cpu, cuda"),
        (("--device", "mps"), "'mps'", "use auto"),
        (("--device", "cuda:99"), "'cuda:99'", "use auto"),
        (("--samples", "-1"), "got -1", "≥ 1"),
        (("--samples", "0"), "got 0", "≥ 1"),
        (("--length", "0"), "got 0", "≥ 8"),
        (("--seed", "-1"), "got -1", "from 0"),
        (("--seed", str(1 << 64)), "got 18446744073709551616", "from 0"),
        (("--revision", "main"), "'main'", "only hub ids"),
    ],
)
def test_flags(capsys, source, out, flags, found, allowed):
    for recipe in ("w4a16-rtn", "w4a16"):
        line = quantize_refused(capsys, source, out, *flags, recipe=recipe)
        assert found in line and allowed in line
        assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(capsys, source, out):
    line = quantize_refused(capsys, source, out, "--device", "cuda")
    assert "0 GPUs" in line
    assert not out.exists()


@pytest.mark.parametrize("arguments", [[], ["quantise"], ["quantize", "x"], ["quantize", "x", "-o"],
                                       ["quantize", "x", "-o", "y", "--samples", "few"],
                                       ["quantize", "x", "-o", "y", "--jobs-of", "2"]])  # fmt: skip
def test_wrong_usage(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: fewbit" in capsys.readouterr().err


# --- calibration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("empty.txt", "", "empty"),
        ("short.txt", "too few", "7 tokens"),
        ("latin.txt", b"caf\xe9 ", "not UTF-8"),
        ("bad.jsonl", '{"text": ', "line 1"),
        ("other.jsonl", '{"words": "x"}', "words"),
        ("weights.csv", "a,b", ".txt or .jsonl"),
        (None, None, "no file"),
    ],
)
def test_calibration_text(capsys, source, out, tmp_path, name, content, found):
    path = tmp_path / (name or "absent.txt")
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = quantize_refused(capsys, source, out, "--calib", path, recipe="w4a16")
    assert found in line
    assert not out.exists()


def test_windows_beyond_the_context(capsys, source, out):
    line = quantize_refused(capsys, source, out, "--length", "300", recipe="w4a16")
    assert "300" in line and "256" in line
    assert not out.exists()


def test_no_tokenizer(capsys, source, out):
    for path in source.glob("token*"):
        path.unlink()
    line = quantize_refused(capsys, source, out, recipe="w4a16")
    assert "tokenizer" in line and "without calibration" in line
    assert not out.exists()


def test_tokenizer_of_another_model(capsys, source, out):
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:50].clone()
    save_file(tensors, source / "model.safetensors")
    edit(source / "config.json", lambda config: config.update(vocab_size=50))
    line = quantize_refused(capsys, source, out, recipe="w4a16")
    assert "vocabulary has 50 entries" in line
    assert not out.exists()


# --- the output folder --------------------------------------------------------------------------


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_that_is_not_ours_is_left_alone(capsys, source, out, restart):
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"precious")
    (out / "config.json").write_text("{}")
    line = quantize_refused(capsys, source, out, *(["--restart"] if restart else []))
    assert "not written by fewbit" in line and "another folder" in line
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert (out / "model.safetensors").read_bytes() == b"precious"


def test_the_source_itself(capsys, source):
    before = sorted(path.name for path in source.iterdir())
    line = quantize_refused(capsys, source, source, "--restart")
    assert "source itself" in line
    assert sorted(path.name for path in source.iterdir()) == before


def test_a_file_in_the_way(capsys, source, tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "out"):
        assert str(tmp_path / "file") in quantize_refused(capsys, source, target)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_finished_checkpoint_needs_restart(capsys, source, out):
    done(source, out)
    (out / "notes.md").write_text("mine")
    assert "--restart" in quantize_refused(capsys, source, out)
    done(source, out, "--restart", recipe="w8a16")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["recipe"] == "w8a16"
    assert (out / "notes.md").read_text() == "mine"


def test_restart_that_cannot_work_discards_nothing(capsys, source, out):
    done(source, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    quantize_refused(capsys, source, out, "--restart", "--set", "weights.bits=9")
    quantize_refused(capsys, source, out, "--restart", "--length", "300", recipe="w4a16")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def interrupt(monkeypatch, source, out):
    """Leave an unfinished run of w4a16-rtn behind."""
    command = ["quantize", str(source), "-o", str(out), "--recipe", "w4a16-rtn", *FAST]
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.publish, "finish", _interrupted)
        assert main(command) == 130


def _interrupted(*arguments):
    raise KeyboardInterrupt


def test_another_run_in_an_unfinished_folder(capsys, monkeypatch, source, out):
    interrupt(monkeypatch, source, out)
    line = quantize_refused(capsys, source, out, recipe="w8a16")
    assert "unfinished run with another recipe.name: w4a16-rtn, now w8a16" in line
    assert "--restart" in line
    line = quantize_refused(capsys, source, out, "--set", "weights.bits=3")
    assert "recipe.weights.bits: 4, now 3" in line
    line = quantize_refused(capsys, source, out, "--seed", "7")
    assert "seed: 0, now 7" in line
    edit(source / "config.json", lambda config: config.update(note="changed"))
    assert "another source" in quantize_refused(capsys, source, out)


def test_another_environment_is_named(capsys, monkeypatch, source, out):
    interrupt(monkeypatch, source, out)
    monkeypatch.setattr(torch, "__version__", "1.0.0")
    line = quantize_refused(capsys, source, out)
    assert "environment.torch" in line and "now 1.0.0" in line


def test_two_processes_in_one_folder(capsys, source, out):
    out.mkdir()
    first = writer_module.Journal(out / "fewbit.journal")
    first.open()
    try:
        for more in ((), ("--restart",)):
            assert "another fewbit process" in quantize_refused(capsys, source, out, *more)
    finally:
        first.close()
    done(source, out)


# --- the machine --------------------------------------------------------------------------------


def test_disk_that_is_too_full_from_the_start(capsys, monkeypatch, source, out):
    usage = shutil.disk_usage(source)._replace(free=1000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
    line = quantize_refused(capsys, source, out)
    assert "1000 bytes are free" in line and "free some space" in line
    assert not out.exists()


def test_too_little_memory(capsys, monkeypatch, source, out):
    monkeypatch.setattr(preflight, "_available_memory", lambda: 12_000_000)
    line = quantize_refused(capsys, source, out)
    assert "12.0 MB are available" in line
    assert not out.exists()


def test_disk_that_fills_up_in_the_middle(capsys, monkeypatch, source, out, tmp_path):
    done(source, tmp_path / "whole")
    real = os.fsync
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    line = quantize_refused(capsys, source, out)
    assert "the disk is full" in line and "resume" in line
    assert not (out / "config.json").exists()
    monkeypatch.setattr(os, "fsync", real)
    done(source, out)
    for path in (tmp_path / "whole").iterdir():
        if not path.name.startswith("report."):
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_a_limit_on_file_size(capsys, source, out):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        line = quantize_refused(capsys, source, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in line
    assert not (out / "config.json").exists()
    done(source, out)


# --- the result ---------------------------------------------------------------------------------


def test_newer_format_version(capsys, source, out):
    done(source, out)
    edit(out / "config.json", lambda config: config["quantization_config"].update(version=2))
    assert "format version 2" in refused(capsys, "inspect", out)
    assert "pip install -U fewbit" in refused(capsys, "inspect", out, "--verify")


def test_newer_manifest(capsys, source, out):
    done(source, out)
    manifest = read_manifest(out)
    del manifest["crc32c"]
    (out / "fewbit.json").write_bytes(manifest_bytes(manifest | {"version": 2}))
    assert "format version 2" in refused(capsys, "inspect", out)


def test_a_flipped_byte_is_named(capsys, source, out):
    done(source, out)
    shard = out / "model.safetensors"
    data = bytearray(shard.read_bytes())
    header_bytes = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:header_bytes])
    for name in ("model.layers.1.mlp.up_proj.codes", "model.norm.weight"):
        begin, end = header[name]["data_offsets"]
        for place in (begin, (begin + end) // 2, end - 1):
            damaged = bytearray(data)
            damaged[header_bytes + place] ^= 0x10
            shard.write_bytes(damaged)
            assert name in refused(capsys, "inspect", out, "--verify")
    shard.write_bytes(data)
    assert main(["inspect", str(out), "--verify"]) == 0


def test_an_unfinished_run_is_no_checkpoint(capsys, monkeypatch, source, out):
    interrupt(monkeypatch, source, out)
    assert "unfinished run" in refused(capsys, "inspect", out)
    assert "unfinished run" in refused(capsys, "generate", out, "--prompt", "x")


@pytest.mark.parametrize("target", ["no/such/folder/x.json", "."])
def test_json_that_cannot_be_written(capsys, source, out, tmp_path, monkeypatch, target):
    done(source, out)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert "cannot write" in refused(capsys, "inspect", out, "--json", target)
