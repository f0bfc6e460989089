"""Losses, KL and agreement against direct formulas in float64; damage is named."""

import math
from types import SimpleNamespace

import pytest
import torch

import tiny_models
from fewbit.quant import score
from fewbit.quant.errors import CheckpointError
from fewbit.quant.kv_install import install
from fewbit.quant.kv_policy import parse_kv
from fewbit.quant.score import evaluate_model


class Table:
    """A model whose logits depend on the current token only: row `token` of a table."""

    device = torch.device("cpu")

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self.forwards: list[int] = []
        text = SimpleNamespace(vocab_size=table.shape[0])
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        self.forwards.append(input_ids.shape[0])
        return SimpleNamespace(logits=self.table[input_ids])


class Cacheless(Table):
    """Takes tokens only."""

    def forward(self, input_ids: torch.Tensor) -> None:
        raise AssertionError("the model ran")


def tables(vocabulary: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(vocabulary, vocabulary, generator=generator) * 3
    return first, first + torch.randn(first.shape, generator=generator)


def rows(n: int = 7, length: int = 6) -> torch.Tensor:
    return torch.randint(0, 11, (n, length), generator=torch.Generator().manual_seed(1))


def test_losses_kl_and_agreement_equal_the_formulas() -> None:
    ours, reference = tables()
    windows = rows()
    found = evaluate_model(Table(ours), windows, Table(reference))
    p, r = (torch.log_softmax(t.double(), -1)[windows[:, :-1]] for t in (ours, reference))
    following = windows[:, 1:, None]
    torch.testing.assert_close(found.window_losses, -p.gather(2, following).mean((1, 2)))
    assert found.reference_window_losses is not None and found.kl is not None
    torch.testing.assert_close(found.reference_window_losses, -r.gather(2, following).mean((1, 2)))
    kl = (r.exp() * (r - p)).sum(-1).flatten()
    torch.testing.assert_close(found.kl.double(), kl, rtol=1e-4, atol=1e-6)
    assert found.top1_agreement == float((p.argmax(-1) == r.argmax(-1)).double().mean())
    assert 0 < found.top1_agreement < 1
    assert found.n_predictions == 7 * 5
    assert found.window_losses.dtype == torch.float64


def test_without_a_reference_losses_are_the_same() -> None:
    ours, reference = tables()
    alone = evaluate_model(Table(ours), rows())
    paired = evaluate_model(Table(ours), rows(), Table(reference))
    assert torch.equal(alone.window_losses, paired.window_losses)
    assert alone.kl is None and alone.top1_agreement is None


def test_chunks_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, reference = tables()
    whole = evaluate_model(Table(ours), rows(), Table(reference), batch=7)
    monkeypatch.setattr(score, "_CHUNK", 2 * 11)  # two rows at a time; five predictions: 2, 2, 1
    model = Table(ours)
    steps = []
    parts = evaluate_model(
        model, rows(), Table(reference), batch=3, progress=lambda done, n: steps.append((done, n))
    )
    assert torch.equal(parts.window_losses, whole.window_losses)
    assert parts.kl is not None and whole.kl is not None and torch.equal(parts.kl, whole.kl)
    assert parts.top1_agreement == whole.top1_agreement
    assert model.forwards == [3, 3, 1]
    assert steps == [(3, 7), (6, 7), (7, 7)]


def test_half_precision_logits_are_normalised_in_float32() -> None:
    table = torch.zeros(4096, 4096, dtype=torch.bfloat16)
    found = evaluate_model(Table(table), torch.tensor([[1, 2, 3]]))
    assert float(found.window_losses[0]) == pytest.approx(math.log(4096), rel=1e-6)


def test_extreme_logits_give_no_nan_in_kl() -> None:
    table = torch.zeros(3, 3)
    table[:, 0] = 1e4  # r = 0 exactly for the others
    found = evaluate_model(Table(torch.zeros(3, 3)), torch.tensor([[0, 0]]), Table(table))
    assert found.kl is not None
    assert found.kl.tolist() == pytest.approx([math.log(3)], rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_logits_are_named_with_their_window(value: float) -> None:
    table = torch.zeros(11, 11)
    table[10, 4] = value
    windows = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 10, 8]])
    with pytest.raises(CheckpointError, match="NaN or Inf in window 2"):
        evaluate_model(Table(table), windows, batch=2)


def test_foreign_tokenizers_and_references_are_named() -> None:
    ours, _ = tables()
    with pytest.raises(CheckpointError, match=r"yields id 11, .* vocabulary has 11 entries"):
        evaluate_model(Table(ours), torch.tensor([[1, 11]]))
    with pytest.raises(CheckpointError, match=r"vocabularies differ \(11 and 12 entries\)"):
        evaluate_model(Table(ours), rows(), Table(torch.zeros(12, 12)))


@pytest.mark.parametrize("window", [{}, {"residual": 5, "sink": 2}], ids=["all", "window"])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen3_next"])
def test_steps_of_any_size_give_the_same_figures(arch: str, window: dict[str, int]) -> None:
    model, windows = tiny_models.make_model(arch), tiny_models.make_tokens(5, 33)
    whole = evaluate_model(model, windows).window_losses
    plain = evaluate_model(model, windows, step=16).window_losses
    torch.testing.assert_close(plain, whole, rtol=1e-4, atol=1e-4)
    table = {"format": "int4_head"}
    install(model, parse_kv({"key": table, "value": table, **window}, "kv"))
    bare = evaluate_model(model, windows).window_losses
    torch.testing.assert_close(bare, whole, rtol=1e-4, atol=1e-4)
    steps = [evaluate_model(model, windows, step=n, batch=2).window_losses for n in (1, 16, 33)]
    for found in steps:
        torch.testing.assert_close(found, steps[0], rtol=1e-4, atol=1e-4)
    assert float((steps[0] - whole).abs().max()) > 1e-3, "the packed cache was not in the loop"


def test_models_without_a_cache_are_named() -> None:
    with pytest.raises(CheckpointError, match="Cacheless reads no key-value cache"):
        evaluate_model(Cacheless(tables()[0]), rows(), step=4)
