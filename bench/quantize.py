"""Data-free int4 of a large bf16 checkpoint: input MB/s, peak resident memory, against plain copying.

    python -m bench.quantize -o bench/results/quantize_cpu.json [--gigabytes 4]

Makes a random Llama-shaped checkpoint (deleted afterwards), quantizes it with `w4a16-rtn` in a
process of its own, and reads the same bytes once for the physical limit. Two sizes show that memory
does not grow with the number of layers.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INNER, VOCABULARY = 2048, 5632, 32000
_LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def make_checkpoint(folder: Path, n_bytes: int) -> int:
    """Random shards of about 1 GB; returns the number of layers."""
    folder.mkdir(parents=True)
    per_layer = 2 * sum(rows * columns for rows, columns in _LAYER.values())
    n_layers = max(1, (n_bytes - 4 * HIDDEN * VOCABULARY) // per_layer)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    index = 0

    def flush() -> None:
        nonlocal index, shard
        name = f"model-{index:05d}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard, index = {}, index + 1

    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shard[name] = torch.randn(VOCABULARY, HIDDEN).bfloat16()
    for layer in range(n_layers):
        for name, shape in _LAYER.items():
            shard[f"model.layers.{layer}.{name}.weight"] = (torch.randn(shape) * 0.02).bfloat16()
        if (layer + 1) * per_layer // (1 << 30) > index:
            flush()
    flush()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
              "num_hidden_layers": n_layers, "intermediate_size": INNER}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return n_layers


def read_once(folder: Path) -> float:
    """Seconds to read all shards into a reused buffer: the floor of any converter."""
    buffer = bytearray(32 << 20)
    started = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def run_quantize(source: Path, out: Path, recipe: str) -> tuple[float, int]:
    """Wall seconds of the whole process and its peak resident bytes."""
    code = (
        "import sys\n"
        "from fewbit.quant.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "from fewbit.quant.preflight import peak_resident_bytes\n"
        "print(peak_resident_bytes())\n"
        "sys.exit(code)\n"
    )
    command = [sys.executable, "-c", code, "quantize", str(source), "-o", str(out),
               "--recipe", recipe, "--quiet"]  # fmt: skip
    started = time.perf_counter()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return time.perf_counter() - started, int(output.split()[-1])


def measure(gigabytes: float, recipe: str, work: Path) -> dict[str, float]:
    """One size: megabytes per second of input, peak memory, and the ratio to reading once."""
    source, out = work / "source", work / "out"
    n_layers = make_checkpoint(source, int(gigabytes * 1e9))
    n_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    os.sync()  # the disk must not still be writing the source
    floor = read_once(source)
    seconds, peak = run_quantize(source, out, recipe)
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shutil.rmtree(source)
    shutil.rmtree(out)
    return {
        "gigabytes": n_bytes / 1e9,
        "layers": n_layers,
        "seconds": seconds,
        "input_mb_per_s": n_bytes / 1e6 / seconds,
        "read_once_mb_per_s": n_bytes / 1e6 / floor,
        "times_read_once": seconds / floor,
        "peak_resident_gb": peak / 1e9,
        "output_gigabytes": written / 1e9,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", default="bench/results/quantize_cpu.json")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--recipe", default="w4a16-rtn")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fewbit-bench-") as folder:
        rows = [measure(size, options.recipe, Path(folder)) for size in options.gigabytes]
    result = {
        "command": f"python -m bench.quantize --gigabytes {' '.join(map(str, options.gigabytes))}",
        "recipe": options.recipe,
        "cores": os.cpu_count(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "rows": rows,
    }
    Path(options.out).write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        print({key: round(value, 3) for key, value in row.items()})


if __name__ == "__main__":
    main()
