"""A recipe: which passes run in which order, and where each weight is to be stored.

TOML in, frozen dataclasses out. Unknown keys are errors that name the nearest known one. A recipe
is data: it names formats and passes, it never contains code. `--set a.b=c` edits the tree before it
is validated, so a setting obeys the same rules as the file.

The canonical text of a recipe (`Recipe.text`) is stored in the checkpoint and hashed into the
identity of a run; two recipes with the same text produce the same bytes.
"""

import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from .activation import find_activation
from .errors import RecipeError, nearest_name
from .format import find_format, parse_options
from .kv_policy import KVPolicy, parse_kv

DEFAULT_IGNORE = ("lm_head",)
MIN_LENGTH = 8  # tokens of a calibration window
# Left as they are unless an override names them: tiny, and which expert they choose is brittle.
ROUTERS = r"re:.*\.(router|gate|shared_expert_gate)$"


@dataclass(frozen=True)
class CalibrationKeys:
    """`[calibration]`: `samples` windows of `length` tokens; shorter ones say nothing of a text."""

    samples: int = 128
    length: int = 512

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            least = MIN_LENGTH if key == "length" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RecipeError(
                    f"calibration.{key} must be a whole number ≥ {least}, got {value!r}"
                )


@dataclass(frozen=True)
class GateKeys:
    """`[gate]`: bounds that turn a finished run into exit code 3 (0 switches a bound off)."""

    perplexity_ratio: float = 0.0
    mean_kl: float = 0.0


@dataclass(frozen=True)
class PassUse:
    """One `[[pass]]`: its name and its option keys as written."""

    name: str
    keys: Mapping[str, Any]


@dataclass(frozen=True)
class WeightRule:
    """Where a weight is stored: a format and its frozen options; None leaves it as it is."""

    format: str
    options: Any


@dataclass(frozen=True)
class Override:
    """`[[override]]`: `match` is an exact module name or `re:` and a pattern; None = unquantized."""

    match: str
    rule: WeightRule | None


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. `tree` is the merged TOML tree that it was built from."""

    name: str
    summary: str
    tree: Mapping[str, Any]
    calibration: CalibrationKeys
    passes: tuple[PassUse, ...]
    weights: WeightRule | None
    ignore: tuple[str, ...]
    overrides: tuple[Override, ...]
    gate: GateKeys
    allow_fallback: bool
    activation: str | None = None  # format that inputs of quantized weights are rounded to
    kv: KVPolicy | None = None  # how keys and values are cached
    lossless: bool = False  # entropy-code stored tensors
    resident: str = "decoded"  # how coded tensors are held once the model is loaded

    @cached_property
    def text(self) -> str:
        """Canonical JSON of everything that decides the output."""
        return json.dumps({"name": self.name, **self.tree}, sort_keys=True, ensure_ascii=False)

    @property
    def quantizes(self) -> bool:
        """Whether any rule stores weights in another format; otherwise the recipe is a copy."""
        return self.weights is not None or any(item.rule for item in self.overrides)

    @property
    def keeps_bytes(self) -> bool:
        """Whether the output holds the source's tensors as they are stored there, coded."""
        return self.lossless and not self.quantizes

    def rule_for(self, module: str) -> WeightRule | None:
        """The rule for a source module name; None if it stays unquantized."""
        for override in self.overrides:
            if matches(override.match, module):
                return override.rule
        if any(matches(pattern, module) for pattern in (ROUTERS, *self.ignore)):
            return None
        return self.weights


def matches(pattern: str, module: str) -> bool:
    """`re:` patterns match the whole name; anything else is the name or its last parts."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], module) is not None
    return module == pattern or module.endswith("." + pattern)


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    folder = files(__package__) / "recipes"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".toml"))


def read_recipe_text(name_or_path: str) -> tuple[str, str]:
    """(name, TOML text) of a packaged recipe or of a file."""
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise RecipeError(f"recipe file {name_or_path!r} does not exist")
        try:
            return path.stem, path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"recipe file {name_or_path!r} is not UTF-8: {error}") from error
    known = recipe_names()
    if name_or_path not in known:
        raise RecipeError(
            f"unknown recipe {name_or_path!r}{nearest_name(name_or_path, known)}; "
            f"packaged: {', '.join(known)}; a file must end in .toml"
        )
    resource = files(__package__) / "recipes" / f"{name_or_path}.toml"
    return name_or_path, resource.read_text(encoding="utf-8")


def load_recipe(name_or_path: str, settings: Sequence[str] = ()) -> Recipe:
    """Read, apply `key=value` settings, validate. RecipeError names the key that is wrong."""
    name, text = read_recipe_text(name_or_path)
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {name!r} is not valid TOML: {error}") from error
    for setting in settings:
        _apply_setting(tree, setting)
    return build_recipe(name, tree)


def _apply_setting(tree: dict[str, Any], setting: str) -> None:
    """`weights.bits=3` or `pass.gptq.damping=0.02`; the value is TOML, or else a plain string."""
    key, separator, raw = setting.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set takes key=value, got {setting!r}")
    path = key.split(".")
    node: Any = tree
    if path[0] == "pass" and len(path) == 3:
        # The tree is not validated yet; `_pass_use` refuses what is skipped here.
        tables = [use for use in _typed(tree, "pass", list, []) if isinstance(use, dict)]
        uses = [use for use in tables if use.get("name") == path[1]]
        if not uses:
            names = [str(use.get("name")) for use in tables]
            raise RecipeError(
                f"--set {key}: the recipe has no pass {path[1]!r}{nearest_name(path[1], names)}; "
                f"it has: {', '.join(names) or 'none'}"
            )
        node, path = uses[-1], path[2:]
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise RecipeError(f"--set {key}: {part!r} is a value, not a table")
    node[path[-1]] = _setting_value(raw)


def _setting_value(raw: str) -> Any:
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw


_TOP_KEYS = (
    "summary", "calibration", "pass", "weights", "override", "activations", "kv", "gate",
    "allow_fallback", "lossless", "resident",
)  # fmt: skip


def build_recipe(name: str, tree: dict[str, Any]) -> Recipe:
    """Validate a merged tree."""
    _known("recipe", tree, _TOP_KEYS)
    weights, ignore = _weights(tree.get("weights"))
    recipe = Recipe(
        name=name,
        summary=_typed(tree, "summary", str, ""),
        tree=tree,
        calibration=_section("calibration", CalibrationKeys, tree),
        passes=_pass_uses(_typed(tree, "pass", list, [])),
        weights=weights,
        ignore=ignore,
        overrides=tuple(_override(item, tree) for item in _typed(tree, "override", list, [])),
        gate=_gate(tree),
        allow_fallback=_typed(tree, "allow_fallback", bool, False),
        activation=_activation(tree),
        kv=parse_kv(_typed(tree, "kv", dict, {}), "kv") if "kv" in tree else None,
        lossless=_typed(tree, "lossless", bool, False),
        resident=_typed(tree, "resident", str, "decoded"),
    )
    check_resident(recipe.resident)
    if recipe.resident != "decoded" and not recipe.lossless:
        raise RecipeError(
            f"recipe {name!r} keeps weights {recipe.resident!r} in memory but stores none coded; add "
            f"lossless = true"
        )
    if recipe.activation and not recipe.quantizes:
        raise RecipeError(
            f"recipe {name!r} rounds activations but no weights; add [weights] with a format, or "
            f"drop [activations]"
        )
    if recipe.passes and not recipe.quantizes:
        raise RecipeError(
            f"recipe {name!r} has passes ({', '.join(use.name for use in recipe.passes)}) but no "
            f"[weights] that they could work on; add [weights] with a format, or drop the passes"
        )
    return recipe


RESIDENT = ("decoded", "coded", "fle4", "fle3")


def check_resident(name: str) -> None:
    """RecipeError unless coded tensors can be held in this way."""
    if name not in RESIDENT:
        raise RecipeError(
            f"resident must be one of {', '.join(RESIDENT)}; got {name!r}{nearest_name(name, RESIDENT)}"
        )


def _known(owner: str, table: Mapping[str, Any], allowed: Sequence[str]) -> None:
    for key in table:
        if key not in allowed:
            raise RecipeError(
                f"{owner}: unknown key {key!r}{nearest_name(key, allowed)}; "
                f"allowed: {', '.join(allowed)}"
            )


def _typed(table: Mapping[str, Any], key: str, kind: type[Any], default: Any) -> Any:
    value = table.get(key, default)
    if not isinstance(value, kind):
        raise RecipeError(f"recipe: {key!r} must be a {kind.__name__}, got {value!r}")
    return value


def _section(name: str, kind: type[Any], tree: Mapping[str, Any]) -> Any:
    table = _typed(tree, name, dict, {})
    _known(name, table, [field.name for field in fields(kind)])
    return kind(**table)


def _activation(tree: Mapping[str, Any]) -> str | None:
    if "activations" not in tree:
        return None
    table = _typed(tree, "activations", dict, {})
    _known("activations", table, ("format",))
    if not isinstance(table.get("format"), str):
        raise RecipeError(f"activations: needs format = '...', got {table.get('format')!r}")
    return find_activation(table["format"]).name


def _gate(tree: Mapping[str, Any]) -> GateKeys:
    gate: GateKeys = _section("gate", GateKeys, tree)
    for key, value in asdict(gate).items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf:
            raise RecipeError(
                f"gate.{key} must be a finite number ≥ 0 (0 switches it off), got {value!r}"
            )
    return gate


def _pass_uses(tables: Sequence[Any]) -> tuple[PassUse, ...]:
    """All passes that are not skipped (`skip = true`, for `--set pass.NAME.skip=true`)."""
    found = []
    for table in tables:
        use = _pass_use(table)
        skip = use.keys.get("skip", False)
        if not isinstance(skip, bool):
            raise RecipeError(f"pass {use.name}: skip must be true or false, got {skip!r}")
        if not skip:
            keys = {key: value for key, value in use.keys.items() if key != "skip"}
            found.append(PassUse(use.name, keys))
    return tuple(found)


def _pass_use(table: Any) -> PassUse:
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        raise RecipeError(f"each [[pass]] needs a name, got {table!r}")
    return PassUse(table["name"], {key: value for key, value in table.items() if key != "name"})


def _rule(owner: str, table: Mapping[str, Any]) -> WeightRule:
    if not isinstance(table.get("format"), str):
        raise RecipeError(f"{owner}: needs format = '...', got {table.get('format')!r}")
    keys = {key: value for key, value in table.items() if key != "format"}
    options = parse_options(owner, find_format(table["format"]).Options, keys)
    return WeightRule(table["format"], options)


def _weights(table: Any) -> tuple[WeightRule | None, tuple[str, ...]]:
    if table is None:
        return None, ()
    if not isinstance(table, dict):
        raise RecipeError(f"[weights] must be a table, got {table!r}")
    ignore = table.get("ignore", list(DEFAULT_IGNORE))
    if not isinstance(ignore, list) or not all(isinstance(item, str) for item in ignore):
        raise RecipeError(f"weights.ignore must be a list of names, got {ignore!r}")
    for pattern in ignore:
        _check_pattern("weights.ignore", pattern)
    keys = {key: value for key, value in table.items() if key != "ignore"}
    return _rule("weights", keys), tuple(ignore)


def _check_pattern(owner: str, pattern: str) -> None:
    try:
        re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
    except re.error as error:
        raise RecipeError(f"{owner}: {pattern!r} is not a valid pattern: {error}") from error


def _override(table: Any, tree: Mapping[str, Any]) -> Override:
    if not isinstance(table, dict) or not isinstance(table.get("match"), str):
        raise RecipeError(f"each [[override]] needs match = '...', got {table!r}")
    _known("override", table, ("match", "weights"))
    _check_pattern("override.match", table["match"])
    changes = table.get("weights")
    if changes is False:
        return Override(table["match"], None)
    if not isinstance(changes, dict):
        raise RecipeError(
            f"override {table['match']!r}: weights must be a table, or false to leave the weight "
            f"unquantized; got {changes!r}"
        )
    base = {key: value for key, value in tree.get("weights", {}).items() if key != "ignore"}
    if changes.get("format", base.get("format")) != base.get("format"):
        base = {}
    return Override(table["match"], _rule(f"override {table['match']!r}", {**base, **changes}))
