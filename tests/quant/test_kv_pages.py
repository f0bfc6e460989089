"""The arena: what is appended is read, pages are shared and written once, bytes are counted."""

import hashlib
from typing import Any

import pytest
import torch

from fewbit.quant.formats.dense_head import DenseHeadOptions
from fewbit.quant.formats.int4_head import Int4HeadOptions
from fewbit.quant.kv_pages import PAGE, PageArena, Side
from fewbit.quant.kv_policy import PageUse

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
    assert pages.storage[0]["values"].shape[0] == 9, "one token more grows by half"
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
