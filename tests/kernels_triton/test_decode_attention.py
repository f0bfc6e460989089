"""Attention over packed pages against float64 over the same decoded codes."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from attending import INT4, exact, fill, layer_of, poison, relative_error, vectors
from fewbit.kernels_triton import _triton, decode_attention
from fewbit.kernels_triton.decode_attention import KERNELS, attend, attend_counted
from fewbit.quant.formats.dense_head import DenseHeadOptions
from fewbit.quant.formats.int4_head import Int4HeadOptions
from fewbit.quant.kernel import AttentionProblem, Config
from fewbit.quant.kv_view import KVView, Scoring
from fewbit.quant.machine import load_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DENSE = {"format": "dense_head"}
DTYPES = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}
BY_NAME = {kernel.name: kernel for kernel in KERNELS}
needs_triton = pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def config(splits: int = 1, tokens: int = 64, rows: int = 8) -> Config:
    return (("rows", rows), ("splits", splits), ("stages", 2), ("tokens", tokens), ("warps", 2))


def call(
    n_tokens: int,
    n_queries: int,
    group: int,
    dtype: torch.dtype,
    dims: tuple[int, int] = (32, 32),
    **settings: object,
) -> tuple[KVView, torch.Tensor, Scoring]:
    """A view of two rows with two KV heads, and causal queries."""
    layer = layer_of(**settings)  # type: ignore[arg-type]
    keys, values = (vectors((2, 2, n_tokens, d), dtype, i, DEVICE) for i, d in enumerate(dims))
    view = fill(layer, keys, values, n_queries)
    if layer.policy.key.format == "int4_head":
        poison(layer)
    query = vectors((2, 2 * group, n_queries, dims[0]), dtype, 7, DEVICE)
    return view, query, Scoring(dims[0] ** -0.5, None, True, None, None)


def check(view: KVView, query: torch.Tensor, scoring: Scoring, chosen: Config) -> None:
    found = attend(view, query, scoring, chosen)
    assert found.dtype == query.dtype and found.shape[:3] == query.shape[:3]
    assert relative_error(found, exact(view, query, scoring)) <= TOLERANCE[query.dtype]


def left_padding(n_tokens: int, n_queries: int, padding: int) -> torch.Tensor:
    """[2, 1, Q, T]: the second row begins with padding."""
    mask = torch.ones(n_queries, n_tokens, dtype=torch.bool).tril(n_tokens - n_queries)
    mask = mask.expand(2, 1, -1, -1).clone()
    mask[1, :, :, :padding] = False
    return mask.to(DEVICE)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("n_tokens", [1, 63, 64, 65, 300])
def test_one_query_over_stored_tokens(n_tokens: int, group: int, dtype: torch.dtype) -> None:
    view, query, scoring = call(n_tokens, 1, group, dtype)
    check(view, query, scoring, config(splits=1 if n_tokens < 65 else 3))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("n_queries", "group", "rows"), [(2, 1, 8), (2, 4, 8), (8, 4, 16), (3, 8, 8)]
)
def test_several_queries(n_queries: int, group: int, rows: int, dtype: torch.dtype) -> None:
    view, query, scoring = call(130, n_queries, group, dtype, residual=20, sink=4)
    check(view, query, scoring, config(splits=2, tokens=32, rows=rows))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("residual", "sink"), [(0, 5), (30, 0), (30, 5), (64, 70), (300, 4)])
def test_windows_and_sinks(residual: int, sink: int, splits: int, dtype: torch.dtype) -> None:
    starts = torch.tensor([0, 40])
    view, query, scoring = call(200, 2, 2, dtype, residual=residual, sink=sink, starts=starts)
    check(view, query, scoring, config(splits))
    mask = left_padding(200, 2, 40)
    check(view, query, replace(scoring, mask=mask), config(splits, tokens=32))


@needs_triton
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("heads", [1, 4])
def test_masks_caps_and_sink_logits(heads: int, splits: int) -> None:
    view, query, scoring = call(150, 2, 2, torch.float16, residual=30)
    mask = left_padding(150, 2, 148).expand(2, heads, 2, 150).clone()
    mask[0, heads - 1, :, 5:70] = False  # one query of the second row sees a single key
    logits = torch.linspace(-2, 3, 4, dtype=torch.float16, device=DEVICE)
    for changed in (
        replace(scoring, mask=mask),
        replace(scoring, mask=mask[:1]),
        replace(scoring, softcap=1.5),
        replace(scoring, sinks=logits),
        replace(scoring, mask=mask, softcap=3.0, sinks=logits),
    ):
        check(view, query, changed, config(splits))


@needs_triton
def test_a_query_that_sees_nothing_gets_nothing() -> None:
    view, query, scoring = call(100, 2, 2, torch.float16, residual=30)
    mask = torch.ones(2, 1, 2, 100, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    for splits in (1, 2):
        found = attend(view, query, replace(scoring, mask=mask), config(splits))
        assert bool((found[1] == 0).all()) and bool((found[0] != 0).any())


@needs_triton
@pytest.mark.parametrize("dims", [(8, 12), (80, 96), (64, 128), (128, 64), (256, 256)])
def test_head_sizes(dims: tuple[int, int]) -> None:
    view, query, scoring = call(100, 1, 2, torch.bfloat16, dims, residual=16)
    check(view, query, scoring, config(splits=2))


@needs_triton
def test_shared_pages_out_of_order() -> None:
    """Beams: rows go on from one text, and part on a half-full page."""
    dtype = torch.float16
    layer = layer_of(INT4, 10, 2)
    layer.update(*(vectors((3, 2, 150, 32), dtype, i, DEVICE) for i in range(2)))
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    layer.update(*(vectors((3, 2, 70, 32), dtype, 2 + i, DEVICE) for i in range(2)))
    layer.reorder_cache(torch.tensor([1, 1, 0]))
    handle = layer.update(*(vectors((3, 2, 1, 32), dtype, 4 + i, DEVICE) for i in range(2)))[0]
    table = handle.view.pages.table
    assert not torch.equal(table[:, :3].T.flatten().cpu(), torch.arange(9)), "pages are in order"
    query = vectors((3, 4, 1, 32), dtype, 9, DEVICE)
    check(handle.view, query, Scoring(0.2, None, True, None, None), config(splits=2))


@needs_triton
def test_huge_and_tiny_numbers() -> None:
    """Values whose scales are beyond fp16's integers, keys and queries of any size, stay finite."""
    dtype = torch.bfloat16
    for key_size, value_size, query_size in ((1e-4, 3e4, 1e4), (1e3, 1e-5, 1e-3), (1e-3, 1.0, 1e3)):
        layer = layer_of(INT4)
        keys = vectors((2, 2, 100, 32), dtype, 0, DEVICE) * key_size
        values = vectors((2, 2, 100, 32), dtype, 1, DEVICE) * value_size
        values[:, :, ::7] *= 0.01  # scales of very different size in one page
        view = fill(layer, keys, values, 1)
        query = vectors((2, 4, 1, 32), dtype, 2, DEVICE) * query_size
        check(view, query, Scoring(0.2, None, True, None, None), config(splits=2))


@needs_triton
def test_nan_of_a_token_is_not_hidden() -> None:
    layer = layer_of(INT4)
    keys, values = (vectors((2, 2, 70, 32), torch.float16, i, DEVICE) for i in range(2))
    values[0, 0, 3] = float("nan")
    view = fill(layer, keys, values, 1)
    query = vectors((2, 4, 1, 32), torch.float16, 2, DEVICE)
    found = attend(view, query, Scoring(0.2, None, True, None, None), config())
    assert bool(found[0, :2].isnan().all()) and bool(found[0, 2:].isfinite().all())
    assert bool(found[1].isfinite().all())


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
def test_dense_pages(dtype: torch.dtype) -> None:
    view, query, scoring = call(200, 2, 2, dtype, form=DENSE, residual=30, sink=4)
    check(view, query, scoring, config(splits=3, tokens=32))
    check(view, query, replace(scoring, mask=left_padding(200, 2, 50)), config(tokens=16))


@needs_triton
def test_strided_queries_and_bands() -> None:
    """As models give them: heads and tokens exchanged, and a band that is a slice."""
    view, query, scoring = call(130, 2, 2, torch.float16, residual=20)
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(
        attend(view, strided, scoring, config()), attend(view, query, scoring, config())
    )
    assert view.band is not None
    odd = torch.zeros(2, 2, view.band[0].shape[2], 33, dtype=torch.float16, device=DEVICE)
    odd[..., 1:] = view.band[0]  # no multiple of four lies before it
    moved = replace(view, band=(odd[..., 1:], view.band[1]))
    assert torch.equal(
        attend(moved, query, scoring, config()), attend(view, query, scoring, config())
    )


@needs_triton
@pytest.mark.parametrize("number", [torch.int32, torch.int64])
def test_counts_on_the_device(number: torch.dtype) -> None:
    """One launch serves every length: row b sees its first counts[b] tokens."""
    dtype = torch.float16
    layer = layer_of(INT4, 0, 3)
    keys, values = (vectors((2, 2, 200, 32), dtype, i, DEVICE) for i in range(2))
    view = fill(layer, keys, values, 2)
    assert view.pages is not None
    query = vectors((2, 4, 2, 32), dtype, 9, DEVICE)
    scoring = Scoring(0.2, None, True, None, None)
    for lengths in ((200, 200), (65, 2), (64, 130)):
        counts = torch.tensor(lengths, dtype=number, device=DEVICE)
        found = attend_counted(view.pages, query, counts, scoring, config(splits=3))
        for row, length in enumerate(lengths):
            shapes = tuple(torch.Size((2, 2, length, 32)) for _ in range(2))
            shorter = replace(
                view, n_tokens=length, stored=length, band_start=length, shapes=shapes
            )
            wanted = exact(shorter, query, scoring)[row]
            assert relative_error(found[row], wanted) <= TOLERANCE[dtype]


@needs_triton
def test_splits_do_not_change_the_result_beyond_rounding_and_repeat_exactly() -> None:
    view, query, scoring = call(140, 1, 4, torch.float16, residual=20)
    wanted = exact(view, query, scoring)
    for splits in (1, 2, 16):  # more splits than steps: some have nothing to do
        found = attend(view, query, scoring, config(splits))
        assert torch.equal(found, attend(view, query, scoring, config(splits)))
        assert relative_error(found, wanted) <= TOLERANCE[torch.float16]


@needs_triton
def test_no_rows_are_answered_without_a_launch() -> None:
    view, query, scoring = call(20, 1, 2, torch.float16)
    assert attend(view, query[:0], scoring, config()).shape == (0, 4, 1, 32)


@needs_triton
def test_compilers_see_one_operator() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    view, query, scoring = call(70, 2, 2, torch.float16)
    wanted = attend(view, query, scoring, config())
    assert view.pages is not None
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(part) for name, part in view.pages.keys.items()}
        pages = replace(
            view.pages, keys=fake, values=fake, table=mode.from_tensor(view.pages.table)
        )
        shown = attend(replace(view, pages=pages), mode.from_tensor(query), scoring, config())
    assert (shown.shape, shown.stride(), shown.dtype) == (
        wanted.shape,
        wanted.stride(),
        wanted.dtype,
    )


# ---- what may be asked, configs, estimates --------------------------------------------------


def problem(**changes: object) -> AttentionProblem:
    options = Int4HeadOptions()
    made = AttentionProblem(
        key="int4_head", key_options=options, value="int4_head", value_options=options,
        n_rows=16, n_queries=1, kv_heads=8, group=4, head_dim=128, value_dim=128, t_bucket=32768,
        dtype=torch.bfloat16, device="cuda", machine=load_device("h200"),
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"device": "cpu", "machine": load_device("cpu")}, "ARCH"),
        ({"value": "dense_head", "value_options": DenseHeadOptions()}, "FORMAT"),
        ({"dtype": torch.float32}, "DTYPE"),
        ({"head_dim": 66}, "SHAPE_K"),
        ({"value_dim": 512}, "SHAPE_K"),
        ({"n_queries": 9}, "SHAPE_M"),
        ({"n_queries": 8, "group": 32}, "SHAPE_M"),
    ],
)
def test_refusals(changes: dict[str, object], code: str) -> None:
    kernel = BY_NAME["triton_attend_int4"]
    assert kernel.refuse(problem()) == ()
    reasons = kernel.refuse(problem(**changes))
    assert [reason.code for reason in reasons] == [code]
    assert all(reason.text and reason.fix for reason in reasons)


def test_each_kernel_is_for_one_format() -> None:
    dense = {"key": "dense_head", "key_options": DenseHeadOptions()}
    dense |= {"value": "dense_head", "value_options": DenseHeadOptions()}
    for name, kernel in BY_NAME.items():
        other = problem(**dense)
        assert bool(kernel.refuse(other)) == (name == "triton_attend_int4")


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_configs_are_many_from_few_binaries_and_estimates_prefer_splits(name: str) -> None:
    kernel = BY_NAME[name]
    assert kernel.configs is not None
    for gpu in ("h200", "rtx4090"):
        for asked in (problem(), problem(n_rows=1, t_bucket=64), problem(n_queries=8, group=16)):
            asked = replace(asked, machine=load_device(gpu))
            found = kernel.configs(asked)
            assert found == kernel.configs(asked) and len(set(found)) == len(found)
            binaries = {tuple(c for c in one if c[0] != "splits") for one in found}
            assert 0 < len(binaries) <= 60 and len(found) <= 400
            seconds = [kernel.seconds(asked, one) for one in found]
            assert all(0 < s < 1 for s in seconds)
    alone = replace(problem(), n_rows=1, machine=load_device("h200"))
    best = min(kernel.configs(alone), key=lambda one: kernel.seconds(alone, one))
    assert dict(best)["splits"] >= 8, "one row of 8 heads cannot fill a GPU without splits"


def test_estimates_are_not_below_the_memory_limit() -> None:
    kernel, asked = BY_NAME["triton_attend_int4"], problem()
    assert kernel.configs is not None and asked.machine is not None
    n_bytes = 16 * 8 * 32768 * (128 + 8)
    limit = n_bytes / (asked.machine.bandwidth_bytes_per_second or 1)
    best = min(kernel.seconds(asked, one) for one in kernel.configs(asked))
    assert limit <= best <= 1.5 * limit


_COMPILE = """
import torch
from dataclasses import replace
from fewbit.kernels_triton.decode_attention import KERNELS
from fewbit.quant.formats.int4_head import Int4HeadOptions
from fewbit.quant.kernel import AttentionProblem
options = Int4HeadOptions()
asked = AttentionProblem("int4_head", options, "int4_head", options, 1, 1, 8, 4, 128, 128, 4096,
                         torch.bfloat16, "cuda", extras=("mask",))
config = (("rows", 8), ("splits", 2), ("stages", 3), ("tokens", 64), ("warps", 2))
for cc in ((8, 0), (9, 0)):
    for found in KERNELS[0].compile(asked, config, cc):
        print(cc, found.registers, found.stack_bytes, found.smem_bytes)
"""


@needs_triton
def test_compiles_without_a_gpu_and_without_spills() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4, "an attention kernel and a sum for each capability"
    assert all(line.split()[3] == "0" for line in lines), done.stdout


def test_formats_of_records() -> None:
    assert {kernel.op for kernel in KERNELS} == {"attend"}
    assert all(kernel.source and kernel.compile for kernel in KERNELS)
    assert set(decode_attention._FORMATS) == set(BY_NAME)
