"""Public names: the right objects, at no cost, whatever else is imported."""

import subprocess
import sys
import time

import pytest


def run(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_instant():
    """Nothing heavy is imported; the time is that of the import alone, best of three."""
    code = (
        "import sys, time; start = time.perf_counter(); from fewbit import quant; "
        "took = time.perf_counter() - start; "
        "heavy = [m for m in ('torch', 'transformers', 'numpy') if m in sys.modules]; "
        "assert not heavy, heavy; print(took)"
    )
    assert min(float(run(code)) for _ in range(3)) <= 0.3


def testpublic_names_are_functions_whatever_was_imported():
    run(
        "import importlib\n"
        "from fewbit import quant\n"
        "for name in ('load', 'inspect', 'evaluate'):\n"
        "    module = importlib.import_module(f'fewbit.quant.{name}')\n"
        "    assert type(module).__name__ == 'module', name\n"
        "    assert callable(getattr(quant, name)), name\n"
        "    assert getattr(quant, name) is getattr(module, name), name\n"
        "import fewbit.quant.load\n"
        "assert callable(quant.load) and callable(fewbit.quant.load)\n"
        "from fewbit.quant.load import load, load_tokenizer\n"
        "assert quant.load is load and quant.load_tokenizer is load_tokenizer\n"
        "from fewbit.quant import inspect\n"
        "assert callable(inspect)\n"
    )


def test_everypublic_name_resolves():
    from fewbit import quant

    for name in quant.__all__:
        assert getattr(quant, name) is not None
    assert set(quant.__all__) <= set(dir(quant))
    assert quant.__version__.count(".") == 2
    assert quant.Recipe.__name__ == "Recipe" and quant.quantize.__name__ == "quantize"


def test_unknown_names_and_submodules():
    from fewbit import quant

    with pytest.raises(AttributeError, match=r"'fewbit\.quant' has no attribute 'lod'"):
        quant.lod  # noqa: B018
    import fewbit.quant.errors

    assert quant.errors is fewbit.quant.errors  # other submodules are attributes as ever


def test_a_name_can_be_replaced_in_a_test(monkeypatch):
    from fewbit import quant

    original = quant.load
    monkeypatch.setattr(quant, "load", len)
    assert quant.load is len
    monkeypatch.undo()
    assert quant.load is original
    start = time.perf_counter()
    for _ in range(1000):
        quant.load  # noqa: B018
    assert time.perf_counter() - start < 0.5
