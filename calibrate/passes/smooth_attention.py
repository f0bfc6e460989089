"""Scales keys down and queries up where keys are loud, so that 4-bit keys lose less.

    q · k = (q ∘ λ) · (k / λ)         rows (and biases) of k ÷ λ, of q × λ

RoPE turns pairs of channels into each other, so both of a pair share one λ; channels that it leaves
alone are free. Query heads of a KV head share its λ. Where norms stand between projection and RoPE,
λ goes into their gains, which all heads share.

    λ = k^α / q^(1 − α)

k and q are sizes of a channel after RoPE, root mean square or largest, so that λ takes out whatever
scale k has, and q inversely. α (and the size) is chosen, for each KV head, by the error of the softmax
with keys stored as the recipe says: the variance of the logits' error under the softmax itself. It was
measured to choose better than the error of the attention's output, which hangs on few tokens (bundled
model, output error on windows not searched, of the unscaled: 0.83 against 0.93).

λ is not rounded to powers of two: that was measured to lose two thirds of the gain.

Which channels are pairs is not looked up: rotation keeps the energy of a pair, so the keys that
attention gets are compared with those projected. Without a cache policy nothing is measured, and α is
1/2: the sum of Σ k²/λ² · Σ q² λ² is least there.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ...quant.errors import CalibrationError, RecipeError
from ..edges import AttentionEdge, ModelEdges
from ..edits import Edit, Scale, Side, scale_pair
from ..observe import AttentionSample
from ..protocol import BlockTransform, BlockView
from ..search import CLEARLY, attention_probe, positive, stored_vectors

_TOKENS = 1024  # that candidates are measured on
_ALPHAS = (0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
_CHECKED = 64  # tokens that the pairs of RoPE are told from
_TOLERANCE = 0.05  # relative change of a pair's energy, on average; 16-bit rounding makes 0.01


@dataclass(frozen=True)
class SmoothAttentionOptions:
    """alpha: exponent of the keys' size, 0 to 1, or "search"."""

    alpha: Any = "search"

    def __post_init__(self) -> None:
        if not is_alpha(self.alpha):
            raise RecipeError(
                f'smooth_attention: alpha must be 0 to 1 or "search", got {self.alpha!r}'
            )


def is_alpha(value: Any) -> bool:
    """Whether `value` is a number from 0 to 1, or "search"."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return bool(value == "search")
    return 0 <= value <= 1


def refuse(edges: ModelEdges, options: SmoothAttentionOptions) -> str | None:
    """Attention whose projections are not known, or lie in one tensor."""
    for block in edges.blocks:
        attention = block.attention
        if attention is None:
            return f"{block.name} has no attention with separate projections q, k, v and o"
        if attention.rotary % 2 or attention.rotary > attention.head_dim:
            return f"RoPE of {attention.rotary} of {attention.head_dim} channels is no set of pairs"
    return None


def edits(view: BlockView, options: SmoothAttentionOptions) -> list[Edit]:
    """One λ for each pair, of each KV head."""
    attention, sample = view.edges.attention, view.seen.attention
    assert attention is not None, "refused before"
    if sample is None:
        raise _refused(view, "queries and keys cannot be watched: its attention is a function of "
                             "its own, or its layers differ in shape")  # fmt: skip
    pair = rope_pairs(view, attention, sample)
    shared = attention.q_gain is not None or attention.k_gain is not None
    candidates = _candidates(view, sample, pair, shared, options)
    factors = _chosen(view, sample, candidates, shared)
    return _edits(attention, factors, shared)


def _edits(attention: AttentionEdge, factors: torch.Tensor, shared: bool) -> list[Edit]:
    """Edits for λ fp64 [KV, D]."""
    one = factors[0]
    by_query = factors.repeat_interleave(attention.heads // attention.kv_heads, 0).flatten()
    q: tuple[Side, ...] = attention.q
    k: tuple[Side, ...] = attention.k
    if shared:
        by_key, by_query = (one.repeat(attention.kv_heads), one.repeat(attention.heads))
    else:
        by_key = factors.flatten()
    shift = attention.gain_shift
    if attention.k_gain is not None:
        found = [Edit(Side(attention.k_gain), Scale(one.double().reciprocal(), shift))]
    else:
        found = scale_pair(k, (), by_key)
    if attention.q_gain is not None:
        return [*found, Edit(Side(attention.q_gain), Scale(one.double(), shift))]
    return found + scale_pair((), q, by_query)


# ---- candidates -----------------------------------------------------------------------------------


def _candidates(
    view: BlockView,
    sample: AttentionSample,
    pair: torch.Tensor,
    shared: bool,
    options: SmoothAttentionOptions,
) -> list[torch.Tensor]:
    """λ fp64 [KV, D] to choose from; the first is the middle of the road."""
    kv_heads, sink = sample.k.shape[1], view.kv.sink if view.kv else 0
    skip = sink if sample.k.shape[2] > 2 * sink else 0
    k = sample.k[:, :, skip:].transpose(0, 1).flatten(1, 2)
    q = sample.q[:, :, skip:].unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 3)
    if shared:
        k, q = k.flatten(0, 1).unsqueeze(0), q.flatten(0, 1).unsqueeze(0)
    k_rms, k_max = _pair_sizes(k, pair)
    q_rms, q_max = _pair_sizes(q, pair)
    alphas = (0.5,) if view.kv is None else _ALPHAS
    sizes = [(k_rms, q_rms), (k_max, q_rms), (k_max, q_max)][: 1 if view.kv is None else 3]
    if options.alpha != "search":
        alphas, sizes = (float(options.alpha),), sizes[:1]
    found = [_factors(top, bottom, alpha) for top, bottom in sizes for alpha in alphas]
    return [item.expand(kv_heads, -1) for item in found]


def _factors(k: torch.Tensor, q: torch.Tensor, alpha: float) -> torch.Tensor:
    """k^α / q^(1 − α), on the scale on which q and k are of one size on average."""
    wanted = alpha * k.log2() - (1 - alpha) * q.log2()
    common = (k.log2() - q.log2() - 2 * wanted).mean(-1, keepdim=True) / 2
    return torch.exp2(wanted + common)


def _pair_sizes(x: torch.Tensor, pair: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Root mean square and largest of each channel's pair, fp64 [h, D], of x [h, n, D]."""
    index = pair.expand(x.shape[0], -1)
    empty = torch.zeros_like(index, dtype=torch.float32)
    mean = empty.scatter_reduce(-1, index, x.square().mean(1), "mean", include_self=False)
    top = empty.scatter_reduce(-1, index, x.abs().amax(1), "amax", include_self=False)
    return positive(mean.gather(-1, index).sqrt()), positive(top.gather(-1, index))


def _chosen(
    view: BlockView, sample: AttentionSample, candidates: list[torch.Tensor], shared: bool
) -> torch.Tensor:
    """λ fp64 [KV, D]: for each KV head (if shared: for all) the candidate of least error."""
    if view.kv is None or len(candidates) == 1:
        return candidates[0]
    probe, key = attention_probe(sample, view.kv, _TOKENS), view.kv.key

    def error(factors: torch.Tensor) -> torch.Tensor:
        scale = factors.float().unsqueeze(1)
        return probe.key_error(stored_vectors(probe.k / scale, key) * scale - probe.k)

    one = torch.ones_like(candidates[0])
    errors = torch.stack([*map(error, candidates), error(one) / CLEARLY])
    if shared:
        errors = errors.sum(-1, keepdim=True).expand_as(errors)
    best = errors.nan_to_num(math.inf, math.inf).argmin(0)
    stacked = torch.stack([*candidates, one])
    return stacked[best, torch.arange(stacked.shape[1], device=stacked.device)]


# ---- which channels RoPE turns into each other ----------------------------------------------------


def rope_pairs(view: BlockView, attention: AttentionEdge, sample: AttentionSample) -> torch.Tensor:
    """int64 [D]: number of the pair of each channel. CalibrationError if there is none that fits."""
    device = sample.k.device
    before, after = _keys(view, attention, sample)
    channel = torch.arange(attention.head_dim, device=device)
    turned = channel < attention.rotary
    halves = torch.where(turned, channel % max(attention.rotary // 2, 1), channel)
    neighbours = torch.where(turned, channel // 2, channel)
    found = {mismatch(before, after, pair): pair for pair in (neighbours, halves)}
    least = min(found)
    if not least < _TOLERANCE:
        raise _refused(view, "its keys are not those projected, turned by RoPE in pairs (i, i + "
                             f"{attention.rotary // 2}) or (2i, 2i + 1)")  # fmt: skip
    return found[least]


def _refused(view: BlockView, reason: str) -> CalibrationError:
    return CalibrationError(
        f"pass smooth_attention cannot run on {view.model.architecture}, {view.edges.name}: "
        f"{reason}; leave it out with --set pass.smooth_attention.skip=true, or use --recipe w4a16"
    )


def _keys(
    view: BlockView, attention: AttentionEdge, sample: AttentionSample
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of some tokens before and after RoPE, fp32 [n, KV, D], the former up to a factor for
    each token and head."""
    windows, _, length, _ = sample.k.shape
    rows = view.seen.rows.get(attention.k[0].key)
    if rows is None or rows.shape[0] != windows * length:
        raise _refused(view, f"the inputs of {attention.k[0].key} were not seen")
    late = slice(max(length - _CHECKED, length // 2), length)  # the first token is not turned
    weight = view.read(attention.k[0].key).to(rows.device, torch.float32)
    keys = rows[late] @ weight.mT
    for bias in attention.k[1:]:
        keys = keys + view.read(bias.key).to(rows.device, torch.float32)
    keys = keys.unflatten(-1, (attention.kv_heads, -1))
    if attention.k_gain is not None:
        gain = view.read(attention.k_gain).to(rows.device, torch.float32)
        keys = keys * (gain + attention.gain_shift)
    return keys, sample.k[0, :, late].transpose(0, 1)


def mismatch(before: torch.Tensor, after: torch.Tensor, pair: torch.Tensor) -> float:
    """Mean over pairs and heads of |e' − c e| / e', e and e' being a pair's energy before and
    after, c a token's and head's factor. Each pair counts alike, however loud."""
    old, new = (
        torch.zeros_like(x).index_add(-1, pair, x.square()) for x in (before.float(), after.float())
    )
    common = new.sum(-1, keepdim=True) / old.sum(-1, keepdim=True).clamp_min(1e-30)
    size = new.mean(0)
    share = (new - common * old).abs().mean(0) / size.clamp_min(1e-30)
    used = size > 1e-12 * size.amax()
    return float(share[used].mean()) if bool(used.any()) else 0.0


PASS = BlockTransform(
    name="smooth_attention",
    Options=SmoothAttentionOptions,
    refuse=refuse,
    edits=edits,
)
