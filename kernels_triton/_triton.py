"""Triton, or a stand-in where it is not installed, so that importing a kernel never fails.

    from ._triton import jit, tl

`jit` and `tl` are Triton's own if there is one. Otherwise `tl` answers every attribute with itself and
`jit` leaves a function as it is: kernels can be described, refused and listed, but not launched.

`off_gpu` is the reason against every problem that Triton cannot run: another device, no Triton, a GPU
before capability 8.0. `interpreted` says whether kernels run in Triton's interpreter on the CPU, which
is decided by `TRITON_INTERPRET=1` when the kernels are imported; it is for tests.
"""

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from ..quant.kernel import AnyProblem, Reason
from . import _interpreter

AVAILABLE = find_spec("triton") is not None
_OLDEST = (8, 0)


class _Absent:
    """Answers everything that a kernel's module asks of Triton when it is imported."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "_Absent":
        return self

    def __getitem__(self, index: Any) -> "_Absent":
        return self


if AVAILABLE:
    import triton
    import triton.language as tl
    from triton import jit

    VERSION: str | None = triton.__version__
else:
    tl = _Absent()
    VERSION = None

    def jit(function: Any = None, *, do_not_specialize: Sequence[str] = ()) -> Any:
        """The function itself, or a decorator that leaves it as it is."""
        return (lambda decorated: decorated) if function is None else function


def interpreted() -> bool:
    """Do kernels run in Triton's interpreter?"""
    if not AVAILABLE:
        return False
    knobs = getattr(triton, "knobs", None)  # since Triton 3.4; the variable alone before
    return os.environ.get("TRITON_INTERPRET") == "1" if knobs is None else knobs.runtime.interpret


if interpreted():
    _interpreter.mend()


def off_gpu(problem: AnyProblem) -> Iterator[Reason]:
    """The reasons against this device, if Triton cannot run there."""
    if not AVAILABLE and problem.described is None:
        yield Reason("TOOLCHAIN", "needs Triton, which is not installed", "pip install triton")
    machine = problem.machine
    if problem.device != "cuda":
        told = f" ({machine})" if machine else ""
        yield Reason(
            "ARCH",
            f"runs on NVIDIA GPUs, got {problem.device}{told}",
            "use a kernel of that device",
        )
    elif machine is not None and machine.cc is not None and machine.cc < _OLDEST:
        yield Reason(
            "ARCH",
            f"needs compute capability 8.0 or newer, got {machine.cc[0]}.{machine.cc[1]}",
            "use a newer GPU",
        )
