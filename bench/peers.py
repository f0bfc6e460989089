"""GPTQ W4A16 g128 of the bundled model, ours beside llm-compressor, in the same run.

Ours twice: the same algorithm as the peer's (GPTQ alone: `--set 'pass=[{name="gptq", sweeps=0}]'`), and
the recipe `w4a16` as it is, which also searches ranges, refines codes, and runs the original model
beside the quantized one to repay the drift of inputs.

    python -m venv peers && peers/bin/pip install llmcompressor
    python -m bench.peers --python peers/bin/python -o bench/results/peers_gptq_cpu.json

Both quantize the bundled model with 128 windows of 256 tokens of the bundled text and are timed
around the quantization itself (imports and tokenising excluded; ours writes and verifies its
checkpoint inside that time, the peer's is not saved), in turns. Both results are then
evaluated by the same code: dequantized weights, fp32, 219 windows of 256 tokens.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "quant" / "data"
SAMPLES, LENGTH = 128, 256

_OURS = f"""
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import transformers.models.llama.modeling_llama, transformers.conversion_mapping
from fewbit.quant.pipeline import quantize
from fewbit.quant import blockwise
from fewbit.quant.format import formats
from fewbit.calibrate.protocol import passes
from fewbit.calibrate.data import load_calibration
formats(), passes()
out, seed, settings = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
tokenizer = AutoTokenizer.from_pretrained({str(DATA / "tiny-llama")!r})
load_calibration(None, tokenizer, {SAMPLES}, {LENGTH}, seed)
started = time.perf_counter()
load_calibration(None, tokenizer, {SAMPLES}, {LENGTH}, seed)
tokenising = time.perf_counter() - started
started = time.perf_counter()
quantize({str(DATA / "tiny-llama")!r}, out, recipe="w4a16", samples={SAMPLES}, length={LENGTH},
         seed=seed, settings=settings)
print(json.dumps({{"seconds": time.perf_counter() - started - tokenising}}))
"""

_PEER = f"""
import json, sys, time
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
out, seed = sys.argv[1], int(sys.argv[2])
source = {str(DATA / "tiny-llama")!r}
tokenizer = AutoTokenizer.from_pretrained(source)
text = open({str(DATA / "calib.txt")!r}, encoding="utf-8").read()
ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
generator = torch.Generator().manual_seed(seed)
starts = torch.randint(0, len(ids) - {LENGTH}, ({SAMPLES},), generator=generator)
rows = [ids[s : s + {LENGTH}].tolist() for s in starts.tolist()]
data = Dataset.from_dict({{"input_ids": rows, "attention_mask": [[1] * {LENGTH}] * {SAMPLES}}})
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
started = time.perf_counter()
oneshot(model=model, dataset=data, recipe=recipe, max_seq_length={LENGTH},
        num_calibration_samples={SAMPLES})
seconds = time.perf_counter() - started
dense = {{}}
for name, module in model.named_modules():
    if hasattr(module, "weight_scale"):
        group = module.weight.shape[1] // module.weight_scale.shape[1]
        scale = module.weight_scale.float().repeat_interleave(group, dim=1)
        dense[name + ".weight"] = (module.weight.float() / scale).round().clamp(-8, 7) * scale
torch.save(dense, out)
print(json.dumps({{"seconds": seconds}}))
"""


GPTQ_ALONE = 'pass=[{name="gptq", sweeps=0}]'


def run(python: str, code: str, out: str, seed: int, *settings: str) -> float:
    """Seconds that the quantization itself took, from the last line of the process's output."""
    done = subprocess.run(
        [python, "-c", code, out, str(seed), *settings], check=True, capture_output=True, text=True
    )
    return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds"])


def peer_ratio(path: str) -> float:
    """Perplexity ratio of the peer's dequantized weights, by our evaluation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fewbit.quant.evaluate import evaluate_model, evaluation_windows, summarize

    source = DATA / "tiny-llama"
    tokenizer = AutoTokenizer.from_pretrained(source)
    models = [AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32) for _ in range(2)]
    models[1].load_state_dict(torch.load(path, weights_only=True), strict=False)
    windows = evaluation_windows(models[0], tokenizer, None, LENGTH, None)
    measured = evaluate_model(models[1], windows, models[0])
    return float(summarize(measured, 0.0, 0.0, 0).perplexity_ratio or 0.0)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="python of the peer's environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--out", default="bench/results/peers_gptq_cpu.json")
    options = parser.parse_args()
    import torch

    from fewbit.quant.evaluate import evaluate

    kinds: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "perplexity_ratios": []}
        for name in ("fewbit_gptq_alone", "fewbit_w4a16", "llmcompressor_gptq")
    }

    def note(name: str, seconds: float, ratio: float) -> None:
        kinds[name]["seconds"].append(seconds)
        kinds[name]["perplexity_ratios"].append(ratio)
        print(f"{name:20s} {seconds:6.2f} s  ratio {ratio:.5f}", flush=True)

    with tempfile.TemporaryDirectory(prefix="fewbit-peers-") as folder:
        for seed in range(options.rounds):
            for name, settings in (("fewbit_gptq_alone", (GPTQ_ALONE,)), ("fewbit_w4a16", ())):
                out = str(Path(folder) / f"{name}{seed}")
                seconds = run(sys.executable, _OURS, out, seed, *settings)
                found = evaluate(
                    out, against=DATA / "tiny-llama", length=LENGTH, dtype=torch.float32
                )
                note(name, seconds, found.perplexity_ratio or 0.0)
            out = str(Path(folder) / f"peer{seed}.pt")
            seconds = run(options.python, _PEER, out, seed)
            note("llmcompressor_gptq", seconds, peer_ratio(out))
    peer = statistics.median(kinds["llmcompressor_gptq"]["seconds"])
    result = {
        "command": "python -m bench.peers --python PEER_PYTHON",
        "work": f"bundled model, W4A16 g128 GPTQ, {SAMPLES} x {LENGTH} tokens",
        "cores": os.cpu_count(),
        "time_ratio_of_medians": {
            name: statistics.median(kind["seconds"]) / peer for name, kind in kinds.items()
        },
        **kinds,
    }
    Path(options.out).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
