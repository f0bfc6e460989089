"""Draws a report as one HTML page that needs nothing else: no script, no font, no network.

Every string of the report passes through `html.escape` in the one function that makes an element
(`_tag`) or in `_text`; nothing else puts text of a checkpoint into the page. The page's own policy
forbids loading anything. Charts are inline SVG; each has a text equivalent in a table.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from .report_facts import Report, TensorReport

_WORST_ROWS = 10
_TABLE_ROWS = 400  # a page stays light; report.json has every row
_STRIP = 64  # height of one kind's bars, pixels
_LABEL = 132  # width left of them
_BAR = 14  # from one block's bar to the next
_SPLIT = (900, 34)  # width and height of the bar of bytes


def render_page(report: Report) -> str:
    """The whole page."""
    source = report.provenance
    page = Template(files(__package__).joinpath("report.html.tmpl").read_text(encoding="utf-8"))
    return page.substitute(
        title=_text(f"{source.source} · {source.recipe}"),
        totals=_totals(report),
        fallbacks=_fallbacks(report),
        errors=_errors(report),
        bytes=_bytes(report),
        worst=_worst(report),
        experts=_experts(report),
        kept=_kept(report),
        origin=_origin(report),
    )


def _text(value: object) -> str:
    return escape(str(value), quote=True)


def _tag(name: str, content: str = "", /, **attributes: object) -> str:
    """An element; `content` is markup, attribute values are text, empty ones are left out.

    `class_` stands for `class`, `aria_label` for `aria-label`.
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_text(value)}"'
        for key, value in attributes.items()
        if value != ""
    )
    return f"<{name}{pairs}>{content}</{name}>"


def _cell(value: object, kind: str = "") -> str:
    return _tag("td", _text(value), class_=kind)


def _table(heads: Sequence[str], rows: Iterable[str], caption: str = "") -> str:
    """A table; a head that starts with `#` is of numbers. `rows` are joined cells."""
    cells = "".join(
        _tag("th", _text(head.lstrip("#")), scope="col", class_="number" * head.startswith("#"))
        for head in heads
    )
    title = _tag("caption", _text(caption)) if caption else ""
    body = "\n".join(_tag("tr", row) for row in rows)
    table = _tag("table", f"{title}<thead><tr>{cells}</tr></thead>\n<tbody>{body}</tbody>")
    return _tag("div", table, class_="scroll", tabindex=0)


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _totals(report: Report) -> str:
    facts = {
        "bits per quantized weight": f"{report.bits_per_weight:.3f}",
        "weights quantized": f"{report.n_weights:,}",
        "bytes in all": _size(report.quantized_bytes + report.kept_bytes),
        "bytes left unquantized": _size(report.kept_bytes),
        "wall time": f"{report.wall_seconds:.1f} s",
        "peak memory": _size(report.peak_resident_bytes),
    }
    items = "".join(
        _tag("div", _tag("dt", _text(name)) + _tag("dd", _text(value)))
        for name, value in facts.items()
    )
    return _tag("dl", items, class_="totals")


def _fallbacks(report: Report) -> str:
    if not report.fallbacks:
        return _tag("div", "No fallbacks: every weight was rounded as asked.", class_="calm")
    items = "".join(_tag("li", _text(line)) for line in report.fallbacks)
    verdict = "the recipe allows them" if report.allow_fallback else "the recipe does not allow any"
    count = f"{len(report.fallbacks)} fallback{'s' * (len(report.fallbacks) > 1)}"
    body = _tag("h2", f"{count}; {verdict}") + _tag("ul", items)
    return _tag("section", body, class_="alarm", role="alert")


# -- the chart of errors ------------------------------------------------------------------------


def _place(row: TensorReport) -> tuple[str, int | None]:
    """(kind of projection, number of its block): the name's last part and its first number."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", row.name)
    return row.name.rpartition(".")[2], None if number is None else int(number[1])


def _errors(report: Report) -> str:
    """One strip of bars for each kind of projection, one bar for each block, one scale for all."""
    measured = all(row.output_error is not None for row in report.tensors)
    cells: dict[str, dict[int, list[TensorReport]]] = {}
    for row in report.tensors:
        kind, number = _place(row)
        if number is not None:
            cells.setdefault(kind, {}).setdefault(number, []).append(row)
    if not cells:
        return _tag("p", "No numbered layers were quantized.")
    values = {
        kind: {number: _largest(rows, measured) for number, rows in strip.items()}
        for kind, strip in cells.items()
    }
    top = max(value for strip in values.values() for value, _ in strip.values()) or 1.0
    n_blocks = 1 + max(number for strip in values.values() for number in strip)
    strips = "".join(
        _strip(index, kind, strip, top) for index, (kind, strip) in enumerate(values.items())
    )
    what = "output on the calibration inputs" if measured else "weight"
    chart = _tag(
        "svg",
        strips + _block_numbers(n_blocks, len(values)),
        role="img",
        aria_label=f"Relative error of each layer's {what}, by kind of projection and block",
        width=_LABEL + n_blocks * _BAR + 8,
        height=len(values) * _STRIP + 20,
    )
    note = (
        f"Relative error of the {what}, one bar for each block; all strips share one scale, up to "
        f"{top:.4f}. Several weights of one kind in a block (experts): the worst. Red: a fallback."
    )
    return _tag("p", _text(note)) + _tag("div", chart, class_="scroll", tabindex=0) + _rows(report)


def _largest(rows: Sequence[TensorReport], measured: bool) -> tuple[float, TensorReport]:
    def error(row: TensorReport) -> float:
        return row.error if measured else row.relative_error

    worst = max(rows, key=lambda row: (bool(row.fallbacks), error(row)))
    return max(error(row) for row in rows), worst


def _strip(
    index: int, kind: str, strip: Mapping[int, tuple[float, TensorReport]], top: float
) -> str:
    floor = (index + 1) * _STRIP
    bars = [
        _tag("text", _text(kind), x=0, y=floor - 4),
        f'<line class="axis" x1="0" x2="100%" y1="{floor}" y2="{floor}"/>',
    ]
    for number, (value, row) in sorted(strip.items()):
        height = max(1.0, (_STRIP - 12) * value / top)
        title = _tag(
            "title", _text(f"{row.name}: {value:.4f}{' (fallback)' * bool(row.fallbacks)}")
        )
        bars.append(
            _tag(
                "rect",
                title,
                class_="bar fallback" if row.fallbacks else "bar",
                x=_LABEL + number * _BAR,
                y=f"{floor - height:.1f}",
                width=_BAR - 3,
                height=f"{height:.1f}",
            )
        )
    return "".join(bars)


def _block_numbers(n_blocks: int, n_strips: int) -> str:
    every = 1 if n_blocks <= 12 else 5
    return "".join(
        _tag("text", str(number), x=_LABEL + number * _BAR, y=n_strips * _STRIP + 14)
        for number in range(0, n_blocks, every)
    )


def _rows(report: Report) -> str:
    """The same in figures."""
    shown = report.worst(_TABLE_ROWS)
    more = len(report.tensors) - len(shown)
    title = "All quantized weights" if not more else f"The {_TABLE_ROWS} largest errors"
    note = f"{more} more are in report.json." if more else ""
    return _tag("details", _tag("summary", title) + _error_table(shown) + _tag("p", note))


def _error_table(rows: Iterable[TensorReport]) -> str:
    heads = ("weight", "shape", "stored as", "#bits per weight", "#weight error", "#output error")
    return _table(
        (*heads, "#seconds"),
        (
            _cell(row.name, "name")
            + _cell(" × ".join(map(str, row.shape)))
            + _cell(_stored_as(row))
            + _cell(f"{row.bits_per_weight:.3f}", "number")
            + _cell(_number(row.relative_error), "number")
            + _cell(_number(row.output_error), "number")
            + _cell(f"{row.seconds:.2f}", "number")
            for row in rows
        ),
    )


def _stored_as(row: TensorReport) -> str:
    options = ", ".join(f"{key} {_plain(value)}" for key, value in row.options.items())
    return f"{row.format} ({options})" if options else row.format


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _worst(report: Report) -> str:
    if not report.tensors:
        return _tag("p", "Nothing was quantized.")
    return _error_table(report.worst(_WORST_ROWS))


# -- bytes, experts, the rest -------------------------------------------------------------------


def _bytes(report: Report) -> str:
    classes = report.bytes_by_class
    total = sum(sum(both.values()) for both in classes.values()) or 1
    width, height = _SPLIT
    at, parts, rows = 0.0, [], []
    for label, both in classes.items():
        for kind, n_bytes in both.items():
            size = width * n_bytes / total
            title = _tag("title", _text(f"{label}, {kind}: {_size(n_bytes)}"))
            style = "kept" if kind == "unquantized" else ""
            place = {"x": f"{at:.2f}", "width": f"{size:.2f}", "y": 0, "height": height}
            parts.append(
                _tag("rect", title, class_=style, style=f"fill: var(--{label})", **place)
                if n_bytes
                else ""
            )
            at += size
        swatch = _tag("span", class_="swatch", style=f"background: var(--{label})")
        rows.append(
            _tag("td", swatch + _text(label))
            + _cell(f"{both['quantized']:,}", "number")
            + _cell(f"{both['unquantized']:,}", "number")
            + _cell(f"{100 * sum(both.values()) / total:.1f} %", "number")
        )
    chart = _tag(
        "svg",
        "".join(parts),
        role="img",
        aria_label="Stored bytes by class of tensor; the table below has the figures",
        viewBox=f"0 0 {width} {height}",
        width="100%",
        preserveAspectRatio="none",
        height=height,
    )
    note = _tag("p", "Stored bytes by class of tensor; paler parts are unquantized.")
    heads = ("class", "#quantized bytes", "#unquantized bytes", "#share")
    return note + chart + _table(heads, rows)


def _experts(report: Report) -> str:
    if not report.experts:
        return ""
    rows = [
        _cell(group, "name")
        + "".join(
            _cell(f"{value:,}", "number")
            for value in (
                len(counts),
                min(counts),
                sorted(counts)[len(counts) // 2],
                max(counts),
                counts.count(0),
            )
        )
        for group, counts in report.experts.items()
    ]
    heads = ("experts", "#number", "#fewest tokens", "#median", "#most", "#without any")
    title = _tag("h2", "Calibration tokens of each expert", id="experts")
    return _tag("section", title + _table(heads, rows), aria_labelledby="experts")


def _kept(report: Report) -> str:
    reasons: dict[str, list[int]] = {}
    for row in report.kept:
        reasons.setdefault(row.reason, []).append(row.n_bytes)
    if not reasons:
        return _tag("p", "Every tensor was quantized.")
    rows = [
        _cell(reason) + _cell(f"{len(sizes):,}", "number") + _cell(f"{sum(sizes):,}", "number")
        for reason, sizes in sorted(reasons.items(), key=lambda item: -sum(item[1]))
    ]
    return _table(("reason", "#tensors", "#bytes"), rows, "report.json names each of them")


def _origin(report: Report) -> str:
    source = report.provenance
    facts: dict[str, object] = {
        "source": source.source,
        "revision": source.revision or "a local folder",
        "source fingerprint": source.fingerprint,
        "recipe": f"{source.recipe} (sha256 {source.recipe_sha256})",
        "seed": source.seed,
        "command": source.command or "called from Python",
    }
    facts |= {f"calibration: {key}": value for key, value in (source.calibration or {}).items()}
    facts |= {f"version: {key}": value for key, value in source.versions.items()}
    rows = [_cell(name) + _cell(value, "name") for name, value in facts.items()]
    recipe = _tag("summary", "Recipe as run") + _tag("pre", _text(_pretty(source.recipe_text)))
    return _table(("fact", "value"), rows) + _tag("details", recipe)


def _pretty(text: str) -> str:
    """Canonical recipe text is one line of JSON; indented it can be read."""
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except ValueError:  # not JSON: shown as it is
        return text
