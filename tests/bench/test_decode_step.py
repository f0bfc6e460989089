"""What is said of a step beyond its time: layers that fit, whole models from some layers, speedups."""

import pytest
import torch

from bench import decode_step
from bench.decode_models import Shape
from bench.decode_step import SHAPES, layers_that_fit, run, speedups, whole
from fewbit.quant.errors import FewbitError


def test_as_many_layers_as_fit() -> None:
    small, large = SHAPES
    assert layers_that_fit(small, "bf16", 16, 8191, 80 << 30) == 32
    assert layers_that_fit(large, "w4a8kv4", 1, 1023, 80 << 30) == 80
    few = layers_that_fit(large, "bf16", 1, 1023, 80 << 30)
    weights = sum(n * k for _, n, k in large.linears) * 2
    assert 20 < few < 80 and few * weights < 0.8 * (80 << 30)
    assert layers_that_fit(large, "bf16", 1, 1023, 1 << 30) == 2


def test_whole_models_from_some_layers() -> None:
    assert whole({32: 5.0}, 32) == 5.0
    assert whole({10: 3.0, 20: 5.0}, 80) == pytest.approx(5.0 + 0.2 * 60)


def test_speedups_need_both() -> None:
    row = {"model": "8B", "rows": 1, "tokens": 1024}
    rows = [
        {**row, "kind": "w4a8kv4", "step_ms": 2.0},
        {**row, "kind": "bf16", "step_ms": 5.0},
        {**row, "model": "70B", "kind": "w4a8kv4", "step_ms": 2.0},
    ]
    assert speedups(rows) == {"8B 1 x 1024": 2.5}


def test_products_of_a_layer() -> None:
    shape: Shape = SHAPES[0]
    assert {name: (n, k) for name, n, k in shape.linears} == {
        "qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336),
    }  # fmt: skip
    assert len(list(decode_step._cases())) == len(SHAPES) * len(decode_step.CASES) * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(FewbitError, match="on an NVIDIA GPU, and torch sees none"):
        run(1.0)
