"""`fewbit kernels`: which kernel runs what, on this machine or on a described one, and why.

One shape gives one explanation: the chosen kernel, what else would fit, every reason of what does
not, and the limit. Without a shape there is a table: the weight formats of the packaged recipes by
rows of x. No kernel is run and no weight is made; times are estimates.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from .activation import find_activation
from .dispatch import Explanation, explain_here, m_bucket
from .errors import RecipeError
from .format import find_format, parse_options
from .kernel import Device, Problem
from .machine import device_facts, load_device, this_device
from .recipe import WeightRule, load_recipe, recipe_names

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TABLE_ROWS = (1, 16, 128, 2048)  # one sequence, a few, a short prompt, a long one
TABLE_SIZE = 4096
DEFAULT_RECIPE = "w4a8kv4"
_NO_ACTIVATION = "none"


@dataclass(frozen=True)
class Layer:
    """How a weight is stored, and the format that its inputs are rounded to."""

    weights: WeightRule
    activation: str | None

    def __str__(self) -> str:
        """`int_group bits=4 group=128`: the options that differ from the defaults, and those two."""
        options = self.weights.options
        shown = [
            f"{field.name}={getattr(options, field.name)}"
            for field in fields(options)
            if field.name in ("bits", "group") or getattr(options, field.name) != field.default
        ]
        return " ".join([self.weights.format, *shown])


def recipe_layers() -> list[Layer]:
    """Every pair of weight and activation format of the packaged recipes, once."""
    found: dict[Layer, None] = {}
    for name in recipe_names():
        recipe = load_recipe(name)
        if recipe.weights is not None:
            found[Layer(recipe.weights, recipe.activation)] = None
    return list(found)


def parse_layer(text: str | None, activation: str | None) -> Layer:
    """A layer from `int_group` or `int_group:bits=8,group=row`, and the name of an activation
    format or "none". Without a text, the weights of the default recipe; with neither, its
    activation format too. RecipeError names what is wrong."""
    rounding = None if activation in (None, _NO_ACTIVATION) else find_activation(str(activation))
    name = rounding.name if rounding else None
    if text is None:
        recipe = load_recipe(DEFAULT_RECIPE)
        assert recipe.weights is not None
        return Layer(recipe.weights, recipe.activation if activation is None else name)
    format_name, _, settings = text.partition(":")
    stored = find_format(format_name)
    keys = {}
    for setting in filter(None, settings.split(",")):
        key, equals, raw = setting.partition("=")
        if not equals:
            raise RecipeError(f"--format {text}: {setting!r} must be KEY=VALUE")
        keys[key.strip()] = _value(raw.strip())
    options = parse_options(format_name, stored.Options, keys)
    return Layer(WeightRule(format_name, options), name)


def _value(raw: str) -> int | bool | str:
    if re.fullmatch(r"[0-9]+", raw):
        return int(raw)
    return {"true": True, "false": False}.get(raw, raw)


def parse_shape(text: str) -> tuple[int, int, int]:
    """(M, N, K) of "16x4096x4096": rows of x, outputs, inputs."""
    found = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})", text.lower())
    m, n, k = (int(part) for part in found.groups()) if found else (0, 0, 0)
    if min(m, n, k) < 1:
        raise RecipeError(
            f"--shape must be MxNxK, three whole numbers from 1 to 999999999 such as "
            f"16x4096x4096, got {text!r}"
        )
    return m, n, k


def problem_for(
    layer: Layer, shape: tuple[int, int, int], dtype: torch.dtype, machine: Device
) -> Problem:
    """The problem of a layer [N, K] and M rows on a machine, `shape` = (M, N, K)."""
    m, n, k = shape
    return Problem(
        format=layer.weights.format,
        options=layer.weights.options,
        n_terms=1,
        m_bucket=m_bucket(m),
        n=n,
        k=k,
        dtype=dtype,
        device=machine.backend,
        activation=layer.activation,
        machine=machine,
    )


def kernel_report(
    *,
    weights: str | None = None,
    activation: str | None = None,
    shape: str | None = None,
    gpu: str | None = None,
    dtype: str = "bfloat16",
) -> tuple[dict[str, Any], str]:
    """(JSON value, text): the explanation of one `shape`, or the table. RecipeError for a format,
    an activation, a shape or a machine that does not exist; NoKernelError for a forced kernel."""
    machine = this_device() if gpu is None else load_device(gpu)
    if shape is not None:
        layer = parse_layer(weights, activation)
        problem = problem_for(layer, parse_shape(shape), DTYPES[dtype], machine)
        found = explain_here(problem)
        return {**found.as_dict(), "machine": device_facts(machine)}, found.text()
    one = weights is not None or activation is not None
    layers = [parse_layer(weights, activation)] if one else recipe_layers()
    table = {layer: _row(layer, DTYPES[dtype], machine) for layer in layers}
    value = {
        "machine": device_facts(machine),
        "table": [found.as_dict() for row in table.values() for found in row],
    }
    return value, _table_text(table, machine, dtype)


def _row(layer: Layer, dtype: torch.dtype, machine: Device) -> list[Explanation]:
    shapes = [(m, TABLE_SIZE, TABLE_SIZE) for m in TABLE_ROWS]
    return [explain_here(problem_for(layer, s, dtype, machine)) for s in shapes]


def _table_text(table: Mapping[Layer, Sequence[Explanation]], machine: Device, dtype: str) -> str:
    head = ["weights", "inputs", *(f"M={m}" for m in TABLE_ROWS)]
    rows = [
        [str(layer), layer.activation or dtype, *map(_cell, found)]
        for layer, found in table.items()
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    return "\n".join(
        [
            f"kernels on {machine}, N = K = {TABLE_SIZE}, {dtype}; times are estimates, "
            f"% is the share of the limit",
            *lines,
            "`fewbit kernels --format F --shape MxNxK` says why",
        ]
    )


def _cell(found: Explanation) -> str:
    seconds = dict(found.eligible)[found.chosen]
    share = f" {found.limit.share:.0%}" if found.limit else ""
    return f"{found.chosen} {_time(seconds)}{share}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"
