"""Passes: discovery, options, and the default rounding pass."""

import pytest

from fewbit.calibrate.protocol import passes, plan_passes
from fewbit.quant.errors import RecipeError


def test_discovery_lists_the_folder():
    assert {"nearest", "clip_search", "gptq"} <= set(passes())
    assert all(step.name == name for name, step in passes().items())


def test_nearest_is_appended_without_a_rounding_pass():
    assert [item.step.name for item in plan_passes([]).passes] == ["nearest"]
    planned = plan_passes([("clip_search", {"data_free": True})])
    assert [item.step.name for item in planned.passes] == ["clip_search", "nearest"]
    assert [item.step.name for item in plan_passes([("gptq", {})]).passes] == ["gptq"]


def test_needs_follow_the_options():
    clip, _ = plan_passes([("clip_search", {})]).passes
    free, _ = plan_passes([("clip_search", {"data_free": True})]).passes
    assert clip.step.needs(clip.options) == ("moments",)
    assert free.step.needs(free.options) == ()


def test_unknown_names_and_keys_are_named():
    with pytest.raises(RecipeError, match=r"unknown pass 'gptp' \(did you mean 'gptq'\?\)"):
        plan_passes([("gptp", {})])
    with pytest.raises(RecipeError, match=r"unknown key 'dampening' \(did you mean 'damping'\?\)"):
        plan_passes([("gptq", {"dampening": 0.1})])


def test_transforms_are_sorted_by_what_they_rewrite():
    plan = plan_passes([("fold_norms", {}), ("rotate", {}), ("gptq", {})])
    assert [item.step.name for item in plan.model] == ["fold_norms", "rotate"]
    assert plan.transforms and not plan.block
    assert not plan_passes([("gptq", {})]).transforms


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("gptq", "nearest"), "'gptq' and 'nearest' both round, .* keep one of the two"),
        (("nearest", "nearest"), "'nearest' and 'nearest' both round"),
        (("gptq", "clip_search"), "put 'clip_search' before 'gptq'"),
        (("gptq", "fold_norms"), "put 'fold_norms' before 'gptq'"),
        (("clip_search", "rotate", "gptq"), "put 'rotate' before 'clip_search'"),
        (("compensate", "gptq", "compensate"), "'compensate' tunes what pass 'gptq' before it"),
    ],
)
def test_passes_that_would_do_nothing_are_refused(names, message):
    with pytest.raises(RecipeError, match=message):
        plan_passes([(name, {}) for name in names])
