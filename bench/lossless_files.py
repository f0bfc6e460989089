"""Whole lossless runs on one core, beside copying the file: wall time and memory, and what comes back.

    python -m bench.lossless_files -o bench/results/lossless_files.json [--gigabytes 1] [--cpu 1]

Makes a random bf16 checkpoint (log-normal scales of the rows; deleted afterwards). Each line is one
process pinned to one core, medians of three, in turns with the copy:

    copy        read, write, fsync
    lossless    fewbit quantize --recipe lossless
    verify      fewbit inspect --verify
    dense       fewbit export --to dense; the files are compared with the originals
    dfloat11    fewbit export --to dfloat11 of the original

Peak memory is given above that of the interpreter with torch and fewbit imported. Mapped files count as
memory of a process that reads through them, so the peaks of verify and dense are bounds.
"""

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.decode import machine

ROUNDS = 3
HIDDEN, INNER, VOCABULARY = 4096, 11008, 32000
_LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
_CHILD = """
import sys, time, torch
torch.set_num_threads(1)
from fewbit.quant.cli import main
from fewbit.quant.pipeline import quantize
from fewbit.quant.export_command import export
from fewbit.quant.preflight import peak_resident_bytes
before, started = peak_resident_bytes(), time.perf_counter()
code = main(sys.argv[1:])
print(time.perf_counter() - started, peak_resident_bytes() - before)
sys.exit(code)
"""


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """One file of Llama-shaped weights; its bytes."""
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> torch.Tensor:
        scale = torch.exp(torch.randn(rows, 1, generator=generator) * 0.4) * 0.02
        return (torch.randn(rows, columns, generator=generator) * scale).bfloat16()

    tensors = {"model.embed_tokens.weight": weight(VOCABULARY, HIDDEN)}
    n_bytes, layer = 2 * VOCABULARY * HIDDEN, 0
    while n_bytes < 0.9e9 * gigabytes:
        for name, shape in _LAYER.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = weight(*shape)
            n_bytes += 2 * shape[0] * shape[1]
        layer += 1
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
              "num_hidden_layers": layer}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return n_bytes


def copy(source: Path, out: Path) -> float:
    """Seconds to copy the file and make it durable."""
    os.sync()  # the disk must not be busy with what went before
    started = time.perf_counter()
    shutil.copyfile(source, out)
    with open(out, "rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - started


def run(words: list[str], cpu: int) -> tuple[float, int]:
    """Seconds of the command without imports, and its peak bytes above them."""
    command = [sys.executable, "-c", _CHILD, *words]
    if shutil.which("taskset"):
        command = ["taskset", "-c", str(cpu), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    os.sync()
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    seconds, peak = result.stdout.split()[-2:]
    return float(seconds), int(peak)


def measure(work: Path, gigabytes: float, cpu: int) -> dict[str, object]:
    """All lines of the table."""
    source, coded = work / "source", work / "coded"
    n_bytes = make_checkpoint(source, gigabytes)
    commands = {
        "lossless": ["quantize", str(source), "-o", str(coded), "--recipe", "lossless", "--quiet"],
        "verify": ["inspect", str(coded), "--verify", "--json", str(work / "facts.json")],
        "dense": ["export", str(coded), "-o", str(work / "dense"), "--to", "dense", "--quiet"],
        "dfloat11": [
            "export",
            str(source),
            "-o",
            str(work / "df11"),
            "--to",
            "dfloat11",
            "--quiet",
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("copy", *commands)}
    peaks: dict[str, int] = {}
    for _ in range(ROUNDS):
        seconds["copy"].append(copy(source / "model.safetensors", work / "copy"))
        for name, words in commands.items():
            took, peak = run(words, cpu)
            seconds[name].append(took)
            peaks[name] = max(peak, peaks.get(name, 0))
        same = all(filecmp.cmp(source / n, work / "dense" / n, shallow=False)
                   for n in ("model.safetensors", "config.json"))  # fmt: skip
        assert same, "the export differs from the original"
        stored = json.loads((work / "facts.json").read_text())["bytes"]
        df11 = sum(path.stat().st_size for path in (work / "df11").glob("*.safetensors"))
        for name in ("coded", "dense", "df11"):
            shutil.rmtree(work / name)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    size = n_bytes / 1e9
    return {
        "gigabytes": size,
        "seconds": medians,
        "seconds_best": {name: min(values) for name, values in seconds.items()},
        "seconds_above_copy_per_gb": (medians["lossless"] - medians["copy"]) / size,
        "peak_mib_above_interpreter": {name: peak / 2**20 for name, peak in peaks.items()},
        "share": {"lossless": stored / n_bytes, "dfloat11": df11 / n_bytes},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", default="bench/results/lossless_files.json")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--cpu", type=int, default=os.cpu_count() - 1 if os.cpu_count() else 0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fewbit-bench-") as folder:
        found = measure(Path(folder), options.gigabytes, options.cpu)
    result = {
        "command": f"python -m bench.lossless_files --gigabytes {options.gigabytes}",
        "machine": machine(),
        **found,
    }
    Path(options.out).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
