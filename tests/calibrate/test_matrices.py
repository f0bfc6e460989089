"""Matrices: weights with one input are joined, equal experts are stacked, and both find back."""

import pytest
import torch

from fewbit.calibrate.matrices import (
    Rounded,
    batches,
    block_errors,
    expert_key,
    matrices,
    searched_batches,
)
from fewbit.calibrate.protocol import Moments
from fewbit.quant.block import Block, Weight
from fewbit.quant.format import dequantize, find_format

STORE = find_format("int_group")


def weight(name, shape, key="", bits=4):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
    return Weight(name, value, "int_group", STORE.Options(bits=bits, group=16), input_key=key)


def test_rows_of_one_input_are_joined_unless_their_format_differs():
    block = Block("b", [
        weight("q", (4, 32), "x"), weight("kk", (2, 32), "x"), weight("vvv", (2, 32), "x", bits=8),
        weight("oooo", (4, 32)),
    ])  # fmt: skip
    found = list(matrices(block, {}))
    assert [[p.weight.name for p in m.pieces] for m in found] == [["q", "kk"], ["vvv"], ["oooo"]]
    assert [(p.start, p.stop) for p in found[0].pieces] == [(0, 4), (4, 6)]
    assert found[0].n == 6


def test_experts_are_batched_within_the_memory_bound():
    stats = {expert_key("e", i): Moments(torch.eye(32) * (i + 1), 10) for i in range(5)}
    block = Block("b", [weight("up", (5, 4, 32), "e"), weight("gate", (5, 2, 32), "e")])
    found = list(matrices(block, stats))
    assert len(found) == 5
    whole = list(batches(found))
    assert [len(b.matrices) for b in whole] == [5]
    assert whole[0].values().shape == (5, 6, 32)
    assert torch.equal(whole[0].hessians()[3], torch.eye(32) * 4)
    assert [len(b.matrices) for b in batches(found, max_bytes=2 * 4 * 32 * 32)] == [2, 2, 1]


def test_padding_is_zero_in_values_and_statistics():
    block = Block("b", [weight("q", (4, 20), "x")])
    batch = next(batches(list(matrices(block, {"x": Moments(torch.ones(20, 20), 1)}))))
    assert batch.padded_k == 32
    assert batch.values()[..., 20:].abs().sum() == 0
    assert batch.hessians()[:, 20:].abs().sum() == 0
    assert batch.hessians()[:, :, 20:].abs().sum() == 0
    assert batch.hessians().sum() == 400


def test_rounded_codes_return_to_their_weights():
    members = [weight("q", (4, 32), "x"), weight("kk", (2, 32), "x"), weight("e", (3, 4, 32), "e")]
    rounded = Rounded()
    for batch in batches(list(matrices(Block("b", members), {}))):
        scales = STORE.fit(batch.values(), batch.options)
        codes, _ = STORE.round(batch.values(), scales, 0, batch.options)
        rounded.put(batch, codes, scales)
    for member in members:
        found = dequantize(rounded.pack(member))
        assert found.shape == member.value.shape
        assert (found - member.value).abs().max() < 0.3
        scales = STORE.fit(member.value, member.options)
        _, expected = STORE.round(member.value, scales, 0, member.options)
        assert torch.equal(found, expected)


def test_scales_left_by_a_search_find_back_and_replace_fitting():
    members = [weight("q", (4, 32), "x"), weight("kk", (2, 32), "x"), weight("e", (3, 4, 32), "e")]
    found = list(matrices(Block("b", members), {}))
    for batch in batches(found):
        values = batch.values()
        fitted = batch.scales(values)
        assert torch.equal(fitted["scale_group"], STORE.fit(values, batch.options)["scale_group"])
        batch.leave_scales({"scale_group": fitted["scale_group"] * 2})
    for member in members:
        expected = STORE.fit(member.value, member.options)["scale_group"] * 2
        assert torch.equal(member.scales["scale_group"], expected)
    for batch in batches(list(matrices(Block("b", members), {}))):
        fitted = STORE.fit(batch.values(), batch.options)["scale_group"]
        assert torch.equal(batch.scales(batch.values())["scale_group"], fitted * 2)


def test_scales_on_a_part_of_joined_rows_are_refused():
    members = [weight("q", (4, 32), "x"), weight("kk", (2, 32), "x")]
    batch = next(batches(list(matrices(Block("b", members), {}))))
    members[0].scales = STORE.fit(members[0].value, members[0].options)
    with pytest.raises(RuntimeError, match="kk: no scales, but its neighbours"):
        batch.scales(batch.values())


def test_matrices_without_statistics_are_searched_in_batches_of_their_own():
    members = [weight(name, (4, 32), name) for name in "abc"]
    stats = {key: Moments(torch.eye(32), 64) for key in "ac"}
    found = list(searched_batches(Block("b", members), stats))
    names = [[matrix.pieces[0].weight.name for matrix in batch.matrices] for batch in found]
    assert names == [["a", "c"], ["b"]]
    assert [batch.has_moments for batch in found] == [True, False]


def test_errors_of_groups_weigh_by_the_blocks_of_the_hessian():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    stats = {"x": Moments(x.mT @ x / 64, 64)}
    batch = next(searched_batches(Block("b", [weight("w", (4, 32), "x")]), stats))
    blocks = batch.hessian_blocks(16)
    assert blocks.shape == (1, 2, 16, 16)
    assert torch.equal(blocks[0, 1], stats["x"].hessian[16:, 16:])
    delta = torch.randn(1, 4, 2, 16, generator=torch.Generator().manual_seed(1))
    found = block_errors(delta, blocks)
    for group in range(2):
        outputs = x[:, 16 * group : 16 * group + 16] @ delta[0, :, group].mT
        assert torch.allclose(found[0, :, group], outputs.square().mean(0), rtol=1e-4)
