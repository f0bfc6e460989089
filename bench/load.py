"""Time of `quant.load`, against reading the same files and constructing the model.

    python -m bench.load -o bench/results/load_cpu.json [--layers 12]

Makes a random Llama-shaped checkpoint, quantizes it with `w8a16`, and measures in turns, with the
page cache dropped before each turn where the system lets us (else warm, which the result says):
loading, reading all shards once into fresh memory, and constructing the empty model. Also the import.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch


def make(folder: Path, layers: int) -> Path:
    """A quantized checkpoint of a random model with hidden size 2048."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fewbit.quant.pipeline import quantize

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, vocab_size=32000,
        num_attention_heads=16, num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "source")
    quantize(folder / "source", folder / "out", recipe="w8a16")
    return folder / "out"


def drop_cache() -> bool:
    """Forget cached file contents; False if this process may not."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def read_files(folder: Path) -> None:
    """All shards once."""
    for path in sorted(folder.glob("*.safetensors")):
        path.read_bytes()


def construct(folder: Path) -> None:
    """The empty model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def import_seconds(statement: str) -> float:
    """Seconds of one statement in a fresh interpreter."""
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    return float(subprocess.check_output([sys.executable, "-c", code], text=True))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", default="bench/results/load_cpu.json")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    from fewbit import quant

    rows = []
    with tempfile.TemporaryDirectory(prefix="fewbit-bench-") as folder:
        out = make(Path(folder), options.layers)
        n_bytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        quant.load(out)  # imports
        for _ in range(options.rounds):
            cold = drop_cache()
            load = timed(lambda: quant.load(out))
            drop_cache()
            read = timed(lambda: read_files(out))
            rows.append(
                {
                    "load": load,
                    "read": read,
                    "construct": timed(lambda: construct(out)),
                    "cold": cold,
                }
            )
    ratios = [row["load"] / (row["read"] + row["construct"]) for row in rows]
    result = {
        "command": f"python -m bench.load --layers {options.layers}",
        "megabytes": n_bytes / 1e6,
        "median_ratio_to_read_plus_construct": statistics.median(ratios),
        "import_quant_seconds": min(import_seconds("from fewbit import quant") for _ in range(5)),
        "help_seconds": min(
            timed(lambda: subprocess.check_output([Path(sys.executable).parent / "fewbit", "-h"]))
            for _ in range(5)
        ),
        "rows": rows,
    }
    Path(options.out).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
