"""Attention in runs against plain softmax in float64; masks, caps, sinks, and plain tensors."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewbit.quant import kv_attention
from fewbit.quant.errors import FewbitError
from fewbit.quant.kv_attention import Handle, KVView, Scoring, attend, register

ROWS, HEADS, KV_HEADS, DIM, VALUE_DIM = 2, 6, 2, 8, 12


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 64 keys and blocks of few queries, so that small cases take every branch."""
    monkeypatch.setattr(kv_attention, "_RUN_ELEMENTS", 1)
    monkeypatch.setattr(kv_attention, "_SCORES", ROWS * HEADS * 64 * 5)


def tensors(n_tokens: int, n_queries: int) -> tuple[torch.Tensor, ...]:
    """Query, dense keys and values, stored keys and values: all different."""
    generator = torch.Generator().manual_seed(n_tokens)
    shapes = ((HEADS, n_queries, DIM), *((KV_HEADS, n_tokens, d) for d in (DIM, VALUE_DIM) * 2))
    return tuple(torch.randn(ROWS, *shape, generator=generator) for shape in shapes)


def view_of(
    parts: tuple[torch.Tensor, ...], stored: int, band_start: int, residual: int | None
) -> KVView:
    query, keys, values, old_keys, old_values = parts

    def read(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert stop <= stored, "more was read than is stored"
        assert stop - start <= 64, "more was decoded at once than allowed"
        return old_keys[:, :, start:stop], old_values[:, :, start:stop]

    band = (keys[:, :, band_start:], values[:, :, band_start:])
    return KVView(
        keys.shape[2], query.shape[2], stored, read,
        band if band_start < keys.shape[2] else None, band_start, residual,
        (keys.shape, values.shape), torch.float32, torch.device("cpu"),
    )  # fmt: skip


def expected(
    parts: tuple[torch.Tensor, ...], dense: torch.Tensor, scoring: Scoring
) -> torch.Tensor:
    """dense: bool [Q, T], which form a query reads."""
    query, keys, values, old_keys, old_values = (p.double() for p in parts)
    group = HEADS // KV_HEADS
    keys, old_keys, values, old_values = (
        p.repeat_interleave(group, dim=1) for p in (keys, old_keys, values, old_values)
    )
    scores = torch.where(dense, query @ keys.mT, query @ old_keys.mT) * scoring.scaling
    if scoring.softcap:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    n_queries, n_tokens = dense.shape
    if scoring.mask is None and scoring.causal:
        future = torch.ones(n_queries, n_tokens, dtype=torch.bool).triu(n_tokens - n_queries + 1)
        scores = scores.masked_fill(future, -torch.inf)
    elif scoring.mask is not None and scoring.mask.dtype == torch.bool:
        scores = scores.masked_fill(~scoring.mask, -torch.inf)
    elif scoring.mask is not None:
        scores = scores + scoring.mask.double()
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True)
    if scoring.sinks is not None:
        total = total + scoring.sinks.double().view(1, -1, 1, 1).exp()
    weights = torch.nan_to_num(weights / total)
    return (weights * dense) @ values + (weights * ~dense) @ old_values


def cases() -> Iterator[Any]:
    for n_tokens, n_queries, residual, first in (
        (1, 1, 0, 0), (64, 64, 0, 0), (65, 1, 0, 0), (200, 200, 0, 0), (200, 7, 0, 0),
        (200, 200, 30, 0), (200, 7, 30, 0), (200, 33, 8, 0), (200, 1, 30, 0), (40, 40, 64, 0),
        (200, 7, 30, 190), (200, 90, 70, 100),
    ):  # fmt: skip
        yield pytest.param(
            n_tokens, n_queries, residual, first, id=f"{n_tokens}-{n_queries}-{residual}-{first}"
        )


def layout(n_tokens: int, n_queries: int, residual: int, first: int) -> tuple[Any, torch.Tensor]:
    """(stored, band_start, residual) of a view, and which form each query reads, [Q, T]."""
    positions = torch.arange(n_tokens - n_queries, n_tokens).unsqueeze(1)
    keys = torch.arange(n_tokens)
    if residual == 0:
        return (n_tokens, n_tokens, None), torch.zeros(n_queries, n_tokens, dtype=torch.bool)
    band = max(n_tokens - n_queries - residual, first, 0)
    dense = keys >= (positions - residual + 1).clamp_min(band)
    return (max(n_tokens - residual, band), band, residual), dense


@pytest.mark.parametrize(("n_tokens", "n_queries", "residual", "first"), list(cases()))
@pytest.mark.parametrize("kind", ["causal", "padded", "float", "softcap", "sinks"])
def test_equals_plain_softmax(
    n_tokens: int, n_queries: int, residual: int, first: int, kind: str
) -> None:
    parts = tensors(n_tokens, n_queries)
    causal = torch.ones(n_queries, n_tokens, dtype=torch.bool).tril(n_tokens - n_queries)
    mask: torch.Tensor | None = None
    if kind == "padded":
        mask = causal.expand(ROWS, 1, -1, -1).clone()
        mask[1, :, :, : n_tokens // 2] = False  # rows of it see nothing at all
    if kind == "float":
        noise = torch.randn(
            1, HEADS, n_queries, n_tokens, generator=torch.Generator().manual_seed(9)
        )
        mask = noise.masked_fill(~causal, torch.finfo(torch.float32).min)
    scoring = Scoring(
        0.4,
        mask,
        True,
        1.5 if kind == "softcap" else None,
        torch.linspace(-2, 3, HEADS) if kind == "sinks" else None,
    )
    shape, dense = layout(n_tokens, n_queries, residual, first)
    found = attend(view_of(parts, *shape), parts[0], scoring)
    torch.testing.assert_close(found, expected(parts, dense, scoring).float(), rtol=1e-4, atol=2e-5)


def test_a_bidirectional_mask_is_obeyed() -> None:
    parts = tensors(70, 70)
    scoring = Scoring(0.4, torch.ones(1, 1, 70, 70, dtype=torch.bool), True, None, None)
    shape, dense = layout(70, 70, 20, 0)
    found = attend(view_of(parts, *shape), parts[0], scoring)
    torch.testing.assert_close(found, expected(parts, dense, scoring).float(), rtol=1e-4, atol=2e-5)


def test_huge_logits_stay_finite() -> None:
    query, *rest = tensors(130, 130)
    parts = (query * 1e4, *rest)
    shape, _ = layout(130, 130, 20, 0)
    found = attend(view_of(parts, *shape), parts[0], Scoring(1.0, None, True, None, None))
    assert bool(found.isfinite().all())


def test_wrong_masks_and_pairs_are_named() -> None:
    parts = tensors(20, 4)
    view = view_of(parts, 20, 20, None)
    mask = torch.ones(1, 1, 4, 19, dtype=torch.bool)
    with pytest.raises(FewbitError, match=r"\[batch, 1 or 6, 4, 20\].* got \[1, 1, 4, 19\]"):
        attend(view, parts[0], Scoring(1.0, mask, True, None, None))
    with pytest.raises(FewbitError, match="got 3 queries for 4 new keys"):
        attend(view, parts[0][:, :, :3], Scoring(1.0, None, True, None, None))
    module = torch.nn.Module()
    other = view_of(parts, 20, 20, None)
    with pytest.raises(FewbitError, match="one cache update"):
        kv_attention.kv_attention(module, parts[0], Handle(view, 0), Handle(other, 1), None)
    with pytest.raises(FewbitError, match=r"no dropout, got 0\.5"):
        kv_attention.kv_attention(
            module, parts[0], Handle(view, 0), Handle(view, 1), None, dropout=0.5
        )


def test_handles_have_a_shape_and_nothing_of_a_tensor() -> None:
    view = view_of(tensors(20, 4), 20, 20, None)
    assert Handle(view, 0).shape == (ROWS, KV_HEADS, 20, DIM)
    assert Handle(view, 1).shape[-1] == VALUE_DIM
    assert Handle(view, 0).dtype == torch.float32


def test_plain_tensors_get_the_librarys_attention() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, keys, values, *_ = tensors(9, 9)
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    arguments = (module, query, keys, values[..., :DIM], None)
    found, none = kv_attention.kv_attention(*arguments, scaling=0.3)  # type: ignore[arg-type]
    wanted, _ = sdpa_attention_forward(*arguments, scaling=0.3)  # type: ignore[arg-type]
    assert none is None and torch.equal(found, wanted)


@pytest.mark.parametrize("n_queries", [9, 1])
def test_plain_tensors_with_caps_and_sinks(n_queries: int) -> None:
    parts = tensors(9, n_queries)
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    scoring = Scoring(0.4, None, True, 1.5, torch.linspace(-2, 3, HEADS))
    found, _ = kv_attention.kv_attention(
        module, *parts[:3], None, scaling=0.4, softcap=1.5, s_aux=scoring.sinks  # type: ignore[arg-type]
    )  # fmt: skip
    dense = torch.ones(n_queries, 9, dtype=torch.bool)
    wanted = expected(parts, dense, scoring).float().transpose(1, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


def test_registration_covers_attention_and_masks() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    register()
    register()
    assert AttentionInterface()[kv_attention.NAME] is kv_attention.kv_attention
    assert AttentionMaskInterface()[kv_attention.NAME] is sdpa_mask


def test_autocast_around_a_call_changes_nothing() -> None:
    parts = tensors(200, 200)
    shape, _ = layout(200, 200, 30, 0)
    scoring = Scoring(0.4, None, True, None, None)
    wanted = attend(view_of(parts, *shape), parts[0], scoring)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(view_of(parts, *shape), parts[0], scoring)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("residual", [0, 30])
def test_padding_skips_what_no_query_of_a_prompt_sees(
    causal: bool, residual: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = tensors(300, 300)
    mask = torch.ones(ROWS, 1, 300, 300, dtype=torch.bool)
    if causal:
        mask = mask.tril()
    mask[1, :, :, :100] = False
    n_scored: list[int] = []
    masked = kv_attention._masked

    def spy(scores: torch.Tensor, *others: Any) -> torch.Tensor:
        n_scored.append(scores.shape[-1] * scores.shape[-2])
        return masked(scores, *others)

    monkeypatch.setattr(kv_attention, "_masked", spy)
    shape, dense = layout(300, 300, residual, 0)
    scoring = Scoring(0.4, mask, True, None, None)
    found = attend(view_of(parts, *shape), parts[0], scoring)
    torch.testing.assert_close(found, expected(parts, dense, scoring).float(), rtol=1e-4, atol=2e-5)
    skipping = sum(n_scored)
    n_scored.clear()
    additive = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)  # these are not looked at
    attend(view_of(parts, *shape), parts[0], Scoring(0.4, additive, True, None, None))
    if causal:
        assert skipping < 0.7 * sum(n_scored), "queries before a run were scored against it"
