"""Machine code of the rans32 kernels; what they compute is tested in `test_decode_rans32.py`."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fewbit.kernels_triton import _triton
from fewbit.kernels_triton._rans32 import ones, variants
from fewbit.kernels_triton._triton import interpreted, jit, tl
from fewbit.quant.codecs.planes import Kind

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")

COMPILED = """
import torch
from fewbit.kernels_triton import _compile
from fewbit.kernels_triton.decode_rans32 import KERNEL, DecodeOptions
from fewbit.quant.kernel import RowsProblem

texts, build = [], _compile._build

def spied(*arguments):
    made = build(*arguments)
    texts.append(made.asm["ptx"])
    return made

_compile._build = spied
for kind, fused, tiled in (
    ("BF16", True, True), ("BF16", True, False), ("BYTE", True, True), ("FP32", True, True),
    ("HALF", False, True), ("LONG", False, False), ("LONG", True, True),
):
    options = DecodeOptions(kind, fused, tiled)
    problem = RowsProblem(KERNEL.op, options, 64, 16384, torch.bfloat16, "cuda")
    for cc in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        if cc not in ((8, 0), (9, 0)) and (kind, fused) not in (("BF16", True), ("LONG", True)):
            continue  # the fastest and the widest on all, all kernels on two
        made = KERNEL.compile(problem, KERNEL.configs(problem)[0], cc)
        for part in made:
            assert part.stack_bytes == 0 and part.smem_bytes == 0, (kind, cc, part)
            assert part.registers <= 64, (kind, cc, part)
        print(kind, fused, cc, len(made))
streams = [text for text in texts if ".entry decode_stream" in text]
for text in streams:
    assert "redux.sync.add" in text and "popc.b32" in text, text
    assert "shfl" not in text and "bar.sync" not in text, text
assert len(streams) == 3 * 5 + 2 * 3, len(streams)  # BYTE and HALF share a function, LONG's is flat
"""


@needs_triton
def test_it_compiles_for_every_gpu_without_spills_and_lanes_meet_in_registers() -> None:
    """A ballot is one `redux`: no shuffles, no shared memory, no barriers between warps."""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3 * 5 + 2 * 4


@jit
def count_ones(bits, counts, PTX: tl.constexpr):
    """Counts of 32 words."""
    lane = tl.arange(0, 32)
    words = tl.load(bits + lane).to(tl.uint32, bitcast=True)
    tl.store(counts + lane, ones(words, PTX))


@needs_triton
def test_ones() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 32).astype(np.uint32)
    words[:4] = 0, 1, 2**32 - 1, 2**31
    bits = torch.from_numpy(words.view(np.int32)).to(DEVICE)
    for ptx in {False, not interpreted()}:
        counts = torch.zeros(32, dtype=torch.int32, device=DEVICE)
        count_ones[(1,)](bits, counts, ptx, num_warps=1)
        assert counts.tolist() == [int(word).bit_count() for word in words]


def test_variants() -> None:
    """One kernel where the symbol meets raw planes, two where several planes are coded."""
    (fused,) = variants(Kind.BF16, True, 256)
    assert fused.types["out"] == "*i16" and fused.constants["PAIR"] and fused.warps == 1
    assert fused.max_registers == 64
    first, second = variants(Kind.LONG, False, 256)
    assert first.types["out"] == "*i8" and first.constants["PLANES"] == 1
    assert second.types["out"] == "*i64" and second.constants["PIECE"] == 256
