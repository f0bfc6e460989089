"""Where the library comes from: caches, keys, races, and everything that must be refused."""

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fewbit.quant.native import compiler

HAS_COMPILER = compiler.library() is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason=str(compiler.why_not()))
TINY = "int fewbit_answer(void) { return 42; }\n"


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A tiny source folder and an empty cache, as a new process would see them."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "tiny.c").write_text(TINY)
    monkeypatch.setattr(compiler, "FOLDER", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("FEWBIT_NATIVE", "CC"):
        monkeypatch.delenv(name, raising=False)
    compiler._found.cache_clear()
    yield tmp_path
    compiler._found.cache_clear()


def again():
    """What a new process would find."""
    compiler._found.cache_clear()
    return compiler.library()


def kept(tmp_path):
    return sorted((tmp_path / "cache" / "fewbit" / "native").iterdir())


@needs_compiler
def test_compiled_once_and_kept_privately(fresh, monkeypatch):
    assert compiler.library().fewbit_answer() == 42
    assert compiler.why_not() is None
    (path,) = kept(fresh)
    assert path.stat().st_mode & 0o777 == 0o700
    assert path.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(compiler, "_compiled", lambda *_: pytest.fail("compiled again"))
    assert again().fewbit_answer() == 42


@needs_compiler
def test_other_sources_and_flags_make_other_libraries(fresh, monkeypatch):
    assert compiler.library() is not None
    (fresh / "sources" / "tiny.c").write_text(TINY.replace("42", "43"))
    assert again().fewbit_answer() == 43
    (fresh / "sources" / "new.h").write_text("/* nothing */\n")
    assert again().fewbit_answer() == 43
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-g"))
    assert again() is not None
    assert len(kept(fresh)) == 4


@needs_compiler
def test_processes_that_start_at_once_share_one_library(fresh):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: compiler._kept().fewbit_answer(), range(4)))
    assert found == [42] * 4
    assert len(kept(fresh)) == 1


@needs_compiler
def test_what_others_can_write_is_refused_by_name(fresh):
    folder = fresh / "cache" / "fewbit" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert again() is None
    assert f"{folder} is writable for others (mode 777)" in compiler.why_not()
    folder.chmod(0o700)
    folder.parent.chmod(0o775)
    assert again() is None
    assert f"{folder.parent} is writable for others" in compiler.why_not()
    folder.parent.chmod(0o755)
    assert again() is not None
    (path,) = kept(fresh)
    path.chmod(0o766)
    assert again() is None
    assert f"{path} is writable" in compiler.why_not()


@needs_compiler
def test_links_and_files_of_other_users_are_refused(fresh, monkeypatch):
    assert compiler.library() is not None
    (path,) = kept(fresh)
    moved = path.rename(fresh / "elsewhere.so")
    path.symlink_to(moved)
    assert again() is None
    assert "symbolic link" in compiler.why_not()
    path.unlink()
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    assert again() is None
    assert f"belongs to user {real}, not to us ({real + 1})" in compiler.why_not()


@needs_compiler
@pytest.mark.parametrize("obstacle", ["a file", "relative"])
def test_without_a_folder_it_is_compiled_for_this_process(fresh, monkeypatch, obstacle):
    if obstacle == "a file":
        (fresh / "cache").write_text("not a folder")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "relative/cache")
        monkeypatch.chdir(fresh)
    assert again().fewbit_answer() == 42
    assert not list(fresh.rglob("*.so"))


@needs_compiler
def test_a_truncated_library_is_named(fresh):
    path = compiler._cache_folder() / f"{compiler._key(compiler._compiler())}.so"
    path.write_bytes(b"\x7fELF")
    path.chmod(0o700)
    assert again() is None
    assert f"{path} cannot be loaded" in compiler.why_not()
    assert "delete it" in compiler.why_not()


@needs_compiler
def test_a_shipped_library_is_used_if_its_sources_are_these(fresh, monkeypatch):
    path = compiler.build(fresh / "sources")
    assert path.name == "fewbit_native.so"
    monkeypatch.setattr(compiler, "_kept", lambda: ctypes.CDLL(None))
    assert again().fewbit_answer() == 42
    (fresh / "sources" / "tiny.c").write_text(TINY + "\n")
    assert not hasattr(again(), "fewbit_answer")


def test_reasons_name_the_remedy(fresh, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    assert again() is None
    assert "CC='no-such-compiler -m64' names no program; install a C compiler" in compiler.why_not()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(fresh))
    assert again() is None
    assert "there is no C compiler" in compiler.why_not()
    monkeypatch.setenv("FEWBIT_NATIVE", "off")
    assert again() is None
    assert compiler.is_off()
    assert "FEWBIT_NATIVE=off" in compiler.why_not()


@needs_compiler
def test_a_compiler_that_fails_is_quoted(fresh):
    (fresh / "sources" / "tiny.c").write_text("#error not for this machine\n")
    assert again() is None
    assert "not for this machine" in compiler.why_not()
    with pytest.raises(RuntimeError, match="cannot compile"):
        compiler.build(fresh / "sources")
    assert not list(fresh.rglob("*.so"))


def test_the_cap_on_instructions(monkeypatch):
    for name, cap in (("scalar", 0), ("avx2", 1), ("AVX512", 2), ("", 2), ("sse9", 2)):
        monkeypatch.setenv("FEWBIT_NATIVE_ISA", name)
        assert compiler.isa_cap() == cap


@needs_compiler
def test_off_is_read_by_a_new_process():
    code = "from fewbit.quant.codecs import rans32; print(rans32.engine_name())"
    environment = {**os.environ, "FEWBIT_NATIVE": "off"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "numpy"
    assert "numpy" not in ended.stderr  # asked for: no warning


@needs_compiler
def test_the_real_sources_compile_without_warnings(tmp_path):
    """With another compiler's eyes, too, if there is one."""
    command = compiler._compiler()
    files = [str(path) for path in compiler.sources() if path.suffix == ".c"]
    ended = subprocess.run(
        [*command, "-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
         "-o", str(tmp_path / "library.so"), *files],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
