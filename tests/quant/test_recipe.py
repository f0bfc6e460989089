"""Recipes: what is read, what is refused, and what decides a run's identity."""

import re

import pytest

from fewbit.quant.errors import RecipeError
from fewbit.quant.recipe import build_recipe, load_recipe, matches, recipe_names


def test_packaged_recipes_load_and_have_summaries():
    assert {"w4a16", "w3a16", "w8a16", "w4a16-rtn", "identity"} <= set(recipe_names())
    for name in recipe_names():
        assert load_recipe(name).summary


def test_setting_changes_one_value_and_the_identity():
    plain, changed = load_recipe("w4a16"), load_recipe("w4a16", ["weights.bits=3"])
    assert plain.weights.options.bits == 4
    assert changed.weights.options.bits == 3
    assert plain.text != changed.text
    assert load_recipe("w4a16").text == plain.text


def test_setting_reaches_a_pass():
    recipe = load_recipe("w4a16", ["pass.gptq.damping=0.05", "allow_fallback=true"])
    assert dict(recipe.passes[-1].keys) == {"damping": 0.05}
    assert recipe.allow_fallback


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["weights.bit=3"], "unknown key 'bit' (did you mean 'bits'?)"),
        (["weigths.bits=3"], "unknown key 'weigths' (did you mean 'weights'?)"),
        (["weights.bits=9"], "bits must be a whole number 2 to 8, got 9"),
        (["weights.group=100"], "group must be 16, 32, 64, 128 or 'row', got 100"),
        (["weights.format=int_grup"], "unknown format 'int_grup' (did you mean 'int_group'?)"),
        (["pass.gtpq.damping=1"], "no pass 'gtpq' (did you mean 'gptq'?)"),
        (["calibration.samples=0"], "calibration.samples must be a whole number ≥ 1, got 0"),
        (["gate.perplexity_ratio=-1"], "gate.perplexity_ratio must be a finite number ≥ 0 "),
        (["nonsense"], "--set takes key=value, got 'nonsense'"),
        (["allow_fallback=maybe"], "'allow_fallback' must be a bool, got 'maybe'"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe("w4a16", settings)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'w4a16'"):
        load_recipe("w4a61")
    with pytest.raises(RecipeError, match=r"'/nowhere/x\.toml' does not exist"):
        load_recipe("/nowhere/x.toml")


def test_recipe_file_and_broken_toml(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('summary = "mine"\n[weights]\nformat = "int_group"\nbits = 5\n')
    assert load_recipe(str(path)).weights.options.bits == 5
    path.write_text("summary = ")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(str(path))


def test_rules_override_before_ignore_before_default():
    recipe = build_recipe(
        "r",
        {
            "weights": {"format": "int_group", "bits": 4, "ignore": ["lm_head", "re:.*down.*"]},
            "override": [
                {"match": r"re:.*\.2\..*", "weights": {"bits": 8}},
                {"match": "o_proj", "weights": False},
            ],
        },
    )
    assert recipe.rule_for("model.layers.2.mlp.down_proj").options.bits == 8
    assert recipe.rule_for("model.layers.1.mlp.down_proj") is None
    assert recipe.rule_for("model.layers.1.self_attn.o_proj") is None
    assert recipe.rule_for("model.layers.1.self_attn.q_proj").options.bits == 4
    assert recipe.rule_for("lm_head") is None


def test_default_ignore_covers_heads_and_routers():
    recipe = load_recipe("w4a16")
    for name in ("lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.router",
                 "model.layers.0.mlp.shared_expert_gate"):  # fmt: skip
        assert recipe.rule_for(name) is None, name
    assert recipe.rule_for("model.layers.0.mlp.gate_proj") is not None
    everything = load_recipe("w4a16", ["weights.ignore=[]"])
    assert everything.rule_for("lm_head") is not None
    assert everything.rule_for("model.layers.0.mlp.gate") is None


def test_matches_whole_names_or_last_parts():
    assert matches("lm_head", "lm_head")
    assert matches("q_proj", "a.q_proj")
    assert not matches("q_proj", "a.xq_proj")
    assert not matches("re:a", "ab")


def test_bad_pattern_is_named():
    with pytest.raises(RecipeError, match="not a valid pattern"):
        build_recipe("r", {"weights": {"format": "int_group", "ignore": ["re:("]}})


@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
def test_a_gate_that_nothing_can_fail_is_refused(value):
    with pytest.raises(RecipeError, match=rf"must be a finite number ≥ 0 .*, got {value}"):
        load_recipe("w4a16", [f"gate.perplexity_ratio={value}"])


def test_short_windows_are_refused():
    assert load_recipe("w4a16", ["calibration.length=8"]).calibration.length == 8
    with pytest.raises(RecipeError, match=r"calibration\.length must be a whole number ≥ 8, got 7"):
        load_recipe("w4a16", ["calibration.length=7"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('["a"]', "the recipe has no pass 'gptq'; it has: none"),
        ("3", "'pass' must be a list, got 3"),
        ("[{name = 1}]", "it has: 1"),
    ],
)
def test_a_setting_inside_passes_that_are_no_tables(value, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe("w4a16", [f"pass={value}", "pass.gptq.damping=1"])


def test_a_pass_may_be_skipped_by_a_setting():
    recipe = load_recipe("w4a16", ["pass.clip_search.skip=true"])
    assert [use.name for use in recipe.passes] == ["compensate", "gptq"]
    kept = load_recipe("w4a16", ["pass.gptq.skip=false"])
    assert "skip" not in kept.passes[-1].keys
    with pytest.raises(RecipeError, match="skip must be true or false"):
        load_recipe("w4a16", ["pass.gptq.skip=1"])


def test_activations_and_kv_are_parsed_and_checked():
    recipe = load_recipe("w8a8")
    assert recipe.activation == "int8_token" and recipe.kv is None
    cached = load_recipe("kv4")
    assert cached.kv is not None and cached.kv.key.format == "int4_head"
    assert not cached.quantizes
    for name, setting, message in (
        ("w8a8", "activations.format=int8_tokens", "did you mean 'int8_token'"),
        ("w8a8", "activations.bits=8", "unknown key 'bits'"),
        ("kv4", "kv.key.format=int4", "unknown KV page format 'int4'"),
        ("kv4", "kv.sinks=4", "did you mean 'sink'"),
        ("kv4", "activations.format=int8_token", "rounds activations but no weights"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(name, [setting])
