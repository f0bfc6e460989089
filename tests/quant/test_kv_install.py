"""Plain `generate()` on tiny models of every architecture, with the packed cache in it."""

import copy
import functools
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny_models
from fewbit.quant import kv_install
from fewbit.quant.errors import FewbitError, RecipeError
from fewbit.quant.kv_attention import NAME
from fewbit.quant.kv_cache import KVCache
from fewbit.quant.kv_install import install, model_policy, new_cache, passes_through, takes_handles
from fewbit.quant.kv_policy import KVPolicy, parse_kv

DENSE, INT4 = {"format": "dense_head"}, {"format": "int4_head"}
NEW = 20
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
PADDING = (0, 7, 3)
POLICIES = {
    "dense": {"key": DENSE, "value": DENSE},
    "dense_window": {"key": DENSE, "value": DENSE, "residual": 5, "sink": 2},
    "int4": {"key": INT4, "value": INT4},
    "int4_window": {"key": INT4, "value": INT4, "residual": 5, "sink": 2},
}
LATENT, STATEFUL, BOUNDED = "deepseek_v3", "qwen3_next", "mistral"


def policy(name: str) -> KVPolicy:
    return parse_kv(POLICIES[name], "kv")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = tiny_models.make_tokens(3, 20)
    mask = torch.ones_like(ids)
    for row, n_padded in enumerate(PADDING):
        mask[row, :n_padded] = 0
    return ids, mask


def installed(arch: str, name: str) -> Any:
    model = tiny_models.make_model(arch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        install(model, policy(name))
    return model


def caches_of(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The caches that the model's forwards get from now on."""
    seen: list[Any] = []
    forward = model.forward

    @functools.wraps(forward)  # generate() reads its signature
    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("past_key_values"))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", spy)
    return seen


@pytest.mark.parametrize("name", ["dense", "dense_window"])
@pytest.mark.parametrize("arch", tiny_models.ARCHITECTURES)
def test_lossless_pages_generate_what_the_librarys_cache_does(arch: str, name: str) -> None:
    ids, mask = batch()
    plain, packed = tiny_models.make_model(arch), installed(arch, name)
    modes: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 0}]
    if arch != STATEFUL:  # the library refuses to assist it
        modes.append({"prompt_lookup_num_tokens": 3})
    for mode in modes:
        one = slice(0, 1) if "prompt_lookup_num_tokens" in mode else slice(None)
        found = []
        for model in (plain, packed):
            torch.manual_seed(0)
            settings = {**GREEDY, **mode, "attention_mask": mask[one]}
            found.append(model.generate(ids[one], **settings))
        assert torch.equal(*found), f"{arch} {mode}"


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_oss", LATENT])
def test_a_padded_row_is_the_row_alone(arch: str, name: str) -> None:
    ids, mask = batch()
    model = installed(arch, name)
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for row, n_padded in enumerate(PADDING):
        alone = model.generate(ids[row : row + 1, n_padded:], **GREEDY)
        assert torch.equal(alone[0, -NEW:], together[row, -NEW:]), f"row {row}"


@pytest.mark.parametrize("name", ["int4", "int4_window"])
def test_assisted_decoding_and_beams_run_on_codes(name: str) -> None:
    model = installed("llama", name)
    ids, mask = batch()
    greedy = model.generate(ids[:1], **GREEDY)
    assert torch.equal(model.generate(ids[:1], prompt_lookup_num_tokens=3, **GREEDY), greedy)
    assistant = installed("llama", name)
    assert torch.equal(model.generate(ids[:1], assistant_model=assistant, **GREEDY), greedy)
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY)
    settings = {**GREEDY, "num_beams": 3}
    for row, n_padded in enumerate(PADDING):
        alone = model.generate(ids[row : row + 1, n_padded:], **settings)
        assert torch.equal(alone[0, -NEW:], beams[row, -NEW:])


def test_without_the_mask_registration_padding_would_be_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.masking_utils import AttentionMaskInterface

    ids, mask = batch()
    model = installed("llama", "dense")
    right = model.generate(ids, attention_mask=mask, **GREEDY)
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, NAME)
    wrong = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(right[0], wrong[0]), "the row without padding needs no mask"
    assert not torch.equal(right[1], wrong[1]), "nothing shows that the mask is used"


@pytest.mark.parametrize("arch", tiny_models.ARCHITECTURES)
def test_which_models_get_handles(arch: str) -> None:
    model = installed(arch, "int4")
    assert takes_handles(model) == (arch != LATENT)
    assert (model.config._attn_implementation == NAME) == (arch != LATENT)


def test_latent_attention_gets_decoded_tensors_and_packed_storage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = installed(LATENT, "int4")
    seen = caches_of(model, monkeypatch)
    model.generate(batch()[0], **GREEDY)
    layers = seen[-1].layers
    assert all(layer.pages is not None and not layer.handles for layer in layers)
    assert layers[0]._arena().storage[0]["codes"].shape[-1] == 10, "the latent of rank 20"


def test_generation_reserves_exactly_and_uses_our_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = installed("llama", "int4")
    seen = caches_of(model, monkeypatch)
    ids, mask = batch()
    model.generate(ids, attention_mask=mask, **GREEDY)
    assert all(cache is seen[0] for cache in seen) and isinstance(seen[0], KVCache)
    assert seen[0].layers[0]._arena().storage[0]["codes"].shape[0] == 3, "one page a row"
    assert seen[0].n_bytes == sum(layer.n_bytes for layer in seen[0].layers) > 0


def test_a_callers_cache_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DynamicCache, StaticCache

    model = installed("llama", "int4")
    ids = batch()[0]
    wanted = tiny_models.make_model("llama").generate(ids, **GREEDY)
    seen = caches_of(model, monkeypatch)
    own = DynamicCache(config=model.config)
    assert torch.equal(model.generate(ids, past_key_values=own, **GREEDY), wanted)
    assert seen[0] is own
    seen.clear()
    found = model.generate(ids, cache_implementation="static", disable_compile=True, **GREEDY)
    assert torch.equal(found, wanted) and isinstance(seen[-1], StaticCache)
    seen.clear()
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), wanted)
    assert all(cache is None for cache in seen)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_oss"])
def test_bare_forwards_work_with_and_without_a_cache(arch: str) -> None:
    ids, mask = batch()
    model, plain = installed(arch, "dense"), tiny_models.make_model(arch)
    with torch.no_grad():
        wanted = plain(ids, attention_mask=mask).logits
        found = model(ids, attention_mask=mask).logits
        cache = new_cache(model, max_tokens=20)
        parts = [
            model(ids[:, at : at + 5], attention_mask=mask[:, : at + 5], past_key_values=cache)
            for at in range(0, 20, 5)
        ]
    real = mask.bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-3, atol=1e-3)
    cached = torch.cat([part.logits for part in parts], dim=1)
    torch.testing.assert_close(cached[real], wanted[real], rtol=1e-3, atol=1e-3)


def test_a_conversation_goes_on_from_a_returned_cache() -> None:
    model = installed("llama", "int4_window")
    ids = batch()[0][:1]
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    assert isinstance(first.past_key_values, KVCache)
    longer = torch.cat([first.sequences, ids[:, :5]], dim=1)
    again = model.generate(longer, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(again, model.generate(longer, **GREEDY))


def test_switching_the_attention_afterwards_reads_decoded_tensors() -> None:
    model = installed("llama", "int4")
    ids, mask = batch()
    wanted = model.generate(ids, attention_mask=mask, **GREEDY)
    model.set_attn_implementation("eager")
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), wanted)


def test_copies_and_saved_models_are_whole(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = installed("llama", "int4")
    ids = batch()[0]
    wanted = model.generate(ids, **GREEDY)
    twin = copy.deepcopy(model)
    assert twin._prepare_cache_for_generation.model is twin
    assert torch.equal(twin.generate(ids, **GREEDY), wanted)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model_policy(again) is None and again.config._attn_implementation != NAME
    install(again, policy("int4"))
    assert torch.equal(again.generate(ids, **GREEDY), wanted)


def test_a_policy_can_be_replaced_and_is_told() -> None:
    model = installed("llama", "int4")
    assert model_policy(model) == policy("int4")
    install(model, policy("dense"))
    assert model_policy(model) == policy("dense")
    ids = batch()[0]
    wanted = tiny_models.make_model("llama").generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), wanted)


def test_models_without_a_growing_cache_are_named() -> None:
    from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

    small = {"num_layers": 1, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "vocab_size": 9}
    with pytest.raises(RecipeError, match="T5ForConditionalGeneration is an encoder-decoder"):
        install(T5ForConditionalGeneration(T5Config(**small)), policy("int4"))
    own = tiny_models.make_model("llama")
    own._supports_default_dynamic_cache = lambda: False  # as models with caches of their own say
    with pytest.raises(RecipeError, match="LlamaForCausalLM does not use the library's key-value"):
        install(own, policy("int4"))
    mamba = MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9))
    with pytest.warns(RuntimeWarning, match="changes nothing: no layer of MambaForCausalLM"):
        install(mamba, policy("int4"))
    assert mamba.generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape == (1, 4)
    with pytest.warns(RuntimeWarning, match="changes nothing: no layer of MistralForCausalLM"):
        install(tiny_models.make_model(BOUNDED), policy("int4"))


class _Direct(nn.Module):
    def forward(self, q: Any, k: Any, v: Any, cache: Any, attention_interface: Any) -> Any:
        if cache is not None:
            k, v = cache.update(k, v, 0)
        return attention_interface(self, q, k, v, None, scaling=1.0, dropout=0.0)


class _Reshapes(_Direct):
    def forward(self, q: Any, k: Any, v: Any, cache: Any, attention_interface: Any) -> Any:
        k, v = cache.update(k, v, 0)
        return attention_interface(self, q, k, v.transpose(1, 2), None, scaling=1.0)


class _Keeps(_Direct):
    def forward(self, q: Any, k: Any, v: Any, cache: Any, attention_interface: Any) -> Any:
        k, v = cache.update(k, v, 0)
        self.shared = k
        return attention_interface(self, q, k, v, None, scaling=1.0)


class _Biased(_Direct):
    def forward(self, q: Any, k: Any, v: Any, cache: Any, attention_interface: Any) -> Any:
        k, v = cache.update(k, v, 0)
        return attention_interface(self, q, k, v, None, position_bias=q)


class _Swaps(_Direct):
    def forward(self, q: Any, k: Any, v: Any, cache: Any, attention_interface: Any) -> Any:
        k, v = cache.update(k, v, 0)
        return attention_interface(self, q, v, k, None, scaling=1.0)


class _Elsewhere(_Direct):
    def store(self, k: Any, v: Any, cache: Any) -> Any:
        return cache.update(k, v, 0)


def test_what_counts_as_passing_through() -> None:
    assert passes_through(_Direct.forward) and takes_handles(_Direct())
    for kind in (_Reshapes, _Keeps, _Biased, _Swaps):
        assert not passes_through(kind.forward), kind.__name__
        assert not takes_handles(nn.ModuleList([_Direct(), kind()]))
    assert not takes_handles(_Elsewhere())
    assert not takes_handles(nn.Linear(2, 2)), "a model that never updates a cache is unknown"
    assert not passes_through(len), "no source"
    assert kv_install._tree(len) is None


def test_a_pickled_model_generates_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = installed("llama", "int4_window")
    ids, mask = batch()
    wanted = model.generate(ids, attention_mask=mask, **GREEDY)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for twin in twins:
        assert twin._prepare_cache_for_generation.model is twin
        seen = caches_of(twin, monkeypatch)
        assert torch.equal(twin.generate(ids, attention_mask=mask, **GREEDY), wanted)
        assert isinstance(seen[0], KVCache)


def test_a_pickled_model_generates_in_a_fresh_process(tmp_path: Path) -> None:
    model = installed("llama", "int4_window")
    ids, mask = batch()
    wanted = model.generate(ids, attention_mask=mask, **GREEDY)
    torch.save((model, ids, mask, GREEDY), tmp_path / "model.pt")
    program = (
        "import sys, torch\n"
        "model, ids, mask, settings = torch.load(sys.argv[1] + '/model.pt', weights_only=False)\n"
        "found = model.generate(ids, attention_mask=mask, **settings)\n"
        "torch.save(found, sys.argv[1] + '/found.pt')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert torch.equal(torch.load(tmp_path / "found.pt"), wanted)


@pytest.mark.parametrize("new", [NEW, 100])
@pytest.mark.parametrize("name", POLICIES)
def test_a_conversation_leaves_inference_mode(name: str, new: int) -> None:
    model = installed("llama", name)
    ids = batch()[0][:1]
    with torch.inference_mode():
        settings = {**GREEDY, "max_new_tokens": new, "min_new_tokens": new}
        first = model.generate(ids, return_dict_in_generate=True, **settings)
    longer = torch.cat([first.sequences.clone(), ids[:, :5]], dim=1)
    again = model.generate(longer, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(again, model.generate(longer, **GREEDY))


@pytest.mark.parametrize("arch", ["llama", "gpt_oss"])
def test_an_attention_that_the_caller_chose_stays(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = batch()
    default = tiny_models.make_model(arch)
    free = default.get_correct_attn_implementation(None)
    chosen = "eager" if free == "sdpa" else "flex_attention"
    default.config._attn_implementation_internal = chosen  # as from_pretrained leaves it
    install(default, policy("dense"))
    assert default.config._attn_implementation == chosen
    if chosen == "eager":
        seen = caches_of(default, monkeypatch)
        found = default.generate(ids, attention_mask=mask, **GREEDY)
        assert isinstance(seen[0], KVCache) and not seen[0].layers[0].handles
        wanted = tiny_models.make_model(arch).generate(ids, attention_mask=mask, **GREEDY)
        assert torch.equal(found, wanted)


def test_a_checkpoint_that_names_another_cache_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = installed("llama", "int4")
    ids = batch()[0]
    settings = {**GREEDY, "disable_compile": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.generate(ids, cache_implementation="static", **settings)  # the caller's own wish
    model.generation_config.cache_implementation = "static"
    with pytest.warns(RuntimeWarning, match="cache_implementation 'static'.*packed KV cache"):
        model.generate(ids, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.generate(ids, **settings)
    seen = caches_of(model, monkeypatch)
    model.generate(ids, cache_implementation="dynamic", **settings)
    assert isinstance(seen[0], KVCache)


def test_backward_after_a_cached_forward_is_refused() -> None:
    model = installed("llama", "int4")
    ids = batch()[0]
    loss = model(ids, labels=ids, past_key_values=new_cache(model)).loss
    with pytest.raises(FewbitError, match="takes no gradient"):
        loss.backward()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad is not None
