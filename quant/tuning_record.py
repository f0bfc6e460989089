"""The table that an autotuning run goes on with: what is finished there, and what is added.

    kept       measured entries whose kernels and compilers are the ones at hand: not tuned again
    faults     the table's quarantine and this run's: not run again
    save       the row of one family, merged into the file under its lock

A row is always complete: the caller gives an entry for each bucket, measured or the model's.
Deliberately not here: the file itself (`tuned_file.py`), and when to save.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from .errors import TableError, TuningError
from .kernel import AnyProblem, Config, Device, Kernel
from .machine import limit_of
from .search import Outcome, Survivors
from .timing import Fault
from .tuned import freshness
from .tuned_file import append_rows, read_table, this_toolchain
from .tuned_table import (
    Entry,
    Method,
    Quarantined,
    Row,
    Table,
    code_digest,
    fingerprint,
    utc_now,
)

_NOT_RUN = "not run"  # how a timer begins its word of a kernel that it has benched
_STAMP = "%Y-%m-%dT%H:%M:%SZ"


class Record:
    """Rows and quarantine of one GPU; `out` None keeps nothing.

    TuningError if the device is no GPU; TableError if `out` cannot be read, is of a newer schema, or
    belongs to another GPU.
    """

    def __init__(self, out: Path | None, device: Device, kernels: Mapping[str, Kernel]) -> None:
        own = fingerprint(device)
        if own is None:
            raise TuningError(
                f"tuned tables are for GPUs, got {device}; give --gpu, such as --gpu h200"
            )
        self._out = out
        self._kernels = kernels
        self._toolchain = this_toolchain()
        self._head = Table(own, title=device.title)
        earlier = _earlier(out, self._head)
        self._rows = {row.family: row for row in earlier.rows}
        self._faults = {(q.kernel, q.source, q.config): q for q in earlier.quarantine}

    def describe(self, driver: str, method: Method) -> None:
        """How times are taken from now on, for people who read the table."""
        self._head = replace(self._head, driver=driver, method=method)

    def kept(self, family: AnyProblem) -> dict[int, Entry]:
        """Measured entries that describe today's code, by bucket."""
        row = self._rows.get(family.family)
        if row is None:
            return {}
        return {
            entry.size: entry
            for entry in row.ladder
            if entry.measured and entry.size in family.buckets and self._is_fresh(row, entry)
        }

    def _is_fresh(self, row: Row, entry: Entry) -> bool:
        kernel = self._kernels.get(entry.kernel)
        if kernel is None or self.quarantined(kernel, entry.config):
            return False
        return freshness(entry, kernel.source, row.toolchain, self._toolchain) == "fresh"

    def quarantined(self, kernel: Kernel, config: Config) -> bool:
        """Did this config, or all of the kernel, fail on such a device?"""
        return any((kernel.name, kernel.source, failed) in self._faults for failed in (config, ()))

    def keep(self, faults: Sequence[Fault]) -> None:
        """Quarantine what was run and failed; it reaches the file with the next row."""
        for fault in faults:
            if not fault.text.startswith(_NOT_RUN):
                name, config = fault.candidate.kernel, fault.candidate.config
                source = self._kernels[name].source
                entry = Quarantined(name, config, source, f"{fault.why} {fault.text}")
                self._faults[name, source, config] = entry

    def save(self, family: AnyProblem, ladder: Sequence[Entry]) -> None:
        """Merge one family's row, and all faults, into the file."""
        if self._out is None:
            return
        known = self._rows.get(family.family)
        stamp = _stamp_after(known.tuned_at if known else "")
        row = Row(family.family, tuple(ladder), stamp, self._toolchain)
        faults = tuple(self._faults.values())
        append_rows(self._out, replace(self._head, rows=(row,), quarantine=faults))
        self._rows[family.family] = row


def _earlier(out: Path | None, head: Table) -> Table:
    """The table in the file, empty if there is none."""
    if out is None or not out.exists():
        return head
    table = read_table(out)
    if table.device != head.device:
        raise TableError(
            f"{out}: holds a table of {table.device.name}, this GPU is {head.device.name} "
            f"({head.title}); give another file with -o"
        )
    return table


def _stamp_after(earlier: str) -> str:
    """The time, but later than `earlier` by a second: of two rows the newer one is kept."""
    now = utc_now()
    if now > earlier:
        return now
    last = datetime.strptime(earlier, _STAMP).replace(tzinfo=UTC)
    return (last + timedelta(seconds=1)).strftime(_STAMP)


# ---- entries --------------------------------------------------------------------------------


def modelled_entry(problem: AnyProblem, found: Survivors, kernels: Mapping[str, Kernel]) -> Entry:
    """The model's choice among `found`, of which there must be one; kernels that are `measured_only`
    come into question only if there is nothing else."""
    plain = [scored for scored in found.ranked if not found.needs_proof(scored.candidate)]
    ranked = plain or found.ranked
    best, second = ranked[0], ranked[1] if len(ranked) > 1 else None
    kernel = kernels[best.candidate.kernel]
    config, us = best.candidate.config, best.seconds * 1e6
    # Near shapes are corrected by measured / model where nothing was compiled, so without its figures.
    guess = kernel.seconds(problem, config) if kernel.configs else kernel.seconds(problem)
    limit = limit_of(problem, best.seconds)
    return Entry(
        size=problem.size,
        kernel=kernel.name,
        config=config,
        us=us,
        p10=us,
        p90=us,
        ideal_us=limit.seconds * 1e6 if limit else 0.0,
        model_us=guess * 1e6 if guess < math.inf else 0.0,
        runner_up=f"{second.candidate} ~{second.seconds * 1e6:.1f} us" if second else "",
        source=kernel.source,
        digest=code_digest(best.compiled),
        verified="",
        measured=False,
    )


def measured_entry(
    problem: AnyProblem, found: Survivors, outcome: Outcome, kernels: Mapping[str, Kernel]
) -> Entry | None:
    """The winner of a search; None if there was none."""
    winner, second = outcome.winner, outcome.runner_up
    if winner is None:
        return None
    own = Survivors(tuple(s for s in found.ranked if s.candidate == winner.candidate))
    return replace(
        modelled_entry(problem, own, kernels),
        us=winner.seconds * 1e6,
        p10=winner.p10 * 1e6,
        p90=winner.p90 * 1e6,
        runner_up=f"{second.candidate} {second.seconds * 1e6:.1f} us" if second else "",
        verified=f"rel {outcome.error:.1e}",
        measured=True,
    )
