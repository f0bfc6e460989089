"""The C files of this folder as one library: compiled at first use, kept, and loaded with ctypes.

    python -m fewbit.quant.native.compiler FOLDER     leaves fewbit_native.so and .sha256 there

Where a library comes from, in this order:

    fewbit_native.so beside the sources     a wheel brought it; used if fewbit_native.sha256 holds the
                                            hash of the sources that are there
    ~/.cache/fewbit/native/<key>.so         (or $XDG_CACHE_HOME) of an earlier run; the key hashes the
                                            sources, the compiler's version, the flags, the machine
    $CC, cc, gcc or clang                   compiles it, under a temporary name, renamed when complete:
                                            processes that start at once do not disturb each other

A library runs as us, so it must come from us: the folder and the file must belong to this user and
must not be writable for others, else they are refused by name. Where no folder can be kept, the
library is compiled for this process alone. Nothing is compiled for this one processor (no
-march=native): what is faster on newer ones is chosen at run time.

    FEWBIT_NATIVE=off                       no native code
    FEWBIT_NATIVE_ISA=scalar|avx2|avx512    at most these instructions

Nothing here raises: `why_not` says in a sentence what is in the way, and callers use numpy then.
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
_INSTALL = "install a C compiler (gcc or clang) or set CC"
_SECONDS = 300


class _Unavailable(Exception):
    """Why there is no library; never leaves this module."""


def library() -> ctypes.CDLL | None:
    """The library, or None; found once a process."""
    return _found()[0]


def why_not() -> str | None:
    """A sentence on why `library` is None; None if it is not."""
    return _found()[1]


def is_off() -> bool:
    """Did the user ask for no native code?"""
    return os.environ.get("FEWBIT_NATIVE", "").lower() in ("off", "0", "no")


def isa_cap() -> int:
    """The place in `ISA_NAMES` of the best instruction set that may be used."""
    name = os.environ.get("FEWBIT_NATIVE_ISA", "").lower()
    return ISA_NAMES.index(name) if name in ISA_NAMES else len(ISA_NAMES) - 1


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
    if is_off():
        return None, "FEWBIT_NATIVE=off asks for numpy; unset it to use native code"
    if os.name != "posix":
        return None, f"native code is built on Linux and macOS only, this is {sys.platform}"
    try:
        return _shipped() or _kept(), None
    except _Unavailable as refusal:
        return None, str(refusal)


def _shipped() -> ctypes.CDLL | None:
    """The library of a wheel, if it was made from the sources that lie beside it."""
    path, hashed = FOLDER / f"{NAME}.so", FOLDER / f"{NAME}.sha256"
    if not (path.is_file() and hashed.is_file()) or hashed.read_text().strip() != source_hash():
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None  # of another machine or C library: compiling makes one that fits


def _kept() -> ctypes.CDLL:
    """The library of the cache; compiled into it if it is not there."""
    command = _compiler()
    folder = _cache_folder()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="fewbit-native-") as temporary:
            return _load(_compiled(command, Path(temporary) / f"{NAME}.so"))
    path = folder / f"{_key(command)}.so"
    if not path.exists():
        _compiled(command, path)
    _refuse_foreign(path)
    return _load(path)


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise _Unavailable(f"{path} cannot be loaded ({error}); delete it") from None


def _key(command: list[str]) -> str:
    """Names one compilation."""
    try:
        version = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise _Unavailable(f"{shlex.join(command)} does not run ({error}); {_INSTALL}") from None
    facts = (source_hash(), *command, version, *FLAGS, platform.machine(), sys.platform)
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]


def _compiler() -> list[str]:
    """$CC with its arguments, or the first of the usual names."""
    asked = shlex.split(os.environ.get("CC", ""))
    if asked:
        if not shutil.which(asked[0]):
            raise _Unavailable(f"CC={os.environ['CC']!r} names no program; {_INSTALL}")
        return asked
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    raise _Unavailable(f"there is no C compiler (looked for $CC, cc, gcc, clang); {_INSTALL}")


def _cache_folder() -> Path | None:
    """A folder that only we can write to; None where none can be made."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(root) / "fewbit" / "native"
    if not folder.is_absolute():
        return None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return None
    _refuse_foreign(folder)
    _refuse_foreign(folder.parent)
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


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


def _compiled(command: list[str], path: Path) -> Path:
    """Compiles everything into `path`, which appears when it is complete."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".compiling-", suffix=".so")
    os.close(handle)
    try:
        c_files = [str(source) for source in sources() if source.suffix == ".c"]
        ended = subprocess.run(
            [*command, *FLAGS, "-o", temporary, *c_files],
            capture_output=True, text=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
        if ended.returncode:
            lines = [line for line in ended.stderr.splitlines() if "error" in line]
            reason = (lines or ended.stderr.splitlines() or [f"exit code {ended.returncode}"])[0]
            raise _Unavailable(f"{shlex.join(command)} cannot compile fewbit's C files: {reason}")
        os.chmod(temporary, 0o700)
        os.replace(temporary, path)
    except (OSError, subprocess.SubprocessError) as error:
        raise _Unavailable(f"{shlex.join(command)} does not run ({error}); {_INSTALL}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def build(folder: Path) -> Path:
    """Compiles a library into `folder`, with the hash of its sources beside it; for a wheel.

    Raises RuntimeError with the sentence of `why_not` if it cannot.
    """
    try:
        path = _compiled(_compiler(), folder / f"{NAME}.so")
    except _Unavailable as refusal:
        raise RuntimeError(str(refusal)) from None
    (folder / f"{NAME}.sha256").write_text(source_hash() + "\n")
    return path


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
