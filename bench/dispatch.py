"""What choosing a kernel costs at every call, above the kernel itself, in microseconds.

    python -m bench.dispatch -o bench/results/dispatch_cpu.json

The kernel is one that returns a tensor that is there already, so that what is left is ours. Measured:
`Runner.linear` (choice and views), the whole `QuantLinear` (with the check that its parts are unchanged
and torch's module call), and the operator that compilers see; beside them `nn.Linear` of the smallest
size, whose time is torch's own cost of a call. Best of many turns; one thread.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fewbit.quant import dispatch, reference
from fewbit.quant.formats.int_group import FORMAT, IntGroupOptions
from fewbit.quant.linear import QuantLinear
from fewbit.quant.packed import PackedTensor, Term

_CALLS, _TURNS = 1000, 60
N, K = 16, 32


def best_microseconds(call: Callable[[], object]) -> float:
    """Of one call, the best turn."""
    found = float("inf")
    for _ in range(_TURNS):
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        found = min(found, (time.perf_counter() - start) / _CALLS)
    return found * 1e6


def layer() -> QuantLinear:
    """A packed layer [N, K] without a bias."""
    options = IntGroupOptions(4, 32)
    weight = torch.randn(N, K)
    scales = FORMAT.fit(weight, options)
    codes, _ = FORMAT.round(weight, scales, 0, options)
    term = Term("int_group", options, FORMAT.pack(codes, scales, options))
    return QuantLinear.from_packed(PackedTensor((N, K), (term,)), None, torch.float32)


def measure() -> dict[str, dict[str, float]]:
    """Microseconds by shape of x and by what is called."""
    ready = torch.zeros(1, N)
    free = replace(
        reference.KERNEL, name="free", launch=lambda x, layout: ready, seconds=lambda problem: 0.0
    )
    whole = dispatch.kernels
    dispatch.kernels = lambda: {"free": free, "reference": reference.KERNEL}  # type: ignore[assignment]
    try:
        held, dense = layer(), nn.Linear(N, K, bias=False)
        (runner,) = held.runners()
        found = {}
        with torch.inference_mode():
            kernel = best_microseconds(lambda: free.launch(ready, None))
            for shape in ((1, K), (1, 1, K)):
                x, small = torch.randn(*shape), torch.randn(*shape[:-1], N)
                found["x".join(map(str, shape))] = {
                    "runner": best_microseconds(lambda x=x: runner.linear(x)) - kernel,
                    "layer": best_microseconds(lambda x=x: held(x)) - kernel,
                    "operator": best_microseconds(
                        lambda x=x: torch.ops.fewbit.quant_linear(x, held.number, N)
                    )
                    - kernel,
                    "nn_linear": best_microseconds(lambda small=small: dense(small)),
                }
        return found
    finally:
        dispatch.kernels = whole


def main(arguments: list[str]) -> None:
    """Measure, print, and write with -o."""
    parser = argparse.ArgumentParser(description="cost of a dispatched call")
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {"command": "python -m bench.dispatch", "microseconds": measure()}
    text = json.dumps(found, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
