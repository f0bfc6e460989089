"""How long one launch takes, estimated from what it does and how it is cut into blocks.

    mem   = bytes / (bandwidth · min(1, in flight / (bandwidth · latency)))       Little's law
    comp  = ops / (peak · 0.8)
    alu   = integer and conversion instructions / rate
    wave  = ceil(T / R) · R / T          T blocks in all, R resident at once
    t     = max(mem, comp, alu) · wave + extra

The launch itself is left out: it is the same for every choice. A block keeps (stages − 1) tiles in
flight. R follows from registers, shared memory and threads: from the compiler's figures if a config was
compiled, otherwise from guesses of the kernel. Constants are recalled or fitted to published timings,
not measured here, and only rank choices.

Deliberately not here: what a kernel counts as its bytes and operations; each kernel says so itself.
"""

import math
from dataclasses import dataclass

from .kernel import Compiled, Device

LATENCY_SECONDS = 0.8e-6  # of memory under load on an H200; spec'd parts differ little
_PIPE = 0.8  # share of a peak that a good main loop reaches
_SM_THREADS = {(8, 0): 2048, (9, 0): 2048, (10, 0): 2048}  # 1,536 on all other capabilities
_SM_BLOCKS = {(8, 9): 24, (12, 0): 24}  # 32 on all others
_REGISTER_UNIT = 256  # registers are handed out to warps in such portions
_RESERVED_SMEM = 1024  # of each block, by the driver


@dataclass(frozen=True)
class Work:
    """What all blocks of a launch do together.

    bytes: read from and written to memory. ops: of the unit of `kind` (a field of `Peaks`), a
    multiply-add is two. alu: lane instructions on integers, conversions and shifts.
    extra_seconds: what comes after and does not overlap, such as a reduction.
    """

    bytes: float
    ops: float
    kind: str
    alu: float = 0.0
    extra_seconds: float = 0.0


@dataclass(frozen=True)
class Tiling:
    """How the work is cut. blocks: in all. threads: of a block. in_flight_bytes: that a block has
    asked for and not yet received. registers, smem_bytes: of a thread and of a block, as guessed."""

    blocks: int
    threads: int
    in_flight_bytes: float
    registers: int
    smem_bytes: int


def launch_seconds(
    work: Work, tiling: Tiling, device: Device, compiled: Compiled | None = None
) -> float:
    """Estimated seconds; infinite for what cannot run there, or was compiled with spills. Where a
    rate of the device is unknown, its term is left out; 1 s if all are."""
    if compiled is not None and compiled.stack_bytes:
        return math.inf
    occupancy = blocks_per_sm(tiling, device, compiled)
    if occupancy == 0:
        return math.inf
    resident = device.sms * occupancy
    terms = [*_memory(work, tiling, device, min(resident, tiling.blocks)), *_units(work, device)]
    if not terms:
        return 1.0
    waves = math.ceil(tiling.blocks / resident) * resident / tiling.blocks
    # Within one wave idle multiprocessors cost compute; memory is shared by those that work, and
    # in_flight covers it.
    busy = max(terms) if tiling.blocks <= resident else max(terms) * waves
    spread = max(1.0, min(resident, device.sms) / tiling.blocks)
    return max(busy, max(_units(work, device), default=0.0) * spread) + work.extra_seconds


def _memory(work: Work, tiling: Tiling, device: Device, running: int) -> list[float]:
    bandwidth = device.bandwidth_bytes_per_second
    if bandwidth is None:
        return []
    in_flight = running * tiling.in_flight_bytes
    return [work.bytes / (bandwidth * min(1.0, in_flight / (bandwidth * LATENCY_SECONDS)))]


def _units(work: Work, device: Device) -> list[float]:
    peaks = device.peak_ops_per_second
    peak: float | None = getattr(peaks, work.kind)
    terms = [] if peak is None else [work.ops / (peak * _PIPE)]
    rate = alu_rate(device)
    return terms if rate is None else [*terms, work.alu / rate]


def alu_rate(device: Device) -> float | None:
    """Integer lane instructions a second: 64 lanes of a multiprocessor at the clock that the fp32
    peak tells (64 lanes on capability 8.0, 128 on all others)."""
    fp32 = device.peak_ops_per_second.fp32
    return None if fp32 is None else fp32 / (2 if device.cc == (8, 0) else 4)


def blocks_per_sm(tiling: Tiling, device: Device, compiled: Compiled | None = None) -> int:
    """Blocks that one multiprocessor holds at once; 0 if not even one fits."""
    registers = tiling.registers if compiled is None else compiled.registers
    smem = tiling.smem_bytes if compiled is None else compiled.smem_bytes
    threads = tiling.threads if compiled is None else compiled.threads
    if device.smem_block_bytes is not None and smem > device.smem_block_bytes:
        return 0
    cc = device.cc or (0, 0)
    limits = [_SM_THREADS.get(cc, 1536) // threads, _SM_BLOCKS.get(cc, 32)]
    if device.registers is not None:
        of_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
        limits.append(device.registers // (of_warp * (threads // 32)))
    if device.smem_sm_bytes is not None:
        limits.append(device.smem_sm_bytes // (smem + _RESERVED_SMEM))
    return min(limits)
