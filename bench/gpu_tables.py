"""Rows of the GPU benches as Markdown tables.

A cell of a timing is `12.3 (81 %, 3.4×)`: microseconds, share of the roofline, and bf16's time over it.
Everything here is a pure function of rows; what is missing in a row is missing in its cell.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is aligned to the left, the others to the right."""
    rows = [list(head), *map(list, body)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([first, *rest])} |"

    return "\n".join(map(line, (rows[0], rule, *rows[1:])))


def number(value: float) -> str:
    """Three digits that count, never an exponent: 0.0123, 1.23, 12.3, 123, 1234."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def timing(row: Row) -> str:
    """`12.3 (81 %, 3.4×)`; why there is no time, if there is none."""
    if "median_us" not in row:
        return "FAILED" if row.get("failed") else "–"
    notes = []
    if row.get("share") is not None:
        notes.append(f"{100 * row['share']:.0f} %")
    if row.get("bf16_over_this") is not None:
        notes.append(f"{row['bf16_over_this']:.2f}×")
    told = f" ({', '.join(notes)})" if notes else ""
    return number(row["median_us"]) + told


def pivot(rows: Sequence[Row], line: str, column: str, corner: str) -> str:
    """A table with a line for each value of `line` and a column for each of `column`."""
    lines, columns = (list(dict.fromkeys(row[key] for row in rows)) for key in (line, column))
    cells = {(row[line], row[column]): timing(row) for row in rows}
    head = [corner, *(f"{column} = {value}" for value in columns)]
    return table(head, [[str(a), *(cells.get((a, b), "") for b in columns)] for a in lines])


def reasons(rows: Iterable[Row], key: str = "side") -> list[str]:
    """A line for each distinct reason that something was not timed."""
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.get("why") and key in row:
            found[row[key], row["why"]] = found.get((row[key], row["why"]), 0) + 1
    return [f"- {name}: {why}" for (name, why) in found]


def grouped(rows: Iterable[Row], key: str) -> dict[Any, list[Row]]:
    """Rows by their value of `key`; those without it are left out."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        if key in row:
            found.setdefault(row[key], []).append(row)
    return found


def skipped(rows: Iterable[Row]) -> list[str]:
    """A line for each row that says what was not reached."""
    return [
        f"- not reached ({row['why']}): {', '.join(row['skipped'])}"
        for row in rows
        if "skipped" in row
    ]


# ---- sections -------------------------------------------------------------------------------


def gemm_text(rows: Sequence[Row]) -> str:
    """A table for each shape, then the reasons of what was not timed."""
    parts = []
    for shape, found in grouped(rows, "shape").items():
        timed = [row for row in found if "side" in row]
        if not timed:
            continue
        parts.append(f"**{shape}**, N = {timed[0]['n']}, K = {timed[0]['k']}")
        ran = {row["side"] for row in timed if "median_us" in row or row.get("failed")}
        parts.append(pivot([row for row in timed if row["side"] in ran], "side", "m", "µs"))
    return "\n\n".join(filter(None, [*parts, "\n".join([*reasons(rows), *skipped(rows)])]))


def attention_text(rows: Sequence[Row]) -> str:
    """A table for each number of query heads that share a KV head."""
    parts = []
    for group, found in grouped(rows, "group").items():
        parts.append(f"**G = {group}**, Hkv = {found[0]['kv_heads']}, D = {found[0]['head_dim']}")
        parts.append(pivot(found, "side", "case", "µs"))
    return "\n\n".join(filter(None, [*parts, "\n".join([*reasons(rows), *skipped(rows)])]))


def peaks_text(rows: Sequence[Row]) -> str:
    """One line for each peak."""
    body = []
    for row in rows:
        if "error" in row:
            body.append([row["peak"], f"not measured: {row['error']}", "", ""])
        elif row["peak"] == "launch":
            body.append([row["peak"], f"{1e6 / row['rate']:.2f} µs", "", number(row["median_us"])])
        else:
            rate = f"{row['rate'] / 1e12:.2f} T{row['unit']}"
            spread = f"{row['p10_us']:.0f} … {row['p90_us']:.0f}"
            body.append([row["peak"], rate, spread, number(row["median_us"])])
    return table(["peak", "rate", "p10 … p90, µs", "median, µs"], body)


def oracle_text(found: Mapping[str, Any], failures: Sequence[str]) -> str:
    """A line for each kernel, then every failure."""
    body = [
        [name, str(cell["checks"]), str(cell["failed"]), f"{cell['worst']:.2f}"]
        for name, cell in found["kernels"].items()
    ]
    head = ["kernel", "checks", "failed", "largest error / tolerance"]
    return "\n\n".join(filter(None, [table(head, body), "\n".join(f"- {f}" for f in failures)]))


def tune_text(rows: Sequence[Row]) -> str:
    """A table for each family; ~ marks times that are the model's."""
    parts = []
    for family, found in grouped(rows, "family").items():
        body = [
            [
                str(row["size"]),
                row["before"],
                "" if row["before_us"] is None else number(row["before_us"]),
                "the same" if row["after"] == row["before"] else row["after"],
                ("" if row["measured"] else "~") + number(row["after_us"]),
                "" if row["share"] is None else f"{100 * row['share']:.0f} %",
                "" if row["gain"] is None else f"{row['gain']:.2f}×",
            ]
            for row in found
        ]
        head = ["M", "before", "µs", "after", "µs", "of the limit", "gain"]
        parts.append(f"**{family}**\n\n{table(head, body)}")
    faults = [f"- fault: {fault}" for row in rows for fault in row.get("faults", ())]
    tables = [f"- table: {row['table']}" for row in rows if "table" in row]
    return "\n\n".join(filter(None, [*parts, "\n".join([*faults, *tables, *skipped(rows)])]))


def facts_text(facts: Mapping[str, Any]) -> str:
    """Two columns."""
    return table(["what", "value"], [[str(name), str(value)] for name, value in facts.items()])


def estimate_text(rows: Sequence[Row], machine: str) -> str:
    """One table for each shape, under a line that says what the numbers are."""
    parts = [
        f"ESTIMATES of the cost model for {machine}. Nothing was run. Times are without the launch, "
        f"% is the share of the limit with it."
    ]
    for shape, found in grouped(rows, "shape").items():
        parts.append(f"**{shape}**, N = {found[0]['n']}, K = {found[0]['k']}")
        layers = list(dict.fromkeys(row["layer"] for row in found))
        body = []
        for m, of_m in grouped(found, "m").items():
            cells = {row["layer"]: _estimate(row) for row in of_m}
            body.append([str(m), *(cells.get(layer, "") for layer in layers)])
        parts.append(table(["M", *(f"{layer}, µs" for layer in layers)], body))
    return "\n\n".join(parts)


def _estimate(row: Row) -> str:
    share = "" if row["share"] is None else f" {100 * row['share']:.0f} %"
    return f"{row['kernel']} {number(row['estimated_us'])}{share}"


def records_text(rows: Sequence[Row]) -> str:
    """Rows of no known kind: one of plain values a table, lists of rows a table each."""
    parts = []
    for row in rows:
        if "skipped" in row:
            continue
        plain = {key: value for key, value in row.items() if not _is_table(value)}
        if plain:
            parts.append(facts_text(_flat(plain)))
        for key, value in row.items():
            if _is_table(value):
                head = list(dict.fromkeys(name for item in value for name in item))
                body = [[_cell(item.get(name, "")) for name in head] for item in value]
                parts.append(f"**{key}**\n\n{table(head, body)}")
    return "\n\n".join(parts)


def _flat(plain: Row) -> Row:
    """`{"a": {"b": 1}}` as `{"a b": 1}`; numbers with three digits."""
    found: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping):
            found |= {f"{key} {name}": _cell(item) for name, item in value.items()}
        else:
            found[key] = _cell(value)
    return found


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _cell(value: object) -> str:
    return number(value) if isinstance(value, float) and value >= 0 else str(value)
