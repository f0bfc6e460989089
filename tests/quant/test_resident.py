"""Models with coded weights compute the bits of the plain model, and never from a stale buffer."""

import copy
import gc
import pickle
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fewbit.quant import resident
from fewbit.quant.errors import FormatError
from fewbit.quant.resident import Residence, keep_coded
from forking import passed_in_a_fresh_process, true_in_a_fork


@dataclass(eq=False)
class Stored:
    """A coded weight as a copy of it. seconds: that decoding takes. threads: that decoded it."""

    value: torch.Tensor
    seconds: float = 0.0
    error: Exception | None = None
    threads: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def n_bytes(self) -> int:
        return self.value.nbytes * 2 // 3

    def decode_into(self, out: torch.Tensor) -> None:
        self.threads.append(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        if self.seconds:
            time.sleep(self.seconds)
        out.copy_(self.value)


def llama(layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True, eos_token_id=96, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16().eval()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=3, num_decoder_layers=3,
        num_heads=4, decoder_start_token_id=0, eos_token_id=96, pad_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def stored(model: nn.Module, seconds: float = 0.0) -> dict[str, Stored]:
    return {name: Stored(p.detach().clone(), seconds) for name, p in model.named_parameters()}


def kept(model: nn.Module) -> tuple[dict[str, Stored], Residence]:
    coded = stored(model)
    return coded, keep_coded(model, coded)


class Stack(nn.Module):
    """Layers [4, 4] of whole numbers, added in any order; a model as small as can be."""

    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(n))
        self.head = nn.Linear(4, 4, bias=False)
        for at, layer in enumerate(self.layers):
            nn.init.constant_(layer.weight, float(at + 1))
            nn.init.constant_(layer.bias, 0.5)

    def forward(self, x: torch.Tensor, order: tuple[int, ...] = (0, 1, 2, 3)) -> torch.Tensor:
        return self.head(sum(self.layers[at](x) for at in order))


# ---- the bits of the plain model ------------------------------------------------------------


@pytest.mark.parametrize("no_gradient", [torch.no_grad, torch.inference_mode])
def test_llama_in_prefill_and_token_by_token(no_gradient: Callable[[], object]) -> None:
    plain, model = llama(), llama()
    coded, residence = kept(model)
    ids = torch.arange(14).reshape(2, 7) % 97
    with no_gradient():
        for _ in range(2):
            assert torch.equal(model(ids).logits, plain(ids).logits)
        cached, wanted = None, None
        for at in range(5):
            found = model(ids[:, at : at + 1], past_key_values=cached, use_cache=True)
            expected = plain(ids[:, at : at + 1], past_key_values=wanted, use_cache=True)
            assert torch.equal(found.logits, expected.logits)
            cached, wanted = found.past_key_values, expected.past_key_values
    args = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    found = model.generate(ids, output_logits=True, **args)
    expected = plain.generate(ids, output_logits=True, **args)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(*pair) for pair in zip(found.logits, expected.logits, strict=True))
    counts = residence.counts
    assert counts.late == 1 and counts.ahead == counts.late + counts.ahead - 1 > 50
    assert all(
        thread.startswith("fewbit-decode")
        for name, one in coded.items() if ".layers." in name for thread in one.threads
    )  # fmt: skip


def test_t5_has_two_lists() -> None:
    plain, model = t5(), t5()
    _, residence = kept(model)
    assert len(residence._slots) == 2
    assert [len(slots.blocks) for slots in residence._slots] == [3, 3]
    ids = torch.arange(10).reshape(2, 5) % 97
    with torch.no_grad():
        found = model(input_ids=ids, decoder_input_ids=ids[:, :3]).logits
        assert torch.equal(found, plain(input_ids=ids, decoder_input_ids=ids[:, :3]).logits)
    args = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.generate(ids, **args), plain.generate(ids, **args))
    assert residence.counts.late == 2


def test_memory_is_coded_bytes_two_blocks_and_what_is_in_no_block() -> None:
    model = llama(layers=6)
    blocks = sum(p.nbytes for p in model.model.layers.parameters())
    outside = sum(p.nbytes for p in model.parameters()) - blocks
    coded, residence = kept(model)
    wanted = sum(one.n_bytes for name, one in coded.items() if ".layers." in name)
    assert residence.coded_bytes == wanted
    assert residence.buffer_bytes == 2 * blocks // 6  # all sizes are multiples of 64 bytes
    assert residence.plain_bytes == outside
    with torch.no_grad():
        model(torch.arange(4)[None])
    assert residence.n_bytes == wanted + 2 * blocks // 6 + outside
    held = [p for p in model.model.layers.parameters() if not p.is_meta]
    assert not held


def test_plain_weights_are_given_back() -> None:
    model = llama()
    held = [weakref.ref(p) for p in model.parameters()]
    kept(model)
    gc.collect()
    assert not [one for one in held if one() is not None]


def test_a_model_may_be_made_without_memory() -> None:
    plain = llama()
    with torch.device("meta"):
        model = LlamaForCausalLM(plain.config).bfloat16().eval()
    model.model.rotary_emb = plain.model.rotary_emb
    keep_coded(model, stored(plain))
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied, decoded once
    assert model.device == torch.device("cpu") and model.dtype == torch.bfloat16
    with torch.no_grad():
        ids = torch.arange(6)[None]
        assert torch.equal(model(ids).logits, plain(ids).logits)


# ---- order, threads, errors -----------------------------------------------------------------


def test_blocks_in_any_order_skipped_and_repeated() -> None:
    plain, model = Stack(), Stack()
    model.load_state_dict(plain.state_dict())
    _, residence = kept(model)
    x = torch.ones(2, 4)
    with torch.no_grad():
        for order in ((0, 1, 2, 3), (3, 2, 1, 0), (0, 0, 2), (1,), (3, 3, 3, 0, 2)):
            assert torch.equal(model(x, order), plain(x, order))
    assert residence.counts.late > 1


def test_threads_at_the_same_time() -> None:
    plain, model = llama(), llama()
    _, residence = kept(model)
    inputs = [torch.arange(at, at + 5)[None] for at in range(4)]
    with torch.no_grad():
        wanted = [plain(ids).logits for ids in inputs]
    found: dict[tuple[int, int], torch.Tensor] = {}

    def work(at: int) -> None:
        with torch.no_grad():
            for turn in range(5):
                found[at, turn] = model(inputs[at]).logits

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all(torch.equal(logits, wanted[at]) for (at, _), logits in found.items())
    assert all(p.is_meta for p in model.model.layers.parameters())
    assert residence.buffer_bytes == sum(p.nbytes for p in plain.model.layers[:2].parameters())


def test_an_error_names_the_parameter_where_it_is_needed() -> None:
    model = llama()
    coded, residence = kept(model)
    broken = coded["model.layers.2.mlp.up_proj.weight"]
    broken.error = ValueError("chunk 5: the checksum of its elements differs")
    seen: list[int] = []
    for at, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, at=at: seen.append(at))
    ids = torch.arange(4)[None]
    with (
        torch.no_grad(),
        pytest.raises(FormatError, match=r"layers\.2\.mlp\.up_proj\.weight cannot"),
    ):
        model(ids)
    assert seen == [0, 1]
    with pytest.raises(FormatError, match=r"up_proj.*chunk 5"):
        model.state_dict()
    with pytest.raises(FormatError, match=r"up_proj.*chunk 5"):
        residence.release()
    broken.error = None
    with torch.no_grad():
        assert torch.equal(model(ids).logits, llama()(ids).logits)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failing_or_interrupted_forward_leaves_nothing_behind(
    error: type[BaseException],
) -> None:
    plain, model = Stack(), Stack()
    model.load_state_dict(plain.state_dict())
    _, residence = kept(model)

    def stop(x: torch.Tensor) -> torch.Tensor:
        raise error

    for _ in range(2):
        model.layers[1].forward = stop
        with torch.no_grad(), pytest.raises(error):
            model(torch.ones(1, 4))
        del model.layers[1].forward
        with torch.no_grad():
            assert torch.equal(model(torch.ones(1, 4)), plain(torch.ones(1, 4)))
        assert all(p.is_meta for p in model.layers.parameters())
        assert residence.buffer_bytes == 2 * 128
    model.layers[2].forward = stop
    with torch.no_grad(), pytest.raises(error):
        model(torch.ones(1, 4), (1, 2))
    residence.release()
    assert torch.equal(model(torch.ones(1, 4), (0, 1)), plain(torch.ones(1, 4), (0, 1)))


def test_decoding_runs_beside_the_blocks() -> None:
    """Blocks that take 20 ms each, weights that take 15: only the first is waited for in full."""
    model = Stack(8)
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: time.sleep(0.02))
    coded = {f"layers.{at}.weight": Stored(torch.ones(4, 4), 0.015) for at in range(8)}
    residence = keep_coded(model, coded)
    started = time.perf_counter()
    with torch.no_grad():
        model(torch.ones(1, 4), tuple(range(8)))
    seconds = time.perf_counter() - started
    serial = 8 * (0.02 + 0.015)
    assert seconds < serial - 0.05, f"{seconds:.3f} s of {serial:.3f} s one after the other"
    counts = residence.counts
    assert (counts.ahead, counts.late) == (7, 1) and counts.waited_seconds < 0.06


# ---- gradients ------------------------------------------------------------------------------


def test_gradients_reach_inputs_through_weights_that_stay() -> None:
    plain, model = llama(), llama()
    plain.requires_grad_(False)
    model.requires_grad_(False)
    _, residence = kept(model)
    inputs = [
        plain.get_input_embeddings()(torch.arange(6)[None]).requires_grad_() for _ in range(2)
    ]
    for one, x in zip((plain, model), inputs, strict=True):
        one(inputs_embeds=x).logits.float().square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad) and inputs[0].grad.abs().sum() > 0
    assert not residence._slots[0].in_use and residence.buffer_bytes < 200_000


def test_a_gradient_that_came_in_unseen_is_refused_by_autograd() -> None:
    model = Stack()
    hidden = torch.ones(1, 4, requires_grad=True)
    model.layers[0].forward = lambda x: nn.functional.linear(hidden, model.layers[0].weight)
    model.requires_grad_(False)
    kept(model)
    y = model(torch.ones(1, 4))
    model(torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- outside of a run -----------------------------------------------------------------------


def test_parameters_between_runs_are_placeholders_that_cannot_be_read() -> None:
    plain, model = Stack(), Stack()
    kept(model)
    with torch.no_grad():
        model(torch.ones(1, 4))
    for name, parameter in model.layers.named_parameters():
        assert (
            parameter.is_meta and parameter.dtype == torch.float32 and not parameter.requires_grad
        )
        assert parameter.shape == plain.layers.get_parameter(name).shape
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            parameter.sum().item()
    assert model.head.weight.device.type == "cpu"


def test_a_state_dict_has_the_weights_in_memory_of_their_own() -> None:
    plain = Stack()
    model = copy.deepcopy(plain)
    _, residence = kept(model)
    state = model.state_dict()
    x = torch.ones(1, 4)
    with torch.no_grad():
        model(x)
        wanted = plain.state_dict()
        assert list(state) == list(wanted)
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
        assert torch.equal(model.layers[2].state_dict()["weight"], plain.layers[2].weight)
        state["layers.0.weight"].zero_()
        assert torch.equal(model(x), plain(x))
    residence.release()
    assert torch.equal(model.state_dict()["layers.0.weight"], wanted["layers.0.weight"])


def test_save_pretrained_writes_the_weights(tmp_path: Path) -> None:
    plain, model = llama(), llama()
    kept(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_what_would_go_wrong_in_silence_is_refused() -> None:
    model = Stack()
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    coded, residence = kept(model)
    with pytest.raises(FormatError, match=r"layers\.0\.weight is kept coded.*release"):
        model.load_state_dict(wanted)
    for change in (model.half, model.double, lambda: model.to("meta"), model.layers[1].half):
        with pytest.raises(FormatError, match=r"float32 on cpu.*release"):
            change()
    assert model.head.weight.dtype == torch.float32  # nothing was changed by halves
    for one in (model, model.layers, model.layers[0]):
        with pytest.raises(FormatError, match="cannot be copied"):
            copy.deepcopy(one)
        with pytest.raises(FormatError, match="cannot be pickled"):
            pickle.dumps(one)
    with pytest.raises(FormatError, match="coded already"):
        keep_coded(model, coded)
    assert model.to("cpu") is model and model.float() is model and model.eval() is model
    with torch.no_grad():
        plain = Stack()
        plain.load_state_dict(wanted)
        assert torch.equal(model(torch.ones(1, 4)), plain(torch.ones(1, 4)))
    residence.release()


def test_release_gives_a_plain_model_back() -> None:
    plain = Stack()
    plain.layers[1].bias.requires_grad_(False)
    model = copy.deepcopy(plain)
    coded, residence = kept(model)
    with torch.no_grad():
        model(torch.ones(1, 4))
    residence.release()
    residence.release()
    assert residence.buffer_bytes == residence.coded_bytes == 0
    for name, parameter in model.named_parameters():
        wanted = plain.get_parameter(name)
        assert torch.equal(parameter, wanted) and parameter.requires_grad == wanted.requires_grad
    decoded = [len(one.threads) for one in coded.values()]
    assert torch.equal(model(torch.ones(1, 4)), plain(torch.ones(1, 4)))
    assert [len(one.threads) for one in coded.values()] == decoded
    assert not any(module._forward_pre_hooks for module in model.modules())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model).half()))
    assert copied.head.weight.dtype == torch.float16
    keep_coded(model, coded).release()


def test_a_run_cannot_be_released() -> None:
    model = Stack()
    _, residence = kept(model)
    entered, leave = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        entered.set()
        leave.wait(10)

    model.layers[2].register_forward_pre_hook(hold)
    thread = threading.Thread(target=torch.no_grad()(lambda: model(torch.ones(1, 4))))
    thread.start()
    assert entered.wait(10)
    with pytest.raises(FormatError, match="running"):
        residence.release()
    leave.set()
    thread.join()
    residence.release()


# ---- which parameters -----------------------------------------------------------------------


def test_only_named_parameters_are_coded() -> None:
    model = llama()
    names = [f"model.layers.{at}.mlp.up_proj.weight" for at in (0, 2)]
    coded = stored(model)
    residence = keep_coded(model, {name: coded[name] for name in names})
    metas = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert metas == names and residence.plain_bytes == 0
    with torch.no_grad():
        ids = torch.arange(4)[None]
        assert torch.equal(model(ids).logits, llama()(ids).logits)


def test_nothing_to_keep() -> None:
    residence = keep_coded(Stack(), {})
    assert residence.n_bytes == 0 and residence.counts.late == 0
    residence.release()


def test_wrong_names_shapes_and_dtypes() -> None:
    model = Stack()
    good = Stored(torch.zeros(4, 4))
    with pytest.raises(FormatError, match=r"no parameter layers\.0\.wieght \(did you mean"):
        keep_coded(model, {"layers.0.wieght": good})
    with pytest.raises(FormatError, match=r"\[4, 4\] in the model, but coded as .* \[4, 5\]"):
        keep_coded(model, {"layers.0.weight": Stored(torch.zeros(4, 5))})
    with pytest.raises(FormatError, match=r"float32 .*coded as torch\.float16"):
        keep_coded(model, {"layers.0.weight": Stored(torch.zeros(4, 4).half())})
    with pytest.raises(FormatError, match=r"head\.weight cannot be decoded: nothing"):
        keep_coded(
            model,
            {
                "layers.0.weight": good,
                "head.weight": Stored(model.head.weight.detach(), 0, OSError("nothing")),
            },
        )
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_block_on_several_devices_is_refused() -> None:
    model = Stack()
    coded = stored(model)
    items = resident._items(model, coded, None)
    items[1].device = torch.device("cuda:1")
    with pytest.raises(FormatError, match=r"layers\.0\.weight .*'cpu', 'cuda:1'.*one device"):
        resident._lists(model, items)


def test_weights_of_several_blocks_are_decoded_once_and_stay() -> None:
    model = Stack()
    model.layers[3].weight = model.layers[0].weight
    plain = copy.deepcopy(model)
    coded, residence = kept(model)
    assert model.layers[3].weight is model.layers[0].weight and not model.layers[0].weight.is_meta
    assert model.layers[0].bias.is_meta and residence.plain_bytes == 2 * 64
    with torch.no_grad():
        assert torch.equal(model(torch.ones(1, 4)), plain(torch.ones(1, 4)))
    assert len(coded["layers.0.weight"].threads) == 1


# ---- forks ----------------------------------------------------------------------------------


def test_a_fork_computes_while_other_threads_of_its_parent_run_blocks() -> None:
    """Block 2 is held by a thread, block 0 runs in the one that forks, and a lock is taken."""
    name = "test_a_fork_computes_while_other_threads_of_its_parent_run_blocks"
    if passed_in_a_fresh_process(__file__, name):
        return
    model = Stack()
    plain = copy.deepcopy(model)
    _, residence = kept(model)
    x, order = torch.ones(2, 4), (0, 2, 1, 3, 2)
    inside, go_on = threading.Event(), threading.Event()
    other = threading.Thread(target=model.layers[2], args=(x,))
    answers = []

    def stay(*_: object) -> None:
        inside.set()
        assert go_on.wait(30)

    held = model.layers[2].register_forward_pre_hook(stay)

    def work() -> bool:
        held.remove()
        torch.set_num_threads(1)
        if not model.layers[2].weight.is_meta or model.layers[0].weight.is_meta:
            return False
        again = torch.equal(model(x, order), plain(x, order))
        residence.release()
        return again and torch.equal(model(x, order), plain(x, order))

    def fork(*_: object) -> None:
        with residence._lock:
            answers.append(true_in_a_fork(work))

    with torch.no_grad():
        other.start()
        assert inside.wait(30)
        forking = model.layers[0].register_forward_pre_hook(fork)
        model.layers[0](x)
        forking.remove()
        go_on.set()
        other.join()
        held.remove()
        assert torch.equal(model(x, order), plain(x, order))
    assert answers == [True]
