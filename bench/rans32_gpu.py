"""How fast a GPU decodes `rans32`, in bytes of output a second, beside a copy of the same size.

    python -m bench.rans32_gpu [-o rans32.json]

Weights are normal numbers: 2.6 bits an exponent, as trained ones. Each case is verified against the
CPU's bytes first, then timed in CUDA graphs that take turns with a device-to-device copy of the output.
`block` decodes the seven matrices of a Llama 8B block, a launch each, as a model that stays coded does.
Aims: 0.8e12 B/s on an H200, 0.75e12 on an H100. Not yet run on a GPU.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.cuda_timing import Replay, kernel_errors, measure, missing, needs_text, told
from fewbit.kernels_triton.decode_rans32 import Streams, decode, upload
from fewbit.quant.codecs import rans32
from fewbit.quant.codecs.coded import head_of
from fewbit.quant.codecs.planes import kind_of

Row = dict[str, Any]
_LLAMA_8B = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096),
             (4096, 14336))  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Matrices that are decoded one after the other. coded: planes, as of a `Head`."""

    name: str
    dtype: torch.dtype
    coded: tuple[bool, ...]
    shapes: tuple[tuple[int, int], ...]


CASES = (
    Case("bf16 tiles", torch.bfloat16, (True, False), ((14336, 4096),)),
    Case("bf16 flat", torch.bfloat16, (True, False), ((14337, 4097),)),
    Case("block", torch.bfloat16, (True, False), _LLAMA_8B),
    Case("bf16 small", torch.bfloat16, (True, False), ((1024, 4096),)),
    Case("fp8", torch.float8_e4m3fn, (True,), ((14336, 4096),)),
    Case("fp16", torch.float16, (True, False), ((14336, 4096),)),
    Case("fp32", torch.float32, (True, False, False, False), ((7168, 4096),)),
)


def coded_weight(
    shape: tuple[int, int], dtype: torch.dtype, coded: tuple[bool, ...], device: str
) -> tuple[torch.Tensor, Streams]:
    """(a random weight on the CPU, its streams on `device`)."""
    generator = torch.Generator().manual_seed(shape[0])
    weight = (0.02 * torch.randn(shape, generator=generator)).to(dtype)
    head, kind = head_of(dtype, shape, coded), kind_of(dtype)
    layout = head.layout(0, head.n_chunks)
    data = weight.view(torch.uint8).reshape(-1).numpy()
    counts = rans32.count(data, kind, layout)
    freq = np.zeros((kind.n_planes, 256), np.uint16)
    for plane in np.flatnonzero(coded):
        freq[plane] = rans32.normalize(counts[plane])
    return weight, upload(rans32.encode(data, kind, layout, freq), kind, layout, freq, device)


def rows(seconds: float) -> Iterator[Row]:
    """One row for each case that fits into `seconds`, then which did not."""
    deadline, left_out = time.monotonic() + seconds, []
    for case in CASES:
        if time.monotonic() >= deadline:
            left_out.append(case.name)
            continue
        row: Row = {"rans32": case.name, "shapes": str(case.shapes)}
        try:
            yield row | _timed(case)
        except kernel_errors() as error:
            yield row | {"failed": True, "why": told(error)}
    if left_out:
        yield {"skipped": left_out, "why": "time"}


def _timed(case: Case) -> Row:
    pairs = [coded_weight(shape, case.dtype, case.coded, "cuda") for shape in case.shapes]
    outs = [torch.empty_like(weight, device="cuda") for weight, _ in pairs]
    for (weight, streams), out in zip(pairs, outs, strict=True):
        flags = decode(streams, out)
        same = torch.equal(out.cpu().view(torch.uint8), weight.view(torch.uint8))
        if flags.any() or not same:
            return {"failed": True, "why": "other bytes than the CPU's"}
    sources = [out.clone() for out in outs]

    def decode_all() -> None:
        for (_, streams), out in zip(pairs, outs, strict=True):
            decode(streams, out)

    def copy_all() -> None:
        for out, source in zip(outs, sources, strict=True):
            out.copy_(source)

    found = measure({"decode": Replay([decode_all]), "copy": Replay([copy_all])})
    n_bytes = sum(out.nbytes for out in outs)
    held = sum(streams.n_bytes for _, streams in pairs)
    return {
        **found["decode"].as_dict(),
        "output_bytes": n_bytes,
        "coded_share": held / n_bytes,
        "bytes_per_second": n_bytes / found["decode"].median,
        "of_a_copy": found["copy"].median / found["decode"].median,
    }


def main() -> int:
    """Print a line for each case; 2 where there is no GPU, 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    lacking = missing()
    if lacking:
        print(needs_text("bench.rans32_gpu", lacking), file=sys.stderr)
        return 2
    found = []
    for row in rows(args.seconds):
        found.append(row)
        print(json.dumps(row), flush=True)
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(row.get("failed") for row in found))


if __name__ == "__main__":
    sys.exit(main())
