"""Calibration windows: what is drawn, what is recorded, and every refusal."""

import hashlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from fewbit.calibrate.data import (
    bundled_text,
    draw_windows,
    load_calibration,
    load_tokens,
    window_start,
)
from fewbit.quant.errors import CalibrationError


class Words:
    """A tokenizer whose tokens are words, numbered by their length; ids are easy to read."""

    eos_token_id: int | None = 99
    bos_token_id = 98
    chat_template: str | None = None

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict:
        assert not add_special_tokens
        return {"input_ids": [len(word) for word in text.split()]}

    def apply_chat_template(self, conversation: list, *, tokenize: bool) -> str:
        from jinja2.exceptions import TemplateError

        assert not tokenize
        if conversation[0]["role"] == "robot":
            raise TemplateError("unknown role robot")
        return " ".join(f"{turn['role']} {turn['content']}" for turn in conversation)


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_windows_are_pieces_of_the_text_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    ids = [(index * 7919) % 31 + 1 for index in range(400)]
    path = write(tmp_path, "t.txt", " ".join("x" * size for size in ids))
    torch.manual_seed(1)
    first = load_calibration(path, Words(), 20, 16, seed=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = load_calibration(str(path), Words(), 20, 16, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.windows, again.windows)
    assert first.fingerprint() == again.fingerprint()
    other = load_calibration(path, Words(), 20, 16, seed=6)
    assert not torch.equal(first.windows, other.windows)
    assert other.fingerprint()["windows_sha256"] != first.fingerprint()["windows_sha256"]
    assert first.windows.shape == (20, 16)
    assert first.windows.dtype == torch.int64
    starts = {tuple(ids[at : at + 16]) for at in range(385)}
    assert all(tuple(row) in starts for row in first.windows.tolist())


def test_offsets_cover_first_and_last_window_evenly() -> None:
    windows = draw_windows(torch.arange(10), samples=9000, length=2, seed=0)
    counts = torch.bincount(windows[:, 0], minlength=9)
    assert counts.numel() == 9  # the last window starts at 8 and ends with token 9
    assert counts.min() > 880 and counts.max() < 1120


def test_fingerprint_records_hash_source_and_sizes_without_a_path(tmp_path: Path) -> None:
    path = write(tmp_path, "my.txt", "a bb ccc dddd")
    record = load_calibration(path, Words(), 2, 4, seed=3).fingerprint()
    ids = b"".join(value.to_bytes(8, "little") for value in (1, 2, 3, 4) * 2)
    assert record == {
        "windows_sha256": hashlib.sha256(ids).hexdigest(),
        "text_sha256": hashlib.sha256(b"a bb ccc dddd").hexdigest(),
        "source": "my.txt",
        "samples": 2,
        "length": 4,
        "seed": 3,
        "n_tokens_available": 4,
    }
    assert str(tmp_path) not in json.dumps(record)


def test_one_window_of_text_is_enough_for_any_number_of_samples(tmp_path: Path) -> None:
    path = write(tmp_path, "t.txt", "a bb ccc")
    assert load_calibration(path, Words(), 5, 3, 0).windows.tolist() == [[1, 2, 3]] * 5


def test_first_token_replaces_and_does_not_lengthen(tmp_path: Path) -> None:
    path = write(tmp_path, "t.txt", "a bb ccc")
    drawn = load_calibration(path, Words(), 2, 3, 0, first_token=98)
    assert drawn.windows.tolist() == [[98, 2, 3]] * 2
    assert window_start("gemma3_text", Words()) == 98
    assert window_start("llama", Words()) is None


def test_jsonl_joins_documents_by_end_of_text(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "a bb\u2028ccc"}, ensure_ascii=False), "", '{"text": "dddd"}']
    path = write(tmp_path, "t.jsonl", "\n".join(lines) + "\n")
    assert load_tokens(path, Words(), "calib").ids.tolist() == [1, 2, 3, 99, 4]
    unended = Words()
    unended.eos_token_id = None
    assert load_tokens(path, unended, "calib").ids.tolist() == [1, 2, 3, 4]


def test_jsonl_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a bb"}, {"role": "model", "content": "c"}]
    path = write(tmp_path, "t.jsonl", json.dumps({"messages": turns}))
    chatty = Words()
    chatty.chat_template = "template"
    assert load_tokens(path, chatty, "calib").ids.tolist() == [4, 1, 2, 5, 1]
    with pytest.raises(CalibrationError, match=r"t\.jsonl line 1 .*no chat template"):
        load_tokens(path, Words(), "calib")
    for bad, message in (
        ([{"role": "robot", "content": "x"}], "line 1: the chat template refuses it: unknown"),
        ([{"role": "user"}], 'line 1: every message needs "role" and "content"'),
        (["hello"], 'line 1: every message needs "role" and "content"'),
    ):
        path = write(tmp_path, "t.jsonl", json.dumps({"messages": bad}))
        with pytest.raises(CalibrationError, match=message):
            load_tokens(path, chatty, "calib")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", "", "t.txt: the text is empty"),
        ("t.txt", " \n\t", "t.txt: the text is empty"),
        ("t.txt", b"abc \xff\xfe", "t.txt is not UTF-8: byte 0xff at offset 4"),
        ("t.txt", "a bb ccc", "t.txt: the text has 3 tokens, one window needs 4"),
        ("t.jsonl", "", "t.jsonl: the text is empty"),
        ("t.jsonl", '{"text": "a"}\n{"text": 3}', r"line 2: expected .* got keys \['text'\]"),
        ("t.jsonl", '{"text": "a"}\n\n[1]', "line 3: expected an object .* got list"),
        ("t.jsonl", '{"text": "a"', "line 1 is not JSON"),
        ("t.csv", "a,b", "t.csv: calibration text is a .txt or .jsonl file, got '.csv'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_calibration(write(tmp_path, name, content), Words(), 1, 4, 0)


def test_bad_sizes_and_places_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "t.txt", "a bb ccc")
    for samples, length, message in ((0, 4, "samples must be at least 1, got 0"),
                                     (1, -2, "length must be at least 1, got -2")):  # fmt: skip
        with pytest.raises(CalibrationError, match=message):
            load_calibration(path, Words(), samples, length, 0)
    with pytest.raises(CalibrationError, match="length 3 is beyond the model's context of 2"):
        load_calibration(path, Words(), 1, 3, 0, context=2)
    with pytest.raises(CalibrationError, match="there is no file"):
        load_calibration(tmp_path / "absent.txt", Words(), 1, 3, 0)
    with pytest.raises(CalibrationError, match="is a folder"):
        load_calibration(tmp_path, Words(), 1, 3, 0)
    with pytest.raises(CalibrationError, match="no such calibration text: 'nonsense'"):
        load_calibration("nonsense", Words(), 1, 3, 0)


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: object) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_a_hub_data_set_is_streamed_until_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, *, split: str, streaming: bool):
        asked.append((name, split, streaming))
        for count in range(10**9):  # endless: reading must stop by itself
            yield {"text": "a " * (1 + count % 3)}

    fake_datasets(monkeypatch, load)
    drawn = load_calibration("org/name:test", Words(), 2, 4, 0)
    assert asked == [("org/name", "test", True)]
    assert drawn.source == "org/name:test"
    assert 64 <= drawn.n_tokens_available < 110


def test_a_hub_data_set_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, *, split: str, streaming: bool):
        raise ConnectionError("no route")

    fake_datasets(monkeypatch, load)
    with pytest.raises(
        CalibrationError, match=r"'org/name' .split 'train'. cannot be read: no rou"
    ):
        load_calibration("org/name", Words(), 2, 4, 0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="pip install datasets"):
        load_calibration("org/name", Words(), 2, 4, 0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match="HF_HUB_OFFLINE forbids"):
        load_calibration("org/name", Words(), 2, 4, 0)


def test_bundled_texts_are_there_and_disjoint() -> None:
    calib, evaluation = bundled_text("calib"), bundled_text("eval")
    assert len(calib.encode()) == 702_429
    assert len(evaluation.encode()) == 189_963
    long_lines = {line for line in calib.split("\n") if len(line) > 80}
    assert not long_lines & set(evaluation.split("\n"))
    with pytest.raises(CalibrationError, match=r"unknown bundled text 'evil' .did you mean 'eval'"):
        bundled_text("evil")


def test_bundled_text_is_the_default(tmp_path: Path) -> None:
    drawn = load_calibration(None, Words(), 3, 8, seed=0)
    assert drawn.source == "bundled"
    assert drawn.n_tokens_available == len(bundled_text("calib").split())
    assert load_tokens(None, Words(), "eval").ids.numel() == len(bundled_text("eval").split())
