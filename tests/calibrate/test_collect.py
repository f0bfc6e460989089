"""Statistics of a block against direct computation; stages in order of use."""

import torch
from torch import nn
from torch.nn.functional import linear

from fewbit.calibrate import collect
from fewbit.calibrate.collect import (
    MomentSums,
    Operand,
    OriginalInputs,
    Stage,
    StageInputs,
    stages,
)


class Toy(nn.Module):
    """q and k share an input, o follows, then two experts of a fused weight."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("q", (6, 8)), ("k", (6, 8)), ("o", (8, 6)), ("up", (2, 5, 8))):
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.ran_experts = 0

    def forward(self, x):
        hidden = linear(torch.tanh(linear(x, self.q) * linear(x, self.k)), self.o)
        self.middle = torch.tanh(linear(x, self.q) * linear(x, self.k))
        self.hidden = hidden
        self.ran_experts += 1
        rows = hidden.reshape(-1, 8)
        return linear(rows[:3], self.up[0]).sum() + linear(rows[3:5], self.up[1]).sum()


def operand(module, name, key=None):
    return Operand(name, key or name, tuple(getattr(module, name).shape), False)


def found(module):
    return [operand(module, "q"), operand(module, "k", "q"), operand(module, "o"),
            operand(module, "up")]  # fmt: skip


def run_stage(module, stage, rest, batches):
    sums, wanted = MomentSums(), StageInputs(stage, stage.later(rest))
    with torch.no_grad():
        for x in batches:
            wanted.watch(dict(module.named_parameters()), lambda x=x: module(x), sums.add)
    return sums.moments()


def test_stages_follow_the_inputs():
    steps = list(stages(found(Toy())))
    assert [[o.parameter for o in s.operands] for s in steps] == [["q", "k"], ["o"], ["up"]]
    assert [s.experts for s in steps] == [None, None, range(2)]
    whole = list(stages(found(Toy()), whole_block=True))
    assert [[o.parameter for o in s.operands] for s in whole] == [["q", "k", "o"], ["up"]]


def test_experts_are_split_by_memory_unless_stored_fused(monkeypatch):
    monkeypatch.setattr(collect, "MAX_STAGE_BYTES", 4 * 8 * 8)
    module = Toy()
    assert [s.experts for s in stages(found(module))][2:] == [range(1), range(1, 2)]
    fused = stages(found(module), stored_fused=frozenset({"up"}))
    assert [s.experts for s in fused][2:] == [range(2)]


def test_moments_equal_direct_sums():
    module = Toy()
    steps = list(stages(found(module)))
    batches = [torch.randn(2, 4, 8), torch.randn(3, 4, 8)]
    first = run_stage(module, steps[0], steps[1:], batches)
    rows = torch.cat([x.reshape(-1, 8) for x in batches]).double()
    assert first["q"].tokens == 20
    assert torch.allclose(first["q"].hessian.double(), rows.mT @ rows / 20, atol=1e-5)
    assert module.ran_experts == 0  # the run ended when the next stage began
    last = run_stage(module, steps[2], [], batches)
    assert {k: m.tokens for k, m in last.items()} == {"up[0]": 6, "up[1]": 4}


def test_shared_inputs_are_counted_once():
    module = Toy()
    stage = Stage((operand(module, "q"), operand(module, "k", "q")))
    moments = run_stage(module, stage, [Stage((operand(module, "o"),))], [torch.randn(1, 4, 8)])
    assert list(moments) == ["q"]
    assert moments["q"].tokens == 4


def test_an_expert_range_leaves_the_others_out():
    module = Toy()
    stage = Stage((operand(module, "up"),), range(1, 2))
    assert list(run_stage(module, stage, [], [torch.randn(2, 4, 8)])) == ["up[1]"]


def test_inside_experts_no_other_expert_ends_the_stage():
    up, down = Operand("up", "up", (2, 5, 8), False), Operand("down", "down", (2, 8, 5), False)
    shared = Operand("s", "s", (4, 8), False)
    stage = Stage((up,), range(2))
    rest = [Stage((down,), range(2)), Stage((shared,))]
    assert stage.later(rest) == {"s"}
    assert Stage((shared,)).later([stage]) == {"up"}


def test_drift_equals_direct_sums():
    sums = MomentSums()
    pairs = [(torch.randn(5, 8), torch.randn(5, 8)) for _ in range(3)]
    for now, before in pairs:
        sums.add("x", now, before)
    now = torch.cat([a for a, _ in pairs]).double()
    before = torch.cat([b for _, b in pairs]).double()
    expected = (before - now).mT @ now / 15
    assert torch.allclose(sums.moments()["x"].drift.double(), expected, atol=1e-5)


def test_original_rows_are_paired_in_order_and_never_for_experts():
    original = OriginalInputs()
    first, second = torch.zeros(2, 4), torch.ones(2, 4)
    original.put("x", first)
    original.put("x", second)
    original.put("up[3]", first)
    assert original.next("x", torch.empty(3, 4)) is None
    assert original.next("x", torch.empty(2, 4)) is first
    assert original.next("x", torch.empty(2, 4)) is second
    assert original.next("x", torch.empty(2, 4)) is None
    assert original.next("up[3]", torch.empty(2, 4)) is None
