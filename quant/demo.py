"""The main job on the bundled model: quantize, evaluate original and result, generate from both.

Everything that is printed is computed in this run, on the bundled text.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path

PROMPT = "The people of the United States"
LENGTH = 256
NEW_TOKENS = 40


def demo(out: str | None, recipe: str) -> int:
    """Print one table and two continuations; `out` keeps the quantized checkpoint."""
    with as_file(files(__package__) / "data" / "tiny-llama") as source, _folder(out) as target:
        return _run(source, target, recipe)


@contextmanager
def _folder(out: str | None) -> Iterator[Path]:
    if out is not None:
        yield Path(out)
        return
    temporary = Path(tempfile.mkdtemp(prefix="fewbit-demo-"))
    try:
        yield temporary / "quantized"
    finally:
        shutil.rmtree(temporary)


def _run(source: Path, target: Path, recipe: str) -> int:
    from ..export.report import summary_text
    from .evaluate import decode_speed, evaluate, load_any
    from .generate import generate
    from .load import load_tokenizer
    from .pipeline import quantize
    from .progress import ProgressBar

    with ProgressBar(quiet=False) as bar:
        report = quantize(source, target, recipe=recipe, length=LENGTH, progress=bar.show)
    print(summary_text(report))
    rows = []
    for label, path in (("original", source), (recipe, target)):
        result = evaluate(path, against=source, length=LENGTH, decode=True)
        tokenizer = load_tokenizer(path)
        rows.append((label, result, decode_speed(load_any(path), tokenizer)))
    print(f"\n{'':12s}{'bits/weight':>12s}{'bytes':>12s}{'perplexity':>12s}{'ratio':>9s}"
          f"{'KL':>10s}{'top-1':>8s}{'tokens/s':>10s}")  # fmt: skip
    for label, result, speed in rows:
        print(f"{label:12s}{result.bits_per_weight:12.3f}{result.bytes:12,d}"
              f"{result.perplexity:12.3f}{result.perplexity_ratio:9.4f}{result.kl_mean:10.5f}"
              f"{result.top1_agreement:8.3f}{speed:10.1f}")  # fmt: skip
    for label, path in (("original", source), (recipe, target)):
        text = generate(path, PROMPT, max_new_tokens=NEW_TOKENS)
        print(f"\n[{label}] {PROMPT}{text}")
    return 0
