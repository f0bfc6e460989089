"""What a run did to each tensor, as `report.json`, as `report.html` and as lines for a terminal.

The facts are in `report_facts.py`, the page is drawn in `report_page.py`. The files hold times and
are therefore never byte-identical between runs; nothing reads them back.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .coded_files import logical_name
from .journal import write_atomic
from .report_facts import KeptTensor, Provenance, Report, TensorReport, tensor_class
from .report_page import render_page

__all__ = [
    "UNTIED",
    "KeptTensor",
    "Provenance",
    "Report",
    "TensorReport",
    "build_report",
    "summary_text",
    "tensor_class",
    "write_report",
]

UNTIED = "untied from"  # begins the reason of a tensor that the source does not store


def build_report(job: Any, writer: Any, facts: Mapping[str, Any]) -> Report:
    """The report of a finished run.

    job: `checkpoint`, `recipe`, `plan`, `seed` and `calibration` are read. writer: `rows`, the
    journalled rows of each unit. facts: `wall_seconds`, `peak_resident_bytes`, `environment`, and
    `command` where there was one.
    """
    data = job.calibration
    provenance = Provenance(
        recipe=job.recipe.name,
        recipe_text=job.recipe.text,
        source=job.checkpoint.name,
        revision=job.checkpoint.revision,
        fingerprint=job.checkpoint.fingerprint,
        seed=job.seed,
        calibration=data.fingerprint() if data else None,
        versions=dict(facts["environment"]),
        command=str(facts.get("command", "")),
    )
    return Report(
        provenance,
        tuple(TensorReport.from_row(row) for unit in writer.rows for row in unit),
        _kept_tensors(job, writer),
        float(facts["wall_seconds"]),
        int(facts["peak_resident_bytes"]),
        job.recipe.allow_fallback,
    )


def _kept_tensors(job: Any, writer: Any) -> tuple[KeptTensor, ...]:
    sizes: dict[str, int] = {}
    coded = set()
    for _, item in writer.stored():
        name = logical_name(item.name)
        sizes[name] = sizes.get(name, 0) + item.end - item.begin
        coded |= {name} if name != item.name else set()
    return tuple(
        KeptTensor(
            tensor.key,
            sizes[tensor.key],
            "coded without loss" if tensor.key in coded and not job.recipe.quantizes else
            tensor.reason,
            math.prod(tensor.source_shape),
            tensor.key in coded,
        )
        for tensor in job.plan.values()
        if tensor.rule is None
    )  # fmt: skip


def write_report(folder: Path, report: Report) -> None:
    """Write `report.json` and `report.html`, each whole or not at all."""
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(folder / "report.json", (text + "\n").encode())
    write_atomic(folder / "report.html", render_page(report).encode())


def summary_text(report: Report) -> str:
    """Lines for a terminal: totals, bytes by class, worst layers, fallbacks, starved experts."""
    total = report.quantized_bytes + report.kept_bytes
    coded = sum(row.coded for row in report.kept)
    done = f"{len(report.tensors)} weights quantized at {report.bits_per_weight:.3f} bits"
    rest = len(report.kept)
    if coded and not report.tensors:
        rest -= coded
        done = (
            f"{coded} tensors coded without loss, {report.bits_per_weight:.3f} bits a weight in all"
        )
    lines = [
        f"{done}, {rest} tensors kept; "
        f"{total:,} bytes, {report.wall_seconds:.1f} s, "
        f"peak memory {report.peak_resident_bytes / 1e6:,.0f} MB",
        f"{'':12s}{'quantized':>16s}{'unquantized':>16s}  bytes",
    ]
    for label, both in report.bytes_by_class.items():
        lines.append(f"  {label:10s}{both['quantized']:16,d}{both['unquantized']:16,d}")
    lines += [
        f"{row.name}: {row.n_bytes:,} bytes more, {row.reason}"
        for row in report.kept
        if row.reason.startswith(UNTIED)
    ]
    if report.tensors:
        lines.append("largest errors  (weight, output)")
        lines += [f"  {_error_line(row)}" for row in report.worst(5)]
    for group, counts in report.experts.items():
        if min(counts) == 0:
            lines.append(f"{group}: {counts.count(0)} of {len(counts)} experts saw no token")
    if report.fallbacks:
        lines.append(f"{len(report.fallbacks)} fallback{'s' * (len(report.fallbacks) > 1)}")
        lines += [f"  {text}" for text in report.fallbacks]
    return "\n".join(lines)


def _error_line(row: TensorReport) -> str:
    output = "      -" if row.output_error is None else f"{row.output_error:7.4f}"
    return f"{row.relative_error:7.4f} {output}  {row.name}"
