"""`inspect`: what is inside a quantized checkpoint, from its headers alone; `verify` reads it all.

    bits per weight = 8 · (bytes of all parts of quantized weights) / (number of those weights)

Without quantized weights, of all tensors, if some are entropy-coded. Every stored byte of a weight
counts: codes, scales, zero points, padding, tables and checksums of coded parts. Headers of the files
and tensors that stay unquantized are counted apart; JSON and tokenizer files are not counted.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .hub import fetch
from .stored import StoredCheckpoint, open_stored
from .verify import verify as verify_stored


@dataclass(frozen=True)
class TensorFacts:
    """One weight. formats: of its terms, or the dtype of an unquantized tensor.

    shape: logical, [N, K] or [E, N, K] if quantized. bits_per_weight: all stored bytes. coded: at
    least a part is entropy-coded.
    """

    formats: tuple[str, ...]
    shape: tuple[int, ...]
    bits_per_weight: float
    bytes: int
    quantized: bool
    coded: bool = False


@dataclass(frozen=True)
class Inspection:
    """bits_per_weight: of the quantized weights, 0 if there are none. bytes: of the weight files.

    tensors: by source module name (quantized) or tensor name. kv: the cache policy, None: 16 bit.
    verified: True once every checksum, size and shape was checked.
    """

    path: str
    recipe: str | None
    source: Mapping[str, Any] | None
    bits_per_weight: float
    bytes: int
    quantized_bytes: int
    unquantized_bytes: int
    header_bytes: int
    tensors: Mapping[str, TensorFacts]
    kv: Mapping[str, Any] | None
    verified: bool
    resident: str = "decoded"

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return asdict(self)

    def text(self) -> str:
        """A table for people: totals, then quantized weights by format."""
        total, rest = max(self.bytes, 1), self.unquantized_bytes
        lines = [
            f"{self.path}",
            f"  recipe            {self.recipe or 'unknown'}",
            f"  source            {(self.source or {}).get('name', 'unknown')}",
            f"  bits per weight   {self.bits_per_weight:.4f}",
            f"  bytes             {self.bytes:,d}",
            f"    quantized       {self.quantized_bytes:,d} ({self.quantized_bytes / total:.1%})",
            f"    unquantized     {rest:,d} ({rest / total:.1%})",
            f"    headers         {self.header_bytes:,d}",
            f"  KV cache          {_kv_text(self.kv)}",
            f"  verified          {'every checksum and shape' if self.verified else 'no'}",
        ]
        return "\n".join([*lines, *self._format_lines()])

    def _format_lines(self) -> list[str]:
        groups: dict[tuple[str, ...], list[TensorFacts]] = {}
        for facts in self.tensors.values():
            coded = ("rans32",) if facts.coded else ()
            groups.setdefault((*facts.formats, *coded), []).append(facts)
        lines = []
        for formats, members in sorted(groups.items(), key=lambda item: -_bytes_of(item[1])):
            name = " + ".join(formats)
            count = f"{len(members)} tensor{'s' if len(members) > 1 else ''}"
            bits = 8 * _bytes_of(members) / max(sum(_n_weights(m.shape) for m in members), 1)
            lines.append(
                f"  {name:24s}  {count:>14s}  {_bytes_of(members):>16,d} bytes  {bits:.3f} bits"
            )
        return lines


def inspect(path: str | Path, verify: bool = False) -> Inspection:
    """Facts of a checkpoint in a folder or hub id; with `verify`, of one that is sound.

    CheckpointError: not there, not one of fewbit's, unfinished, newer, or damaged.
    """
    stored = open_stored(fetch(path))
    if verify:
        verify_stored(stored, everything=True)
    manifest = stored.manifest or {}
    tensors = _facts(stored)
    quantized = list(stored.modules.values())
    n_weights = sum(module.n_weights for module in quantized)
    n_bytes = sum(module.n_bytes for module in quantized)
    n_counted, counted = n_weights, n_bytes
    if not quantized and any(facts.coded for facts in tensors.values()):
        n_counted = sum(_n_weights(facts.shape) for facts in tensors.values())
        counted = sum(facts.bytes for facts in tensors.values())
    recipe = manifest.get("recipe", {}).get("name") or (stored.quantization or {}).get("recipe")
    return Inspection(
        path=str(path),
        recipe=recipe,
        source=manifest.get("source"),
        bits_per_weight=8 * counted / n_counted if n_counted else 0.0,
        bytes=sum(header.file_bytes for header in stored.headers),
        quantized_bytes=n_bytes,
        unquantized_bytes=sum(facts.bytes for facts in tensors.values() if not facts.quantized),
        header_bytes=sum(header.header_bytes for header in stored.headers),
        tensors=tensors,
        kv=(stored.quantization or {}).get("kv"),
        verified=verify,
        resident=stored.resident,
    )


def _facts(stored: StoredCheckpoint) -> dict[str, TensorFacts]:
    found = {}
    for name, module in stored.modules.items():
        formats = tuple(term for term, _ in module.spec.terms)
        bits = module.bits_per_weight
        coded = any(stored.tensors[part].coded for part in module.parts.values())
        found[name] = TensorFacts(formats, module.shape, bits, module.n_bytes, True, coded)
    for name, tensor in stored.dense().items():
        dtype, n = str(tensor.dtype).removeprefix("torch."), _n_weights(tensor.shape)
        bits = 8 * tensor.n_bytes / n if n else 0.0
        found[name] = TensorFacts((dtype,), tensor.shape, bits, tensor.n_bytes, False, tensor.coded)
    return found


def _kv_text(kv: Mapping[str, Any] | None) -> str:
    if kv is None:
        return "as the model computes it"
    key, value = (kv[name]["format"] for name in ("key", "value"))
    return f"keys {key}, values {value}, newest {kv['residual']} and first {kv['sink']} dense"


def _bytes_of(members: list[TensorFacts]) -> int:
    return sum(facts.bytes for facts in members)


def _n_weights(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
