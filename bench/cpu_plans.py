"""Default plans of this CPU beside a bf16 linear layer: no plan should be more than a tenth slower.

    python -m bench.cpu_plans -o bench/results/cpu_plans.json

For the formats of the recipes, N = K = 4096, M in 1, 4, 16, 32, 128: the layer that `quant.load` would
run, and `nn.Linear` in bf16, in turns; weights rotate over four copies, so that none stays in a
second-level cache. Ratios of the best turns. One thread.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

from fewbit.quant.format import find_format
from fewbit.quant.kernel_report import Layer, recipe_layers
from fewbit.quant.linear import QuantLinear
from fewbit.quant.packed import PackedTensor, Term

SIZE, ROWS, COPIES, TURNS = 4096, (1, 4, 16, 32, 128), 4, 12


def packed_layer(layer: Layer) -> QuantLinear:
    """A random weight in the layer's format."""
    form, options = find_format(layer.weights.format), layer.weights.options
    weight = torch.randn(SIZE, SIZE) * 0.02
    scales = form.fit(weight, options)
    codes, _ = form.round(weight, scales, 0, options)
    term = Term(form.name, options, form.pack(codes, scales, options))
    packed = PackedTensor((SIZE, SIZE), (term,))
    return QuantLinear.from_packed(packed, None, torch.bfloat16, layer.activation)


def measure(layer: Layer) -> dict[str, dict[str, float | str]]:
    """By M: kernel, milliseconds of ours and of bf16, and the ratio."""
    ours = [packed_layer(layer) for _ in range(COPIES)]
    dense = [torch.randn(SIZE, SIZE).to(torch.bfloat16) for _ in range(COPIES)]
    found: dict[str, dict[str, float | str]] = {}
    with torch.inference_mode():
        for m in ROWS:
            x = torch.randn(m, SIZE).to(torch.bfloat16)
            for held in ours:
                held(x)
            best = [float("inf"), float("inf")]
            for turn in range(TURNS):
                for which in (0, 1):
                    start = time.perf_counter()
                    if which == 0:
                        ours[turn % COPIES](x)
                    else:
                        functional.linear(x, dense[turn % COPIES])
                    best[which] = min(best[which], time.perf_counter() - start)
            chosen = ours[0].runners()[0].explain(m, torch.bfloat16, "cpu").chosen
            found[str(m)] = {
                "kernel": chosen,
                "ms": best[0] * 1e3,
                "bf16_ms": best[1] * 1e3,
                "ratio": best[0] / best[1],
            }
    return found


def main(arguments: list[str]) -> None:
    """Measure, print, and write with -o."""
    parser = argparse.ArgumentParser(description="default CPU plans beside bf16")
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = {
        f"{layer} {layer.activation or 'bfloat16'}": measure(layer) for layer in recipe_layers()
    }
    worst = max(float(row["ratio"]) for rows in table.values() for row in rows.values())
    text = json.dumps(
        {"command": "python -m bench.cpu_plans", "worst": worst, "rows": table}, indent=2
    )
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
