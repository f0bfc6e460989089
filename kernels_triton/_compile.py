"""Compiles Triton kernels for any GPU on a machine that has none, and reads what came out.

    Variant  one Triton function with everything that its machine code depends on
      -> Triton's front end, LLVM and ptxas for `sm_XY`
      -> Compiled: registers, stack and shared memory of the cubin, and a digest of its instructions

A stack means spilled registers: nothing here indexes local arrays. A body that is nothing but a trap
is what one version of Triton makes of code that it cannot lower; it is an error here.

Results are remembered for the process. Triton keeps its own cache of cubins on disk.
Deliberately not here: launching, and the choice of what to compile.
"""

import hashlib
import inspect
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..quant.errors import NoKernelError
from ..quant.kernel import Compiled
from . import _triton

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE
)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_MOST_OPCODES = 12


def pointer(dtype: torch.dtype) -> str:
    """Triton's name of a pointer to `dtype`: `*fp16`."""
    return f"*{_TYPES[dtype]}"


@dataclass(frozen=True)
class Variant:
    """One Triton function as it is launched.

    function: decorated with `jit`. types: of each argument that is not a constexpr, in order, such
    as "*fp16" or "i32". constants: value of each constexpr. divisible: arguments that are known to
    be multiples of 16 (the launch must guarantee it: Triton looks at each value). warps, stages,
    fp_fusion: as given to the launch (may a product and a sum round once?). max_registers: of a
    thread, the launch's `maxnreg`; None leaves it to ptxas, which may spill a few to fit more blocks.
    """

    function: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...]
    warps: int
    stages: int
    fp_fusion: bool = True
    max_registers: int | None = None


def compile_variant(variant: Variant, cc: tuple[int, int]) -> Compiled:
    """What ptxas made of it for compute capability `cc`. NoKernelError if there is no Triton, if the
    kernels run in the interpreter, or if the compiler fails; its first line is in the message."""
    constants = tuple(sorted(variant.constants.items()))
    types = tuple(variant.types.items())
    options = (
        ("num_warps", variant.warps),
        ("num_stages", variant.stages),
        ("enable_fp_fusion", variant.fp_fusion),
        ("maxnreg", variant.max_registers),
    )
    return _compiled((variant.function, types, constants, variant.divisible, options), cc)


@cache
def _compiled(key: tuple[Any, ...], cc: tuple[int, int]) -> Compiled:
    function, types, constants, divisible, options = key
    if not _triton.AVAILABLE or _triton.interpreted():
        state = "run in its interpreter here" if _triton.AVAILABLE else "need it"
        raise NoKernelError(
            f"{function.__name__}: cannot be compiled: Triton kernels {state}; install triton and "
            f"unset TRITON_INTERPRET"
        )
    binary = _build(function, dict(types), dict(constants), divisible, dict(options), cc)
    registers, stack, static, opcodes = _read_cubin(binary.asm["cubin"])
    if set(opcodes) <= {"NOP", "LDC", "BPT", "BRA", "EXIT"}:
        raise NoKernelError(
            f"{function.__name__}: Triton {_triton.VERSION} makes only a trap of it for "
            f"sm_{cc[0]}{cc[1]} with {dict(constants)}; leave this config out"
        )
    text = repr(sorted(opcodes.items()))
    return Compiled(
        registers=registers,
        stack_bytes=stack,
        smem_bytes=binary.metadata.shared + static,
        threads=32 * dict(options)["num_warps"],
        digest=hashlib.sha256(text.encode()).hexdigest()[:16],
        opcodes=tuple(opcodes.most_common(_MOST_OPCODES)),
    )


def _build(
    function: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    divisible: tuple[str, ...],
    options: dict[str, Any],
    cc: tuple[int, int],
) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_source
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import PTXASError

    names = function.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    try:
        return compile_source(
            source,
            target=GPUTarget("cuda", 10 * cc[0] + cc[1], 32),
            options=options,
        )
    except (CompilationError, PTXASError, RuntimeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise NoKernelError(
            f"{function.__name__}: Triton {_triton.VERSION} cannot compile it for "
            f"sm_{cc[0]}{cc[1]} with {constants}: {line}"
        ) from error


def _read_cubin(cubin: bytes) -> tuple[int, int, int, "Counter[str]"]:
    """(registers, stack bytes, static shared bytes, how often each opcode occurs)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        listing = _tool("nvdisasm", "-c", str(path))
    found = _USAGE.search(usage)
    if found is None:
        raise NoKernelError(
            f"cuobjdump says nothing of the registers of a kernel: {usage[-200:]!r}"
        )
    registers, stack, static, local = map(int, found.groups())
    opcodes = Counter(item.partition(".")[0] for item in _INSTRUCTION.findall(listing))
    return registers, stack + local, static, opcodes


def _tool(name: str, *arguments: str) -> str:
    """Output of a program that Triton's package brings."""
    path = Path(sys.modules["triton"].__file__ or "").parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def source_hash(*modules: ModuleType | Callable[..., Any]) -> str:
    """Hash of the text of modules that a kernel's machine code depends on."""
    texts = [inspect.getsource(module) for module in modules]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
