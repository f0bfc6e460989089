"""What passes hand on: weights with their own lists, changed in place."""

import torch

from fewbit.quant.block import Block, Weight


def weight(name):
    return Weight(name, torch.ones(2, 16), "int_group", None)


def test_weights_do_not_share_their_remarks():
    first, second = weight("a"), weight("b")
    first.fallbacks.append("rounded to nearest")
    first.measured["x"] = 1.0
    assert second.fallbacks == [] and second.measured == {}


def test_a_new_weight_is_not_rounded_yet():
    found = Block("layer", [weight("a")]).weights[0]
    assert found.packed is None and found.clip is None and found.target is None
    assert (found.suffix, found.transposed, found.input_key) == (".weight", False, "")
