"""What tables say of a problem: freshness, rows, near shapes, quarantine; never an exception."""

import random
import warnings
from dataclasses import replace

import pytest

from fewbit.quant import tuned_file
from fewbit.quant.errors import TableError
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.kernel import T_BUCKETS, AttentionProblem, RowsProblem
from fewbit.quant.machine import load_device
from fewbit.quant.tuned import NO_TABLES, Tables, current_tables, freshness
from fewbit.quant.tuned_file import Layered, append_rows
from fewbit.quant.tuned_table import Quarantined, Row
from fewbit.quant.tuned_text import table_text
from tuned_tables import BIG, CONFIG, FAULT, H200, KNOWN, TOOLS, entry, kernel, problem, row, table


@pytest.fixture(autouse=True)
def no_warning_yet(monkeypatch):
    monkeypatch.setattr(tuned_file, "_WARNED", set())


def tables(*found, layer="user", toolchain=TOOLS, digest_of=None):
    layers = [Layered(layer, f"{i}.json", t) for i, t in enumerate(found)]
    return Tables(layers, toolchain, digest_of)


def warned(call):
    """(result, texts of warnings)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(warning.message) for warning in caught]


# ---- freshness ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "now", "digest", "expected"),
    [
        ("g1", TOOLS, None, "fresh"),
        ("g2", TOOLS, None, "stale"),  # the kernel was edited
        ("g2", TOOLS, "d" * 16, "stale"),
        (None, TOOLS, None, "stale"),  # there is no such kernel
        ("g1", (("triton", "3.7.0"),), None, "stale"),
        ("g1", (("triton", "3.7.0"),), "e" * 16, "stale"),
        ("g1", (("triton", "3.7.0"),), "d" * 16, "usable"),
        ("g1", (("torch", "3.0"), ("triton", "3.6.0")), None, "fresh"),  # torch makes no code
        ("g1", (("nvrtc", "13.0"), ("triton", "3.6.0")), None, "fresh"),  # another compiler came
        ("g1", (), None, "fresh"),  # none is installed: a described device
    ],
)
def test_freshness(source, now, digest, expected):
    assert freshness(entry(64), source, TOOLS, now, digest) == expected


def test_an_entry_without_a_digest_is_not_usable():
    assert freshness(entry(64, digest=""), "g1", TOOLS, (("triton", "4"),), "") == "stale"


# ---- rows -----------------------------------------------------------------------------------


def test_a_row_decides_its_family_at_every_bucket_and_nothing_else():
    found = tables(table())
    for m in (1, 16, 4096):
        assert found.row(problem(m=m), KNOWN) == row()
    for other in (problem(n=4224), problem(k=2048), problem(group=64)):
        assert found.row(other, KNOWN) is None
    assert NO_TABLES.row(problem(), KNOWN) is None


def test_the_device_must_match():
    found = tables(table())
    slice_of_it = replace(H200, sms=60)
    for machine in (load_device("h100"), load_device("a100-80gb"), slice_of_it, None):
        result, texts = warned(lambda m=machine: found.row(problem(machine=m), KNOWN))
        assert result is None and texts == []
    board = replace(H200, title="NVIDIA GH200 480GB", present=False)
    assert found.row(problem(machine=board), KNOWN) is not None
    cpu = replace(load_device("cpu"), present=True)
    assert found.row(problem(machine=cpu), KNOWN) is None


def test_a_table_that_the_user_named_warns_if_it_is_of_another_gpu():
    found = tables(table(machine=load_device("a100-80gb")), layer="session")
    (_, texts), (_, again) = (warned(lambda: found.row(problem(), KNOWN)) for _ in range(2))
    assert again == [] and len(texts) == 1
    assert "0.json ignored: tuned on sm80-108" in texts[0] and "this GPU is sm90-132" in texts[0]
    described = problem(machine=load_device("b200"))
    assert warned(lambda: tables(table(), layer="session").row(described, KNOWN)) == (None, [])


def test_an_incomplete_ladder_decides_nothing():
    short = replace(row(), ladder=row().ladder[:-1])
    assert tables(table(short)).row(problem(), KNOWN) is None
    assert tables(table(replace(row(), ladder=row().ladder[3:]))).row(problem(), KNOWN) is None


def test_buckets_that_the_model_filled_are_part_of_a_row():
    ladder = [replace(e, measured=False, verified="") if e.size > 256 else e for e in row().ladder]
    mixed = replace(row(), ladder=tuple(ladder))
    found = tables(table(mixed)).row(problem(), KNOWN)
    assert found == mixed and not found.entry(4096).measured


def test_an_edited_kernel_makes_only_its_rows_stale_with_one_warning():
    gemv_only = row(problem(n=1024), kernel="gemv", source="v1")
    found = tables(table(row(), row(problem(n=8192)), gemv_only))
    edited = {**KNOWN, "gemm": kernel("gemm", "g2")}
    result, texts = warned(lambda: found.row(problem(), edited))
    assert result is None and len(texts) == 1
    assert "0.json has stale rows: gemm is not what was tuned" in texts[0]
    assert "`fewbit autotune`" in texts[0]
    assert warned(lambda: found.row(problem(n=8192), edited)) == (None, [])
    assert found.row(problem(n=1024), edited) == gemv_only
    gone = {"gemv": KNOWN["gemv"]}
    assert warned(lambda: found.row(problem(), gone)) == (None, [])


def test_one_warning_for_each_file():
    edited = {**KNOWN, "gemm": kernel("gemm", "g2")}
    found = tables(table(), table(row(tuned_at="2026-11-03T00:00:00Z")))
    assert len(warned(lambda: found.row(problem(), edited))[1]) == 2


def test_a_driver_alone_changes_nothing_and_a_compiler_does():
    assert tables(table(driver="999")).row(problem(), KNOWN) is not None
    newer = (("torch", "2.13.0"), ("triton", "3.7.0"))
    result, texts = warned(lambda: tables(table(), toolchain=newer).row(problem(), KNOWN))
    assert result is None and len(texts) == 1
    asked = []

    def digest_of(of, e):
        asked.append((of.size, e.size))
        return "d" * 16

    found = tables(table(), toolchain=newer, digest_of=digest_of)
    assert found.row(problem(), KNOWN) == row()
    assert asked == [(size, size) for size in problem().buckets]
    other = tables(table(), toolchain=newer, digest_of=lambda of, e: None)
    assert other.row(problem(), KNOWN) is None


def test_a_config_must_have_the_form_of_the_kernel():
    plain = {**KNOWN, "gemm": kernel("gemm", "g1", configs=None)}
    assert warned(lambda: tables(table()).row(problem(), plain))[0] is None
    assert tables(table(row(config=()))).row(problem(), KNOWN) is None


def test_stronger_layers_and_newer_rows_come_first_and_stale_ones_are_passed_over():
    mine, site = row(us=7.0), row(us=8.0, tuned_at="2026-12-01T00:00:00Z")
    newer = row(us=6.0, tuned_at="2026-11-09T00:00:00Z")
    layers = [
        Layered("site", "site", table(site)),
        Layered("user", "a", table(mine)),
        Layered("user", "b", table(newer)),
    ]
    for order in (layers, layers[::-1]):
        assert Tables(order, TOOLS).row(problem(), KNOWN) == newer
    stale = Layered("session", "s", table(row(source="old")))
    result, texts = warned(lambda: Tables([stale, *layers], TOOLS).row(problem(), KNOWN))
    assert result == newer and len(texts) == 1


def test_other_ops_have_other_buckets():
    rows = RowsProblem("hadamard", None, 16, 64, problem().dtype, "cuda", H200)
    page = IntGroupOptions()
    attend = AttentionProblem("int4_head", page, "int4_head", page, 16, 1, 8, 4, 128, 128, 64,
                              problem().dtype, "cuda", (), H200)  # fmt: skip
    found = tables(table(row(rows), row(attend), row(problem(n=64))))
    assert found.row(rows, KNOWN).family == rows.family
    assert [e.size for e in found.row(attend, KNOWN).ladder] == list(T_BUCKETS)
    assert found.near(replace(attend, n_rows=32, kv_heads=4), KNOWN)
    assert not found.near(replace(attend, group=8), KNOWN)


# ---- near -----------------------------------------------------------------------------------


def test_near_shapes_speak_for_their_kernels():
    """us = M + 1 at model_us 5: the ratio of a bucket is (M + 1) / 5."""
    found = tables(table(row(problem(n=4096, k=4096))))
    near = found.near(problem(n=8192, k=2048, m=64), KNOWN)
    assert near == {"gemm": 65 / 5}
    assert found.near(problem(n=8192, m=8), KNOWN) == {"gemv": 9 / 5, "gemm": 17 / 5}
    assert found.near(problem(m=64), KNOWN) == {"gemm": 65 / 5}  # the family itself
    for far in (problem(n=8193), problem(k=2047), problem(bits=3), problem(machine=None)):
        assert found.near(far, KNOWN) == {}
    assert NO_TABLES.near(problem(), KNOWN) == {}


def test_the_nearest_row_speaks():
    close, far = row(problem(n=4608), us=10.0), row(problem(n=7168), us=20.0)
    other = table(row(problem(n=4096), us=40.0), machine=load_device("h100"))
    assert tables(table(far, close), other).near(problem(), KNOWN)["gemm"] == 2.0
    assert tables(table(far), other).near(problem(), KNOWN)["gemm"] == 4.0  # same GPU
    assert tables(other).near(problem(), KNOWN)["gemm"] == 8.0  # same capability
    assert tables(table(machine=load_device("b200"))).near(problem(), KNOWN) == {}


def test_what_was_not_measured_or_is_stale_does_not_speak():
    for facts in ({"measured": False}, {"model_us": 0.0}, {"us": 0.0}):
        assert tables(table(row(**facts))).near(problem(), KNOWN) == {}
    edited = {**KNOWN, "gemm": kernel("gemm", "g2")}
    result, texts = warned(lambda: tables(table()).near(problem(m=8), edited))
    assert result == {"gemv": 9 / 5} and len(texts) == 1
    assert tables(table()).near(problem(m=8), {"gemm": KNOWN["gemm"]}) == {"gemm": 17 / 5}


# ---- quarantine -----------------------------------------------------------------------------


def test_quarantined_configs():
    found = tables(table(row(problem(n=64)), quarantine=(FAULT,)))
    gemm = KNOWN["gemm"]
    assert found.quarantined(problem(), gemm, BIG)
    assert not found.quarantined(problem(), gemm, CONFIG)
    assert not found.quarantined(problem(), KNOWN["gemv"], BIG)
    assert not found.quarantined(problem(), kernel("gemm", "g2"), BIG)  # edited since
    assert not found.quarantined(problem(machine=load_device("h100")), gemm, BIG)
    assert not found.quarantined(problem(machine=None), gemm, BIG)
    whole = tables(table(quarantine=(Quarantined("gemm", (), "g1", "DEATH"),)))
    assert whole.quarantined(problem(), gemm, CONFIG)


def test_a_row_with_a_quarantined_config_decides_nothing():
    found = tables(table(), table(row(problem(n=64)), quarantine=(FAULT,)))
    assert warned(lambda: found.row(problem(), KNOWN))[0] is None


# ---- this process ---------------------------------------------------------------------------


@pytest.fixture
def process(tmp_path, monkeypatch):
    """A process whose only table is that of its user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FEWBIT_SITE_TABLES", str(tmp_path / "none"))
    monkeypatch.delenv("FEWBIT_TABLE", raising=False)
    monkeypatch.delenv("FEWBIT_AUTOTUNE", raising=False)
    monkeypatch.setattr("fewbit.quant.tuned.this_toolchain", lambda: TOOLS)
    current_tables.cache_clear()
    yield tmp_path / "fewbit" / "tuned" / "t.json"
    current_tables.cache_clear()


def test_tables_are_read_once(process):
    append_rows(process, table())
    found = current_tables()
    assert found.row(problem(), KNOWN) == row()
    process.unlink()
    assert current_tables() is found and found.row(problem(m=1), KNOWN) == row()


def test_the_switch(process, monkeypatch):
    append_rows(process, table())
    monkeypatch.setenv("FEWBIT_AUTOTUNE", "off")
    assert current_tables() is NO_TABLES
    current_tables.cache_clear()
    monkeypatch.setenv("FEWBIT_AUTOTUNE", "on")
    with pytest.raises(TableError, match=r"first use is not built; run `fewbit autotune` once"):
        current_tables()


def test_a_damaged_table_never_raises_at_lookup(process):
    """Bytes flipped, cut or repeated: either nothing is found, or the very row."""
    text = table_text(table(row(), row(problem(n=8192)), quarantine=(FAULT,))).encode()
    process.parent.mkdir(parents=True)
    draw = random.Random(2)
    n_found = 0
    for _ in range(150):
        raw = bytearray(text)
        kind = draw.randrange(4)
        if kind == 0:
            del raw[draw.randrange(len(raw)) :]
        elif kind == 1:
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        elif kind == 2:
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        else:
            at = draw.randrange(len(raw))
            raw[at:at] = raw[at : at + draw.randrange(40)]
        process.write_bytes(raw)
        current_tables.cache_clear()
        tuned_file._WARNED.clear()
        found, texts = warned(lambda: current_tables().row(problem(), KNOWN))
        assert found in (None, row())
        assert len(texts) == (0 if bytes(raw) == text or found else 1), texts
        n_found += found is not None
    assert n_found < 20  # spaces, or nothing flipped


def test_a_row_of_strange_families_is_harmless():
    families = ["", "linear N=", "linear N=* K=1", f"linear N={'9' * 5000} K=1", "N=0 K=0 * x"]
    rows = [replace(row(), family=family or "x") for family in families]
    found = tables(table(*rows))
    assert found.row(problem(), KNOWN) is None and found.near(problem(), KNOWN) == {}
    odd = Row(problem().family.replace("4096", "0"), row().ladder, row().tuned_at, TOOLS)
    assert tables(table(odd)).near(problem(), KNOWN) == {}
