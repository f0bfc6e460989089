"""Public names of fewbit, resolved when they are first used.

    from fewbit import quant
    quant.quantize("path-or-hub-id", "out", recipe="w4a8kv4")
    model = quant.load("out")

The import itself costs milliseconds: neither torch nor transformers is imported before a name is
used. It also makes transformers, imported before or after, load checkpoints of quant_method
"fewbit".

`load`, `inspect`, `evaluate` and `kernel_summary` are functions that live in submodules of the same
names. Importing a submodule sets it as an attribute of its package, which would replace the function;
`_Package` does not let that happen. The modules are reached by `from fewbit.quant.load import ...`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .import_hook import install

if TYPE_CHECKING:
    from .evaluate import evaluate as evaluate
    from .export_command import export as export
    from .inspect import inspect as inspect
    from .kernel_summary import kernel_summary as kernel_summary
    from .load import load as load
    from .load import load_tokenizer as load_tokenizer
    from .pipeline import quantize as quantize
    from .policy import use_kernels as use_kernels
    from .recipe import Recipe as Recipe

    __version__: str

# Public name -> submodule that defines it.
_PUBLIC = {
    "Recipe": "recipe",
    "evaluate": "evaluate",
    "export": "export_command",
    "inspect": "inspect",
    "kernel_summary": "kernel_summary",
    "load": "load",
    "load_tokenizer": "load",
    "quantize": "pipeline",
    "use_kernels": "policy",
}

__all__ = [
    "Recipe", "__version__", "evaluate", "export", "inspect", "kernel_summary", "load",
    "load_tokenizer", "quantize", "use_kernels",
]  # fmt: skip


class _Package(ModuleType):
    """The package, whose public names stay what they are when submodules are imported."""

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("fewbit")
        if name not in _PUBLIC:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{self.__name__}.{_PUBLIC[name]}"), name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in _PUBLIC and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
install()
