"""Where the library comes from: caches, keys, races, and everything that must be refused."""

import ctypes
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from fewbit.quant.errors import RecipeError
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
@pytest.mark.parametrize("umask", [0o002, 0o000, 0o022, 0o077])
def test_folders_are_ours_alone_under_every_umask(fresh, umask):
    before = os.umask(umask)
    try:
        assert compiler.library() is not None, compiler.why_not()
    finally:
        os.umask(before)
    cache = fresh / "cache"
    for folder in (cache, cache / "fewbit", cache / "fewbit" / "native"):
        assert folder.stat().st_mode & 0o777 == 0o700


@needs_compiler
def test_others_lose_the_right_to_write_to_our_folders(fresh):
    """As other modules make ~/.cache/fewbit, with the rights that `umask 002` leaves."""
    folder = fresh / "cache" / "fewbit" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    folder.parent.chmod(0o775)
    assert again() is not None, compiler.why_not()
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o755
    (path,) = kept(fresh)
    path.chmod(0o766)
    assert again() is None
    assert f"{path} is writable for others (mode 766)" in compiler.why_not()


@needs_compiler
def test_a_file_system_without_rights_is_refused_by_name(fresh, monkeypatch):
    folder = fresh / "cache" / "fewbit" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    monkeypatch.setattr(type(folder), "chmod", lambda *_: None)
    assert again() is None
    assert f"{folder} is writable for others (mode 777)" in compiler.why_not()


@needs_compiler
def test_links_and_files_of_other_users_are_refused(fresh, monkeypatch):
    assert compiler.library() is not None
    (path,) = kept(fresh)
    moved = path.rename(fresh / "elsewhere.so")
    path.symlink_to(moved)
    assert again() is None
    assert "symbolic link" in compiler.why_not()
    path.unlink()
    inside = path.parent.rename(fresh / "inside")
    path.parent.symlink_to(inside)
    assert again() is None
    assert f"{path.parent} is a symbolic link" in compiler.why_not()
    path.parent.unlink()
    path.parent.mkdir()
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
@pytest.mark.parametrize("other", ["-", "-0"])  # of a sum that no new one has
@pytest.mark.parametrize("damage", ["header", "half", "junk", "empty"])
def test_a_damaged_library_is_made_again(fresh, monkeypatch, damage, other):
    """Half of one would end the process: what lies behind its end cannot be read."""
    assert compiler.library() is not None
    (path,) = kept(fresh)
    whole = path.read_bytes()
    bad = {"header": whole[:4], "half": whole[: len(whole) // 2], "junk": b"x" * 999, "empty": b""}
    path.unlink()
    path = path.with_name(path.name.replace("-", other))
    path.write_bytes(bad[damage])
    path.chmod(0o700)
    calls, compiled = [], compiler._compiled
    monkeypatch.setattr(compiler, "_compiled", lambda *a: calls.append(a) or compiled(*a))
    assert again().fewbit_answer() == 42, compiler.why_not()
    assert again().fewbit_answer() == 42
    assert len(calls) == 1
    (path,) = kept(fresh)
    assert path.read_bytes()[:4] == whole[:4] and len(path.read_bytes()) == len(whole)


@needs_compiler
def test_a_library_that_never_loads_is_named(fresh, monkeypatch):
    calls = []

    def unloadable(path):
        calls.append(path)
        raise OSError("wrong machine")

    monkeypatch.setattr(ctypes, "CDLL", unloadable)
    for n_calls in (1, 3):  # what is kept is tried, then made again, once
        assert again() is None
        assert "cannot be loaded (wrong machine)" in compiler.why_not()
        assert len(calls) == n_calls
    assert len(kept(fresh)) == 1


@needs_compiler
def test_where_nothing_may_be_executed_it_is_compiled_elsewhere(fresh, monkeypatch):
    found = os.statvfs(fresh)
    flags = found.f_flag | os.ST_NOEXEC
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*found[:8], flags, found[9])))
    assert again().fewbit_answer() == 42
    assert not kept(fresh)


@needs_compiler
@pytest.mark.parametrize(
    ("owner", "name"),
    [(tempfile, "mkstemp"), (compiler.Path, "lstat"), (compiler.Path, "glob"),
     (compiler.Path, "replace"), (tempfile, "TemporaryDirectory"), (compiler.Path, "read_bytes")],
)  # fmt: skip
def test_nothing_is_raised_when_the_disk_is_full(fresh, monkeypatch, owner, name):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if name == "TemporaryDirectory":
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(owner, name, full)
    assert again() is None or name == "lstat"  # then for this process alone
    if name != "lstat":
        assert "No space left on device" in compiler.why_not()
        assert "make room" in compiler.why_not()


@needs_compiler
def test_nothing_is_raised_about_words_that_are_none(fresh, monkeypatch):
    monkeypatch.setenv("CC", "'gcc")
    assert again() is None
    assert 'CC="\'gcc" is no command (No closing quotation)' in compiler.why_not()
    speaker = fresh / "speaker"
    speaker.write_bytes(b"#!/bin/sh\nprintf 'error \\377'\nprintf 'error \\377' >&2\n"
                        b"[ $1 = --version ]\n")  # fmt: skip
    speaker.chmod(0o700)
    monkeypatch.setenv("CC", str(speaker))
    assert again() is None
    assert "cannot compile fewbit's C files: error \ufffd" in compiler.why_not()
    monkeypatch.delenv("CC")
    (fresh / "sources" / "fewbit_native.so").write_bytes(b"")
    (fresh / "sources" / "fewbit_native.sha256").write_bytes(b"\xff\xfe")
    assert again().fewbit_answer() == 42


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
    for name, cap in (("scalar", 0), ("avx2", 1), ("AVX512", 2), ("", 2)):
        monkeypatch.setenv("FEWBIT_NATIVE_ISA", name)
        assert compiler.isa_cap() == cap


def test_unknown_values_are_refused_by_name(fresh, monkeypatch):
    for value in ("avx-2", "sse9", "2"):
        monkeypatch.setenv("FEWBIT_NATIVE_ISA", value)
        for read in (compiler.isa_cap, compiler.library, compiler.why_not):
            with pytest.raises(RecipeError, match=f"FEWBIT_NATIVE_ISA='{value}' is unknown"):
                read()
    monkeypatch.setenv("FEWBIT_NATIVE_ISA", "avx-2")
    with pytest.raises(
        RecipeError, match=r"did you mean 'avx2'\?\); set it to one of scalar, avx2, avx5"
    ):
        compiler.isa_cap()
    monkeypatch.setenv("FEWBIT_NATIVE_ISA", "")
    monkeypatch.setenv("FEWBIT_NATIVE", "false")
    for read in (compiler.is_off, compiler.library):
        with pytest.raises(
            RecipeError, match=r"FEWBIT_NATIVE='false' is unknown.* unset it for on"
        ):
            read()
    for value, off in (("", False), ("On", False), ("1", False), ("OFF", True), ("no", True)):
        monkeypatch.setenv("FEWBIT_NATIVE", value)
        assert compiler.is_off() == off


@needs_compiler
def test_as_a_script(fresh):
    """How a wheel is built: from copied sources, where there is no package around them."""
    script = fresh / "sources" / "compiler.py"
    shutil.copyfile(compiler.__file__, script)
    ended = subprocess.run(
        [sys.executable, str(script), str(fresh)], capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == str(fresh / "fewbit_native.so")
    assert ctypes.CDLL(ended.stdout.strip()).fewbit_answer() == 42


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
