"""What a candidate of a transform would cost, measured with the formats that the recipe asks for.

    error = ‖x Wᵀ − R_a(x') R_w(W')ᵀ‖² / ‖x Wᵀ‖²

x', W' are the transformed operands (x' W'ᵀ = x Wᵀ), R_a rounds inputs to the activation format, R_w
weights to nearest in theirs. A `Probe` holds a sample of tokens and of rows: rows are rounded
independently of each other in every format, so some of them stand for all.

    s = act^α · made^(1 − α − β) / weight^β

is the family of channel scales: act, made and weight are the sizes of a channel's activation, of the
weights that make it and of those that read it. Exponents of what grows with a channel add up to one,
so a channel that somebody scaled by c and compensated gets a factor c times as large: what comes out
does not depend on c. That is why a search over this family finds the same weights whatever scales a
checkpoint happens to have. The unscaled model is not in the family; it must win clearly to be kept.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..quant.activation import find_activation
from ..quant.format import find_format
from ..quant.kv_policy import KVPolicy, PageUse
from ..quant.page_format import find_page_format
from .observe import AttentionSample

MAX_TOKENS = 512  # of a probe
MAX_ELEMENTS = 1 << 22  # of the weight in all probes of a block together
MIN_ELEMENTS = 1 << 17  # of one probe's weight, however many there are
MIN_ROWS = 16
CLEARLY = 0.9  # the unscaled model stays if its error is below this share of the best one's

Rule = tuple[str, Any]  # a weight's format and options


def rounded_weight(weight: torch.Tensor, rule: Rule | None) -> torch.Tensor:
    """`weight` fp32 [N, K] as nearest rounding would store it; itself without a rule."""
    if rule is None:
        return weight
    store, options = find_format(rule[0]), rule[1]
    missing = store.padded_k(weight.shape[-1], options) - weight.shape[-1]
    padded = torch.nn.functional.pad(weight, (0, missing)) if missing else weight
    _, values = store.round(padded, store.fit(padded, options), 0, options)
    return values[..., : weight.shape[-1]]


def rounded_input(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    """x fp32 [.., K] as the activation format gives it."""
    return x if activation is None else find_activation(activation).round(x).decode(torch.float32)


def stored_vectors(x: torch.Tensor, use: PageUse | None) -> torch.Tensor:
    """Keys or values fp32 [.., D] as they will be read from the cache."""
    if use is None:
        return x
    form = find_page_format(use.format)
    return form.decode(form.encode(x, use.options), torch.float32, use.options)


@dataclass(frozen=True)
class Probe:
    """A sample of one product. x: fp32 [t, K]; weight: fp32 [n, K]; wanted: x Wᵀ; rule: None if
    the weight is not quantized."""

    x: torch.Tensor
    weight: torch.Tensor
    wanted: torch.Tensor
    rule: Rule | None
    activation: str | None

    def error(self, x: torch.Tensor, weight: torch.Tensor) -> float:
        """Relative squared error of the product of the transformed operands, rounded."""
        found = rounded_input(x, self.activation) @ rounded_weight(weight, self.rule).mT
        return relative_error(found, self.wanted)

    def scaled(self, factors: torch.Tensor) -> float:
        """Error with inputs ÷ factors and columns × factors, [K]."""
        return self.error(self.x / factors, self.weight * factors)

    def ordered(self, order: torch.Tensor | None) -> float:
        """Error with channels in another order, int64 [K]; None for that of the file."""
        if order is None:
            return self.error(self.x, self.weight)
        return self.error(self.x[:, order], self.weight[:, order])


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found − wanted‖² / ‖wanted‖², infinite if it is no number."""
    error = float((found - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30))
    return error if error == error else float("inf")


def make_probe(
    x: torch.Tensor, weight: torch.Tensor, rule: Rule | None, activation: str | None, n: int = 1
) -> Probe:
    """A probe of x [T, K] and weight [N, K], one of `n` that are made for the block."""
    elements = max(MIN_ELEMENTS, MAX_ELEMENTS // n)
    rows = max(MIN_ROWS, elements // weight.shape[-1])
    some, x = spread(weight, rows), spread(x, MAX_TOKENS)
    return Probe(x, some, x @ some.mT, rule, activation if rule is not None else None)


def spread(rows: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` rows of [n, K], evenly spaced."""
    n = rows.shape[0]
    if n <= most:
        return rows
    return rows[torch.linspace(0, n - 1, most, device=rows.device).long()]


# ---- the family of channel scales -----------------------------------------------------------------


@dataclass(frozen=True)
class Channels:
    """Sizes of the channels between two weights, fp64, > 0, all of one shape: of the activation, of
    the weights that make it and of those that read it."""

    act: torch.Tensor
    made: torch.Tensor
    weight: torch.Tensor

    def factors(self, alpha: float, beta: float) -> torch.Tensor:
        """act^α · made^(1 − α − β) / weight^β, on one common scale on which what makes a channel
        and what reads it are of one size on average."""
        act, made, weight = self.act.log2(), self.made.log2(), self.weight.log2()
        wanted = alpha * act + (1 - alpha - beta) * made - beta * weight
        common = ((made - wanted).mean() - (weight + wanted).mean()) / 2
        return torch.exp2(wanted + common)


def power_of_two(factors: torch.Tensor) -> torch.Tensor:
    """The nearest powers of two, by which scaling is exact. The small shift keeps ties, which equal
    channels have in common, from being decided by rounding errors."""
    return torch.exp2((factors.double().log2() + 1e-4).round())


def rms(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Root mean square along an axis."""
    return values.square().mean(axis).sqrt()


def largest(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Largest magnitude along an axis."""
    return values.abs().amax(axis)


def positive(values: torch.Tensor) -> torch.Tensor:
    """Sizes in fp64; dead channels, and all if they are not finite, count as one of the others."""
    values = values.double()
    usable = values.isfinite() & (values > 0)
    typical = values[usable].log().mean().exp() if bool(usable.any()) else values.new_ones(())
    return torch.where(usable, values, typical)


def simplex(steps: int) -> list[tuple[float, float]]:
    """All (α, β) with α, β ≥ 0 and α + β ≤ 1 in steps of 1 / steps."""
    return [(i / steps, j / steps) for i in range(steps + 1) for j in range(steps + 1 - i)]


def around(point: tuple[float, float], step: float) -> list[tuple[float, float]]:
    """Neighbours of a point of the simplex, `step` away."""
    moves = [(step, 0.0), (-step, 0.0), (0.0, step), (0.0, -step), (step, -step), (-step, step)]
    points = [(point[0] + i, point[1] + j) for i, j in moves]
    return [(i, j) for i, j in points if i >= 0 and j >= 0 and i + j <= 1]


# ---- attention ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionProbe:
    """A sample of attention, query heads by the KV head that they share.

    q: fp32 [b, KV, G, T, D]; k, v: [b, KV, T, D]; probabilities [b, KV, G, T, T]; far: bool [T, T],
    keys that a query reads from the cache as stored; newer ones and sinks are read dense.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    probabilities: torch.Tensor
    far: torch.Tensor
    scaling: float

    def output(self) -> torch.Tensor:
        """What the layer's output projection gets, [b · T, H · D]."""
        return _rows(self.probabilities @ self.v.unsqueeze(2))

    def value_change(self, delta: torch.Tensor) -> torch.Tensor:
        """Change of `output` if stored values are off by delta [b, KV, T, D]."""
        return _rows((self.probabilities * self.far) @ delta.unsqueeze(2))

    def key_error(self, delta: torch.Tensor) -> torch.Tensor:
        """[KV]: Σ over queries of Var_p(δ), δ being what keys that are off by `delta` add to the
        logits. To second order that is twice the divergence of the softmax from what it was; a term
        that all keys have in common costs nothing."""
        logits = (self.q @ delta.unsqueeze(2).mT) * (self.far * self.scaling)
        logits -= (self.probabilities * logits).sum(-1, keepdim=True)
        return (logits.square_() * self.probabilities).sum((0, 2, 3, 4))


def _rows(heads: torch.Tensor) -> torch.Tensor:
    """[b, KV, G, T, D] -> [b · T, KV · G · D]."""
    return heads.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)


def attention_probe(
    sample: AttentionSample, kv: KVPolicy | None, max_tokens: int
) -> AttentionProbe:
    """The first tokens of the first windows of a sample, at most `max_tokens` in all.

    Where windows are too short for much to be read as stored, everything is taken to be.
    """
    length = min(sample.k.shape[2], max_tokens)
    windows = max(1, max_tokens // length)
    q, k, v = (x[:windows, :, :length].float() for x in (sample.q, sample.k, sample.v))
    q = q.unflatten(1, (k.shape[1], -1))
    position = torch.arange(length, device=q.device)
    distance = position.unsqueeze(1) - position
    far = distance >= 0
    if kv is not None and length > 2 * (kv.residual + kv.sink):
        far = (distance >= kv.residual) & (position >= kv.sink)
    logits = (q @ k.unsqueeze(2).mT) * sample.scaling
    probabilities = logits.masked_fill_(distance < 0, -torch.inf).softmax(-1)
    return AttentionProbe(q, k, v, probabilities, far, sample.scaling)
