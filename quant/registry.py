"""Discovery: what is in a folder is what exists. Nobody edits a central list.

`discover` imports every public module of a package and collects one named attribute from each;
third parties add theirs through an entry-point group. Results are cached per package.
"""

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import Any


@cache
def discover(package: str, attribute: str, group: str) -> dict[str, Any]:
    """{object.name: object} for `attribute` of each module in `package`, then of `group`.

    A tuple of objects counts as each of them. A module without the attribute is skipped; two objects
    of one name are an error, because which one wins would depend on the order of files.
    """
    root = importlib.import_module(package)
    found: dict[str, Any] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(root.__path__)):
        if module.startswith("_"):
            continue
        items = getattr(importlib.import_module(f"{package}.{module}"), attribute, ())
        for item in items if isinstance(items, tuple) else (items,):
            _add(found, item, f"{package}.{module}")
    for entry in sorted(entry_points(group=group), key=lambda point: point.name):
        _add(found, entry.load(), f"entry point {entry.name}")
    return found


def _add(found: dict[str, Any], item: Any, origin: str) -> None:
    if item.name in found:
        raise RuntimeError(f"{origin} defines {item.name!r} again; names must be unique")
    found[item.name] = item
