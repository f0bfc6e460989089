"""`make wheel`: a wheel of fewbit that carries the compiled library, for machines without a compiler.

    python -m fewbit.quant.native.build_wheel FOLDER     from a checkout; FOLDER as a rule is dist

    fewbit-0.1.0-py3-none-any.whl        what setuptools builds, in a temporary folder
      + fewbit/quant/native/fewbit_native.so, fewbit_native.sha256      from compiler.py
      + WHEEL: Root-Is-Purelib false, Tag py3-none-<platform>
    fewbit-0.1.0-py3-none-linux_x86_64.whl

The library is called through ctypes and links to the C library alone, so one wheel serves every Python;
it picks instructions at run time, so one serves every processor of an architecture. It needs the C
library of the machine that built it, or a newer one: on Linux the tag says `linux_<arch>` and promises
no more. To publish, build in a manylinux container and let `auditwheel` check and retag the result.

Equal sources and an equal compiler give an equal file: entries are sorted and carry a fixed date.
Sources are copied first, so nothing is left in the checkout. No network is needed, but setuptools is.
"""

import base64
import csv
import hashlib
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
_INSIDE = "fewbit/quant/native"
_DATE = (1980, 1, 1, 0, 0, 0)  # the first that a zip file can hold
_READABLE, _EXECUTABLE = 0o644, 0o755
_NOT_SOURCE = shutil.ignore_patterns("__pycache__", "*.so", "*.sha256")


def build_wheel(out: Path) -> Path:
    """Build into `out` and return the wheel. RuntimeError with a remedy if there is no checkout, no
    compiler, no pip or no setuptools."""
    with tempfile.TemporaryDirectory(prefix="fewbit-wheel-") as name:
        temporary = Path(name)
        source = _copied(CHECKOUT, temporary / "source")
        library = _library(source, temporary / "library")
        pure = _pure_wheel(source, temporary / "pure")
        added = {f"{_INSIDE}/{path.name}": path.read_bytes() for path in sorted(library.iterdir())}
        out.mkdir(parents=True, exist_ok=True)
        made = out / pure.name.replace("-py3-none-any.whl", f"-{tag()}.whl")
        partial = out / f"{made.name}.partial"
        partial.write_bytes(repacked(pure.read_bytes(), added))
        os.replace(partial, made)
        return made


def tag() -> str:
    """`py3-none-linux_x86_64`."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return f"py3-none-{platform}"


def _copied(checkout: Path, target: Path) -> Path:
    """What a build reads: pyproject.toml, the packages, README and LICENSE."""
    project = checkout / "pyproject.toml"
    if not project.is_file():
        raise RuntimeError(f"{checkout} holds no pyproject.toml; build from a checkout of fewbit")
    facts = tomllib.loads(project.read_text())
    target.mkdir(parents=True)
    for name in facts["tool"]["setuptools"]["package-dir"].values():
        shutil.copytree(checkout / name, target / name, ignore=_NOT_SOURCE)
    for name in ("pyproject.toml", facts["project"]["readme"], "LICENSE"):
        shutil.copyfile(checkout / name, target / name)
    return target


def _library(source: Path, out: Path) -> Path:
    """A folder with the library of the copied sources, and their hash."""
    out.mkdir()
    ended = _run(str(source / "quant" / "native" / "compiler.py"), str(out))
    if ended.returncode:
        raise RuntimeError(_last_line(ended).removeprefix("RuntimeError: "))
    return out


def _pure_wheel(source: Path, out: Path) -> Path:
    """The wheel that setuptools makes of `source`."""
    ended = _run(
        "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index",
        "--no-build-isolation", "--wheel-dir", str(out), str(source),
    )  # fmt: skip
    found = sorted(out.glob("*-py3-none-any.whl"))
    if ended.returncode or len(found) != 1:
        raise RuntimeError(
            f"pip built no wheel ({_last_line(ended)}); with pip and 'setuptools>=69' installed it "
            f"can: pip install 'setuptools>=69'"
        )
    return found[0]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _last_line(ended: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {ended.returncode}"


def repacked(wheel: bytes, added: dict[str, bytes]) -> bytes:
    """A pure wheel with more files in it, tagged for this platform, its RECORD written anew."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as source:
        files = {name: source.read(name) for name in source.namelist() if not name.endswith("/")}
    files |= added
    record = next(name for name in files if name.endswith(".dist-info/RECORD"))
    facts = record.replace("/RECORD", "/WHEEL")
    files[facts] = _platform_facts(files[facts].decode()).encode()
    del files[record]
    files[record] = _record(files, record).encode()  # last, as in every wheel
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as target:
        for name in (*sorted(files.keys() - {record}), record):
            entry = zipfile.ZipInfo(name, _DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # Unix: the mode below counts
            entry.external_attr = (_EXECUTABLE if name.endswith(".so") else _READABLE) << 16
            target.writestr(entry, files[name])
    return made.getvalue()


def _platform_facts(text: str) -> str:
    """The file WHEEL, no longer of a pure wheel."""
    kept = [
        line
        for line in text.splitlines()
        if line and not line.startswith(("Root-Is-Purelib:", "Tag:"))
    ]
    return "\n".join([*kept, "Root-Is-Purelib: false", f"Tag: {tag()}", ""])


def _record(files: dict[str, bytes], record: str) -> str:
    """Path, SHA-256 and size of every file; of RECORD itself only the path."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for name in sorted(files):
        digest = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=")
        rows.writerow((name, f"sha256={digest.decode()}", len(files[name])))
    rows.writerow((record, "", ""))
    return text.getvalue()


if __name__ == "__main__":
    try:
        print(build_wheel(Path(sys.argv[1] if len(sys.argv) > 1 else "dist")))
    except RuntimeError as problem:
        raise SystemExit(f"no wheel: {problem}") from None
