"""Perplexity of each packaged recipe on the bundled model, over several calibration draws.

    python -m bench.quality -o bench/results/quality.json [--draws 5]

Protocol: 128 windows of 256 tokens of the bundled calibration text; evaluation on the bundled
evaluation text, 219 windows of 256 tokens, fp32 arithmetic on the stored weights. Recipes with a KV
policy are evaluated with the packed cache in the loop (16 tokens a step). The standard error is that of
the paired log ratio over windows; `spread` is the standard deviation over draws.

A case is a recipe and settings: `+kv.residual=0` keeps no token of the cache in 16 bits, `+nearest`
leaves out every pass, `+planted` starts from a model with outliers planted in its channels, of the
same function (`tests/planted.py`); its reference is the clean model.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from fewbit.quant.evaluate import evaluate
from fewbit.quant.pipeline import quantize
from fewbit.quant.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "quant" / "data" / "tiny-llama"
CASES = (
    "w8a16", "w4a16-rtn", "w4a16", "w3a16", "w8a8", "kv4", "kv4+kv.residual=0", "w8a8kv4",
    "w4a8kv4", "w4a8kv4+kv.residual=0", "w4a8kv4+planted", "w4a8kv4+nearest",
    "w4a8kv4+nearest+planted", "w4a8kv4-channel",
)  # fmt: skip
SAMPLES, LENGTH = 128, 256


def planted_model(folder: Path) -> Path:
    """The planted model, written once."""
    target = folder / "planted"
    if not target.exists():
        sys.path.insert(0, str(ROOT / "tests"))
        from planted import plant

        plant(target)
    return target


def settings_of(recipe: str, marks: list[str]) -> list[str]:
    """`--set` keys of a case."""
    found = [mark for mark in marks if "=" in mark]
    if "nearest" in marks:
        found += [f"pass.{use.name}.skip=true" for use in load_recipe(recipe).passes]
    return found


def one_draw(case: str, seed: int, folder: Path) -> dict[str, Any]:
    """Quantize with one seed and evaluate."""
    recipe, *marks = case.split("+")
    out = folder / f"{case}-{seed}"
    source = planted_model(folder) if "planted" in marks else SOURCE
    settings = settings_of(recipe, marks)
    quantize(
        source, out, recipe=recipe, settings=settings, samples=SAMPLES, length=LENGTH, seed=seed
    )
    decode = load_recipe(recipe).kv is not None
    found = evaluate(out, against=SOURCE, length=LENGTH, dtype=torch.float32, decode=decode)
    return {
        "seed": seed,
        "perplexity_ratio": found.perplexity_ratio,
        "log_ratio_se": found.log_ratio_se,
        "kl_mean": found.kl_mean,
        "top1_agreement": found.top1_agreement,
        "bits_per_weight": found.bits_per_weight,
    }


def measure(case: str, draws: int, folder: Path) -> dict[str, Any]:
    """All draws of one case; without a pass that looks at data there is only one."""
    recipe, *marks = case.split("+")
    calibrated = bool(load_recipe(recipe, settings_of(recipe, marks)).passes)
    rows = [one_draw(case, seed, folder) for seed in range(draws if calibrated else 1)]
    ratios = [row["perplexity_ratio"] for row in rows]
    return {
        "case": case,
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
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="fewbit-bench-") as folder:
        for case in options.cases:
            rows.append(measure(case, options.draws, Path(folder)))
            row = rows[-1]
            print(
                f"{case:24s} ratio {row['mean_perplexity_ratio']:.5f} ± {row['spread']:.5f} "
                f"(worst {row['worst']:.5f}, paired se {row['mean_log_ratio_se']:.5f}), "
                f"KL {row['mean_kl']:.5f}",
                flush=True,
            )
    result = {"command": f"python -m bench.quality --draws {options.draws}", "rows": rows}
    Path(options.out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
