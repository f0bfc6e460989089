"""The default recipe on the bundled trained model, and on one with outliers planted in it.

Fewer calibration and evaluation windows than `bench/quality.py`, which holds the figures of record:
the bounds here leave room for the draw.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.quant.evaluate import Evaluation, evaluate
from fewbit.quant.load import load
from fewbit.quant.pipeline import quantize
from fewbit.quant.recipe import load_recipe
from planted import bundled_model, plant

WINDOWS, LENGTH = 48, 256
SAMPLES = 64


def measured(source: Path, out: Path, **how: Any) -> Evaluation:
    quantize(source, out, samples=SAMPLES, length=LENGTH, device="cpu", **how)
    return evaluate(
        out, against=bundled_model(), length=LENGTH, max_tokens=WINDOWS * LENGTH,
        device="cpu", dtype=torch.float32, decode=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def clean_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluation]:
    out = tmp_path_factory.mktemp("clean") / "out"
    return out, measured(bundled_model(), out)


def test_the_planting_changes_no_logit(planted: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
            for path in (bundled_model(), planted)
        ]
    assert torch.equal(logits[0], logits[1])


def test_the_default_recipe_keeps_the_bundled_model(clean_run: tuple[Path, Evaluation]) -> None:
    _, result = clean_run
    assert result.perplexity_ratio is not None and result.kl_mean is not None
    assert result.perplexity_ratio <= 1.011
    assert result.kl_mean < 0.006
    assert 4.1 < result.bits_per_weight < 4.3


def test_planted_outliers_cost_at_most_a_third_more(
    clean_run: tuple[Path, Evaluation], planted: Path, tmp_path: Path
) -> None:
    _, clean = clean_run
    result = measured(planted, tmp_path / "out")
    assert result.perplexity_ratio is not None and clean.perplexity_ratio is not None
    assert result.perplexity_ratio - 1 <= 1.3 * (clean.perplexity_ratio - 1)
    assert result.kl_mean is not None and clean.kl_mean is not None
    assert result.kl_mean <= 1.3 * clean.kl_mean


def test_the_planting_bites_without_passes(planted: Path, tmp_path: Path) -> None:
    names = [use.name for use in load_recipe("w4a8kv4").passes]
    skipped = [f"pass.{name}.skip=true" for name in names]
    result = measured(planted, tmp_path / "out", settings=skipped)
    assert result.perplexity_ratio is not None and result.perplexity_ratio > 2


def test_generate_reads_the_packed_cache(clean_run: tuple[Path, Evaluation]) -> None:
    from fewbit.quant.kv_cache import KVCache
    from fewbit.quant.kv_install import model_policy

    model = load(clean_run[0], device="cpu")
    policy = model_policy(model)
    assert policy is not None and (policy.residual, policy.sink) == (64, 4)
    tokens = torch.randint(2, 4096, (1, 150), generator=torch.Generator().manual_seed(0))
    found = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert isinstance(found.past_key_values, KVCache)
    assert found.past_key_values.get_seq_length() == 157
    assert found.sequences.shape == (1, 158)


def test_inspect_names_cache_and_activation(clean_run: tuple[Path, Evaluation]) -> None:
    from fewbit.quant.inspect import inspect

    facts = inspect(clean_run[0], verify=True)
    assert facts.kv is not None and facts.kv["key"]["format"] == "int4_head"
    assert facts.recipe == "w4a8kv4" and facts.verified
    assert "int4_head" in facts.text()
