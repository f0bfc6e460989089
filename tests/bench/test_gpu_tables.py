"""Markdown of rows."""

import pytest

from bench.gpu_tables import (
    attention_text,
    estimate_text,
    facts_text,
    gemm_text,
    number,
    oracle_text,
    peaks_text,
    pivot,
    records_text,
    skipped,
    table,
    timing,
    tune_text,
)

TIMED = {"median_us": 12.34, "share": 0.812, "bf16_over_this": 3.4}


def test_a_table_is_aligned():
    assert table(["a", "value"], [["long name", "1"], ["b", "22222222"]]) == (
        "| a         |    value |\n"
        "| --------- | -------: |\n"
        "| long name |        1 |\n"
        "| b         | 22222222 |"
    )


@pytest.mark.parametrize(
    "value, text",
    [(1234.5, "1234"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.012")],
)
def test_numbers_keep_three_digits(value, text):
    assert number(value) == text


def test_a_timing_tells_its_share_and_ratio():
    assert timing(TIMED) == "12.3 (81 %, 3.40×)"
    assert timing({"median_us": 5.0}) == "5.00"
    assert timing({"why": "needs 17 rows"}) == "–"
    assert timing({"why": "wrong", "failed": True}) == "FAILED"


def row(side, m, **more):
    return {"shape": "a", "n": 8, "k": 16, "m": m, "side": side, **more}


def test_gemm_has_a_table_for_each_shape_and_says_why():
    rows = [
        row("bf16", 1, median_us=10.0), row("bf16", 16, median_us=11.0),
        row("w4", 1, **TIMED), row("w4", 16, why="wrong: 1", failed=True),
        row("_int_mm", 1, why="needs 17 rows"), row("_int_mm", 16, why="needs 17 rows"),
        row("bf16", 1, median_us=3.0) | {"shape": "b"},
        {"shape": "b", "m": 4, "why": "OutOfMemoryError: 2 GiB"},
        {"skipped": ["b M=16"], "why": "time"},
    ]  # fmt: skip
    text = gemm_text(rows)
    assert text.count("**") == 4 and "**a**, N = 8, K = 16" in text
    assert "| w4   | 12.3 (81 %, 3.40×) | FAILED |" in text
    assert text.count("needs 17 rows") == 1 and "- w4: wrong: 1" in text
    assert "| _int_mm" not in text
    assert text.endswith("- not reached (time): b M=16")


def test_attention_has_a_table_for_each_group():
    rows = [
        {"case": "16 × 32768", "group": g, "kv_heads": 8, "head_dim": 128, "side": "sdpa", **TIMED}
        for g in (4, 8)
    ]
    text = attention_text(rows)
    assert "**G = 4**, Hkv = 8, D = 128" in text and "**G = 8**" in text
    assert "case = 16 × 32768" in text


def test_a_pivot_leaves_gaps_empty():
    rows = [row("x", 1, median_us=1.0), row("y", 2, median_us=2.0)]
    assert pivot(rows, "side", "m", "µs").splitlines()[2] == "| x   |  1.00 |       |"


def test_peaks_and_facts():
    rows = [
        {"peak": "copy", "unit": "B/s", "rate": 3e12, "median_us": 10.0, "p10_us": 9, "p90_us": 11},
        {"peak": "launch", "unit": "1/s", "rate": 1e6, "median_us": 400.0},
        {"peak": "fp8", "unit": "op/s", "error": "none"},
    ]
    text = peaks_text(rows)
    assert "3.00 TB/s" in text and "1.00 µs" in text and "not measured: none" in text
    assert "| torch |  2.13 |" in facts_text({"torch": 2.13})


def test_oracle_lists_kernels_and_failures():
    found = {"kernels": {"k": {"checks": 3, "failed": 1, "worst": 2.0}}}
    text = oracle_text(found, ["FAILED k"])
    assert "| k      |      3 |      1 |" in text and text.endswith("- FAILED k")
    assert oracle_text(found, []).endswith("|")


def test_tuning_tells_before_and_after():
    row = {"family": "linear x", "size": 4, "before": "a {b 1}", "before_us": 19.0,
           "after": "a {b 2}", "after_us": 9.5, "measured": True, "share": 0.8, "gain": 2.0,
           "faults": ["a {b 3}: DEATH"]}  # fmt: skip
    estimated = row | {"size": 8, "after": row["before"], "measured": False, "before_us": None,
                       "gain": None, "share": None, "faults": []}  # fmt: skip
    text = tune_text([row, estimated, {"table": "t.json"}, {"skipped": ["w8a8"], "why": "time"}])
    assert "**linear x**" in text and "| 2.00× |" in text and "80 %" in text
    assert "the same" in text and "~9.50" in text
    assert text.endswith("- fault: a {b 3}: DEATH\n- table: t.json\n- not reached (time): w8a8")


def test_records_of_any_kind():
    models = [{"name": "8b", "ms": 5.25}, {"name": "70b"}]
    rows = [{"tokens_per_second": 123.4, "speedup": {"8B": 2.5}, "models": models},
            {"skipped": ["x"], "why": "time"}]  # fmt: skip
    text = records_text(rows)
    assert "| speedup 8B        |  2.50 |" in text
    assert "tokens_per_second" in text and "| 8b   | 5.25 |" in text and "| 70b  |" in text
    assert skipped(rows) == ["- not reached (time): x"]


def test_estimates_are_called_estimates():
    rows = [
        {"shape": "a", "n": 8, "k": 16, "m": m, "layer": layer, "kernel": "triton_x",
         "estimated_us": 10.0 * m, "share": None if m == 2 else 0.5}
        for m in (1, 2) for layer in ("w4a16", "w8a8")
    ]  # fmt: skip
    text = estimate_text(rows, "NVIDIA H200")
    assert text.startswith("ESTIMATES of the cost model for NVIDIA H200. Nothing was run.")
    assert "\n| M   |" in text and "triton_x 10.0 50 %" in text and "triton_x 20.0" in text
