"""Products with fle4 and fle3 on a CPU: the bits of the dense product, one buffer for all layers."""

import gc
import threading
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from fewbit.quant import cpu, cpu_fle
from fewbit.quant.dispatch import explain
from fewbit.quant.errors import FormatError, NoKernelError
from fewbit.quant.formats import _fle_native
from fewbit.quant.formats.fle import FleOptions, to_fle
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.kernel import M_BUCKETS, Problem
from fewbit.quant.linear import QuantLinear
from fewbit.quant.machine import load_device
from fewbit.quant.packed import PackedTensor
from fle_weights import any_bits, spread_weight, words

BF16 = torch.bfloat16
(KERNEL,) = cpu_fle.KERNELS
PROBLEM = Problem("fle4", FleOptions(9), 1, 1, 4096, 4096, BF16, "cpu")
both = pytest.mark.parametrize("bits", [4, 3])


@pytest.fixture(params=["native", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without a C compiler."""
    if request.param == "torch":
        monkeypatch.setattr(_fle_native, "serves", lambda *tensors: False)
    return str(request.param)


@pytest.fixture(autouse=True)
def scratch(monkeypatch: pytest.MonkeyPatch) -> cpu_fle.Scratch:
    """A new one for each test."""
    fresh = cpu_fle.Scratch()
    monkeypatch.setattr(cpu_fle, "SCRATCH", fresh)
    return fresh


def layer_of(weight: torch.Tensor, bits: int) -> QuantLinear:
    return QuantLinear.from_packed(to_fle(weight, bits), None, weight.dtype)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit by bit."""
    return found.dtype == expected.dtype and torch.equal(
        found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    )


# ---- products -------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 300), (65, 63), (200, 136), (320, 256)])
def test_bits_of_the_dense_product(
    form: str, bits: int, dtype: torch.dtype, n: int, k: int
) -> None:
    weight = spread_weight(n, k)
    layout = KERNEL.prepare(to_fle(weight, bits), dtype)
    generator = torch.Generator().manual_seed(0)
    for m in (1, 2, 3, 5, 16, 33, 64, 200):
        x = torch.randn(m, k, generator=generator).to(dtype)
        assert same(KERNEL.launch(x, layout), functional.linear(x, weight.to(dtype)))


@both
def test_weights_of_any_bits(bits: int) -> None:
    """Inf and NaN among them: one column of x picks one column of the weight."""
    weight = any_bits(100, 70)
    layout = KERNEL.prepare(to_fle(weight, bits), BF16)
    x = torch.eye(70)[:1].to(BF16)
    assert same(KERNEL.launch(x, layout), functional.linear(x, weight))
    assert same(cpu_fle.SCRATCH.matrix(100, 70).view(torch.int16), words(weight))


@both
def test_layers_choose_it_and_give_the_bits_of_dense_ones(form: str, bits: int) -> None:
    weight = spread_weight(200, 136)
    layer = layer_of(weight, bits)
    for shape in ((136,), (1, 136), (2, 40, 136)):
        x = torch.randn(shape).to(BF16)
        with torch.no_grad():
            assert same(layer(x), functional.linear(x, weight))
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        x = torch.randn(3, 136)
        assert same(layer(x), functional.linear(x, weight))
    x = torch.randn(3, 136).to(BF16).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and same(x.grad, torch.ones(3, 200).to(BF16) @ weight)


def test_after_inference_mode_the_buffer_can_still_be_written(form: str) -> None:
    weight, x = spread_weight(70, 66), torch.randn(3, 66).to(BF16)
    layer, expected = layer_of(weight, 4), functional.linear(x, weight)
    with torch.inference_mode():
        assert same(layer(x), expected)
    assert same(layer(x), expected)
    with torch.inference_mode():
        assert same(layer(x), expected)


def test_compiled_models() -> None:
    weight, x = spread_weight(70, 66), torch.randn(3, 66).to(BF16)
    layer = layer_of(weight, 4)
    compiled = torch.compile(lambda x: layer(x) + 1, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert same(compiled(x), functional.linear(x, weight) + 1)


@pytest.mark.skipif(
    not _fle_native.serves(torch.empty(0)), reason="the torch form trusts its parts"
)
def test_a_damaged_weight_is_named() -> None:
    packed = to_fle(any_bits(70, 66), 4)
    packed.terms[0].parts["position"][3] = -1
    layout = KERNEL.prepare(packed, BF16)
    with pytest.raises(FormatError, match="positions must be 0 to 4095, inside the tile"):
        KERNEL.launch(torch.zeros(1, 66).to(BF16), layout)


# ---- memory ---------------------------------------------------------------------------------


def bf16_storages() -> dict[int, int]:
    """Bytes of every bf16 storage of 16 KiB or more, by address."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor]
    storages = [t.untyped_storage() for t in tensors if t.dtype == BF16 and not t.is_meta]
    return {s.data_ptr(): s.nbytes() for s in storages if s.nbytes() >= 1 << 14}


@both
def test_all_layers_share_one_buffer_of_the_largest(
    form: str, bits: int, scratch: cpu_fle.Scratch
) -> None:
    shapes = [(128, 192), (200, 136), (320, 256), (256, 320), (64, 128)]
    layers = [layer_of(spread_weight(n, k, seed=n), bits) for n, k in shapes]
    held = cpu.DENSE_BUDGET.held
    before = bf16_storages()
    with torch.no_grad():
        for m in (1, 3, 64):
            for layer in layers:
                layer(torch.zeros(m, layer.in_features).to(BF16))
    made = {at: size for at, size in bf16_storages().items() if at not in before}
    assert made == {scratch.buffer.data_ptr(): 320 * 256 * 2}
    assert cpu.DENSE_BUDGET.held == held


def test_a_layout_is_the_stored_parts() -> None:
    packed = to_fle(spread_weight(70, 66), 3)
    layout = KERNEL.prepare(packed, BF16)
    for name, part in packed.terms[0].parts.items():
        assert layout.parts[name].data_ptr() == part.data_ptr()


def test_a_buffer_grows_and_never_shrinks(scratch: cpu_fle.Scratch) -> None:
    assert scratch.matrix(3, 4).shape == (3, 4) and scratch.buffer.numel() == 12
    assert scratch.matrix(5, 4).is_contiguous() and scratch.buffer.numel() == 20
    address = scratch.buffer.data_ptr()
    assert scratch.matrix(2, 2).data_ptr() == address and scratch.buffer.numel() == 20


def test_each_thread_has_its_own_for_as_long_as_it_lives(scratch: cpu_fle.Scratch) -> None:
    weights = [spread_weight(200, 136, seed=seed) for seed in range(3)]
    layers = [layer_of(weight, 4) for weight in weights]
    x = torch.randn(2, 136).to(BF16)
    expected = [functional.linear(x, weight) for weight in weights]
    wrong, buffers, start = [], [], threading.Barrier(3)

    def work(index: int) -> None:
        start.wait()
        with torch.no_grad():
            wrong.extend(i for i in range(40) if not same(layers[index](x), expected[index]))
        buffers.append(weakref.ref(scratch.buffer))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong and len(buffers) == 3 and all(buffer() is None for buffer in buffers)
    assert scratch.buffer.numel() == 0  # that of this thread


# ---- choice ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fle4", "fle3"])
def test_the_plan_for_a_cpu_at_every_size(name: str) -> None:
    for machine in (None, load_device("cpu")):
        for dtype in (BF16, torch.float32, torch.float16):
            for m in M_BUCKETS:
                of = replace(PROBLEM, format=name, m_bucket=m, dtype=dtype, machine=machine)
                found = explain(of)
                assert found.chosen == "fle_scratch"
                for kernel in ("dense_cached", "dense_chunked"):
                    (reason,) = found.refused[kernel]
                    assert reason.code == "FORMAT" and reason.fix == "use fle_scratch"
                    assert f"got {name}, held to save memory" in reason.text
                    assert "a decoded copy would take it again" in reason.text


def test_what_is_refused() -> None:
    def codes(of: Problem) -> list[str]:
        return [reason.code for reason in KERNEL.refuse(of)]

    assert codes(PROBLEM) == []
    assert codes(replace(PROBLEM, activation="int8_token")) == []  # x comes rounded
    assert codes(replace(PROBLEM, device="cuda")) == ["ARCH"]
    other = replace(PROBLEM, format="int_group", options=IntGroupOptions(4, 128), n_terms=2)
    assert codes(other) == ["FORMAT", "TERMS"]
    assert all("got " in reason.text and reason.fix for reason in KERNEL.refuse(other))


def test_weights_that_are_no_single_matrix() -> None:
    stack = to_fle(torch.stack([spread_weight(8, 8)] * 2), 4)
    one = to_fle(spread_weight(8, 8), 4)
    two: Any = PackedTensor((8, 8), one.terms * 2)
    for packed, told in ((stack, r"got fle4 \[2, 8, 8\]"), (two, r"got fle4 \+ fle4 \[8, 8\]")):
        with pytest.raises(NoKernelError, match=told):
            KERNEL.prepare(packed, BF16)


def test_estimates_are_decoding_and_the_product() -> None:
    for m in M_BUCKETS:
        of = replace(PROBLEM, m_bucket=m)
        decoding = KERNEL.seconds(of) - cpu.seconds_dense(of)
        assert decoding == pytest.approx(4096**2 * (12.1 / 8 + 2) / 15e9)
        assert KERNEL.seconds(replace(of, format="fle3")) < KERNEL.seconds(of)
