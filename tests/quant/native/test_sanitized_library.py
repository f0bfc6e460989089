"""The whole native library under sanitizers, called by Python as it is in use, fed with damage.

`fuzz_library.py` runs in a process of its own, into which the run-time library of the address sanitizer
is loaded before all else. Its C programs beside it are for fle.c and rans32.c alone.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fewbit.quant.native import compiler

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ROUNDS = 300
CASES = ("unit_of_a_file", "stream_of_a_caller", "weights_that_change", "runs")
QUIET = "detect_leaks=0:detect_odr_violation=0:alloc_dealloc_mismatch=0"  # of Python and torch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the script with the library; skipped where a compiler has no sanitizers."""
    command = shutil.which("gcc")
    if command is None:
        pytest.skip("there is no gcc, whose address sanitizer can be loaded into Python")
    found = subprocess.run(
        [command, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False
    )
    preloaded = Path(found.stdout.strip())
    if found.returncode or not preloaded.is_absolute() or not preloaded.exists():
        pytest.skip(f"{command} has no libasan.so")
    library = tmp_path_factory.mktemp("sanitized") / "library.so"
    files = [str(path) for path in compiler.sources() if path.suffix == ".c"]
    made = subprocess.run(
        [command, "-O1", "-g", "-std=gnu11", "-shared", "-fPIC", *SANITIZE, "-o", str(library), *files],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "cannot find" in made.stderr:
        pytest.skip(f"{command} lacks a sanitizer: {made.stderr.splitlines()[0]}")
    assert made.returncode == 0, made.stderr
    environment = os.environ | {
        "LD_PRELOAD": str(preloaded.resolve()), "ASAN_OPTIONS": QUIET, "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    probe = subprocess.run(
        [sys.executable, "-c", "import numpy"], env=environment, capture_output=True, check=False
    )
    if probe.returncode:
        pytest.skip(f"Python does not start with {preloaded}: {probe.stderr[-300:]!r}")

    def run(*arguments):
        return subprocess.run(
            [sys.executable, str(Path(__file__).with_name("fuzz_library.py")), str(library),
             str(ROUNDS), *arguments],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    return run


def test_an_overrun_is_reported(run):
    """Else the test below could not fail."""
    ended = run("0", "overrun")
    assert ended.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in ended.stderr, ended.stderr[-3000:]


def test_damage_is_refused_by_name_and_nothing_leaves_its_buffer(run):
    ended = run("1")
    assert ended.returncode == 0, ended.stdout + ended.stderr[-4000:]
    assert "Sanitizer" not in ended.stderr and "runtime error" not in ended.stderr, ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert [line[0] for line in lines] == list(CASES)
    for _, _, refused, _, passed in lines:
        assert int(refused) > ROUNDS / 20 and int(passed) + int(refused) == ROUNDS, ended.stdout
