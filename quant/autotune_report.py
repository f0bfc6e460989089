"""What an autotuning run did, as JSON, as a closing table, and while it goes on.

    w4a16 int_group bits=4 group=128, N = 6144, K = 4096
    M     before                      us   after                       us   limit  gain   timed
    16    triton_x {block_m 16, ...}  9.7  triton_x {block_m 32, ...}  8.1  72 %   1.20x  54/360

"before" is what a table or the model chose until now, timed beside the others; a time that is only
estimated has a "~". "limit" is the share of the least time that the product can take.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tqdm import tqdm

from .kernel import AnyProblem, Device
from .ladder import Candidate
from .machine import device_facts
from .search import Scored, Survivors
from .timing import Fault
from .tuned_table import Entry

_STEPS = 10  # lines that a stage of compiling takes where there is no terminal


# ---- facts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One bucket of one family.

    before: what ran until now, and `origin`, who chose it: "table", "near" or "model".
    before_seconds: as timed in this run, None if it was not. after: what the table holds now.
    found: what could be timed; finalists: where timing begins. n_timed, faults: of the search.
    """

    problem: AnyProblem
    before: Candidate
    origin: str
    before_seconds: float | None
    after: Entry
    found: Survivors
    finalists: tuple[Scored, ...]
    n_timed: int = 0
    faults: tuple[Fault, ...] = ()

    @property
    def share(self) -> float | None:
        """Of the limit that the chosen kernel reaches; None if the limit is not known. What is
        measured has its launch in it, estimates have not."""
        machine = self.problem.machine
        launch = (machine.launch_seconds or 0.0) if machine and not self.after.measured else 0.0
        taken = self.after.us + launch * 1e6
        return self.after.ideal_us / taken if self.after.ideal_us and taken else None

    @property
    def gain(self) -> float | None:
        """How many times faster than before; None if that was not measured."""
        return None if self.before_seconds is None else self.before_seconds * 1e6 / self.after.us


@dataclass(frozen=True)
class Report:
    """A whole run. n_skipped: buckets that an earlier run had finished. n_left: buckets for which the
    budget was not enough. failures: text of compilers, and how often. out: the table, if any."""

    device: Device
    results: tuple[Result, ...]
    n_skipped: int
    n_left: int
    n_binaries: int
    failures: tuple[tuple[str, int], ...]
    is_dry: bool
    seconds: float
    out: Path | None

    def as_dict(self) -> dict[str, Any]:
        """JSON form; seconds are measured where `measured` says so, else estimated."""
        return {
            "machine": device_facts(self.device),
            "dry_run": self.is_dry,
            "results": [_result_json(result) for result in self.results],
            "skipped": self.n_skipped,
            "left": self.n_left,
            "binaries": self.n_binaries,
            "failures": [{"text": text, "binaries": n} for text, n in self.failures],
            "seconds": self.seconds,
            "out": str(self.out) if self.out else None,
        }

    def text(self) -> str:
        """A table for each family, and what was left out."""
        families: dict[str, list[Result]] = {}
        for result in self.results:
            families.setdefault(result.problem.family, []).append(result)
        lines = [_head(self)]
        for family, results in families.items():
            lines += ["", family.replace(" * ", " "), *_family_lines(results)]
        return "\n".join([*lines, "", *_closing(self)])


def _result_json(result: Result) -> dict[str, Any]:
    entry = result.after
    out = {key: getattr(result.found, key) for key in ("failed", "spilled", "unfit", "quarantined")}
    return {
        "problem": str(result.problem),
        "family": result.problem.family,
        "size": result.problem.size,
        "before": {**_choice_json(result.before), "origin": result.origin},
        "before_seconds": result.before_seconds,
        "after": _choice_json(Candidate(entry.kernel, entry.config)),
        "after_seconds": entry.us * 1e-6,
        "measured": entry.measured,
        "share_of_limit": result.share,
        "candidates": len(result.found.ranked),
        "left_out": out,
        "timed": result.n_timed,
        "faults": [str(fault) for fault in result.faults],
        "finalists": [_finalist_json(scored) for scored in result.finalists],
    }


def _choice_json(candidate: Candidate) -> dict[str, Any]:
    return {"kernel": candidate.kernel, "config": dict(candidate.config)}


def _finalist_json(scored: Scored) -> dict[str, Any]:
    kept = ("registers", "stack_bytes", "smem_bytes", "threads")
    return {
        **_choice_json(scored.candidate),
        "seconds": scored.seconds,
        "binaries": [{key: getattr(binary, key) for key in kept} for binary in scored.compiled],
    }


# ---- text -----------------------------------------------------------------------------------

_COLUMNS = ("before", "us", "after", "us", "limit", "gain", "timed")
_DRY_COLUMNS = ("best by the model", "us", "limit", "registers", "KiB", "finalists", "spilled")


def _head(report: Report) -> str:
    if report.is_dry:
        return f"dry run for {report.device}: nothing was timed, times are estimates"
    return f"tuned on {report.device}; ~ marks estimates"


def _family_lines(results: Sequence[Result]) -> list[str]:
    letter = "T" if results[0].problem.op == "attend" else "M"
    is_dry = not any(result.n_timed for result in results)
    rows: list[tuple[str, ...]] = [(letter, *(_DRY_COLUMNS if is_dry else _COLUMNS))]
    rows += [_dry_cells(result) if is_dry else _cells(result) for result in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _cells(result: Result) -> tuple[str, ...]:
    entry, before = result.after, result.before_seconds
    after = Candidate(entry.kernel, entry.config)
    return (
        str(result.problem.size),
        str(result.before),
        "?" if before is None else f"{before * 1e6:.1f}",
        "the same" if after == result.before else str(after),
        _us(entry),
        _percent(result.share),
        "" if result.gain is None else f"{result.gain:.2f}x",
        f"{result.n_timed}/{len(result.found.ranked)}",
    )


def _dry_cells(result: Result) -> tuple[str, ...]:
    entry, best = result.after, result.found.ranked[0]
    main = best.compiled[0] if best.compiled else None
    return (
        str(result.problem.size),
        str(Candidate(entry.kernel, entry.config)),
        _us(entry),
        _percent(result.share),
        str(main.registers) if main else "-",
        f"{main.smem_bytes / 1024:.0f}" if main else "-",
        f"{len(result.finalists)}/{len(result.found.ranked)}",
        str(result.found.spilled),
    )


def _us(entry: Entry) -> str:
    return f"{'' if entry.measured else '~'}{entry.us:.1f}"


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{share:.0%}"


def _closing(report: Report) -> list[str]:
    """What a reader should know besides the times."""
    lines = [f"{report.n_binaries} binaries, {report.seconds:.0f} s"]
    out = sum((Counter(_left_out(result.found)) for result in report.results), Counter())
    if out:
        told = ", ".join(f"{n} {name}" for name, n in sorted(out.items()))
        lines.append(f"configs left out, over all problems: {told}")
    lines += [f"did not compile ({n}): {text}" for text, n in report.failures]
    lines += [f"fault: {fault}" for result in report.results for fault in result.faults]
    if report.n_skipped:
        lines.append(f"{report.n_skipped} problems were finished by an earlier run")
    if report.n_left:
        lines.append(
            f"the budget ended before {report.n_left} problems were timed: the model's choice stays "
            f"there; the same command goes on with them"
        )
    lines.append(f"table: {report.out}" if report.out else "no table was written (-o TABLE.json)")
    return lines


def _left_out(found: Survivors) -> dict[str, int]:
    names = {
        "failed": "did not compile",
        "spilled": "spill registers",
        "unfit": "do not fit",
        "quarantined": "in quarantine",
    }
    return {told: n for key, told in names.items() if (n := getattr(found, key))}


# ---- while it goes on -----------------------------------------------------------------------


class Progress(Protocol):
    """Is told how far a run is."""

    def compiled(self, done: int, total: int) -> None:
        """Binaries."""
        ...

    def searched(self, done: int, total: int, result: Result) -> None:
        """Problems."""
        ...


class Silent:
    """Says nothing."""

    def compiled(self, done: int, total: int) -> None:
        """As `Progress.compiled`."""

    def searched(self, done: int, total: int, result: Result) -> None:
        """As `Progress.searched`."""


class TuningBar:
    """Shows progress on stderr: a live bar on a terminal, plain lines otherwise."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._bar: tqdm[None] | None = None
        self._stage = ""
        self._told = -1

    def __enter__(self) -> "TuningBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def compiled(self, done: int, total: int) -> None:
        """As `Progress.compiled`; without a terminal in ten lines."""
        if total == 0:
            return
        if self._live:
            self._advance("compiling", done, total, "")
            return
        step = done * _STEPS // total
        if step != self._told:
            self._told = step
            print(f"compiled {done}/{total} binaries", file=sys.stderr, flush=True)

    def searched(self, done: int, total: int, result: Result) -> None:
        """As `Progress.searched`."""
        entry = result.after
        name = str(Candidate(entry.kernel, entry.config))
        told = f"{_us(entry)} us, {_percent(result.share)} of the limit"
        if self._live:
            self._advance("tuning", done, total, f"{result.problem.size}: {told}")
        elif result.n_timed or done == total:
            line = f"[{done}/{total}] {result.problem}: {name} {told}"
            print(line, file=sys.stderr, flush=True)

    def _advance(self, stage: str, done: int, total: int, facts: str) -> None:
        if stage != self._stage:
            self._end()
            self._stage, self._bar = stage, tqdm(total=total, desc=stage, file=sys.stderr)
        if self._bar is not None:
            self._bar.set_postfix_str(facts)
            self._bar.update(done - self._bar.n)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
