"""A decode step of a Llama-shaped model, composed of the kernels of this pack, and the same in bf16.

`PackedStep` is `w4a8kv4` as a model would run it:

    rmsnorm + quantize → q|k|v → rope(q), rope + quantize + append(k, v) → attention over packed pages
    → quantize → o → residual + rmsnorm + quantize → gate|up → silu · up + quantize → down

`DenseStep` is torch's own: cuBLAS products, a dense cache, `scaled_dot_product_attention`. Positions
are on the device, so that a step can be captured once. `decode_step.py` times both; nothing here does.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional

from fewbit.kernels_triton import append_kv, decode_attention, int_two_level_gemm, quantize_rows
from fewbit.kernels_triton._integer_gemm import padded
from fewbit.kernels_triton.rope import RopeOptions, rotate
from fewbit.quant.dispatch import choice
from fewbit.quant.errors import FewbitError
from fewbit.quant.formats.int4_head import Int4HeadOptions
from fewbit.quant.formats.int_two_level import FORMAT, IntTwoLevelOptions
from fewbit.quant.kernel import (
    AnyProblem,
    AttentionProblem,
    Config,
    Problem,
    RowsProblem,
    bucket_of,
)
from fewbit.quant.kv_policy import PageUse
from fewbit.quant.kv_view import Paged, Scoring
from fewbit.quant.kv_write import PAGE, AppendOptions, Rope
from fewbit.quant.machine import this_device

_OPTIONS = IntTwoLevelOptions(group=128)
_PAGES = PageUse("int4_head", Int4HeadOptions())
_EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """Of a Llama: layers, channels, heads."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def linears(self) -> tuple[tuple[str, int, int], ...]:
        """(name, N, K) of the products of a layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            ("qkv", q + 2 * kv, self.hidden),
            ("o", self.hidden, q),
            ("gate_up", 2 * self.intermediate, self.hidden),
            ("down", self.hidden, self.intermediate),
        )


class Step(Protocol):
    """A model's decode step. hidden [B, hidden] of one new token of each row -> logits [B, V]."""

    n_bytes: int  # that a step must read: weights of the layers, head, cache up to the position

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class Layer:
    """Weights by name, as the step multiplies by them, and the two gains [hidden]."""

    weights: dict[str, Any]
    gains: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Place:
    """Where a step is. rows: B. position: tokens before the new one, int64 [1] on the device.
    rope: tables for that position."""

    rows: int
    position: torch.Tensor
    rope: Rope


def place_at(rows: int, position: int, shape: Shape, dtype: torch.dtype, device: str) -> Place:
    """The place of a step after `position` tokens."""
    exponents = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
    angle = position * torch.cat([500000.0**-exponents, 500000.0**-exponents])
    angle = angle.view(1, 1, -1)
    rope = Rope(angle.cos().to(dtype), angle.sin().to(dtype))
    return Place(rows, torch.tensor([position], device=device), rope)


# ---- packed ---------------------------------------------------------------------------------


class PackedStep:
    """`w4a8kv4`: int_two_level weights, int8_token inputs, int4_head cache."""

    def __init__(
        self,
        shape: Shape,
        layers: list[Layer],
        caches: list[Paged],
        norm: torch.Tensor,
        head: torch.Tensor,
        place: Place,
    ) -> None:
        self.shape, self.layers, self.caches, self.place = shape, layers, caches, place
        self.norm, self.head = norm, head
        self.tokens = int(place.position) + 1
        self.counts = (place.position + 1).repeat(place.rows)
        self.configs = {name: _config(problem) for name, problem in self._problems().items()}
        self.n_bytes = sum(map(_layer_bytes, layers)) + _bytes(head) + self._cache_bytes()

    def _cache_bytes(self) -> int:
        vector = 2 * (self.shape.head_dim // 2 + 4)
        return len(self.layers) * self.place.rows * self.shape.kv_heads * self.tokens * vector

    def _problems(self) -> dict[str, AnyProblem]:
        shape, rows = self.shape, self.place.rows
        dtype, device = self.head.dtype, self.head.device.type
        machine = this_device("cuda") if device == "cuda" else None

        def of_rows(op: str, options: Any, k: int) -> RowsProblem:
            m = bucket_of(rows, RowsProblem.buckets)
            return RowsProblem(op, options, m, k, dtype, device, machine)

        problems: dict[str, AnyProblem] = {
            name: Problem(
                FORMAT.name, _OPTIONS, 1, bucket_of(rows, Problem.buckets), n, k, dtype, device,
                "int8_token", machine,
            )
            for name, n, k in shape.linears
        }  # fmt: skip
        append = AppendOptions(
            "int4_head", _PAGES.options, "int4_head", _PAGES.options, shape.kv_heads,
            shape.head_dim, shape.head_dim, "half", shape.head_dim,
        )  # fmt: skip
        rope = RopeOptions(shape.heads, shape.head_dim, shape.head_dim)
        attend = AttentionProblem(
            "int4_head", _PAGES.options, "int4_head", _PAGES.options, rows, 1, shape.kv_heads,
            shape.heads // shape.kv_heads, shape.head_dim, shape.head_dim,
            bucket_of(self.tokens, AttentionProblem.buckets), dtype, device, (), machine,
        )  # fmt: skip
        return problems | {
            "append": of_rows("append_kv", append, 2 * shape.kv_heads * shape.head_dim),
            "rope": of_rows("rope", rope, shape.heads * shape.head_dim),
            "attend": attend,
        }

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Step`."""
        delta: torch.Tensor | None = None
        for layer, cache in zip(self.layers, self.caches, strict=True):
            hidden, rows = self._norm(hidden, delta, layer.gains[0], self.shape.hidden)
            mixed = self._attend(self._multiply("qkv", layer, rows, hidden), cache)
            size = padded(mixed.shape[1])
            delta = self._multiply("o", layer, quantize_rows.quantize(mixed, width=size), hidden)
            hidden, rows = self._norm(hidden, delta, layer.gains[1], self.shape.hidden)
            gate, up = self._multiply("gate_up", layer, rows, hidden).chunk(2, dim=-1)
            size = padded(self.shape.intermediate)
            fused = quantize_rows.silu_mul_quantize(gate, up, width=size)
            delta = self._multiply("down", layer, fused.rows, hidden)
        assert delta is not None
        total = functional.rms_norm(hidden + delta, (self.shape.hidden,), self.norm, _EPS)
        return total @ self.head.T

    def _norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, gain: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, quantize_rows.SummedRows]:
        """(hidden + delta, its norm rounded)."""
        norm = quantize_rows.RmsNorm(gain, _EPS)
        found = quantize_rows.rmsnorm_quantize(hidden, norm, delta, width=padded(k))
        return hidden if found.total is None else found.total, found.rows

    def _multiply(
        self, name: str, layer: Layer, rows: quantize_rows.SummedRows, like: torch.Tensor
    ) -> torch.Tensor:
        config = self.configs[name]
        return int_two_level_gemm.multiply(rows, layer.weights[name], like.dtype, config)

    def _attend(self, mixed: torch.Tensor, cache: Paged) -> torch.Tensor:
        """Attention [B, heads·D] of q|k|v [B, (heads + 2·kv_heads)·D]; the cache gets k and v."""
        shape = self.shape
        heads = mixed.view(mixed.shape[0], 1, -1, shape.head_dim).transpose(1, 2)
        q, k, v = heads.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
        position, rope = self.place.position, self.place.rope
        append_kv.append(cache, k, v, position, rope, self.configs["append"])
        scoring = Scoring(shape.head_dim**-0.5, None, True, None, None)
        turned = rotate(q, rope, self.configs["rope"])
        chosen = self.configs["attend"]
        y = decode_attention.attend_counted(cache, turned, self.counts, scoring, chosen)
        return y.transpose(1, 2).reshape(mixed.shape[0], -1)


def _config(problem: AnyProblem) -> Config:
    """What the dispatcher chooses, which must be a Triton kernel; its first config off a GPU."""
    from fewbit.quant.dispatch import kernels

    if problem.device == "cuda":
        chosen = choice(problem)
        if chosen.kernel not in _KERNELS:
            raise FewbitError(f"the step is written for {_KERNELS}, the dispatcher says {chosen}")
        return chosen.config
    kernel = next(kernels()[name] for name in _KERNELS if kernels()[name].op == problem.op)
    assert kernel.configs is not None
    return kernel.configs(problem)[0]


_KERNELS = ("triton_w4a8", "triton_append_int4", "triton_rope", "triton_attend_int4")


def random_weight(
    n: int, k: int, device: str, generator: torch.Generator
) -> int_two_level_gemm.TwoLevelWeight:
    """A weight as `triton_w4a8` holds it, with random codes and plausible scales."""
    half = int_two_level_gemm.half_of(_OPTIONS)
    spans = padded(k) // (2 * half)
    words = torch.randint(
        0, 256, (spans, n, half), dtype=torch.uint8, device=device, generator=generator
    )
    one = 14 | (256 - 105) << 5  # s2 = 14, o = -105: w8 from -105 to 105
    steps = torch.full((spans, n), one | one << 16, dtype=torch.int32, device=device)
    scale = torch.full((n,), 1.0 / (60 * k**0.5), device=device)
    return int_two_level_gemm.TwoLevelWeight(words, steps, scale, None, None, k)


def empty_cache(shape: Shape, rows: int, tokens: int, device: str) -> Paged:
    """Pages in order for `tokens` tokens of each row, filled with codes 8 and small scales."""
    columns = -(-tokens // PAGE)
    size = (rows * columns, shape.kv_heads, PAGE)
    table = torch.arange(rows * columns, device=device).view(columns, rows).T.contiguous()

    def side() -> dict[str, torch.Tensor]:
        return {
            "codes": torch.full(
                (*size, shape.head_dim // 2), 0x88, dtype=torch.uint8, device=device
            ),
            "scale": torch.full((*size, 1), 0.1, dtype=torch.float16, device=device),
            "minimum": torch.full((*size, 1), -0.8, dtype=torch.float16, device=device),
        }

    return Paged(_PAGES, _PAGES, side(), side(), table)


# ---- bf16 -----------------------------------------------------------------------------------


class DenseStep:
    """The same model in the dtype of its weights, with a dense cache [B, kv_heads, T, D]."""

    def __init__(
        self,
        shape: Shape,
        layers: list[Layer],
        caches: list[tuple[torch.Tensor, torch.Tensor]],
        norm: torch.Tensor,
        head: torch.Tensor,
        place: Place,
    ) -> None:
        self.shape, self.layers, self.caches, self.place = shape, layers, caches, place
        self.norm, self.head = norm, head
        cached = sum(_bytes(keys) + _bytes(values) for keys, values in caches)
        self.n_bytes = sum(map(_layer_bytes, layers)) + _bytes(head) + cached

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Step`."""
        size = (self.shape.hidden,)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            w = layer.weights
            x = functional.rms_norm(hidden, size, layer.gains[0], _EPS)
            hidden = hidden + functional.linear(self._attend(x @ w["qkv"].T, cache), w["o"])
            x = functional.rms_norm(hidden, size, layer.gains[1], _EPS)
            gate, up = functional.linear(x, w["gate_up"]).chunk(2, dim=-1)
            hidden = hidden + functional.linear(functional.silu(gate) * up, w["down"])
        return functional.rms_norm(hidden, size, self.norm, _EPS) @ self.head.T

    def _attend(
        self, mixed: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        shape = self.shape
        heads = mixed.view(mixed.shape[0], 1, -1, shape.head_dim).transpose(1, 2)
        q, k, v = heads.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
        cos, sin = (t.unsqueeze(1) for t in (self.place.rope.cos, self.place.rope.sin))
        half = shape.head_dim // 2
        q, k = (x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin for x in (q, k))
        for held, new in zip(cache, (k, v), strict=True):
            held.index_copy_(2, self.place.position, new)
        y = functional.scaled_dot_product_attention(q, *cache, enable_gqa=True)
        return y.transpose(1, 2).reshape(mixed.shape[0], -1)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _layer_bytes(layer: Layer) -> int:
    total = 0
    for weight in layer.weights.values():
        parts = [weight] if isinstance(weight, torch.Tensor) else vars(weight).values()
        total += sum(_bytes(part) for part in parts if isinstance(part, torch.Tensor))
    return total


# ---- random models --------------------------------------------------------------------------


def _generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def packed_step(shape: Shape, n_layers: int, rows: int, position: int, device: str) -> PackedStep:
    """A random model of `n_layers` layers in bf16 arithmetic."""
    generator = _generator(device)
    norm, head, gains = _dense_ends(shape, device, generator)
    layers = [
        Layer({name: random_weight(n, k, device, generator) for name, n, k in shape.linears}, gains)
        for _ in range(n_layers)
    ]
    caches = [empty_cache(shape, rows, position + 1, device) for _ in layers]
    place = place_at(rows, position, shape, torch.bfloat16, device)
    return PackedStep(shape, layers, caches, norm, head, place)


def dense_step(shape: Shape, n_layers: int, rows: int, position: int, device: str) -> DenseStep:
    """The same in bf16 throughout."""
    generator = _generator(device)
    norm, head, gains = _dense_ends(shape, device, generator)
    layers = [
        Layer(
            {
                name: torch.randn(n, k, dtype=torch.bfloat16, device=device, generator=generator)
                .mul_(k**-0.5)
                for name, n, k in shape.linears
            },
            gains,
        )
        for _ in range(n_layers)
    ]  # fmt: skip
    size = (rows, shape.kv_heads, position + 1, shape.head_dim)
    caches = [
        (
            torch.zeros(size, dtype=torch.bfloat16, device=device),
            torch.zeros(size, dtype=torch.bfloat16, device=device),
        )
        for _ in layers
    ]
    place = place_at(rows, position, shape, torch.bfloat16, device)
    return DenseStep(shape, layers, caches, norm, head, place)


def _dense_ends(
    shape: Shape, device: str, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    gain = torch.ones(shape.hidden, dtype=torch.bfloat16, device=device)
    head = torch.randn(
        shape.vocabulary, shape.hidden, dtype=torch.bfloat16, device=device, generator=generator
    )
    return gain, head.mul_(shape.hidden**-0.5), (gain, gain.clone())
