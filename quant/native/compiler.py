"""The C files of this folder as one library: compiled at first use, kept, and loaded with ctypes.

    python -m fewbit.quant.native.compiler FOLDER     leaves fewbit_native.so and .sha256 there

Where a library comes from, in this order:

    fewbit_native.so beside the sources     a wheel brought it; used if fewbit_native.sha256 holds the
                                            hash of the sources that are there
    ~/.cache/fewbit/native/<key>-<sum>.so   (or $XDG_CACHE_HOME) of an earlier run; the key hashes the
                                            sources, the compiler's version, the flags, the machine;
                                            the sum is of the file itself: what was cut short is not
                                            loaded, which could end the process, but made anew
    $CC, cc, gcc or clang                   compiles it, under a temporary name, renamed when complete:
                                            processes that start at once do not disturb each other

A library runs as us, so it must come from us: the folder and the file must belong to this user and
be no links, else they are refused by name. Others lose the right to write to our folders; a file that
they could write to is refused. Where no folder can be kept, or nothing in it may be executed, the
library is compiled for this process alone. Nothing is compiled for this one processor (no
-march=native): what is faster on newer ones is chosen at run time.

    FEWBIT_NATIVE=off|on                    no native code; on, the default, uses it where it can be had
    FEWBIT_NATIVE_ISA=scalar|avx2|avx512    at most these instructions

Another value of these two is a RecipeError, wherever one is read. Nothing else raises: `why_not` says
in a sentence what is in the way, and callers use numpy then. The file also runs as a script, before
there is a package, so it imports nothing of ours at its top.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NAME = "fewbit_native"
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC")
ISA_NAMES = ("scalar", "avx2", "avx512")
_OFF, _ON = ("off", "0", "no"), ("on", "1", "yes")
_INSTALL = "install a C compiler (gcc or clang) or set CC"
_SECONDS = 300


class _Unavailable(Exception):
    """Why there is no library; never leaves this module."""


def library() -> ctypes.CDLL | None:
    """The library, or None; found once a process. RecipeError: a wrong value in the environment."""
    return _found()[0]


def why_not() -> str | None:
    """A sentence on why `library` is None; None if it is not. RecipeError as `library`."""
    return _found()[1]


def is_off() -> bool:
    """Did the user ask for no native code? RecipeError if FEWBIT_NATIVE is neither on nor off."""
    return _asked("FEWBIT_NATIVE", (*_OFF, *_ON), "on") in _OFF


def isa_cap() -> int:
    """The place in `ISA_NAMES` of the best instruction set that may be used. RecipeError if
    FEWBIT_NATIVE_ISA names another."""
    return ISA_NAMES.index(_asked("FEWBIT_NATIVE_ISA", ISA_NAMES, ISA_NAMES[-1]))


def _asked(variable: str, allowed: tuple[str, ...], default: str) -> str:
    """One of `allowed`, as the environment has it."""
    value = os.environ.get(variable, "").lower() or default
    if value in allowed:
        return value
    from ..errors import RecipeError, nearest_name

    raise RecipeError(
        f"{variable}={os.environ[variable]!r} is unknown{nearest_name(value, allowed)}; set it to one "
        f"of {', '.join(allowed)}, or unset it for {default}"
    )


def sources() -> list[Path]:
    """The C files and headers, by name."""
    return sorted([*FOLDER.glob("*.c"), *FOLDER.glob("*.h")])


def source_hash() -> str:
    """SHA-256 of all sources and their names."""
    digest = hashlib.sha256()
    for path in sources():
        text = path.read_bytes()
        digest.update(f"{path.name}\0{len(text)}\0".encode() + text)
    return digest.hexdigest()


@cache
def _found() -> tuple[ctypes.CDLL | None, str | None]:
    """(library, None) or (None, reason)."""
    isa_cap()  # a wrong name is refused now, not in the middle of an export
    if is_off():
        return None, "FEWBIT_NATIVE=off asks for numpy; unset it to use native code"
    if os.name != "posix":
        return None, f"native code is built on Linux and macOS only, this is {sys.platform}"
    try:
        return _shipped() or _kept(), None
    except _Unavailable as refusal:
        return None, str(refusal)
    except OSError as error:
        return None, (
            f"a file or folder for native code cannot be used ({error}); make room or mend its "
            f"rights, or set XDG_CACHE_HOME and TMPDIR to folders of yours"
        )


def _shipped() -> ctypes.CDLL | None:
    """The library of a wheel, if it was made from the sources that lie beside it."""
    path, hashed = FOLDER / f"{NAME}.so", FOLDER / f"{NAME}.sha256"
    if (
        not (path.is_file() and hashed.is_file())
        or hashed.read_bytes().strip() != source_hash().encode()
    ):
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None  # of another machine or C library: compiling makes one that fits


def _kept() -> ctypes.CDLL:
    """The library of the cache; compiled into it if there is none, or none that is whole and loads."""
    command = _compiler()
    folder = _cache_folder()
    if folder is None:
        with tempfile.TemporaryDirectory(
            prefix="fewbit-native-", ignore_cleanup_errors=True
        ) as temporary:
            return _load(_compiled(command, Path(temporary), f"{NAME}.so"))
    key, damaged = _key(command), []
    for path in sorted(folder.glob(f"{key}-*.so")):
        _refuse_foreign(path)
        if path.name != f"{key}-{_sum(path)}.so":
            damaged.append(path)  # cut short, or filled with something else
            continue
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue  # whole, but of a machine that shares this folder and has another C library
    made = _compiled(command, folder, f"{key}-{{sum}}.so")
    found = _load(made)
    for path in damaged:
        if path != made:  # as a rule it has been replaced, by us or by a process beside us
            path.unlink(missing_ok=True)
    return found


def _sum(path: Path) -> str:
    """Of a file's bytes, for its name."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise _Unavailable(f"{path} cannot be loaded ({error}); delete it") from None


def _key(command: list[str]) -> str:
    """Names one compilation."""
    try:
        version = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, errors="replace",
            timeout=_SECONDS, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise _Unavailable(f"{shlex.join(command)} does not run ({error}); {_INSTALL}") from None
    facts = (source_hash(), *command, version, *FLAGS, platform.machine(), sys.platform)
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]


def _compiler() -> list[str]:
    """$CC with its arguments, or the first of the usual names."""
    try:
        asked = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise _Unavailable(f"CC={os.environ['CC']!r} is no command ({error}); {_INSTALL}") from None
    if asked:
        if not shutil.which(asked[0]):
            raise _Unavailable(f"CC={os.environ['CC']!r} names no program; {_INSTALL}")
        return asked
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    raise _Unavailable(f"there is no C compiler (looked for $CC, cc, gcc, clang); {_INSTALL}")


def _cache_folder() -> Path | None:
    """A folder that only we can write to; None where none can be made, or nothing in it may run."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"))
    folder = root / "fewbit" / "native"
    if not root.is_absolute():
        return None
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for ours in (folder.parent, folder):
            ours.mkdir(mode=0o700, exist_ok=True)
            _take_back(ours)
        may_run = not os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0)
    except OSError:
        return None
    return folder if may_run and os.access(folder, os.W_OK | os.X_OK) else None


def _take_back(folder: Path) -> None:
    """Takes the right to write to a folder of ours away from others, as `umask 002` gave it."""
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and found.st_mode & 0o022:
        folder.chmod(stat.S_IMODE(found.st_mode) & ~0o022)
    _refuse_foreign(folder)


def _refuse_foreign(path: Path) -> None:
    """Refuses what another user could have written, or a link to elsewhere."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise _Unavailable(f"{path} is a symbolic link; delete it, or set XDG_CACHE_HOME")
    if found.st_uid != os.geteuid():
        raise _Unavailable(
            f"{path} belongs to user {found.st_uid}, not to us ({os.geteuid()}), and a library in it "
            f"would run as us; delete it, or set XDG_CACHE_HOME"
        )
    if found.st_mode & 0o022:
        raise _Unavailable(
            f"{path} is writable for others (mode {stat.S_IMODE(found.st_mode):o}), and a library in "
            f"it would run as us; chmod go-w it, or set XDG_CACHE_HOME"
        )


def _compiled(command: list[str], folder: Path, name: str) -> Path:
    """Compiles everything into a file of `folder`, which appears when it is complete. OSError if it
    cannot be written. name: {sum} in it becomes that of the file."""
    handle, made = tempfile.mkstemp(dir=folder, prefix=".compiling-", suffix=".so")
    temporary = Path(made)
    try:
        os.close(handle)
        _compile(command, temporary)
        temporary.chmod(0o700)
        path = folder / (name.format(sum=_sum(temporary)) if "{" in name else name)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _compile(command: list[str], path: Path) -> None:
    """Runs the compiler."""
    c_files = [str(source) for source in sources() if source.suffix == ".c"]
    try:
        ended = subprocess.run(
            [*command, *FLAGS, "-o", str(path), *c_files],
            capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise _Unavailable(f"{shlex.join(command)} does not run ({error}); {_INSTALL}") from None
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if "error" in line]
        reason = (lines or ended.stderr.splitlines() or [f"exit code {ended.returncode}"])[0]
        raise _Unavailable(f"{shlex.join(command)} cannot compile fewbit's C files: {reason}")


def build(folder: Path) -> Path:
    """Compiles a library into `folder`, with the hash of its sources beside it; for a wheel.

    Raises RuntimeError with the sentence of `why_not` if it cannot, OSError if `folder` is no place.
    """
    try:
        path = _compiled(_compiler(), folder, f"{NAME}.so")
    except _Unavailable as refusal:
        raise RuntimeError(str(refusal)) from None
    (folder / f"{NAME}.sha256").write_text(source_hash() + "\n")
    return path


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
