"""fle4 and fle3 in C under address and undefined-behaviour sanitizers, fed with damaged parts."""

import shutil
import subprocess
from pathlib import Path

import pytest

from fewbit.quant.native import compiler

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ROUNDS = 1500


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver, compiled with the C form; skipped where a compiler has no sanitizers."""
    command = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if command is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "probe.c").write_text("int main(void) { return 0; }\n")
    probe = subprocess.run(
        [command, *SANITIZE, "-o", "probe", "probe.c"], cwd=folder, capture_output=True, check=False
    )
    if probe.returncode or subprocess.run([folder / "probe"], check=False).returncode:
        pytest.skip(f"{command} has no sanitizers")
    path, own = folder / "fuzz", Path(__file__).with_name("fuzz_fle.c")
    files = [str(own), str(compiler.FOLDER / "cpu.c")]
    subprocess.run(
        [command, "-O1", "-g", "-std=gnu11", *SANITIZE, "-I", str(compiler.FOLDER), "-o", str(path),
         *files],
        check=True,
    )  # fmt: skip
    return path


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_is_read_or_written_outside(program: Path, seed: int) -> None:
    ended = subprocess.run(
        [program, str(ROUNDS), str(seed)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    words = ended.stdout.split()
    assert words[:2] == ["rounds", str(ROUNDS)] and int(words[3]) > ROUNDS / 3, ended.stdout
