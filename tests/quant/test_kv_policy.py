"""`[kv]`: what is written is what is read, and every mistake is named with what is allowed."""

import json
from typing import Any

import pytest

from fewbit.quant.errors import RecipeError
from fewbit.quant.formats.int4_head import Int4HeadOptions
from fewbit.quant.kv_policy import KVPolicy, PageUse, parse_kv

INT4: dict[str, Any] = {"format": "int4_head"}


def test_defaults_and_every_key() -> None:
    plain = parse_kv({"key": INT4, "value": {"format": "dense_head"}}, "kv")
    assert (plain.residual, plain.sink, plain.prefill) == (0, 0, "stored")
    assert plain.key == PageUse("int4_head", Int4HeadOptions())
    full = parse_kv(
        {
            "key": {"format": "int4_head", "fit": "range"},
            "value": INT4,
            "residual": 64,
            "sink": 4,
            "prefill": "exact",
        },
        "kv",
    )
    assert full.key.options == Int4HeadOptions("range")
    assert (full.residual, full.sink, full.prefill) == (64, 4, "exact")
    assert hash(full) != hash(plain)


def test_json_leads_back() -> None:
    policy = KVPolicy(
        PageUse("int4_head", Int4HeadOptions("range")),
        PageUse("int4_head", Int4HeadOptions()),
        7,
        3,
    )
    assert parse_kv(json.loads(json.dumps(policy.to_json())), "kv") == policy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residul": 1}, "kv: unknown key 'residul'.*did you mean 'residual'"),
        ({"key": {"format": "int4_hed"}}, "unknown KV page format 'int4_hed'.*'int4_head'"),
        ({"key": {"format": "int4_head", "fits": 1}}, "kv.key: unknown key 'fits'.*'fit'"),
        ({"value": {"format": "int4_head", "fit": "x"}}, "fit must be 'range' or 'search'"),
        ({"value": "int4_head"}, "kv.value must be a table such as .* got 'int4_head'"),
        ({"value": {}}, "kv.value must be a table such as"),
        ({"residual": -1}, "kv.residual must be a whole number .* got -1"),
        ({"sink": True}, "kv.sink must be a whole number .* got True"),
        ({"sink": 1.0}, "kv.sink must be a whole number .* got 1.0"),
        ({"prefill": "store"}, "kv.prefill must be 'stored' or 'exact', got 'store'.*'stored'"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_kv({"key": INT4, "value": INT4, **change}, "kv")


def test_missing_parts_and_wrong_types_are_named() -> None:
    with pytest.raises(RecipeError, match=r"kv\.value must be a table"):
        parse_kv({"key": INT4}, "kv")
    with pytest.raises(RecipeError, match="kv must be a table, got 3"):
        parse_kv(3, "kv")  # type: ignore[arg-type]
