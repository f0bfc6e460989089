"""8-bit products: bit-equal to the reference for any shape, split and integer format."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.kernels_triton import _integer_gemm, _triton, int8_gemm
from fewbit.kernels_triton.int8_gemm import KERNEL, Int8Weight, multiply
from fewbit.kernels_triton.quantize_rows import RmsNorm, quantize, rmsnorm_quantize
from fewbit.quant import reference
from fewbit.quant.activation import RoundedRows, integer_form
from fewbit.quant.errors import NoKernelError
from fewbit.quant.format import IntegerForm, find_format
from fewbit.quant.formats.int8_token import ACTIVATION
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.formats.int_two_level import IntTwoLevelOptions
from fewbit.quant.kernel import Config, Problem
from fewbit.quant.machine import load_device
from fewbit.quant.packed import PackedTensor, Term

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16)
WEIGHTS = (
    ("int_group", IntGroupOptions(8, "row")),
    ("int_group", IntGroupOptions(3, "row")),
    ("int_two_level", IntTwoLevelOptions(group=64, dialect="zero")),
    ("int_two_level", IntTwoLevelOptions(group="row")),
)
PROBLEM = Problem(
    "int_group", IntGroupOptions(8, "row"), 1, 16, 4096, 4096, torch.bfloat16, "cuda",
    "int8_token", load_device("h200"),
)  # fmt: skip
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def config(bm: int = 16, bn: int = 64, bk: int = 128, split: int = 1) -> Config:
    return (("bm", bm), ("bn", bn), ("bk", bk), ("warps", 4), ("stages", 3), ("split_k", split))


def pack(weight: torch.Tensor, name: str, options: object) -> PackedTensor:
    known = find_format(name)
    extra = known.padded_k(weight.shape[-1], options) - weight.shape[-1]
    full = torch.nn.functional.pad(weight, (0, extra))
    scales = known.fit(full, options)
    codes, _ = known.round(full, scales, 0, options)
    parts = {key: part.to(DEVICE) for key, part in known.pack(codes, scales, options).items()}
    return PackedTensor(tuple(weight.shape), (Term(name, options, parts),))


def tokens(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows with a mean, outliers in some channels, and one row of zeros."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) + 0.3
    x[:, ::11] *= 30
    x[m // 2 : m // 2 + 1] = 0
    return x.to(dtype).to(DEVICE)


def layout_of(form: IntegerForm) -> Int8Weight:
    """The layout of integers that no format made."""
    k = form.codes.shape[1]
    weight = torch.nn.functional.pad(form.codes, (0, _integer_gemm.padded(k) - k))
    return Int8Weight(weight.to(DEVICE), form.scale.view(-1).to(DEVICE), None, k)


@needs_triton
@settings(max_examples=25, deadline=None)
@given(
    m=st.sampled_from([0, 1, 2, 7, 16, 33]),
    n=st.integers(1, 140),
    k=st.integers(1, 700),
    weight=st.sampled_from(WEIGHTS),
    dtype=st.sampled_from(DTYPES),
    tile=st.sampled_from([(16, 64, 128), (16, 128, 256), (32, 64, 128)]),
    split=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 1000),
)
def test_bit_equal_to_the_reference(
    m: int,
    n: int,
    k: int,
    weight: tuple[str, object],
    dtype: torch.dtype,
    tile: tuple[int, int, int],
    split: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = pack(torch.randn(n, k, generator=generator) * 0.05 + 0.02, *weight)
    x = tokens(m, k, dtype, seed)
    y = KERNEL.launch(x, KERNEL.prepare(packed, dtype), config(*tile, split))
    assert y.dtype == dtype and y.shape == (m, n)
    assert torch.equal(y, reference.linear(x, packed, "int8_token"))


@needs_triton
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("weight", [127, -128])
@pytest.mark.parametrize("sign", [1, -1])
def test_extremes_neither_saturate_nor_wrap(sign: int, weight: int, split: int) -> None:
    for k in (1, 256, 1000):
        rows = RoundedRows(torch.full((2, k), 127 * sign, dtype=torch.int8), torch.ones(2, 1))
        form = IntegerForm(torch.full((3, k), weight, dtype=torch.int8), torch.full((3, 1), 2e-3))
        rows = RoundedRows(rows.codes.to(DEVICE), rows.scale.to(DEVICE))
        y = multiply(rows, layout_of(form), torch.bfloat16, config(split=split))
        expected = torch.tensor(float(127 * sign * weight * k)) * torch.tensor(2e-3)
        assert torch.equal(y.cpu(), expected.bfloat16().expand(2, 3))


@needs_triton
def test_sums_beyond_what_fp32_counts() -> None:
    torch.manual_seed(1)
    x = torch.randint(-127, 128, (3, 9000), dtype=torch.int8)
    weight = torch.randint(-128, 128, (5, 9000), dtype=torch.int8)
    x[0], weight[0] = x[0].abs(), weight[0].clamp(min=0)
    form = IntegerForm(weight, torch.full((5, 1), 2.0**-12))
    assert int((x.long() @ weight.long().T).abs().max()) > 1 << 24
    rows = RoundedRows(x.to(DEVICE), torch.ones(3, 1, device=DEVICE))
    y = multiply(rows, layout_of(form), torch.float16, config(split=4, bk=256))
    assert torch.equal(
        y.cpu(), reference.integer_linear(RoundedRows(x, torch.ones(3, 1)), form).half()
    )


@needs_triton
def test_results_do_not_depend_on_tiles_or_neighbours() -> None:
    packed = pack(torch.randn(100, 520) * 0.05, *WEIGHTS[3])
    layout, x = KERNEL.prepare(packed, torch.bfloat16), tokens(33, 520, torch.bfloat16)
    whole = KERNEL.launch(x, layout, config())
    for tile in (config(32, 128, 256), config(64, 64, 128, 2), config(16, 64, 128, 12)):
        assert torch.equal(KERNEL.launch(x, layout, tile), whole)
    for row in (0, 32):
        assert torch.equal(KERNEL.launch(x[row : row + 1], layout, config()), whole[row : row + 1])


@needs_triton
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_rows_stay_alone(bad: float) -> None:
    packed = pack(torch.randn(20, 64), *WEIGHTS[0])
    x = torch.ones(3, 64, dtype=torch.bfloat16, device=DEVICE)
    x[1, 3] = bad
    y = KERNEL.launch(x, KERNEL.prepare(packed, torch.bfloat16), config(split=2))
    assert not torch.isfinite(y[1]).any() and torch.isfinite(y[[0, 2]]).all()


@needs_triton
@pytest.mark.parametrize("split", [1, 2])
def test_memory_beside_the_operands_is_neither_read_nor_written(split: int) -> None:
    """Operands end in front of extreme codes and NaN; y has a mark behind it."""
    torch.manual_seed(0)
    m, n, k = 5, 70, 512
    codes = torch.full((m + 3, k), 127, dtype=torch.int8, device=DEVICE)
    weight = torch.full((n + 3, k), 127, dtype=torch.int8, device=DEVICE)
    codes[:m] = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    weight[:n] = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale, row_scale, offset = (
        torch.full((size,), float("nan"), device=DEVICE) for size in (n + 64, m + 64, n + 64)
    )
    scale[:n], row_scale[:m], offset[:n] = 0.01, 0.02, 0.5
    totals = torch.full((m + 64,), 1 << 30, dtype=torch.int32, device=DEVICE)
    totals[:m] = codes[:m].sum(-1, dtype=torch.int32)
    buffer = torch.full((m * n + 64,), 77.0, dtype=torch.float16, device=DEVICE)
    ends = _integer_gemm.Ends(
        scale[:n], row_scale[:m].view(m, 1), totals[:m].view(m, 1), offset[:n]
    )
    _integer_gemm.run_product(
        int8_gemm.int8_product, (codes[:m], weight[:n]), ends, buffer[: m * n].view(m, n),
        [16, 64, 128, 4, 3, split], {},
    )  # fmt: skip
    form = IntegerForm(weight[:n], scale[:n, None], offset[:n, None])
    expected = reference.integer_linear(RoundedRows(codes[:m], row_scale[:m, None]), form)
    assert torch.equal(buffer[: m * n].view(m, n), expected.half())
    assert bool((buffer[m * n :] == 77).all())


@needs_triton
def test_rows_that_a_norm_has_rounded() -> None:
    packed = pack(torch.randn(40, 300) * 0.05, *WEIGHTS[3])
    layout = KERNEL.prepare(packed, torch.bfloat16)
    x, gain = tokens(4, 300, torch.bfloat16), torch.rand(300).bfloat16().to(DEVICE)
    done = rmsnorm_quantize(x, RmsNorm(gain, 1e-6), keep=True, width=layout.weight.shape[1])
    assert done.value is not None
    y = multiply(done.rows, layout, torch.bfloat16, config())
    assert torch.equal(y, reference.linear(done.value, packed, "int8_token"))
    plain = ACTIVATION.round(done.value)  # without sums, without padding
    assert torch.equal(multiply(plain, layout, torch.bfloat16, config()), y)
    assert torch.equal(multiply(quantize(done.value), layout, torch.bfloat16, config()), y)


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        ({"activation": None}, {"ACTIVATION"}),
        ({"n_terms": 2}, {"TERMS"}),
        ({"dtype": torch.float32, "k": 200_000}, {"DTYPE", "SHAPE_K"}),
        ({"options": IntGroupOptions(4, 128)}, {"INTEGERS"}),
        ({"options": IntGroupOptions(8, "row", False)}, {"INTEGERS"}),
        ({"format": "unknown"}, {"INTEGERS"}),
        ({"format": "int_two_level", "options": IntTwoLevelOptions()}, {"POLICY"}),
        ({"device": "cpu", "machine": load_device("cpu")}, {"ARCH"}),
    ],
)
def test_refusals(change: dict[str, object], codes: set[str]) -> None:
    assert KERNEL.refuse(PROBLEM) == ()
    reasons = KERNEL.refuse(replace(PROBLEM, **change))
    assert {reason.code for reason in reasons} == codes
    assert all(reason.text and reason.fix for reason in reasons)


def test_a_weight_without_integers_cannot_be_prepared() -> None:
    packed = pack(torch.randn(4, 64), "int_group", IntGroupOptions(4, 64))
    with pytest.raises(NoKernelError, match="no integer form"):
        KERNEL.prepare(packed, torch.bfloat16)


def test_the_layout_is_the_integer_form_padded() -> None:
    packed = pack(torch.randn(5, 300), *WEIGHTS[3])
    layout, form = KERNEL.prepare(packed, torch.float16), integer_form(packed)
    assert form is not None and form.offset is not None and layout.offset is not None
    assert layout.weight.shape == (5, 512) and layout.k == 300
    assert torch.equal(layout.weight[:, :300], form.codes) and not layout.weight[:, 300:].any()
    assert torch.equal(layout.scale, form.scale[:, 0])
    assert torch.equal(layout.offset, form.offset[:, 0])


def test_few_binaries_many_configs() -> None:
    """Splits cost no compilation: tiles do."""
    assert len(int8_gemm._TILES) == len(set(int8_gemm._TILES)) <= 60
    for m in (1, 16, 64, 256, 4096):
        found = KERNEL.configs(replace(PROBLEM, m_bucket=m))
        assert 10 <= len(found) <= 400 and len(set(found)) == len(found)
        assert all(KERNEL.seconds(replace(PROBLEM, m_bucket=m), c) > 0 for c in found)


@needs_triton
def test_compilers_see_the_shape_without_running() -> None:
    layout = KERNEL.prepare(pack(torch.randn(40, 300), *WEIGHTS[3]), torch.bfloat16)
    rows = quantize(tokens(4, 300, torch.bfloat16), width=512)
    arguments = (
        rows.codes, rows.scale, rows.totals, layout.weight, layout.scale, layout.offset,
        torch.float16, [16, 64, 128, 4, 3, 2],
    )  # fmt: skip
    op = torch.ops.fewbit.int8_gemm
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


COMPILED = """
import torch
from fewbit.kernels_triton import _compile
from fewbit.kernels_triton.int8_gemm import KERNEL
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.kernel import Problem
build, texts = _compile._build, []

def spied(*arguments):
    made = build(*arguments)
    texts.append(made.asm["ptx"])
    return made

_compile._build = spied
problem = Problem("int_group", IntGroupOptions(8, "row"), 1, 16, 4096, 4096, torch.bfloat16, "cuda",
                  "int8_token")
names = ("bm", "bn", "bk", "warps", "stages", "split_k")
for cc, tile, instruction in (
    ((9, 0), (16, 128, 128, 4, 4, 2), "wgmma.mma_async"),
    ((8, 0), (16, 64, 256, 4, 4, 1), "mma.sync"),
):
    found = KERNEL.compile(problem, tuple(zip(names, tile)), cc)
    assert len(found) == 2  # the sum of splits is there whatever split_k is
    assert all(one.stack_bytes == 0 for one in found)
    product = texts[0]
    texts.clear()
    print(instruction in product, "cp.async" in product, "fma.rn.f32" in product)
"""


@needs_triton
def test_compiled_for_gpus_that_are_not_here() -> None:
    """Tensor instructions, loads that run ahead, no fused multiply-add, no spills."""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True True False"] * 2
