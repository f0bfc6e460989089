"""Products with `fle4` and `fle3` weights on the CPU: decoded at every call, and not kept.

    stored parts  →  W [N, K] bf16 in a scratch buffer  →  torch's product of two dense matrices

W is made as a dense weight lies in memory, with every bit of the original and all of its rows, so that
the library does with it what it does with the original: y is `functional.linear(x, W)` bit for bit,
whatever M is. Rows are not multiplied in blocks, as `dense_chunked` does: the library sums some shapes
in another order than others.

The buffer belongs to the thread, grows to the largest weight that the thread multiplies by, and lives
as long as the thread: a layer has no memory of its own but its parts. Models of other dtypes than bf16
get a copy in theirs for the time of the product.

Measured on one core with AVX-512 for N = K = 4096, in milliseconds, four weights in turn:

    rows of x     1     64    512        decoding alone: fle4 2.8, fle3 4.0
    dense       2.5    4.6   17.6
    fle4        6.1    7.6   19.2
    fle3        6.5    7.7   20.0

Without a C compiler the torch form decodes, in 145 and 225 ms, with temporary copies of a weight.
Deliberately not here: products that decode as they go, which sum in an order of their own.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from . import cpu
from .errors import NoKernelError
from .format import find_format
from .formats.fle import Fle, FleOptions
from .kernel import Kernel, Problem, Reason
from .packed import PackedTensor

_DECODE_BYTES = 15e9  # read and written a second, one core; the product's speed is `cpu`'s
_BITS = {"fle4": 12.1, "fle3": 11.3}  # stored for each weight


@dataclass(frozen=True, eq=False)
class FleLayout:
    """Stored parts of one matrix [n, k], not copied."""

    form: Fle
    parts: Mapping[str, torch.Tensor]
    n: int
    k: int


class Scratch(threading.local):
    """One bf16 buffer for each thread."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.bfloat16)

    def matrix(self, n: int, k: int) -> torch.Tensor:
        """[n, k], contiguous, holding anything; what was handed out before is overwritten."""
        if self.buffer.numel() < n * k:
            self.buffer = self.buffer.new_empty(0)  # not both at once
            with torch.inference_mode(False):  # so that it can be written outside of it as well
                self.buffer = torch.empty(n * k, dtype=torch.bfloat16)
        return self.buffer[: n * k].view(n, k)


SCRATCH = Scratch()


def _refuse(problem: Problem) -> tuple[Reason, ...]:
    reasons = list(cpu.off_cpu(problem))
    if not isinstance(problem.options, FleOptions):
        text = f"reads fle4 and fle3, got {problem.format}"
        reasons.append(Reason("FORMAT", text, "use dense_chunked"))
    if problem.n_terms != 1:
        text = f"holds one term, got {problem.n_terms}"
        reasons.append(Reason("TERMS", text, "store the weight as one term"))
    return tuple(reasons)


def _prepare(packed: PackedTensor, dtype: torch.dtype) -> FleLayout:
    term = packed.terms[0]
    form = find_format(term.format)
    if len(packed.terms) != 1 or not isinstance(form, Fle) or len(packed.shape) != 2:
        told = " + ".join(term.format for term in packed.terms)
        raise NoKernelError(
            f"fle_scratch multiplies by one term of fle4 or fle3 of a weight [N, K], got {told} "
            f"{list(packed.shape)}; use dense_chunked"
        )
    return FleLayout(form, term.parts, *packed.shape)


def _launch(x: torch.Tensor, layout: FleLayout) -> torch.Tensor:
    product = torch.compiler.disable(_product) if torch.compiler.is_compiling() else _product
    return product(x, layout)


def _product(x: torch.Tensor, layout: FleLayout) -> torch.Tensor:
    weight = SCRATCH.matrix(layout.n, layout.k)
    layout.form.decode_into(layout.parts, weight)
    return functional.linear(x, weight.to(x.dtype))


def _seconds(problem: Problem) -> float:
    stored = _BITS.get(problem.format, 16.0) / 8
    moved = problem.n * problem.k * (stored + torch.bfloat16.itemsize)
    return moved / _DECODE_BYTES + cpu.seconds_dense(problem)


KERNELS = (Kernel("fle_scratch", _refuse, _prepare, _launch, _seconds),)
