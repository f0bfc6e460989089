"""Tuned tables on disk: appended to under a lock, found in layers, read once in a process.

Writing. `append_rows` takes the lock, reads, merges, writes a temporary file beside the table, flushes
it to the disk and renames it. The table is whole or absent at any moment, and a row that `append_rows`
returned from survives the death of any writer. The lock is of the operating system, on a file
`<table>.lock` of its own that is never removed; it is released when its holder dies.

Reading. Tables come in layers, the strongest first:

    session    the file FEWBIT_TABLE
    user       $XDG_CACHE_HOME/fewbit/tuned/*.json, by default in ~/.cache
    site       $FEWBIT_SITE_TABLES/*.json, by default /etc/fewbit/tuned
    packaged   quant/tuned/*.json

FEWBIT_AUTOTUNE=off ignores them all; `read` is the default; `on`, tuning at first use, is not built and
refused by name. `environment` is the one place that reads these variables.

A file that cannot be used never stops a product: it is ignored with one warning in a process. The same
faults are named errors (`read_table`, `append_rows`) to those who work on one file.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import IO

from .errors import TableError, nearest_name
from .tuned_table import Fingerprint, Table, Toolchain, merge
from .tuned_text import parse_table, table_text

LAYERS = ("session", "user", "site", "packaged")
_MODES = ("off", "read", "on")
# Distributions that a tool's version may be found under; those that generate code first.
_TOOLS = {
    "nvrtc": ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
    "torch": ("torch",),
    "triton": ("triton",),
}


# ---- environment ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """mode: "off", "read" or "on". session: a table, or None. site, user: folders of tables. cache:
    this user's folder for what can be derived again; None without a home. ptxas: a path, or None."""

    mode: str
    session: Path | None
    site: Path
    cache: Path | None
    ptxas: str | None

    @property
    def user(self) -> Path | None:
        """Folder of the tables that this user tuned."""
        return self.cache / "tuned" if self.cache else None


def environment() -> Settings:
    """What the environment asks for; TableError names a wrong value."""
    mode = os.environ.get("FEWBIT_AUTOTUNE") or "read"
    if mode not in _MODES:
        raise TableError(
            f"FEWBIT_AUTOTUNE must be off or read, got {mode!r}{nearest_name(mode, _MODES)}"
        )
    session = os.environ.get("FEWBIT_TABLE")
    return Settings(
        mode=mode,
        session=Path(session) if session else None,
        site=Path(os.environ.get("FEWBIT_SITE_TABLES") or "/etc/fewbit/tuned"),
        cache=_cache_folder(),
        ptxas=os.environ.get("TRITON_PTXAS_PATH") or None,
    )


def _cache_folder() -> Path | None:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return folder / "fewbit" if folder.is_absolute() else None


@cache
def this_toolchain() -> Toolchain:
    """Versions of the compilers at hand, and of torch, which generates nothing but may call what
    does. Triton brings its own ptxas; one that it was pointed to is listed by its path."""
    found: dict[str, str] = {}
    for tool, distributions in _TOOLS.items():
        for distribution in distributions:
            try:
                found.setdefault(tool, version(distribution))
            except PackageNotFoundError:
                continue
    ptxas = environment().ptxas
    if ptxas:
        found["ptxas"] = ptxas
    return tuple(sorted(found.items()))


def user_table(device: Fingerprint) -> Path:
    """Where the user's own table of a device belongs; TableError without a home folder."""
    folder = environment().user
    if folder is None:
        raise TableError(
            "there is no folder for tuned tables: set HOME, or XDG_CACHE_HOME to an absolute path"
        )
    return folder / f"{device.name}.json"


# ---- one file -------------------------------------------------------------------------------


def read_table(path: str | Path) -> Table:
    """The table in a file; TableError if it cannot be read, or says what is wrong with it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"{path}: cannot be read: {error}") from error
    return parse_table(text, str(path))


def append_rows(path: str | Path, table: Table) -> Table:
    """Merge `table` into the file, which need not exist; what the file then holds.

    TableError if the file holds a table of another device or is damaged (it is left as it is), if
    `table` is not valid (a measured entry without a verification), or if writing fails.
    """
    added = parse_table(table_text(table), f"rows for {path}")
    target = Path(path).resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            known = read_table(target) if target.exists() else added
            if known.device != added.device:
                raise TableError(
                    f"{path}: holds a table of {known.device.name}, got rows of "
                    f"{added.device.name}; give another file"
                )
            merged = merge(known, added)
            _replace(target, table_text(merged))
    except OSError as error:
        raise TableError(f"{path}: cannot be written: {error}") from error
    return merged


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone with `path`; waits for others."""
    with path.with_name(path.name + ".lock").open("ab") as file:
        _lock(file)
        yield  # closing the file releases it


if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[bytes]) -> None:
        """Waits in turns of ten seconds, which is what the system offers."""
        while True:
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                return
            except OSError:
                continue

else:
    import fcntl

    def _lock(file: IO[bytes]) -> None:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)


def _replace(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all. Under the lock: leftovers belong to the dead."""
    prefix = f".{path.name}."
    for leftover in path.parent.iterdir():
        if leftover.name.startswith(prefix) and leftover.name.endswith(".tmp"):
            leftover.unlink()
    temporary = path.with_name(f"{prefix}{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    if sys.platform != "win32":  # makes the rename last; folders cannot be opened on Windows
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# ---- layers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layered:
    """A table and where it came from. layer: one of `LAYERS`. origin: its path."""

    layer: str
    origin: str
    table: Table


def load_layers(settings: Settings) -> tuple[Layered, ...]:
    """Every table that can be read, the strongest layer first; one warning for each that cannot."""
    folder = files(__package__) / "tuned"
    packaged = Path(str(folder)) if folder.is_dir() else None
    found: list[Layered] = []
    for layer, paths in (
        ("session", [settings.session] if settings.session else []),
        ("user", _tables_in(settings.user)),
        ("site", _tables_in(settings.site)),
        ("packaged", _tables_in(packaged)),
    ):
        for path in paths:
            try:
                found.append(Layered(layer, str(path), read_table(path)))
            except TableError as error:
                warn_once(str(path), f"ignored: {error}")
    return tuple(found)


def _tables_in(folder: Path | None) -> list[Path]:
    """Files named *.json in a folder, which need not exist or be readable."""
    if folder is None:
        return []
    try:
        return sorted(
            path
            for path in folder.iterdir()
            if path.suffix == ".json" and not path.name.startswith(".") and path.is_file()
        )
    except OSError:
        return []


_WARNED: set[str] = set()


def warn_once(origin: str, text: str) -> None:
    """One warning about a table file in a process; estimates decide in its place."""
    if origin in _WARNED:
        return
    _WARNED.add(origin)
    warnings.warn(
        f"tuned table {origin} {text}; estimates decide instead", RuntimeWarning, stacklevel=2
    )
