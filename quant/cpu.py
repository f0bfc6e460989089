"""Low-bit products through torch's own CPU operators, and dense products of decoded weights.

kernel         what it runs                       when it wins (measured by `bench/decode.py`)
int4pack       aten::_weight_int4pack_mm_for_cpu  2-4 bits, bf16, M <= 4: a quarter of the bytes
int8pack       aten::_weight_int8pack_mm          2-8 bits, whole-row scales, bf16, M <= 4
dense_cached   decodes once, keeps the weight     M > 4, and every fp32 and fp16 model
dense_chunked  decodes row blocks at every call   as dense_cached, when the RAM budget is used up

Maths of int4pack. The operator computes (q − 8)·s + z, with s and z in bf16 for each group; a
stored weight of b ≤ 4 bits is (code − zero)·scale. So q = code + 8 − h, s = scale and
z = (h − zero)·scale, with h = 2^(b−1), the zero of symmetric weights. Centring the codes keeps z
small: it is rounded as a whole. Products and sums are fp32 inside, so what is lost is the bf16
rounding of s and z (2^-9 relative, as much as `reference` loses by rounding each weight to bf16)
and of y. s has a sign: so do our scales.

The time of int4pack and int8pack grows with M from the first row on, that of a dense product does
not; hence their limit. Up to M = 32 they still beat decoding the weight at every call, so there
they stay eligible, at their estimated time, for when `dense_cached` has no memory left.

`DENIED_OPS` lists operators that look right for the job and run plain scalar code on x86.
Nothing here rounds inputs: dense products get them rounded, `cpu_int8.py` multiplies integers.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from .errors import NoKernelError
from .format import dequantize, find_format
from .formats.fle import FleOptions
from .formats.int_group import IntGroupOptions, unpack_bits
from .kernel import Kernel, Problem, Reason
from .packed import PackedTensor, Term

_MAX_M = 32  # rows beyond which the packed operators lose even to decoding at every call
_OP_GROUPS = (256, 128, 64, 32)  # all that int4pack takes
_INT8_K = 32  # int8pack reads past the end of a row whose length is no multiple (seen: K = 40)
_BLOCK_WEIGHTS = 1 << 20  # decoded at once: 4 MB in fp32 stays in a second-level cache
_PACK_ROWS = 64  # int4pack stores rows in blocks of 64: other cuts would change the layout

# Bytes and multiply-adds a second on two cores with AVX-512, between the two processors measured.
# They only rank kernels: their ratios matter, and put the crossover at M = 4.
_PACKED_BYTES, _PACKED_MACS = 40e9, 55e9
_DENSE_BYTES = {torch.bfloat16: 19e9, torch.float16: 19e9, torch.float32: 20e9}
_DENSE_MACS = {torch.bfloat16: 300e9, torch.float16: 300e9, torch.float32: 60e9}
_SLOW_MACS = 5e9  # dtypes that torch multiplies without a library
_DECODE_WEIGHTS = 6e8

DENIED_OPS: dict[str, Reason] = {
    "aten::_scaled_mm": Reason(
        "DENIED",
        "fp8 products run reference code on x86: 0.3 s at M = 1, 7.9 s at M = 32 for N = K = 2048",
        "store 8-bit integers (int_group, bits = 8, group = 'row') for CPU use",
    ),
    "aten::_dyn_quant_matmul_4bit": Reason(
        "DENIED",
        "vectorised on Arm only; on x86 4-7 ms at M = 1 and 0.2-0.4 s at M = 32 for N = K = 4096",
        "int4pack covers 4-bit weights on x86",
    ),
}


# ---- memory budget of decoded weights -------------------------------------------------------


class DenseBudget:
    """Counts the bytes of decoded weights that are alive, and says whether one more may be.

    Limit: half of the memory that would be available if none were held (so the cache can never
    take more than half of what the process found free), or `limit` bytes if that is set.
    Nothing is evicted: layers are used in turn, and evicting would decode every layer every time.
    A weight's bytes are given back when its owner is garbage-collected.
    """

    def __init__(self, available: Callable[[], int], limit: int | None = None) -> None:
        self._available = available
        self._lock = threading.RLock()  # a finalizer may run inside `take`
        self.limit = limit
        self.held = 0

    def room(self) -> int:
        """Bytes that may still be taken."""
        limit = self.limit
        if limit is None:
            limit = (self.held + self._available()) // 2
        return max(0, limit - self.held)

    def take(self, owner: object, n_bytes: int) -> None:
        """Count `n_bytes` until `owner` is collected; NoKernelError if there is no room."""
        with self._lock:
            room = self.room()
            if n_bytes > room:
                raise NoKernelError(
                    f"a decoded weight of {n_bytes} bytes does not fit the "
                    f"{room} bytes left; use dense_chunked"
                )
            self.held += n_bytes
        weakref.finalize(owner, self._give_back, n_bytes)

    def _give_back(self, n_bytes: int) -> None:
        with self._lock:
            self.held -= n_bytes


def available_memory() -> int:
    """Bytes that this process can still allocate; the one place that reads it.

    The smaller of what the kernel reports and what the control group leaves. Where neither can be
    read (not Linux), a quarter of the physical memory; 0 if that is unknown too.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return _physical_memory() // 4
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.exists() and (allowed := limit.read_text().strip()) != "max":
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, int(allowed) - used + int(stat.get("inactive_file", 0)))
    return max(0, free)


def _physical_memory() -> int:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


DENSE_BUDGET = DenseBudget(available_memory)


# ---- refusals -------------------------------------------------------------------------------


def off_cpu(problem: Problem) -> Iterator[Reason]:
    """The reason against another device, if it is one."""
    if problem.device != "cpu":
        machine = f" ({problem.machine})" if problem.machine else ""
        yield Reason(
            "ARCH", f"runs on the CPU, got {problem.device}{machine}", "use a kernel of that device"
        )


def capability_of(problem: Problem) -> str:
    """Vector instructions of the CPU in question: "AVX512", "AVX2", or another word of torch's."""
    if problem.described is None:
        return torch.backends.cpu.get_cpu_capability()
    isa = problem.described.isa
    return next((name for name in ("AVX512", "AVX2") if name.lower() in isa), "DEFAULT")


def _not_packable(problem: Problem, dtypes_text: str) -> Iterator[Reason]:
    """Conditions that int4pack and int8pack share."""
    yield from off_cpu(problem)
    capability = capability_of(problem)
    if problem.device == "cpu" and capability not in ("AVX2", "AVX512"):
        yield Reason("ARCH", f"needs AVX2 or AVX-512, got {capability}", "use dense_cached")
    if problem.dtype != torch.bfloat16:
        yield Reason(
            "DTYPE",
            f"is vectorised for bfloat16 only ({dtypes_text}), got {problem.dtype}",
            "load the model with dtype=torch.bfloat16",
        )
    if problem.m_bucket > _MAX_M:
        yield Reason(
            "SHAPE_M",
            f"takes time proportional to M; needs M <= {_MAX_M}, got a bucket of {problem.m_bucket}",
            "dense_cached and dense_chunked do not",
        )
    if problem.n_terms != 1:
        yield Reason("TERMS", f"holds one term, got {problem.n_terms}", "use dense_cached")
    if problem.activation is not None:
        yield Reason(
            "ACTIVATION",
            f"is for inputs that are not rounded, got activation = {problem.activation}",
            "integer kernels round inputs themselves, dense_cached takes them rounded",
        )


def _refuse_int4(problem: Problem) -> tuple[Reason, ...]:
    reasons = list(_not_packable(problem, "float32 and float16 are 30 to 1000 times slower"))
    if problem.n % 16:
        reasons.append(
            Reason("SHAPE_N", f"N must be a multiple of 16, got {problem.n}", "pad the output axis")
        )
    options = problem.options
    if not isinstance(options, IntGroupOptions):
        reasons.append(_foreign(problem))
        return tuple(reasons)
    if options.bits > 4:
        reasons.append(
            Reason("BITS", f"holds 4 bits, got {options.bits}", "quantize to 4 or fewer")
        )
    if _op_group(problem.k, options) is None:
        reasons.append(
            Reason(
                "GROUP",
                f"needs groups of 32, 64 or 128 columns, got {options.group!r} with K = {problem.k}",
                "quantize with group = 32 or larger (a whole row: K a multiple of 32)",
            )
        )
    return tuple(reasons)


def _refuse_int8(problem: Problem) -> tuple[Reason, ...]:
    reasons = list(_not_packable(problem, "float32 is 30 times slower"))
    options = problem.options
    if not isinstance(options, IntGroupOptions):
        reasons.append(_foreign(problem))
        return tuple(reasons)
    if options.group != "row":
        reasons.append(
            Reason(
                "GROUP",
                f"needs one scale for a row, got groups of {options.group}",
                "quantize with group = 'row'",
            )
        )
    if not options.symmetric:
        reasons.append(
            Reason(
                "ZERO",
                "needs symmetric weights, got zero points",
                "quantize with symmetric = true",
            )
        )
    return tuple(reasons)


def _refuse_cached(problem: Problem) -> tuple[Reason, ...]:
    reasons = (*off_cpu(problem), *_held_small(problem))
    return (*reasons, *no_room(problem, _dense_bytes(problem)))


def no_room(problem: Problem, needed: int) -> Iterator[Reason]:
    """The reason against keeping a decoded weight of `needed` bytes, if the budget is used up. A
    described machine has all of its memory free."""
    if problem.device != "cpu":
        return
    described = problem.described
    room = (described.memory_bytes or 0) // 2 if described else DENSE_BUDGET.room()
    if needed > room:
        yield Reason(
            "MEMORY",
            f"needs {needed >> 20} MiB for the decoded weight, got {room >> 20} MiB, what is left of "
            f"a budget of half the free memory",
            "free memory, or accept dense_chunked",
        )


def _held_small(problem: Problem) -> Iterator[Reason]:
    if isinstance(problem.options, FleOptions):
        text = f"got {problem.format}, held to save memory; a decoded copy would take it again"
        yield Reason("FORMAT", text, "use fle_scratch")


def _refuse_chunked(problem: Problem) -> tuple[Reason, ...]:
    return (*off_cpu(problem), *_held_small(problem))


def _foreign(problem: Problem) -> Reason:
    return Reason("FORMAT", f"reads int_group, got {problem.format}", "use dense_cached")


def _op_group(k: int, options: IntGroupOptions) -> int | None:
    """Group length to hand to int4pack: ours, or for whole-row scales the longest that fits."""
    if options.group == "row":
        return next((size for size in _OP_GROUPS if k % size == 0), None)
    return options.group if options.group in _OP_GROUPS else None


# ---- int4pack -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Int4Layout:
    """weight uint8 [N, Kp/2] in the operator's order; scale_zero bf16 [Kp/group, N, 2]."""

    weight: torch.Tensor
    scale_zero: torch.Tensor
    group: int
    k_padded: int


def _prepare_int4(packed: PackedTensor, dtype: torch.dtype) -> Int4Layout:
    term, options = _only_term(packed)
    codes = term.parts["codes"]
    k_padded = codes.shape[-1] * 8 // options.bits
    group = _op_group(packed.shape[-1], options)
    if group is None:
        raise NoKernelError(f"int4pack cannot hold groups of {options.group!r}; use dense_cached")
    # The operator's packer wants int32 codes: eight times the packed bytes, so a few rows at once.
    step = max(_PACK_ROWS, _BLOCK_WEIGHTS // k_padded // _PACK_ROWS * _PACK_ROWS)
    weight = torch.cat([_pack_int4(rows, options) for rows in codes.split(step)])
    scale = term.parts["scale_group"].float()
    if options.symmetric:
        zero = torch.zeros_like(scale)
    else:
        zero = ((1 << (options.bits - 1)) - term.parts["zero_group"].float()) * scale
    scale_zero = torch.stack([scale, zero], dim=-1).to(torch.bfloat16)
    if options.group == "row":
        scale_zero = scale_zero.expand(-1, k_padded // group, -1)
    return Int4Layout(weight, scale_zero.transpose(0, 1).contiguous(), group, k_padded)


def _pack_int4(rows: torch.Tensor, options: IntGroupOptions) -> torch.Tensor:
    codes = unpack_bits(rows, options.bits).int() + 8 - (1 << (options.bits - 1))
    inner_k_tiles = 1  # without effect on the CPU; the operator's signature has it
    return torch._convert_weight_to_int4pack_for_cpu(codes, inner_k_tiles)


def _launch_int4(x: torch.Tensor, layout: Int4Layout) -> torch.Tensor:
    if x.shape[-1] != layout.k_padded:
        x = functional.pad(x, (0, layout.k_padded - x.shape[-1]))
    return torch._weight_int4pack_mm_for_cpu(
        x.contiguous(), layout.weight, layout.group, layout.scale_zero
    )


# ---- int8pack -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Int8Layout:
    """weight int8 [N, K padded to 32], scale bf16 [N]."""

    weight: torch.Tensor
    scale: torch.Tensor


def _prepare_int8(packed: PackedTensor, dtype: torch.dtype) -> Int8Layout:
    term, options = _only_term(packed)
    # uint8 subtraction wraps; read as int8 the result is code − 2^(b−1)
    weight = (unpack_bits(term.parts["codes"], options.bits) - (1 << (options.bits - 1))).view(
        torch.int8
    )
    weight = functional.pad(weight, (0, -weight.shape[-1] % _INT8_K)).contiguous()
    return Int8Layout(weight, term.parts["scale_group"].squeeze(-1).to(torch.bfloat16))


def _launch_int8(x: torch.Tensor, layout: Int8Layout) -> torch.Tensor:
    if x.shape[-1] != layout.weight.shape[-1]:
        x = functional.pad(x, (0, layout.weight.shape[-1] - x.shape[-1]))
    return torch._weight_int8pack_mm(x.contiguous(), layout.weight, layout.scale)


def _only_term(packed: PackedTensor) -> tuple[Term, IntGroupOptions]:
    (term,) = packed.terms
    return term, term.options


# ---- dense products -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DenseLayout:
    """The decoded weight [N, K], counted in `DENSE_BUDGET` while this object lives."""

    weight: torch.Tensor


def _row_blocks(packed: PackedTensor) -> Iterator[tuple[int, int, PackedTensor]]:
    """(start, stop, those rows of the weight), about `_BLOCK_WEIGHTS` weights each."""
    n, k = packed.shape
    step = max(1, _BLOCK_WEIGHTS // k)
    for start in range(0, n, step):
        stop = min(n, start + step)
        terms = tuple(
            Term(
                term.format,
                term.options,
                find_format(term.format).slice(
                    term.parts, packed.shape, term.options, 0, start, stop
                ),
            )
            for term in packed.terms
        )
        yield start, stop, PackedTensor((stop - start, k), terms)


def _prepare_cached(packed: PackedTensor, dtype: torch.dtype) -> DenseLayout:
    layout = DenseLayout(torch.empty(packed.shape, dtype=dtype))
    DENSE_BUDGET.take(layout, layout.weight.numel() * layout.weight.element_size())
    for start, stop, block in _row_blocks(packed):
        layout.weight[start:stop] = dequantize(block)
    return layout


def _launch_cached(x: torch.Tensor, layout: DenseLayout) -> torch.Tensor:
    return functional.linear(x, layout.weight)


def _prepare_chunked(packed: PackedTensor, dtype: torch.dtype) -> PackedTensor:
    return packed


def _launch_chunked(x: torch.Tensor, packed: PackedTensor) -> torch.Tensor:
    y = x.new_empty(x.shape[0], packed.shape[0])
    for start, stop, block in _row_blocks(packed):
        y[:, start:stop] = functional.linear(x, dequantize(block).to(x.dtype))
    return y


# ---- estimates ------------------------------------------------------------------------------


def _dense_bytes(problem: Problem) -> int:
    return problem.n * problem.k * problem.dtype.itemsize


def _seconds_packed(problem: Problem, bytes_per_weight: float) -> float:
    weights = problem.n * problem.k
    return weights * (bytes_per_weight / _PACKED_BYTES + problem.m_bucket / _PACKED_MACS)


def _seconds_int4(problem: Problem) -> float:
    return _seconds_packed(problem, 0.5 + 4 / 128)


def _seconds_int8(problem: Problem) -> float:
    return _seconds_packed(problem, 1.0)


def seconds_dense(problem: Problem) -> float:
    """Estimate for a product with a dense weight."""
    read = _dense_bytes(problem) / _DENSE_BYTES.get(problem.dtype, 20e9)
    macs = problem.n * problem.k * problem.m_bucket
    return read + macs / _DENSE_MACS.get(problem.dtype, _SLOW_MACS)


def _seconds_chunked(problem: Problem) -> float:
    decode = problem.n_terms * problem.n * problem.k / _DECODE_WEIGHTS
    return decode + seconds_dense(problem)


KERNELS = (
    Kernel("int4pack", _refuse_int4, _prepare_int4, _launch_int4, _seconds_int4),
    Kernel("int8pack", _refuse_int8, _prepare_int8, _launch_int8, _seconds_int8),
    Kernel("dense_cached", _refuse_cached, _prepare_cached, _launch_cached, seconds_dense),
    Kernel("dense_chunked", _refuse_chunked, _prepare_chunked, _launch_chunked, _seconds_chunked),
)
