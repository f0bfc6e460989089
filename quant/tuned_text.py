"""A tuned table as JSON text, one row a line, so that differences can be read.

    {"schema":2,"sha256":"...",
    "device":{"cc":[9,0],"sms":132,"l2_mib":50,"memory_class":14,"bandwidth_class":24},
    "title":"NVIDIA H200",
    "driver":"580.65",
    "method":{"stat":"median"},
    "toolchains":[{"torch":"2.13.0","triton":"3.6.0"}],
    "kernels":[["gemm_w4a16","5f2a...",["block_m","block_n"]]],       name, source hash, choices
    "columns":["size","kernel","config","us",...],                    of an entry, fixed
    "rows":[
    {"family":"linear ...","ladder":[[1,0,[16,128],...],...],"toolchain":0,"tuned_at":"2026-..."}
    ],
    "quarantine":[
    ["gemm_w4a16","5f2a...",[["block_m",16],["block_n",64]],"TIMEOUT nothing heard for 2.0 s"]
    ]}

`sha256` is of everything else in canonical form (sorted keys, no spaces): an edited file is told by it.
Times keep five digits. `toolchain` and the second column of an entry are positions in the lists above
the rows, which halve the size. Equal tables have equal bytes.

A newer schema is refused by name, before anything else is looked at.
Deliberately not here: whether a table fits this device, or a row is fresh.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from .errors import TableError, nearest_name
from .tuned_table import Entry, Fingerprint, Quarantined, Row, Table, Toolchain

SCHEMA = 2

_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_DIGITS = 5
_MOST = 1 << 53  # of any number: exact in fp64
_COLUMNS = (
    "size", "kernel", "config", "us", "p10", "p90", "ideal_us", "model_us", "runner_up", "digest",
    "verified", "measured",
)  # fmt: skip
_TIMES = _COLUMNS[3:8]
_LINES = ("device", "title", "driver", "method", "toolchains", "kernels", "columns")
_LISTS = ("rows", "quarantine")  # one item a line
_KEYS = ("schema", "sha256", *_LINES, *_LISTS)
_DEVICE = tuple(field.name for field in fields(Fingerprint))
_ROW = ("family", "ladder", "toolchain", "tuned_at")

_Choice = tuple[str, str, tuple[str, ...]]  # kernel, source, names of its config


# ---- out ------------------------------------------------------------------------------------


def table_text(table: Table) -> str:
    """The file's text. See the module's text."""
    content = _content(table)
    lines = [f'"schema":{SCHEMA},"sha256":"{content_hash(content)}"']
    lines += [f"{_compact(key)}:{_compact(content[key])}" for key in _LINES]
    for key in _LISTS:
        items = ",\n".join(_compact(item) for item in content[key])
        lines.append(f"{_compact(key)}:[\n{items}\n]")
    return "{" + ",\n".join(lines) + "}\n"


def content_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of everything but `sha256`, in canonical form."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(_compact(rest).encode()).hexdigest()


def _compact(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _content(table: Table) -> dict[str, Any]:
    toolchains = sorted({row.toolchain for row in table.rows})
    choices = sorted({_choice(entry) for row in table.rows for entry in row.ladder})
    return {
        "schema": SCHEMA,
        "device": {name: getattr(table.device, name) for name in _DEVICE},
        "title": table.title,
        "driver": table.driver,
        "method": dict(table.method),
        "toolchains": [dict(toolchain) for toolchain in toolchains],
        "kernels": choices,
        "columns": _COLUMNS,
        "rows": [
            {
                "family": row.family,
                "ladder": [_cells(entry, choices) for entry in row.ladder],
                "toolchain": toolchains.index(row.toolchain),
                "tuned_at": row.tuned_at,
            }
            for row in sorted(table.rows, key=lambda row: row.family)
        ],
        "quarantine": sorted([q.kernel, q.source, q.config, q.why] for q in table.quarantine),
    }


def _choice(entry: Entry) -> _Choice:
    return entry.kernel, entry.source, tuple(name for name, _ in entry.config)


def _cells(entry: Entry, choices: Sequence[_Choice]) -> list[Any]:
    """The entry in the order of `_COLUMNS`."""
    times = [getattr(entry, key) for key in _TIMES]
    return [
        entry.size,
        choices.index(_choice(entry)),
        [value for _, value in entry.config],
        *(float(f"{time:.{_DIGITS}g}") for time in times),
        entry.runner_up,
        entry.digest,
        entry.verified,
        int(entry.measured),
    ]


# ---- in -------------------------------------------------------------------------------------


def parse_table(text: str, origin: str) -> Table:
    """The table that a JSON text holds. TableError, beginning with `origin`, says what is wrong:
    not JSON, a newer schema, edited, or a key with its value and what is allowed."""
    found = _load(text, origin)
    _object(origin, found, None)
    schema = _whole(f"{origin}: schema", found.get("schema"))
    if schema != SCHEMA:
        remedy = "update fewbit" if schema > SCHEMA else "tune again with `fewbit autotune`"
        raise TableError(f"{origin}: schema must be {SCHEMA}, got {schema}; {remedy}")
    _object(origin, found, _KEYS)
    if _text(f"{origin}: sha256", found["sha256"]) != content_hash(found):
        raise TableError(
            f"{origin}: the content is not what its sha256 says: the file was edited or damaged; "
            f"tune again with `fewbit autotune`"
        )
    return _table(found, origin)


def _load(text: str, origin: str) -> dict[str, Any]:
    def not_a_number(value: str) -> None:
        raise ValueError(f"{value} is no JSON number")

    try:
        found: dict[str, Any] = json.loads(text, parse_constant=not_a_number)
    except (ValueError, RecursionError) as error:
        raise TableError(f"{origin}: not valid JSON, or cut short: {error}") from error
    return found


def _table(found: dict[str, Any], origin: str) -> Table:
    if found["columns"] != list(_COLUMNS):
        allowed = ", ".join(_COLUMNS)
        raise TableError(f"{origin}: columns must be {allowed}, got {found['columns']!r}")
    method = _object(f"{origin}: method", found["method"], None)
    toolchains = [
        _toolchain(f"{origin}: toolchains[{i}]", item)
        for i, item in enumerate(_list(f"{origin}: toolchains", found["toolchains"]))
    ]
    choices = [
        _known_kernel(f"{origin}: kernels[{i}]", item)
        for i, item in enumerate(_list(f"{origin}: kernels", found["kernels"]))
    ]
    rows = [
        _row(f"{origin}: rows[{i}]", item, toolchains, choices)
        for i, item in enumerate(_list(f"{origin}: rows", found["rows"]))
    ]
    families = [row.family for row in rows]
    if len(set(families)) < len(families):
        raise TableError(f"{origin}: rows: a family occurs twice; each must occur once")
    return Table(
        device=_device(f"{origin}: device", found["device"]),
        rows=tuple(rows),
        quarantine=tuple(
            _quarantined(f"{origin}: quarantine[{i}]", item)
            for i, item in enumerate(_list(f"{origin}: quarantine", found["quarantine"]))
        ),
        title=_text(f"{origin}: title", found["title"]),
        driver=_text(f"{origin}: driver", found["driver"]),
        method=tuple(
            (key, _text_or_whole(f"{origin}: method.{key}", method[key])) for key in sorted(method)
        ),
    )


def _device(owner: str, value: object) -> Fingerprint:
    facts = _object(owner, value, _DEVICE)
    numbers = {
        key: None if facts[key] is None else _whole(f"{owner}.{key}", facts[key])
        for key in ("l2_mib", "memory_class", "bandwidth_class")
    }
    major, minor = _cells_of(f"{owner}.cc", facts["cc"], ("major", "minor"))
    cc = _whole(f"{owner}.cc", major), _whole(f"{owner}.cc", minor)
    return Fingerprint(cc=cc, sms=_whole(f"{owner}.sms", facts["sms"]), **numbers)


def _toolchain(owner: str, value: object) -> Toolchain:
    tools = _object(owner, value, None)
    return tuple((name, _text(f"{owner}.{name}", tools[name])) for name in sorted(tools))


def _known_kernel(owner: str, value: object) -> _Choice:
    name, source, choices = _cells_of(owner, value, ("name", "source", "choices"))
    names = tuple(_name(f"{owner}: choices", choice) for choice in _list(owner, choices))
    return _name(f"{owner}: name", name), _text(f"{owner}: source", source), names


def _row(
    owner: str, value: object, toolchains: Sequence[Toolchain], choices: Sequence[_Choice]
) -> Row:
    facts = _object(owner, value, _ROW)
    stamp = _text(f"{owner}: tuned_at", facts["tuned_at"])
    if not _STAMP.fullmatch(stamp):
        raise TableError(f"{owner}: tuned_at must be like 2026-11-02T10:00:00Z, got {stamp!r}")
    ladder = tuple(
        _entry(f"{owner}: ladder[{i}]", item, choices)
        for i, item in enumerate(_list(f"{owner}: ladder", facts["ladder"]))
    )
    sizes = [entry.size for entry in ladder]
    if not sizes or sizes != sorted(set(sizes)):
        raise TableError(f"{owner}: ladder: sizes must rise from entry to entry, got {sizes}")
    return Row(
        family=_name(f"{owner}: family", facts["family"]),
        ladder=ladder,
        tuned_at=stamp,
        toolchain=toolchains[_index(f"{owner}: toolchain", facts["toolchain"], toolchains)],
    )


def _entry(owner: str, value: object, choices: Sequence[_Choice]) -> Entry:
    cells = dict(zip(_COLUMNS, _cells_of(owner, value, _COLUMNS), strict=True))
    index = _index(f"{owner}: kernel", cells["kernel"], choices)
    kernel, source, names = choices[index]
    values = _cells_of(f"{owner}: config", cells["config"], names)
    times = {key: _number(f"{owner}: {key}", cells[key]) for key in _TIMES}
    measured = _whole(f"{owner}: measured", cells["measured"])
    verified = _text(f"{owner}: verified", cells["verified"])
    if measured not in (0, 1) or (measured and not verified):
        raise TableError(
            f"{owner}: measured must be 0, or 1 of an entry that was verified, got {measured} and "
            f"verified {verified!r}"
        )
    return Entry(
        size=_whole(f"{owner}: size", cells["size"]),
        kernel=kernel,
        config=tuple(
            (name, _whole(f"{owner}: config.{name}", number, least=-_MOST))
            for name, number in zip(names, values, strict=True)
        ),
        source=source,
        runner_up=_text(f"{owner}: runner_up", cells["runner_up"]),
        digest=_text(f"{owner}: digest", cells["digest"]),
        verified=verified,
        measured=bool(measured),
        us=times["us"],
        p10=times["p10"],
        p90=times["p90"],
        ideal_us=times["ideal_us"],
        model_us=times["model_us"],
    )


def _quarantined(owner: str, value: object) -> Quarantined:
    columns = ("kernel", "source", "config", "why")
    kernel, source, pairs, why = _cells_of(owner, value, columns)
    config: list[tuple[str, int]] = []
    for pair in _list(f"{owner}: config", pairs):
        name, number = _cells_of(f"{owner}: config", pair, ("name", "value"))
        config.append((_name(owner, name), _whole(f"{owner}: {name}", number, least=-_MOST)))
    return Quarantined(
        _name(f"{owner}: kernel", kernel),
        tuple(config),
        _text(f"{owner}: source", source),
        _text(f"{owner}: why", why),
    )


# ---- single values: each returns what it was given, or says what it must be ------------------


def _object(owner: str, value: object, keys: tuple[str, ...] | None) -> dict[str, Any]:
    """An object; with exactly these keys if they are given."""
    if not isinstance(value, dict):
        raise TableError(f"{owner}: must be a JSON object, got {type(value).__name__}")
    if keys is None:
        return value
    for key in value:
        if key not in keys:
            near = nearest_name(key, keys)
            raise TableError(f"{owner}: unknown key {key!r}{near}; allowed: {', '.join(keys)}")
    missing = [key for key in keys if key not in value]
    if missing:
        raise TableError(f"{owner}: missing {', '.join(missing)}")
    return value


def _list(owner: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TableError(f"{owner}: must be a JSON list, got {value!r}")
    return value


def _cells_of(owner: str, value: object, columns: Sequence[str]) -> list[Any]:
    """A list with one item for each column."""
    cells = _list(owner, value)
    if len(cells) != len(columns):
        allowed = ", ".join(columns) or "no items"
        raise TableError(f"{owner}: must list {allowed}; got {len(cells)} items")
    return cells


def _text(owner: str, value: object) -> str:
    if not isinstance(value, str):
        raise TableError(f"{owner} must be a text, got {value!r}")
    return value


def _name(owner: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TableError(f"{owner}: must be a text that is not empty, got {value!r}")
    return value


def _whole(owner: str, value: object, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
        raise TableError(f"{owner} must be a whole number from {least} on, got {value!r}")
    return value


def _number(owner: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
        raise TableError(f"{owner} must be a number from 0 on, got {value!r}")
    return float(value)


def _text_or_whole(owner: str, value: object) -> str | int:
    return _text(owner, value) if isinstance(value, str) else _whole(owner, value)


def _index(owner: str, value: object, items: Sequence[object]) -> int:
    """A position in `items`."""
    index = _whole(owner, value)
    if index >= len(items):
        raise TableError(f"{owner} must be below {len(items)}, got {index}")
    return index
