"""4-bit over int8 products: bit-equal to the reference. Their PTX is tested in a file of its own."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.kernels_triton import _integer_gemm, _triton, int_two_level_gemm
from fewbit.kernels_triton.int_two_level_gemm import KERNEL, multiply
from fewbit.kernels_triton.quantize_rows import RmsNorm, SummedRows, quantize, rmsnorm_quantize
from fewbit.quant import reference
from fewbit.quant.activation import RoundedRows, integer_form
from fewbit.quant.format import find_format
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.formats.int_two_level import IntTwoLevelOptions
from fewbit.quant.kernel import Config, Problem
from fewbit.quant.machine import load_device
from fewbit.quant.packed import PackedTensor, Term

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16)
OPTIONS = tuple(
    IntTwoLevelOptions(group=group, dialect=dialect)
    for group in (32, 64, 128, "row")
    for dialect in ("offset", "zero")
)
PROBLEM = Problem(
    "int_two_level", IntTwoLevelOptions(), 1, 16, 4096, 4096, torch.bfloat16, "cuda",
    "int8_token", load_device("h200"),
)  # fmt: skip
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def config(bm: int = 16, bn: int = 64, bk: int = 128, split: int = 1) -> Config:
    return (("bm", bm), ("bn", bn), ("bk", bk), ("warps", 4), ("stages", 3), ("split_k", split))


def pack(weight: torch.Tensor, options: IntTwoLevelOptions) -> PackedTensor:
    known = find_format("int_two_level")
    extra = known.padded_k(weight.shape[-1], options) - weight.shape[-1]
    full = torch.nn.functional.pad(weight, (0, extra))
    scales = known.fit(full, options)
    codes, _ = known.round(full, scales, 0, options)
    return stored(tuple(weight.shape), codes, scales, options)


def stored(
    shape: tuple[int, ...],
    codes: torch.Tensor,
    scales: dict[str, torch.Tensor],
    options: IntTwoLevelOptions,
) -> PackedTensor:
    known = find_format("int_two_level")
    parts = known.pack(codes, scales, options)
    known.check(parts, shape, options)
    parts = {key: part.to(DEVICE) for key, part in parts.items()}
    return PackedTensor(shape, (Term("int_two_level", options, parts),))


def tokens(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows with a mean, outliers in some channels, and one row of zeros."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) + 0.3
    x[:, ::11] *= 30
    x[m // 2 : m // 2 + 1] = 0
    return x.to(dtype).to(DEVICE)


# ---- products -------------------------------------------------------------------------------


@needs_triton
@settings(max_examples=40, deadline=None)
@given(
    m=st.sampled_from([0, 1, 2, 7, 16, 33]),
    n=st.integers(1, 100),
    k=st.integers(1, 600),
    options=st.sampled_from(OPTIONS),
    dtype=st.sampled_from(DTYPES),
    tile=st.sampled_from([(16, 64, 128), (16, 64, 256), (32, 64, 128)]),
    split=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 1000),
)
def test_bit_equal_to_the_reference(
    m: int,
    n: int,
    k: int,
    options: IntTwoLevelOptions,
    dtype: torch.dtype,
    tile: tuple[int, int, int],
    split: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * 0.05 + 0.02
    weight[:, :: max(1, k // 5)] *= 8
    packed = pack(weight, options)
    x = tokens(m, k, dtype, seed)
    y = KERNEL.launch(x, KERNEL.prepare(packed, dtype), config(*tile, split))
    assert y.dtype == dtype and y.shape == (m, n)
    assert torch.equal(y, reference.linear(x, packed, "int8_token"))


@needs_triton
@pytest.mark.parametrize("bk", [128, 256])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_and_depth(options: IntTwoLevelOptions, bk: int) -> None:
    packed = pack(torch.randn(70, 500) * 0.05, options)
    layout, x = KERNEL.prepare(packed, torch.bfloat16), tokens(3, 500, torch.bfloat16)
    expected = reference.linear(x, packed, "int8_token")
    for split in (1, 2):
        assert torch.equal(KERNEL.launch(x, layout, config(bk=bk, split=split)), expected)


@needs_triton
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_widest_steps_reach_both_ends_of_int8(group: int, sign: int) -> None:
    """code 15 with s2 = 17 and o = -128 is 127, code 0 is -128; z = 8 with s2 = 16 spans both ways."""
    n, k = 5, 256
    codes = torch.zeros(n, k, dtype=torch.uint8)
    codes[:, ::2] = 15
    codes[3], codes[4] = 15, 0
    shape = (n, k // group)
    scales = {
        "scale_row": torch.full((n, 1), 2.0**-10).half(),
        "scale_group": torch.full(shape, 17, dtype=torch.uint8),
        "offset_group": torch.full(shape, -128, dtype=torch.int8),
    }
    zeros = {
        "scale_row": scales["scale_row"],
        "scale_group": torch.full(shape, 16, dtype=torch.uint8),
        "zero_group": torch.full(shape, 8, dtype=torch.uint8),
    }
    rows = RoundedRows(torch.full((2, k), 127 * sign, dtype=torch.int8), torch.ones(2, 1))
    rows = RoundedRows(rows.codes.to(DEVICE), rows.scale.to(DEVICE))
    for dialect, parts in (("offset", scales), ("zero", zeros)):
        options = IntTwoLevelOptions(group=group, dialect=dialect)
        packed = stored((n, k), codes, parts, options)
        form = integer_form(packed)
        assert form is not None
        assert (int(form.codes.max()), int(form.codes.min())) == (
            (127, -128) if dialect == "offset" else (112, -128)
        )
        y = multiply(rows, KERNEL.prepare(packed, torch.float16), torch.float16, config())
        assert torch.equal(y, reference.integer_linear(rows, form).half())


@needs_triton
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[6], OPTIONS[7]], ids=str)
def test_results_do_not_depend_on_tiles_or_neighbours(options: IntTwoLevelOptions) -> None:
    packed = pack(torch.randn(100, 520) * 0.05, options)
    layout, x = KERNEL.prepare(packed, torch.bfloat16), tokens(33, 520, torch.bfloat16)
    whole = KERNEL.launch(x, layout, config())
    for tile in (config(32, 128, 256), config(64, 64, 128, 3)):
        assert torch.equal(KERNEL.launch(x, layout, tile), whole)
    for row in (0, 32):
        assert torch.equal(KERNEL.launch(x[row : row + 1], layout, config()), whole[row : row + 1])


@needs_triton
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [OPTIONS[4], OPTIONS[6]], ids=str)
def test_damaged_rows_stay_alone(options: IntTwoLevelOptions, bad: float) -> None:
    packed = pack(torch.randn(20, 64), options)
    x = torch.ones(3, 64, dtype=torch.bfloat16, device=DEVICE)
    x[1, 3] = bad
    y = KERNEL.launch(x, KERNEL.prepare(packed, torch.bfloat16), config(split=2))
    assert not torch.isfinite(y[1]).any() and torch.isfinite(y[[0, 2]]).all()


@needs_triton
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("options", [OPTIONS[4], OPTIONS[7]], ids=str)
def test_memory_beside_the_operands_is_neither_read_nor_written(
    options: IntTwoLevelOptions, split: int
) -> None:
    packed = pack(torch.randn(70, 512) * 0.05, options)
    layout, x = KERNEL.prepare(packed, torch.float16), tokens(5, 512, torch.float16)
    expected = reference.linear(x, packed, "int8_token")
    rows = find_rows(x)

    def fenced(part: torch.Tensor | None) -> torch.Tensor | None:
        """The same values, with the worst that their dtype holds behind them."""
        if part is None:
            return None
        worst = float("nan") if part.is_floating_point() else torch.iinfo(part.dtype).max
        block = torch.full((part.numel() + 512,), worst, dtype=part.dtype, device=DEVICE)
        block[: part.numel()] = part.flatten()
        return block[: part.numel()].view(part.shape)

    codes, row_scale, totals, scale, words, steps = (
        fenced(part) for part in
        (rows.codes, rows.scale, rows.totals, layout.scale, layout.words, layout.steps)
    )  # fmt: skip
    row = options.group == "row"
    ends = _integer_gemm.Ends(scale, row_scale, totals, None, fenced(layout.zero), high=row)
    buffer = torch.full((5 * 70 + 64,), 77.0, dtype=torch.float16, device=DEVICE)
    _integer_gemm.run_product(
        int_two_level_gemm.two_level_product, (codes, words, totals if row else steps), ends,
        buffer[:350].view(5, 70), [16, 64, 128, 4, 3, split],
        {"H": words.shape[2], "PTX": not _triton.interpreted()},
    )  # fmt: skip
    assert torch.equal(buffer[:350].view(5, 70), expected)
    assert bool((buffer[350:] == 77).all())


def find_rows(x: torch.Tensor) -> SummedRows:
    return quantize(x, width=_integer_gemm.padded(x.shape[1]))


@needs_triton
def test_rows_that_a_norm_has_rounded() -> None:
    packed = pack(torch.randn(40, 300) * 0.05, OPTIONS[6])
    layout = KERNEL.prepare(packed, torch.bfloat16)
    x, gain = tokens(4, 300, torch.bfloat16), torch.rand(300).bfloat16().to(DEVICE)
    done = rmsnorm_quantize(x, RmsNorm(gain, 1e-6), keep=True, width=512)
    assert done.value is not None
    y = multiply(done.rows, layout, torch.bfloat16, config())
    assert torch.equal(y, reference.linear(done.value, packed, "int8_token"))


# ---- the layout -----------------------------------------------------------------------------


def test_golden_layout() -> None:
    """Group 32, K = 64: one span, then padding. Bytes hold columns j and 32 + j."""
    options = IntTwoLevelOptions(group=32, dialect="zero")
    codes = torch.arange(64).remainder(16).to(torch.uint8).expand(2, 64).clone()
    codes[1] = 7
    scales = {
        "scale_row": torch.tensor([[0.5], [0.25]]).half(),
        "scale_group": torch.tensor([[1, 2], [3, 17]], dtype=torch.uint8),
        "zero_group": torch.tensor([[8, 9], [7, 7]], dtype=torch.uint8),
    }
    layout = KERNEL.prepare(stored((2, 64), codes, scales, options), torch.float16)
    assert layout.words.shape == (4, 2, 32) and layout.steps.shape == (4, 2) and layout.k == 64
    assert layout.words[0, 0].tolist() == [17 * (j % 16) for j in range(32)]
    assert layout.words[0, 1].tolist() == [0x77] * 32 and not layout.words[1:].any()
    low, high = (1 | (256 - 8) << 5), (2 | (256 - 18) << 5)
    assert layout.steps[0].tolist() == [
        low | high << 16,
        (3 | (256 - 21) << 5) | (17 | (256 - 119) << 5) << 16,
    ]
    assert (layout.steps[1:] == (1 | 256 << 5) * 0x10001).all()
    assert layout.scale.tolist() == [0.5, 0.25] and layout.offset is None and layout.zero is None


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_layout_holds_the_integer_form(options: IntTwoLevelOptions) -> None:
    packed = pack(torch.randn(6, 300) * 0.1 + 0.05, options)
    layout, form = KERNEL.prepare(packed, torch.float16), integer_form(packed)
    assert form is not None
    halves = torch.stack((layout.words & 15, layout.words >> 4), 2).int()  # [spans, N, 2, H]
    if options.group == "row":
        w8 = halves - 8 if layout.zero is None else halves - 8 + layout.zero.view(1, -1, 1, 1)
    else:
        both = torch.stack((layout.steps & 0xFFFF, layout.steps >> 16), 2).unsqueeze(-1)
        w8 = halves * (both & 31) + (both >> 5) - 256
    found = w8.transpose(0, 1).flatten(1)[:, :300]
    assert torch.equal(found, form.codes.int())
    assert torch.equal(layout.scale, form.scale[:, 0])
    if form.offset is None:
        assert layout.offset is None
    else:
        assert layout.offset is not None and torch.equal(layout.offset, form.offset[:, 0])


# ---- what may be asked ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        ({"format": "int_group", "options": IntGroupOptions(8, "row")}, {"FORMAT"}),
        ({"activation": None, "n_terms": 2}, {"ACTIVATION", "TERMS"}),
        ({"dtype": torch.float32}, {"DTYPE"}),
        ({"k": 200_000}, {"SHAPE_K"}),
        ({"device": "cpu", "machine": load_device("cpu")}, {"ARCH"}),
    ],
)
def test_refusals(change: dict[str, object], codes: set[str]) -> None:
    assert KERNEL.refuse(replace(PROBLEM, n=1, k=1)) == ()
    reasons = KERNEL.refuse(replace(PROBLEM, **change))
    assert {reason.code for reason in reasons} == codes
    assert all(reason.text and reason.fix for reason in reasons)


@pytest.mark.parametrize("options", OPTIONS[::2], ids=str)
def test_few_binaries_many_configs(options: IntTwoLevelOptions) -> None:
    tiles = int_two_level_gemm._TILES + int_two_level_gemm._TILES_9_0
    assert len(tiles) == len(set(tiles)) <= 60
    for m in (1, 16, 64, 256, 4096):
        problem = replace(PROBLEM, m_bucket=m, options=options)
        found = KERNEL.configs(problem)
        assert 8 <= len(found) <= 400 and len(set(found)) == len(found)
        assert all(KERNEL.seconds(problem, c) > 0 for c in found)


def test_large_tiles_only_where_they_do_not_spill() -> None:
    def areas(machine: str) -> set[int]:
        problem = replace(PROBLEM, m_bucket=4096, machine=load_device(machine))
        return {dict(c)["bm"] * dict(c)["bn"] for c in KERNEL.configs(problem)}

    assert max(areas("h200")) == max(areas("h100")) == 256 * 128
    assert max(areas("b200")) == max(areas("a100-80gb")) == 128 * 128


def test_half_the_bytes_win_for_few_tokens() -> None:
    from fewbit.kernels_triton import int8_gemm

    def best(kernel: object, m: int) -> float:
        problem = replace(PROBLEM, m_bucket=m, n=8192, k=8192)
        return min(kernel.seconds(problem, c) for c in kernel.configs(problem))

    assert best(KERNEL, 1) < 0.7 * best(int8_gemm.KERNEL, 1)
    assert best(KERNEL, 4096) >= 0.95 * best(int8_gemm.KERNEL, 4096)


@needs_triton
def test_compilers_see_the_shape_without_running() -> None:
    rows = find_rows(tokens(4, 300, torch.bfloat16))
    for options in (OPTIONS[0], OPTIONS[6], OPTIONS[7]):
        layout = KERNEL.prepare(pack(torch.randn(40, 300), options), torch.bfloat16)
        arguments = (
            rows.codes, rows.scale, rows.totals, layout.words, layout.steps, layout.scale,
            layout.offset, layout.zero, torch.float16, [16, 64, 128, 4, 3, 2],
        )  # fmt: skip
        op = torch.ops.fewbit.int_two_level_gemm
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


COMPILED = """
import re
from dataclasses import replace
import torch
from fewbit.kernels_triton import _compile
from fewbit.kernels_triton.int_two_level_gemm import KERNEL
from fewbit.quant.formats.int_two_level import IntTwoLevelOptions
from fewbit.quant.kernel import Problem
build, made = _compile._build, []

def spied(*arguments):
    made.append(build(*arguments))
    return made[-1]

_compile._build = spied
problem = Problem("int_two_level", IntTwoLevelOptions(), 1, 16, 4096, 4096, torch.bfloat16, "cuda",
                  "int8_token")
names = ("bm", "bn", "bk", "warps", "stages", "split_k")
for cc, group, tile, instruction in (
    ((9, 0), 128, (16, 128, 256, 4, 3, 2), "wgmma.mma_async"),
    ((8, 0), 128, (16, 128, 256, 4, 3, 1), "mma.sync"),
    ((12, 0), "row", (16, 64, 128, 4, 3, 1), "mma.sync"),
):
    asked = replace(problem, options=IntTwoLevelOptions(group=group))
    found = KERNEL.compile(asked, tuple(zip(names, tile)), cc)
    assert all(one.stack_bytes == 0 for one in found)
    text = made[-len(found)].asm
    assert instruction in text["ptx"] and "fma.rn.f32" not in text["ptx"]
    # Each result of the snippets is the first operand of an int8 mma, four neighbours in K a register.
    snippets = [line for line in text["ttgir"].splitlines() if "elementwise_inline_asm" in line]
    ours = [re.search(r"-> tensor<(\\w+), (.*?)> loc", line).groups() for line in snippets]
    assert ours and all("opIdx = 0" in layout and "kWidth = 4" in layout for _, layout in ours)
    counts = dict(found[0].opcodes)
    weights = tile[1] * tile[2] / (32 * tile[3])
    work = sum(counts.get(name, 0) for name in ("LOP3", "IMAD", "SHF"))
    print(round(work / weights, 2))
"""


@needs_triton
def test_compiled_for_gpus_that_are_not_here() -> None:
    """Tensor instructions on registers, and few integer instructions for a weight."""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    per_weight = [float(word) for word in done.stdout.split()]
    assert len(per_weight) == 3 and max(per_weight[:2]) < 2.5, per_weight
