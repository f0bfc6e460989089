"""The facts of a report: rows, where they come from, and what follows from them.

`Report` holds facts only; sums over them are properties, so they cannot disagree with the rows.
Errors are relative root-mean-square errors: ‖W − Ŵ‖ / ‖W‖ of the weight, and the same of its output
on the calibration inputs. How they are shown is not decided here.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

REPORT_VERSION = 1

# First match wins, on the dotted source name; `gate` alone is a router, `gate_proj` is not.
_CLASSES = (
    ("other", r"(^|\.)(mtp\w*|nextn\w*|visual|vision\w*|image\w*|audio\w*|multi_modal\w*)\."),
    ("norm", r"norm|(^|\.)ln_\w+"),
    ("head", r"(^|\.)(lm_head|embed_out|head)(\.|$)"),
    ("embedding", r"(^|\.)(embed\w*|wte|wpe|word_embeddings)(\.|$)"),
    ("router", r"(^|\.)(router|gate|shared_expert_gate)(\.|$)"),
    ("experts", r"expert"),
    ("attention", r"attn|attention"),
    ("mlp", r"mlp|feed_forward|ffn|(gate|up|down|gate_up)_proj|(^|\.)(fc\d|c_fc|w[123])(\.|$)"),
)


def tensor_class(name: str) -> str:
    """One of the labels of `_CLASSES`, or "other", by a source tensor's name."""
    for label, pattern in _CLASSES:
        if re.search(pattern, name):
            return label
    return "other"


@dataclass(frozen=True)
class TensorReport:
    """What became of one quantized tensor.

    shape: logical, [N, K] or [E, N, K]. n_bytes: stored, all parts. relative_error: ‖W − Ŵ‖ / ‖W‖.
    output_error: the same of the outputs on calibration inputs; None without them. block: the unit
    of work. fallbacks: what was done instead of what the recipe asks. tokens: calibration tokens
    that it saw (of a stack of experts: each of them); None without calibration.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    options: Mapping[str, Any]
    bits_per_weight: float
    n_bytes: int
    relative_error: float
    output_error: float | None
    seconds: float
    block: str
    fallbacks: tuple[str, ...] = ()
    tokens: int | tuple[int, ...] | None = None

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> "TensorReport":
        """From the JSON row that the journal keeps."""
        tokens = row.get("tokens")
        return TensorReport(
            name=row["name"],
            shape=tuple(row["shape"]),
            format=row["format"],
            options=dict(row["options"]),
            bits_per_weight=row["bits_per_weight"],
            n_bytes=row["n_bytes"],
            relative_error=row["relative_error"],
            output_error=row["output_error"],
            seconds=row["seconds"],
            block=row["block"],
            fallbacks=tuple(row["fallbacks"]),
            tokens=tuple(tokens) if isinstance(tokens, list) else tokens,
        )

    @property
    def n_weights(self) -> int:
        """Weights represented."""
        return prod(self.shape)

    @property
    def error(self) -> float:
        """The output's error where it was measured, otherwise the weight's."""
        return self.relative_error if self.output_error is None else self.output_error


@dataclass(frozen=True)
class KeptTensor:
    """A tensor whose values are those of the source, and why. coded: stored entropy-coded."""

    name: str
    n_bytes: int
    reason: str
    n_elements: int = 0
    coded: bool = False


@dataclass(frozen=True)
class Provenance:
    """Where the checkpoint comes from, enough to make it again.

    recipe_text: canonical text. revision, fingerprint: of the source. calibration: its fingerprint.
    versions: libraries and machine facts. command: repeats the run.
    """

    recipe: str
    recipe_text: str
    source: str
    revision: str | None
    fingerprint: str
    seed: int
    calibration: Mapping[str, Any] | None
    versions: Mapping[str, Any]
    command: str = ""

    @property
    def recipe_sha256(self) -> str:
        """Hash of the recipe's canonical text."""
        return hashlib.sha256(self.recipe_text.encode()).hexdigest()


@dataclass(frozen=True)
class Report:
    """One run. wall_seconds: of this process (a resumed run counts from its resumption)."""

    provenance: Provenance
    tensors: tuple[TensorReport, ...]
    kept: tuple[KeptTensor, ...]
    wall_seconds: float
    peak_resident_bytes: int
    allow_fallback: bool = False

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """`tensor: what was done instead`, in the order of the work."""
        return tuple(f"{row.name}: {text}" for row in self.tensors for text in row.fallbacks)

    @property
    def n_weights(self) -> int:
        """Quantized weights."""
        return sum(row.n_weights for row in self.tensors)

    @property
    def quantized_bytes(self) -> int:
        """Stored bytes of all parts of the quantized tensors."""
        return sum(row.n_bytes for row in self.tensors)

    @property
    def kept_bytes(self) -> int:
        """Stored bytes of the tensors that were not quantized."""
        return sum(row.n_bytes for row in self.kept)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized tensors. If there are none, of all that is stored, where some of it is
        coded; else 0."""
        if self.tensors:
            return 8 * self.quantized_bytes / self.n_weights
        if not any(row.coded for row in self.kept):
            return 0.0
        return 8 * self.kept_bytes / sum(row.n_elements for row in self.kept)

    @property
    def bytes_by_class(self) -> dict[str, dict[str, int]]:
        """Class -> {"quantized": bytes, "unquantized": bytes}, largest class first."""
        found: dict[str, dict[str, int]] = {}
        for kind, rows in (("quantized", self.tensors), ("unquantized", self.kept)):
            for row in rows:
                both = found.setdefault(tensor_class(row.name), {"quantized": 0, "unquantized": 0})
                both[kind] += row.n_bytes
        return dict(sorted(found.items(), key=lambda item: -sum(item[1].values())))

    @property
    def experts(self) -> dict[str, list[int]]:
        """Group of experts -> calibration tokens that each of them saw."""
        return _expert_tokens(self.tensors)

    def worst(self, count: int) -> list[TensorReport]:
        """Rows with the largest errors, the largest first."""
        return sorted(self.tensors, key=lambda row: -row.error)[:count]

    def to_json(self) -> dict[str, Any]:
        """The content of `report.json`."""
        source = self.provenance
        return {
            "version": REPORT_VERSION,
            "recipe": {
                "name": source.recipe,
                "sha256": source.recipe_sha256,
                "text": source.recipe_text,
            },
            "source": {
                "name": source.source,
                "revision": source.revision,
                "fingerprint": source.fingerprint,
            },
            "seed": source.seed,
            "calibration": source.calibration,
            "versions": source.versions,
            "command": source.command,
            "totals": {
                "tensors": len(self.tensors),
                "weights": self.n_weights,
                "bits_per_weight": self.bits_per_weight,
                "quantized_bytes": self.quantized_bytes,
                "unquantized_bytes": self.kept_bytes,
                "bytes": self.quantized_bytes + self.kept_bytes,
            },
            "wall_seconds": self.wall_seconds,
            "peak_resident_bytes": self.peak_resident_bytes,
            "allow_fallback": self.allow_fallback,
            "fallbacks": list(self.fallbacks),
            "bytes_by_class": self.bytes_by_class,
            "experts": self.experts,
            "tensors": {row.name: _named(row) for row in self.tensors},
            "kept": {row.name: _named(row) for row in self.kept},
        }


def _named(row: TensorReport | KeptTensor) -> dict[str, Any]:
    """A row without its name, which is its key."""
    return {key: _jsonable(value) for key, value in asdict(row).items() if key != "name"}


def _jsonable(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _expert_tokens(rows: Iterable[TensorReport]) -> dict[str, list[int]]:
    """Counts from stacks of experts as they are, from single experts gathered by their number.

    Projections of one expert see the same tokens, so the first one that is met speaks for it.
    """
    found: dict[str, list[int]] = {}
    single: dict[str, dict[int, int]] = {}
    for row in rows:
        number = re.search(r"^(.*\bexperts)\.(\d+)\.", row.name)
        if isinstance(row.tokens, tuple):
            found.setdefault(re.sub(r"(\bexperts)\..*$", r"\1", row.name), list(row.tokens))
        elif row.tokens is not None and number is not None:
            single.setdefault(number[1], {}).setdefault(int(number[2]), row.tokens)
    for group, counts in single.items():
        found[group] = [counts[index] for index in sorted(counts)]
    return found
