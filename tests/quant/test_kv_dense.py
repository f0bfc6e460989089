"""Tails and sinks by themselves: what is pushed is held, cropped and selected; where sinks begin."""

import pytest
import torch

from fewbit.quant.kv_dense import SLACK, Sink, Tail

ROWS, HEADS, DIM, VALUE_DIM = 2, 3, 4, 6


def tokens(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(ROWS, HEADS, n, DIM, generator=generator),
        torch.randn(ROWS, HEADS, n, VALUE_DIM, generator=generator),
    )


@pytest.mark.parametrize("pieces", [[200], [1] * 200, [64, 65, 1, 3, 67], [10, 190]])
def test_a_tail_holds_the_newest_tokens(pieces: list[int]) -> None:
    kept, new = 20, tokens(200)
    tail = Tail(*new, kept)
    before = [buffer.data_ptr() for buffer in tail.buffers]
    at = 0
    for n in pieces:
        first = max(tail.start, at - 5)
        band = tail.push(tuple(side[:, :, at : at + n] for side in new), first)
        at += n
        for found, side in zip(band, new, strict=True):
            assert torch.equal(found, side[:, :, first:at])
        assert tail.stop == at and min(kept, at) <= tail.stop - tail.start <= kept + SLACK
    assert [buffer.data_ptr() for buffer in tail.buffers] == before


def test_a_tail_is_cropped_and_selected() -> None:
    new = tokens(50)
    tail = Tail(*new, 30)
    tail.push(new, 0)
    tail.crop(45)
    tail.select(torch.tensor([1, 1, 0]))
    more = tuple(torch.cat([side, side[:1]])[:, :, :2] for side in tokens(2, seed=1))
    band = tail.push(more, 40)
    for found, side, added in zip(band, new, more, strict=True):
        assert torch.equal(found, torch.cat([side[[1, 1, 0], :, 40:45], added], dim=2))


@pytest.mark.parametrize("starts", [[0, 0], [2, 70]])
def test_sinks_replace_their_tokens_and_no_others(starts: list[int]) -> None:
    new, other = tokens(100), tokens(100, seed=1)
    sink = Sink(*new, 4, torch.tensor(starts))
    for cut in (slice(0, 3), slice(3, 71), slice(71, 100)):
        sink.fill(tuple(side[:, :, cut] for side in new), cut.start)
    for start, stop in ((0, 100), (1, 5), (60, 80), (90, 100)):
        run = tuple(side[:, :, start:stop].clone() for side in other)
        sink.lay_over(run, start)
        for found, side, plain in zip(run, new, other, strict=True):
            for row, first in enumerate(starts):
                for at in range(start, stop):
                    wanted = side if first <= at < first + 4 else plain
                    assert torch.equal(found[row, :, at - start], wanted[row, :, at])


def test_where_sinks_begin_follows_the_rows_and_the_device() -> None:
    sink = Sink(*tokens(5), 4, torch.tensor([3, 9]))
    assert sink.starts_on_device.tolist() == [3, 9]
    sink.select(torch.tensor([1, 0, 1]))
    assert sink.starts_on_device.tolist() == sink.starts.tolist() == [9, 3, 9]
    n_tensors = len(list(sink.tensors()))
    sink.to(torch.device("meta"))
    assert sink.starts_on_device.device.type == "meta" and sink.starts.device.type == "cpu"
    assert len(list(sink.tensors())) == n_tensors + 1
