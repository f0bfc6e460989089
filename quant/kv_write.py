"""How keys and values are written into pages: rotate, encode, store, in plain torch.

    position p of row b → page table[b, p // 64], slot p % 64

Rotary embedding, where the model leaves it to the cache, is the library's: each product and the sum
rounded to the dtype of the keys,

    x'[c] = x[c]·cos[c] + s(c)·x[c̄]·sin[c]        c < R, the rest as it is

    style "half"    c̄ = c ± R/2 (the other half)     s = −1 in the first half, else 1
    style "pairs"   c̄ = c ^ 1 (the neighbour)        s = −1 for even c, else 1

It takes every page format and device, and is the oracle of kernels that do the same at once (op
"append_kv"). Deliberately not here: which pages exist and who owns them (`kv_pages.py`).
"""

from dataclasses import dataclass
from typing import Any

import torch

from .errors import FewbitError, NoKernelError
from .kernel import Kernel, Reason, RowsProblem
from .kv_view import Paged
from .packed import PackedTensor
from .page_format import find_page_format

PAGE = 64  # tokens
STYLES = ("half", "pairs")


@dataclass(frozen=True)
class AppendOptions:
    """Facts of an op "append_kv": formats of pages with their frozen options, heads and channels.

    rope: a style, or "none" if keys come rotated. rotary_dim: R, 0 without. Rows of the problem are
    tokens, its K is the numbers of one, heads·(head_dim + value_dim).
    """

    key: str
    key_options: Any
    value: str
    value_options: Any
    kv_heads: int
    head_dim: int
    value_dim: int
    rope: str = "none"
    rotary_dim: int = 0


@dataclass(frozen=True, eq=False)
class Rope:
    """Tables cos and sin [B or 1, n, R] for the n new tokens, and the style of the rotation."""

    cos: torch.Tensor
    sin: torch.Tensor
    style: str = "half"

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise FewbitError(f"a rotation's style must be one of {STYLES}, got {self.style!r}")
        if self.cos.shape != self.sin.shape or self.cos.dim() != 3 or self.cos.shape[-1] % 2:
            raise FewbitError(
                f"rotation tables must be two [batch or 1, tokens, even], got "
                f"{list(self.cos.shape)} and {list(self.sin.shape)}"
            )


def rotate(keys: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Keys [B, heads, n, D] with their first R channels rotated, in their dtype."""
    cos, sin = (table.to(keys.dtype).unsqueeze(1) for table in (rope.cos, rope.sin))
    size = cos.shape[-1]
    x, rest = keys[..., :size], keys[..., size:]
    if rope.style == "half":
        partner = torch.cat((-x[..., size // 2 :], x[..., : size // 2]), dim=-1)
    else:
        partner = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return torch.cat((x * cos + partner * sin, rest), dim=-1)


def append(
    pages: Paged,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: int | torch.Tensor,
    rope: Rope | None = None,
) -> None:
    """Store keys and values [B, heads, n, D] at positions `first` … first + n − 1 of each row.

    first: one number for all rows, or int64 [B] or [1] on the device. The table must have pages there.
    """
    if rope is not None:
        keys = rotate(keys, rope)
    start = first.view(-1, 1) if isinstance(first, torch.Tensor) else first
    positions = start + torch.arange(keys.shape[2], device=keys.device).unsqueeze(0)
    rows = torch.arange(keys.shape[0], device=keys.device).unsqueeze(1)
    at = pages.table[rows, positions // PAGE], positions % PAGE
    sides = ((pages.key, pages.keys, keys), (pages.value, pages.values, values))
    for use, parts, vectors in sides:
        for name, part in find_page_format(use.format).encode(vectors, use.options).items():
            parts[name][at[0], :, at[1]] = part.transpose(1, 2)


# ---- as a kernel ----------------------------------------------------------------------------

_TOUCHES = 80  # bytes that a number moves while it is encoded, as counted from the code
_CALLS = 60  # operators of torch
_CALL_SECONDS = 5e-6  # of one, launched from Python (a guess)


def _refuse(problem: RowsProblem) -> tuple[Reason, ...]:
    return ()


def _prepare(packed: PackedTensor, dtype: torch.dtype) -> None:
    raise NoKernelError("append_torch writes into a cache; there is no weight to prepare")


def _seconds(problem: RowsProblem) -> float:
    """By memory alone; 1 s where the machine's rates are not known."""
    bandwidth = problem.machine.bandwidth_bytes_per_second if problem.machine else None
    if bandwidth is None:
        return 1.0
    return problem.m_bucket * problem.k * _TOUCHES / bandwidth + _CALLS * _CALL_SECONDS


KERNEL = Kernel(
    name="append_torch",
    refuse=_refuse,
    prepare=_prepare,
    launch=append,
    seconds=_seconds,
    priority=-1,
    op="append_kv",
)
