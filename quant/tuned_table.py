"""Tuned tables: what was measured on one kind of GPU.

    Table   one device, matched by capability
      Row     one family of problems: a complete ladder, an entry for each bucket of its size
        Entry   the kernel and config of one bucket, with its times

A device is known by (compute capability, multiprocessors, MiB of L2, class of memory, class of
bandwidth), never by its name: two boards of one chip match, a slice of a GPU, which keeps the name
but not the multiprocessors, does not. A class is round(2·log2(GiB or GB/s)), half an octave.

A row also names the tools that compiled its kernels, and each entry the hash of its kernel's source
and a digest of its code, so that a row that describes something else by now can be told.

Deliberately not here: the JSON form (`tuned_text.py`), files and locks (`tuned_file.py`), and when a
row is too old (`tuned.py`).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime

from .errors import TableError
from .kernel import Compiled, Config, Device
from .ladder import Candidate, Rung

Toolchain = tuple[tuple[str, str], ...]  # (name, version) of each tool, sorted by name
Method = tuple[tuple[str, str | int], ...]  # how times were taken, sorted by name

# ---- facts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fingerprint:
    """What a device is known by; None where it is not known. See the module's text."""

    cc: tuple[int, int]
    sms: int
    l2_mib: int | None = None
    memory_class: int | None = None
    bandwidth_class: int | None = None

    @property
    def name(self) -> str:
        """`sm90-132-l50-m14-b24`, for a file's name."""
        rest = (("l", self.l2_mib), ("m", self.memory_class), ("b", self.bandwidth_class))
        told = "".join(f"-{letter}{value}" for letter, value in rest if value is not None)
        return f"sm{self.cc[0]}{self.cc[1]}-{self.sms}{told}"

    def matches(self, other: "Fingerprint") -> bool:
        """Equal in all that is known of both."""
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return all(a is None or b is None or a == b for a, b in pairs)


def fingerprint(device: Device) -> Fingerprint | None:
    """Of a GPU; None for a CPU, for which there are no tables."""
    if device.cc is None:
        return None
    bandwidth = device.bandwidth_bytes_per_second
    return Fingerprint(
        cc=device.cc,
        sms=device.sms,
        l2_mib=None if device.l2_bytes is None else round(device.l2_bytes / 2**20),
        memory_class=_class(device.memory_bytes, 2**30),
        bandwidth_class=_class(bandwidth, 1e9),
    )


def _class(value: float | None, unit: float) -> int | None:
    return None if value is None else round(2 * math.log2(value / unit))


@dataclass(frozen=True)
class Entry:
    """The choice for one bucket.

    size: the bucket. us, p10, p90: median and percentiles of a call in microseconds. ideal_us: the
    device's limit. model_us: what the cost model said of this choice, 0 if it was not asked.
    runner_up: the next best, as text. source: `Kernel.source`. digest: `code_digest` of what was
    compiled, empty if nothing is. verified: how it agreed with the reference, such as "rel 9.1e-04".
    measured: False for the model's choice in a bucket that was not tuned; then `us` is the model's
    and `verified` is empty.
    """

    size: int
    kernel: str
    config: Config
    us: float
    p10: float
    p90: float
    ideal_us: float
    model_us: float
    runner_up: str
    source: str
    digest: str
    verified: str
    measured: bool = True


@dataclass(frozen=True)
class Row:
    """family: `problem.family`. ladder: entries by rising size. tuned_at: `utc_now()`. toolchain:
    what compiled the kernels (`tuned_file.this_toolchain()`)."""

    family: str
    ladder: tuple[Entry, ...]
    tuned_at: str
    toolchain: Toolchain

    def entry(self, size: int) -> Entry:
        """The entry whose bucket holds `size`; above the last, the last."""
        return next((entry for entry in self.ladder if size <= entry.size), self.ladder[-1])

    def rung(self, size: int) -> Rung:
        """The choice for `size`, with all neighbouring sizes that share it."""
        chosen = [(entry.kernel, entry.config) for entry in self.ladder]
        at = self.ladder.index(self.entry(size))
        first = last = at
        while first > 0 and chosen[first - 1] == chosen[at]:
            first -= 1
        while last + 1 < len(chosen) and chosen[last + 1] == chosen[at]:
            last += 1
        below = self.ladder[first - 1].size if first else 0
        return Rung(below + 1, self.ladder[last].size, Candidate(*chosen[at]))


@dataclass(frozen=True)
class Quarantined:
    """A config that hung, died, failed or gave wrong results; () stands for all of the kernel's.
    why: one of `timing.FAULTS`, and text."""

    kernel: str
    config: Config
    source: str
    why: str


@dataclass(frozen=True)
class Table:
    """All that was tuned on one kind of device. title, driver, method are for people: nothing is
    decided by them."""

    device: Fingerprint
    rows: tuple[Row, ...] = ()
    quarantine: tuple[Quarantined, ...] = ()
    title: str = ""
    driver: str = ""
    method: Method = ()


def utc_now() -> str:
    """`2026-11-02T10:00:00Z`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def code_digest(compiled: Sequence[Compiled]) -> str:
    """One digest of all binaries of a config; empty if there are none."""
    if not compiled:
        return ""
    return hashlib.sha256("+".join(c.digest for c in compiled).encode()).hexdigest()[:16]


# ---- merging --------------------------------------------------------------------------------


def merge(a: Table, b: Table) -> Table:
    """The newer row of each family, and every quarantined config, of two tables of one device.

    Order and repetition do not matter: of rows of one second, the greater in text is kept. Title,
    driver and method are those of the table with the newest row. TableError if devices differ.
    """
    if a.device != b.device:
        raise TableError(
            f"tables of two devices cannot be merged: {a.device.name} and {b.device.name}"
        )
    head = max((a, b), key=_head_rank)
    kept: dict[str, Row] = {}
    for row in (*a.rows, *b.rows):
        known = kept.get(row.family)
        if known is None or _row_rank(known) < _row_rank(row):
            kept[row.family] = row
    faults: dict[tuple[str, Config, str], Quarantined] = {}
    for fault in sorted({*a.quarantine, *b.quarantine}, key=repr):
        faults[fault.kernel, fault.config, fault.source] = fault
    return Table(
        device=a.device,
        rows=tuple(kept[family] for family in sorted(kept)),
        quarantine=tuple(faults[key] for key in sorted(faults)),
        title=head.title,
        driver=head.driver,
        method=head.method,
    )


def _row_rank(row: Row) -> tuple[str, str]:
    return row.tuned_at, repr(row)


def _head_rank(table: Table) -> tuple[str, str]:
    newest = max((row.tuned_at for row in table.rows), default="")
    return newest, repr((table.title, table.driver, table.method))
