"""`[kv]`: how a model's keys and values are kept while it generates.

    [kv]
    key = { format = "int4_head" }      # a page format and its options
    value = { format = "int4_head" }
    residual = 64                       # a query reads its newest 64 tokens, itself included, dense
    sink = 4                            # the first 4 tokens of a sequence are read dense
    prefill = "stored"                  # a prompt attends to what will be read later; or "exact"

The same keys are stored in a checkpoint's `quantization_config` under `kv`. Which tokens a query
reads dense depends on distances alone, never on how a text was cut into calls, so prefill
"stored", short chunks and single tokens give the same figures. "exact" is the exception that it
says: the first call on an empty cache attends to its keys and values as they were computed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import RecipeError, nearest_name
from .format import parse_options
from .page_format import find_page_format

PREFILLS = ("stored", "exact")
_MOST_DENSE = 1 << 16  # tokens; beyond it nothing is left to store


@dataclass(frozen=True)
class PageUse:
    """A page format by name, and its frozen options."""

    format: str
    options: Any

    def to_json(self) -> dict[str, Any]:
        """`{"format": name, option: value, ...}`."""
        return {"format": self.format, **asdict(self.options)}


@dataclass(frozen=True)
class KVPolicy:
    """key, value: page formats. residual, sink: tokens read dense. prefill: "stored" or "exact"."""

    key: PageUse
    value: PageUse
    residual: int = 0
    sink: int = 0
    prefill: str = "stored"

    def to_json(self) -> dict[str, Any]:
        """The form that `parse_kv` reads, for `quantization_config["kv"]`."""
        return {
            "key": self.key.to_json(),
            "value": self.value.to_json(),
            "residual": self.residual,
            "sink": self.sink,
            "prefill": self.prefill,
        }


def parse_kv(tree: Mapping[str, Any], where: str) -> KVPolicy:
    """The policy in a `[kv]` table. RecipeError, beginning with `where`, names what is wrong."""
    if not isinstance(tree, Mapping):
        raise RecipeError(f"{where} must be a table, got {tree!r}")
    allowed = [field.name for field in fields(KVPolicy)]
    for name in tree:
        if name not in allowed:
            raise RecipeError(
                f"{where}: unknown key {name!r}{nearest_name(str(name), allowed)}; "
                f"allowed: {', '.join(allowed)}"
            )
    prefill = tree.get("prefill", "stored")
    if prefill not in PREFILLS:
        raise RecipeError(
            f"{where}.prefill must be {' or '.join(map(repr, PREFILLS))}, got {prefill!r}"
            f"{nearest_name(str(prefill), PREFILLS)}"
        )
    return KVPolicy(
        key=_page_use(tree, "key", where),
        value=_page_use(tree, "value", where),
        residual=_count(tree, "residual", where),
        sink=_count(tree, "sink", where),
        prefill=prefill,
    )


def _page_use(tree: Mapping[str, Any], name: str, where: str) -> PageUse:
    table = tree.get(name)
    if not isinstance(table, Mapping) or not isinstance(table.get("format"), str):
        raise RecipeError(
            f'{where}.{name} must be a table such as {{ format = "int4_head" }}, got {table!r}'
        )
    form = find_page_format(table["format"])
    keys = {key: value for key, value in table.items() if key != "format"}
    return PageUse(form.name, parse_options(f"{where}.{name}", form.Options, keys))


def _count(tree: Mapping[str, Any], name: str, where: str) -> int:
    value = tree.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_DENSE:
        raise RecipeError(
            f"{where}.{name} must be a whole number of tokens from 0 to {_MOST_DENSE}, "
            f"got {value!r}"
        )
    return value
