"""Finds the fastest kernel and config of each problem, and keeps it in a tuned table.

    families x buckets ─▶ configs of all kernels ─▶ compile, in parallel, without a GPU
                       ─▶ survivors, ranked by the model with registers and shared memory
                       ─▶ search: verify, sample, duel with what runs now (`search.py`)
                       ─▶ a row for each family, in the table

A ladder is always complete: a bucket that was not searched (the budget ran out, everything faulted, a
dry run) holds the model's choice and is marked as not measured. The table is written after a bucket
that faulted, every few seconds, and at the end of each family, so that a killed run loses seconds.
Running again skips the buckets that are measured and whose code is the same.

The budget is of time on the device; compiling comes before it, once for each binary, whatever shapes
use it. A family begins with its smallest bucket; the best of a bucket are hints for the next.

A dry run does all but the timing, for any described GPU. It never replaces measured entries.
Deliberately not here: what the user asked for (`autotune_command.py`), and how results are told
(`autotune_report.py`). Timing is not yet run on a GPU.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .autotune_report import Progress, Report, Result, Silent
from .compile_pool import compile_all
from .dispatch import explain, kernels
from .errors import NoKernelError, TuningError
from .kernel import AnyProblem, Device
from .ladder import Candidate
from .search import Bench, Outcome, Survivors, finalists, search, survivors
from .timing import Timer
from .tuned import NO_TABLES, Tables
from .tuned_table import Entry, Method
from .tuning_binaries import Builder, BuiltFamilies, build
from .tuning_record import Record, measured_entry, modelled_entry

METHOD: Method = (("cold", "rotate"), ("graph", 1), ("stat", "median"))
_SILENT = Silent()
_SAVE_SECONDS = 5.0  # between two writes of one family's row
_HINTS = 3  # candidates that a bucket hands to the next


@dataclass(frozen=True)
class Settings:
    """out: the table, None writes none. budget_seconds: on the device. mode: of the search. n_jobs:
    compiler processes. driver, method: for people who read the table."""

    out: Path | None = None
    budget_seconds: float = math.inf
    mode: str = "guided"
    n_jobs: int = 2
    driver: str = ""
    method: Method = METHOD


def autotune(
    families: Sequence[AnyProblem],
    timer: Timer | None,
    settings: Settings = Settings(),
    *,
    tables: Tables = NO_TABLES,
    progress: Progress = _SILENT,
    builder: Builder = compile_all,
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Tune all buckets of families of problems, which share a GPU as their machine.

    timer: None for a dry run. tables: what decides until now. builder: as `compile_all`. clock: in
    seconds. TableError if `out` holds another GPU's table or cannot be read; TuningError if there is
    no GPU to tune for, or if the device fails; NoKernelError if nothing compiles. What was finished
    is kept.
    """
    started = clock()
    run = _Run(families, timer, settings, tables, clock)
    todo = [family for family in dict.fromkeys(families) if run.unfinished(family)]
    n_todo = sum(len(run.unfinished(family)) for family in todo)
    built = build(todo, run.known, settings.n_jobs, progress.compiled, builder)
    run.deadline = clock() + settings.budget_seconds
    results: list[Result] = []
    for family in todo:
        for result in run.tune(family, built):
            results.append(result)
            progress.searched(len(results), n_todo, result)
    return Report(
        device=run.device,
        results=tuple(results),
        n_skipped=sum(len(family.buckets) for family in dict.fromkeys(families)) - n_todo,
        n_left=run.n_left,
        n_binaries=built.n_binaries,
        failures=built.failures(),
        is_dry=timer is None,
        seconds=clock() - started,
        out=settings.out,
    )


class _Run:
    """The state of one `autotune`. deadline: on the clock, when no further problem is begun. n_left:
    problems that it cost."""

    def __init__(
        self,
        families: Sequence[AnyProblem],
        timer: Timer | None,
        settings: Settings,
        tables: Tables,
        clock: Callable[[], float],
    ) -> None:
        self.device = _device_of(families)
        self.known = [k for k in kernels().values() if k.op in {f.op for f in families}]
        self.deadline = math.inf
        self.n_left = 0
        self._named = {kernel.name: kernel for kernel in self.known}
        self._timer = timer
        self._mode = settings.mode
        self._tables = tables
        self._clock = clock
        self._bench = Bench()
        self._record = Record(settings.out, self.device, self._named)
        self._record.describe(settings.driver, settings.method if timer else ())
        self._saved_at = -math.inf

    def unfinished(self, family: AnyProblem) -> list[int]:
        """Buckets that are not measured, or whose code is another one by now."""
        kept = self._record.kept(family)
        return [size for size in family.buckets if size not in kept]

    def tune(self, family: AnyProblem, built: BuiltFamilies) -> Iterator[Result]:
        """Results of the family's unfinished buckets, from the smallest; keeps them in the table."""
        entries = self._record.kept(family)
        hints: tuple[Candidate, ...] = ()
        n_kept = len(entries)
        try:
            for size in self.unfinished(family):
                result, hints = self._tune_one(family.at(size), built, hints)
                entries[size] = result.after
                yield result
                if result.faults or self._clock() - self._saved_at > _SAVE_SECONDS:
                    self._save(family, entries, built)
        finally:
            if len(entries) > n_kept:
                self._save(family, entries, built)

    def _tune_one(
        self, problem: AnyProblem, built: BuiltFamilies, hints: Sequence[Candidate]
    ) -> tuple[Result, tuple[Candidate, ...]]:
        """One problem, and hints for the next."""
        found = self._survivors(problem, built)
        before = explain(problem, tables=self._tables)
        outcome = self._search(problem, found, before.candidate, hints)
        if outcome is None:
            entry, times = modelled_entry(problem, found, self._named), {}
        else:
            entry, times = self._after(problem, found, outcome, built), dict(outcome.times)
            if outcome.incumbent is not None:
                times[before.candidate] = outcome.incumbent.seconds
        first = set(finalists(problem, found))
        result = Result(
            problem=problem,
            before=before.candidate,
            origin=before.origin,
            before_seconds=times.get(before.candidate),
            after=entry,
            found=found,
            finalists=tuple(scored for scored in found.ranked if scored.candidate in first),
            n_timed=outcome.n_timed if outcome else 0,
            faults=outcome.faults if outcome else (),
        )
        return result, tuple(sorted(times, key=lambda c: (times[c], c))[:_HINTS]) or tuple(hints)

    def _after(
        self, problem: AnyProblem, found: Survivors, outcome: Outcome, built: BuiltFamilies
    ) -> Entry:
        """The winner's entry; where everything faulted the model's choice of what did not."""
        self._record.keep(outcome.faults)
        entry = measured_entry(problem, found, outcome, self._named)
        return entry or modelled_entry(problem, self._survivors(problem, built), self._named)

    def _survivors(self, problem: AnyProblem, built: BuiltFamilies) -> Survivors:
        binaries = built.of(problem, self.known)
        found = survivors(problem, self.known, binaries, self._record.quarantined)
        if not found.ranked:
            raise NoKernelError(f"no config of any kernel is left for {problem}: {found}")
        return found

    def _search(
        self,
        problem: AnyProblem,
        found: Survivors,
        incumbent: Candidate,
        hints: Sequence[Candidate],
    ) -> Outcome | None:
        """What a search finds; None in a dry run, and after the end of the budget."""
        if self._timer is None:
            return None
        if self._clock() >= self.deadline:
            self.n_left += 1
            return None
        return search(
            problem,
            found,
            self._timer,
            incumbent=incumbent,
            hints=hints,
            mode=self._mode,
            bench=self._bench,
        )

    def _save(self, family: AnyProblem, entries: Mapping[int, Entry], built: BuiltFamilies) -> None:
        """The family's row, with the model's choice for buckets without an entry; none if a run that
        times has timed nothing of it."""
        if self._timer is not None and not any(entry.measured for entry in entries.values()):
            return
        ladder = [
            entries.get(size) or modelled_entry(at, self._survivors(at, built), self._named)
            for size in family.buckets
            for at in (family.at(size),)
        ]
        self._record.save(family, ladder)
        self._saved_at = self._clock()


def _device_of(families: Sequence[AnyProblem]) -> Device:
    machines = {family.machine for family in families}
    if len(machines) != 1:
        raise TuningError(f"a run tunes for one machine, got {len(machines)}")
    (machine,) = machines
    if machine is None:
        raise TuningError("a run tunes for a GPU whose facts are known, got none")
    return machine
