"""What runs in child processes under test: handlers and timers that hang, die, raise, or answer.

A candidate's config says what it does; see `FakeTimer`.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from fewbit.quant.errors import NoKernelError, TuningError
from fewbit.quant.kernel import Compiled
from fewbit.quant.timing import Candidate, Facts, Fault
from tuned_tables import H200


def act(how):
    """Hang, die, fail or refuse, as a child's task may."""
    if how == "hang":
        time.sleep(600)
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        print("last words", file=sys.stderr)
        os._exit(3)
    if how == "raise":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if how == "refuse":
        raise NoKernelError("no: got 3, needed 4; use another")


def echo(beat):
    """A handler: a text is acted on, a number beats so often, anything else comes back."""

    def handle(task):
        if isinstance(task, int):
            for i in range(task):
                beat(i)
            return "beaten"
        if isinstance(task, str):
            act(task)
            if task == "print":
                print("printed", flush=True)
            if task == "environment":
                return dict(os.environ)
            if task == "pid":
                return os.getpid()
        return task

    return handle


def broken(beat):
    """A handler that cannot be made."""
    raise ImportError("no module named nothing")


def fake_compiler(beat):
    """Compiles: `how` in a job's config acts, the number of compiles is noted in $FAKE_LOG."""

    def compile_job(job):
        with Path(os.environ["FAKE_LOG"]).open("a") as log:
            print(os.getpid(), dict(job.config), os.environ["TRITON_INTERPRET"], file=log)
        act({1: "hang", 2: "die", 3: "raise", 4: "refuse"}.get(dict(job.config).get("how")))
        return (Compiled(64, 0, 1024, 128, f"digest {job.config}", (("FADD", 3),)),)

    return compile_job


class FakeTimer:
    """A backend. Config ("how", n): 1 hangs, 2 dies, 3 raises, 4 refuses, 5 is wrong, 6 dies before
    its beat, 7 takes half a second that it asks for, 8 verified until the file $FAKE_BROKEN came."""

    def __init__(self, beat):
        self._beat = beat
        self._noise = random.Random(os.getpid())

    def facts(self):
        return Facts(H200, "580.65", {"sm_mhz": "1980"})

    def verify(self, problem, candidate):
        self._run(candidate)
        if dict(candidate.config).get("how") == 5:
            raise Fault(candidate, "WRONG", "relative error must be <= 0.008, got 0.5")
        return 1e-3

    def sample(self, problem, candidates, n):
        if any(dict(c.config).get("how") == 6 for c in candidates):
            act("die")
        found = [[] for _ in candidates]
        for _ in range(n):
            for i in self._noise.sample(range(len(candidates)), len(candidates)):
                self._run(candidates[i])
                found[i].append(10e-6 + 1e-6 * self._noise.random())
        return found

    def close(self):
        pass

    def _run(self, candidate):
        how = dict(candidate.config).get("how", 0)
        if how == 7:
            self._beat(candidate, 5.0)
            time.sleep(0.5)
        self._beat(candidate)
        act({1: "hang", 2: "die", 3: "raise"}.get(how))
        if how == 8 and Path(os.environ["FAKE_BROKEN"]).exists():
            act("raise")


def no_device(beat):
    """A backend of a machine without a GPU."""
    raise TuningError("timing needs a CUDA GPU and torch sees none")


def candidate(how, kernel="gemm"):
    """A candidate that does that; 0 only answers."""
    return Candidate(kernel, (("how", how),))


class Refusing(FakeTimer):
    """A backend whose `verify` ends with a named error, and whose `sample` raises a Fault."""

    def verify(self, problem, candidate):
        act("refuse")

    def sample(self, problem, candidates, n):
        for one in candidates:
            if dict(one.config).get("how") == 5:
                raise Fault(one, "WRONG", "raised in place of a block")
        return super().sample(problem, candidates, n)
