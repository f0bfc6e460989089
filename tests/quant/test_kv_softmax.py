"""Attention in runs against plain softmax in float64: masks, caps, sinks, windows, and its record."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fewbit.quant import kv_softmax
from fewbit.quant.errors import FewbitError, NoKernelError
from fewbit.quant.formats.dense_head import DenseHeadOptions
from fewbit.quant.formats.int4_head import Int4HeadOptions
from fewbit.quant.kernel import AttentionProblem
from fewbit.quant.kv_softmax import KERNEL, attend, check_call
from fewbit.quant.kv_view import KVView, Scoring
from fewbit.quant.machine import load_device

ROWS, HEADS, KV_HEADS, DIM, VALUE_DIM = 2, 6, 2, 8, 12


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 64 keys and blocks of few queries, so that small cases take every branch."""
    monkeypatch.setattr(kv_softmax, "_RUN_ELEMENTS", 1)
    monkeypatch.setattr(kv_softmax, "_SCORES", ROWS * HEADS * 64 * 5)


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
    masked = kv_softmax._masked

    def spy(scores: torch.Tensor, *others: Any) -> torch.Tensor:
        n_scored.append(scores.shape[-1] * scores.shape[-2])
        return masked(scores, *others)

    monkeypatch.setattr(kv_softmax, "_masked", spy)
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


def test_wrong_masks_and_counts_are_named() -> None:
    parts = tensors(20, 4)
    view = view_of(parts, 20, 20, None)
    mask = torch.ones(1, 1, 4, 19, dtype=torch.bool)
    with pytest.raises(FewbitError, match=r"\[batch, 1 or 6, 4, 20\].* got \[1, 1, 4, 19\]"):
        check_call(view, parts[0], mask)
    with pytest.raises(FewbitError, match="got 3 queries for 4 new keys"):
        check_call(view, parts[0][:, :, :3], None)
    check_call(view, parts[0], torch.ones(1, HEADS, 4, 20))


def test_the_record_takes_every_call() -> None:
    options = Int4HeadOptions()
    asked = AttentionProblem(
        "int4_head", options, "dense_head", DenseHeadOptions(), 1, 500, 8, 4, 66, 512, 4096,
        torch.float32, "cpu", ("mask",), load_device("cpu"),
    )  # fmt: skip
    assert KERNEL.op == "attend" and KERNEL.refuse(asked) == ()
    gpu = replace(asked, device="cuda", machine=load_device("h200"))
    assert 0 < KERNEL.seconds(gpu) < KERNEL.seconds(gpu.at(1 << 20))
    with pytest.raises(NoKernelError, match="no weight"):
        KERNEL.prepare(None, torch.float32)  # type: ignore[arg-type]
