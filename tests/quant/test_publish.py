"""First and last step: whose folder it is, and that only what reads back equal is published."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.export.journal import JOURNAL, Journal
from fewbit.export.metadata import MANIFEST, read_manifest
from fewbit.quant import layout, pipeline, publish
from fewbit.quant.errors import CheckpointError
from fewbit.quant.pipeline import quantize
from fewbit.quant.publish import INDEX, check_folder, discard
from fewbit.quant.stored import open_stored
from fewbit.quant.verify import verify_checkpoint


@pytest.fixture
def source(tmp_path):
    """Three matrices and a norm; K of one is no multiple of the group."""
    folder = tmp_path / "my-model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.up.weight": torch.randn(64, 128, generator=generator).bfloat16()
               for i in range(2)}  # fmt: skip
    tensors["layers.0.down.weight"] = torch.randn(64, 200, generator=generator).bfloat16()
    tensors["norm.weight"] = torch.ones(128)
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "toy", "text_config": {"a": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def run(source, out, recipe="w4a16-rtn", **more):
    return quantize(source, out, recipe=recipe, device="cpu", **more)


def stop_before_the_end(monkeypatch, source, out, at="_write_index"):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(publish, at, stop)
        run(source, out)


# --- whose folder -------------------------------------------------------------------------------


def test_absent_and_empty_folders_are_free(tmp_path):
    check_folder(tmp_path / "absent", False, tmp_path)
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty", False, tmp_path)
    discard(tmp_path / "absent")
    discard(tmp_path / "empty")
    assert not (tmp_path / "absent").exists()
    assert not any((tmp_path / "empty").iterdir())


def test_journal_and_manifest_make_a_folder_ours(monkeypatch, source, tmp_path):
    out = tmp_path / "out"
    stop_before_the_end(monkeypatch, source, out)
    check_folder(out, False, source)
    run(source, out)
    with pytest.raises(CheckpointError, match="finished checkpoint"):
        check_folder(out, False, source)
    check_folder(out, True, source)


def test_discard_removes_what_the_run_wrote_and_nothing_else(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    (out / "mine.txt").write_text("mine")
    (out / "model.bin").write_text("mine")
    (out / "sub").mkdir()
    check_folder(out, True, source)
    discard(out)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [JOURNAL, "mine.txt", "model.bin", "sub"]
    )
    assert (out / JOURNAL).read_bytes() == b""  # ours still, and free for a new run
    run(source, out)
    verify_checkpoint(out)


USERS = ("model_notes.safetensors", "model-1.safetensors", "download.partial", "fewbit.hidden",
         "model.safetensors.bak")  # fmt: skip


def test_files_that_only_look_like_ours_stay(monkeypatch, source, tmp_path):
    out = tmp_path / "out"
    stop_before_the_end(monkeypatch, source, out)
    for name in USERS:
        (out / name).write_text("mine")
    run(source, out)
    assert all((out / name).read_text() == "mine" for name in USERS)
    torn = ("model-00001-of-00002.safetensors.partial", "tokenizer.json.partial",
            "fewbit.hidden.partial")  # fmt: skip
    for name in torn:
        (out / name).write_text("torn")
    discard(out)
    assert {path.name for path in out.iterdir()} == {JOURNAL, *USERS}


def test_restart_removes_what_another_source_left_before_its_manifest(
    monkeypatch, source, tmp_path
):
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(source, other)
    (other / "chat_template.jinja").write_text("of the other")
    stop_before_the_end(monkeypatch, other, out)
    assert (out / "chat_template.jinja").is_file() and not (out / MANIFEST).exists()
    run(source, out, restart=True)
    assert not (out / "chat_template.jinja").exists()
    verify_checkpoint(out)


def test_a_killed_removal_can_be_repeated(monkeypatch, source, tmp_path):
    out, real = tmp_path / "out", Path.unlink
    stop_before_the_end(monkeypatch, source, out)

    def stop(path, *arguments, **more):
        if path.suffix == ".safetensors":
            raise KeyboardInterrupt
        real(path, *arguments, **more)

    (out / "config.json").write_text("{}")
    (out / "tokenizer.json.partial").write_text("torn")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", stop)
        discard(out)
    assert {path.name for path in out.iterdir()} == {JOURNAL, "model.safetensors"}
    (out / "tokenizer.json").write_text("{}")  # the journal still knows it
    discard(out)
    assert {path.name for path in out.iterdir()} == {JOURNAL}


def test_another_recipe_in_an_unfinished_folder_is_called_so(monkeypatch, tmp_path):
    def stop(*arguments):
        raise KeyboardInterrupt

    model, out = Path(publish.__file__).parent / "data" / "tiny-llama", tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline, "_run", stop)
        run(model, out, recipe="w4a16", samples=2, length=32)
    with pytest.raises(CheckpointError, match=r"another recipe\.name: w4a16, now w8a16"):
        run(model, out, recipe="w8a16")


def test_the_journal_cannot_name_files_elsewhere(monkeypatch, source, tmp_path):
    out, outside = tmp_path / "out", tmp_path / "outside.txt"
    stop_before_the_end(monkeypatch, source, out)
    outside.write_text("mine")
    (out / "sub").mkdir()
    journal = Journal(out / JOURNAL)
    journal.open()
    names = ["../outside.txt", str(outside), "..", ".", "", "sub", JOURNAL, 3, None]
    for event in ({"event": "extras", "names": names}, {"event": "extras"}, {"event": "later"}):
        journal.append(event)
    journal.close()
    discard(out)
    assert outside.read_text() == "mine"
    assert {path.name for path in out.iterdir()} == {JOURNAL, "sub"}


def test_discard_copes_with_damaged_facts(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    (out / MANIFEST).write_bytes(b"{}")
    (out / JOURNAL).write_bytes(b"rubbish\n")
    run(source, out, restart=True)
    verify_checkpoint(out)


def test_discard_waits_for_no_other_process(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    journal = Journal(out / JOURNAL)
    journal.open()
    with pytest.raises(CheckpointError, match="another fewbit process"):
        discard(out)
    journal.close()
    assert (out / "model.safetensors").is_file()


# --- what is published --------------------------------------------------------------------------


def test_config_comes_last(monkeypatch, source, tmp_path):
    out, order = tmp_path / "out", []
    real = publish.write_atomic
    monkeypatch.setattr(
        publish, "write_atomic", lambda path, data: (order.append(path.name), real(path, data))[1]
    )
    run(source, out)
    assert order == ["tokenizer.json", MANIFEST, "config.json"]
    assert not (out / JOURNAL).exists()
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors", "tokenizer.json", MANIFEST, "report.json", "report.html", "config.json",
    }  # fmt: skip


def test_config_says_how_weights_are_stored(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "toy"
    found = config["quantization_config"]
    assert (found["quant_method"], found["version"], found["recipe"]) == ("fewbit", 1, "w4a16-rtn")
    options = {"bits": 4, "group": 128, "symmetric": True, "scale": "fp16"}
    assert found["default"] == {"terms": [{"format": "int_group", **options}]}
    assert found["tensors"] == {"layers.0.down": {"columns": 200}}


def test_a_copy_has_no_quantization_config(source, tmp_path):
    run(source, tmp_path / "out", recipe="identity")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((source / "config.json").read_text())


def test_manifest_records_where_it_comes_from(source, tmp_path):
    out = tmp_path / "out"
    run(source, out, seed=3)
    manifest = read_manifest(out)
    assert manifest["source"]["name"] == "my-model"  # and not where it lies on this machine
    assert str(tmp_path) not in (out / MANIFEST).read_text() + (out / "report.json").read_text()
    assert len(manifest["source"]["fingerprint"]) == 64
    assert manifest["seed"] == 3 and manifest["calibration"] is None
    assert json.loads(manifest["recipe"]["text"])["weights"]["bits"] == 4
    assert manifest["environment"]["torch"] == torch.__version__
    assert manifest["tensors"].keys() == load_file(out / "model.safetensors").keys()
    assert manifest["modules"]["layers.0.down"]["shape"] == [64, 200]
    assert manifest["modules"]["layers.1.up"]["bits_per_weight"] == 4.125


def test_many_exceptions_move_to_the_manifest(monkeypatch, source, tmp_path):
    monkeypatch.setattr(publish, "MAX_INLINE_EXCEPTIONS", 0)
    out = tmp_path / "out"
    run(source, out)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["tensors"] == {}
    assert read_manifest(out)["exceptions"] == {"layers.0.down": {"columns": 200}}
    verify_checkpoint(out)
    assert open_stored(out).modules["layers.0.down"].shape == (64, 200)


def test_several_shards_have_an_index(monkeypatch, source, tmp_path):
    monkeypatch.setattr(layout, "UNIT_BYTES", 1)
    monkeypatch.setattr(pipeline, "MAX_SHARD_BYTES", 5000)
    out = tmp_path / "out"
    run(source, out)
    index = json.loads((out / INDEX).read_text())
    found = {n: path.name for path in out.glob("*.safetensors") for n in load_file(path)}
    assert index["weight_map"] == found and len(set(found.values())) > 1
    total = sum(t.nbytes for path in out.glob("*.safetensors") for t in load_file(path).values())
    assert index["metadata"]["total_size"] == total
    verify_checkpoint(out)


def test_encoding_of_the_source_is_left_out(source, tmp_path):
    config = {"quantization_config": {"quant_method": "fp8"}, "a": 1,
              "text_config": {"quantization_config": {"quant_method": "fp8"}, "b": 2}}  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    run(source, tmp_path / "out", recipe="identity")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"a": 1, "text_config": {"b": 2}}


def test_the_name_of_a_hub_model_is_its_id(tmp_path):
    hub = SimpleNamespace(name="org/model", folder=tmp_path)
    assert publish.public_name(hub) == "org/model"
    local = SimpleNamespace(name=f"{tmp_path}/", folder=Path(f"{tmp_path}/"))
    assert publish.public_name(local) == tmp_path.name


# --- what reads back differently ----------------------------------------------------------------


@pytest.mark.parametrize("place", ["header", "first", "last"])
def test_what_reads_back_differently_is_not_published(monkeypatch, source, tmp_path, place):
    out = tmp_path / "out"
    stop_before_the_end(monkeypatch, source, out)
    shard = out / "model.safetensors"
    data = bytearray(shard.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    if place == "header":  # a dtype of the same size
        at = data.index(b'"F16"')
        data[at : at + 5] = b'"I16"'
    else:
        data[begin if place == "first" else -1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="reads back differently") as error:
        run(source, out)
    named = {"header": "its header", "first": "norm.weight", "last": "layers.1.up.scale_group"}
    assert named[place] in str(error.value)
    assert not (out / "config.json").exists()
    run(source, out, restart=True)
    verify_checkpoint(out)


def test_a_shard_that_vanished_is_named(monkeypatch, source, tmp_path):
    out = tmp_path / "out"
    stop_before_the_end(monkeypatch, source, out)
    (out / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        run(source, out)


def test_torn_files_of_a_kill_do_not_stay(monkeypatch, source, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(source, whole)
    stop_before_the_end(monkeypatch, source, out)
    for name in ("config.json.partial", "fewbit.hidden.partial"):
        (out / name).write_text("torn")
    run(source, out)
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


def test_a_tokenizer_that_vanished_is_named(monkeypatch, source, tmp_path):
    out, kept = tmp_path / "out", tmp_path / "kept"
    real = publish.verify_written

    def vanish(job, writer):
        real(job, writer)
        shutil.move(source / "tokenizer.json", kept)

    with monkeypatch.context() as patched:
        patched.setattr(publish, "verify_written", vanish)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot read"):
            run(source, out)
    shutil.move(kept, source / "tokenizer.json")
    run(source, out)
    verify_checkpoint(out)
