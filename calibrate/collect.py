"""Collects the second moments of the activations that a block's weights multiply.

    H = Σ x xᵀ / tokens        fp32 [K, K], one for each distinct input of the block

A block is cut into *stages* in the order of execution (q|k|v, then o, then gate|up, then down): the
statistics of a stage are taken after the weights of the earlier ones were rounded, so each stage
repairs what the ones before it did. A stage's run of the block ends as soon as a later stage begins.

Experts get their statistics one by one, over the tokens that the router sent them; when the H of all
experts exceed `MAX_STAGE_BYTES`, their stage is split and the block is run again for each part.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from .matrices import expert_key
from .protocol import Moments
from .structure import Structure
from .uses import Use, WatchWeights

MAX_STAGE_BYTES = 2 << 30


@dataclass(frozen=True)
class Operand:
    """A graph parameter that multiplies activations in this block.

    parameter: graph name. input_key: parameters with the same key multiply the same tensor.
    shape: as the graph holds it. transposed: the graph holds [.., K, N].
    """

    parameter: str
    input_key: str
    shape: tuple[int, ...]
    transposed: bool

    @property
    def k(self) -> int:
        """Size of the axis that is summed over."""
        return self.shape[-2] if self.transposed else self.shape[-1]


@dataclass(frozen=True)
class Stage:
    """Operands whose statistics are taken in one run. experts: range of a fused parameter's experts,
    None for plain matrices."""

    operands: tuple[Operand, ...]
    experts: range | None = None

    def later(self, others: Sequence["Stage"]) -> frozenset[str]:
        """Parameters of `others` (the stages that follow) whose use shows that this one is over.

        Experts run one by one through all their stages, so inside them nothing shows the end.
        """
        return frozenset(
            operand.parameter
            for stage in others
            for operand in stage.operands
            if self.experts is None or stage.experts is None
        )


def operands(structure: Structure, parameters: Mapping[str, torch.Tensor]) -> list[Operand]:
    """The block's operands, in order of first use."""
    return [
        Operand(
            use.parameter, use.input_key, tuple(parameters[use.parameter].shape), use.transposed
        )
        for use in structure.uses
    ]


def stages(
    operands: Sequence[Operand],
    stored_fused: frozenset[str] = frozenset(),
    whole_block: bool = False,
) -> Iterator[Stage]:
    """Operands of one input together, in order of use; experts in parts that fit the memory bound.

    stored_fused: parameters whose experts are one source tensor; they are rounded in one piece.
    whole_block: all plain matrices in one stage (one run of the block instead of several).
    """
    by_key: dict[str, list[Operand]] = {}
    for operand in operands:
        key = "" if whole_block and len(operand.shape) == 2 else operand.input_key
        by_key.setdefault(key, []).append(operand)
    for members in by_key.values():
        if len(members[0].shape) == 2:
            yield Stage(tuple(members))
            continue
        n_experts = members[0].shape[0]
        step = max(1, MAX_STAGE_BYTES // (4 * members[0].k ** 2))
        if any(operand.parameter in stored_fused for operand in members):
            step = n_experts
        for start in range(0, n_experts, step):
            yield Stage(tuple(members), range(start, min(start + step, n_experts)))


class _StageDone(Exception):
    """Raised inside a block's run when nothing more can be learnt for this stage."""


class MomentSums:
    """Running sums of x xᵀ for the inputs of one stage."""

    def __init__(self, stage: Stage, later: frozenset[str]) -> None:
        owners: dict[str, str] = {}  # the first parameter of an input counts for all
        for operand in stage.operands:
            owners.setdefault(operand.input_key, operand.parameter)
        self._keys = {parameter: key for key, parameter in owners.items()}
        self._experts = stage.experts
        self._later = later
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}

    def watch(self, parameters: Mapping[str, torch.Tensor], run: Callable[[], object]) -> None:
        """Add one batch: run the block until a later stage begins."""
        try:
            with WatchWeights(parameters, self._add):
                run()
        except _StageDone:
            pass

    def _add(self, use: Use, x: torch.Tensor) -> None:
        if use.parameter in self._later:
            raise _StageDone
        key = self._keys.get(use.parameter)
        if key is None:
            return
        if use.expert is not None:
            if self._experts is None or use.expert not in self._experts:
                return
            key = expert_key(key, use.expert)
        rows = x.reshape(-1, x.shape[-1]).float()
        if key not in self._sums:
            self._sums[key] = rows.new_zeros(rows.shape[-1], rows.shape[-1])
        self._sums[key].addmm_(rows.mT, rows)
        self._tokens[key] = self._tokens.get(key, 0) + rows.shape[0]

    def moments(self) -> dict[str, Moments]:
        """The finished statistics, by input key."""
        return {
            key: Moments(total / max(self._tokens[key], 1), self._tokens[key])
            for key, total in self._sums.items()
        }
