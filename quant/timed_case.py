"""A product to be timed or verified: weights, inputs, layouts and the expected result, on any device.

    Weights   one family: enough different weights that none is in cache when its turn comes again
    Case      one bucket of M of it: x, and what the reference says of x times the first weight

Weights are real: normal values, fitted, rounded and packed by their format. Up to 256 rows are made
that way, and each row of the weight is one of them, drawn at random: codes are spread as those of a
trained weight, a wrong order of rows shows, and it takes no time at any size. Zeros would cut a GPU's
power and raise its clock.

    copies = ceil(3 · L2 / stored bytes)     so that the rotation passes 3 · L2

Verification: |y − ŷ| / |ŷ| in norms, ŷ in fp32 from the same codes, must be within 2e-3 for fp16 and
8e-3 for bf16. One wrong row or column among thousands hardly shows in that, so that each one's error is
compared with the mean norm of its kind, within ten times as much. A kernel that rounds x itself to
integers must equal `reference.linear` bit by bit.

Deliberately not here: clocks. Attention and ops on rows are refused by name.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from . import reference
from .activation import find_activation, integer_form
from .dispatch import kernels
from .errors import NoKernelError, TuningError, nearest_name
from .format import find_format
from .formats.fle import Fle, to_fle
from .kernel import AnyProblem, Kernel, Problem
from .packed import PackedTensor, Term
from .runner import launch_of
from .timing import Candidate, Fault

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
_LINE_TIMES = 10  # by which one row or column may be worse than all: they are smaller samples
_L2_TIMES = 3  # passed by one rotation
_MOST_COPIES = 512  # of weights that are too small to matter
_REAL_ROWS = 256
_WEIGHT_STD = 0.02


def copies_of(weight_bytes: int, l2_bytes: int | None) -> int:
    """Weights in a rotation; one where the size of the cache is not known."""
    wanted = math.ceil(_L2_TIMES * (l2_bytes or 0) / max(weight_bytes, 1))
    return min(max(wanted, 1), _MOST_COPIES)


def timed_problem(problem: AnyProblem) -> Problem:
    """The problem itself if it is a product; TuningError names the op otherwise."""
    if not isinstance(problem, Problem):
        raise TuningError(
            f"op {problem.op!r} cannot be timed yet, only 'linear': leave {problem} to estimates"
        )
    return problem


def random_weight(
    problem: Problem, generator: torch.Generator, device: torch.device
) -> PackedTensor:
    """A weight [N, K] of the problem's format; see the module's text."""
    stored, options, shape = find_format(problem.format), problem.options, (problem.n, problem.k)
    if isinstance(stored, Fle):  # rounds nothing
        dense = _WEIGHT_STD * torch.randn(shape, device=device, generator=generator)
        return to_fle(dense.bfloat16(), stored.code_bits)
    n_real = min(problem.n, _REAL_ROWS)
    specs = stored.part_specs(shape, options)
    if any(spec.shape[0] != problem.n for spec in specs.values()):
        n_real = problem.n  # parts that are not row by row
    terms = []
    for _ in range(problem.n_terms):
        values = _WEIGHT_STD * torch.randn(
            n_real, problem.k, device=device, generator=generator, dtype=torch.float32
        )
        padding = stored.padded_k(problem.k, options) - problem.k
        values = functional.pad(values, (0, padding))
        scales = stored.fit(values, options)
        codes, _rounded = stored.round(values, scales, 0, options)
        parts = stored.pack(codes, scales, options)
        if n_real < problem.n:
            drawn = torch.randint(n_real, (problem.n,), device=device, generator=generator)
            parts = {name: part[drawn] for name, part in parts.items()}
        terms.append(Term(problem.format, options, parts))
    return PackedTensor(shape, tuple(terms))


def find_kernel(name: str) -> Kernel:
    """The kernel called `name`, or a NoKernelError that names the nearest."""
    known = kernels()
    if name not in known:
        raise NoKernelError(f"{name!r} names no kernel{nearest_name(name, known)}")
    return known[name]


class Weights:
    """Weights of one family, and what kernels derived from them."""

    def __init__(self, problem: Problem, device: torch.device, l2_bytes: int | None) -> None:
        generator = torch.Generator(device).manual_seed(0)
        first = random_weight(problem, generator, device)
        n_copies = copies_of(first.n_bytes, l2_bytes)
        others = (random_weight(problem, generator, device) for _ in range(n_copies - 1))
        self.family = problem.family
        self.packed = (first, *others)
        self._layouts: dict[tuple[str, torch.dtype], tuple[Any, ...]] = {}

    def layouts(self, kernel: Kernel, dtype: torch.dtype) -> tuple[Any, ...]:
        """The kernel's layout of each weight."""
        key = (kernel.name, dtype)
        if key not in self._layouts:
            with torch.no_grad():
                made = tuple(kernel.prepare(packed, dtype) for packed in self.packed)
            self._layouts[key] = made
        return self._layouts[key]


class Case:
    """One bucket of M: x [M, K], normal, and results to compare with."""

    def __init__(self, problem: Problem, weights: Weights, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(1)
        x = torch.randn(problem.m_bucket, problem.k, device=device, generator=generator)
        self.problem = problem
        self.x = x.to(problem.dtype)
        self._weights = weights
        self._exact: torch.Tensor | None = None
        self._near: torch.Tensor | None = None

    def calls(self, candidate: Candidate) -> list[Callable[[], torch.Tensor]]:
        """A call without arguments for each weight of the rotation."""
        kernel = find_kernel(candidate.kernel)
        launch = launch_of(kernel, candidate.config, self.problem.activation)
        layouts = self._weights.layouts(kernel, self.problem.dtype)

        def call(layout: Any) -> Callable[[], torch.Tensor]:
            return lambda: launch(self.x, layout)

        return [call(layout) for layout in layouts]

    def verify(self, candidate: Candidate) -> float:
        """Relative error of the candidate's result on the first weight; Fault if it is WRONG."""
        y = self.calls(candidate)[0]()
        wanted = (self.problem.m_bucket, self.problem.n)
        if tuple(y.shape) != wanted or y.dtype != self.problem.dtype:
            text = f"y must be {self.problem.dtype} {list(wanted)}, got {y.dtype} {list(y.shape)}"
            raise Fault(candidate, "WRONG", text)
        if self._is_exact(find_kernel(candidate.kernel)):
            n_wrong = int((y != self._exactly()).sum())
            if n_wrong:
                text = f"{n_wrong} of {y.numel()} results differ from the integer reference"
                raise Fault(candidate, "WRONG", text)
            return 0.0
        error, bound = relative_error(y, self._nearly()), TOLERANCE[self.problem.dtype]
        if not error <= bound:  # NaN is wrong too
            raise Fault(candidate, "WRONG", f"relative error must be <= {bound:g}, got {error:.2e}")
        worst = worst_line_error(y, self._nearly())
        if worst > _LINE_TIMES * bound:
            text = f"of a row or column must be <= {_LINE_TIMES * bound:g}, got {worst:.2e}"
            raise Fault(candidate, "WRONG", f"relative error {text}")
        return error

    def _is_exact(self, kernel: Kernel) -> bool:
        """Does the kernel promise the integer reference's bits?"""
        packed = self._weights.packed[0]
        return kernel.activation is not None and integer_form(packed) is not None

    def _exactly(self) -> torch.Tensor:
        if self._exact is None:
            packed = self._weights.packed[0]
            self._exact = reference.linear(self.x, packed, self.problem.activation)
        return self._exact

    def _nearly(self) -> torch.Tensor:
        """ŷ fp32 [M, N] from what kernels are given: x, or x̂ in the dtype of x."""
        if self._near is None:
            x = self.x
            if self.problem.activation is not None:
                x = find_activation(self.problem.activation).round(x).decode(x.dtype)
            weight = reference.dense(self._weights.packed[0], torch.float32)
            self._near = functional.linear(x.float(), weight)
        return self._near


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """|y − expected| / |expected| in norms, summed in fp64; 0 where both are 0."""
    wrong = torch.linalg.vector_norm(y.double() - expected.double()).item()
    size = torch.linalg.vector_norm(expected.double()).item()
    return wrong / size if size else wrong


def worst_line_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """The greatest |y − expected| of a row or a column of [M, N], over the root mean square of
    |expected| of a row or a column; 0 where expected is 0."""
    wrong = (y.double() - expected.double()).square_()
    mean = expected.double().square_().mean().item()
    if not mean:
        return 0.0
    worst = max(wrong.mean(dim).max().item() for dim in (0, 1))
    return math.sqrt(worst / mean)
