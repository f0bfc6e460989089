"""Passes: discovery, options, and the default rounding pass."""

import pytest

from fewbit.calibrate.protocol import passes, plan_passes
from fewbit.quant.errors import RecipeError


def test_discovery_lists_the_folder():
    assert {"nearest", "clip_search", "gptq"} <= set(passes())
    assert all(step.name == name for name, step in passes().items())


def test_nearest_is_appended_without_a_rounding_pass():
    assert [item.step.name for item in plan_passes([])] == ["nearest"]
    planned = plan_passes([("clip_search", {"data_free": True})])
    assert [item.step.name for item in planned] == ["clip_search", "nearest"]
    assert [item.step.name for item in plan_passes([("gptq", {})])] == ["gptq"]


def test_needs_follow_the_options():
    clip, _ = plan_passes([("clip_search", {})])
    free, _ = plan_passes([("clip_search", {"data_free": True})])
    assert clip.step.needs(clip.options) == ("moments",)
    assert free.step.needs(free.options) == ()


def test_unknown_names_and_keys_are_named():
    with pytest.raises(RecipeError, match=r"unknown pass 'gptp' \(did you mean 'gptq'\?\)"):
        plan_passes([("gptp", {})])
    with pytest.raises(RecipeError, match=r"unknown key 'dampening' \(did you mean 'damping'\?\)"):
        plan_passes([("gptq", {"dampening": 0.1})])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("gptq", "nearest"), "'gptq' and 'nearest' both round, .* keep one of the two"),
        (("nearest", "nearest"), "'nearest' and 'nearest' both round"),
        (("gptq", "clip_search"), "put 'clip_search' before 'gptq'"),
        (("compensate", "gptq", "compensate"), "'compensate' tunes what pass 'gptq' before it"),
    ],
)
def test_passes_that_would_do_nothing_are_refused(names, message):
    with pytest.raises(RecipeError, match=message):
        plan_passes([(name, {}) for name in names])
