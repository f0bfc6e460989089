"""Engines of the coder, each as it would be chosen on a machine that has nothing better."""

import pytest

from fewbit.quant.codecs import rans32_native, rans32_numpy
from fewbit.quant.native import compiler

ENGINES = ("numpy", *compiler.ISA_NAMES)


def missing(name):
    """Why this engine cannot run here, or None."""
    if name == "numpy":
        return None
    library = compiler.library()
    if library is None:
        return compiler.why_not()
    wanted = compiler.ISA_NAMES.index(name)
    return None if library.fewbit_isa(wanted) == wanted else f"this processor has no {name}"


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """A module with count, encode and decode."""
    if reason := missing(request.param):
        pytest.skip(reason)
    if request.param == "numpy":
        return rans32_numpy
    monkeypatch.setenv("FEWBIT_NATIVE_ISA", request.param)
    return rans32_native


@pytest.fixture
def with_each_engine(monkeypatch):
    """Calls a function with every engine there is: {name: what it returned}."""

    def run(function):
        found = {}
        for name in ENGINES:
            if missing(name) is None:
                monkeypatch.setenv("FEWBIT_NATIVE_ISA", name)
                found[name] = function(rans32_numpy if name == "numpy" else rans32_native)
        return found

    return run
