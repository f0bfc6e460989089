"""Orthogonal transforms by Hadamard matrices of the orders that real models have.

    v ← v·Q along the last axis, block by block      Q = diag(signs)·H / √order,   H·Hᵀ = order·I

H has entries ±1 and is a Kronecker product of small known matrices, so that a transform costs
a few small matrix products instead of one of `order` columns (4864 = 76·64: 140 multiplications a
value, not 4864).

**What H is** (a stored `{"op": "hadamard", "order": n, "seed": s}` means exactly this, forever):

    H = H_b1 ⊗ H_b2 ⊗ … ⊗ S ⊗ … ⊗ S       n = b1·b2·…·2^k,  b1 ≤ b2 ≤ …,  S = [[1, 1], [1, −1]]

The odd part of n is split into factors ≥ 3; a factor o gets the smallest b = o·2^j, j ≥ 2, up to
2048 with a construction of its own, the first of these that exists:
  paley I     b − 1 = q, a prime power:          [[1, 1ᵀ], [−1, I + χ(x_i − x_j)]]
  paley II    b/2 − 1 = q ≡ 1 mod 4, likewise:   C ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]],
              C = [[0, 1ᵀ], [1, χ(x_i − x_j)]]
  williamson  b = 92, 116, 156, 172:             [[A, B, C, D], [−B, A, −D, C], [−C, D, A, −B],
              [−D, −C, B, A]] of symmetric circulants
χ is the quadratic character of GF(q): 0 of 0, 1 of squares, −1 else. Element x_i of GF(p^k) is the
polynomial whose coefficients are i's base-p digits, lowest first, modulo t^k + the first such
polynomial that leaves a field. Of all splits that n has enough twos for, the one with the least
Σ (b + 100) is taken, then the lexicographically smallest: a further pass over the data costs as
much as 100 more columns (measured on one CPU core).

**Signs.** Bit i % 64 of word i // 64 of the SplitMix64 sequence seeded with `seed`; a set bit is −1.
Integer arithmetic only, the same in every version of torch. Without a seed there are none.

fp32 is exact to a few ulp; bf16 and fp16 are computed in fp32 and rounded once; fp64 stays fp64.
What this module does not do: choose where to rotate (passes do), integer inputs, or resist autocast,
which lowers matrix products by its owner's wish.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod
from typing import Any

import torch

from .errors import FormatError, nearest_name

_MAX_BASE = 2048  # a larger base would cost as much as the dense product it replaces
_MAX_ORDER = 1 << 24
_PASS = 100  # columns that cost as much as a pass over the data; part of the definition of H
_SIGNS_PASS = 80  # likewise, for the multiplication by the signs; speed only
_MASK64 = (1 << 64) - 1
# Signs of A, B, C, D's first rows from the diagonal on, bit i set for −1 at distances i and −i
# (Williamson, Baumert, Golomb, Hall).
_WILLIAMSON = {
    23: (0x5DC, 0x192, 0x538, 0xE88),
    29: (0x6B38, 0xB3A, 0xE90, 0x116C),
    39: (0xCDF58, 0xDAE98, 0xAF370, 0x47D4E),
    43: (0x3CDA1C, 0x342B28, 0x135E04, 0x2450CE),
}
_KEYS = ("op", "order", "seed")


@dataclass(frozen=True)
class Hadamard:
    """v ← v·Q along the last axis, Q = blockdiag of diag(signs)·H_order/√order.

    order: 1, 2 or a multiple of 4 that `supported` knows; FormatError otherwise.
    seed: 0 … 2^63−1 draws the signs; None leaves them out.
    """

    order: int
    seed: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.order, bool) or not isinstance(self.order, int) or self.order < 1:
            raise FormatError(f"a Hadamard order must be a whole number ≥ 1, got {self.order!r}")
        if self.seed is not None and not _is_seed(self.seed):
            raise FormatError(f"a Hadamard seed must be 0 to 2^63-1 or none, got {self.seed!r}")
        if not supported(self.order):
            raise FormatError(_refusal(self.order))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x·Q: x floating [..., K], K a multiple of `order`; same shape and dtype come back."""
        return self._transform(x, transposed=False)

    def apply_transposed(self, x: torch.Tensor) -> torch.Tensor:
        """x·Qᵀ, the inverse of `apply`; same shapes and dtypes."""
        return self._transform(x, transposed=True)

    def matrix(self) -> torch.Tensor:
        """Q, fp64 [order, order], on the CPU."""
        signs = self.signs().double().unsqueeze(-1)
        return hadamard_matrix(self.order).double().mul_(signs).div_(self.order**0.5)

    def signs(self) -> torch.Tensor:
        """diag(signs), int8 [order] of ±1, on the CPU; all 1 without a seed."""
        if self.seed is None:
            return torch.ones(self.order, dtype=torch.int8, device="cpu")
        return 1 - 2 * sign_bits(self.seed, self.order)

    def to_json(self) -> dict[str, Any]:
        """The stored form, `{"op": "hadamard", "order": 768, "seed": 7}`."""
        stored: dict[str, Any] = {"op": "hadamard", "order": self.order}
        return stored if self.seed is None else stored | {"seed": self.seed}

    @staticmethod
    def parse(stored: Mapping[str, Any]) -> "Hadamard":
        """Inverse of `to_json`; FormatError on a foreign op, unknown keys or bad values."""
        for key in stored:
            if key not in _KEYS:
                hint = nearest_name(str(key), _KEYS)
                raise FormatError(f"hadamard: unknown key {key!r}{hint}; allowed: op, order, seed")
        if stored.get("op") != "hadamard":
            raise FormatError(f"hadamard: op must be 'hadamard', got {stored.get('op')!r}")
        if "order" not in stored:
            raise FormatError(f"hadamard: order is missing, got {dict(stored)!r}; write it down")
        return Hadamard(stored["order"], stored.get("seed"))

    def _check(self, x: torch.Tensor) -> None:
        if not x.is_floating_point() or x.element_size() < 2:
            raise FormatError(
                f"hadamard {self.order} transforms fp64, fp32, bf16 or fp16, got {x.dtype}; "
                "dequantize first"
            )
        if not x.dim() or x.shape[-1] % self.order:
            raise FormatError(
                f"hadamard {self.order} needs a last axis that is a multiple of {self.order}, "
                f"got {list(x.shape)}; largest_order tells one that fits"
            )

    def _transform(self, x: torch.Tensor, transposed: bool) -> torch.Tensor:
        self._check(x)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = x.reshape(-1, self.order)
        if len(_groups(self.order)) < 2:
            product = rows.to(dtype) @ _whole_operand(self, transposed, dtype, x.device)
        elif transposed:
            product = _multiply(rows.to(dtype), self.order, transposed)
            product.mul_(_scaled_signs(self, dtype, x.device))
        else:
            scaled = rows * _scaled_signs(self, dtype, x.device)
            product = _multiply(scaled, self.order, transposed)
        return product.to(x.dtype).view(x.shape)


@lru_cache(maxsize=4096)
def supported(order: int) -> bool:
    """Whether `Hadamard(order)` can be built."""
    return 1 <= order <= _MAX_ORDER and _factors(order) is not None


def largest_order(n: int) -> int:
    """n itself if it is `supported`, else its largest supported divisor (≥ 1), for block use."""
    if n < 1:
        raise FormatError(f"a Hadamard order must be a whole number ≥ 1, got {n!r}")
    divisors = [d for low in range(1, int(n**0.5) + 2) if n % low == 0 for d in (low, n // low)]
    return max(d for d in divisors if supported(d))


def hadamard_matrix(order: int) -> torch.Tensor:
    """H without signs or scale: int8 [order, order] of ±1, on the CPU. FormatError if unknown."""
    factors = _factors(order) if supported(order) else None
    if factors is None:
        raise FormatError(_refusal(order))
    return _kronecker(factors)


def two_factors(order: int, most: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(left, right), int8 and on the CPU, whose Kronecker product is H, both at most `most` × `most`;
    None if no cut of H's own product is so. The smallest sum of their sizes as powers of two wins."""
    factors = _factors(order) if supported(order) else None
    if factors is None:
        raise FormatError(_refusal(order))
    cuts = [(prod(factors[:at]), prod(factors[at:]), at) for at in range(len(factors) + 1)]
    sums = [(_power_above(a) + _power_above(b), at) for a, b, at in cuts if max(a, b) <= most]
    if not sums:
        return None
    _, at = min(sums)
    return _kronecker(factors[:at]), _kronecker(factors[at:])


def _power_above(size: int) -> int:
    return 1 << (size - 1).bit_length()


def sign_bits(seed: int, count: int) -> torch.Tensor:
    """First `count` bits of SplitMix64 from `seed`, least significant first: int8 [count] of 0, 1."""
    stream = bytearray()
    for word in range(1, -(-count // 64) + 1):
        z = (seed + word * 0x9E3779B97F4A7C15) & _MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        stream += (z ^ (z >> 31)).to_bytes(8, "little")
    as_bytes = torch.tensor(list(stream), dtype=torch.uint8, device="cpu")
    shifts = torch.arange(8, dtype=torch.uint8, device="cpu")
    return ((as_bytes.unsqueeze(-1) >> shifts) & 1).flatten()[:count].to(torch.int8)


def _is_seed(seed: object) -> bool:
    return isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 1 << 63


def _refusal(order: int) -> str:
    """Why there is no H of this order, the nearest that there are, and the way out."""
    if order > _MAX_ORDER:
        return f"hadamard order {order} is above the largest allowed, {_MAX_ORDER}"
    reason = "has no known construction here"
    if order % 4:
        reason = "does not exist: orders above 2 are multiples of 4"
    below = next(near for near in range(order - 1, 0, -1) if supported(near))
    above = next((near for near in range(order + 1, _MAX_ORDER + 1) if supported(near)), below)
    return (
        f"hadamard order {order} {reason}; the nearest are {below} and {above}. Use blocks of "
        f"order {largest_order(order)}, the largest that divides {order}, or pad to {above}"
    )


# ---- products ------------------------------------------------------------------------------------


def _multiply(rows: torch.Tensor, order: int, transposed: bool) -> torch.Tensor:
    """rows [R, order] times H, or Hᵀ: one small product for each group of Kronecker factors."""
    after = order
    for group in _groups(order):
        size = prod(group)
        after //= size
        # rows[r, i, a] → Σ_i H[i, j]·rows[r, i, a]: a product from the left by Hᵀ
        left = _operand(group, transposed, rows.dtype, rows.device)
        if after == 1:
            rows = rows.reshape(-1, size) @ left.mT
        else:
            rows = torch.matmul(left, rows.reshape(-1, size, after))
    return rows.reshape(-1, order)


@lru_cache(maxsize=4096)
def _groups(order: int) -> tuple[tuple[int, ...], ...]:
    """Kronecker factors of `order`, neighbours multiplied out where that saves passes.

    A single product takes the signs and the scale along, which saves their pass.
    """
    factors = _factors(order) or ()
    best: list[tuple[int, tuple[tuple[int, ...], ...]]] = [(0, ())]
    for stop in range(1, len(factors) + 1):
        options = [
            (cost + prod(factors[start:stop]) + _PASS, (*groups, factors[start:stop]))
            for start, (cost, groups) in enumerate(best)
        ]
        best.append(min(options))
    if len(factors) > 1 and prod(factors) + _PASS - _SIGNS_PASS <= best[-1][0]:
        return (factors,)
    return best[-1][1]


@lru_cache(maxsize=64)
def _operand(
    group: tuple[int, ...], transposed: bool, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    with torch.inference_mode(False):  # a cached inference tensor would break later training
        matrix = _kronecker(group)
        return (matrix if transposed else matrix.T).to(device, dtype).contiguous()


@lru_cache(maxsize=64)
def _whole_operand(
    transform: Hadamard, transposed: bool, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    with torch.inference_mode(False):
        matrix = transform.matrix()
        return (matrix.T if transposed else matrix).to(device, dtype).contiguous()


@lru_cache(maxsize=64)
def _scaled_signs(transform: Hadamard, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return (transform.signs().double() * transform.order**-0.5).to(device, dtype)


def _kronecker(factors: tuple[int, ...]) -> torch.Tensor:
    """int8 Kronecker product of the matrices of these elementary orders."""
    product = torch.ones(1, 1, dtype=torch.int8, device="cpu")
    for factor in factors:
        product = torch.kron(product, _elementary(factor))
    return product


# ---- which matrices ------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _factors(order: int) -> tuple[int, ...] | None:
    """Elementary orders (b1, b2, …, 2, 2, …) whose product is `order`; None if there are none."""
    odd = order // (order & -order)
    found: list[tuple[int, tuple[int, ...]]] = []
    for split in _odd_splits(odd, 3):
        bases = [_base(factor) for factor in split]
        known = tuple(sorted(base for base in bases if base))
        if len(known) == len(bases) and order % prod(known) == 0:
            found.append((sum(base + _PASS for base in known), known))
    if not found:
        return None
    _, cheapest = min(found)
    return (*cheapest, *[2] * ((order // prod(cheapest)).bit_length() - 1))


def _odd_splits(odd: int, smallest: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `odd` as a product of rising odd factors that a base could have."""
    if odd == 1:
        yield ()
    for factor in range(smallest, min(odd, _MAX_BASE // 4) + 1, 2):
        if odd % factor == 0:
            for rest in _odd_splits(odd // factor, factor):
                yield (factor, *rest)


@cache
def _base(odd: int) -> int | None:
    """The smallest order odd·2^j, j ≥ 2, that has a construction of its own."""
    order = 4 * odd
    while order <= _MAX_BASE:
        if _prime_power(order - 1) or _is_paley_two(order) or order // 4 in _WILLIAMSON:
            return order
        order *= 2
    return None


def _is_paley_two(order: int) -> bool:
    return order % 8 == 4 and _prime_power(order // 2 - 1) is not None  # order/2 − 1 ≡ 1 mod 4


@lru_cache(maxsize=64)
def _elementary(order: int) -> torch.Tensor:
    """H of order 2 or of a base, int8."""
    with torch.inference_mode(False):
        if order == 2:
            return _int8([[1, 1], [1, -1]])
        if _prime_power(order - 1):
            return _paley_one(order - 1)
        if _is_paley_two(order):
            return _paley_two(order // 2 - 1)
        return _williamson(order // 4)


def _paley_one(q: int) -> torch.Tensor:
    matrix = torch.ones(q + 1, q + 1, dtype=torch.int8, device="cpu")
    matrix[1:, 0] = -1
    matrix[1:, 1:] = _difference_character(q)
    matrix[1:, 1:].diagonal().fill_(1)
    return matrix


def _paley_two(q: int) -> torch.Tensor:
    conference = torch.ones(q + 1, q + 1, dtype=torch.int8, device="cpu")
    conference[1:, 1:] = _difference_character(q)
    conference[0, 0] = 0
    identity = torch.eye(q + 1, dtype=torch.int8, device="cpu")
    return torch.kron(conference, _int8([[1, 1], [1, -1]])) + torch.kron(
        identity, _int8([[1, -1], [-1, -1]])
    )


def _williamson(n: int) -> torch.Tensor:
    index = torch.arange(n, device="cpu")
    distance = (index.unsqueeze(0) - index.unsqueeze(1)).remainder(n)
    distance = torch.minimum(distance, n - distance)
    a, b, c, d = ((1 - 2 * ((bits >> distance) & 1)).to(torch.int8) for bits in _WILLIAMSON[n])
    blocks = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, dim=1) for row in blocks])


def _int8(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int8, device="cpu")


# ---- finite fields -------------------------------------------------------------------------------


@cache
def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with p an odd prime and q = p^k, or None."""
    prime = next((p for p in range(3, int(q**0.5) + 1, 2) if q % p == 0), q)
    exponent, rest = 0, q
    while rest % prime == 0 and rest > 1:
        rest, exponent = rest // prime, exponent + 1
    return (prime, exponent) if q % 2 and rest == 1 and exponent else None


def _difference_character(q: int) -> torch.Tensor:
    """χ(x_i − x_j), int8 [q, q]."""
    power = _prime_power(q)
    assert power, f"{q} is not an odd prime power"
    prime, degree = power
    weights = prime ** torch.arange(degree, device="cpu")
    digits = torch.arange(q, device="cpu").unsqueeze(-1) // weights % prime
    character = torch.full((q,), -1, dtype=torch.int8, device="cpu")
    character[_squares(digits, prime, weights)] = 1
    character[0] = 0
    differences = torch.zeros(q, q, dtype=torch.int64, device="cpu")
    for place, weight in zip(digits.unbind(1), weights, strict=True):
        differences += (place.unsqueeze(1) - place).remainder_(prime).mul_(weight)
    return character[differences]


def _squares(digits: torch.Tensor, prime: int, weights: torch.Tensor) -> torch.Tensor:
    """Numbers of the (q − 1)/2 non-zero squares of GF(q), in the first modulus that gives a field.

    Polynomials modulo t^k + low form a field exactly if their non-zero elements have (q − 1)/2
    squares and zero is none of them: a repeated factor of the modulus makes some non-zero square
    vanish, different factors q1·q2·… = q leave only Π (qi + 1)/2 − 1 non-zero squares.
    """
    q = len(digits)
    for low in digits:
        found = (_squared(digits[1:], low, prime) * weights).sum(-1).unique()
        if len(found) == (q - 1) // 2 and found[0] > 0:
            return found
    raise AssertionError(f"no field of {q} elements, though {q} is a prime power")


def _squared(digits: torch.Tensor, low: torch.Tensor, prime: int) -> torch.Tensor:
    """Squares of polynomials [q, k] modulo t^k + low, coefficients modulo `prime`."""
    degree = digits.shape[1]
    square = torch.zeros(len(digits), 2 * degree - 1, dtype=torch.int64, device="cpu")
    for place in range(degree):
        square[:, place : place + degree] += digits[:, place : place + 1] * digits
    for top in range(2 * degree - 2, degree - 1, -1):
        carry = square[:, top : top + 1] % prime
        square[:, top - degree : top] -= carry * low
    return square[:, :degree] % prime
