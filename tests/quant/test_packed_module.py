"""What a holder of stored parts knows besides them; `test_linear.py` tests how parts move."""

import copy
import io

import pytest
import torch

from fake_kernels import pack
from fewbit.quant import reference
from fewbit.quant.errors import RecipeError
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.hadamard import Hadamard
from fewbit.quant.linear import QuantLinear
from fewbit.quant.packed_module import PackedModule, stored_parts_stay

W4 = IntGroupOptions(4, 32)


def module(**keys: object) -> PackedModule:
    return PackedModule((8, 64), [("int_group", W4)], torch.float32, **keys)


def test_activation_and_inputs_are_facts_outside_the_state() -> None:
    holder = module(activation="int8_token", inputs=[Hadamard(64, 3)])
    assert holder.activation == "int8_token" and holder.inputs == (Hadamard(64, 3),)
    assert sorted(holder.state_dict()) == sorted(module().state_dict()) == ["codes", "scale_group"]
    assert "activation=int8_token" in repr(holder) and "order=64" in repr(holder)
    assert "activation" not in repr(module()) and "inputs" not in repr(module())
    twin = copy.deepcopy(holder)
    assert (twin.activation, twin.inputs) == (holder.activation, holder.inputs)


def test_unknown_activation_is_refused_when_built() -> None:
    with pytest.raises(RecipeError, match="did you mean 'int8_token'"):
        module(activation="int8token")


def test_runners_round_and_transform_as_the_module_says() -> None:
    holder = module(activation="int8_token", inputs=(Hadamard(64),))
    (runner,) = holder.runners()
    assert (runner.activation, runner.inputs) == ("int8_token", (Hadamard(64),))


def test_the_stamp_changes_with_every_write_and_replacement() -> None:
    holder = module()
    stamps = [holder.state_stamp()]
    holder.codes.zero_()
    stamps.append(holder.state_stamp())
    kept = holder.scale_group
    holder.scale_group = kept.clone()
    stamps.append(holder.state_stamp())
    assert stamps[0] != stamps[1] != stamps[2]
    assert holder.state_stamp() == stamps[2]


def test_a_pickle_holds_the_parts_and_not_the_file_that_they_are_a_view_of() -> None:
    holder = module()
    whole = torch.arange(1 << 20, dtype=torch.int32).to(torch.uint8)  # stands for a mapped file
    holder.codes = whole[64 : 64 + holder.codes.numel()].view(holder.codes.shape)
    holder.scale_group = whole[:32].view(torch.float16).view(holder.scale_group.shape)
    stored = io.BytesIO()
    torch.save(holder, stored)  # torch refuses two dtypes of one storage
    assert len(stored.getvalue()) < 1 << 16
    again = torch.load(io.BytesIO(stored.getvalue()), weights_only=False)
    for name, part in holder.named_buffers():
        assert torch.equal(again.get_buffer(name), part)
    twin = copy.deepcopy(holder)
    assert twin.codes.untyped_storage().nbytes() == holder.codes.numel()
    assert holder.codes.untyped_storage().nbytes() == whole.numel()


def on_cpu(holder: PackedModule) -> bool:
    return all(part.device.type == "cpu" for _, part in holder.packed.named_parts())


def test_stored_parts_may_stay_where_they_are() -> None:
    """The second device is "meta": shapes only, which shows where each product would run."""
    layer = QuantLinear.from_packed(pack(torch.randn(8, 64), W4), torch.randn(8), torch.float32)
    x = torch.randn(2, 64)
    expected = layer(x)
    state = {name: part.clone() for name, part in layer.named_buffers()}
    with stored_parts_stay():
        layer.to("meta")
    assert layer.device.type == "meta" and on_cpu(layer)
    assert layer(x.to("meta")).shape == expected.shape
    assert layer(x.to("meta")).device.type == "meta" and layer.dense().device.type == "meta"
    assert all(torch.equal(part, state[name]) for name, part in layer.named_buffers())
    layer.to(torch.float16)  # the device stays: so do the parts
    assert layer.dtype == torch.float16 and on_cpu(layer)
    layer.place(torch.device("cpu"))
    layer.bias = None
    expected = layer.float()(x)
    assert layer.device.type == "cpu" and torch.equal(reference.linear(x, layer.packed), expected)
