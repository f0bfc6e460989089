"""Damaged inputs to Python's callers of dfloat11.c and kv_stream.c; run by test_sanitized_library.py.

    python fuzz_library.py LIBRARY ROUNDS SEED [overrun]

LIBRARY was made with sanitizers, whose run-time library is loaded first. What is wrong must be refused
with an error of fewbit's own; whatever is not seen must stay within the buffers. Prints how many inputs
were refused and how many went through. `overrun` passes a wrong size on purpose: it must not survive.
"""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fewbit.quant.native import compiler

found = ctypes.CDLL(sys.argv[1])
compiler._found = lambda: (found, None)  # type: ignore[assignment]

from fewbit.export.dfloat11 import decode_range, encode_unit, open_unit  # noqa: E402
from fewbit.export.dfloat11_code import make_code  # noqa: E402
from fewbit.export.dfloat11_native import native  # noqa: E402
from fewbit.export.dfloat11_numpy import Slice, Target  # noqa: E402
from fewbit.quant.errors import FewbitError  # noqa: E402
from fewbit.quant.kv_stream_predict import ONE, Predictor, from_runs, to_runs  # noqa: E402

engine = native()
rng = np.random.default_rng(int(sys.argv[3]))


def weights_of(n: int, scale: float) -> np.ndarray:
    values = rng.normal(0, scale, n).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def damaged(array: np.ndarray) -> np.ndarray:
    """A copy with wrong bytes, or one that is shorter or longer."""
    how = rng.integers(8)
    if how == 0:
        return array[: rng.integers(len(array) + 1)].copy()
    if how == 1:
        return np.concatenate([array, array[: rng.integers(1, 9)]])
    array = array.copy()
    flat = array.reshape(-1).view(np.uint8)
    at = rng.integers(len(flat), size=rng.integers(1, 4))
    flat[at] = rng.integers(256, size=len(at))
    return array


# --- dfloat11.c -----------------------------------------------------------------------------------

UNITS = [encode_unit([weights_of(n, scale)], engine) for n, scale in ((90, 4), (70_000, 0.02))]


def unit_of_a_file() -> None:
    parts = dict(UNITS[rng.integers(2)])
    for name in rng.choice(sorted(parts), rng.integers(1, 3)):
        if parts[name].size:
            parts[name] = damaged(parts[name])
    stream = open_unit(parts, "u")
    decode_range(stream, 0, len(stream.sign_mantissa), "u", engine)


def stream_of_a_caller() -> None:
    """Behind the checks of `open_unit`: what the engine is handed."""
    stream = open_unit(UNITS[rng.integers(2)], "u")
    name = str(rng.choice(["encoded", "gaps", "positions", "sign_mantissa"]))
    n_blocks = len(stream.positions) - 1
    out = np.empty(int(stream.positions[-1]) + rng.integers(-1, 2), np.uint16)
    end = n_blocks + int(rng.integers(10) == 0)
    engine.decode(replace(stream, **{name: damaged(getattr(stream, name))}), 0, end, out)


def weights_that_change() -> None:
    """Between the reading that counts and the one that codes."""
    weights = weights_of(3_000, 2.0)
    code = make_code(engine.count(weights))
    n_bits = int(code.length[weights >> 7 & 255].sum(dtype=np.int64))
    target = Target(
        np.zeros(n_bits // 64 + 1, ">u8"), np.zeros((n_bits // 32768 + 1) * 512, np.uint8),
        np.zeros(n_bits // 32768 + 1, np.uint32),
    )  # fmt: skip
    sign_mantissa = np.empty(3_000 - int(rng.integers(8) == 0), np.uint8)
    engine.encode(Slice(damaged(weights), 0, 0, sign_mantissa), code, target)
    used = np.flatnonzero(code.length)
    longest = used[np.argmax(code.length[used])]
    weights[: rng.integers(3_000)] = longest << 7
    engine.encode(Slice(weights, 0, 0, sign_mantissa), code, replace(target))


# --- kv_stream.c ----------------------------------------------------------------------------------


def runs() -> None:
    shape, bins = (2, 5, int(rng.integers(1, 600))), int(rng.choice([12, 16, 32]))
    cuts = rng.integers(shape[2] + 1, size=2)
    edges = np.array([0, *sorted(cuts), shape[2]], np.int64)
    order = rng.permutation(shape[2]).astype(np.uint32)
    facts = [rng.integers(-ONE, ONE + 1, shape[2]).astype(np.int16) for _ in range(2)]
    symbols = rng.integers(256, size=shape).astype(np.uint8)  # all bytes, codes or not
    which = rng.integers(6)
    if which < 2:
        facts[which] = damaged(facts[which])
    edges = damaged(edges) if which == 2 else edges
    order = damaged(order) if which == 3 else order
    predictor = Predictor(*facts)
    if rng.integers(2):
        to_runs(symbols, predictor, order, edges, bins)
    else:
        flat = symbols.reshape(-1)
        flat = damaged(flat) if which == 4 else flat
        from_runs(flat, shape, predictor, order, edges, bins)


def overrun() -> None:
    counts, weights = np.zeros(256, np.int64), np.zeros(100_000, np.uint16)
    found.fewbit_df11_count(
        ctypes.c_void_p(weights.ctypes.data), ctypes.c_int64(weights.size + 8),
        ctypes.c_void_p(counts.ctypes.data),
    )  # fmt: skip


def main(cases: tuple[Callable[[], None], ...], rounds: int) -> None:
    for case in cases:
        refused = 0
        for _ in range(rounds):
            try:
                case()
            except FewbitError:
                refused += 1
        print(case.__name__, "refused", refused, "passed", rounds - refused, flush=True)


if sys.argv[4:] == ["overrun"]:
    overrun()
else:
    main((unit_of_a_file, stream_of_a_caller, weights_that_change, runs), int(sys.argv[2]))
