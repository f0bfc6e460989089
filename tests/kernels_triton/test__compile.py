"""Compilation without a GPU: real figures of registers and memory, and errors that say what failed.

Interpreted kernels cannot be compiled, so this runs in processes of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewbit.kernels_triton import _compile, _triton
from fewbit.quant.errors import NoKernelError

pytestmark = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")

KERNEL = """
from fewbit.kernels_triton._triton import jit, tl
from fewbit.kernels_triton._compile import Variant, compile_variant
from fewbit.quant.errors import NoKernelError

@jit
def scaled(x, y, factor, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at) * factor)

@jit
def greedy(x, y, steps, SIZE: tl.constexpr):
    row, column = tl.arange(0, 128)[:, None], tl.arange(0, SIZE)[None, :]
    total = tl.zeros([128, SIZE], tl.float32)
    for step in range(steps):
        left = tl.load(x + step * 2048 + row * 16 + tl.arange(0, 16)[None, :])
        right = tl.load(y + step * 16 * SIZE + tl.arange(0, 16)[:, None] * SIZE + column)
        total = tl.dot(left, right, total)
    tl.store(y + row * SIZE + column, total)

@jit
def wrong(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), tl.arange(0, 2 * SIZE))
"""


def run(tmp_path: Path, text: str) -> str:
    """Output of a script after the kernels above, in a process that compiles."""
    script = tmp_path / "kernels_for_test.py"
    script.write_text(KERNEL + text)
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_figures_of_a_kernel_on_every_target(tmp_path: Path) -> None:
    text = """
for cc in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
    types = {"x": "*fp32", "y": "*fp32", "factor": "fp32"}
    found = compile_variant(Variant(scaled, types, {"SIZE": 512}, ("x", "y"), 4, 2), cc)
    again = compile_variant(Variant(scaled, types, {"SIZE": 512}, ("x", "y"), 4, 2), cc)
    wide = compile_variant(Variant(scaled, types, {"SIZE": 1024}, ("x", "y"), 4, 2), cc)
    assert found is again and found.digest != wide.digest
    assert 8 <= found.registers <= 64 and found.stack_bytes == 0 and found.threads == 128
    assert dict(found.opcodes)["FMUL"] == 4 * dict(wide.opcodes)["FMUL"] // 8
    print("ok")
"""
    assert run(tmp_path, text).split() == ["ok"] * 5


def test_spilled_registers_show_as_a_stack(tmp_path: Path) -> None:
    text = """
types = {"x": "*fp16", "y": "*fp16", "steps": "i32"}
found = compile_variant(Variant(greedy, types, {"SIZE": 256}, ("x", "y"), 4, 2), (8, 0))
print(found.registers, found.stack_bytes)
"""
    registers, stack = map(int, run(tmp_path, text).split())
    assert registers == 255 and stack > 0


def test_what_does_not_compile_is_named(tmp_path: Path) -> None:
    text = """
try:
    compile_variant(Variant(wrong, {"x": "*i32"}, {"SIZE": 64}, (), 4, 2), (8, 0))
except NoKernelError as error:
    print(error)
"""
    message = run(tmp_path, text)
    assert message.startswith("wrong: Triton") and "sm_80" in message and "'SIZE': 64" in message


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled() -> None:
        """Stands for a kernel."""

    monkeypatch.setattr(_triton, "interpreted", lambda: True)
    with pytest.raises(NoKernelError, match=r"scaled: cannot be compiled: .* interpreter"):
        _compile.compile_variant(_compile.Variant(scaled, {}, {}, (), 4, 2), (9, 0))


def test_names_of_pointers() -> None:
    assert _compile.pointer(torch.bfloat16) == "*bf16" and _compile.pointer(torch.uint8) == "*u8"


def test_the_hash_follows_the_source() -> None:
    one, both = _compile.source_hash(_compile), _compile.source_hash(_compile, _triton)
    assert one != both and one == _compile.source_hash(_compile) and len(one) == 16
