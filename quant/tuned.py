"""What tuned tables say about a problem: a row that decides, or figures of near shapes.

    row          the same family on a device of the same fingerprint, complete and fresh
    near         how far the cost model was off for near shapes: measured / model for each kernel
    quarantined  configs that hung, died or were wrong when they were tuned

A row describes code. It is fresh if every kernel in its ladder still has the source and the compilers
that it had. A row of other compilers is usable if they are known to make the same code of it (equal
digests). A driver decides nothing. Anything else is stale: ignored, with one warning for the file; so
is a row that names a quarantined config.

Near: the same family but for the sizes in it (N, K; rows and KV heads of attention), each within a
factor of two, as is the bucket; the same compute capability, whatever the number of multiprocessors.
The nearest row that measured a kernel speaks for it:

    distance = Σ |log2(size / size')| + 1 if the device differs

Everything is read once in a process; a lookup is a few dictionary accesses, without locks or disk.
`NO_TABLES` knows nothing. Deliberately not here: choosing (`dispatch.py`), and how tables are made.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache

from .errors import TableError
from .kernel import AnyProblem, Config, Device, Kernel
from .tuned_file import LAYERS, Layered, environment, load_layers, this_toolchain, warn_once
from .tuned_table import Entry, Fingerprint, Row, Toolchain, fingerprint

_NEAR = 1.0  # octaves within which a size is near: a factor of two
_SIZES = re.compile(r"\b(N|K|B|Hkv)=(\d{1,9})\b")
_GENERATORS = ("triton", "ptxas", "nvrtc")  # tools that code comes from
_RETUNE = "run `fewbit autotune` again"

DigestOf = Callable[[AnyProblem, Entry], str | None]  # of the code that today's compilers make
Kernels = Mapping[str, Kernel]


def freshness(
    entry: Entry,
    source: str | None,
    made_by: Toolchain,
    toolchain: Toolchain,
    digest: str | None = None,
) -> str:
    """ "fresh", "usable" or "stale": does the entry describe the code that would run now?

    source: of the kernel as it is now, None if there is none of that name. made_by: the entry's
    compilers; toolchain: those at hand. Only compilers that both name are compared: what is not
    installed cannot run its kernels either. digest: of today's code, None if it is not known.
    """
    if source is None or entry.source != source:
        return "stale"
    before, now = dict(made_by), dict(toolchain)
    changed = any(
        tool in before and tool in now and before[tool] != now[tool] for tool in _GENERATORS
    )
    if not changed:
        return "fresh"
    return "usable" if entry.digest and entry.digest == digest else "stale"


class Tables:
    """All tables of this process, or some that are given.

    layers: as `load_layers` answers. toolchain: the compilers at hand. digest_of(problem, entry):
    digest of the code that they make of an entry, None if it is not known; left out, it never is.
    """

    def __init__(
        self,
        layers: Sequence[Layered] = (),
        toolchain: Toolchain = (),
        digest_of: DigestOf | None = None,
    ) -> None:
        self._layers = tuple(layers)
        self._toolchain = toolchain
        self._digest_of = digest_of
        self._by_family: dict[str, list[tuple[Layered, Row]]] = {}
        self._by_skeleton: dict[str, list[tuple[Layered, Row]]] = {}
        self._faults: dict[tuple[str, str], list[tuple[Fingerprint, Config]]] = {}
        for layered in self._layers:
            for row in layered.table.rows:
                self._by_family.setdefault(row.family, []).append((layered, row))
                self._by_skeleton.setdefault(_skeleton(row.family), []).append((layered, row))
            for fault in layered.table.quarantine:
                key = (fault.kernel, fault.source)
                self._faults.setdefault(key, []).append((layered.table.device, fault.config))
        for found in self._by_family.values():  # stable: the newest first within a layer
            found.sort(key=lambda item: item[1].tuned_at, reverse=True)
            found.sort(key=lambda item: LAYERS.index(item[0].layer))

    def row(self, problem: AnyProblem, known: Kernels) -> Row | None:
        """The row that decides `problem` at all its buckets; None if there is none.

        known: kernels of the problem's op by name. Never raises: a row that cannot be used gives
        one warning for its file.
        """
        device = _fingerprint(problem.machine)
        if device is None:
            return None
        self._warn_of_other_device(problem, device)
        for layered, row in self._by_family.get(problem.family, ()):
            if layered.table.device.matches(device) and self._decides(layered, row, problem, known):
                return row
        return None

    def near(self, problem: AnyProblem, known: Kernels) -> Mapping[str, float]:
        """Measured seconds over the model's for each kernel that a near row measured."""
        device = _fingerprint(problem.machine)
        found: dict[str, float] = {}
        if device is None:
            return found
        for layered, row, entry in self._near_entries(problem, device):
            if entry.kernel in known and entry.kernel not in found:
                state = self._freshness(row, entry, problem, known)
                if state == "stale":
                    _warn_stale(layered, row, entry)
                else:
                    found[entry.kernel] = entry.us / entry.model_us
        return found

    def quarantined(self, problem: AnyProblem, kernel: Kernel, config: Config) -> bool:
        """Did this config, or all of the kernel, fail on such a device?"""
        faults = self._faults.get((kernel.name, kernel.source))
        device = _fingerprint(problem.machine) if faults else None
        if not faults or device is None:
            return False
        return any(of.matches(device) and failed in ((), config) for of, failed in faults)

    def _decides(self, layered: Layered, row: Row, problem: AnyProblem, known: Kernels) -> bool:
        """Complete, of kernels that exist, and fresh."""
        if not {entry.size for entry in row.ladder} >= set(problem.buckets):
            return False
        for entry in row.ladder:
            kernel = known.get(entry.kernel)
            at = problem.at(entry.size)
            shaped = kernel is None or _offers(kernel, at, entry.config)
            failed = kernel is not None and self.quarantined(problem, kernel, entry.config)
            if not shaped or failed or self._freshness(row, entry, at, known) == "stale":
                _warn_stale(layered, row, entry)
                return False
        return True

    def _freshness(self, row: Row, entry: Entry, problem: AnyProblem, known: Kernels) -> str:
        kernel = known.get(entry.kernel)
        source = None if kernel is None else kernel.source
        state = freshness(entry, source, row.toolchain, self._toolchain)
        if state == "stale" and entry.source == source and self._digest_of is not None:
            digest = self._digest_of(problem, entry)
            state = freshness(entry, source, row.toolchain, self._toolchain, digest)
        return state

    def _near_entries(
        self, problem: AnyProblem, device: Fingerprint
    ) -> Iterator[tuple[Layered, Row, Entry]]:
        """Measured entries of near rows at near buckets, the nearest first."""
        near: list[tuple[float, int, Layered, Row, Entry]] = []
        for layered, row in self._by_skeleton.get(_skeleton(problem.family), ()):
            of = layered.table.device
            distances = _distances(problem.family, row.family)
            if of.cc != device.cc or max(distances, default=0.0) > _NEAR:
                continue
            apart = math.fsum(distances) + (0.0 if of.matches(device) else 1.0)
            for entry in row.ladder:
                bucket = _octaves(entry.size, problem.size)
                if entry.measured and entry.us > 0 < entry.model_us and bucket <= _NEAR:
                    near.append((apart + bucket, len(near), layered, row, entry))
        near.sort(key=lambda item: item[:2])
        return ((layered, row, entry) for _, _, layered, row, entry in near)

    def _warn_of_other_device(self, problem: AnyProblem, device: Fingerprint) -> None:
        """A file that was named by the user and is of no use on this machine."""
        if problem.machine is None or not problem.machine.present:
            return
        for layered in self._layers:
            if layered.layer == "session" and not layered.table.device.matches(device):
                of = layered.table.device.name
                warn_once(layered.origin, f"ignored: tuned on {of}, this GPU is {device.name}")


NO_TABLES = Tables()


@cache
def current_tables() -> Tables:
    """The tables of this process, read at the first call. TableError if FEWBIT_AUTOTUNE is wrong;
    tables that cannot be used are ignored with one warning each."""
    settings = environment()
    if settings.mode == "on":
        raise TableError(
            "FEWBIT_AUTOTUNE=on: tuning at first use is not built; run `fewbit autotune` once, and "
            "leave FEWBIT_AUTOTUNE at read"
        )
    if settings.mode == "off":
        return NO_TABLES
    layers = load_layers(settings)
    return Tables(layers, this_toolchain()) if layers else NO_TABLES


def _offers(kernel: Kernel, problem: AnyProblem, config: Config) -> bool:
    """Does the kernel take the problem, with this config?"""
    if any(reason.code != "MEMORY" for reason in kernel.refuse(problem)):
        return False
    return config == () if kernel.configs is None else config in kernel.configs(problem)


@cache
def _fingerprint(machine: Device | None) -> Fingerprint | None:
    return None if machine is None else fingerprint(machine)


@cache
def _skeleton(family: str) -> str:
    """The family without the numbers of its sizes."""
    return _SIZES.sub(r"\1=", family)


def _distances(family: str, other: str) -> list[float]:
    """Octaves between the sizes of two families of one skeleton, by position."""
    pairs = zip(_SIZES.findall(family), _SIZES.findall(other), strict=False)
    return [_octaves(int(mine), int(theirs)) for (_, mine), (_, theirs) in pairs]


def _octaves(a: int, b: int) -> float:
    return abs(math.log2(max(a, 1) / max(b, 1)))


def _warn_stale(layered: Layered, row: Row, entry: Entry) -> None:
    warn_once(
        layered.origin,
        f"has stale rows: {entry.kernel} is not what was tuned in {row.family!r}; {_RETUNE}",
    )
