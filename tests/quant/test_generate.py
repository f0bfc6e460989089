"""Opening checkpoints, greedy and sampled continuation, refusals."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.quant.errors import CheckpointError, RecipeError
from fewbit.quant.generate import (
    continue_text,
    generate,
    is_ours,
    load_any,
)
from fewbit.quant.load import load_tokenizer

BUNDLED = Path(str(files("fewbit.quant") / "data" / "tiny-llama"))
PROMPT = "The people of the United States"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(BUNDLED)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_any(BUNDLED, "cpu", torch.float32)


def test_greedy_is_the_argmax_chain_and_leaves_out_the_prompt(model: Any, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(6):
        with torch.no_grad():
            following = model(ids, use_cache=False).logits[0, -1].argmax()
        ids = torch.cat([ids, following.view(1, 1)], dim=1)
    expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert continue_text(model, tokenizer, PROMPT, max_new_tokens=6) == expected
    assert expected.strip()


def test_sampling_depends_on_the_seed_alone(model: Any, tokenizer: Any) -> None:
    def draw(seed: int) -> str:
        return continue_text(model, tokenizer, PROMPT, 12, temperature=1.0, seed=seed)

    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = draw(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert draw(3) == first
    assert len({draw(seed) for seed in range(4)}) == 4


def test_a_low_temperature_approaches_greedy(model: Any, tokenizer: Any) -> None:
    greedy = continue_text(model, tokenizer, PROMPT, 6)
    assert continue_text(model, tokenizer, PROMPT, 6, temperature=1e-4, seed=1) == greedy


def test_generate_opens_a_folder_in_its_own_dtype() -> None:
    assert load_any(BUNDLED, "cpu").dtype == torch.bfloat16
    assert generate(BUNDLED, PROMPT, max_new_tokens=3, device="cpu")


def test_bad_settings_are_named(model: Any, tokenizer: Any) -> None:
    for arguments, message in (
        (("", 4), "the prompt is empty"),
        ((PROMPT, 0), "max-new-tokens must be at least 1, got 0"),
        ((PROMPT, 1024), r"prompt \(\d+ tokens\) and max-new-tokens \(1024\) exceed .* of 1024"),
        ((PROMPT, 4, -0.5), "temperature must be 0 .* got -0.5"),
        ((PROMPT, 4, float("nan")), "temperature must be 0 .* got nan"),
    ):
        with pytest.raises(RecipeError, match=message):
            continue_text(model, tokenizer, *arguments)


def test_bad_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist and is no hub id"):
        load_any(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        load_any(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not valid JSON"):
        load_any(tmp_path)
    config = json.loads((BUNDLED / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="cannot be opened as a language model") as caught:
        load_any(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match="'cuda:99' is not available"):
        load_any(BUNDLED, "cuda:99")


def test_our_checkpoints_are_told_by_their_config(tmp_path: Path) -> None:
    config = json.loads((BUNDLED / "config.json").read_text())
    assert not is_ours(BUNDLED)
    for method, expected in (("fewbit", True), ("gptq", False)):
        config["quantization_config"] = {"quant_method": method}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert is_ours(tmp_path) is expected
