"""Makes the transformers library know quant_method "fewbit" as soon as it is there.

Importing fewbit must stay instant, so it must not import the library; and the user may import
either first. If the library's model loader is imported already, our quantizer is registered now.
Otherwise a finder waits on `sys.meta_path` for that one module, lets the ordinary import run,
registers, and removes itself.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# Every way to a model leads through it, and it imports the registry of quantizers. The registry
# would be too early: it is imported in the middle of this module, which the adapter needs whole.
_LOADER = "transformers.modeling_utils"


def install() -> None:
    """Register now if the library's loader is imported, else when it is; may be repeated."""
    if _LOADER in sys.modules:
        importlib.import_module(_LOADER)  # waits if another thread is in the middle of it
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    """Import the adapter; its last act is to register, also if it is what imports the loader."""
    importlib.import_module(f"{__package__}.hf")


class _Finder(MetaPathFinder):
    """Answers for the library's loader only."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The ordinary spec with a loader that registers afterwards."""
        if fullname != _LOADER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """Runs the ordinary loader, then registers."""

    def __init__(self, ordinary: Loader, finder: _Finder) -> None:
        self._ordinary = ordinary
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the ordinary loader does."""
        return self._ordinary.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute, then put things back as if this loader had never been there."""
        self._ordinary.exec_module(module)
        module.__loader__ = self._ordinary
        if module.__spec__ is not None:
            module.__spec__.loader = self._ordinary
        if self._finder in sys.meta_path:  # it may be gone: two copies of the module were loaded
            sys.meta_path.remove(self._finder)
        _register()
