"""Every way from one form to another, through Python and the command; kills; bad input."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fewbit.export.from_dfloat11 import DFloat11Checkpoint
from fewbit.quant import stored
from fewbit.quant.cli import main
from fewbit.quant.errors import CheckpointError, RecipeError
from fewbit.quant.export_command import export
from fewbit.quant.pipeline import quantize
from planted import bundled_model
from tiny_models import save


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith("report.")}


def tensors_of(folder):
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: t for file in files for name, t in file.items()}


def assert_same_tensors(a, b):
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert t.dtype == b[name].dtype and t.shape == b[name].shape, name
        assert torch.equal(t.reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The bundled model in several shards; tests change copies of it."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    shutil.copytree(bundled_model(), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    count = 5
    files = {f"model-{i + 1:05}-of-{count:05}.safetensors": names[i::count] for i in range(count)}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, members in files.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def lossless(plain, tmp_path_factory):
    out = tmp_path_factory.mktemp("lossless") / "out"
    quantize(plain, out, recipe="lossless")
    return out


@pytest.fixture(scope="module")
def dfloat11(plain, tmp_path_factory):
    out = tmp_path_factory.mktemp("dfloat11") / "out"
    export(plain, out, "dfloat11")
    return out


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# --- routes ---------------------------------------------------------------------------------------


def test_lossless_to_dense(plain, lossless, out):
    found = export(lossless, out, "dense")
    assert contents(out) == contents(plain)
    assert sorted(found.files) == sorted(contents(plain))
    assert found.n_bytes == sum(map(len, contents(plain).values()))
    assert found.text() == f"{out}: dense, 10 files, {found.n_bytes / 1e6:,.1f} MB"


def test_plain_to_dfloat11_to_dense(plain, dfloat11, out):
    found = export(dfloat11, out, "dense")
    assert_same_tensors(out, plain)
    assert sorted(found.files) == sorted(contents(out))
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (plain / "config.json").read_text()
    )


def test_lossless_to_dfloat11_gives_the_same_files(lossless, dfloat11, out):
    found = export(lossless, out, "dfloat11")
    assert contents(out) == contents(dfloat11)
    assert (found.coded_units, found.raw_units, found.dropped) == (8, {}, ())
    assert 10.8 < found.bits_per_weight < 10.9
    assert found.n_bytes == sum(map(len, contents(out).values()))
    mb = f"{found.n_bytes / 1e6:,.1f} MB"
    assert found.text() == (
        f"{out}: dfloat11, {len(found.files)} files, {mb}; 8 units coded, "
        f"{found.bits_per_weight:.3f} bits per weight"
    )


def test_dfloat11_must_be_exported_before_it_is_quantized(plain, dfloat11, out, tmp_path):
    with pytest.raises(CheckpointError, match=rf"fewbit export {dfloat11} -o DENSE --to dense"):
        quantize(dfloat11, out, recipe="w4a16-rtn")
    export(dfloat11, tmp_path / "dense", "dense")
    quantize(tmp_path / "dense", out, recipe="w4a16-rtn")
    quantize(plain, tmp_path / "direct", recipe="w4a16-rtn")
    assert_same_tensors(out, tmp_path / "direct")


def test_nan_is_a_value_and_its_unit_stays_dense(plain, tmp_path, capsys):
    """Both ways, with the same files; and it comes back."""
    source = Path(shutil.copytree(plain, tmp_path / "source"))
    path = source / "model-00001-of-00005.safetensors"
    tensors = load_file(path)
    name = next(n for n in sorted(tensors) if n.endswith("proj.weight"))
    tensors[name][1, 2] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    quantize(source, tmp_path / "coded", recipe="lossless")
    command = ["export", str(source), "-o", str(tmp_path / "a"), "--to", "dfloat11"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "7 units coded" in lines[0]
    assert lines[1].startswith(f"  {name.split('.self_attn')[0].split('.mlp')[0]} stays dense: ")
    export(tmp_path / "coded", tmp_path / "b", "dfloat11")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    export(tmp_path / "a", tmp_path / "back", "dense")
    assert_same_tensors(tmp_path / "back", source)


def test_a_tied_head_is_named(tmp_path, out):
    source = save("llama_tied", tmp_path / "source", torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    found = export(source, out, "dfloat11")
    assert found.dropped == ("lm_head.weight",)
    assert found.text().endswith("; tied and not stored: lm_head.weight")
    export(out, tmp_path / "dense", "dense")
    models = [transformers.AutoModelForCausalLM.from_pretrained(p, dtype="auto")
              for p in (source, tmp_path / "dense")]  # fmt: skip
    tokens = torch.arange(12)[None]
    assert torch.equal(*(model(tokens).logits for model in models))


@pytest.mark.parametrize(
    ("made_from", "to"),
    [("lossless", "dense"), ("plain", "dfloat11"), ("lossless", "dfloat11"), ("dfloat11", "dense")],
)
def test_the_command_says_what_it_did(request, capsys, out, made_from, to):
    command = ["export", str(request.getfixturevalue(made_from)), "-o", str(out), "--to", to]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{out}: {to}, ") and printed.out.count("\n") == 1
    assert printed.err.splitlines()[-1].endswith(": 100%")
    shutil.rmtree(out)
    assert main([*command, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


# --- kills ----------------------------------------------------------------------------------------


def start(source, out, to):
    command = [sys.executable, "-m", "fewbit.quant.cli", "export", str(source), "-o", str(out),
               "--to", to]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def n_complete(out):
    return len(list(out.glob("*.safetensors")))


@pytest.mark.parametrize(("made_from", "to", "moments"), [("plain", "dfloat11", (1, 5)),
                                                          ("lossless", "dense", (1, 3))])  # fmt: skip
def test_killed_and_resumed(request, tmp_path, out, made_from, to, moments):
    """SIGKILL when a number of files is complete; what they are is not written again."""
    source = request.getfixturevalue(made_from)
    export(source, tmp_path / "whole", to)
    kept, hit = {}, 0
    for moment in moments:
        process = start(source, out, to)
        while process.poll() is None and n_complete(out) < moment:
            time.sleep(0.0002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        hit += process.returncode == -signal.SIGKILL and not (out / "config.json").exists()
        for name, inode in kept.items():
            assert (out / name).stat().st_ino == inode, "a complete file was written again"
        # The newest may lack its line in the journal.
        done = sorted(out.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)[:-1]
        kept = {path.name: path.stat().st_ino for path in done}
    assert hit, "no kill came in time"
    process = start(source, out, to)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert contents(out) == contents(tmp_path / "whole")
    for name, inode in kept.items():
        assert (out / name).stat().st_ino == inode


# --- bad input ------------------------------------------------------------------------------------


def refused(capsys, source, out, to, *more):
    """The single line of an export that must fail with exit code 1, nothing loadable left."""
    capsys.readouterr()
    code = main(["export", str(source), "-o", str(out), "--to", to, "--quiet", *more])
    printed = capsys.readouterr()
    assert code == 1 and printed.out == "", printed
    assert len(printed.err.splitlines()) == 1 and printed.err.startswith("fewbit: "), printed.err
    assert "Traceback" not in printed.err
    assert not (out / "config.json").exists() or out == source
    return printed.err


def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_targets(capsys, plain, dfloat11, lossless, out):
    line = refused(capsys, plain, out, "dfloat1")
    assert "must be one of dense, dfloat11; got 'dfloat1'" in line and "dfloat11'" in line
    assert "DFloat11 checkpoint already" in refused(capsys, dfloat11, out, "dfloat11")
    assert "is not coded; copy it" in refused(capsys, plain, out, "dense")
    with pytest.raises(RecipeError, match="--to must be one of"):
        export(lossless, out, "gguf")
    assert not out.exists()


def test_sources_that_are_none(capsys, monkeypatch, tmp_path, out):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for to in ("dense", "dfloat11"):
        assert "no hub id" in refused(capsys, tmp_path / "no" / "such", out, to)
        assert "is not a folder" in refused(capsys, tmp_path / "file", out, to)
        assert "config.json" in refused(capsys, tmp_path / "empty", out, to)
        assert "the hub gives no such model" in refused(capsys, "no-one/no-such-model", out, to)
    assert not out.exists()


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float16, "float16"), (torch.float32, "float32")]
)
def test_other_dtypes_are_refused_by_name(capsys, tmp_path, out, dtype, name):
    source = save("llama", tmp_path / "source", dtype)
    quantize(source, tmp_path / "coded", recipe="lossless")
    for folder in (source, tmp_path / "coded"):
        line = refused(capsys, folder, out, "dfloat11")
        assert f".weight is {name} (" in line and "use the recipe `lossless`" in line
        assert not out.exists()


def test_other_makers_checkpoints(capsys, plain, tmp_path, out):
    source = copied(plain, tmp_path)
    quantization = {"quant_method": "gptq", "bits": 4}
    edit(source / "config.json", lambda config: config.update(quantization_config=quantization))
    assert "'gptq'" in refused(capsys, source, out, "dfloat11")
    assert "copy it" in refused(capsys, source, out, "dense")
    quantize(source, tmp_path / "coded", recipe="lossless")
    assert "another maker" in refused(capsys, tmp_path / "coded", out, "dfloat11")
    assert not out.exists()


def test_rounded_weights(capsys, plain, tmp_path, out):
    quantize(plain, tmp_path / "rounded", recipe="w8a16")
    for to in ("dense", "dfloat11"):
        assert "not built yet" in refused(capsys, tmp_path / "rounded", out, to)
    assert not out.exists()


def test_no_layers(capsys, tmp_path, out):
    (tmp_path / "source").mkdir()
    save_file({"a": torch.ones(4, 4).bfloat16()}, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text("{}")
    assert "no decoder layers" in refused(capsys, tmp_path / "source", out, "dfloat11")
    assert not out.exists()


@pytest.mark.parametrize(("made_from", "to"), [("lossless", "dense"), ("plain", "dfloat11"),
                                               ("dfloat11", "dense")])  # fmt: skip
def test_outputs_that_are_taken(request, capsys, tmp_path, made_from, to):
    source = request.getfixturevalue(made_from)
    before = contents(source)
    assert "is the checkpoint itself" in refused(capsys, source, source, to)
    assert contents(source) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.md").write_text("mine")
    assert "exists and is not empty" in refused(capsys, source, tmp_path / "mine", to)
    assert contents(tmp_path / "mine") == {"notes.md": b"mine"}
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(capsys, source, tmp_path / "file", to)
    assert str(tmp_path / "file") in refused(capsys, source, tmp_path / "file" / "x", to)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("to", ["dense", "dfloat11"])
def test_a_lossless_checkpoint_without_its_facts(capsys, lossless, tmp_path, out, to):
    source = copied(lossless, tmp_path)
    (source / "fewbit.json").unlink()
    assert "does not say what its source looked like" in refused(capsys, source, out, to)
    manifest = stored.read_manifest(lossless)
    del manifest["crc32c"], manifest["original"]
    (source / "fewbit.json").write_bytes(stored_manifest(manifest))
    assert "does not say what its source looked like" in refused(capsys, source, out, to)
    assert not out.exists()


def stored_manifest(manifest):
    from fewbit.export.metadata import manifest_bytes

    return manifest_bytes(manifest)


@pytest.mark.parametrize("to", ["dense", "dfloat11"])
def test_a_damaged_lossless_checkpoint(capsys, lossless, tmp_path, out, to):
    source = copied(lossless, tmp_path)
    name = "model.layers.2.mlp.up_proj.weight"
    for path in source.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        begin = 8 + int.from_bytes(data[:8], "little")
        entry = json.loads(data[8:begin]).get(f"{name}.rans32.words")
        if entry:
            data[begin + entry["data_offsets"][0] + 1000] ^= 4
            path.write_bytes(data)
    assert name in refused(capsys, source, out, to)
    assert not (out / "model_layers_2.safetensors").exists()


def test_a_damaged_dfloat11_checkpoint(capsys, dfloat11, tmp_path, out):
    source = copied(dfloat11, tmp_path)
    with open(source / "model_layers_2.safetensors", "r+b") as file:
        file.truncate(10_000)
    assert "model_layers_2.safetensors" in refused(capsys, source, out, "dense")
    assert not out.exists()


@pytest.mark.parametrize(("made_from", "to"), [("lossless", "dense"), ("plain", "dfloat11"),
                                               ("dfloat11", "dense")])  # fmt: skip
def test_disk_that_fills_up(request, capsys, monkeypatch, tmp_path, out, made_from, to):
    source = request.getfixturevalue(made_from)
    export(source, tmp_path / "whole", to)
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        line = refused(capsys, source, out, to)
    assert "the disk is full" in line and "resume" in line
    export(source, out, to)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(("made_from", "to"), [("lossless", "dense"), ("plain", "dfloat11"),
                                               ("dfloat11", "dense")])  # fmt: skip
def test_a_folder_that_cannot_be_written(request, capsys, monkeypatch, out, made_from, to):
    def read_only(self, *arguments, **keywords):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", read_only)
        line = refused(capsys, request.getfixturevalue(made_from), out, to)
    assert str(out) in line and "cannot write (Read-only file system)" in line
    assert not out.exists()


def test_an_unfinished_export_is_no_checkpoint(capsys, plain, out):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(plain, out, "dfloat11", stop)
    for command in (["inspect", str(out)], ["generate", str(out), "--prompt", "x"]):
        assert main(command) == 1
        assert "unfinished run" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"config\.json"):
        DFloat11Checkpoint.open(out)


def test_another_source_of_the_same_shape_does_not_go_on(plain, tmp_path, out):
    """Headers and config are the same; the files are not."""

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(plain, out, "dfloat11", stop)
    with pytest.raises(CheckpointError, match="unfinished run of something else"):
        export(copied(plain, tmp_path), out, "dfloat11")
