"""`fewbit kernels`: which kernel runs what, on this machine or on a described one, and why.

One shape gives one explanation: the chosen kernel and its config, what else would fit, every reason of
what does not, and the limit. Without a shape there is a table: the weight formats of the packaged
recipes by rows of x. No kernel is run and no weight is made; times are estimates unless a tuned table
has them.

A shape is written differently for each op:

    linear          MxNxK               rows of x, outputs, inputs
    attend          BxQxHxGxDxT         rows, new tokens, KV heads, queries of each, channels, tokens
    all others      MxK                 rows and columns of x
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from .activation import find_activation
from .dispatch import Explanation, explain_here, m_bucket
from .errors import RecipeError, nearest_name
from .format import find_format, parse_options
from .hadamard import Hadamard, largest_order
from .kernel import AnyProblem, AttentionProblem, Device, Problem, RowsProblem, bucket_of
from .machine import device_facts, load_device, this_device
from .page_format import find_page_format
from .recipe import WeightRule, load_recipe, recipe_names

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TABLE_ROWS = (1, 16, 128, 2048)  # one sequence, a few, a short prompt, a long one
TABLE_SIZE = 4096
DEFAULT_RECIPE = "w4a8kv4"
_NO_ACTIVATION = "none"
_PAGES = "int4_head"
_SHAPES = {
    "linear": (("M", "N", "K"), "16x4096x4096"),
    "attend": (("B", "Q", "H", "G", "D", "T"), "16x1x8x4x128x32768"),
}
_ROWS_SHAPE = (("M", "K"), "16x4096")
OPS = (*_SHAPES, "quantize_rows", "rmsnorm_quantize", "silu_mul_quantize", "hadamard")


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


def parse_shape(text: str, op: str = "linear") -> tuple[int, ...]:
    """The numbers of "16x4096x4096", as many as the op's shape has; see the module's text."""
    letters, example = _SHAPES.get(op, _ROWS_SHAPE)
    parts = text.lower().split("x")
    whole = all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts)
    if not whole or len(parts) != len(letters) or min(map(int, parts)) < 1:
        raise RecipeError(
            f"--shape must be {'x'.join(letters)}, whole numbers from 1 to 999999999 such as "
            f"{example}, got {text!r}"
        )
    return tuple(map(int, parts))


def problem_for(
    layer: Layer, shape: tuple[int, ...], dtype: torch.dtype, machine: Device
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


def attention_for(
    pages: str, shape: tuple[int, ...], dtype: torch.dtype, machine: Device
) -> AttentionProblem:
    """Attention over keys and values that are both stored as `pages`; shape = (B, Q, Hkv, G, D, T)."""
    n_rows, n_queries, kv_heads, group, head_dim, tokens = shape
    form = find_page_format(pages)
    return AttentionProblem(
        key=form.name,
        key_options=form.Options(),
        value=form.name,
        value_options=form.Options(),
        n_rows=n_rows,
        n_queries=n_queries,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        value_dim=head_dim,
        t_bucket=bucket_of(tokens, AttentionProblem.buckets),
        dtype=dtype,
        device=machine.backend,
        machine=machine,
    )


def rows_for(op: str, shape: tuple[int, ...], dtype: torch.dtype, machine: Device) -> RowsProblem:
    """A row-wise function of x [M, K] = shape; a Hadamard transform is of the largest order that
    divides K."""
    m, k = shape
    options = Hadamard(largest_order(k)) if op == "hadamard" else None
    return RowsProblem(op, options, m_bucket(m), k, dtype, machine.backend, machine)


def kernel_report(
    *,
    op: str = "linear",
    weights: str | None = None,
    activation: str | None = None,
    shape: str | None = None,
    gpu: str | None = None,
    dtype: str = "bfloat16",
) -> tuple[dict[str, Any], str]:
    """(JSON value, text): the explanation of one `shape`, or the table. RecipeError for a format,
    an activation, a shape or a machine that does not exist; NoKernelError for a forced kernel."""
    if op not in OPS:
        raise RecipeError(f"unknown op {op!r}{nearest_name(op, OPS)}; known: {', '.join(OPS)}")
    machine = this_device() if gpu is None else load_device(gpu)
    if shape is None and op != "linear":
        raise RecipeError(f"--op {op} explains one problem: give --shape")
    if shape is not None:
        found = explain_here(
            _posed(op, weights, activation, parse_shape(shape, op), DTYPES[dtype], machine)
        )
        return {**found.as_dict(), "machine": device_facts(machine)}, found.text()
    one = weights is not None or activation is not None
    layers = [parse_layer(weights, activation)] if one else recipe_layers()
    table = {layer: _row(layer, DTYPES[dtype], machine) for layer in layers}
    value = {
        "machine": device_facts(machine),
        "table": [found.as_dict() for row in table.values() for found in row],
    }
    return value, _table_text(table, machine, dtype)


def _posed(
    op: str,
    weights: str | None,
    activation: str | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    machine: Device,
) -> AnyProblem:
    if op == "linear":
        return problem_for(parse_layer(weights, activation), shape, dtype, machine)
    if activation is not None:
        raise RecipeError(f"--activation is for --op linear, got {activation!r} with --op {op}")
    if op == "attend":
        return attention_for(weights or _PAGES, shape, dtype, machine)
    if weights is not None:
        raise RecipeError(f"--format is for weights and pages, got {weights!r} with --op {op}")
    return rows_for(op, shape, dtype, machine)


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
