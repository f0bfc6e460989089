"""Machines as data: what is known of a GPU or CPU, and the least time that a product takes on it.

`quant/devices/*.json` describes machines by capability, sizes in bytes and rates per second. A GPU
at hand is found among them by compute capability, number of multiprocessors and memory, never by
its name: names differ between boards of one chip, and a slice of a GPU keeps the name but not the
multiprocessors. One that is not among them is described by what torch reports, without rates.

Maths of the limit, of a product [M, K] times [K, N]:

    bytes = stored weight (codes, scales, zeros) + M·K and M·N values in the dtype of x
    t     = max(2·M·N·K / peak,  bytes / bandwidth,  launch)

where peak is that of the activation format's numbers if the machine has a unit for them, else that
of the dtype of x. Every term is an estimate from published rates; no kernel is faster.

and of attention, which reads every stored key and value once for each row:

    bytes = B·Hkv·T·(stored key + value)    ops = 4·B·Hkv·G·Q·T·D, of the dtype of the queries

Deliberately not here: caches, occupancy, and what a particular kernel loses.

Finding a present GPU is not yet run on a GPU.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from .errors import RecipeError, nearest_name
from .format import formats
from .kernel import AnyProblem, AttentionProblem, Device, Peaks, Problem
from .page_format import find_page_format

_ISA = ("avx2", "avx512", "vnni", "bf16", "amx")
_CPU_FLAGS = {
    "vnni": {"avx512_vnni", "avx_vnni"},
    "bf16": {"avx512_bf16"},
    "amx": {"amx_int8", "amx_bf16"},
}
# Boards of one chip differ in memory by more than this, a driver's report from the label by less.
_SAME_MEMORY = 0.1
_WHOLE = ("sms", "smem_block_bytes", "smem_sm_bytes", "registers", "l2_bytes", "memory_bytes")
_RATES = ("bandwidth_bytes_per_second", "launch_seconds")
_NEVER_NULL = ("sms", "memory_bytes")
# Of row-wise functions, for each column: values of x's dtype that move, and bytes beside them.
_ROW_TRAFFIC = {
    "quantize_rows": (1, 1),
    "rmsnorm_quantize": (1, 1),
    "silu_mul_quantize": (2, 1),
    "hadamard": (2, 0),
}
_KEYS = tuple(field.name for field in fields(Device) if field.name not in ("name", "present"))


# ---- described machines ---------------------------------------------------------------------


def device_names() -> list[str]:
    """Names of the machines that `quant/devices/` describes."""
    folder = files(__package__) / "devices"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".json"))


def load_device(name_or_path: str) -> Device:
    """A described machine by name, or from a file whose name ends in .json.

    RecipeError if there is none, naming the nearest, or if the file is not as it must be.
    """
    if name_or_path.endswith(".json"):
        return _device_file(name_or_path)
    known = device_names()
    if name_or_path not in known:
        raise RecipeError(
            f"unknown device {name_or_path!r}{nearest_name(name_or_path.lower(), known)}; "
            f"described: {', '.join(known)}; a file must end in .json"
        )
    resource = files(__package__) / "devices" / f"{name_or_path}.json"
    return parse_device(name_or_path, resource.read_text(encoding="utf-8"))


def _device_file(path: str) -> Device:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"device file {path!r} cannot be read: {error}") from error
    return parse_device(Path(path).stem, text)


def parse_device(name: str, text: str) -> Device:
    """The machine that a JSON text describes; RecipeError names the key that is wrong."""
    owner = f"device {name!r}"
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{owner} is not valid JSON: {error}") from error
    table = _keys(owner, found, _KEYS)
    for key in ("title", "source"):
        if not isinstance(table[key], str) or not table[key]:
            raise RecipeError(f"{owner}: {key} must be a text, got {table[key]!r}")
    if table["backend"] not in ("cuda", "cpu"):
        raise RecipeError(f"{owner}: backend must be 'cuda' or 'cpu', got {table['backend']!r}")
    for key in _WHOLE:
        _number(owner, key, table[key], whole=True)
    for key in _NEVER_NULL:
        if table[key] is None:
            raise RecipeError(f"{owner}: {key} must be a number, got null")
    for key in _RATES:
        _number(owner, key, table[key])
    facts = table | {
        "cc": _capability(owner, table["cc"], table["backend"]),
        "isa": _isa(owner, table["isa"]),
        "peak_ops_per_second": _peaks(owner, table["peak_ops_per_second"]),
    }
    return Device(name=name, **facts)


def _keys(owner: str, table: object, allowed: tuple[str, ...]) -> dict[str, Any]:
    """The table itself, if it is an object with exactly the allowed keys."""
    if not isinstance(table, dict):
        raise RecipeError(f"{owner}: must be a JSON object, got {type(table).__name__}")
    for key in table:
        if key not in allowed:
            raise RecipeError(
                f"{owner}: unknown key {key!r}{nearest_name(key, allowed)}; "
                f"allowed: {', '.join(allowed)}"
            )
    missing = [key for key in allowed if key not in table]
    if missing:
        raise RecipeError(f"{owner}: missing {', '.join(missing)}; null stands for unknown")
    return table


def _number(owner: str, key: str, value: object, *, whole: bool = False) -> None:
    """A positive number or null."""
    kinds = (int,) if whole else (int, float)
    wrong = isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf")
    if value is not None and wrong:
        kind = "whole number" if whole else "number"
        raise RecipeError(f"{owner}: {key} must be a {kind} above 0 or null, got {value!r}")


def _capability(owner: str, value: object, backend: str) -> tuple[int, int] | None:
    if backend == "cpu" and value is None:
        return None
    numbers = [part for part in value if type(part) is int] if isinstance(value, list) else []
    if backend == "cpu" or value != numbers or len(numbers) != 2 or min(numbers) < 0:
        raise RecipeError(f"{owner}: cc must be [major, minor], null for a CPU, got {value!r}")
    return numbers[0], numbers[1]


def _isa(owner: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or any(item not in _ISA for item in value):
        raise RecipeError(f"{owner}: isa must list any of {', '.join(_ISA)}, got {value!r}")
    return tuple(value)


def _peaks(owner: str, table: object) -> Peaks:
    owner = f"{owner}: peak_ops_per_second"
    kinds = tuple(field.name for field in fields(Peaks))
    rates = _keys(owner, table, kinds)
    for kind in kinds:
        _number(owner, kind, rates[kind])
    return Peaks(**rates)


# ---- this machine ---------------------------------------------------------------------------


@cache
def this_device(backend: str | None = None) -> Device:
    """Facts of the machine at hand: its current GPU if `backend` is "cuda", its CPU if it is "cpu",
    the GPU if there is one otherwise. Rates are known only of a GPU that is described."""
    if backend is None:
        backend = "cuda" if torch.cuda.is_available() else "cpu"
    return _this_gpu() if backend == "cuda" else _this_cpu()


def _this_cpu() -> Device:
    return Device(
        name="this-cpu",
        title=f"this CPU, {torch.backends.cpu.get_cpu_capability()}",
        backend="cpu",
        cc=None,
        isa=_this_isa(),
        sms=os.cpu_count() or 1,
        smem_block_bytes=None,
        smem_sm_bytes=None,
        registers=None,
        l2_bytes=None,
        memory_bytes=None,
        bandwidth_bytes_per_second=None,
        launch_seconds=None,
        peak_ops_per_second=Peaks(),
        source="reported by torch and the system",
        present=True,
    )


def _this_isa() -> tuple[str, ...]:
    capability = torch.backends.cpu.get_cpu_capability().lower()
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    vectors = {"avx2": ("avx2",), "avx512": ("avx2", "avx512")}.get(capability, ())
    return (*vectors, *(name for name, any_of in _CPU_FLAGS.items() if any_of & flags))


def _this_gpu() -> Device:
    facts: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    known = match_gpu((facts.major, facts.minor), facts.multi_processor_count, facts.total_memory)
    if known is not None:
        return replace(known, present=True)
    return Device(
        name=f"sm{facts.major}{facts.minor}-{facts.multi_processor_count}",
        title=facts.name,
        backend="cuda",
        cc=(facts.major, facts.minor),
        isa=(),
        sms=facts.multi_processor_count,
        smem_block_bytes=getattr(facts, "shared_memory_per_block_optin", None),  # new in torch
        smem_sm_bytes=getattr(facts, "shared_memory_per_multiprocessor", None),
        registers=getattr(facts, "regs_per_multiprocessor", None),
        l2_bytes=getattr(facts, "L2_cache_size", None),
        memory_bytes=facts.total_memory,
        bandwidth_bytes_per_second=None,
        launch_seconds=None,
        peak_ops_per_second=Peaks(),
        source="reported by the driver; rates unknown",
        present=True,
    )


def match_gpu(cc: tuple[int, int], sms: int, memory_bytes: int) -> Device | None:
    """The described GPU with this capability, number of multiprocessors and memory; None if none."""
    same = [
        (abs(memory_bytes / device.memory_bytes - 1), device.name, device)
        for device in map(load_device, device_names())
        if device.cc == cc and device.sms == sms and device.memory_bytes is not None
    ]
    error, _, found = min(same, default=(1.0, "", None))
    return found if error < _SAME_MEMORY else None


# ---- limit ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """The least time a product can take, an estimate, and what sets it: memory, compute, launch.
    share: this time over that of the kernel it is compared with, launch included."""

    bound: str
    seconds: float
    share: float


def limit_of(problem: AnyProblem, seconds: float) -> Limit | None:
    """The limit of `problem`, beside a kernel that takes `seconds` after its launch; None if the
    machine's rates are not known, or what the op moves. Of several terms the first one's bytes
    are counted, the rest can only add."""
    machine = problem.machine
    counted = _count(problem)
    if machine is None or counted is None:
        return None
    moved, ops = counted
    peak, bandwidth = (
        _peak(machine.peak_ops_per_second, problem),
        machine.bandwidth_bytes_per_second,
    )
    if peak is None or bandwidth is None:
        return None
    launch = machine.launch_seconds or 0.0
    times: Mapping[str, float] = {
        "memory": moved / bandwidth,
        "compute": ops / peak,
        "launch": launch,
    }
    bound = max(times, key=lambda name: times[name])
    return Limit(bound, times[bound], times[bound] / (seconds + launch))


def _count(problem: AnyProblem) -> tuple[float, float] | None:
    """(bytes that must move, operations); None where they are not known."""
    if isinstance(problem, Problem):
        stored = formats().get(problem.format)
        if stored is None:
            return None
        n, k, m = problem.n, problem.k, problem.m_bucket
        weight = sum(spec.n_bytes for spec in stored.part_specs((n, k), problem.options).values())
        return weight + m * (k + n) * problem.dtype.itemsize, 2 * m * n * k
    if isinstance(problem, AttentionProblem):
        vectors = problem.n_rows * problem.kv_heads * problem.t_bucket
        queries = problem.group * problem.n_queries
        channels = problem.head_dim + problem.value_dim
        return vectors * stored_vector_bytes(problem), 2 * vectors * queries * channels
    if problem.op in _ROW_TRAFFIC:
        values, single_bytes = _ROW_TRAFFIC[problem.op]
        return problem.m_bucket * problem.k * (values * problem.dtype.itemsize + single_bytes), 0
    return None


def stored_vector_bytes(problem: AttentionProblem) -> int:
    """Bytes of one stored key and one stored value; RecipeError for a page format that is unknown."""
    sides = (
        (problem.key, problem.key_options, problem.head_dim),
        (problem.value, problem.value_options, problem.value_dim),
    )
    return sum(
        spec.n_bytes
        for name, options, size in sides
        for spec in find_page_format(name).part_specs(size, problem.dtype, options).values()
    )


def _peak(peaks: Peaks, problem: AnyProblem) -> float | None:
    """Operations a second of the activation's numbers (`int8_token`: int8), else of x's dtype."""
    kinds: dict[torch.dtype, float | None] = {
        torch.float32: peaks.fp32,
        torch.float16: peaks.fp16,
        torch.bfloat16: peaks.bf16,
    }
    rounded: dict[str, float | None] = {
        "int8": peaks.int8,
        "fp8": peaks.fp8,
        "fp4": peaks.fp4,
    }
    numbers = (getattr(problem, "activation", None) or "").partition("_")[0]
    return rounded.get(numbers) or kinds.get(problem.dtype)


def device_facts(device: Device) -> dict[str, Any]:
    """JSON form of what tells one machine from another: name, title, backend, cc, sms, present."""
    return {
        "name": device.name,
        "title": device.title,
        "backend": device.backend,
        "cc": list(device.cc) if device.cc else None,
        "sms": device.sms,
        "present": device.present,
    }
