"""A child process: answers, signs of life, and every way to end."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fewbit.quant.child import Beat, Child, Done, Gone, Refused

TESTS = Path(__file__).resolve().parent.parent
SOON = 60.0


@pytest.fixture
def start(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    children = []

    def make(handler="fake_backends:echo", **environment):
        children.append(Child(handler, environment))
        return children[-1]

    yield make
    for child in children:
        child.kill()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_child_answers_beats_refuses_and_prints(start):
    child = start(FAKE="yes")
    assert child.receive(SOON) == Done(None)  # ready
    for task in ({"a": [1, 2]}, b"x" * (1 << 20), "print"):
        child.send(task)
        assert child.receive(SOON) == Done(task)
    child.send(3)
    assert [child.receive(SOON) for _ in range(4)] == [Beat(0), Beat(1), Beat(2), Done("beaten")]
    child.send("refuse")
    refused = child.receive(SOON)
    assert isinstance(refused, Refused) and str(refused.error) == "no: got 3, needed 4; use another"
    child.send("environment")
    environment = child.receive(SOON).value
    assert environment["FAKE"] == "yes" and environment["OMP_NUM_THREADS"] == "1"
    assert child.receive(0.05) is None  # nothing was asked
    child.close()
    assert not alive(child.pid)
    child.send("anything")
    assert isinstance(child.receive(1.0), Gone)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("raise", Gone(True, "RuntimeError: CUDA error: an illegal memory access was encountered")),
        ("die", Gone(False, "it ended with signal 9")),
        ("exit", Gone(False, "it ended with exit status 3: last words")),
    ],
)
def test_ends(start, task, expected):
    child = start()
    child.receive(SOON)
    child.send(task)
    assert child.receive(SOON) == expected
    assert child.receive(SOON) == expected  # asked again
    child.send("anything")  # is no error


def test_a_hung_child_is_silent_and_can_be_killed(start):
    child = start()
    child.receive(SOON)
    child.send("hang")
    assert child.receive(0.2) is None
    child.kill()
    assert not alive(child.pid)
    child.kill()  # twice is no error


def test_a_handler_that_cannot_be_made(start):
    gone = start("fake_backends:broken").receive(SOON)
    assert gone == Gone(True, "ImportError: no module named nothing")


PARENT = """
import sys
from fewbit.quant.child import Child
child = Child("fake_backends:echo", {})
child.receive(60)
child.send("hang")
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_a_hung_child_ends_when_its_parent_is_killed(start):
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], env=environment, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.communicate()
    until = time.monotonic() + 10
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(pid)
