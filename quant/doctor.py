"""`fewbit doctor`: what this machine has, what will run on it, what is missing and how to get it.

`doctor` gathers facts and changes nothing: no network, no kernel is compiled or run. Only the native
library is made, as its first use would do.
`find_problems` is a pure function of those facts; each problem comes with its remedy. A machine
without a GPU has no problem for that: everything works there, slower.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch

from .codecs import rans32
from .dispatch import explain, m_bucket
from .errors import NoKernelError
from .formats.int_group import IntGroupOptions
from .kernel import Problem
from .native import compiler
from .policy import current_policy

# Optional package -> the extra that installs it.
_EXTRAS = {"triton": "triton", "cupy-cuda12x": "cuda", "ray": "ray", "datasets": ""}
_DRIVER = Path("/proc/driver/nvidia/version")
_ENVIRONMENT = (
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
_LITTLE_DISK = 5e9  # bytes: less than one small model and its result
_LITTLE_MEMORY = 2e9  # bytes: the data-free path needs 1.5e9
_FAST_ISA = ("AVX2", "AVX512")
_SAMPLE_BITS = (4, 8)  # weights that the table of kernels is made for
_SAMPLE_ROWS = (1, 512)  # one token at a time, and a prompt
_SAMPLE_SIZE = 4096


def doctor() -> dict[str, Any]:
    """Facts by topic, all JSON values; `problems` lists {problem, remedy}."""
    facts: dict[str, Any] = {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "system": _system(),
        "disk": {"here": _disk(Path.cwd()), "hub_cache": _disk(_hub_cache())},
        "packages": _packages(),
        "unmet": list(_unmet()),
        "gpus": _gpus(),
        "driver": _DRIVER.read_text().splitlines()[0] if _DRIVER.is_file() else None,
        "cuda": torch.version.cuda,
        "compiler": _compiler(),
        "native": _native(),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "kernels": _kernels("cuda" if torch.cuda.is_available() else "cpu"),
    }
    return {**facts, "problems": find_problems(facts)}


def find_problems(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """What of `facts` stands in the way of good use, each with its remedy."""
    found = [
        *_package_problems(facts),
        *_gpu_problems(facts),
        *_machine_problems(facts),
        *_native_problems(facts),
    ]
    if facts["kernels"]["error"]:
        found.append((facts["kernels"]["error"], "unset FEWBIT_KERNEL"))
    return [{"problem": problem, "remedy": remedy} for problem, remedy in found]


def _package_problems(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for need, installed in facts["unmet"]:
        yield f"fewbit needs {need}, found {installed or 'none'}", f"pip install '{need}'"


def _gpu_problems(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if facts["driver"] and not facts["cuda"]:
        yield (
            "there is an NVIDIA driver, but this torch is built for the CPU only",
            "install a CUDA build of torch, see https://pytorch.org/get-started",
        )
    elif facts["driver"] and not facts["gpus"]:
        yield (
            f"there is an NVIDIA driver, but torch (CUDA {facts['cuda']}) sees no GPU",
            "update the driver, or check CUDA_VISIBLE_DEVICES and the container's GPU settings",
        )
    for name in ("triton", "cupy-cuda12x"):
        if facts["gpus"] and facts["packages"][name] is None:
            yield f"{name} is missing, so its GPU kernels cannot run", _remedy(name)
    if facts["gpus"] and facts["compiler"] is None:
        yield "there is no C compiler, which triton needs", "install gcc, or set CC to a compiler"


def _machine_problems(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    system, here = facts["system"], facts["disk"]["here"]
    if system["machine"] in ("x86_64", "AMD64") and system["isa"] not in _FAST_ISA:
        yield (
            f"torch uses {system['isa']} on this CPU; its low-bit operators need AVX2 or AVX512",
            "nothing to do: weights are decoded before each product, which is slower",
        )
    if system["threads"] == 1 and system["cores"] > 1:
        yield (
            f"torch uses 1 of {system['cores']} cores",
            "unset OMP_NUM_THREADS or raise it",
        )
    memory = system["memory_bytes"]
    if memory is not None and memory < _LITTLE_MEMORY:
        yield (
            f"{_size(memory)} of memory; data-free recipes need 1.5 GB, calibrated ones more",
            "use a machine with more memory",
        )
    if here["free_bytes"] < _LITTLE_DISK:
        yield (
            f"{_size(here['free_bytes'])} free on the disk of {here['path']}",
            "free some space, or write to another disk with -o",
        )


def _native_problems(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    native = facts["native"]
    if native["why_not"] and not native["off"]:
        yield (
            f"lossless coding runs in numpy, some twenty times slower: {native['why_not']}",
            "do what it says, or install a wheel of fewbit that carries the library (`make wheel`)",
        )


# -- facts --------------------------------------------------------------------------------------


def _system() -> dict[str, Any]:
    return {
        "os": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    """Bytes of physical memory; None where the system does not say."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _disk(folder: Path) -> dict[str, Any]:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return {"path": str(folder), "free_bytes": shutil.disk_usage(existing).free}


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _packages() -> dict[str, str | None]:
    """Installed versions of what fewbit needs or can use; None: missing."""
    from packaging.requirements import Requirement  # comes with transformers

    needed = [Requirement(line) for line in requires("fewbit") or ()]
    names = [item.name for item in needed if "extra" not in str(item.marker or "")]
    return {name: _installed(name) for name in ("fewbit", *names, *_EXTRAS)}


def _unmet() -> Iterator[tuple[str, str | None]]:
    """(requirement, installed version) for each core requirement that is not satisfied."""
    from packaging.requirements import Requirement

    for line in requires("fewbit") or ():
        item = Requirement(line)
        if "extra" in str(item.marker or ""):
            continue
        installed = _installed(item.name)
        if installed is None or not item.specifier.contains(installed, prereleases=True):
            yield f"{item.name}{item.specifier}", installed


def _gpus() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": facts.name,
                "architecture": f"sm{facts.major}{facts.minor}",
                "memory_bytes": facts.total_memory,
            }
        )
    return found


def _compiler() -> str | None:
    """First line of the system compiler's `--version`; None if there is none that runs."""
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        path = shutil.which(name)
        if path is None:
            continue
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout:
            return f"{name}: {answer.stdout.splitlines()[0]}"
    return None


def _native() -> dict[str, Any]:
    """The library for lossless coding. engine: avx512, avx2, scalar or numpy. path: of the library;
    None without one, and then why_not is a sentence. off: that is what the environment asks for."""
    library = compiler.library()
    return {
        "engine": rans32.engine_name(),
        "path": None if library is None else library._name,
        "why_not": compiler.why_not(),
        "off": compiler.is_off(),
    }


def _kernels(device: str) -> dict[str, Any]:
    """What runs int_group weights on `device`: the choice for each sample, and who refuses why.

    refused: kernel -> reasons for the samples that it does not take; one that takes a sample is in
    `usable` too. error: why a forced kernel cannot be used.
    """
    policy = current_policy()
    rule = policy.forced(_problem(_SAMPLE_BITS[0], _SAMPLE_ROWS[0], device))
    chosen: dict[str, str] = {}
    usable: dict[str, list[str]] = {}
    refused: dict[str, dict[str, list[str]]] = {}
    error = None
    for bits in _SAMPLE_BITS:
        for rows in _SAMPLE_ROWS:
            label = f"w{bits} m={rows}"
            try:
                answer = explain(_problem(bits, rows, device), policy=policy)
            except NoKernelError as problem:
                error = str(problem).splitlines()[0]
                answer = explain(_problem(bits, rows, device))
            chosen[label] = answer.chosen
            for name, _ in answer.eligible:
                usable.setdefault(name, []).append(label)
            for name, reasons in answer.refused.items():
                for reason in reasons:
                    text = f"{reason.text} ({reason.fix})"
                    refused.setdefault(name, {}).setdefault(text, []).append(label)
    return {
        "device": device,
        "forced": rule.kernel if rule else None,
        "chosen": chosen,
        "usable": usable,
        "refused": refused,
        "error": error,
    }


def _problem(bits: int, rows: int, device: str) -> Problem:
    return Problem(
        format="int_group",
        options=IntGroupOptions(bits=bits),
        n_terms=1,
        m_bucket=m_bucket(rows),
        n=_SAMPLE_SIZE,
        k=_SAMPLE_SIZE,
        dtype=torch.bfloat16,
        device=device,
    )


# -- text ---------------------------------------------------------------------------------------


def doctor_text(facts: Mapping[str, Any]) -> str:
    """The facts for a terminal, problems last."""
    system, disk = facts["system"], facts["disk"]
    memory = system["memory_bytes"]
    lines = [
        f"python      {facts['python']['version']} ({facts['python']['executable']})",
        f"system      {system['os']}",
        f"cpu         {system['cpu']}, {system['cores']} cores, {system['isa']}, "
        f"{system['threads']} threads",
        f"memory      {'unknown' if memory is None else _size(memory)}",
        *(f"disk        {_size(disk[at]['free_bytes'])} free, {disk[at]['path']}" for at in disk),
        *_gpu_lines(facts),
        f"compiler    {facts['compiler'] or 'missing (for triton and the native library)'}",
        f"native      {facts['native']['engine']}: "
        f"{facts['native']['path'] or facts['native']['why_not']}",
        *(f"environment {name}={value}" for name, value in facts["environment"].items()),
        "packages",
        *(f"  {name:16s}{found or _absent(name)}" for name, found in facts["packages"].items()),
        *_kernel_lines(facts["kernels"]),
    ]
    if not facts["problems"]:
        return "\n".join([*lines, "no problems found"])
    lines.append("problems")
    for item in facts["problems"]:
        lines += [f"  {item['problem']}", f"    -> {item['remedy']}"]
    return "\n".join(lines)


def _gpu_lines(facts: Mapping[str, Any]) -> list[str]:
    if not facts["gpus"]:
        return ["gpu         none that torch can use"]
    driver = facts["driver"] or "driver unknown"
    return [f"driver      {driver}; torch is built for CUDA {facts['cuda']}"] + [
        f"gpu         {gpu['name']}, {gpu['architecture']}, {_size(gpu['memory_bytes'])}"
        for gpu in facts["gpus"]
    ]


def _kernel_lines(kernels: Mapping[str, Any]) -> list[str]:
    size = _SAMPLE_SIZE
    lines = [f"kernels on {kernels['device']} (int_group weights, {size} x {size}, bf16)"]
    lines += [f"  {label:10s}runs on {name}" for label, name in kernels["chosen"].items()]
    for name, reasons in kernels["refused"].items():
        for text, labels in reasons.items():
            lines.append(f"  not {name} for {', '.join(labels)}: {text}")
    return lines


def _absent(package: str) -> str:
    optional = " (optional)" if package in _EXTRAS else ""
    return f"missing{optional}: {_remedy(package)}"


def _remedy(package: str) -> str:
    extra = _EXTRAS.get(package)
    return f"pip install '{f'fewbit[{extra}]' if extra else package}'"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.1f} GB"
