"""Which form of a token a query reads, and what handles are."""

import torch

from fewbit.quant.kv_view import Handle, KVView

ROWS, HEADS, DIM, VALUE_DIM = 2, 3, 8, 12


def view_of(n_tokens: int, n_queries: int, band_start: int, residual: int | None) -> KVView:
    def read(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("nothing is read here")

    shapes = tuple(torch.Size((ROWS, HEADS, n_tokens, d)) for d in (DIM, VALUE_DIM))
    return KVView(
        n_tokens, n_queries, band_start, read, None, band_start, residual,
        (shapes[0], shapes[1]), torch.float32, torch.device("cpu"),
    )  # fmt: skip


def test_limits_follow_the_queries_and_end_at_the_band() -> None:
    view = view_of(100, 4, 90, 8)
    assert view.first_limit == 89
    limits = view.limits()
    assert limits is not None and limits.tolist() == [90, 90, 91, 92]


def test_one_form_has_no_limits() -> None:
    view = view_of(100, 4, 100, None)
    assert view.first_limit is None and view.limits() is None and view.pages is None


def test_handles_have_a_shape_and_nothing_of_a_tensor() -> None:
    view = view_of(20, 4, 20, None)
    assert Handle(view, 0).shape == (ROWS, HEADS, 20, DIM)
    assert Handle(view, 1).shape[-1] == VALUE_DIM
    assert Handle(view, 0).dtype == torch.float32 and Handle(view, 0).device.type == "cpu"
    assert not isinstance(Handle(view, 0), torch.Tensor)
