"""Moves scale between weights that follow each other, so that what is rounded has even channels.

    down_proj   x = act(gate) ∘ up     rows of up ÷ s              columns of down × s
    o_proj      x = P v                rows of v ÷ s               columns of o × s, one s per KV head
    qkv         x = norm(h) ∘ gain     gain (and bias) ÷ s         columns of all readers × s
    gate_up     likewise

    s = act^α · made^(1 − α − β) / weight^β        `calibrate/search.py` says why these

α and β are searched by the error of the reading weight's output, with its input and itself rounded as
the recipe says; for o_proj values pass through the cache on their way. α = 0, β = ½ makes both sides
of a channel equal, which is where training leaves them. Sizes are root mean squares or largest
magnitudes, whichever errs less. A number for α fixes it, with β = 1 − α.

s is not rounded to powers of two, which was measured to lose the gain (bundled model, error of down
relative to the unscaled: 0.91 exact, 1.00 rounded), except where one of the matrices stays in 16 bit:
there only a power of two is exact. Gains stay in 16 bit too: their s is such that bfloat16 holds
gain / s.

Experts that saw too few tokens to tell are left alone. Norms that multiply by 1 + gain are refused.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...quant.errors import RecipeError
from ..edges import AttentionEdge, BlockEdges, ModelEdges, NormEdge
from ..edits import Edit, Side, scale_pair
from ..observe import AttentionSample
from ..protocol import BlockTransform, BlockView
from ..search import (
    CLEARLY,
    MAX_TOKENS,
    Channels,
    Probe,
    around,
    attention_probe,
    largest,
    make_probe,
    positive,
    power_of_two,
    relative_error,
    rms,
    rounded_input,
    rounded_weight,
    simplex,
    stored_vectors,
)
from ._edges import MIN_TOKENS, missing_edge, read_beside, seen_mlps, wanted_edges
from .smooth_attention import is_alpha

EDGES = ("down_proj", "o_proj", "qkv", "gate_up")
_MOST_READERS = 8  # of one norm that are measured
_UNSEARCHED = (0.5, 0.5)  # α, β where nothing is rounded

Error = Callable[[torch.Tensor], float]


@dataclass(frozen=True)
class SmoothOptions:
    """edges: some of down_proj, o_proj, qkv, gate_up. alpha: 0 to 1, or "search"."""

    edges: Any = ("down_proj", "o_proj")
    alpha: Any = "search"

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", wanted_edges("smooth", self.edges, EDGES))
        if not is_alpha(self.alpha):
            raise RecipeError(f'smooth: alpha must be 0 to 1 or "search", got {self.alpha!r}')


@dataclass(frozen=True)
class Site:
    """Channels between weights that make them and weights that read them.

    sizes: ways to measure a channel, the usual one first. error: of the readers' output, for given
    factors; None if nothing there is rounded. exact: whether factors must be powers of two.
    spread: factors of the channels -> those of the readers' columns (query heads of a KV head).
    gain: of the norm that makes the channels.
    """

    makers: tuple[Side, ...]
    readers: tuple[Side, ...]
    sizes: tuple[Channels, ...]
    error: Error | None
    exact: bool
    spread: Callable[[torch.Tensor], torch.Tensor] = lambda factors: factors
    gain: torch.Tensor | None = None


def refuse(edges: ModelEdges, options: SmoothOptions) -> str | None:
    """What is missing for the wanted edges."""
    for block in edges.blocks:
        sentence = missing_edge(block, options.edges)
        if sentence:
            return sentence
        for edge in {"qkv", "gate_up"} & set(options.edges):
            sentence = _no_norm(block, edge)
            if sentence:
                return f"edge {edge}: {sentence}"
    return None


def _no_norm(block: BlockEdges, edge: str) -> str | None:
    norms = _norms(block, edge)
    if not norms:
        return f"no norm of {block.name} was seen to feed these projections"
    for norm in norms:
        if norm.kind not in ("rms", "layernorm"):
            return f"{norm.gain} multiplies by something else than its gain"
        for side in norm.readers:
            if side.key in block.unread:
                return f"{side.key} was not seen in use"
    return None


def _norms(block: BlockEdges, edge: str) -> list[NormEdge]:
    """Norms that feed the wanted projections."""
    if edge == "qkv":
        wanted = {block.attention.q[0].key} if block.attention else set()
    else:
        wanted = {side.key for mlp in block.mlps for side in (*mlp.gate, *mlp.up)}
    return [norm for norm in block.norms if wanted & {side.key for side in norm.readers}]


def edits(view: BlockView, options: SmoothOptions) -> list[Edit]:
    """Factors of every channel of the wanted edges."""
    found: list[Edit] = []
    for site in _sites(view, options):
        factors = _factors(site, options)
        if factors is not None:
            found += scale_pair(site.makers, (), factors)
            found += scale_pair((), site.readers, site.spread(factors))
    return found


def _sites(view: BlockView, options: SmoothOptions) -> Iterator[Site]:
    norms: dict[str, NormEdge] = {}
    for edge in options.edges:
        if edge == "down_proj":
            yield from _down_sites(view)
        elif edge == "o_proj":
            yield from _value_sites(view)
        else:
            norms.update({norm.gain: norm for norm in _norms(view.edges, edge)})
    for norm in norms.values():
        yield from _norm_sites(view, norm)


# ---- the search -----------------------------------------------------------------------------------


def _factors(site: Site, options: SmoothOptions) -> torch.Tensor | None:
    """Factors fp64 of the channels; None if the channels are best left as they are."""

    def factors(sizes: Channels, point: tuple[float, float]) -> torch.Tensor:
        return _allowed(site, sizes.factors(*point))

    if options.alpha != "search":
        return factors(site.sizes[0], (float(options.alpha), 1 - float(options.alpha)))
    error = site.error
    if error is None:
        return factors(site.sizes[0], _UNSEARCHED)
    tried: dict[tuple[int, tuple[float, float]], float] = {}

    def measure(number: int, points: list[tuple[float, float]]) -> None:
        for point in points:
            if (number, point) not in tried:
                tried[number, point] = error(factors(site.sizes[number], point))

    measure(0, simplex(4))
    for number in range(1, len(site.sizes)):
        measure(number, [min(tried, key=tried.__getitem__)[1]])
    number, point = min(tried, key=tried.__getitem__)
    measure(number, around(point, 0.125))
    number, point = min(tried, key=tried.__getitem__)
    best = factors(site.sizes[number], point)
    unscaled = error(torch.ones_like(best))
    return best if unscaled >= CLEARLY * tried[number, point] else None


def _allowed(site: Site, factors: torch.Tensor) -> torch.Tensor:
    """Factors near `factors` that cost no precision in what stays in 16 bit."""
    if site.exact:
        return power_of_two(factors)
    if site.gain is None:
        return factors
    gain = site.gain.double()
    held = (gain / factors).bfloat16().double()
    usable = (held != 0) & held.isfinite()
    return torch.where(usable, gain / held, factors)


def _channels(act: torch.Tensor, made: torch.Tensor, weight: torch.Tensor) -> Channels:
    return Channels(positive(act), positive(made), positive(weight))


def _stay_wide(view: BlockView, *sides: Side) -> bool:
    """Whether any of the matrices stays in 16 bit, in a run that rounds others."""
    return bool(view.rules) and any(side.key not in view.rules for side in sides)


# ---- down_proj ------------------------------------------------------------------------------------


def _down_sites(view: BlockView) -> Iterator[Site]:
    for mlp, x in seen_mlps(view):
        weight, up = read_beside(view, mlp.down, x), read_beside(view, mlp.up[0], x)
        rule = view.rules.get(mlp.down.key)
        sizes = tuple(
            _channels(act(x, 0), rms(up, 1), size(weight, 0))
            for act, size in ((rms, rms), (rms, largest), (largest, rms), (largest, largest))
        )
        probe = make_probe(x, weight, rule, view.activation, len(view.edges.mlps))
        error = None if rule is None else _scaled_error(probe)
        wide = _stay_wide(view, mlp.up[0], mlp.down)
        yield Site(mlp.up, (mlp.down,), sizes, error, wide)


def _scaled_error(
    probe: Probe, spread: Callable[[torch.Tensor], torch.Tensor] = lambda factors: factors
) -> Error:
    return lambda factors: probe.scaled(spread(factors).float())


# ---- o_proj ---------------------------------------------------------------------------------------


def _value_sites(view: BlockView) -> Iterator[Site]:
    edge = view.edges.attention
    x = None if edge is None else view.seen.rows.get(edge.o.key)
    if edge is None or x is None:
        return

    def spread(factors: torch.Tensor) -> torch.Tensor:
        return _by_query(factors, edge)

    weight, values = read_beside(view, edge.o, x), read_beside(view, edge.v[0], x)
    sample, rule = view.seen.attention, view.rules.get(edge.o.key)
    cached = sample is not None and view.kv is not None
    seen = _flat(sample.v) if sample is not None and cached else x
    sizes = tuple(
        _channels(_by_value(act(seen, 0), edge, act), rms(values, 1),
                  _by_value(size(weight, 0), edge, size))
        for act, size in ((rms, rms), (rms, largest), (largest, rms), (largest, largest))
    )  # fmt: skip
    error: Error | None = None
    if cached and sample is not None:
        error = _cached_error(view, sample, weight, edge)
    elif rule is not None:
        probe = make_probe(x, weight, rule, view.activation)
        error = _scaled_error(probe, spread)
    wide = _stay_wide(view, edge.v[0], edge.o)
    yield Site(edge.v, (edge.o,), sizes, error, wide, spread)


def _flat(values: torch.Tensor) -> torch.Tensor:
    """[b, KV, T, D] -> [b · T, KV · D]."""
    return values.transpose(1, 2).flatten(2).flatten(0, 1)


def _by_query(factors: torch.Tensor, edge: AttentionEdge) -> torch.Tensor:
    """[KV · D] -> [H · D]: each query head gets the factors of its KV head."""
    per_head = factors.view(edge.kv_heads, edge.head_dim)
    return per_head.repeat_interleave(edge.heads // edge.kv_heads, 0).flatten()


def _by_value(size: torch.Tensor, edge: AttentionEdge, reduce: Any) -> torch.Tensor:
    """Sizes [H · D], reduced over the query heads of a KV head; [KV · D] stay."""
    return reduce(size.view(edge.kv_heads, -1, edge.head_dim), 1).flatten()


def _cached_error(
    view: BlockView, sample: AttentionSample, weight: torch.Tensor, edge: AttentionEdge
) -> Error:
    """Error of o's output, with values read from the cache as the recipe stores them."""
    assert view.kv is not None, "only asked for with a cache policy"
    use, rule, probe = view.kv.value, view.rules.get(edge.o.key), None
    probe = attention_probe(sample, view.kv, MAX_TOKENS)
    plain = probe.output()
    wanted = make_probe(plain, weight, rule, view.activation)

    def error(factors: torch.Tensor) -> float:
        scale = factors.view(edge.kv_heads, 1, edge.head_dim).float()
        scaled, columns = probe.v / scale, _by_query(factors, edge).float()
        x = plain / columns + probe.value_change(stored_vectors(scaled, use) - scaled)
        rounded = rounded_input(x, wanted.activation)
        found = rounded @ rounded_weight(wanted.weight * columns, rule).mT
        return relative_error(found, wanted.wanted)

    return error


# ---- what a norm feeds ----------------------------------------------------------------------------


def _norm_sites(view: BlockView, norm: NormEdge) -> Iterator[Site]:
    seen = {side: view.seen.rows[side.key] for side in norm.readers if side.key in view.seen.rows}
    readers = sorted(seen, key=lambda side: -seen[side].shape[0])
    if not readers or any(side.axis != -1 for side in readers):
        return
    x = seen[readers[0]]
    measured = [
        side for side in readers if side.key in view.rules and seen[side].shape[0] >= MIN_TOKENS
    ][:_MOST_READERS]
    probes = [
        make_probe(seen[side], read_beside(view, side, x), view.rules[side.key], view.activation,
                   len(measured))
        for side in measured
    ]  # fmt: skip
    gain = view.read(norm.gain).to(x.device)
    sizes = tuple(
        _channels(act(x, 0), gain.abs(), _most(view, norm, x, size))
        for act, size in ((rms, rms), (rms, largest), (largest, rms), (largest, largest))
    )
    makers = (Side(norm.gain), *([Side(norm.bias)] if norm.bias else []))
    wide = _stay_wide(view, *norm.readers) or norm.bias is not None
    yield Site(makers, norm.readers, sizes, _joint(probes), wide, gain=gain)


def _most(view: BlockView, norm: NormEdge, like: torch.Tensor, size: Any) -> torch.Tensor:
    """Largest size of each column in any reader."""
    return torch.stack([size(read_beside(view, side, like), 0) for side in norm.readers]).amax(0)


def _joint(probes: list[Probe]) -> Error | None:
    if not probes:
        return None
    return lambda factors: sum(probe.scaled(factors.float()) for probe in probes)


PASS = BlockTransform(
    name="smooth",
    Options=SmoothOptions,
    refuse=refuse,
    edits=edits,
)
