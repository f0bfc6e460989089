"""Rotation, encoding and writing at once: the bytes are those of plain torch."""

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.kernels_triton import _triton
from fewbit.kernels_triton.append_kv import KERNEL, append
from fewbit.quant import kv_write
from fewbit.quant.formats.dense_head import DenseHeadOptions
from fewbit.quant.formats.int4_head import PAGE_FORMAT, Int4HeadOptions
from fewbit.quant.kernel import Config, RowsProblem
from fewbit.quant.kv_policy import PageUse
from fewbit.quant.kv_view import Paged
from fewbit.quant.kv_write import AppendOptions, Rope
from fewbit.quant.machine import load_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROWS, HEADS, COLUMNS = 2, 3, 4
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")


def config(heads: int = 2) -> Config:
    return (("heads", heads), ("warps", 1))


def pages(dims: tuple[int, int], fit: str) -> Paged:
    """Empty pages; each row has four, in no order."""
    use = PageUse("int4_head", Int4HeadOptions(fit))

    def parts(dim: int) -> dict[str, torch.Tensor]:
        specs = PAGE_FORMAT.part_specs(dim, torch.float16, use.options)
        shape = (ROWS * COLUMNS, HEADS, 64)
        return {
            name: torch.zeros(*shape, *spec.shape, dtype=spec.dtype, device=DEVICE)
            for name, spec in specs.items()
        }

    order = torch.randperm(ROWS * COLUMNS, generator=torch.Generator().manual_seed(1))
    return Paged(use, use, parts(dims[0]), parts(dims[1]), order.view(ROWS, COLUMNS).to(DEVICE))


def vectors(
    n: int, dims: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with vectors that are constant, zero, damaged, huge, or have an outlier."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (3 * torch.randn(ROWS, HEADS, n, d, generator=generator) for d in dims)
    keys[0, 0, 0], keys[0, 1, 0], values[0, 2, 0] = 7.0, float("nan"), 0.0
    keys[1, 0, 0] *= 1e4
    values[1, 1, 0, 1] = 500.0
    values[1, 2, 0] = -float("inf")
    return keys.to(DEVICE, dtype), values.to(DEVICE, dtype)


def rope_of(n: int, size: int, style: str, dtype: torch.dtype, rows: int = ROWS) -> Rope:
    angles = 6 * torch.rand(rows, n, size, generator=torch.Generator().manual_seed(3))
    return Rope(angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype), style)


def assert_same(found: Paged, wanted: Paged) -> None:
    for one, other in ((found.keys, wanted.keys), (found.values, wanted.values)):
        for name, part in one.items():
            torch.testing.assert_close(part, other[name], rtol=0, atol=0, equal_nan=True, msg=name)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("style", ["none", "half", "pairs"])
def test_bytes_are_those_of_the_format(style: str, dtype: torch.dtype) -> None:
    dims, n = (32, 24), 5
    rope = None if style == "none" else rope_of(n, 32, style, dtype)
    keys, values = vectors(n, dims, dtype)
    found, wanted = pages(dims, "range"), pages(dims, "range")
    append(found, keys, values, 62, rope, config())
    kv_write.append(wanted, keys, values, 62, rope)
    assert_same(found, wanted)
    assert bool((wanted.keys["codes"] != 0).any()) and bool(wanted.keys["scale"].isnan().any())


@needs_triton
@given(
    n=st.integers(1, 4),
    first=st.integers(0, 250),
    dims=st.sampled_from([(2, 4), (6, 80), (18, 64), (128, 10)]),
    heads=st.sampled_from([1, 2, 4]),
    rotary=st.integers(0, 4),
    style=st.sampled_from(["half", "pairs"]),
)
@settings(max_examples=25, deadline=None)
def test_any_shape_and_place(
    n: int, first: int, dims: tuple[int, int], heads: int, rotary: int, style: str
) -> None:
    first = min(first, 64 * COLUMNS - n)
    size = 2 * min(rotary, dims[0] // 2)  # part of the channels, odd halves too
    rope = rope_of(n, size, style, torch.bfloat16, rows=1) if size else None
    keys, values = vectors(n, dims, torch.bfloat16, seed=first)
    found, wanted = pages(dims, "range"), pages(dims, "range")
    append(found, keys, values, first, rope, config(heads))
    kv_write.append(wanted, keys, values, first, rope)
    assert_same(found, wanted)


@needs_triton
def test_strided_vectors_as_models_give_them() -> None:
    keys, values = vectors(4, (32, 32), torch.float16)
    fused = (
        torch.cat([keys, values], dim=1).transpose(1, 2).contiguous()
    )  # [B, n, heads of both, D]
    views = fused.transpose(1, 2).split(HEADS, dim=1)
    assert not views[0].is_contiguous()
    found, wanted = pages((32, 32), "range"), pages((32, 32), "range")
    append(found, *views, 10, None, config())
    kv_write.append(wanted, keys, values, 10)
    assert_same(found, wanted)


@needs_triton
@pytest.mark.parametrize("number", [torch.int32, torch.int64])
def test_places_read_from_the_device(number: torch.dtype) -> None:
    keys, values = vectors(3, (32, 32), torch.float16)
    for places in ([5], [62, 129]):
        found, wanted = pages((32, 32), "range"), pages((32, 32), "range")
        first = torch.tensor(places, dtype=number, device=DEVICE)
        append(found, keys, values, first, None, config())
        kv_write.append(wanted, keys, values, first.long())
        assert_same(found, wanted)


@needs_triton
@pytest.mark.parametrize("dims", [(64, 80), (128, 24)])
def test_searched_fits_are_as_good(dims: tuple[int, int]) -> None:
    """Sums in another order: nearly all vectors have equal bytes, all have an equal error."""
    keys, values = vectors(10, dims, torch.bfloat16)
    keys[0, 1, 0] = 1.0
    values[1, 2, 0] = 1.0
    found, wanted = pages(dims, "search"), pages(dims, "search")
    append(found, keys, values, 30, None, config(1))
    kv_write.append(wanted, keys, values, 30)
    for vector, one, other in (
        (keys, found.keys, wanted.keys),
        (values, found.values, wanted.values),
    ):
        same = (one["codes"] == other["codes"]).all(-1) & (one["scale"] == other["scale"])[..., 0]
        assert same.float().mean() > 0.98
        for row in range(ROWS):
            page = found.table[row, 0]
            errors = []
            for parts in (one, other):
                stored = {name: part[page][:, 30:40] for name, part in parts.items()}
                decoded = PAGE_FORMAT.decode(stored, torch.float32, found.key.options)
                errors.append((decoded - vector[row].float()).square().sum(-1))
            assert bool((errors[0] <= 1.0001 * errors[1] + 1e-12).all())


@needs_triton
def test_nothing_else_is_written() -> None:
    keys, values = vectors(2, (32, 32), torch.float16)
    found = pages((32, 32), "range")
    for parts in (found.keys, found.values):
        for part in parts.values():
            part.fill_(1)
    append(found, keys, values, 63, None, config())
    written = torch.zeros(ROWS * COLUMNS, 64, dtype=torch.bool)
    written[found.table[:, 0].cpu(), 63] = True
    written[found.table[:, 1].cpu(), 0] = True
    for parts in (found.keys, found.values):
        for part in parts.values():
            untouched = part.cpu().transpose(1, 2)[~written]
            assert bool((untouched == 1).all())
    append(found, keys[:, :, :0], values[:, :, :0], 0, None, config())


@needs_triton
def test_compilers_see_that_pages_change() -> None:
    schema = torch.ops.fewbit.triton_append_kv.default._schema
    changed = [argument.name for argument in schema.arguments if argument.alias_info is not None]
    assert changed == ["key_parts", "value_parts"]


# ---- what may be asked, configs, estimates --------------------------------------------------


def problem(options: dict[str, Any] | None = None, **changes: Any) -> RowsProblem:
    int4 = Int4HeadOptions()
    asked = AppendOptions("int4_head", int4, "int4_head", int4, 8, 128, 128)
    asked = replace(asked, **(options or {}))
    made = RowsProblem("append_kv", asked, 16, 2048, torch.bfloat16, "cuda", load_device("h200"))
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("options", "changes", "code"),
    [
        ({}, {"device": "cpu", "machine": load_device("cpu")}, "ARCH"),
        ({"value": "dense_head", "value_options": DenseHeadOptions()}, {}, "FORMAT"),
        ({}, {"dtype": torch.float64}, "DTYPE"),
        ({"head_dim": 7}, {}, "SHAPE_K"),
        ({"value_dim": 2048}, {}, "SHAPE_K"),
        ({"rope": "half", "rotary_dim": 130}, {}, "SHAPE_K"),
    ],
)
def test_refusals(options: dict[str, Any], changes: dict[str, Any], code: str) -> None:
    assert KERNEL.refuse(problem()) == ()
    assert [reason.code for reason in KERNEL.refuse(problem(options, **changes))] == [code]


def test_configs_and_estimates() -> None:
    assert KERNEL.configs is not None
    for asked in (problem(), problem({"head_dim": 256, "kv_heads": 1}), problem(m_bucket=4096)):
        found = KERNEL.configs(asked)
        assert 0 < len(found) <= 15 and len(set(found)) == len(found)
        assert all(0 < KERNEL.seconds(asked, one) < 1 for one in found)
    few, many = problem(), problem(m_bucket=4096)
    assert min(KERNEL.seconds(few, one) for one in KERNEL.configs(few)) < min(
        KERNEL.seconds(many, one) for one in KERNEL.configs(many)
    )


_COMPILE = """
import torch
from fewbit.kernels_triton.append_kv import KERNEL
from fewbit.quant.formats.int4_head import Int4HeadOptions
from fewbit.quant.kernel import RowsProblem
from fewbit.quant.kv_write import AppendOptions
options = AppendOptions("int4_head", Int4HeadOptions(), "int4_head", Int4HeadOptions("range"), 8,
                        128, 64, "half", 128)
asked = RowsProblem("append_kv", options, 1, 1536, torch.bfloat16, "cuda")
for cc in ((8, 0), (9, 0)):
    found, = KERNEL.compile(asked, (("heads", 1), ("warps", 1)), cc)
    print(cc, found.registers, found.stack_bytes)
"""


@needs_triton
def test_compiles_without_a_gpu_and_without_spills() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["0", "0"]
