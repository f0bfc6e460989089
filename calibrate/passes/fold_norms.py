"""Moves the gain of each norm into the weights that multiply the norm's output.

    (x / rms(x) ∘ g) Wᵀ  =  (x / rms(x)) (W diag(g))ᵀ           g := 1

After that a norm's output has rows of norm √H whatever the model was trained to, so that rounding
each token to 8 bit does not lose the quiet channels to a few loud gains. For norms that multiply by
1 + w, w becomes 0.

Norms in front of the head and behind a sublayer stay as they are; `rotate` deals with the former.
LayerNorms with a bias are refused.
"""

from dataclasses import dataclass

from ..edges import ModelEdges, NormEdge
from ..edits import Edit, Fill, Scale, Side
from ..protocol import ModelEdits, ModelTransform, ModelView


@dataclass(frozen=True)
class FoldNormsOptions:
    """No keys."""


def refuse(edges: ModelEdges, options: FoldNormsOptions) -> str | None:
    """A norm whose formula is not known, or that adds a bias."""
    for block in edges.blocks:
        if block.unread_readers:
            return f"{block.unread_readers[0]} was not seen in use, and may read what a norm makes"
        for norm in block.norms:
            if norm.kind is None:
                return f"the formula of the norm {norm.gain} was not recognised"
            if norm.bias is not None:
                return f"{norm.gain} is a norm with a bias, and only gains are folded"
    return None


def edits(view: ModelView, options: FoldNormsOptions) -> ModelEdits:
    """Columns of all readers times the gain; gains to one."""
    found: list[Edit] = []
    for block in view.edges.blocks:
        for norm in block.norms:
            found += fold(norm, view)
    return ModelEdits(tuple(found))


def fold(norm: NormEdge, view: ModelView) -> list[Edit]:
    """Edits that fold one norm."""
    gain = view.read(norm.gain).double()
    neutral = 0.0 if norm.kind == "rms1p" else 1.0
    factors = gain + (1.0 - neutral)
    return [
        *(Edit(reader, Scale(factors)) for reader in norm.readers),
        Edit(Side(norm.gain), Fill(neutral)),
    ]


PASS = ModelTransform(
    name="fold_norms",
    Options=FoldNormsOptions,
    refuse=refuse,
    edits=edits,
)
