"""The page is well-formed, self-contained, shows every fact, and escapes every string."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from fewbit.export.report_facts import KeptTensor, Provenance, Report, TensorReport
from fewbit.export.report_page import render_page

HOSTILE = "model.layers.0.<script>alert('x')</script>\"&$title"
_VOID = {"meta", "link", "br", "img", "hr"}


class Reader(HTMLParser):
    """Checks nesting; collects tags with their attributes and the text by tag."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def bars(self) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if "bar" in (attrs.get("class") or "").split()]


def row(name: str, error: float = 0.05, **changes: object) -> TensorReport:
    plain = TensorReport(
        name, (8, 32), "int_group", {"bits": 4}, 4.5, 144, 0.08, error, 0.25, "model.layers.0"
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def report(*rows: TensorReport, allow_fallback: bool = False) -> Report:
    provenance = Provenance(
        "w4a16", '{"name": "w4a16"}', "org/model", "abc123", "f00d", 3, {"source": "bundled"},
        {"torch": "2.9"}, "fewbit quantize org/model -o out",
    )  # fmt: skip
    kept = (KeptTensor("model.embed_tokens.weight", 4096, "an embedding"),)
    return Report(provenance, rows, kept, 12.5, 3_000_000, allow_fallback)


def layers(n_blocks: int = 3) -> list[TensorReport]:
    return [
        row(f"model.layers.{block}.mlp.{kind}_proj", error=0.01 * (block + 1))
        for block in range(n_blocks)
        for kind in ("up", "down")
    ]


def test_one_bar_for_each_block_and_kind_scaled_by_its_error() -> None:
    found = Reader(render_page(report(*layers())))
    bars = found.bars()
    assert len(bars) == 6
    heights = [float(bar["height"] or 0) for bar in bars]
    assert heights[2] == pytest.approx(3 * heights[0], rel=0.01)
    assert heights[:3] == heights[3:]
    assert ("title", "model.layers.2.mlp.down_proj: 0.0300") in found.texts
    assert ("text", "up_proj") in found.texts


def test_experts_of_a_block_share_a_bar_that_shows_the_worst() -> None:
    rows = [
        row(f"model.layers.0.mlp.experts.{expert}.w1", error=0.01 * (expert + 1), tokens=expert)
        for expert in range(4)
    ]
    found = Reader(render_page(report(*rows)))
    assert len(found.bars()) == 1
    assert ("title", "model.layers.0.mlp.experts.3.w1: 0.0400") in found.texts
    texts = [text for _, text in found.texts]
    at = texts.index("model.layers.0.mlp.experts", texts.index("Calibration tokens of each expert"))
    assert texts[at + 1 : at + 6] == ["4", "0", "2", "3", "1"]


def test_weight_errors_are_charted_when_outputs_were_not_measured() -> None:
    page = render_page(report(row("model.layers.0.a", relative_error=0.5, output_error=None)))
    assert "model.layers.0.a: 0.5000" in page
    assert "each layer&#x27;s weight" in page


def test_fallbacks_stand_out() -> None:
    calm = render_page(report(*layers()))
    assert "No fallbacks" in calm and 'role="alert"' not in calm
    rows = [*layers(), row("model.layers.1.self_attn.q_proj", fallbacks=("rounded to nearest",))]
    alarm = Reader(render_page(report(*rows)))
    assert [attrs["class"] for tag, attrs in alarm.tags if attrs.get("role") == "alert"] == [
        "alarm"
    ]
    assert ("li", "model.layers.1.self_attn.q_proj: rounded to nearest") in alarm.texts
    assert ("h2", "1 fallback; the recipe does not allow any") in alarm.texts
    assert sum("fallback" in (bar["class"] or "") for bar in alarm.bars()) == 1


def test_bytes_are_split_by_class() -> None:
    found = Reader(render_page(report(row("model.layers.0.self_attn.q_proj", n_bytes=1024))))
    fills = {
        attrs["style"]: float(attrs["width"] or 0)
        for tag, attrs in found.tags
        if tag == "rect" and "style" in attrs
    }
    assert fills == {"fill: var(--embedding)": 720.0, "fill: var(--attention)": 180.0}


def test_every_string_is_escaped() -> None:
    hostile = report(row(HOSTILE, fallbacks=(HOSTILE,), format=HOSTILE, options={HOSTILE: HOSTILE}))
    provenance = replace(
        hostile.provenance,
        recipe=HOSTILE, recipe_text=HOSTILE, source=HOSTILE, revision=HOSTILE, command=HOSTILE,
        calibration={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE},
    )  # fmt: skip
    hostile = replace(hostile, provenance=provenance, kept=(KeptTensor(HOSTILE, 5, HOSTILE),))
    page = render_page(hostile)
    found = Reader(page)
    assert "<script" not in page
    assert not [tag for tag, _ in found.tags if tag == "script"]
    assert sum(HOSTILE in text for _, text in found.texts) >= 12
    plain = Reader(render_page(report(row("model.layers.0.x", fallbacks=("y",)))))
    known = {key for _, attrs in plain.tags for key in attrs}
    assert {key for _, attrs in found.tags for key in attrs} <= known  # no attribute was injected


def test_the_page_needs_nothing_else() -> None:
    page = render_page(report(*layers()))
    found = Reader(page)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in found.tags}
    assert not re.search(r"url\(|@import|https?://", page)
    assert not [1 for _, attrs in found.tags if {"src", "href"} & attrs.keys()]
    assert "default-src 'none'" in page
    assert "$" not in page  # every placeholder was filled


def test_the_page_is_accessible() -> None:
    found = Reader(render_page(report(*layers())))
    assert ("html", {"lang": "en"}) in found.tags
    for tag, attrs in found.tags:
        if tag == "svg":
            assert attrs["role"] == "img" and attrs["aria-label"]
    labels = {attrs["aria-labelledby"] for _, attrs in found.tags if "aria-labelledby" in attrs}
    ids = {attrs["id"] for _, attrs in found.tags if "id" in attrs}
    assert labels and labels <= ids
    assert all(attrs.get("scope") == "col" for tag, attrs in found.tags if tag == "th")
    assert "prefers-color-scheme: dark" in render_page(report(*layers()))


def test_a_run_without_quantized_tensors_has_a_page() -> None:
    texts = [text for _, text in Reader(render_page(report())).texts]
    assert "Nothing was quantized." in texts
    assert "No numbered layers were quantized." in texts


def test_thousands_of_tensors_stay_a_light_page() -> None:
    rows = [row(f"model.layers.{i // 300}.mlp.experts.{i % 300}.w1") for i in range(6000)]
    page = render_page(report(*rows))
    assert len(page) < 300_000
    assert "5600 more are in report.json." in page
