"""The protocol of `eval`: windows, figures, sizes, refusals; the bundled model's known numbers."""

import copy
import math
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewbit.quant.errors import CalibrationError, CheckpointError
from fewbit.quant.evaluate import (
    Evaluation,
    decode_speed,
    evaluate,
    evaluation_windows,
    paired_standard_error,
    summarize,
)
from fewbit.quant.generate import load_any
from fewbit.quant.kv_install import install
from fewbit.quant.kv_policy import parse_kv
from fewbit.quant.load import load_tokenizer
from fewbit.quant.pipeline import quantize
from fewbit.quant.score import Measured, evaluate_model

BUNDLED = Path(str(files("fewbit.quant") / "data" / "tiny-llama"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(BUNDLED)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_any(BUNDLED, "cpu", torch.float32)


def test_the_bundled_text_is_219_windows_of_256(model: Any, tokenizer: Any) -> None:
    windows = evaluation_windows(model, tokenizer, length=256)
    assert windows.shape == (219, 256)
    text = (files("fewbit.quant") / "data" / "eval.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert len(ids) == 56_160
    assert windows.flatten().tolist() == ids[: 219 * 256]


def test_length_is_the_context_by_default_and_bounded_by_it(model: Any, tokenizer: Any) -> None:
    assert evaluation_windows(model, tokenizer).shape == (54, 1024)
    for length in (1, 0, 1025):
        with pytest.raises(CalibrationError, match=f"must be 2 to 1024 tokens .* got {length}"):
            evaluation_windows(model, tokenizer, length=length)


def test_max_tokens_cuts_to_whole_windows(model: Any, tokenizer: Any) -> None:
    assert evaluation_windows(model, tokenizer, length=256, max_tokens=1000).shape == (3, 256)
    with pytest.raises(CalibrationError, match="max-tokens 100 holds no window of 256"):
        evaluation_windows(model, tokenizer, length=256, max_tokens=100)


def test_gemma_gets_a_start_token_before_every_window(tmp_path: Path, tokenizer: Any) -> None:
    text = SimpleNamespace(max_position_embeddings=64)
    config = SimpleNamespace(model_type="gemma2", get_text_config=lambda: text)
    path = tmp_path / "t.txt"
    path.write_text("one two three four five six seven eight nine ten")
    windows = evaluation_windows(SimpleNamespace(config=config), tokenizer, path, length=4)
    assert windows.shape[1] == 5
    assert windows[:, 0].tolist() == [tokenizer.bos_token_id] * len(windows)
    config.model_type = "llama"
    plain = evaluation_windows(SimpleNamespace(config=config), tokenizer, path, length=4)
    assert torch.equal(windows[:, 1:], plain)


def test_too_short_a_text_is_named(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("hello there")
    with pytest.raises(CalibrationError, match=r"short.txt: the text has \d+ tokens, one window"):
        evaluation_windows(model, tokenizer, path, length=256)


def test_float32_losses_of_the_bundled_model(model: Any, tokenizer: Any) -> None:
    """Six windows against torch's own cross entropy; over all 219, perplexity is 33.550."""
    windows = evaluation_windows(model, tokenizer, length=256)[::40]
    found = evaluate_model(model, windows, batch=4)
    with torch.no_grad():
        logits = model(windows).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), windows[:, 1:].flatten()
    )
    result = summarize(found, 1.0, 16.0, 0)
    assert result.perplexity == pytest.approx(math.exp(float(expected)), rel=1e-6)
    assert result.tokens == 6 * 255
    assert 20 < result.perplexity < 50


def measured() -> Measured:
    kl = torch.arange(1, 201, dtype=torch.float32) / 1000
    return Measured(
        torch.tensor([2.0, 3.0], dtype=torch.float64),
        200,
        torch.tensor([1.9, 2.9], dtype=torch.float64),
        kl,
        0.75,
    )


def test_figures_follow_from_losses() -> None:
    found = summarize(measured(), seconds=1.5, bits_per_weight=4.25, n_bytes=10)
    assert found.perplexity == pytest.approx(math.exp(2.5))
    assert found.reference_perplexity == pytest.approx(math.exp(2.4))
    assert found.perplexity_ratio == pytest.approx(math.exp(0.1))
    assert found.log_ratio_se == pytest.approx(0, abs=1e-12)
    assert found.kl_mean == pytest.approx(0.1005)
    assert found.kl_p99 == pytest.approx(0.198)  # 198 of 200 values do not exceed it
    assert found.window_losses == (2.0, 3.0)


def test_json_has_the_promised_keys_and_no_nulls() -> None:
    with_reference = summarize(measured(), 1.5, 4.25, 10).to_json()
    assert set(with_reference) == {
        "perplexity", "tokens", "seconds", "bits_per_weight", "bytes", "reference_perplexity",
        "perplexity_ratio", "kl_mean", "kl_p99", "top1_agreement", "log_ratio_se",
    }  # fmt: skip
    alone = summarize(Measured(torch.tensor([2.0]).double(), 9), 1.5, 4.25, 10)
    assert set(alone.to_json()) == {"perplexity", "tokens", "seconds", "bits_per_weight", "bytes"}
    assert "perplexity            7.3891" in alone.text()
    assert "ratio" not in alone.text()
    assert "± " in summarize(measured(), 1.5, 4.25, 10).text()


def test_a_loss_beyond_float_range_is_named() -> None:
    with pytest.raises(CheckpointError, match="mean loss 1e\\+03 nats"):
        summarize(Measured(torch.tensor([1000.0]).double(), 1), 1.0, 4.0, 1)


def test_paired_standard_error_is_that_of_the_differences() -> None:
    assert paired_standard_error([1.0, 5.0, 3.0], [0.0, 2.0, 1.0]) == pytest.approx(
        1 / math.sqrt(3)
    )
    assert paired_standard_error([1.0], [2.0]) is None
    with pytest.raises(ValueError, match="paired by window, got 2 and 1"):
        paired_standard_error([1.0, 2.0], [2.0])


def test_an_ordinary_checkpoint_against_itself() -> None:
    found = evaluate(BUNDLED, against=BUNDLED, length=64, max_tokens=256, device="cpu")
    assert isinstance(found, Evaluation)
    assert found.bits_per_weight == 16.0
    assert found.bytes == (BUNDLED / "model.safetensors").stat().st_size
    assert found.tokens == 4 * 63
    # bf16 arithmetic against float32 on the same weights
    assert found.perplexity_ratio == pytest.approx(1.0, abs=5e-3)
    assert found.kl_mean is not None and 1e-7 < found.kl_mean < 1e-3
    exact = evaluate(BUNDLED, BUNDLED, length=64, max_tokens=256, device="cpu", dtype=torch.float32)
    assert exact.perplexity_ratio == 1.0
    assert exact.kl_mean == pytest.approx(0, abs=1e-9)
    assert exact.top1_agreement == 1.0


def test_a_quantized_checkpoint_against_its_source(tmp_path: Path) -> None:
    quantize(BUNDLED, tmp_path / "out", recipe="w4a16-rtn", device="cpu")
    found = evaluate(
        tmp_path / "out", BUNDLED, length=128, max_tokens=2048, device="cpu", dtype=torch.float32
    )
    assert found.bits_per_weight == 4.125
    assert found.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert found.perplexity_ratio is not None and 1.0 < found.perplexity_ratio < 1.03
    assert found.kl_mean is not None and 1e-3 < found.kl_mean < 0.03
    assert found.top1_agreement is not None and 0.85 < found.top1_agreement < 1
    assert found.log_ratio_se is not None and 0 < found.log_ratio_se < 0.02


def test_decode_reads_in_steps_and_gives_the_same_figures_without_a_policy() -> None:
    settings: dict[str, Any] = {"length": 64, "max_tokens": 512, "device": "cpu"}
    whole = evaluate(BUNDLED, dtype=torch.float32, **settings)
    stepwise = evaluate(BUNDLED, BUNDLED, dtype=torch.float32, decode=True, **settings)
    assert stepwise.window_losses == pytest.approx(whole.window_losses, rel=1e-4)
    assert stepwise.perplexity_ratio == pytest.approx(1.0, abs=1e-5)
    assert stepwise.tokens == whole.tokens == 8 * 63


def test_decode_measures_the_packed_cache_against_a_reference_without_it(
    model: Any, tokenizer: Any
) -> None:
    windows = evaluation_windows(model, tokenizer, length=256, max_tokens=8 * 256)
    packed = copy.deepcopy(model)
    table = {"format": "int4_head"}
    install(packed, parse_kv({"key": table, "value": table}, "kv"))
    found = summarize(evaluate_model(packed, windows, model, step=16), 0, 32, 0)
    assert found.perplexity_ratio is not None and 1.001 < found.perplexity_ratio < 1.02
    unseen = summarize(evaluate_model(packed, windows, model), 0, 32, 0)
    assert unseen.perplexity_ratio == pytest.approx(1.0, abs=1e-5)


def test_decode_speed_counts_tokens_per_second(model: Any, tokenizer: Any) -> None:
    speed = decode_speed(model, tokenizer, n_new=4)
    assert 0.5 < speed < 1e5
