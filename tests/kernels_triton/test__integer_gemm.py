"""What integer products share: every tile once, the end as in the reference, honest configs."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fewbit.kernels_triton import _integer_gemm, _triton
from fewbit.kernels_triton._integer_gemm import Ends, Operand, Tile
from fewbit.kernels_triton._triton import jit, tl
from fewbit.kernels_triton.quantize_rows import SummedRows
from fewbit.quant.activation import RoundedRows
from fewbit.quant.errors import NoKernelError
from fewbit.quant.formats.int_two_level import IntTwoLevelOptions
from fewbit.quant.kernel import Compiled, Problem
from fewbit.quant.machine import load_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = load_device("h200")
PROBLEM = Problem(
    "int_two_level", IntTwoLevelOptions(), 1, 16, 4096, 4096, torch.bfloat16, "cuda",
    "int8_token", H200,
)  # fmt: skip
TILES: tuple[Tile, ...] = ((16, 64, 128, 4, 3), (64, 128, 128, 4, 3), (256, 128, 128, 8, 3))
INT8, INT4 = Operand(1.0), Operand(0.5, 1.4)
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")


@jit
def places(out, n_tiles, m_tiles):
    program = tl.program_id(0)
    pn, pm = _integer_gemm.place(program, n_tiles, m_tiles)
    tl.store(out + program, pn * m_tiles + pm)


@needs_triton
@pytest.mark.parametrize(("n_tiles", "m_tiles"), [(1, 1), (5, 1), (1, 9), (3, 8), (4, 19), (7, 16)])
def test_every_tile_has_one_program(n_tiles: int, m_tiles: int) -> None:
    out = torch.full((n_tiles * m_tiles,), -1, dtype=torch.int32, device=DEVICE)
    places[(n_tiles * m_tiles,)](out, n_tiles, m_tiles)
    assert sorted(out.tolist()) == list(range(n_tiles * m_tiles))
    first = [divmod(int(at), m_tiles) for at in out[: min(8, m_tiles)]]
    assert first == [(0, pm) for pm in range(min(8, m_tiles))]  # M is fastest


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "offset", "zero"])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 70), (2, 513)])
def test_splits_are_added_and_ended_as_defined(
    kind: str, dtype: torch.dtype, m: int, n: int
) -> None:
    """Against the same operations in torch, bit for bit; memory behind the results stays as it was."""
    torch.manual_seed(n)
    splits = 3
    partial = torch.randint(-(2**24), 2**24, (splits, m, n), dtype=torch.int32)
    scale, row_scale = torch.rand(n) * 1e-3, torch.rand(m, 1) + 0.5
    totals = torch.randint(-(2**20), 2**20, (m, 1), dtype=torch.int32)
    offset = torch.randn(n) if kind == "offset" else None
    zero = torch.randint(-7, 9, (n,), dtype=torch.int32) if kind == "zero" else None
    sums = partial.sum(0, dtype=torch.int32)
    if kind != "plain":
        partial *= 16
    if zero is not None:
        sums = sums + zero * totals
    expected = sums.float() * scale * row_scale
    if offset is not None:
        expected = expected + offset * (row_scale * totals)
    ends = Ends(
        *(t.to(DEVICE) for t in (scale, row_scale, totals)),
        *(None if t is None else t.to(DEVICE) for t in (offset, zero)),
        high=kind != "plain",
    )
    buffer = torch.full((m * n + 99,), 77.0, dtype=dtype, device=DEVICE)
    y = buffer[: m * n].view(m, n)
    _integer_gemm.add_splits[(m, -(-n // 512))](
        *ends.pointers(), y, partial.to(DEVICE), m, n, splits, BLOCK=512, **ends.flags(),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    assert torch.equal(y.cpu(), expected.to(dtype))
    assert bool((buffer[m * n :] == 77).all())


def test_codes_are_padded_once_and_checked() -> None:
    codes = torch.randint(-127, 128, (3, 300), dtype=torch.int8)
    rows = RoundedRows(codes, torch.ones(3, 1))
    found = _integer_gemm.codes_of(rows, 300)
    assert found.shape == (3, 512) and torch.equal(found[:, :300], codes)
    assert not found[:, 300:].any()
    wide = RoundedRows(found, torch.ones(3, 1))
    assert _integer_gemm.codes_of(wide, 300) is found
    assert _integer_gemm.codes_of(
        RoundedRows(found.T.contiguous().T, rows.scale), 300
    ).is_contiguous()
    for wrong in (codes[:, :299], codes[0]):
        with pytest.raises(NoKernelError, match=r"\[M, 300\], or \[M, 512\]"):
            _integer_gemm.codes_of(RoundedRows(wrong, rows.scale), 300)


def test_totals_are_taken_or_made() -> None:
    codes = torch.randint(-127, 128, (3, 40), dtype=torch.int8)
    made = _integer_gemm.totals_of(RoundedRows(codes, torch.ones(3, 1)))
    assert made.dtype == torch.int32 and torch.equal(made[:, 0], codes.long().sum(1).int())
    kept = SummedRows(codes, torch.ones(3, 1), made + 1)
    assert _integer_gemm.totals_of(kept) is kept.totals


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"activation": None}, "ACTIVATION"),
        ({"dtype": torch.float32}, "DTYPE"),
        ({"n_terms": 2}, "TERMS"),
        ({"k": _integer_gemm.MAX_K + 1}, "SHAPE_K"),
        ({"device": "cpu", "machine": load_device("cpu")}, "ARCH"),
    ],
)
def test_refusals(change: dict[str, object], code: str) -> None:
    assert list(_integer_gemm.refuse_shared(replace(PROBLEM, k=_integer_gemm.MAX_K))) == []
    (reason,) = _integer_gemm.refuse_shared(replace(PROBLEM, **change))
    assert reason.code == code and reason.text and reason.fix


def test_sums_of_the_longest_rows_fit() -> None:
    assert _integer_gemm.MAX_K * 127 * 128 < 2**31 <= (_integer_gemm.MAX_K + 1) * 127 * 128
    assert _integer_gemm.MAX_K * 127 * 16 * 8 < 2**31  # codes in the high halves of bytes


def test_configs_suit_m_and_memory() -> None:
    def tiles(m: int, machine: str = "h200") -> set[int]:
        problem = replace(PROBLEM, m_bucket=m, machine=load_device(machine))
        return {dict(config)["bm"] for config in _integer_gemm.configs_of(problem, TILES, INT8)}

    assert tiles(1) == {16} and tiles(64) == {16, 64} and tiles(4096) == {64, 256}
    assert tiles(4096, "rtx4090") == {64, 256}
    deep: tuple[Tile, ...] = ((256, 128, 128, 8, 4),)
    small = replace(PROBLEM, m_bucket=4096, machine=load_device("rtx4090"))
    assert _integer_gemm.configs_of(small, deep, INT8) == ()  # 3 · 128 · 384 bytes of its 101,376
    found = _integer_gemm.configs_of(replace(PROBLEM, machine=None), TILES, INT4)
    assert found == _integer_gemm.configs_of(replace(PROBLEM, machine=None), TILES, INT4)


def test_shared_memory_is_what_triton_takes() -> None:
    """As compiled by Triton 3.6."""
    for tile, operand, cc, found in (
        ((256, 128, 128, 8, 3), INT8, (9, 0), 147456),
        ((256, 128, 128, 8, 3), INT8, (8, 0), 98304),
        ((16, 128, 128, 4, 4), Operand(0.5, 0.9), (9, 0), 33792),
        ((128, 128, 256, 8, 4), Operand(0.5 + 2 / 128, 1.4), (10, 0), 150016),
    ):
        guess = _integer_gemm.smem_bytes(tile, operand, cc)
        assert found - 200 <= guess <= found + 2000


@pytest.mark.parametrize("m", [1, 16, 4096])
def test_splits_leave_work_and_stay_in_memory(m: int) -> None:
    for config in _integer_gemm.configs_of(replace(PROBLEM, m_bucket=m), TILES, INT8):
        choice = dict(config)
        assert choice["split_k"] == 1 or 4096 // choice["bk"] >= 2 * choice["split_k"]
        assert 4 * choice["split_k"] * m * 4096 <= 1 << 28 or choice["split_k"] == 1
    one = replace(PROBLEM, k=100, m_bucket=m)
    assert {dict(c)["split_k"] for c in _integer_gemm.configs_of(one, TILES, INT8)} == {1}


def test_estimates_follow_the_roofline() -> None:
    def seconds(m: int, tile: Tile, split: int = 1, operand: Operand = INT8) -> float:
        names = ("bm", "bn", "bk", "warps", "stages", "split_k")
        config = tuple(zip(names, (*tile, split), strict=True))
        problem = replace(PROBLEM, m_bucket=m, n=8192, k=8192)
        return _integer_gemm.estimate(problem, config, operand)

    floor = 8192 * 8192 / 4.8e12
    small, large = TILES[0], (256, 128, 128, 8, 4)
    assert floor <= seconds(1, small) <= 2 * floor
    assert seconds(1, small, operand=INT4) < seconds(1, small)
    assert seconds(4096, large) < seconds(4096, TILES[1])
    assert seconds(4096, large) >= 2 * 4096 * 8192 * 8192 / 1.979e15
    spilled = Compiled(255, 8, 0, 128, "")
    config = _integer_gemm.configs_of(PROBLEM, TILES, INT8)[0]
    assert _integer_gemm.estimate(PROBLEM, config, INT8, spilled) == float("inf")
    assert _integer_gemm.estimate(replace(PROBLEM, machine=None), config, INT8) == 1.0


END = """
import torch
from fewbit.kernels_triton import _compile, _integer_gemm
from fewbit.kernels_triton._triton import jit, tl
types = {"scale": "*fp32", "offset": "*fp32", "zero": "*i32", "row_scale": "*fp32",
         "totals": "*i32", "y": "*bf16", "partial": "*i32", "m": "i32", "n": "i32", "splits": "i32"}
constants = {"BLOCK": 512, "OFFSET": True, "ZERO": False, "HIGH": False}
for fusion in (True, False):
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": fusion}
    made = _compile._build(_integer_gemm.add_splits, types, constants, ("y",), options, (9, 0))
    print("fma.rn.f32" in made.asm["ptx"])
"""


@needs_triton
def test_the_end_is_compiled_without_fused_additions() -> None:
    """With fusion the offset would be added by one instruction, and round once less."""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", END], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False"]
