"""Cache layers on random tensors: any cut, any crop, any reordering reads what it should."""

import copy
from typing import Any

import pytest
import torch

from fewbit.quant import kv_cache, kv_pages, kv_softmax
from fewbit.quant.errors import FewbitError
from fewbit.quant.kv_attention import Scoring, attend
from fewbit.quant.kv_cache import KVCache, PackedLayer
from fewbit.quant.kv_policy import parse_kv

ROWS, HEADS, DIM, VALUE_DIM = 2, 2, 8, 6
DENSE, INT4 = {"format": "dense_head"}, {"format": "int4_head"}
FORMATS = pytest.mark.parametrize("form", [DENSE, INT4], ids=["dense", "int4"])
WINDOWS = pytest.mark.parametrize(("residual", "sink"), [(0, 0), (0, 4), (8, 0), (20, 4)])


def layer_of(form: Any, residual: int = 0, sink: int = 0, **settings: Any) -> PackedLayer:
    prefill = settings.pop("prefill", "stored")
    tree = {"key": form, "value": form, "residual": residual, "sink": sink, "prefill": prefill}
    return PackedLayer(parse_kv(tree, "kv"), **settings)


def tokens(n: int, seed: int = 0, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, HEADS, n, DIM, generator=generator),
        torch.randn(rows, HEADS, n, VALUE_DIM, generator=generator),
    )


def queries(n: int) -> torch.Tensor:
    return torch.randn(ROWS, 2 * HEADS, n, DIM, generator=torch.Generator().manual_seed(99))


def feed(
    layer: PackedLayer, new: tuple[torch.Tensor, ...], pieces: list[int], asked: torch.Tensor
) -> torch.Tensor:
    """Outputs [B, H, n, Dv] of queries `asked` [B, H, n, D], one for each new token."""
    outputs, at = [], 0
    for n in pieces:
        part = slice(at, at + n)
        key, value = layer.update(new[0][:, :, part], new[1][:, :, part])
        assert key.shape[2] == value.shape[2] == layer.get_seq_length()
        scoring = Scoring(0.4, None, True, None, None)
        outputs.append(attend(key.view, asked[:, :, part], scoring))
        at += n
    assert at == new[0].shape[2]
    return torch.cat(outputs, dim=2)


@FORMATS
@WINDOWS
@pytest.mark.parametrize("pieces", [[1] * 170, [16] * 10 + [10], [100, 1, 1, 3, 65], [66, 65, 39]])
def test_how_a_text_is_cut_changes_nothing(
    form: Any, residual: int, sink: int, pieces: list[int]
) -> None:
    new = tokens(170)
    whole = feed(layer_of(form, residual, sink), new, [170], queries(170))
    parts = feed(layer_of(form, residual, sink), new, pieces, queries(170))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@WINDOWS
def test_dense_pages_equal_plain_attention(residual: int, sink: int) -> None:
    new, asked = tokens(150), queries(150)
    found = feed(layer_of(DENSE, residual, sink), new, [70, 1, 79], asked)
    expected = torch.nn.functional.scaled_dot_product_attention(
        asked, *new, is_causal=True, scale=0.4, enable_gqa=True
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@WINDOWS
def test_each_token_is_read_in_the_form_that_the_policy_says(residual: int, sink: int) -> None:
    """With one query that looks at one key only, the output is that token's value."""
    layer = layer_of(INT4, residual, sink)
    keys, values = tokens(100)
    view = layer.update(keys, values)[0].view
    plain = layer_of(INT4)
    plain.update(keys, values)
    stored = plain._read(0, 100)[1]
    assert not torch.equal(stored, values)
    for query in (0, 3, 50, 99):
        for key in {0, 3, sink, max(0, query - residual), max(0, query - residual + 1), query}:
            if key > query:
                continue
            mask = torch.zeros(1, 1, 100, 100, dtype=torch.bool)
            mask[:, :, query, key] = True
            found = attend(view, queries(100), Scoring(1.0, mask, True, None, None))
            dense = key < sink or query - key < residual
            wanted = (values if dense else stored)[:, :, key]
            torch.testing.assert_close(found[:, ::2, query], wanted, rtol=1e-5, atol=1e-6)


@FORMATS
@WINDOWS
@pytest.mark.parametrize("n_cropped", [1, 30, 64])
def test_cropping_and_growing_again_equals_a_fresh_run(
    form: Any, residual: int, sink: int, n_cropped: int
) -> None:
    new, more = tokens(150), tokens(90, seed=1)
    layer = layer_of(form, residual, sink)
    feed(layer, new, [100, 1, 49], queries(150))
    layer.crop(-n_cropped)
    kept = 150 - n_cropped
    assert layer.get_seq_length() == kept
    found = feed(layer, more, [3, 1, 86], queries(90))
    fresh = layer_of(form, residual, sink)
    feed(fresh, tuple(part[:, :, :kept] for part in new), [kept], queries(kept))
    wanted = feed(fresh, more, [90], queries(90))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@WINDOWS
@pytest.mark.parametrize("n_cropped", [65, 100, 149])
def test_deeper_crops_read_the_codes(residual: int, sink: int, n_cropped: int) -> None:
    new, more = tokens(150), tokens(40, seed=1)
    layer, plain = layer_of(INT4, residual, sink), layer_of(INT4, 0, sink)
    for one in (layer, plain):
        feed(one, new, [150], queries(150))
    layer.crop(-n_cropped)
    plain.crop(-n_cropped)
    kept = 150 - n_cropped
    assert layer.get_seq_length() == plain.get_seq_length() == kept
    if n_cropped >= residual + 64:  # no dense copy is left: read as without a window
        first = tuple(part[:, :, :1] for part in more)
        found = layer._decoded(layer.update(*first)[0].view)
        wanted = plain._decoded(plain.update(*first)[0].view)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one[:, :, :kept], other[:, :, :kept])
        layer.crop(-1)
    rest = feed(layer, more, [1] * 40, queries(40))
    assert bool(rest.isfinite().all()) and layer.get_seq_length() == kept + 40
    fresh = layer_of(INT4, residual, sink)
    feed(fresh, tuple(part[:, :, :kept] for part in new), [kept], queries(kept))
    expected = feed(fresh, more, [1] * 40, queries(40))
    # Once the window has passed the crop, nothing remembers it.
    late = slice(residual, None)
    torch.testing.assert_close(rest[:, :, late], expected[:, :, late], rtol=1e-4, atol=1e-5)


def test_crop_takes_any_depth_and_both_signs() -> None:
    layer = layer_of(INT4, 8, 4)
    layer.crop(-3)
    feed(layer, tokens(100), [100], queries(100))
    layer.crop(0)
    assert layer.get_seq_length() == 100
    layer.crop(90)  # the older form: tokens that stay
    assert layer.get_seq_length() == 90
    layer.crop(-1000)
    assert layer.get_seq_length() == 0 and layer.get_mask_sizes(5) == (5, 0)
    again = feed(layer, tokens(100), [100], queries(100))
    fresh = feed(layer_of(INT4, 8, 4), tokens(100), [100], queries(100))
    assert torch.equal(again, fresh)
    layer.reset()
    assert layer.get_seq_length() == 0


@FORMATS
@WINDOWS
def test_rows_are_reordered_repeated_and_selected(form: Any, residual: int, sink: int) -> None:
    new, more = tokens(100, rows=3), tokens(30, seed=1)
    order = torch.tensor([2, 0])
    layer = layer_of(form, residual, sink, starts=torch.tensor([0, 5, 9]))
    layer.update(*new)
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([4, 5, 0, 1]))
    layer.batch_select_indices(torch.tensor([True, False, True, False]))
    found = feed(layer, more, [1] * 30, queries(30))
    fresh = layer_of(form, residual, sink, starts=torch.tensor([9, 0]))
    fresh.update(new[0][order], new[1][order])
    torch.testing.assert_close(found, feed(fresh, more, [30], queries(30)), rtol=1e-4, atol=1e-5)


def test_sinks_begin_after_the_padding_of_each_row() -> None:
    starts = torch.tensor([0, 70])
    keys, values = tokens(150)
    layer = layer_of(INT4, 0, 3, starts=starts)
    for part in (slice(0, 72), slice(72, 150)):  # the second row's sinks arrive in two calls
        layer.update(keys[:, :, part], values[:, :, part])
    found = layer._read(0, 150)[1]
    for row, start in enumerate(starts.tolist()):
        same = (found[row] == values[row]).all(-1).all(0)
        assert same.nonzero().flatten().tolist() == [start, start + 1, start + 2]


def test_exact_prefill_attends_to_what_was_computed_then_to_what_is_stored() -> None:
    new, asked = tokens(80), queries(80)
    layer = layer_of(INT4, prefill="exact")
    first = feed(layer, tuple(p[:, :, :60] for p in new), [60], asked[:, :, :60])
    plain = feed(layer_of(DENSE), tuple(p[:, :, :60] for p in new), [60], asked[:, :, :60])
    torch.testing.assert_close(first, plain, rtol=1e-4, atol=1e-5)
    rest = feed(layer, tuple(p[:, :, 60:] for p in new), [20], asked[:, :, 60:])
    stored = feed(layer_of(INT4), new, [80], asked)
    torch.testing.assert_close(rest, stored[:, :, 60:], rtol=1e-4, atol=1e-5)


@FORMATS
@WINDOWS
def test_decoded_tensors_hold_what_a_single_query_reads(
    form: Any, residual: int, sink: int
) -> None:
    new, asked = tokens(100), queries(1)
    layer = layer_of(form, residual, sink, handles=False)
    layer.update(*(part[:, :, :99] for part in new))
    keys, values = layer.update(*(part[:, :, 99:] for part in new))
    assert keys.shape == (ROWS, HEADS, 100, DIM) and values.shape == (ROWS, HEADS, 100, VALUE_DIM)
    twin = layer_of(form, residual, sink)
    twin.update(*(part[:, :, :99] for part in new))
    last = tuple(part[:, :, 99:] for part in new)
    found = torch.nn.functional.scaled_dot_product_attention(
        asked, keys, values, scale=0.4, enable_gqa=True
    )
    torch.testing.assert_close(found, feed(twin, last, [1], asked), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("residual", [0, 16])
def test_a_step_copies_nothing_that_grows_with_the_text(
    residual: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_softmax, "_RUN_ELEMENTS", 64 * DIM * HEADS * ROWS)
    layer = layer_of(INT4, residual, 4, reserve=2000)
    layer.update(*tokens(1500))
    arena = layer._arena()
    reads: list[int] = []
    read = kv_pages.PageArena.read

    def spy(self: Any, start: int, stop: int, dtype: torch.dtype) -> Any:
        reads.append(stop - start)
        return read(self, start, stop, dtype)

    monkeypatch.setattr(kv_pages.PageArena, "read", spy)
    tensors = [*arena.tensors(), *(layer.tail.buffers if layer.tail else ())]
    before, n_bytes = [tensor.data_ptr() for tensor in tensors], layer.n_bytes
    frozen = [p[: 1400 // 64].clone() for side in arena.storage for p in side.values()]
    feed(layer, tokens(200, seed=1), [1] * 200, queries(200))
    after = [*arena.tensors(), *(layer.tail.buffers if layer.tail else ())]
    assert [tensor.data_ptr() for tensor in after] == before, "storage was copied"
    assert layer.n_bytes == n_bytes
    assert max(reads) == 64, "more than a run was decoded at once"
    now = [p[: 1400 // 64] for side in arena.storage for p in side.values()]
    assert all(map(torch.equal, frozen, now)), "a stored token was written again"


def test_bytes_are_those_of_all_tensors() -> None:
    layer = layer_of(INT4, 16, 4, reserve=128)
    layer.update(*tokens(70))
    per_token = DIM // 2 + VALUE_DIM // 2 + 2 * 4
    pages = ROWS * HEADS * 128 * per_token + 2 * ROWS * 2 * 8  # + table, references
    dense = ROWS * HEADS * (16 + 64 + 64 + 4) * (DIM + VALUE_DIM) * 4
    assert layer.n_bytes == pages + dense + ROWS * 8  # + where the sinks begin
    padded = layer_of(INT4, 16, 4, reserve=128, starts=torch.tensor([0, 3]))
    padded.update(*tokens(70))
    assert padded._read(0, 10)[0].shape[2] == 10
    assert padded.n_bytes == layer.n_bytes + 3 * ROWS * 4 * 8, "where they lie is remembered"


def test_offloading_and_copies() -> None:
    layer = layer_of(INT4, 8, 4)
    new = tokens(100)
    layer.update(*(part[:, :, :90] for part in new))
    twin = copy.deepcopy(layer)
    layer.offload()
    layer.prefetch()
    rest = tuple(part[:, :, 90:] for part in new)
    found = feed(layer, rest, [10], queries(10))
    assert torch.equal(feed(twin, rest, [10], queries(10)), found)
    assert twin.get_seq_length() == 100


def test_wrong_rows_are_named() -> None:
    layer = layer_of(INT4)
    layer.update(*tokens(3))
    with pytest.raises(FewbitError, match="holds 2 rows, got 3"):
        layer.update(*tokens(3, rows=3))
    padded = layer_of(INT4, 0, 2, starts=torch.tensor([0, 1, 2]))
    with pytest.raises(FewbitError, match="3 rows of padding, got 2 rows"):
        padded.update(*tokens(3))


def test_a_cache_replaces_layers_of_full_attention_only() -> None:
    from transformers import AutoConfig
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

    known = dict(DYNAMIC_LAYER_TYPE_MAPPING)
    config = AutoConfig.for_model(
        "gemma2", num_hidden_layers=2, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    cache = KVCache(config, parse_kv({"key": INT4, "value": INT4}, "kv"))
    assert [type(layer).__name__ for layer in cache.layers] == [
        "DynamicSlidingWindowLayer",
        "PackedLayer",
    ]
    assert known == DYNAMIC_LAYER_TYPE_MAPPING, "the library's own caches were changed"
    assert not cache.is_compileable and cache.is_sliding == [True, False]
    assert cache.n_bytes == 0 and cache.get_seq_length(1) == 0
    cache.update(*tokens(5), 0)
    assert cache.n_bytes == ROWS * HEADS * 5 * (DIM + VALUE_DIM) * 4
    assert kv_cache.is_packed(cache.layers[0]) is False


@pytest.mark.parametrize("residual", [8, 64])
def test_tokens_are_stored_in_blocks_and_ahead_of_need(
    residual: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    append = kv_pages.PageArena.append

    def spy(self: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        calls.append(keys.shape[2])
        append(self, keys, values)

    monkeypatch.setattr(kv_pages.PageArena, "append", spy)
    layer = layer_of(INT4, residual)
    new, asked = tokens(300), queries(300)
    found = feed(layer, new, [100, *[1] * 200], asked)
    assert 2 < len(calls) <= 1 + 200 // residual, "each token that leaves the window costs a call"
    layer.crop(-30)
    again = feed(layer, tuple(p[:, :, 270:] for p in new), [1] * 30, asked[:, :, 270:])
    torch.testing.assert_close(again, found[:, :, 270:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("handles", [True, False])
@FORMATS
def test_a_cache_goes_on_outside_of_inference_mode(form: Any, handles: bool) -> None:
    new = tokens(400)
    starts = torch.tensor([0, 5])
    caches = [layer_of(form, 20, 4, handles=handles, starts=starts) for _ in range(2)]
    cuts = (slice(0, 90), slice(90, 91), slice(91, 170), slice(170, 171), slice(171, 400))
    for index, cut in enumerate(cuts):
        part = tuple(vectors[:, :, cut] for vectors in new)
        with torch.inference_mode(index < 2):
            caches[0].update(*(vectors.clone() for vectors in part))
            if index == 1:
                caches[0].batch_select_indices(torch.tensor([1, 0]))
                caches[0].batch_select_indices(torch.tensor([1, 0]))
        caches[1].update(*part)
    caches[0].reorder_cache(torch.tensor([0, 1]))
    for one, other in zip(caches[0]._read(0, 380), caches[1]._read(0, 380), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("handles", [True, False])
def test_backward_through_a_cache_is_refused_by_name(handles: bool) -> None:
    layer = layer_of(DENSE, 8, 2, handles=handles)
    keys, values = (part.requires_grad_() for part in tokens(20))
    for part in (slice(0, 12), slice(12, 20)):
        key, value = layer.update(keys[:, :, part], values[:, :, part])
    asked = queries(8).requires_grad_()
    scoring = Scoring(0.4, None, True, None, None)
    output = attend(key.view, asked, scoring) if handles else value
    with pytest.raises(FewbitError, match=r"takes no gradient.*use_cache=False"):
        output.sum().backward()
    assert not any(tensor.requires_grad for tensor in layer._arena().tensors())


def test_sinks_that_begin_apart_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(INT4, 0, 3, starts=torch.tensor([0, 70]))
    keys, values = tokens(150)
    layer.update(keys, values)
    found = [layer._read(0, 150) for _ in range(2)]
    monkeypatch.setattr(torch.Tensor, "nonzero", None)  # a search now would fail
    found.append(layer._read(0, 149))
    assert torch.equal(found[2][1], found[0][1][:, :, :149])
    assert torch.equal(found[1][0], found[0][0])


@pytest.mark.parametrize("handles", [True, False])
def test_autocast_around_an_update_changes_nothing(handles: bool) -> None:
    new = tokens(100)
    plain, cast = (layer_of(INT4, 8, 2, handles=handles) for _ in range(2))
    plain.update(*new)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast.update(*new)
    for one, other in zip(plain._read(0, 92), cast._read(0, 92), strict=True):
        assert torch.equal(one, other)
