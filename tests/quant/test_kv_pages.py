"""The arena: what is appended is read, pages are shared and written once, bytes are counted."""

import hashlib
from itertools import pairwise
from typing import Any

import pytest
import torch

from fewbit.kernels_triton import _triton
from fewbit.quant import dispatch, kv_pages
from fewbit.quant.formats.dense_head import DenseHeadOptions
from fewbit.quant.formats.int4_head import Int4HeadOptions
from fewbit.quant.kv_pages import PAGE, PageArena, Side
from fewbit.quant.kv_policy import PageUse
from fewbit.quant.ladder import Candidate

DENSE = PageUse("dense_head", DenseHeadOptions())
INT4 = PageUse("int4_head", Int4HeadOptions())
CPU = torch.device("cpu")


def arena(use: PageUse = DENSE, rows: int = 3, reserve: int = 0, dims: Any = (6, 4)) -> PageArena:
    sides = (Side(use, 2, dims[0], torch.float32), Side(use, 1, dims[1], torch.float32))
    return PageArena(sides, rows, CPU, reserve)


def tokens(rows: int, n: int, seed: int = 0, dims: Any = (6, 4)) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 2, n, dims[0], generator=generator),
        torch.randn(rows, 1, n, dims[1], generator=generator),
    )


@pytest.mark.parametrize("pieces", [[200], [1] * 130, [63, 1, 1, 63, 64, 5], [64, 64]])
def test_any_cut_reads_back(pieces: list[int]) -> None:
    pages = arena()
    keys, values = tokens(3, sum(pieces))
    at = 0
    for n in pieces:
        pages.append(keys[:, :, at : at + n], values[:, :, at : at + n])
        at += n
    for start, stop in ((0, at), (1, at), (at - 1, at), (PAGE, at), (60, 70)):
        found = pages.read(start, min(stop, at), torch.float32)
        assert torch.equal(found[0], keys[:, :, start:stop])
        assert torch.equal(found[1], values[:, :, start:stop])


def test_reserved_storage_never_moves_and_is_exact() -> None:
    pages = arena(rows=2, reserve=130)
    before = [tensor.data_ptr() for tensor in pages.tensors()]
    keys, values = tokens(2, 192)
    for at in range(192):
        pages.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
    assert [tensor.data_ptr() for tensor in pages.tensors()] == before
    assert pages.storage[0]["values"].shape[0] == 2 * 3, "130 tokens are 3 pages in each row"
    pages.append(keys[:, :, :1], values[:, :, :1])
    assert pages.storage[0]["values"].shape[0] == 8, "one token more grows by a page a row"
    assert torch.equal(pages.read(0, 192, torch.float32)[0], keys)


def test_selected_rows_share_full_pages_and_part_on_writing() -> None:
    pages = arena(reserve=300)
    keys, values = tokens(3, 100)
    pages.append(keys, values)
    rows = torch.tensor([1, 1, 0])
    pages.select(rows)
    assert int((pages._references > 0).sum()) == 4, "two rows remain, two pages each"
    more = tokens(3, 70, seed=1)
    pages.append(*more)
    expected = torch.cat([keys[rows], more[0]], dim=2)
    assert torch.equal(pages.read(0, 170, torch.float32)[0], expected)
    table = pages._table
    assert table[0, 0] == table[1, 0], "a full page was copied"
    assert table[0, 1] != table[1, 1], "rows that differ share a page"
    assert int((pages._references > 0).sum()) == 2 + 3 + 3


def test_rows_can_be_repeated_and_dropped() -> None:
    pages = arena(rows=2)
    keys, values = tokens(2, 70)
    pages.append(keys, values)
    pages.select(torch.tensor([0, 0, 0, 1]))
    more = tokens(4, 1, seed=2)
    pages.append(*more)
    pages.select(torch.tensor([3, 1]))
    expected = torch.cat([keys[[1, 0]], more[0][[3, 1]]], dim=2)
    assert torch.equal(pages.read(0, 71, torch.float32)[0], expected)
    assert int((pages._references > 0).sum()) == 4, "pages of dropped rows are free again"


def test_truncated_tokens_are_replaced_without_touching_sharers() -> None:
    pages = arena(rows=2)
    keys, values = tokens(2, 150)
    pages.append(keys, values)
    pages.select(torch.tensor([0, 0]))
    pages.truncate(65)
    assert pages.n_tokens == 65 and int((pages._references > 0).sum()) == 2
    more = tokens(2, 70, seed=3)
    pages.append(*more)
    expected = torch.cat([keys[[0, 0], :, :65], more[0]], dim=2)
    assert torch.equal(pages.read(0, 135, torch.float32)[0], expected)
    pages.truncate(0)
    assert pages.n_tokens == 0 and int((pages._references > 0).sum()) == 0


def test_random_histories_equal_plain_tensors() -> None:
    """Appends, reorders and crops in random order, against tensors that are simply concatenated."""
    generator = torch.Generator().manual_seed(5)

    def draw(top: int) -> int:
        return int(torch.randint(top, (), generator=generator))

    pages, plain = arena(rows=2), torch.empty(2, 2, 0, 6)
    for step in range(150):
        action, rows = draw(4), plain.shape[0]
        if action < 2:
            new = tokens(rows, 1 + draw(90 if action else 2), seed=step)
            pages.append(*new)
            plain = torch.cat([plain, new[0]], dim=2)
        elif action == 2:
            chosen = torch.randint(rows, (1 + draw(4),), generator=generator)
            pages.select(chosen)
            plain = plain[chosen]
        else:
            left = max(0, plain.shape[2] - draw(100))
            pages.truncate(left)
            plain = plain[:, :, :left]
        assert pages.n_tokens == plain.shape[2]
        assert torch.equal(pages.read(0, pages.n_tokens, torch.float32)[0], plain)
        used = pages._table[:, : pages._n_columns]
        assert torch.equal(
            pages._references, torch.bincount(used.flatten(), minlength=pages._references.numel())
        )


def test_codes_never_change_over_two_thousand_steps() -> None:
    pages = arena(INT4, rows=1)
    keys, values = tokens(1, 2000)
    digests: dict[int, str] = {}

    def digest(column: int) -> str:
        page = int(pages._table[0, column])
        parts = [part[page] for side in pages.storage for part in side.values()]
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()

    for at in range(2000):
        pages.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
        if pages.n_tokens % PAGE == 0:
            digests[at // PAGE] = digest(at // PAGE)
    assert len(digests) == 31
    assert all(digest(column) == found for column, found in digests.items())
    whole = arena(INT4, rows=1)
    whole.append(keys, values)
    for one, other in zip(pages.read(0, 2000, torch.float32), whole.read(0, 2000, torch.float32),
                          strict=True):  # fmt: skip
        assert torch.equal(one, other), "codes depend on how a text was cut"


@pytest.mark.parametrize(("dim", "share"), [(128, 0.27), (64, 0.285)])
def test_bytes_at_4096_tokens(dim: int, share: float) -> None:
    sides = tuple(Side(INT4, 8, dim, torch.bfloat16) for _ in range(2))
    pages = PageArena((sides[0], sides[1]), 2, CPU, reserve=4096)
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in pages.tensors())
    by_hand = 2 * 8 * 2 * 4096 * (dim // 2 + 4) + 2 * 64 * 8 + 2 * 64 * 8  # + table, references
    assert n_bytes == by_hand
    assert n_bytes <= share * (2 * 8 * 2 * 4096 * dim * 2)


def test_moving_to_another_device_keeps_the_table_on_the_host() -> None:
    pages = arena(rows=1)
    pages.append(*tokens(1, 3))
    pages.to(torch.device("meta"))
    assert pages.device.type == "meta" and pages._table.device.type == "cpu"


@pytest.mark.parametrize(("dim", "share"), [(128, 0.27), (64, 0.285)])
def test_bytes_of_storage_that_grew(dim: int, share: float) -> None:
    sides = (Side(INT4, 2, dim, torch.bfloat16), Side(INT4, 2, dim, torch.bfloat16))
    pages = PageArena(sides, 1, CPU)
    step = torch.zeros(1, 2, PAGE, dim, dtype=torch.bfloat16)
    pointers: list[int] = []
    for n_tokens in range(PAGE, 6000, PAGE):
        pages.append(step, step)
        pointers.append(pages.storage[0]["codes"].data_ptr())
        if n_tokens >= 1024:
            n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in pages.tensors())
            assert n_bytes <= 1.06 * share * (2 * 2 * n_tokens * dim * 2), f"{n_tokens} tokens"
    n_moves = sum(one != other for one, other in pairwise(pointers))
    assert 30 < n_moves < 60, "storage grows at every page, or never"


def test_growth_moves_one_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = arena(INT4, rows=2, dims=(64, 64))
    pages.append(*tokens(2, 64 * PAGE, dims=(64, 64)))
    held: list[int] = []
    new_zeros = torch.Tensor.new_zeros

    def spy(self: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
        held.append(sum(t.numel() * t.element_size() for t in pages.tensors()))
        return new_zeros(self, *args, **settings)

    monkeypatch.setattr(torch.Tensor, "new_zeros", spy)
    before = held[0] if held else sum(t.numel() * t.element_size() for t in pages.tensors())
    pages.append(*tokens(2, PAGE, dims=(64, 64)))
    assert len(held) >= 6 and max(held) < before * 1.07, "old storage and new are both alive"


@pytest.mark.parametrize("use", [DENSE, INT4], ids=["dense", "int4"])
def test_pages_in_order_and_out_of_order_read_alike(use: PageUse) -> None:
    keys, values = tokens(3, 200)
    ordered, gathered = arena(use), arena(use)
    for at in range(0, 200, 8):
        for pages in (ordered, gathered):
            pages.append(keys[:, :, at : at + 8], values[:, :, at : at + 8])
        if at == 96:
            gathered.select(torch.tensor([2, 0, 1]))
            gathered.select(torch.tensor([1, 2, 0]))
            gathered.select(torch.tensor([0, 1, 2, 0, 1, 2]))
            gathered.append(*(torch.cat([part] * 2)[:, :, :1] for part in (keys, values)))
            gathered.truncate(104)
            gathered.select(torch.tensor([0, 1, 2]))  # whose last pages are copies
            assert not gathered._in_order
    assert ordered._in_order
    for start, stop in ((0, 200), (70, 130), (64, 128), (3, 4)):
        found = ordered.read(start, stop, torch.float32)
        for one, other in zip(found, gathered.read(start, stop, torch.float32), strict=True):
            assert torch.equal(one, other)


def test_what_is_read_is_not_the_storage() -> None:
    sides = (Side(DENSE, 1, 4, torch.float32), Side(DENSE, 1, 4, torch.float32))
    pages = PageArena(sides, 1, CPU)
    vectors = torch.randn(1, 1, 10, 4)
    pages.append(vectors, vectors)
    pages.read(0, 10, torch.float32)[0].zero_()
    assert torch.equal(pages.read(0, 10, torch.float32)[0], vectors)


def test_pages_made_in_inference_mode_are_written_outside() -> None:
    with torch.inference_mode():
        pages = arena(rows=2)
        pages.append(*tokens(2, 70))
        pages.select(torch.tensor([1, 1]))
        pages.append(*tokens(2, 70))
        pages.to(CPU)
    assert not any(tensor.is_inference() for tensor in pages.tensors())
    pages.append(*tokens(2, 70))
    pages.select(torch.tensor([1, 0]))
    pages.append(*tokens(2, 1))
    assert pages.n_tokens == 211


def test_pages_are_handed_to_kernels_without_a_copy() -> None:
    pages = arena(INT4, dims=(8, 8))
    pages.append(*tokens(3, 70, dims=(8, 8)))
    sink = tokens(3, 2, dims=(8, 8))
    given = pages.paged((sink[0], sink[1]), torch.zeros(3, dtype=torch.int64))
    assert (given.key, given.value) == (INT4, INT4) and given.sink is not None
    for parts, storage in zip((given.keys, given.values), pages.storage, strict=True):
        assert list(parts) == ["codes", "scale", "minimum"]
        assert all(parts[name] is storage[name] for name in parts)
    assert given.table[:, :2].tolist() == pages._table[:, :2].tolist()
    pages.select(torch.tensor([2, 0]))
    assert pages.paged().table.shape[0] == 2 and pages.paged().sink is None


def test_without_a_kernel_for_it_the_gpu_would_be_written_by_torch() -> None:
    """Sides of different numbers of heads; and what the dispatcher answers on this machine."""
    assert arena(INT4)._kernel(tokens(3, 1)[0]) is None
    problem = arena(INT4)._problem(4, torch.float32, "cpu")
    assert problem.op == "append_kv" and problem.k == 2 * 6 + 1 * 4
    assert kv_pages.chosen_write(problem) is None


@pytest.mark.skipif(not _triton.interpreted(), reason="kernels do not run in the interpreter here")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_kernels_write_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of tokens, single ones, beams that part, and crops, in two arenas side by side."""
    use = PageUse("int4_head", Int4HeadOptions("range"))
    sides = (Side(use, 2, 8, torch.bfloat16), Side(use, 2, 4, torch.bfloat16))
    chosen = Candidate("triton_append_int4", (("heads", 2), ("warps", 1)))
    monkeypatch.setattr(dispatch, "choice", lambda problem: chosen)
    pair = [PageArena(sides, 2, CPU), PageArena(sides, 2, CPU)]
    generator = torch.Generator().manual_seed(0)
    orders = {60: torch.tensor([1, 1]), 66: torch.tensor([1, 0, 0])}
    n_rows = 2
    for n in (59, 1, 5, 1, 1, 3):
        keys, values = (
            torch.randn(n_rows, 2, n, d, generator=generator).bfloat16() for d in (8, 4)
        )
        for device, pages in zip(("cuda", "cpu"), pair, strict=True):
            monkeypatch.setattr(kv_pages, "_DEVICES", (device,))
            pages.append(keys, values)
            if pages.n_tokens in orders:
                pages.select(orders[pages.n_tokens])
        n_rows = pair[0].n_rows
    assert n_rows == 3 and not pair[1]._in_order
    for one, other in zip(*(pages.storage for pages in pair), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
