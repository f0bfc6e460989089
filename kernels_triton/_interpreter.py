"""Repairs of Triton's interpreter, so that kernels compute on a CPU what they compute on a GPU.

    loop bounds    `range(n)` asks a tensor of one element for an int, which numpy 2.4 refuses
    fp32 → bf16    is cut off in the interpreter; GPUs round to nearest even
    bf16 · bf16    multiplies the bits as if they were integers

`_triton` calls `mend` before any kernel exists; it changes Triton's classes in this process only.
Deliberately not here: inline assembly, which the interpreter does not run.
"""

from typing import Any

import numpy as np
import torch


def mend() -> None:
    """Replace the functions; a second call changes nothing."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_fewbit_mended"):
        _mend_bounds(interpreter)
        _mend_rounding(interpreter)
        _mend_products(interpreter)
        interpreter._fewbit_mended = True


def _mend_bounds(interpreter: Any) -> None:
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        place = scope[0].set_attr if scope else setattr  # with a scope, Triton restores it later
        place(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _mend_rounding(interpreter: Any) -> None:
    tl = interpreter.tl
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        bits = round_to_bfloat16(source.data)
        return interpreter.TensorHandle(bits, target.scalar)

    interpreter.InterpreterBuilder.cast_impl = rounded


def _mend_products(interpreter: Any) -> None:
    tl = interpreter.tl
    dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def product(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, widened(a), widened(b), *others)

    interpreter.InterpreterBuilder.create_dot = product


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits (uint16) of fp32 values rounded to nearest even."""
    rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
    bits: np.ndarray = rounded.view(torch.int16).numpy().view(np.uint16)
    return bits
