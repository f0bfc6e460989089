"""Building a report from a run's journal rows, writing it, and its lines for a terminal."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fewbit.export.report import build_report, summary_text, write_report
from fewbit.export.shards import Stored


@dataclass
class Planned:
    """A planned tensor as a report reads it."""

    key: str
    rule: object = None
    reason: str = "the recipe leaves it out"
    source_shape: tuple[int, ...] = (4, 8)


@dataclass
class Run:
    """A job with one quantized and one kept tensor."""

    calibration: Any = None
    seed: int = 5
    checkpoint: Any = field(
        default_factory=lambda: SimpleNamespace(name="m", revision=None, fingerprint="ff")
    )
    recipe: Any = field(
        default_factory=lambda: SimpleNamespace(
            name="w4", text="{}", allow_fallback=True, quantizes=True
        )
    )
    plan: dict[str, Planned] = field(
        default_factory=lambda: {
            "a.weight": Planned("a.weight", rule=object()),
            "lm_head.weight": Planned("lm_head.weight"),
        }
    )


def rows(**changes: Any) -> list[dict[str, Any]]:
    plain = {
        "name": "model.layers.0.self_attn.q_proj", "shape": [8, 32], "format": "int_group",
        "options": {"bits": 4}, "bits_per_weight": 4.5, "n_bytes": 144, "n_weights": 256,
        "relative_error": 0.08, "output_error": 0.05, "block": "model.layers.0", "fallbacks": [],
        "seconds": 0.25,
    }  # fmt: skip
    return [{**plain, **changes}]


def writing(rows: list[Any], planes: dict[str, int] | None = None) -> SimpleNamespace:
    """A writer that has stored the kept tensor, plainly or as planes of these sizes."""
    sizes = planes or {"lm_head.weight": 64}
    stored = [("f", Stored(name, "U8", (n,), 0, n, "")) for name, n in sizes.items()]
    return SimpleNamespace(rows=rows, stored=lambda: stored)


FACTS = {
    "wall_seconds": 1.5, "peak_resident_bytes": 2_000_000, "environment": {"torch": "2.9"},
    "pid": 1, "command": "fewbit quantize m",
}  # fmt: skip


def test_a_report_is_built_from_plan_and_rows() -> None:
    writer = writing([rows(), [], rows(name="b", tokens=[1, 0])])
    data = SimpleNamespace(fingerprint=lambda: {"source": "bundled"})
    found = build_report(Run(calibration=data), writer, FACTS)
    assert [row.name for row in found.tensors] == ["model.layers.0.self_attn.q_proj", "b"]
    assert [(row.name, row.n_bytes) for row in found.kept] == [("lm_head.weight", 64)]
    assert found.provenance.calibration == {"source": "bundled"}
    assert found.provenance.command == "fewbit quantize m"
    assert found.allow_fallback is True
    without = {key: value for key, value in FACTS.items() if key != "command"}
    plain = build_report(Run(), writing([]), without)
    assert plain.provenance.calibration is None and plain.provenance.command == ""


def test_both_files_are_written_whole_and_replaced(tmp_path: Path) -> None:
    for name in ("a", "b"):
        report = build_report(Run(), writing([rows(name=name)]), FACTS)
        write_report(tmp_path, report)
        found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        assert list(found["tensors"]) == [name]
        assert f">{name}<" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_the_summary_names_what_matters() -> None:
    stack = rows(name="model.layers.0.mlp.experts.up_proj", tokens=[0, 9], output_error=None)
    writer = writing([rows(fallbacks=["rounded to nearest"]), stack])
    text = summary_text(build_report(Run(), writer, FACTS))
    assert text.startswith("2 weights quantized at 4.500 bits, 1 tensors kept; 352 bytes, 1.5 s, ")
    figures = [line.split() for line in text.split("\n")]
    assert ["attention", "144", "0"] in figures
    assert ["head", "0", "64"] in figures
    assert "model.layers.0.mlp.experts: 1 of 2 experts saw no token" in text
    assert "1 fallback\n  model.layers.0.self_attn.q_proj: rounded to nearest" in text
    errors = text.split("largest errors")[1].split("\n")
    assert errors[1].split() == ["0.0800", "-", "model.layers.0.mlp.experts.up_proj"]
    assert errors[2].split() == ["0.0800", "0.0500", "model.layers.0.self_attn.q_proj"]


def test_the_summary_of_a_copy_has_no_errors_to_show() -> None:
    text = summary_text(build_report(Run(), writing([]), FACTS))
    assert text.startswith("0 weights quantized at 0.000 bits")
    assert "largest errors" not in text


def test_coded_tensors_count_with_what_they_take() -> None:
    run = Run(plan={"lm_head.weight": Planned("lm_head.weight")})
    run.recipe.quantizes = False
    planes = {"lm_head.weight.rans32.words": 20, "lm_head.weight.rans32.raw": 22}
    found = build_report(run, writing([], planes), FACTS)
    assert found.kept[0].n_bytes == 42 and found.kept[0].coded
    assert found.kept[0].reason == "coded without loss"
    assert found.bits_per_weight == 8 * 42 / 32
    assert summary_text(found).startswith(
        "1 tensors coded without loss, 10.500 bits a weight in all"
    )
