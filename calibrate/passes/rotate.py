"""Rotates activations by Hadamard matrices, so that no channel stands out.

    residual      h → h Q          embedding, o and down write h Q; q, k, v, gate, up, head read it
    value_heads   v → v Q_D        rows of v and columns of o, each head by the same Q_D
    down_proj     x → x Q          columns of down; x is rotated at run time (online)

A coefficient of h Q is a signed mean of all channels of h, so outliers spread evenly and the largest
number of a token, which sets the step of its 8 bit, becomes smaller. RMSNorm commutes with Q once its
gain is one (`fold_norms`); the final norm's gain goes into the head, which is untied if it was tied
(`untie = false`: then the residual of such a model is left as it is).

Q is a Hadamard matrix over √n with random signs (`quant/hadamard.py`); an axis whose size has none
is rotated in the largest blocks that have.
"""

from dataclasses import dataclass
from typing import Any

from ...quant.errors import CalibrationError, RecipeError
from ...quant.hadamard import Hadamard, largest_order
from ..edges import BlockEdges, ModelEdges, NormEdge
from ..edits import Edit, Rotate, Side
from ..protocol import ModelEdits, ModelTransform, ModelView
from ._edges import wanted_edges
from .fold_norms import fold

EDGES = ("residual", "value_heads", "down_proj")
_MIN_ORDER = 16  # smaller blocks would not spread an outlier


@dataclass(frozen=True)
class RotateOptions:
    """edges: what is rotated, any of residual, value_heads, down_proj. signs: random signs.
    untie: false leaves the residual of a model as it is whose head is tied to its embedding; true
    unties them, which stores the head beside the embedding."""

    edges: Any = ("residual", "value_heads")
    signs: bool = True
    untie: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", wanted_edges("rotate", self.edges, EDGES))
        for key in ("signs", "untie"):
            value = getattr(self, key)
            if not isinstance(value, bool):
                raise RecipeError(f"rotate: {key} must be true or false, got {value!r}")


def refuse(edges: ModelEdges, options: RotateOptions) -> str | None:
    """What is missing for the wanted edges."""
    checks = {"residual": _no_residual, "value_heads": _no_heads, "down_proj": _no_down}
    for name in _wanted(edges, options):
        sentence = checks[name](edges)
        if sentence:
            return f"edge {name}: {sentence}"
    return None


def _wanted(edges: ModelEdges, options: RotateOptions) -> tuple[str, ...]:
    """The edges to rotate, without the residual where that would untie and must not."""
    keep = edges.tied and not options.untie
    return tuple(name for name in options.edges if not (keep and name == "residual"))


def _no_residual(edges: ModelEdges) -> str | None:
    if edges.final_norm is None or edges.final_kind not in ("rms", "rms1p"):
        return "the final norm was not found, or is no RMSNorm"
    if edges.head is None:
        return "the model has no output embedding"
    for block in edges.blocks:
        if block.unread_readers:
            return f"{block.unread_readers[0]} was not seen in use, and may read the residual"
        if block.other_norms:
            return f"{block.other_norms[0]} is a norm behind a sublayer (post-norm)"
        if any(norm.kind not in ("rms", "rms1p") or norm.bias for norm in block.norms):
            return f"a norm of {block.name} is no RMSNorm"
        if not block.norms or len(block.writers) < 2:
            return f"{block.name} has no norm or no output projection that is known"
    return _no_order(edges.config.hidden_size)


def _no_heads(edges: ModelEdges) -> str | None:
    for block in edges.blocks:
        if block.attention is None:
            return f"{block.name} has no attention with separate q, k, v and o"
        sentence = _no_order(block.attention.head_dim)
        if sentence:
            return sentence
    return None


def _no_down(edges: ModelEdges) -> str | None:
    for block in edges.blocks:
        if len(block.mlps) != 1:
            return f"{block.name} has {len(block.mlps)} gated MLPs; experts are not rotated online"
        (mlp,) = block.mlps
        if mlp.down.key in block.unread:
            return f"{mlp.down.key} was not seen in use"
    return None


def _no_order(size: int) -> str | None:
    order = largest_order(size)
    if order >= min(size, _MIN_ORDER):
        return None
    return f"no Hadamard matrix of order {size}, nor of a useful part of it, is known"


def edits(view: ModelView, options: RotateOptions) -> ModelEdits:
    """Rotations of all wanted edges."""
    found: list[Edit] = []
    basis, untie = None, False
    if "residual" in _wanted(view.edges, options):
        basis = _hadamard(view.edges.config.hidden_size, view, options)
        untie = view.edges.tied
        found += _residual(view, basis)
    for block in view.edges.blocks:
        if "value_heads" in options.edges:
            found += _value_heads(block, view, options)
    online = _down_inputs(view, options) if "down_proj" in options.edges else {}
    found += [Edit(Side(key, -1), Rotate(turn)) for key, turn in online.items()]
    return ModelEdits(tuple(found), basis, untie, online)


def _hadamard(size: int, view: ModelView, options: RotateOptions) -> Hadamard:
    return Hadamard(largest_order(size), view.seed if options.signs else None)


def _residual(view: ModelView, basis: Hadamard) -> list[Edit]:
    edges, turn = view.edges, Rotate(basis)
    assert edges.head is not None and edges.final_norm is not None, "refused before"
    head = Side(edges.head, -1)
    final = NormEdge(edges.final_norm, None, edges.final_kind, (head,))
    found = [*fold(final, view), Edit(head, turn)]
    if edges.embedding.key != head.key:
        found.append(Edit(edges.embedding, turn))
    for block in edges.blocks:
        for norm in block.norms:
            _require_folded(norm, view)
            found += [Edit(reader, turn) for reader in norm.readers]
        found += [Edit(writer, turn) for writer in block.writers]
    return found


def _require_folded(norm: NormEdge, view: ModelView) -> None:
    gain = view.read(norm.gain)
    if not bool((gain == (0.0 if norm.kind == "rms1p" else 1.0)).all()):
        raise CalibrationError(
            f"pass 'rotate' needs norms without gains, and {norm.gain} has one; put the pass "
            f"fold_norms before it"
        )


def _value_heads(block: BlockEdges, view: ModelView, options: RotateOptions) -> list[Edit]:
    attention = block.attention
    assert attention is not None, "refused before"
    turn = Rotate(_hadamard(attention.head_dim, view, options))
    return [Edit(side, turn) for side in (*attention.v, attention.o)]


def _down_inputs(view: ModelView, options: RotateOptions) -> dict[str, Hadamard]:
    """Transforms of the inputs of down, for run time."""
    return {
        mlp.down.key: _hadamard(mlp.width, view, options)
        for block in view.edges.blocks
        for mlp in block.mlps
    }


PASS = ModelTransform(
    name="rotate",
    Options=RotateOptions,
    refuse=refuse,
    edits=edits,
)
