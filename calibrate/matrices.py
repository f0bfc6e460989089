"""The matrices inside a block, batched: what rounding passes iterate over.

A weight is one source tensor; rounding works on matrices [N, K] that share a Hessian. Two maps lie
between them:

    weights with one input (q, k, v; gate, up)   → their rows joined into one matrix
    experts (and other matrices) of equal size   → stacked into a batch [B, N, K]

so one factorisation serves all rows of an input, and one sweep over the columns serves all experts.
Batches are cut at `max_bytes` of fp32 weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..quant.block import Block, Weight
from ..quant.format import Format, Parts, find_format
from ..quant.packed import PackedTensor, Term
from .protocol import Moments, Stats

MAX_BATCH_BYTES = 256 << 20


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a matrix that come from `weight` (from its `expert`, if it has any)."""

    weight: Weight
    expert: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class Matrix:
    """Rows that share an input, with that input's moments (None when data-free)."""

    pieces: tuple[Piece, ...]
    n: int
    k: int
    moments: Moments | None


@dataclass(frozen=True)
class MatrixBatch:
    """Matrices of equal [N, K] and equal format; tensors are built on demand."""

    matrices: tuple[Matrix, ...]
    format: Format
    options: Any

    def values(self) -> torch.Tensor:
        """fp32 [B, N, padded K], padding columns zero."""
        stacked = torch.stack([_join(matrix, _piece_value) for matrix in self.matrices]).float()
        return _pad(stacked, self.padded_k)

    def hessians(self) -> torch.Tensor:
        """fp32 [B, padded K, padded K]; padding rows and columns zero."""
        stacked = torch.stack(
            [matrix.moments.hessian for matrix in self.matrices if matrix.moments]
        )
        return _pad(_pad(stacked, self.padded_k).mT, self.padded_k).mT

    @property
    def has_moments(self) -> bool:
        """Whether every matrix has the moments of its input."""
        return all(matrix.moments is not None for matrix in self.matrices)

    def hessian_blocks(self, size: int) -> torch.Tensor:
        """Blocks of `size` columns on the diagonal of `hessians`, fp32 [B, groups, size, size]."""
        hessian = self.hessians()
        starts = range(0, hessian.shape[-1], size)
        return torch.stack([hessian[:, i : i + size, i : i + size] for i in starts], dim=1)

    def drifts(self) -> torch.Tensor:
        """fp32 [B, padded K, padded K]: (x − x̂)ᵀ x̂; every matrix must have it."""
        found = [
            m.moments.drift for m in self.matrices if m.moments and m.moments.drift is not None
        ]
        return _pad(_pad(torch.stack(found), self.padded_k).mT, self.padded_k).mT

    def clips(self) -> torch.Tensor | None:
        """Range factors [B, N, groups] left by a search pass, None if there are none."""
        if self.matrices[0].pieces[0].weight.clip is None:
            return None
        return torch.stack([_join(matrix, _piece_clip) for matrix in self.matrices])

    def scales(self, values: torch.Tensor) -> Parts:
        """Scale parts [B, N, ...] left by a search pass; without one, those that fit `values`
        within `clips`."""
        first = self.matrices[0].pieces[0].weight.scales
        if first is None:
            return self.format.fit(values, self.options, self.clips())
        return {name: self._scale_part(name) for name in first}

    def _scale_part(self, name: str) -> torch.Tensor:
        return torch.stack(
            [_join(matrix, lambda piece: _piece_scale(piece, name)) for matrix in self.matrices]
        )

    def leave_scales(self, scales: Mapping[str, torch.Tensor]) -> None:
        """Put scale parts [B, N, ...] into `Weight.scales` of the weights that the rows come from."""
        for index, matrix in enumerate(self.matrices):
            for piece in matrix.pieces:
                rows = {
                    name: part[index, piece.start : piece.stop] for name, part in scales.items()
                }
                _leave(piece, rows)

    @property
    def padded_k(self) -> int:
        """K after the format's padding."""
        return self.format.padded_k(self.matrices[0].k, self.options)


def _pad(tensor: torch.Tensor, size: int) -> torch.Tensor:
    missing = size - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _join(matrix: Matrix, part: Any) -> torch.Tensor:
    return torch.cat([part(piece) for piece in matrix.pieces])


def _piece_value(piece: Piece) -> torch.Tensor:
    value = piece.weight.value if piece.weight.target is None else piece.weight.target
    return value if piece.expert is None else value[piece.expert]


def _piece_clip(piece: Piece) -> torch.Tensor:
    clip = piece.weight.clip
    if clip is None:
        raise RuntimeError(f"{piece.weight.name}: no clip, but its neighbours have one")
    return clip if piece.expert is None else clip[piece.expert]


def _piece_scale(piece: Piece, name: str) -> torch.Tensor:
    scales = piece.weight.scales
    if scales is None:
        raise RuntimeError(f"{piece.weight.name}: no scales, but its neighbours have some")
    return scales[name] if piece.expert is None else scales[name][piece.expert]


def _leave(piece: Piece, rows: Parts) -> None:
    weight = piece.weight
    if piece.expert is None:
        weight.scales = rows
        return
    if weight.scales is None:
        n_experts = weight.value.shape[0]
        weight.scales = {n: part.new_empty(n_experts, *part.shape) for n, part in rows.items()}
    for name, part in rows.items():
        weight.scales[name][piece.expert] = part


def expert_key(input_key: str, expert: int) -> str:
    """Name of the statistics of one expert of a fused weight."""
    return f"{input_key}[{expert}]"


def matrices(block: Block, stats: Stats) -> Iterator[Matrix]:
    """Every matrix of the block, rows that share an input and a format joined."""
    groups: dict[tuple[str, str, Any], list[tuple[Weight, int | None]]] = {}
    for weight in block.weights:
        experts = range(weight.value.shape[0]) if weight.value.dim() == 3 else (None,)
        for expert in experts:
            key = weight.input_key or weight.name
            if expert is not None:
                key = expert_key(key, expert)
            groups.setdefault((key, weight.format, weight.options), []).append((weight, expert))
    for (key, _, _), members in groups.items():
        yield _matrix(members, stats.get(key))


def _matrix(members: list[tuple[Weight, int | None]], moments: Moments | None) -> Matrix:
    pieces, row = [], 0
    for weight, expert in members:
        n = weight.value.shape[-2]
        pieces.append(Piece(weight, expert, row, row + n))
        row += n
    return Matrix(tuple(pieces), row, members[0][0].value.shape[-1], moments)


def batches(found: list[Matrix], max_bytes: int = MAX_BATCH_BYTES) -> Iterator[MatrixBatch]:
    """Equal-sized matrices together, at most `max_bytes` of fp32 weights in a batch."""
    families: dict[tuple[int, int, str, Any], list[Matrix]] = {}
    for matrix in found:
        weight = matrix.pieces[0].weight
        families.setdefault((matrix.n, matrix.k, weight.format, weight.options), []).append(matrix)
    for (n, k, name, options), family in families.items():
        size = max(1, max_bytes // (4 * k * max(n, k)))
        for start in range(0, len(family), size):
            yield MatrixBatch(tuple(family[start : start + size]), find_format(name), options)


def searched_batches(block: Block, stats: Stats) -> Iterator[MatrixBatch]:
    """Batches of all matrices of the block; those with moments come first and by themselves."""
    found = list(matrices(block, stats))
    yield from batches([matrix for matrix in found if matrix.moments is not None])
    yield from batches([matrix for matrix in found if matrix.moments is None])


def block_errors(delta: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """d H_gg dᵀ [B, N, groups] of delta [B, N, groups, size], for `MatrixBatch.hessian_blocks`."""
    by_group = delta.transpose(1, 2)  # [B, groups, N, size]
    return ((by_group @ blocks) * by_group).sum(-1).transpose(1, 2)


@dataclass
class Rounded:
    """Codes and scales on their way back from matrices to weights."""

    codes: dict[int, dict[int | None, torch.Tensor]] = field(default_factory=dict)
    scales: dict[int, dict[int | None, Parts]] = field(default_factory=dict)

    def put(
        self, batch: MatrixBatch, codes: torch.Tensor, scales: Mapping[str, torch.Tensor]
    ) -> None:
        """Take codes [B, N, padded K] and scales [B, N, ...] of a batch."""
        for index, matrix in enumerate(batch.matrices):
            for piece in matrix.pieces:
                rows = slice(piece.start, piece.stop)
                owner = id(piece.weight)
                cut = {name: part[index, rows] for name, part in scales.items()}
                self.codes.setdefault(owner, {})[piece.expert] = codes[index, rows]
                self.scales.setdefault(owner, {})[piece.expert] = cut

    def pack(self, weight: Weight) -> PackedTensor:
        """The weight's packed form; every expert must have been put."""
        store = find_format(weight.format)
        codes, scales = self.codes[id(weight)], self.scales[id(weight)]
        if None in codes:
            parts = store.pack(codes[None], scales[None], weight.options)
        else:
            order = range(weight.value.shape[0])
            stacked = {
                name: torch.stack([scales[expert][name] for expert in order]) for name in scales[0]
            }
            parts = store.pack(torch.stack([codes[e] for e in order]), stacked, weight.options)
        term = Term(weight.format, weight.options, {n: p.contiguous() for n, p in parts.items()})
        return PackedTensor(tuple(weight.value.shape), (term,), weight.transposed)
