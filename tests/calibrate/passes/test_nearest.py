"""Nearest rounding: chunks change nothing, experts and odd sizes are kept apart."""

import pytest
import torch

from fewbit.calibrate.passes import nearest
from fewbit.quant.block import Block, Weight
from fewbit.quant.format import dequantize, find_format

STORE = find_format("int_group")


@pytest.mark.parametrize("shape", [(5, 48), (3, 7, 200), (1, 16)])
@pytest.mark.parametrize("group", [16, 128, "row"])
def test_chunked_equals_whole(shape, group, monkeypatch):
    options = STORE.Options(bits=5, group=group, symmetric=False)
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = Weight("w", value, "int_group", options)
    whole = nearest.round_nearest(weight)
    monkeypatch.setattr(nearest, "CHUNK_ELEMENTS", shape[-1])
    chunked = nearest.round_nearest(weight)
    for (name, a), (other, b) in zip(whole.named_parts(), chunked.named_parts(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert whole.shape == shape


def test_error_is_at_most_half_a_step():
    options = STORE.Options(bits=8, group=32, symmetric=False)
    value = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    weight = Weight("w", value, "int_group", options)
    nearest.PASS.run(Block("b", [weight]), {}, nearest.NearestOptions())
    step = weight.packed.terms[0].parts["scale_group"].float().repeat_interleave(32, dim=1)
    assert ((value - dequantize(weight.packed)).abs() <= step * 0.501).all()


def test_weights_that_are_packed_already_stay():
    options = STORE.Options()
    weight = Weight("w", torch.randn(4, 128), "int_group", options)
    weight.packed = nearest.round_nearest(weight)
    before = weight.packed
    nearest.PASS.run(Block("b", [weight]), {}, nearest.NearestOptions())
    assert weight.packed is before


@pytest.mark.parametrize("shape", [(5, 48), (3, 7, 200)])
def test_sums_equal_those_of_what_is_stored(shape):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = Weight("w", value, "int_group", STORE.Options(bits=3, group=32))
    packed = nearest.round_nearest(weight)
    delta = (dequantize(packed).double() - value.double()).square().sum()
    assert weight.measured["squared_error"] == pytest.approx(float(delta), rel=1e-5)
    assert weight.measured["squared_norm"] == pytest.approx(float(value.double().square().sum()))


def test_a_target_is_what_gets_rounded():
    value = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    weight = Weight("w", value, "int_group", STORE.Options(bits=8), target=value * 2)
    assert torch.allclose(dequantize(nearest.round_nearest(weight)), value * 2, atol=0.1)
    assert not weight.measured  # the sums would be those of the target


@pytest.mark.parametrize("shape", [(5, 48), (3, 7, 200)])
def test_scales_of_a_search_replace_fitting(shape, monkeypatch):
    monkeypatch.setattr(nearest, "CHUNK_ELEMENTS", 2 * shape[-1])
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    options = STORE.Options(bits=4, group=16, symmetric=False)
    full = torch.nn.functional.pad(value, (0, STORE.padded_k(shape[-1], options) - shape[-1]))
    scales = STORE.fit(full * 0.5, options)
    weight = Weight("w", value, "int_group", options, scales=scales)
    found = nearest.round_nearest(weight).terms[0].parts
    codes, _ = STORE.round(full, scales, 0, options)
    for name, part in STORE.pack(codes, scales, options).items():
        assert torch.equal(found[name], part)
