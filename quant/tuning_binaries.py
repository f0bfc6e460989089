"""What the configs of many problems compile to, each binary once.

    family ── buckets ── kernels that take it ── configs ─▶ kernel and config without split_k, splits
                                                            └─▶ one job, for all buckets

The compile pool knows which jobs of different families are the same binary. Deliberately not here: the
compiling (`compile_pool.py`), and the search.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .compile_pool import RUN_TIME_NAMES, CompileFailure, Job, Result, compile_all
from .errors import NoKernelError, TuningError
from .kernel import AnyProblem, Compiled, Config, Kernel
from .ladder import Candidate

Builder = Callable[..., Mapping[Job, Result]]
_Static = tuple[str, Config]  # kernel, and its config without the numbers of a launch


@dataclass(frozen=True)
class BuiltFamilies:
    """Jobs of each family, and what they compile to. n_binaries: distinct ones, failures included."""

    jobs: Mapping[str, Mapping[_Static, Job]]
    results: Mapping[Job, Result]
    n_binaries: int

    def of(
        self, problem: AnyProblem, known: Iterable[Kernel]
    ) -> dict[Candidate, tuple[Compiled, ...]]:
        """Binaries of every config of a problem that compiled."""
        jobs = self.jobs[problem.family]
        found = {}
        for kernel, config in _compilable(problem, known):
            result = self.results[jobs[_static(kernel, config)]]
            if not isinstance(result, CompileFailure):
                found[Candidate(kernel.name, config)] = result
        return found

    def failures(self) -> tuple[tuple[str, int], ...]:
        """What compilers say of jobs that gave no binary, the most frequent first."""
        failed = (result for result in self.results.values() if isinstance(result, CompileFailure))
        return tuple(Counter(f"{result.why} {result.text}" for result in failed).most_common())


def build(
    families: Sequence[AnyProblem],
    known: Sequence[Kernel],
    n_jobs: int,
    progress: Callable[[int, int], None],
    builder: Builder = compile_all,
) -> BuiltFamilies:
    """Compile every config of all buckets of the families, for their machine, in `n_jobs` processes.

    TuningError if a machine has no compute capability; NoKernelError if nothing at all compiles.
    """
    jobs: dict[str, dict[_Static, Job]] = {}
    for family in families:
        own = jobs.setdefault(family.family, {})
        if family.machine is None or family.machine.cc is None:
            raise TuningError(f"{family} is not for a GPU of known compute capability")
        for size in family.buckets:
            problem = family.at(size)
            for kernel, config in _compilable(problem, known):
                job = Job(kernel.name, problem, config, family.machine.cc)
                own.setdefault(_static(kernel, config), job)
    n_binaries = 0

    def count(done: int, total: int) -> None:
        nonlocal n_binaries
        n_binaries = total
        progress(done, total)

    wanted = [job for own in jobs.values() for job in own.values()]
    results = builder(wanted, n_jobs=n_jobs, progress=count) if wanted else {}
    built = BuiltFamilies(jobs, results, n_binaries)
    if results and all(isinstance(result, CompileFailure) for result in results.values()):
        raise NoKernelError(f"no kernel compiles here: {built.failures()[0][0]}")
    return built


def _static(kernel: Kernel, config: Config) -> _Static:
    return kernel.name, tuple(pair for pair in config if pair[0] not in RUN_TIME_NAMES)


def _compilable(problem: AnyProblem, known: Iterable[Kernel]) -> Iterator[tuple[Kernel, Config]]:
    """Configs that a compiler makes, of kernels that take the problem."""
    for kernel in known:
        if kernel.compile is None or kernel.op != problem.op or kernel.refuse(problem):
            continue
        for config in ((),) if kernel.configs is None else kernel.configs(problem):
            yield kernel, config
