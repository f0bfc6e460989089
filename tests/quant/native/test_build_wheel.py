"""A wheel that is built, installed and used where there is no compiler; its bytes can be made again."""

import base64
import csv
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fewbit.quant.native import build_wheel as module
from fewbit.quant.native import compiler
from fewbit.quant.native.build_wheel import build_wheel, repacked, tag

NATIVE = Path("fewbit/quant/native")
# Not find_spec: looking for pip makes setuptools hand out the standard library's distutils from then
# on, in this process, and torch's compiler asserts that it is setuptools' own.
INSTALLED = {found.metadata["Name"] for found in importlib.metadata.distributions()}
MISSING = [name for name in ("pip", "setuptools") if name not in INSTALLED]

# What an installed fewbit says of itself: engine, where it and its library come from, a round trip.
PROBE = """
import json, shutil
import numpy as np
import fewbit.quant.native.compiler as compiler
from fewbit.quant.codecs import rans32
data = np.random.default_rng(0).integers(0, 9, 100_000).astype(np.uint8)
freq = rans32.normalize(np.bincount(data, minlength=256))
group = rans32.encode_symbols(data, freq)
library = compiler.library()
print(json.dumps({
    "engine": rans32.engine_name(),
    "file": compiler.__file__,
    "library": None if library is None else library._name,
    "why_not": compiler.why_not(),
    "compiler": [shutil.which(name) for name in ("cc", "gcc", "clang")],
    "same": bool((rans32.decode_symbols(group, data.size, freq) == data).all()),
    "words": int(group.words.size),
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if MISSING:
        pytest.skip(f"a wheel is built by pip and setuptools; missing: {', '.join(MISSING)}")
    if compiler.library() is None:
        pytest.skip(f"no native library to put into a wheel: {compiler.why_not()}")
    with pytest.MonkeyPatch.context() as patch:  # a copy: what is being written changes nothing
        copied = module._copied(module.CHECKOUT, tmp_path_factory.mktemp("checkout") / "copy")
        patch.setattr(module, "CHECKOUT", copied)
        yield build_wheel(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = (
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--no-index", "--no-compile", "--target", str(target), str(wheel),
    )  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return target


def probed(target: Path, cache: Path) -> dict[str, Any]:
    """`PROBE` in a process that has the installed fewbit, the dependencies, and no program at all on
    its path. -S: no .pth file may bring back the checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FEWBIT")}
    kept.pop("CC", None)
    site = sysconfig.get_path("purelib")
    env = {
        **kept, "PATH": str(cache), "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": os.pathsep.join([str(target), site]),
    }  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-S", "-c", PROBE], env=env, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(ended.stdout))


def test_installed_without_a_compiler_it_uses_its_own_library(
    installed: Path, tmp_path: Path
) -> None:
    found = probed(installed, tmp_path)
    assert found["compiler"] == [None, None, None]
    assert Path(found["file"]).parent == installed / NATIVE
    assert found["library"] == str(installed / NATIVE / "fewbit_native.so")
    assert found["engine"] in compiler.ISA_NAMES and found["why_not"] is None
    assert found["same"]
    assert list(tmp_path.rglob("*.so")) == [], "nothing was compiled"


def test_a_library_of_other_sources_is_not_used(installed: Path, tmp_path: Path) -> None:
    hashed = installed / NATIVE / "fewbit_native.sha256"
    before = hashed.read_text()
    hashed.write_text("0" * 64 + "\n")
    found = probed(installed, tmp_path)
    hashed.write_text(before)
    assert found["engine"] == "numpy" and found["same"]
    assert "there is no C compiler" in found["why_not"]


def test_name_and_facts_say_what_it_is(wheel: Path) -> None:
    assert wheel.name.endswith(f"-{tag()}.whl") and tag().startswith("py3-none-")
    assert not any(mark in tag() for mark in ("any", "manylinux", "."))
    assert list(wheel.parent.iterdir()) == [wheel], "no partial file is left"
    with zipfile.ZipFile(wheel) as files:
        name = next(name for name in files.namelist() if name.endswith(".dist-info/WHEEL"))
        lines = files.read(name).decode().splitlines()
    assert "Root-Is-Purelib: false" in lines and "Root-Is-Purelib: true" not in lines
    assert [line for line in lines if line.startswith("Tag:")] == [f"Tag: {tag()}"]


def test_it_holds_the_library_the_sources_and_their_hash(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        assert files.testzip() is None
        here = {Path(name).name: name for name in files.namelist() if Path(name).parent == NATIVE}
        assert {path.name for path in compiler.sources()} <= here.keys()
        digest = hashlib.sha256()
        for name in sorted(name for name in here if name.endswith((".c", ".h"))):
            text = files.read(here[name])
            digest.update(f"{name}\0{len(text)}\0".encode() + text)
        assert files.read(here["fewbit_native.sha256"]).decode() == digest.hexdigest() + "\n"
        assert files.read(here["fewbit_native.so"])[:4] in (b"\x7fELF", b"\xcf\xfa\xed\xfe")
        assert files.getinfo(here["fewbit_native.so"]).external_attr >> 16 == 0o755


def test_the_record_lists_every_file_with_its_hash(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        rows = {row[0]: row[1:] for row in csv.reader(files.read(names[-1]).decode().splitlines())}
        assert names[-1].endswith(".dist-info/RECORD") and rows.pop(names[-1]) == ["", ""]
        assert sorted(rows) == sorted(names[:-1])
        for name, (hashed, size) in rows.items():
            data = files.read(name)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            assert (hashed, int(size)) == (f"sha256={digest}", len(data))


def test_equal_sources_give_equal_bytes(wheel: Path, tmp_path: Path) -> None:
    again = build_wheel(tmp_path / "again")
    contents = []
    for path in (wheel, again):
        with zipfile.ZipFile(path) as files:
            contents.append({name: files.read(name) for name in files.namelist()})
    assert [name for name, data in contents[0].items() if contents[1].get(name) != data] == []
    assert again.read_bytes() == wheel.read_bytes()


def test_repacking_depends_on_neither_order_nor_dates(wheel: Path, tmp_path: Path) -> None:
    shuffled = tmp_path / "shuffled.whl"
    with zipfile.ZipFile(wheel) as files, zipfile.ZipFile(shuffled, "w") as target:
        for name in reversed(files.namelist()):
            target.writestr(zipfile.ZipInfo(name, (2020, 5, 17, 1, 2, 4)), files.read(name))
    assert repacked(shuffled.read_bytes(), {}) == wheel.read_bytes()


def test_without_a_checkout_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "CHECKOUT", tmp_path)
    with pytest.raises(RuntimeError, match=r"no pyproject.toml; build from a checkout"):
        build_wheel(tmp_path / "dist")


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"^CC='no-such-compiler' names no program; install"):
        build_wheel(tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


def test_what_pip_cannot_build_is_named_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'broken\n")
    with pytest.raises(RuntimeError, match=r"pip built no wheel \(.+\); .* pip install"):
        module._pure_wheel(tmp_path, tmp_path / "out")
