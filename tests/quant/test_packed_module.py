"""What a holder of stored parts knows besides them; `test_linear.py` tests how parts move."""

import copy
import io

import pytest
import torch

from fewbit.quant.errors import RecipeError
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.hadamard import Hadamard
from fewbit.quant.packed_module import PackedModule

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
