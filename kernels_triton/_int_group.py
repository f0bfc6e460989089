"""What kernels that read bit planes share on the host: the layout of a weight, refusals, arguments.

Three kernels read `Planes`: `int_group_gemm`, `int_group_gemv` and `dequantize`, which is the only one
that takes `int_two_level` weights, too. They have the same `prepare`, so that a weight has one layout.

`int_two_level` weights are brought into the form

    w = code · scale + offset        zero:    scale = s1·s2, offset = −z·s1·s2       per group
                                     offset:  scale = s1·s2, offset = s1·o           per group
                                     row:     scale = s1,    offset = −z·s1 or o

with scale and offset in fp32. Their products have at most 20 significant bits and are exact, and so
is the sum in groups and in dialect zero; for a row with an offset it rounds once, as the format says.
Deliberately not here: how planes lie, and anything that only one of the kernels does.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional

from ..quant.errors import NoKernelError
from ..quant.formats.int_group import IntGroupOptions
from ..quant.formats.int_two_level import IntTwoLevelOptions
from ..quant.kernel import Problem, Reason
from ..quant.packed import PackedTensor, Term
from . import _planes
from ._compile import pointer
from ._planes import ALIGNED, ROWS, SPAN, WIDTHS, WORD_DTYPES, Planes
from ._triton import off_gpu

_DTYPES = (torch.float16, torch.bfloat16)
_SCALES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# Instructions of a thread that make one float of 16 bits out of a code, reading of words and pointers
# included: of main loops for sm_90, 128 rows and 4 warps, counted in what Triton 3.6 compiles.
DECODE_INSTRUCTIONS = {2: 2.1, 3: 3.6, 4: 2.3, 5: 3.6, 6: 3.4, 7: 4.6, 8: 3.7}


def foreign(problem: Problem) -> Iterator[Reason]:
    """Reasons against other devices, dtypes of x, and weights of several terms."""
    yield from off_gpu(problem)
    if problem.dtype not in _DTYPES:
        yield Reason(
            "DTYPE",
            f"multiplies float16 and bfloat16, got {str(problem.dtype).removeprefix('torch.')}",
            "load the model with dtype=torch.bfloat16",
        )
    if problem.n_terms != 1:
        yield Reason("TERMS", f"holds one term, got {problem.n_terms}", "use reference")


def refusals(problem: Problem) -> Iterator[Reason]:
    """As `foreign`, and reasons against other formats."""
    yield from foreign(problem)
    if not isinstance(problem.options, IntGroupOptions):
        yield Reason("FORMAT", f"reads int_group, got {problem.format}", "use triton_expand")


def group_of(options: IntGroupOptions | IntTwoLevelOptions) -> int:
    """Columns of a group; 0 for the whole row."""
    return 0 if options.group == "row" else int(options.group)


def padded(n: int, k: int) -> tuple[int, int]:
    """(rows, columns) that planes of a weight [n, k] have."""
    return -(-n // ROWS) * ROWS, -(-k // SPAN) * SPAN


def packed_bytes(problem: Problem) -> float:
    """Of planes, scales and zeros."""
    options: IntGroupOptions = problem.options
    rows, columns = padded(problem.n, problem.k)
    groups = columns // group_of(options) if group_of(options) else 1
    return rows * (columns * options.bits / 8 + groups * (2 if options.symmetric else 4))


# ---- layout ---------------------------------------------------------------------------------


def prepare(packed: PackedTensor, dtype: torch.dtype) -> Planes:
    """The layout of an `int_group` or `int_two_level` weight of one term, whatever the dtype of x."""
    term = packed.terms[0]
    two_levels = term.format == "int_two_level"
    if len(packed.terms) != 1 or not (two_levels or term.format == "int_group"):
        told = " + ".join(term.format for term in packed.terms)
        raise NoKernelError(f"bit planes hold one term of int_group or int_two_level, got {told}")
    (n, k), options = packed.shape, term.options
    group = group_of(options)
    n_groups = -(-k // SPAN) * (SPAN // group) + 1 if group else 1
    scale, zero = _affine(term) if two_levels else _stored(term)
    return Planes(
        planes=_planes.planes_of_codes(term.parts["codes"], options.bits),
        scale=_planes.by_group(scale, n_groups),
        zero=None if zero is None else _planes.by_group(zero, n_groups),
        n=n,
        k=k,
        bits=options.bits,
        group=group,
    )


def _stored(term: Term) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(scale, zero) [N, G] of an `int_group` weight."""
    zero = None if term.options.symmetric else term.parts["zero_group"].short()
    return term.parts["scale_group"], zero


def _affine(term: Term) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, offset), fp32 [N, G], of an `int_two_level` weight."""
    row, options = term.parts["scale_row"].float(), term.options
    shift = term.parts[options.shift_part].float()
    scale = row if options.group == "row" else row * term.parts["scale_group"].float()
    if options.dialect == "zero":
        return scale, -shift * scale
    return scale, shift if options.group == "row" else shift * row


# ---- launches -------------------------------------------------------------------------------


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] with rows that begin at multiples of 16 elements, so that one binary serves all: a
    copy, padded with zeros, only if they do not."""
    m, k = x.shape
    if k % ALIGNED:
        return functional.pad(x, (0, -k % ALIGNED))
    straight = x.stride(1) == 1 and (m == 1 or x.stride(0) % ALIGNED == 0)
    if straight and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def row_stride(x: torch.Tensor) -> int:
    """Of an aligned x: elements from row to row, a multiple of 16 for a single row, too."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def empty_result(x: torch.Tensor, n: int) -> torch.Tensor:
    """[M, N rounded up to a multiple of 16], whose first N columns are the result."""
    return x.new_empty(x.shape[0], -(-n // ALIGNED) * ALIGNED)


def result(y: torch.Tensor, n: int) -> torch.Tensor:
    """The first N columns, contiguous."""
    return y if n == y.shape[1] else y[:, :n].contiguous()


def three(planes: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """first, second, third as kernels take them; one that is not there is another."""
    return planes[0], planes[min(1, len(planes) - 1)], planes[-1]


# ---- compilation ----------------------------------------------------------------------------

SIZES = ("m", "k", "rows", "spans", "stride_x", "stride_y", "split", "per_split")  # arguments, i32


def plane_types(bits: int) -> dict[str, str]:
    """Types of the arguments first, second and third, as launches give them."""
    widths = WIDTHS[bits]
    used = (widths[0], widths[min(1, len(widths) - 1)], widths[-1])
    names = ("first", "second", "third")
    return {name: pointer(WORD_DTYPES[width]) for name, width in zip(names, used, strict=True)}


def weight_types(options: IntGroupOptions) -> dict[str, str]:
    """Types of the arguments first, second, third, scale and zero, as launches give them."""
    scale = pointer(_SCALES[options.scale])
    zero = scale if options.symmetric else pointer(torch.int16)
    return plane_types(options.bits) | {"scale": scale, "zero": zero}


def weight_constants(options: IntGroupOptions) -> dict[str, object]:
    """BITS, GROUP, ZERO and PTX, as launches give them."""
    return {
        "BITS": options.bits,
        "GROUP": group_of(options),
        "ZERO": not options.symmetric,
        "PTX": True,
    }
