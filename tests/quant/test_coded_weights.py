"""Ways to hold entropy-coded weights: the same bits in all, memory where it is promised."""

import warnings
from functools import partial

import pytest
import torch
import transformers

from fewbit.kernels_triton import _triton
from fewbit.quant import coded_weights, hf
from fewbit.quant.codecs.coded import CodedTensor
from fewbit.quant.errors import CheckpointError, RecipeError
from fewbit.quant.evaluate import evaluate
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.linear import QuantLinear
from fewbit.quant.load import load
from fewbit.quant.pipeline import quantize
from fewbit.quant.stored import open_stored
from planted import bundled_model
from tiny_models import make_tokens, save


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    out = tmp_path_factory.mktemp("coded") / "out"
    quantize(bundled_model(), out, recipe="lossless")
    return out


@pytest.fixture(scope="module")
def original():
    return transformers.AutoModelForCausalLM.from_pretrained(bundled_model(), dtype="auto")


TOKENS = torch.randint(0, 1000, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("resident", ["decoded", "coded", "fle4", "fle3"])
def test_logits_and_tokens_are_the_originals(coded, original, resident):
    model = load(coded, device="cpu", resident=resident)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, original(TOKENS).logits)
    keys = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(TOKENS[:1], **keys), original.generate(TOKENS[:1], **keys))


def test_the_recipe_says_how_they_are_held(tmp_path):
    quantize(bundled_model(), tmp_path / "out", recipe="lossless", settings=["resident=coded"])
    assert open_stored(tmp_path / "out").resident == "coded"
    hooked = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert hooked.model.layers[0].mlp.up_proj.weight.is_meta
    assert hooked.coded_weights.n_bytes > 0
    plain = load(tmp_path / "out", device="cpu", resident="decoded")
    assert not plain.model.layers[0].mlp.up_proj.weight.is_meta
    with torch.no_grad():
        assert torch.equal(hooked(TOKENS).logits, plain(TOKENS).logits)


def test_coded_weights_take_less_memory(coded, original):
    model = load(coded, device="cpu", resident="coded")
    blocks = original.model.layers
    plain = sum(p.numel() * 2 for p in blocks.parameters())
    one = sum(p.numel() * 2 for p in blocks[0].parameters())
    assert model.coded_weights.n_bytes < 0.7 * plain + 2.1 * one + sum(
        p.numel() * 2 for p in model.parameters() if not p.is_meta
    )


def test_fle_holds_linear_layers_of_three_quarters(coded):
    model = load(coded, device="cpu", resident="fle4")
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantLinear)
    assert layer.packed.bits_per_weight <= 12.1
    assert type(model.model.embed_tokens) is torch.nn.Embedding


def test_saving(coded, tmp_path):
    load(coded, device="cpu", resident="coded").save_pretrained(tmp_path / "saved")
    found, wanted = load(tmp_path / "saved", device="cpu"), load(coded, device="cpu")
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    with pytest.raises(CheckpointError, match=r"as fle4, which is no form to store .*decoded"):
        load(coded, device="cpu", resident="fle4").save_pretrained(tmp_path / "fle")


def test_gpus_and_cpus_decode_and_no_other_device(coded):
    stored = open_stored(coded).contents()
    tensor = stored.coded("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: .*CPU or an NVIDIA GPU, got mps"):
        coded_weights._on_device(tensor, torch.device("mps"))


@pytest.mark.skipif(not _triton.interpreted(), reason="Triton's interpreter is not on")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_model_runs_on_what_the_gpu_decoder_decodes(tmp_path, monkeypatch):
    """All but the GPU: planes of a file are uploaded, and blocks are decoded ahead of use by the
    kernel, in Triton's interpreter; it is slow, so the CPU decodes most weights."""
    save("llama", tmp_path / "src", torch.bfloat16)
    quantize(tmp_path / "src", tmp_path / "out", recipe="lossless")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "src", dtype="auto")
    keep, held = coded_weights.keep, {}

    def keep_uploaded(model, kept, device):
        assert all(isinstance(tensor, CodedTensor) for tensor in kept.values())
        ours = [name for name in kept if "k_proj" in name or "layers.1.mlp.down_proj" in name]
        held.update({name: coded_weights._uploaded(kept[name], device) for name in ours})
        keep(model, {**kept, **held}, device)

    monkeypatch.setattr(hf, "keep", keep_uploaded)
    model = load(tmp_path / "out", device="cpu", resident="coded")
    names = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert len(held) == 3 and held.keys() < set(names)
    assert not any(tensor.checked for tensor in held.values())
    tokens = make_tokens()[:1, :4]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert all(tensor.checked for tensor in held.values())
    found, wanted = model.state_dict(), plain.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in names)


@pytest.mark.parametrize("arch", ["llama_tied", "mixtral", "gpt_oss", "qwen2"])
@pytest.mark.parametrize("resident", ["coded", "fle4"])
def test_what_cannot_be_held_so_is_decoded(arch, resident, tmp_path):
    save(arch, tmp_path / "src", torch.bfloat16)
    quantize(tmp_path / "src", tmp_path / "out", recipe="lossless")
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "src", dtype="auto")
    found = load(tmp_path / "out", device="cpu", resident=resident)
    with torch.no_grad():
        assert torch.equal(found(make_tokens()).logits, wanted(make_tokens()).logits)


def test_quantized_weights_beside_coded_ones(tmp_path):
    """The rest of a quantized model stays coded; quantized parts are decoded once."""
    keys = {"recipe": "w8a16", "settings": ["lossless=true", "weights.ignore=['re:.*mlp.*']"]}
    quantize(bundled_model(), tmp_path / "out", **keys)
    plain = load(tmp_path / "out", device="cpu")
    kept = load(tmp_path / "out", device="cpu", resident="coded")
    assert isinstance(kept.model.layers[0].self_attn.q_proj, QuantLinear)
    assert kept.model.layers[0].mlp.up_proj.weight.is_meta
    with torch.no_grad():
        assert torch.equal(kept(TOKENS).logits, plain(TOKENS).logits)


@pytest.mark.parametrize("resident", ["coded", "fle4"])
def test_another_dtype_decodes_says_so_and_can_be_saved(coded, resident, tmp_path):
    with pytest.warns(RuntimeWarning, match=rf"'{resident}': 0 weights .* 44 are .*float32"):
        model = load(coded, device="cpu", dtype=torch.float32, resident=resident)
    model.save_pretrained(tmp_path / "saved")
    found = load(tmp_path / "saved", device="cpu").state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert not model.model.layers[0].mlp.up_proj.weight.is_meta


@pytest.mark.parametrize("resident", ["coded", "fle4", "fle3"])
def test_nothing_coded_is_refused(resident, tmp_path):
    save("llama", tmp_path / "src", torch.bfloat16)
    quantize(tmp_path / "src", tmp_path / "out", recipe="w8a16")
    with pytest.raises(
        RecipeError, match=rf"'{resident}' .*none of .*out is coded: it has 1\d quantized weights and "
        r"\d+ plain tensors; quantize again with lossless=true, or leave resident out"
    ):  # fmt: skip
        load(tmp_path / "out", device="cpu", resident=resident)
    load(tmp_path / "out", device="cpu", resident="decoded")


def test_a_checkpoint_that_asks_for_more_than_can_be_is_decoded_and_saved(tmp_path):
    """fle needs bfloat16. What is saved holds nothing coded, and asks for nothing."""
    save("llama", tmp_path / "src", torch.float16)
    quantize(tmp_path / "src", tmp_path / "out", recipe="lossless", settings=["resident=fle4"])
    for way in (partial(load, device="cpu"), transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.warns(RuntimeWarning, match=r"'fle4': 0 weights are held so, \d+ are decoded"):
            model = way(tmp_path / "out")
    model.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = load(tmp_path / "saved", device="cpu").state_dict()
    assert open_stored(tmp_path / "saved").resident == "decoded"
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_stored_parts_stay_where_they_are_when_the_rest_is_moved():
    """On a GPU kernels have layouts of their own; the meta device stands for one."""
    terms = [("int_group", IntGroupOptions(4, 32))]
    layer = QuantLinear((8, 32), terms, True, torch.float32, "cpu")
    model = torch.nn.Sequential(layer, torch.nn.Linear(8, 8))
    coded_weights.keep(model, {}, torch.device("meta"))
    assert model[1].weight.is_meta and layer.bias.is_meta and layer.device.type == "meta"
    assert not any(tensor.is_meta for _, _, tensor in layer._parts())


def test_perplexity_is_unchanged(tmp_path, coded):
    found = evaluate(coded, against=bundled_model(), length=64, max_tokens=512, device="cpu")
    plain = evaluate(bundled_model(), length=64, max_tokens=512, device="cpu")
    assert found.perplexity == plain.perplexity


def test_an_unknown_way_is_named(coded):
    with pytest.raises(RecipeError, match=r"resident must be one of decoded, coded, fle4, fle3"):
        load(coded, device="cpu", resident="packed")
