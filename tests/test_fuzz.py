"""Random damage: every flipped bit and every truncation is a named error, never a wrong load.

About 2,200 cases. What may follow the damage:

    files of a result            always a FewbitError from the verification
    a sample of them, loaded     always a FewbitError
    journal and partial shard    a FewbitError, or a resumed run with the bytes of an undisturbed one
    headers of a source          a FewbitError, or a result that verifies
"""

import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch

import tiny_models
from fewbit.quant import layout, pipeline
from fewbit.quant.errors import FewbitError
from fewbit.quant.inspect import inspect
from fewbit.quant.load import load
from fewbit.quant.pipeline import quantize

SCALE = 10


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def small_units():
    """Several units and several shards even of a tiny model."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layout, "UNIT_BYTES", 10_000)
        patched.setattr(pipeline, "MAX_SHARD_BYTES", 30_000)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_models.save("llama", tmp_path_factory.mktemp("source"), torch.bfloat16)


def run(source, out, **more):
    return quantize(source, out, recipe="w4a16-rtn", device="cpu", **more)


@pytest.fixture(scope="module")
def result(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("result") / "out"
    run(source, out)
    assert len(list(out.glob("*.safetensors"))) > 2
    return out


class Stop(Exception):
    """Ends a run from inside, as a kill would."""


@pytest.fixture(scope="module")
def unfinished(source, tmp_path_factory):
    """A run stopped past its middle, with closed shards and an open one."""
    out = tmp_path_factory.mktemp("unfinished") / "out"

    def stop(state):
        both = any(out.glob("*.partial")) and any(out.glob("*.safetensors"))
        if both and 2 * state.done > state.total:
            raise Stop

    with pytest.raises(Stop):
        run(source, out, progress=stop)
    return out


def damaged(data: bytes, generator: random.Random, begin: int = 0, end: int | None = None) -> bytes:
    """One flipped bit in [begin, end), or a truncation there."""
    end = len(data) if end is None else end
    place = generator.randrange(begin, end)
    if generator.random() < 0.25:
        return data[:place]
    changed = bytearray(data)
    changed[place] ^= 1 << generator.randrange(8)
    return bytes(changed)


def header_range(data: bytes) -> tuple[int, int]:
    return 0, 8 + struct.unpack("<Q", data[:8])[0]


def quantization_range(data: bytes) -> tuple[int, int]:
    begin = data.index(b'"quantization_config"')
    return begin, data.index(b"\n  }", begin)


def pick(folder: Path, kind: str, generator: random.Random) -> tuple[Path, tuple[int, int]]:
    """A file of `kind` and the range of its bytes that is to be damaged."""
    shards = sorted(folder.glob("*.safetensors"))
    if kind in ("header", "data"):
        path = generator.choice(shards)
        data = path.read_bytes()
        begin, end = header_range(data)
        return path, (begin, end) if kind == "header" else (end, len(data))
    name = {"index": "model.safetensors.index.json", "config": "config.json",
            "manifest": "fewbit.json"}[kind]  # fmt: skip
    path = folder / name
    data = path.read_bytes()
    return path, quantization_range(data) if kind == "config" else (0, len(data))


def undamaged_differs(folder: Path, copy: Path) -> list[str]:
    """Names of files that differ, times aside."""

    def files(where):
        return {p.name: p.read_bytes() for p in where.iterdir() if not p.name.startswith("report.")}

    ours, theirs = files(folder), files(copy)
    return [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]


@pytest.mark.parametrize(
    ("kind", "cases"),
    [("header", 40), ("data", 25), ("index", 20), ("config", 30), ("manifest", 25)],
)
def test_result(result, kind, cases):
    generator = random.Random(kind)
    inspect(result, verify=True)
    for case in range(cases * SCALE):
        path, (begin, end) = pick(result, kind, generator)
        original = path.read_bytes()
        path.write_bytes(damaged(original, generator, begin, end))
        try:
            with pytest.raises(FewbitError) as error:
                inspect(result, verify=True)
            assert str(error.value), case
        finally:
            path.write_bytes(original)
    inspect(result, verify=True)


@pytest.mark.parametrize("kind", ["header", "data", "index", "config", "manifest"])
def test_loads(result, kind):
    generator = random.Random(kind + "load")
    for _ in range(2 * SCALE):
        path, (begin, end) = pick(result, kind, generator)
        original = path.read_bytes()
        path.write_bytes(damaged(original, generator, begin, end))
        try:
            with pytest.raises(FewbitError):
                load(result, device="cpu")
        finally:
            path.write_bytes(original)
    load(result, device="cpu")


@pytest.mark.parametrize(("kind", "cases"), [("fewbit.journal", 25), ("*.partial", 5),
                                             ("*.safetensors", 5)])  # fmt: skip
def test_unfinished_run(source, result, unfinished, tmp_path, kind, cases):
    generator = random.Random(kind)
    outcomes = set()
    for case in range(cases * SCALE):
        copy = Path(shutil.copytree(unfinished, tmp_path / str(case)))
        path = generator.choice(sorted(copy.glob(kind)))
        path.write_bytes(damaged(path.read_bytes(), generator))
        try:
            run(source, copy)
        except FewbitError as error:
            assert str(error)
            assert not (copy / "config.json").exists()
            outcomes.add("error")
        else:
            assert not undamaged_differs(copy, result), case
            outcomes.add("resumed")
        shutil.rmtree(copy)
    assert "error" in outcomes


def test_every_truncation_of_the_journal(source, result, unfinished, tmp_path):
    """Cut at and beside each line's end, where a kill leaves it; the run always comes to its end."""
    data = (unfinished / "fewbit.journal").read_bytes()
    ends = [index + 1 for index, byte in enumerate(data) if byte == 10]
    cuts = {end + step for end in ends for step in (-1, 0, 7) if end + step <= len(data)}
    for cut in sorted(cuts):
        copy = Path(shutil.copytree(unfinished, tmp_path / str(cut)))
        (copy / "fewbit.journal").write_bytes(data[:cut])
        if cut < ends[0]:  # nothing says any more whose shards these are
            with pytest.raises(FewbitError, match="--restart"):
                run(source, copy)
            run(source, copy, restart=True)
        else:
            run(source, copy)
        assert not undamaged_differs(copy, result), cut
        shutil.rmtree(copy)


def test_source_headers(source, tmp_path):
    generator = random.Random("source")
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    path = copy / "model.safetensors"
    original = path.read_bytes()
    errors = 0
    for case in range(25 * SCALE):
        path.write_bytes(damaged(original, generator, *header_range(original)))
        out = tmp_path / f"out{case}"
        try:
            run(copy, out)
        except FewbitError as error:
            assert str(error)
            assert not (out / "config.json").exists()
            errors += 1
        else:  # another name, or a shape that fits as well
            inspect(out, verify=True)
        shutil.rmtree(out, ignore_errors=True)
    assert errors > 10 * SCALE


def test_source_index(tmp_path, source):
    """An index over two files; damage leads to an error, or to the same tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(source / "config.json", copy)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, copy / file)
        weight_map |= dict.fromkeys(part, file)
    path = copy / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    original = path.read_bytes()
    generator = random.Random("index")
    for case in range(10 * SCALE):
        path.write_bytes(damaged(original, generator))
        out = tmp_path / f"out{case}"
        try:
            run(copy, out)
        except FewbitError as error:
            assert str(error)
        else:
            inspect(out, verify=True)
        shutil.rmtree(out, ignore_errors=True)
