"""Which products a model asks for: of a packaged list of shapes, or of a checkpoint.

    quant/shapes/llama3-8b.json
      linears    name -> [N, K], as the source stores them
      attention  heads, kv_heads, head_dim

    checkpoint   shapes, formats and activation of its quantized modules, by headers alone

Products that share their input are joined as `fused.py` joins them when the model runs: q|k|v and
gate|up, if inputs are rounded to integers. Weight-only products run alone.

    llama3-8b    with an activation    6144x4096   4096x4096              28672x4096   4096x14336
                 weight-only           4096x4096   1024x4096              14336x4096   4096x14336

Each answer is a list of problems of different families, at their smallest size. Deliberately not here:
what runs them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from .errors import RecipeError, nearest_name
from .fused import SIBLINGS
from .kernel import AttentionProblem, Device, Problem
from .kernel_report import DTYPES, Layer, attention_for, problem_for
from .recipe import load_recipe, recipe_names
from .stored import StoredModule, open_stored, read_config

DEFAULT_FORMATS = ("w4a16", "w8a16", "w4a8kv4", "w8a8")
_JOINED = (("q", "k", "v"), ("gate", "up"))
_ROWS = (1, 16)  # sequences of a batch, of attention
_MOST = 1 << 24  # of a size


@dataclass(frozen=True)
class Attention:
    """Query heads, key-value heads, and channels of each."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class ModelShapes:
    """Products of one model. linears: name -> (N, K), as they are stored."""

    name: str
    title: str
    linears: Mapping[str, tuple[int, int]]
    attention: Attention

    def joined(self) -> list[tuple[int, int]]:
        """(N, K) of each product when those that share their input are joined, each once."""
        group = {name: names for names in _JOINED for name in names}
        sums: dict[object, tuple[int, int]] = {}
        for name, (n, k) in self.linears.items():
            key = group.get(name, name)
            sums[key] = (n + sums.get(key, (0, k))[0], k)
        return list(dict.fromkeys(sums.values()))

    def apart(self) -> list[tuple[int, int]]:
        """(N, K) of each product by itself, each once."""
        return list(dict.fromkeys(self.linears.values()))


# ---- lists of shapes ------------------------------------------------------------------------


def shapes_names() -> list[str]:
    """Names of the packaged lists."""
    folder = files(__package__) / "shapes"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".json"))


def load_shapes(name_or_path: str) -> ModelShapes:
    """A packaged list by name, or one from a file whose name ends in .json; RecipeError if there is
    none, naming the nearest, or if the file is not as it must be."""
    if name_or_path.endswith(".json"):
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"shapes file {name_or_path!r} cannot be read: {error}") from error
        return parse_shapes(Path(name_or_path).stem, text)
    known = shapes_names()
    if name_or_path not in known:
        raise RecipeError(
            f"unknown shapes {name_or_path!r}{nearest_name(name_or_path.lower(), known)}; known: "
            f"{', '.join(known)}; a file must end in .json"
        )
    resource = files(__package__) / "shapes" / f"{name_or_path}.json"
    return parse_shapes(name_or_path, resource.read_text(encoding="utf-8"))


def parse_shapes(name: str, text: str) -> ModelShapes:
    """The list that a JSON text holds; RecipeError names what is wrong."""
    owner = f"shapes {name!r}"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{owner} is not valid JSON: {error}") from error
    table = _keys(owner, found, ("title", "linears", "attention", "source"))
    linears = table["linears"]
    if not isinstance(linears, dict) or not linears:
        raise RecipeError(f"{owner}: linears must be a table of [N, K], got {linears!r}")
    names = tuple(field.name for field in fields(Attention))
    heads = _keys(f"{owner}: attention", table["attention"], names)
    for key, value in heads.items():
        _size(f"{owner}: attention.{key}", value)
    if heads["heads"] % heads["kv_heads"]:
        raise RecipeError(
            f"{owner}: attention.heads must be a multiple of kv_heads, got {heads['heads']} and "
            f"{heads['kv_heads']}"
        )
    pairs = {key: _pair(f"{owner}: linears.{key}", value) for key, value in linears.items()}
    return ModelShapes(name, str(table["title"]), pairs, Attention(**heads))


def _keys(owner: str, table: object, allowed: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(table, dict) or set(table) != set(allowed):
        got = sorted(table) if isinstance(table, dict) else table
        raise RecipeError(f"{owner}: must be a table of {', '.join(allowed)}, got {got!r}")
    return table


def _size(owner: str, value: object) -> int:
    if type(value) is not int or not 0 < value <= _MOST:
        raise RecipeError(f"{owner} must be a whole number from 1 to {_MOST}, got {value!r}")
    return value


def _pair(owner: str, value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise RecipeError(f"{owner} must be [N, K], got {value!r}")
    return _size(owner, value[0]), _size(owner, value[1])


def layers_of(formats: Sequence[str] = DEFAULT_FORMATS) -> list[Layer]:
    """Weight and activation formats of recipes, by name or file, each pair once. RecipeError for one
    that does not exist or stores no weights."""
    found: dict[Layer, None] = {}
    for name in formats:
        recipe = load_recipe(name)
        if recipe.weights is None:
            having = [other for other in recipe_names() if load_recipe(other).weights]
            raise RecipeError(
                f"--formats {name}: this recipe quantizes no weights; use some of: {', '.join(having)}"
            )
        found[Layer(recipe.weights, recipe.activation)] = None
    return list(found)


def linear_problems(
    shapes: ModelShapes,
    layers: Iterable[Layer],
    machine: Device,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Problem]:
    """A problem of each layer and product."""
    return [
        problem_for(layer, (1, n, k), dtype, machine)
        for layer in layers
        for n, k in (shapes.joined() if layer.activation else shapes.apart())
    ]


def attention_problems(
    shapes: ModelShapes, pages: str, machine: Device, dtype: torch.dtype = torch.bfloat16
) -> list[AttentionProblem]:
    """One new token for 1 and for 16 sequences, over keys and values stored as `pages`."""
    heads = shapes.attention
    group = heads.heads // heads.kv_heads
    return [
        attention_for(pages, (rows, 1, heads.kv_heads, group, heads.head_dim, 1), dtype, machine)
        for rows in _ROWS
    ]


# ---- checkpoints ----------------------------------------------------------------------------


def checkpoint_problems(folder: str | Path, machine: Device) -> list[Problem]:
    """A problem of each product of a checkpoint of ours, in its dtype. CheckpointError if it is
    none, or has no quantized module."""
    path = Path(folder)
    stored = open_stored(path)
    if not stored.modules:
        raise RecipeError(
            f"{path} has no quantized weights, so that there is nothing to tune; quantize with "
            f"--recipe w4a16, or give --shapes"
        )
    config = read_config(path)
    told = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    dtype = DTYPES.get(told.removeprefix("torch."), torch.bfloat16)
    found: dict[Problem, None] = {}
    for modules in _joined(stored.modules.values()):
        first = modules[0]
        name, options = first.spec.terms[0]
        problem = Problem(
            format=name,
            options=options,
            n_terms=len(first.spec.terms),
            m_bucket=1,
            n=sum(module.shape[-2] for module in modules),
            k=first.shape[-1],
            dtype=dtype,
            device=machine.backend,
            activation=first.spec.activation,
            machine=machine,
        )
        found[problem] = None
    return list(found)


def _joined(modules: Iterable[StoredModule]) -> list[list[StoredModule]]:
    """Modules that share a product, as `fused.find_groups` would find them; single ones are alone."""
    groups: dict[object, list[StoredModule]] = {}
    for module in modules:
        parent, _, last = module.name.rpartition(".")
        siblings = next((names for names in SIBLINGS if last in names), None)
        shared = siblings and module.spec.activation and len(module.shape) == 2
        kind = (module.shape[-1], replace(module.spec, columns=None))
        groups.setdefault((parent, siblings, kind) if shared else module.name, []).append(module)
    return list(groups.values())
