"""Progress: plain lines where nobody watches, nothing if quiet, a bar on a terminal."""

import io

import pytest

from fewbit.quant.pipeline import Progress
from fewbit.quant.progress import ProgressBar

FIRST = Progress("model.layers.0", 1, 3, 4.125, ("model.layers.0.down_proj", 0.0523), 62.4)
EARLY = Progress("outside the blocks 1", 1, 3, 0.0, None, None)
LAST = Progress("model.layers.2", 3, 3, 4.126, None, 0.0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, quiet=False):
    monkeypatch.setattr("sys.stderr", stream)
    with ProgressBar(quiet) as bar:
        bar.say("model: 1 GB in")
        bar.show(FIRST)
        bar.show(LAST)
    return stream.getvalue()


def test_plain_lines(monkeypatch):
    assert shown(monkeypatch, io.StringIO()).splitlines() == [
        "model: 1 GB in",
        "[1/3] model.layers.0: 4.12 bits, worst 0.0523 model.layers.0.down_proj, 62 s left",
        "[3/3] model.layers.2: 4.13 bits, 0 s left",
    ]


def test_no_time_is_told_before_it_is_known(monkeypatch, capsys):
    with ProgressBar(False) as bar:
        bar.show(EARLY)
    assert capsys.readouterr().err == "[1/3] outside the blocks 1: 0.00 bits\n"


def test_a_bar_on_a_terminal(monkeypatch):
    text = shown(monkeypatch, Terminal())
    assert "\r" in text and "3/3" in text and "4.13 bits" in text
    assert "s left" not in text


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_quiet(monkeypatch, stream):
    assert shown(monkeypatch, stream, quiet=True) == ""


def test_errors_pass_through(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with pytest.raises(KeyboardInterrupt), ProgressBar(False):
        raise KeyboardInterrupt
