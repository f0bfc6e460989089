"""Tuned tables as text: round trip, golden bytes, every wrong key by name, damage."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.quant.errors import TableError
from fewbit.quant.tuned_table import Row, merge
from fewbit.quant.tuned_text import content_hash, parse_table, table_text
from tuned_tables import FAULT, entry, problem, row, table

SMALL = Row("hadamard order=64 K=64 * float16 cuda", (entry(1), entry(2)), "2026-11-02T10:00:00Z",
            (("triton", "3.6.0"),))  # fmt: skip

GOLDEN = """\
{"schema":2,"sha256":"%s",
"device":{"bandwidth_class":24,"cc":[9,0],"l2_mib":50,"memory_class":14,"sms":132},
"title":"a GPU",
"driver":"580.65",
"method":{"calls":20,"stat":"median"},
"toolchains":[{"triton":"3.6.0"}],
"kernels":[["gemv","v1",["block_n","split_k"]]],
"columns":["size","kernel","config","us","p10","p90","ideal_us","model_us","runner_up","digest",\
"verified","measured"],
"rows":[
{"family":"hadamard order=64 K=64 * float16 cuda","ladder":[[1,0,[128,2],2.0,1.0,3.0,8.0,5.0,\
"gemm {block_n 64} 10.2 us","dddddddddddddddd","rel 9.1e-04",1],[2,0,[128,2],3.0,2.0,4.0,8.0,5.0,\
"gemm {block_n 64} 10.2 us","dddddddddddddddd","rel 9.1e-04",1]],"toolchain":0,\
"tuned_at":"2026-11-02T10:00:00Z"}
],
"quarantine":[
["gemm","g1",[["block_n",256],["split_k",1]],"TIMEOUT nothing heard for 2.0 s"]
]}
"""


def edited(change, of=None):
    """Text of a table whose JSON was changed and hashed again."""
    content = json.loads(table_text(of or table(quarantine=(FAULT,))))
    change(content)
    content["sha256"] = content_hash(content)
    return json.dumps(content)


def test_golden_text():
    text = table_text(table(SMALL, quarantine=(FAULT,), method=(("calls", 20), ("stat", "median"))))
    digest = json.loads(text)["sha256"]
    assert text == GOLDEN % digest
    assert digest == content_hash(json.loads(GOLDEN % "anything"))


def test_round_trip_and_one_row_a_line():
    rows = [row(problem(n=n), toolchain=tools) for n, tools in
            ((1024, (("triton", "3.6.0"),)), (2048, (("nvrtc", "13.0"),)), (4096, ()))]  # fmt: skip
    model = row(problem(n=8192), measured=False, verified="", us=7.0)
    whole = merge(table(*rows, model, quarantine=(FAULT,)), table(*rows))
    text = table_text(whole)
    assert parse_table(text, "t") == whole
    assert table_text(parse_table(text, "t")) == text
    assert sum(line.startswith('{"family"') for line in text.splitlines()) == 4
    assert parse_table(table_text(table(rows=())), "t").rows == ()


def test_numbers_keep_five_digits():
    found = parse_table(table_text(table(row(us=12.3456789))), "t")
    assert {e.us for e in found.rows[0].ladder} == {12.346}


def test_a_model_family_fits_200_kb():
    """Two models of four shapes, three formats, two dtypes; every bucket another config."""
    config = tuple((name, 128) for name in ("block_m", "block_n", "stages", "warps", "split_k"))
    rows = [
        Row(of.family,
            tuple(entry(s, kernel=f"triton_int_group_{s % 5}", us=s / 7,
                        config=tuple((name, s) for name, _ in config), p10=s / 7.1, p90=s / 6.9)
                  for s in of.buckets),
            "2026-11-02T10:00:00Z", (("torch", "2.13.0"), ("triton", "3.6.0")))
        for of in (problem(n=n, k=4096 + k, bits=bits, dtype=dtype)
                   for n in (4096, 8192) for k in range(4) for bits in (2, 4, 8)
                   for dtype in (torch.float16, torch.bfloat16))
    ]  # fmt: skip
    assert len(rows) == 48
    size = len(table_text(table(*rows)).encode())
    assert size < 150_000, size


# ---- what is wrong --------------------------------------------------------------------------


def set_in(path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


FIRST = ("rows", 0, "ladder", 0)

WRONG = {
    "unknown key": (set_in(("rowz",), []), "unknown key 'rowz' .did you mean 'rows'.*allowed: "),
    "no list": (set_in(("rows",), {}), r"rows: must be a JSON list, got \{\}"),
    "no object": (set_in(("device",), []), "device: must be a JSON object, got list"),
    "columns": (set_in(("columns",), ["size"]), r"columns must be size, kernel.*got \['size'\]"),
    "cc": (set_in(("device", "cc"), [9]), "device.cc: must list major, minor; got 1 items"),
    "sms": (set_in(("device", "sms"), True), "device.sms must be a whole number.*got True"),
    "title": (set_in(("title",), 3), "title must be a text, got 3"),
    "method": (set_in(("method", "x"), 1.5), "method.x must be a whole number.*got 1.5"),
    "tool": (set_in(("toolchains", 0, "triton"), 3), r"toolchains\[0\].triton must be a text"),
    "kernel": (set_in(("kernels", 0), ["gemm"]), r"kernels\[0\]: must list name, source, choices"),
    "no name": (set_in(("kernels", 0, 0), ""), r"kernels\[0\]: name: must be a text that is not"),
    "stamp": (set_in(("rows", 0, "tuned_at"), "now"), "tuned_at must be like 2026.*got 'now'"),
    "tool index": (set_in(("rows", 0, "toolchain"), 1), "toolchain must be below 1, got 1"),
    "kernel index": (set_in((*FIRST, 1), 9), r"ladder\[0\]: kernel must be below 2, got 9"),
    "size order": (set_in((*FIRST, 0), 3), r"sizes must rise from entry to entry, got \[3, 2"),
    "no ladder": (set_in(("rows", 0, "ladder"), []), "sizes must rise"),
    "cells": (set_in(FIRST, [1]), r"ladder\[0\]: must list size, kernel, config, us"),
    "config": (set_in((*FIRST, 2), [1]), "config: must list block_n, split_k; got 1 items"),
    "config value": (set_in((*FIRST, 2), [1, "2"]), "config.split_k must be a whole number"),
    "negative": (set_in((*FIRST, 3), -1.0), "us must be a number from 0 on, got -1.0"),
    "huge": (set_in((*FIRST, 3), 10**400), "us must be a number from 0 on, got 1000"),
    "unverified": (set_in((*FIRST, 10), ""), "of an entry that was verified.*got 1 and verified ''"),
    "measured": (set_in((*FIRST, 11), 2), "measured must be 0, or 1 .* got 2"),
    "quarantine": (set_in(("quarantine", 0, 2), [["a"]]), "config: must list name, value; got 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_named(name):
    change, message = WRONG[name]
    with pytest.raises(TableError, match=f"(?s)^some/file.json: .*{message}"):
        parse_table(edited(change), "some/file.json")


def test_missing_keys_and_families_that_occur_twice():
    with pytest.raises(TableError, match="missing driver"):
        parse_table(edited(lambda content: content.pop("driver")), "t")
    with pytest.raises(TableError, match="a family occurs twice"):
        parse_table(edited(lambda content: content["rows"].append(content["rows"][0])), "t")


def test_a_newer_schema_is_refused_by_name_whatever_else_it_holds():
    with pytest.raises(TableError, match="schema must be 2, got 3; update fewbit"):
        parse_table('{"schema":3,"something":"new"}', "t")
    with pytest.raises(TableError, match="schema must be 2, got 1; tune again"):
        parse_table('{"schema":1}', "t")


def test_an_edited_table_is_told():
    text = table_text(table())
    assert text.count("580.65") == 1
    with pytest.raises(TableError, match="not what its sha256 says"):
        parse_table(text.replace("580.65", "580.66"), "t")
    assert parse_table(text.replace(',\n"driver"', ', "driver"'), "t")  # spaces are no content


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", '{"schema":NaN}', "[" * 100_000,
                                  '{"schema":2}', '{"schema":' + "9" * 5000 + "}"])  # fmt: skip
def test_what_is_no_table(text):
    with pytest.raises(TableError, match=r"^t: "):
        parse_table(text, "t")


def test_damage_is_always_a_named_error():
    """Flips and truncations of every kind; without the hash, which would hide all else."""
    text = table_text(table(SMALL, quarantine=(FAULT,)))
    draw = random.Random(1)
    n_named = 0
    for _ in range(600):
        raw = bytearray(text.encode())
        if draw.random() < 0.3:
            del raw[draw.randrange(len(raw)) :]
        else:
            for _ in range(draw.randint(1, 3)):
                raw[draw.randrange(len(raw))] = draw.choice(b'0123456789-.,:[]{}"nulltrue \\e')
        damaged = raw.decode()
        try:
            content = json.loads(damaged)
            if isinstance(content, dict) and "sha256" in content:
                content["sha256"] = content_hash(content)
                damaged = json.dumps(content)
        except ValueError:
            pass
        try:
            parse_table(damaged, "t")
        except TableError:
            n_named += 1
    assert n_named > 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(data=st.data(), value=JSON)
def test_any_value_in_any_place_is_a_named_error_or_a_table(data, value):
    content = json.loads(table_text(table(SMALL, quarantine=(FAULT,))))
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            place[key] = value
            break
        place = inner
    content["sha256"] = content_hash(content)
    try:
        found = parse_table(json.dumps(content), "t")
    except TableError:
        return
    again = parse_table(table_text(found), "t")
    assert parse_table(table_text(again), "t") == again
