"""Discovery lists a package's modules and entry points."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fewbit.quant import registry
from fewbit.quant.registry import discover


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package on sys.path, named after the test's folder so that no two share a module cache."""
    name = f"found_{tmp_path.name.replace('-', '_')}"
    root = tmp_path / name
    root.mkdir()
    (root / "__init__.py").touch()
    thing = (
        "from types import SimpleNamespace\nTHING = SimpleNamespace(name={!r}, origin=__name__)\n"
    )
    (root / "b.py").write_text(thing.format("second"))
    (root / "a.py").write_text(thing.format("first"))
    (root / "without.py").write_text("OTHER = 1\n")
    (root / "_private.py").write_text("raise RuntimeError('must not be imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]


def points(**objects: object) -> object:
    """Stands for `importlib.metadata.entry_points`."""

    def entry_points(group: str) -> list[SimpleNamespace]:
        assert group == "their.group"
        return [
            SimpleNamespace(name=name, load=lambda item=item: item)
            for name, item in objects.items()
        ]

    return entry_points


def test_public_modules_are_listed(package: str) -> None:
    found = discover(package, "THING", "their.group")
    assert list(found) == ["first", "second"]
    assert found["first"].origin == f"{package}.a"


def test_entry_points_are_added(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    third = SimpleNamespace(name="third")
    monkeypatch.setattr(registry, "entry_points", points(third=third))
    assert discover(package, "THING", "their.group")["third"] is third


def test_a_name_taken_twice_is_an_error(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", points(x=SimpleNamespace(name="first")))
    with pytest.raises(RuntimeError, match="entry point x defines 'first' again"):
        discover(package, "THING", "their.group")


def test_a_tuple_counts_as_each_of_its_objects(package: str, tmp_path: Path) -> None:
    pair = "from types import SimpleNamespace as N\nTHING = (N(name='third'), N(name='fourth'))\n"
    (tmp_path / package / "c.py").write_text(pair)
    assert list(discover(package, "THING", "")) == ["first", "second", "third", "fourth"]
