"""Compiles many configs in child processes, which may hang or die, and remembers the results.

    Job -> key -> on disk? ── yes ─────────────────────────────▶ result
                     └─ no ─▶ child: kernels()[name].compile(problem, config, cc)

Two jobs of one key compile to the same binaries. The key is a hash of

    kernel and Kernel.source, the toolchain, cc
    the problem without its sizes and machine: N, K, M, rows or tokens
    the config without the names that are numbers of a launch: split_k, splits

so `compile` must not depend on those. K of an op on rows stays in the key: a block holds a row.

Results lie in $XDG_CACHE_HOME/fewbit/compiled/<key>.json, a folder that only its owner may enter. One
that cannot be read is compiled again. Failures are not kept.

Children see no GPU, run one thread, and are not in Triton's interpreter. One that is silent for the
time allowed is killed, one that dies is replaced; its job failed. Deliberately not here: which configs
are worth it.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from .child import Child, Done, Gone, Refused
from .dispatch import kernels
from .errors import NoKernelError, TuningError, nearest_name
from .kernel import AnyProblem, Compiled, Config, RowsProblem
from .tuned_file import environment, this_toolchain

RUN_TIME_NAMES = ("split_k", "splits")  # numbers of a launch, not of a binary
_SIZES = ("m_bucket", "n", "k", "n_rows", "t_bucket", "machine", "device")
_HANDLER = "fewbit.quant.compile_pool:compiler"
_ENVIRONMENT = {
    "TRITON_INTERPRET": "0",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
_START_SECONDS = 120.0  # to import torch and the kernels
_SCHEMA = 1  # of what is kept, and of how binaries are read
_KEPT = tuple(field.name for field in fields(Compiled))


@dataclass(frozen=True)
class Job:
    """What to compile. cc: compute capability, such as (9, 0)."""

    kernel: str
    problem: AnyProblem
    config: Config
    cc: tuple[int, int]

    def __str__(self) -> str:
        """`gemm_w4a16 block_m=16 block_n=128 sm_90`."""
        told = "".join(f" {name}={value}" for name, value in self.config)
        return f"{self.kernel}{told} sm_{self.cc[0]}{self.cc[1]}"


@dataclass(frozen=True)
class CompileFailure:
    """Why a job gave no binary. why: "ERROR" (the compiler says no), "TIMEOUT" or "DEATH"."""

    why: str
    text: str


Result = tuple[Compiled, ...] | CompileFailure


def job_key(job: Job) -> str:
    """Hash of everything that the binaries of `job` may depend on."""
    kept = ("k",) if isinstance(job.problem, RowsProblem) else ()
    facts = [
        f"{field.name}={getattr(job.problem, field.name)!r}"
        for field in fields(job.problem)
        if field.name in kept or field.name not in _SIZES
    ]
    tools = [pair for pair in this_toolchain() if pair[0] != "torch"]
    config = [pair for pair in job.config if pair[0] not in RUN_TIME_NAMES]
    source = kernels()[job.kernel].source
    parts = [_SCHEMA, job.kernel, source, tools, job.problem.op, facts, config, job.cc]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def known_code(job: Job) -> tuple[Compiled, ...] | None:
    """What `job` compiles to, if an earlier run found out; nothing is compiled."""
    return _Kept.of_user().read(job_key(job))


def compile_all(
    jobs: Iterable[Job],
    n_jobs: int = 2,
    timeout_s: float = 120.0,
    progress: Callable[[int, int], None] | None = None,
    handler: str = _HANDLER,
) -> dict[Job, Result]:
    """What each job compiles to, or why it does not.

    n_jobs: child processes. timeout_s: for one job. progress(done, total): of distinct binaries,
    called here, once at first and once for each. handler: what runs in a child, for tests.
    NoKernelError for a kernel that does not exist or cannot be compiled; TuningError if children do
    not start, or n_jobs is below 1.
    """
    if n_jobs < 1:
        raise TuningError(f"compiling needs at least 1 job, got {n_jobs}")
    by_key: dict[str, list[Job]] = {}
    for job in jobs:
        _check(job)
        by_key.setdefault(job_key(job), []).append(job)
    kept = _Kept.of_user()
    results: dict[str, Result] = {
        key: found for key in by_key if (found := kept.read(key)) is not None
    }
    if progress is not None:
        progress(len(results), len(by_key))
    todo = {key: same[0] for key, same in by_key.items() if key not in results}
    with _Pool(todo, min(n_jobs, len(todo)), timeout_s, handler) as pool:
        for _ in range(len(todo)):
            key, result = pool.next()
            results[key] = result
            if not isinstance(result, CompileFailure):
                kept.write(key, result)
            if progress is not None:
                progress(len(results), len(by_key))
    return {job: results[key] for key, same in by_key.items() for job in same}


def _check(job: Job) -> None:
    kernel = kernels().get(job.kernel)
    if kernel is None:
        near = nearest_name(job.kernel, kernels())
        raise NoKernelError(f"{job.kernel!r} names no kernel{near}")
    if kernel.compile is None:
        raise NoKernelError(f"{job.kernel} has nothing to compile")


# ---- children -------------------------------------------------------------------------------


def compiler(beat: Callable[[Any], None]) -> Callable[[Job], tuple[Compiled, ...]]:
    """What runs in a child."""
    known = kernels()

    def compile_job(job: Job) -> tuple[Compiled, ...]:
        make = known[job.kernel].compile
        if make is None:
            raise NoKernelError(f"{job.kernel} has nothing to compile")
        return tuple(make(job.problem, job.config, job.cc))

    return compile_job


class _Pool:
    """Threads of this process, each with a child; `next` waits for any result."""

    def __init__(
        self, todo: Mapping[str, Job], n_jobs: int, timeout_s: float, handler: str
    ) -> None:
        self._todo: SimpleQueue[tuple[str, Job]] = SimpleQueue()
        for item in todo.items():
            self._todo.put(item)
        self._done: SimpleQueue[tuple[str, Result] | BaseException] = SimpleQueue()
        self._stop = threading.Event()
        self._timeout_s = timeout_s
        self._handler = handler
        self._threads = ThreadPoolExecutor(max(1, n_jobs))
        for _ in range(n_jobs):
            self._threads.submit(self._work).add_done_callback(self._ended)

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._threads.shutdown(wait=True)

    def next(self) -> tuple[str, Result]:
        """Key and result of the job that is done next. TuningError if a child does not start."""
        item = self._done.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _ended(self, thread: "Future[None]") -> None:
        error = thread.exception()
        if error is not None:
            self._done.put(error)

    def _work(self) -> None:
        """Take jobs until there are none; runs in a thread."""
        child: Child | None = None
        while not self._stop.is_set():
            try:
                key, job = self._todo.get_nowait()
            except Empty:
                break
            if child is None:
                child = Child(self._handler, _ENVIRONMENT)
                ready = self._receive(child, _START_SECONDS)
                if not isinstance(ready, Done):
                    child.kill()
                    text = ready.text if isinstance(ready, Gone) else "nothing heard of it"
                    raise TuningError(f"a process that compiles does not start: {text}")
            child.send(job)
            answer = self._receive(child, self._timeout_s)
            if not isinstance(answer, Done | Refused):
                child.kill()
                child = None
            self._done.put((key, _result(answer, self._timeout_s)))
        if child is not None:
            child.kill()

    def _receive(self, child: Child, seconds: float) -> Any:
        """As `child.receive`, but at an end of all work None at once."""
        waited = 0.0
        while waited < seconds and not self._stop.is_set():
            step = min(0.25, seconds - waited)
            message = child.receive(step)
            if message is not None:
                return message
            waited += step
        return None


def _result(answer: object, timeout_s: float) -> Result:
    if isinstance(answer, Done):
        compiled: tuple[Compiled, ...] = answer.value
        return compiled
    if isinstance(answer, Refused):
        return CompileFailure("ERROR", str(answer.error))
    if isinstance(answer, Gone):
        return CompileFailure("ERROR" if answer.fault else "DEATH", answer.text)
    return CompileFailure("TIMEOUT", f"not compiled within {timeout_s:g} s")


# ---- results on disk ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    """A folder of results; None keeps nothing."""

    folder: Path | None

    @classmethod
    def of_user(cls) -> "_Kept":
        """This user's; nothing is kept where it cannot be written."""
        cache = environment().cache
        if cache is None:
            return cls(None)
        folder = cache / "compiled"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            return cls(None)
        return cls(folder)

    def read(self, key: str) -> tuple[Compiled, ...] | None:
        """What was kept; None if nothing was, or if it is damaged."""
        if self.folder is None:
            return None
        try:
            found = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(found, list) or not found:
            return None
        compiled = [_compiled(item) for item in found]
        return None if None in compiled else tuple(item for item in compiled if item is not None)

    def write(self, key: str, compiled: tuple[Compiled, ...]) -> None:
        """Keep a result, whole or not at all."""
        if self.folder is None:
            return
        text = json.dumps([asdict(item) for item in compiled])
        temporary = self.folder / f".{key}.{os.getpid()}.tmp"
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.folder / f"{key}.json")
        except OSError:
            temporary.unlink(missing_ok=True)


def _compiled(item: object) -> Compiled | None:
    """A `Compiled` from its JSON form; None if it is not one."""
    if not isinstance(item, dict) or tuple(item) != _KEPT:
        return None
    counts = [item[name] for name in ("registers", "stack_bytes", "smem_bytes", "threads")]
    pairs = item["opcodes"]
    if not all(type(count) is int and count >= 0 for count in counts):
        return None
    if not isinstance(item["digest"], str) or not isinstance(pairs, list):
        return None
    if not all(isinstance(p, list) and [type(part) for part in p] == [str, int] for p in pairs):
        return None
    return Compiled(**item | {"opcodes": tuple((name, count) for name, count in pairs)})
