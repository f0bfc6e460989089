"""Everything that needs a GPU, in one command and under ten minutes: checks, peaks, timings, tuning.

    python -m bench.gpu [--minutes 9] [--no-tune] [--table FILE] [-o bench/results]

Sections run one after the other, each in a child process of its own (`child_rows.py`), so that a fault
or a hang costs one section and what it had found is kept:

    facts, oracle, peaks, gemm, attention, rans32, tune, decode

Time is divided by weight: a section gets its weight's share of what is left, and what it does not use
goes to the next. One that would get less than it needs at least is skipped, and what did not fit inside
a section is listed there. Kernels that cost the oracle a process are left out of all that follows.

Writes <gpu>.json and <gpu>.md. Exit code 1 if a check or a section failed, 2 where there is no GPU.
Not yet run on a GPU.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.child_rows import FAILED, TIMED_OUT, Outcome, Row, run_child
from bench.cuda_timing import missing, needs_text
from bench.gpu_tables import (
    attention_text,
    facts_text,
    gemm_text,
    oracle_text,
    peaks_text,
    records_text,
    skipped,
    timing,
    tune_text,
)
from bench.oracle import failure_text, lost_kernels, summary
from bench.peaks import row_text

SKIPPED = "skipped"
RESULTS = Path(__file__).resolve().parent / "results"
_START_SECONDS = 12.0  # of a child: importing torch, opening the device, ending
_MARGIN = 0.9  # of the rest is what a section may plan with; a step that is begun is finished
_PROGRESS_CHECKS = 100  # between two lines of progress
_GRACE_SECONDS = 15.0  # that a section may overrun before it is ended


@dataclass(frozen=True)
class Section:
    """function: in `gpu_sections.py` or a bench, called in a child. weight: its share of time. least:
    seconds below which it is not begun. takes: of "seconds", "peaks", "table", in this order."""

    name: str
    function: str
    weight: float
    least: float
    takes: tuple[str, ...] = ("seconds",)


SECTIONS = (
    Section("facts", "bench.gpu_sections:facts", 0.4, 5.0, ()),
    Section("oracle", "bench.gpu_sections:check_all", 3.0, 30.0),
    Section("peaks", "bench.peaks:rows", 0.8, 15.0, ()),
    Section("gemm", "bench.gpu_sections:time_gemm", 2.4, 30.0, ("seconds", "peaks")),
    Section("attention", "bench.gpu_sections:time_attention", 1.2, 25.0, ("seconds", "peaks")),
    Section("rans32", "bench.rans32_gpu:rows", 0.6, 20.0),
    Section("tune", "bench.gpu_sections:tune", 2.0, 40.0, ("seconds", "table")),
    Section("decode", "bench.gpu_sections:decode", 2.0, 45.0),
)


# ---- running --------------------------------------------------------------------------------


def allot(section: Section, following: Sequence[Section], left: float) -> float:
    """Seconds for `section` of the `left` ones, before `following`; 0 if they are too few."""
    weights = section.weight + sum(other.weight for other in following)
    share = left * section.weight / weights
    if share >= section.least:
        return share
    return section.least if left >= section.least else 0.0


def planned(seconds: float) -> float:
    """What a section that was allotted `seconds` may plan with."""
    return max(1.0, _MARGIN * (seconds - _START_SECONDS))


def arguments(section: Section, seconds: float, done: Mapping[str, Outcome], table: str) -> Any:
    """What the section's function is called with."""
    peaks = [dict(row) for row in done["peaks"].rows] if "peaks" in done else []
    known = {"seconds": planned(seconds), "peaks": peaks, "table": table}
    return tuple(known[name] for name in section.takes)


def without(names: Sequence[str], rules: str) -> str:
    """FEWBIT_KERNEL that also leaves out kernels of these names."""
    return "; ".join(filter(None, [*(f"!={name}" for name in names), rules]))


def environment(done: Mapping[str, Outcome], table: str) -> dict[str, str]:
    """Of the next section: without the kernels that cost the oracle a process, and with the table that
    was asked for, once it exists."""
    lost = lost_kernels(done["oracle"].rows) if "oracle" in done else []
    found = {"FEWBIT_KERNEL": without(lost, os.environ.get("FEWBIT_KERNEL", ""))}
    return found | {"FEWBIT_TABLE": table} if table and Path(table).is_file() else found


def run_sections(
    sections: Sequence[Section],
    seconds: float,
    table: str,
    say: Callable[[str], None],
    run: Callable[..., Outcome] = run_child,
) -> dict[str, Outcome]:
    """The outcome of each section within `seconds` in all."""
    deadline = time.monotonic() + seconds
    done: dict[str, Outcome] = {}
    for index, section in enumerate(sections):
        left = deadline - time.monotonic()
        given = allot(section, sections[index + 1 :], left)
        if not given:
            why = f"{max(0.0, left):.0f} s were left, it needs {section.least:.0f}"
            done[section.name] = Outcome((), SKIPPED, 0.0, why)
            say(f"{section.name}: skipped, {why}")
            continue
        say(f"{section.name}: {given:.0f} s")
        outcome = run(
            section.function,
            arguments(section, given, done, table),
            given + _GRACE_SECONDS,
            on_row=partial(_say_row, say, section.name, [0]),
            environment=environment(done, table),
        )
        done[section.name] = outcome
        told = f" ({outcome.error})" if outcome.error else ""
        say(f"{section.name}: {outcome.status} after {outcome.seconds:.0f} s{told}")
    return done


def _say_row(say: Callable[[str], None], section: str, count: list[int], row: Row) -> None:
    count[0] += 1
    if section != "oracle" or "skipped" in row:
        say(f"  {line(section, row)}")
    elif not row["ok"]:
        say(f"  {failure_text(row)}")
    elif count[0] % _PROGRESS_CHECKS == 0:
        say(f"  {count[0]} checks")


def line(section: str, row: Row) -> str:
    """A row in a line; times in microseconds."""
    if "skipped" in row:
        return f"{len(row['skipped'])} not reached: {row['why']}"
    if section == "peaks":
        return row_text(row)
    if section in ("gemm", "attention"):
        where = row.get("case") or f"{row.get('shape')} M={row.get('m')}"
        found = timing(row) if "median_us" in row else row.get("why")
        return f"{where:28s} {row.get('side', ''):40s} {found}"
    if section == "tune" and "family" in row:
        share = "" if row["share"] is None else f", {100 * row['share']:.0f} % of the limit"
        return f"{row['family']} M={row['size']}: {row['after']} {row['after_us']:.1f}{share}"
    told = json.dumps(row, default=str)
    return told if len(told) <= 300 else told[:300] + " …"


# ---- results --------------------------------------------------------------------------------


def failed(done: Mapping[str, Outcome]) -> bool:
    """Did a section fail, or a check, or a kernel of ours in a bench?"""
    broken = any(outcome.status in (FAILED, TIMED_OUT) for outcome in done.values())
    rows = [row for outcome in done.values() for row in outcome.rows]
    return broken or any(row.get("failed") or row.get("ok") is False for row in rows)


def result(done: Mapping[str, Outcome], minutes: float) -> dict[str, Any]:
    """JSON form. Of checks only the failures are kept, beside a summary."""
    sections = {name: asdict(outcome) for name, outcome in done.items()}
    if "oracle" in done:
        rows = done["oracle"].rows
        sections["oracle"]["rows"] = [row for row in rows if not row.get("ok")]
        sections["oracle"]["summary"] = summary(rows)
    return {
        "command": "python -m bench.gpu",
        "minutes": minutes,
        "failed": failed(done),
        "sections": sections,
    }


def markdown(done: Mapping[str, Outcome]) -> str:
    """All sections as tables, each under a line that says how it ended."""
    facts = next(iter(done["facts"].rows), {}) if "facts" in done else {}
    parts = [f"# {facts.get('gpu', 'GPU')}: `python -m bench.gpu`"]
    parts.append(
        "A time is a median in microseconds; in brackets, its share of the roofline with the peaks "
        "below, and the time of bf16 over it. Weights are cold, calls are in CUDA graphs."
    )
    for name, outcome in done.items():
        parts.append(f"## {name}")
        told = f": {outcome.error}" if outcome.error else ""
        parts.append(f"{outcome.status} after {outcome.seconds:.0f} s{told}")
        parts.append(_section_text(name, outcome))
    return "\n\n".join(filter(None, parts)) + "\n"


def _section_text(name: str, outcome: Outcome) -> str:
    rows = outcome.rows
    if not rows:
        return ""
    if name == "oracle":
        failures = [failure_text(row) for row in rows if row.get("ok") is False]
        return "\n\n".join([oracle_text(summary(rows), failures), *skipped(rows)])
    if name == "facts":
        return facts_text(rows[0])
    known = {
        "peaks": peaks_text,
        "gemm": gemm_text,
        "attention": attention_text,
        "tune": tune_text,
    }
    if name in known:
        return known[name](rows)
    return "\n\n".join(filter(None, [records_text(rows), "\n".join(skipped(rows))]))


def gpu_name(done: Mapping[str, Outcome]) -> str:
    """Of the result files: as the machine is described, such as `h100`."""
    rows = done["facts"].rows if "facts" in done else ()
    return str(rows[0]["described_as"]) if rows else "unknown-gpu"


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--no-tune", action="store_true", help="leave the tuner out")
    parser.add_argument("--table", default="", help="tuned table; else quant/tuned/<device>.json")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    lacking = missing()
    if lacking:
        remedy = "Without a GPU: `python -m bench.gemm --gpu h200 --estimate`, `make test`."
        print(needs_text("bench.gpu", lacking, remedy), file=sys.stderr)
        return 2
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {text}", flush=True)

    sections = [s for s in SECTIONS if not (args.no_tune and s.name == "tune")]
    done = run_sections(sections, 60 * args.minutes, args.table, say)
    args.output.mkdir(parents=True, exist_ok=True)
    name = gpu_name(done)
    found = result(done, args.minutes)
    (args.output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.output / f"{name}.md").write_text(markdown(done))
    say(f"wrote {args.output / name}.json and .md; {'FAILED' if found['failed'] else 'all passed'}")
    return int(found["failed"])


if __name__ == "__main__":
    sys.exit(main())
