"""What integer products share: order of tiles, the fp32 end, split sums, configs, estimates.

    y[m, n] = Σ_k Qx[m, k] · Qw[n, k]    as int32 tiles [BN, BM], W on the side of the rows of an mma

W comes first because its tile may be made in registers, and few tokens then are the narrow side of
the instruction. Tiles of a band of 8 tiles of M follow each other, M fastest, so that tiles that run
together share weights and tokens in the second-level cache:

    program   0 1 .. 7 | 8 .. 15 | ...      tile of M  0 1 .. 7 | 0 .. 7      tile of N  0 | 1 | ...

Splits of K write int32 sums to a workspace [split, M, N], and `add_splits` adds them; sums of integers
are exact in any order. With one split the kernel ends with fp32 itself. That end is, in this order and
without fused multiply-adds (kernels are compiled without fusion), that of `reference.integer_linear`:

    s    = sums, or for nibbles in the high half of a byte (sums >> 4) + zero[n] · t[m], all int32
    y    = (fp32(s) · s_w[n]) · s_x[m]
    y    = y + o[n] · (s_x[m] · fp32(t[m]))       with an offset; t[m] = Σ_k Qx[m, k]

Sums stay below 2^31 for K up to (2^31 − 1) / (127 · 128). Deliberately not here: main loops.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..quant.activation import RoundedRows
from ..quant.cost_model import Tiling, Work, launch_seconds
from ..quant.errors import NoKernelError
from ..quant.formats.int8_token import ACTIVATION
from ..quant.kernel import Compiled, Config, Problem, Reason
from ._compile import Variant, compile_variant, pointer
from ._triton import jit, off_gpu, tl
from .quantize_rows import SummedRows

MAX_K = (2**31 - 1) // (127 * 128)
ALIGN_K = 256  # K is padded to multiples of it
_DTYPES = (torch.float16, torch.bfloat16)
_SUM_BLOCK = 512

# ---- device code ----------------------------------------------------------------------------


@jit
def place(program, n_tiles, m_tiles):
    """(tile of N, tile of M) of a program."""
    band = program // (8 * n_tiles)
    height = tl.minimum(m_tiles - band * 8, 8)
    inside = program - band * 8 * n_tiles
    return inside // height, band * 8 + inside % height


@jit
def end(
    sums, m0, n0, m, n, scale, offset, zero, row_scale, totals, y,
    BM: tl.constexpr, BN: tl.constexpr,
    OFFSET: tl.constexpr, ZERO: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Results of sums [BN, BM], whose first element is that of row m0 and column n0 of y."""
    i, j = tl.arange(0, BN), tl.arange(0, BM)
    in_n, in_m = n0 + i < n, m0 + j < m
    s = tl.load(scale + n0 + i, mask=in_n, other=0.0)[:, None]
    s_x = tl.load(row_scale + m0 + j, mask=in_m, other=0.0)[None, :]
    if HIGH:
        sums = sums >> 4
    if ZERO:
        t = tl.load(totals + m0 + j, mask=in_m, other=0)[None, :]
        sums += tl.load(zero + n0 + i, mask=in_n, other=0)[:, None] * t
    result = sums.to(tl.float32) * s * s_x
    if OFFSET:
        t = tl.load(totals + m0 + j, mask=in_m, other=0)[None, :]
        o = tl.load(offset + n0 + i, mask=in_n, other=0.0)[:, None]
        result = result + o * (s_x * t.to(tl.float32))
    # One 64-bit number for the tile, 32 bits within it: registers are scarce here
    at = y + (m0.to(tl.int64) * n + n0) + (j[None, :] * n + i[:, None])
    tl.store(at, result.to(y.dtype.element_ty), mask=in_n[:, None] & in_m[None, :])


@jit
def keep(sums, m0, n0, m, n, part, partial, BM: tl.constexpr, BN: tl.constexpr):
    """Sums [BN, BM] of one split to the workspace."""
    i, j = tl.arange(0, BN), tl.arange(0, BM)
    at = partial + ((part.to(tl.int64) * m + m0) * n + n0) + (j[None, :] * n + i[:, None])
    tl.store(at, sums, mask=(n0 + i < n)[:, None] & (m0 + j < m)[None, :])


@jit(do_not_specialize=("m", "splits"))
def add_splits(
    scale, offset, zero, row_scale, totals, y, partial, m, n, splits,
    BLOCK: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """One row of y, BLOCK columns: the int32 sums of all splits, then fp32."""
    m0, n0 = tl.program_id(0), tl.program_id(1) * BLOCK
    i = tl.arange(0, BLOCK)[:, None]
    at = partial + (m0.to(tl.int64) * n + n0) + i
    sums = tl.zeros([BLOCK, 1], tl.int32)
    for _ in range(splits):
        sums += tl.load(at, mask=n0 + i < n, other=0)
        at += m.to(tl.int64) * n
    end(sums, m0, n0, m, n, scale, offset, zero, row_scale, totals, y, 1, BLOCK, OFFSET, ZERO, HIGH)


# ---- refusals -------------------------------------------------------------------------------


def refuse_shared(problem: Problem) -> Iterator[Reason]:
    """Reasons against every integer product on a GPU."""
    yield from off_gpu(problem)
    if problem.activation != ACTIVATION.name:
        yield Reason(
            "ACTIVATION",
            f"multiplies inputs rounded to {ACTIVATION.name}, got {problem.activation}",
            f"quantize with [activations] format = '{ACTIVATION.name}'",
        )
    if problem.dtype not in _DTYPES:
        yield Reason(
            "DTYPE",
            f"returns float16 and bfloat16, got {str(problem.dtype).removeprefix('torch.')}",
            "run the model in bfloat16",
        )
    if problem.n_terms != 1:
        yield Reason("TERMS", f"holds one term, got {problem.n_terms}", "use reference")
    if problem.k > MAX_K:
        yield Reason("SHAPE_K", f"sums in int32: K <= {MAX_K}, got {problem.k}", "use reference")


# ---- configs and estimates ------------------------------------------------------------------

Tile = tuple[int, int, int, int, int]  # BM, BN, BK, warps, stages
_SPLITS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24)
_WAVES = 8  # of blocks at most, where K is split
_SMS, _SMEM = 132, 232448  # of a GPU that is not known
_SMEM_BESIDES = 1100  # for barriers, and for rows that change hands
_PARTIAL_BYTES = 1 << 28  # of a workspace
_L2 = 2.5  # a second-level cache is so many times as fast as memory; a guess
_LOOP = 0.1  # instructions of the loop for each weight, whatever its form; counted in SASS
_LAUNCH_GAP = 1.5e-6  # seconds between two kernels; a guess


def padded(k: int) -> int:
    """K in whole tiles."""
    return -(-k // ALIGN_K) * ALIGN_K


@dataclass(frozen=True)
class Operand:
    """How a weight reaches the product: bytes in memory, and instructions until it is int8 in a
    register; none where it comes as int8 through shared memory."""

    bytes: float
    instructions: float = 0.0


def smem_bytes(tile: Tile, operand: Operand, cc: tuple[int, int] | None) -> int:
    """Shared memory of the loop, as Triton 3.6 lays it out: `stages` − 1 tiles of each load, and on
    capability 9.0, whose instructions read it while the next tile arrives, one more."""
    bm, bn, bk, _, stages = tile
    weights = bn * bk * operand.bytes
    extra = bm * bk + (0 if operand.instructions else weights)
    used = (stages - 1) * (bm * bk + weights) + (extra if cc in (None, (9, 0)) else 0)
    return int(used) + _SMEM_BESIDES


def configs_of(problem: Problem, tiles: tuple[Tile, ...], operand: Operand) -> tuple[Config, ...]:
    """Tiles that suit the bucket of M and fit the machine's shared memory, each with its splits."""
    machine = problem.machine
    cc = machine.cc if machine else None
    room = machine.smem_block_bytes if machine and machine.smem_block_bytes else _SMEM
    found = []
    for tile in tiles:
        bm, bn, bk, warps, stages = tile
        suits = bm <= max(16, 2 * problem.m_bucket) and (bm >= 64 or 4 * bm >= problem.m_bucket)
        if suits and smem_bytes(tile, operand, cc) <= room:
            named = (("bm", bm), ("bn", bn), ("bk", bk), ("warps", warps), ("stages", stages))
            found += [(*named, ("split_k", split)) for split in _splits(problem, bm, bn, bk)]
    return tuple(found)


def _splits(problem: Problem, bm: int, bn: int, bk: int) -> Iterator[int]:
    sms = problem.machine.sms if problem.machine else _SMS
    blocks = -(-problem.m_bucket // bm) * -(-problem.n // bn)
    steps = padded(problem.k) // bk
    for split in _SPLITS:
        few = blocks * split <= _WAVES * sms and steps >= 2 * split
        if split == 1 or (few and 4 * split * problem.m_bucket * problem.n <= _PARTIAL_BYTES):
            yield split


def estimate(
    problem: Problem, config: Config, operand: Operand, compiled: Compiled | None = None
) -> float:
    """Seconds of a product, and of the sum of its splits."""
    if problem.machine is None:
        return 1.0
    choice = dict(config)
    bm, bn, bk, split = (choice[name] for name in ("bm", "bn", "bk", "split_k"))
    m, n, k = problem.m_bucket, problem.n, padded(problem.k)
    tiles_m, tiles_n = -(-m // bm), -(-n // bn)
    depth = -(-(k // bk) // split) * bk * split
    memory = n * k * operand.bytes + m * k + 2 * m * n
    extra = 0.0
    if split > 1:
        partial = 4.0 * split * m * n
        memory += partial
        extra = _LAUNCH_GAP + partial / (problem.machine.bandwidth_bytes_per_second or math.inf)
    cache = tiles_m * tiles_n * depth * (bn * operand.bytes + bm)
    multiplied = tiles_m * tiles_n * bm * bn * depth
    work = Work(
        bytes=max(memory, cache / _L2),
        ops=2.0 * multiplied,
        kind="int8",
        alu=(operand.instructions + _LOOP) * multiplied / bm,
        extra_seconds=extra,
    )
    warps, stages = choice["warps"], choice["stages"]
    tiling = Tiling(
        blocks=tiles_m * tiles_n * split,
        threads=32 * warps,
        in_flight_bytes=(stages - 1) * bk * (bm + bn * operand.bytes),
        registers=min(255, 56 + bm * bn // (32 * warps)),
        smem_bytes=smem_bytes((bm, bn, bk, warps, stages), operand, problem.machine.cc),
    )
    return launch_seconds(work, tiling, problem.machine, compiled)


# ---- launch ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Ends:
    """What the end of a product reads. scale, offset fp32 [N]; zero int32 [N]; row_scale fp32 [M, 1];
    totals int32 [M, 1]. high: sums are those of codes in the high halves of bytes."""

    scale: torch.Tensor
    row_scale: torch.Tensor
    totals: torch.Tensor
    offset: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    high: bool = False

    def pointers(self) -> tuple[torch.Tensor, ...]:
        """Arguments scale, offset, zero, row_scale, totals; what is missing is never read."""
        offset = self.scale if self.offset is None else self.offset
        zero = self.totals if self.zero is None else self.zero
        return self.scale, offset, zero, self.row_scale, self.totals

    def flags(self) -> dict[str, bool]:
        """The constexprs that go with them."""
        return flags_of(self.offset is not None, self.zero is not None, self.high)


def flags_of(offset: bool, zero: bool, high: bool) -> dict[str, bool]:
    """Constexprs of `end`."""
    return {"OFFSET": offset, "ZERO": zero, "HIGH": high}


def run_product(
    kernel: Any,
    operands: tuple[torch.Tensor, ...],
    ends: Ends,
    y: torch.Tensor,
    config: Sequence[int],
    constants: Mapping[str, Any],
) -> torch.Tensor:
    """Fill y [M, N] by `kernel`, whose first operand is codes [M, padded K], and add its splits."""
    m, n = y.shape
    if m == 0:
        return y
    bm, bn, bk, warps, stages, splits = config
    flags, pointers = ends.flags(), ends.pointers()
    partial = ends.totals
    if splits > 1:
        partial = y.new_empty(splits * m * n, dtype=torch.int32)
    grid = ((m + bm - 1) // bm * ((n + bn - 1) // bn), splits)
    kernel[grid](
        *operands, *pointers, y, partial, m, n, operands[0].shape[1] // ALIGN_K, splits,
        BM=bm, BN=bn, BK=bk, **flags, **constants,
        num_warps=warps, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip
    if splits > 1:
        _add(partial, ends, y, splits)
    return y


def finish(sums: torch.Tensor, ends: Ends, dtype: torch.dtype) -> torch.Tensor:
    """y [M, N] in `dtype` of int32 sums [M, N] that are whole."""
    y = sums.new_empty(sums.shape, dtype=dtype)
    _add(sums, ends, y, 1)
    return y


def _add(partial: torch.Tensor, ends: Ends, y: torch.Tensor, splits: int) -> None:
    m, n = y.shape
    add_splits[(m, (n + _SUM_BLOCK - 1) // _SUM_BLOCK)](
        *ends.pointers(), y, partial, m, n, splits, BLOCK=_SUM_BLOCK, **ends.flags(),
        num_warps=4, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip


def codes_of(rows: RoundedRows, k: int) -> torch.Tensor:
    """Codes int8 [M, padded K], contiguous; columns beyond K are zero."""
    codes, width = rows.codes, padded(k)
    if codes.ndim != 2 or codes.shape[1] not in (k, width):
        raise NoKernelError(
            f"needs rounded rows [M, {k}], or [M, {width}] with zeros, got {list(codes.shape)}"
        )
    if codes.shape[1] < width:
        return torch.nn.functional.pad(codes, (0, width - k))
    return codes.contiguous()


def totals_of(rows: RoundedRows) -> torch.Tensor:
    """Σ_k codes, int32 [M, 1]."""
    if isinstance(rows, SummedRows):
        return rows.totals
    return rows.codes.sum(-1, keepdim=True, dtype=torch.int32)


# ---- compilation ----------------------------------------------------------------------------


def compile_product(
    problem: Problem,
    config: Config,
    cc: tuple[int, int],
    kernel: Any,
    operands: Mapping[str, str],
    constants: Mapping[str, Any],
) -> tuple[Compiled, ...]:
    """The product and the sum of its splits, whatever split_k is. operands: types by name. constants:
    all but the tile's."""
    choice = dict(config)
    types = {
        **operands, "scale": "*fp32", "offset": "*fp32", "zero": "*i32", "row_scale": "*fp32",
        "totals": "*i32", "y": pointer(problem.dtype), "partial": "*i32",
        "m": "i32", "n": "i32", "k_blocks": "i32", "splits": "i32",
    }  # fmt: skip
    divisible = tuple(name for name, kind in types.items() if kind.startswith("*"))
    divisible += ("n",) if problem.n % 16 == 0 else ()
    tile = {name.upper(): choice[name] for name in ("bm", "bn", "bk")}
    variant = Variant(
        kernel, types, {**tile, **constants}, divisible,
        choice["warps"], choice["stages"], fp_fusion=False,
    )  # fmt: skip
    found = compile_variant(variant, cc)
    left = set(operands) | {"k_blocks"}
    flags = {name: constants[name] for name in ("OFFSET", "ZERO", "HIGH")}
    variant = Variant(
        add_splits,
        {name: kind for name, kind in types.items() if name not in left},
        {"BLOCK": _SUM_BLOCK, **flags},
        tuple(name for name in divisible if name not in left),
        4,
        2,
        fp_fusion=False,
    )
    return found, compile_variant(variant, cc)
