"""Killed at random moments and resumed: the output is that of an undisturbed run, byte for byte.

The command runs as its own process and gets SIGKILL. Moments are drawn over the whole run, its end
included: for each, a number of finished units and a delay after it. Twenty kills.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fewbit.quant.pipeline

KILLS = 20
MODEL = Path(fewbit.quant.pipeline.__file__).parent / "data" / "tiny-llama"
LIMIT = 120  # seconds for one process


def start(out, recipe="w4a8kv4", samples=8):
    command = [sys.executable, "-m", "fewbit.quant.cli", "quantize", str(MODEL), "-o", str(out),
               "--recipe", recipe, "--samples", str(samples), "--length", "64",
               "--device", "cpu"]  # fmt: skip
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process):
    printed, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors
    return printed, errors


def hashes(out):
    """SHA-256 of every file; reports hold times."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.iterdir()
        if not path.name.startswith("report.")
    }


def finished_units(out):
    try:
        return (out / "fewbit.journal").read_bytes().count(b'{"event":"unit"')
    except FileNotFoundError:
        return -1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(hashes, number of units, seconds of a unit) of a run that nobody disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    process = start(out)
    times = []
    while process.poll() is None:
        n_done = finished_units(out)
        if n_done >= len(times):
            times.append(time.monotonic())
        time.sleep(0.001)
    finish(process)
    return hashes(out), len(times) - 1, (times[-1] - times[0]) / (len(times) - 1)


def kill_when(process, out, n_units, delay):
    """SIGKILL `delay` seconds after the journal holds `n_units` units; False if it ended before."""
    deadline = time.monotonic() + LIMIT
    while process.poll() is None and finished_units(out) < n_units:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.0005)
    time.sleep(delay)
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive


def test_killed_at_random_moments(undisturbed, tmp_path):
    expected, n_units, unit_seconds = undisturbed
    assert n_units > 5
    generator = random.Random(2024)
    moments = sorted(generator.uniform(-0.2, n_units + 0.5) for _ in range(KILLS - 1))
    moments.append(n_units + 0.01)  # while the result is verified and published
    out = tmp_path / "out"
    hit = 0
    for moment in moments:
        n_done = int(moment) if moment >= 0 else -1
        part = moment - n_done
        # What follows the last unit takes no more than a few hundredths of a second.
        delay = part * (unit_seconds if n_done < n_units else 0.05)
        hit += kill_when(start(out), out, n_done, delay)
        assert (out / "fewbit.journal").exists() or (out / "config.json").exists() or n_done < 0
        if (out / "config.json").exists() and not (out / "fewbit.journal").exists():
            break  # the run was over before the signal came
    if not (out / "config.json").exists() or (out / "fewbit.journal").exists():
        finish(start(out))
    assert hit >= KILLS - 2
    assert hashes(out) == expected


def test_interrupted_from_the_keyboard(undisturbed, tmp_path):
    expected, n_units, _ = undisturbed
    out = tmp_path / "out"
    process = start(out)
    while finished_units(out) < n_units // 2:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "fewbit: interrupted; the same command resumes"
    assert "Traceback" not in errors and printed == ""
    assert not (out / "config.json").exists()
    finish(start(out))
    assert hashes(out) == expected
