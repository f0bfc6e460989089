"""Perplexity of each packaged recipe on the bundled model, over several calibration draws.

    python -m bench.quality -o bench/results/quality.json [--draws 5]

Protocol: 128 windows of 256 tokens of the bundled calibration text; evaluation on the bundled
evaluation text, 219 windows of 256 tokens, fp32 arithmetic on the stored weights. The standard error is
that of the paired log ratio over windows; `spread` is the standard deviation over draws.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from fewbit.quant.evaluate import evaluate
from fewbit.quant.pipeline import quantize
from fewbit.quant.recipe import load_recipe

SOURCE = Path(__file__).resolve().parent.parent / "quant" / "data" / "tiny-llama"
RECIPES = ("w8a16", "w4a16-rtn", "w4a16", "w3a16")
SAMPLES, LENGTH = 128, 256


def one_draw(recipe: str, seed: int, folder: Path) -> dict[str, Any]:
    """Quantize with one seed and evaluate."""
    out = folder / f"{recipe}-{seed}"
    quantize(SOURCE, out, recipe=recipe, samples=SAMPLES, length=LENGTH, seed=seed)
    found = evaluate(out, against=SOURCE, length=LENGTH, dtype=torch.float32)
    return {
        "seed": seed,
        "perplexity_ratio": found.perplexity_ratio,
        "log_ratio_se": found.log_ratio_se,
        "kl_mean": found.kl_mean,
        "top1_agreement": found.top1_agreement,
        "bits_per_weight": found.bits_per_weight,
    }


def measure(recipe: str, draws: int, folder: Path) -> dict[str, Any]:
    """All draws of one recipe; a data-free recipe has only one."""
    calibrated = any(use.name == "gptq" for use in load_recipe(recipe).passes)
    rows = [one_draw(recipe, seed, folder) for seed in range(draws if calibrated else 1)]
    ratios = [row["perplexity_ratio"] for row in rows]
    return {
        "recipe": recipe,
        "mean_perplexity_ratio": statistics.mean(ratios),
        "spread": statistics.stdev(ratios) if len(ratios) > 1 else 0.0,
        "worst": max(ratios),
        "mean_log_ratio_se": statistics.mean(row["log_ratio_se"] for row in rows),
        "mean_kl": statistics.mean(row["kl_mean"] for row in rows),
        "draws": rows,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", default="bench/results/quality.json")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="fewbit-bench-") as folder:
        for recipe in options.recipes:
            rows.append(measure(recipe, options.draws, Path(folder)))
            row = rows[-1]
            print(
                f"{recipe:10s} ratio {row['mean_perplexity_ratio']:.5f} ± {row['spread']:.5f} "
                f"(worst {row['worst']:.5f}, paired se {row['mean_log_ratio_se']:.5f}), "
                f"KL {row['mean_kl']:.5f}",
                flush=True,
            )
    result = {"command": f"python -m bench.quality --draws {options.draws}", "rows": rows}
    Path(options.out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
