"""Device code of `decode_attention.py`, whose text derives it: one split of the tokens, and their sum.

`row` numbers the queries of one KV head, r = g·Q + q. Tiles of scores are [token, row], tiles of output
[j, row], one for each of the channels 4j, 4j + 1, 4j + 2, 4j + 3.
"""

import torch

from ._compile import pointer
from ._triton import jit, tl

# Two words of four codes each, as pairs of fp16: codes 0 and 2 as code·2⁻²⁴, 1 and 3 as code·2⁻²⁰.
UNPACK = """{
.reg .b32 upper;
shr.u32 upper, $4, 8;
and.b32 $0, $4, 0x000F000F;
and.b32 $1, $4, 0x00F000F0;
and.b32 $2, upper, 0x000F000F;
and.b32 $3, upper, 0x00F000F0;
}"""
_UNPACK = tl.constexpr(UNPACK)
_LIFT = tl.constexpr(16777216.0)  # 2²⁴
_HEADROOM = tl.constexpr(14.0)  # weights are up to 2¹⁴, away from where fp16 loses bits
_NOTHING = tl.constexpr(-1e30)  # the maximum of no scores; finite, so that differences are numbers
_NOWHERE = tl.constexpr(1 << 30)  # a position that no query sees
_SPLITS = tl.constexpr(8)  # that the sum reads at once


@jit
def _codes(words, PTX: tl.constexpr):
    """Channels 4j … 4j + 3 of words j of 16 bits, as fp16 subnormals."""
    if PTX:
        return tl.inline_asm_elementwise(
            _UNPACK, "=r,=r,=r,=r,r", [words], (tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=2,
        )  # fmt: skip
    return (
        (words & 15).to(tl.float16, bitcast=True),
        (words & 240).to(tl.float16, bitcast=True),
        ((words >> 8) & 15).to(tl.float16, bitcast=True),
        ((words >> 8) & 240).to(tl.float16, bitcast=True),
    )


@jit
def _channels(words, DTYPE: tl.constexpr):
    """Channels 4j … 4j + 3 of words j of 64 bits."""
    return (
        words.to(tl.int16).to(DTYPE, bitcast=True),
        (words >> 16).to(tl.int16).to(DTYPE, bitcast=True),
        (words >> 32).to(tl.int16).to(DTYPE, bitcast=True),
        (words >> 48).to(tl.int16).to(DTYPE, bitcast=True),
    )


@jit
def _queries(query, row_at, live, channel, QUARTER: tl.constexpr):
    """Channels 4j … 4j + 3 of each row, [j, row]; 0 outside."""
    at = query + row_at[None, :] + 4 * channel[:, None]
    inside = live[None, :] & (channel < QUARTER)[:, None]
    return (
        tl.load(at, mask=inside, other=0.0),
        tl.load(at + 1, mask=inside, other=0.0),
        tl.load(at + 2, mask=inside, other=0.0),
        tl.load(at + 3, mask=inside, other=0.0),
    )


@jit
def _exponent(q0, q1, q2, q3):
    """Power of two at or below the largest |q| of each row, and its inverse."""
    low = tl.maximum(tl.abs(q0.to(tl.float32)), tl.abs(q1.to(tl.float32)))
    high = tl.maximum(tl.abs(q2.to(tl.float32)), tl.abs(q3.to(tl.float32)))
    bits = tl.max(tl.maximum(low, high), 0).to(tl.int32, bitcast=True) & 0x7F800000
    inverse = tl.maximum(0x7F000000 - bits, 0x00800000)
    return bits.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@jit
def _affine(key_scale, key_minimum, value_scale, value_minimum, place, held):
    """Scale and minimum of keys and values; those of values are 0 where nothing is stored."""
    return (
        tl.load(key_scale + place),
        tl.load(key_minimum + place),
        tl.load(value_scale + place, mask=held, other=0.0),
        tl.load(value_minimum + place, mask=held, other=0.0),
    )


@jit
def _shown(mask, row_mask, mask_token, token, inside):
    """What the mask says, int8 [token, row]."""
    at = mask + (row_mask[None, :] + token[:, None] * mask_token)
    return tl.load(at, mask=inside, other=0)


@jit
def _power(x, PTX: tl.constexpr):
    """2ˣ; on a GPU 0 below 2⁻¹²⁶."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@jit
def _logits(scores, factor, cap, CAPPED: tl.constexpr, PTX: tl.constexpr):
    """scores·factor, as powers of two; capped: cap·tanh of what `factor` makes of it."""
    scores = scores * factor
    if CAPPED:
        scores = cap * (1.0 - 2.0 / (_power(scores, PTX) + 1.0))
    return scores


@jit
def _weights(logits, sizes, top, PTX: tl.constexpr):
    """Weights under a new maximum, that maximum, and by what earlier sums fade."""
    high = tl.maximum(top, tl.max(logits + sizes, 0))
    return _power(logits - (high - _HEADROOM)[None, :], PTX), high, _power(top - high, PTX)


@jit
def _scored(k0, k1, k2, k3, q0, q1, q2, q3):
    scores = tl.dot(k0, q0)
    scores = tl.dot(k1, q1, scores)
    scores = tl.dot(k2, q2, scores)
    return tl.dot(k3, q3, scores)


@jit
def _summed(o0, o1, o2, o3, v0, v1, v2, v3, weight, fade):
    fade = fade[None, :]
    return (
        tl.dot(v0, weight, o0 * fade),
        tl.dot(v1, weight, o1 * fade),
        tl.dot(v2, weight, o2 * fade),
        tl.dot(v3, weight, o3 * fade),
    )


@jit
def _put(at, o0, o1, o2, o3, inside):
    dtype = at.dtype.element_ty
    tl.store(at, o0.to(dtype), mask=inside)
    tl.store(at + 1, o1.to(dtype), mask=inside)
    tl.store(at + 2, o2.to(dtype), mask=inside)
    tl.store(at + 3, o3.to(dtype), mask=inside)


@jit(do_not_specialize=(
    "q_row", "q_head", "q_query", "table_row", "bk_row", "bk_head", "bk_token", "bv_row", "bv_head",
    "bv_token", "sink_count", "mask_row", "mask_head", "mask_query", "mask_token", "n_queries",
    "group", "n_tokens", "n_stored", "band_start", "first_limit", "causal", "has_logits", "splits",
))  # fmt: skip
def attend(
    query, table, key_words, key_scale, key_minimum, value_words, value_scale, value_minimum,
    band_keys, band_values, sink_keys, sink_values, sink_starts, mask, logits, counts, work, output,
    q_row, q_head, q_query, table_row, bk_row, bk_head, bk_token, bv_row, bv_head, bv_token,
    sink_count, mask_row, mask_head, mask_query, mask_token,
    n_queries, group, n_tokens, n_stored, band_start, first_limit, causal, has_logits, splits,
    factor, cap,
    QUARTER: tl.constexpr, CHANNELS: tl.constexpr, VALUE_QUARTER: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, COUNTED: tl.constexpr, PTX: tl.constexpr,
    PART: tl.constexpr, DENSE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    split, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    blocks = tl.cdiv(group * n_queries, ROWS)  # of the queries of one KV head
    head, heads = tl.program_id(1) // blocks, tl.num_programs(1) // blocks
    row = tl.program_id(1) % blocks * ROWS + tl.arange(0, ROWS)
    channel, value_channel = tl.arange(0, CHANNELS), tl.arange(0, VALUE_CHANNELS)
    dtype: tl.constexpr = query.dtype.element_ty
    if COUNTED:
        n_tokens = tl.load(counts + batch).to(tl.int32)
        n_stored = n_tokens
        band_start = n_tokens

    # ---- what each row asks, and what it may see
    asking = row % n_queries
    query_head = head * group + row // n_queries
    live = row < group * n_queries
    row_at = query_head.to(tl.int64) * q_head + asking * q_query
    limit = tl.maximum(first_limit + asking, band_start)  # stored below it, dense from there on
    end = tl.where(causal != 0, n_tokens - n_queries + asking + 1, n_tokens)
    bound = tl.minimum(tl.minimum(limit, end), n_stored)
    row_mask = tl.where(live, query_head * mask_head + asking * mask_query, 0)
    sink_start = tl.load(sink_starts + batch, mask=sink_count > 0, other=0).to(tl.int32)
    query += batch * q_row
    mask += batch * mask_row
    table += batch * table_row

    # ---- which steps are this split's: over pages, then the sink, then the band
    page_steps = tl.cdiv(n_stored, TOKENS if PACKED else DENSE)
    sink_steps = tl.cdiv(sink_count, DENSE)
    all_steps = page_steps + sink_steps + tl.cdiv(n_tokens - band_start, DENSE)
    share = tl.cdiv(all_steps, splits)
    first = split * share
    last = tl.minimum(first + share, all_steps)
    stop = tl.minimum(last, page_steps) if PACKED else first

    top = tl.full([ROWS], _NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    o0 = tl.zeros([VALUE_CHANNELS, ROWS], tl.float32)
    o1 = tl.zeros([VALUE_CHANNELS, ROWS], tl.float32)
    o2 = tl.zeros([VALUE_CHANNELS, ROWS], tl.float32)
    o3 = tl.zeros([VALUE_CHANNELS, ROWS], tl.float32)

    # ---- packed pages
    if PACKED:  # noqa: SIM102
        if first < stop:
            t = tl.arange(0, TOKENS)
            q0, q1, q2, q3 = _queries(query, row_at, live, channel, QUARTER)
            power, inverse = _exponent(q0, q1, q2, q3)
            f0, f1, f2, f3 = q0 * inverse, q1 * inverse, q2 * inverse, q3 * inverse  # fp32
            query_sum = tl.sum(f0 + f1 + f2 + f3, 0)[None, :]
            h0, h1 = f0.to(tl.float16), (f1 * 0.0625).to(tl.float16)
            h2, h3 = f2.to(tl.float16), (f3 * 0.0625).to(tl.float16)
            row_factor = (power * factor)[None, :]
            partial = tl.zeros([PART, ROWS], tl.float32)
            lifted = tl.zeros([PART, ROWS], tl.float32)
            key_at = t[:, None] * QUARTER + channel[None, :]
            value_at = t[None, :] * VALUE_QUARTER + value_channel[:, None]
            place = (
                tl.load(table + first * TOKENS // 64) * heads + head
            ) * 64 + first * TOKENS % 64
            token = first * TOKENS + t
            ks, km, vs, vm = _affine(
                key_scale, key_minimum, value_scale, value_minimum, place + t, token < n_stored
            )
            if MASKED:
                shown = _shown(mask, row_mask, mask_token, token, token[:, None] < bound[None, :])
            for step in tl.range(first, stop):
                if QUARTER == CHANNELS:
                    key = tl.load(key_words + place * QUARTER + key_at)
                else:
                    key = tl.load(key_words + place * QUARTER + key_at,
                                  mask=(channel < QUARTER)[None, :], other=0)  # fmt: skip
                if VALUE_QUARTER == VALUE_CHANNELS:
                    value = tl.load(value_words + place * VALUE_QUARTER + value_at)
                else:
                    value = tl.load(value_words + place * VALUE_QUARTER + value_at,
                                    mask=(value_channel < VALUE_QUARTER)[:, None], other=0)  # fmt: skip
                # What is small is fetched a step ahead; copies of pages run ahead by `num_stages`.
                ahead = (step + 1) * TOKENS
                page = tl.load(table + ahead // 64, mask=step + 1 < stop, other=0)
                place = (page * heads + head) * 64 + ahead % 64
                ks_ahead, km_ahead, vs_ahead, vm_ahead = _affine(
                    key_scale,
                    key_minimum,
                    value_scale,
                    value_minimum,
                    place + t,
                    ahead + t < n_stored,
                )
                token = step * TOKENS + t
                seen = tl.where((token >= sink_start) & (token < sink_start + sink_count),
                                _NOWHERE, token)[:, None] < bound[None, :]  # fmt: skip
                if MASKED:
                    seen = seen & (shown != 0)
                    shown = _shown(mask, row_mask, mask_token, ahead + t,
                                   (ahead + t)[:, None] < bound[None, :])  # fmt: skip

                k0, k1, k2, k3 = _codes(key, PTX)
                scores = _scored(k0, k1, k2, k3, h0, h1, h2, h3)
                scores = scores * (ks.to(tl.float32) * _LIFT)[:, None]
                scores = scores + km.to(tl.float32)[:, None] * query_sum
                scores = tl.where(
                    seen, _logits(scores, row_factor, cap, CAPPED, PTX), -float("inf")
                )
                scale = vs.to(tl.float32)
                sizes = ((scale.to(tl.int32, bitcast=True) >> 23) - 126).to(tl.float32)
                weight, top, fade = _weights(scores, sizes[:, None], top, PTX)
                # Each thread adds up tokens that it holds; across threads they are summed at the end.
                offset = weight * vm.to(tl.float32)[:, None]
                folded = tl.sum(tl.reshape(weight, [TOKENS // PART, PART, ROWS]), 0)
                partial = partial * fade[None, :] + folded
                folded = tl.sum(tl.reshape(offset, [TOKENS // PART, PART, ROWS]), 0)
                lifted = lifted * fade[None, :] + folded
                weight = (weight * scale[:, None]).to(tl.float16)
                v0, v1, v2, v3 = _codes(value, PTX)
                o0, o1, o2, o3 = _summed(o0, o1, o2, o3, v0, v1, v2, v3, weight, fade)
                ks, km, vs, vm = ks_ahead, km_ahead, vs_ahead, vm_ahead
            total = tl.sum(partial, 0)
            base = tl.sum(lifted, 0)[None, :]
            o0, o1 = o0 * _LIFT + base, o1 * (_LIFT * 0.0625) + base
            o2, o3 = o2 * _LIFT + base, o3 * (_LIFT * 0.0625) + base

    # ---- vectors as they are: pages of those, sink, band
    if last > stop:
        d = tl.arange(0, DENSE)
        q0, q1, q2, q3 = _queries(query, row_at, live, channel, QUARTER)
        band_keys += batch * bk_row + head * bk_head
        band_values += batch * bv_row + head * bv_head
        sink_at = (batch * heads + head) * sink_count
        for step in tl.range(tl.maximum(first, stop), last, num_stages=STAGES):
            at = step - page_steps
            is_sink = at < sink_steps
            index = tl.where(is_sink, at, at - sink_steps) * DENSE + d
            held = index < tl.where(is_sink, sink_count, n_tokens - band_start)
            token = index + tl.where(is_sink, sink_start, band_start)
            keys = tl.where(is_sink, sink_keys + sink_at * QUARTER, band_keys)
            values = tl.where(is_sink, sink_values + sink_at * VALUE_QUARTER, band_values)
            key_stride = tl.where(is_sink, QUARTER, bk_token)
            value_stride = tl.where(is_sink, VALUE_QUARTER, bv_token)
            floor, roof = tl.where(is_sink, 0, limit), tl.where(is_sink, bound, end)
            if not PACKED:
                is_page = at < 0
                place = tl.load(table + step * DENSE // 64, mask=is_page, other=0) * heads + head
                place = place * 64 + step * DENSE % 64
                index = tl.where(is_page, d, index)
                held = tl.where(is_page, step * DENSE + d < n_stored, held)
                token = tl.where(is_page, step * DENSE + d, token)
                keys = tl.where(is_page, key_words + place * QUARTER, keys)
                values = tl.where(is_page, value_words + place * VALUE_QUARTER, values)
                key_stride = tl.where(is_page, QUARTER, key_stride)
                value_stride = tl.where(is_page, VALUE_QUARTER, value_stride)
                is_hole = is_page & (token >= sink_start) & (token < sink_start + sink_count)
                floor, roof = tl.where(is_page, 0, floor), tl.where(is_page, bound, roof)
                token = tl.where(is_hole, _NOWHERE, token)
            token = tl.where(held, token, _NOWHERE)
            key = tl.load(keys + index[:, None] * key_stride + channel[None, :],
                          mask=held[:, None] & (channel < QUARTER)[None, :], other=0)  # fmt: skip
            value = tl.load(values + index[None, :] * value_stride + value_channel[:, None],
                            mask=held[None, :] & (value_channel < VALUE_QUARTER)[:, None],
                            other=0)  # fmt: skip
            seen = (token[:, None] >= floor[None, :]) & (token[:, None] < roof[None, :])
            if MASKED:
                seen = seen & (_shown(mask, row_mask, mask_token, token, seen) != 0)
            k0, k1, k2, k3 = _channels(key, dtype)
            scores = _scored(k0, k1, k2, k3, q0, q1, q2, q3)
            scores = tl.where(seen, _logits(scores, factor, cap, CAPPED, PTX), -float("inf"))
            weight, top, fade = _weights(scores, 0.0, top, PTX)
            total = total * fade + tl.sum(weight, 0)
            v0, v1, v2, v3 = _channels(value, dtype)
            o0, o1, o2, o3 = _summed(o0, o1, o2, o3, v0, v1, v2, v3, weight.to(dtype), fade)

    # ---- out: the result, or this split's share of it
    n_rows = tl.num_programs(2) * heads * group * n_queries
    place = (batch * n_queries + asking) * (heads * group) + query_head
    inside = live[None, :] & (value_channel < VALUE_QUARTER)[:, None]
    column = 4 * value_channel[:, None]
    if splits == 1:
        logit = tl.load(logits + query_head, mask=live & (has_logits != 0), other=-float("inf"))
        norm = _norm(logit.to(tl.float32), top, total, PTX)[None, :]
        at = output + place[None, :] * (4 * VALUE_QUARTER) + column
        _put(at, o0 * norm, o1 * norm, o2 * norm, o3 * norm, inside)
    else:
        place += split * n_rows
        sums = work + splits * n_rows
        tl.store(work + place, top, mask=live)
        tl.store(sums + place, total, mask=live)
        put = sums + splits * n_rows + place[None, :] * (4 * VALUE_QUARTER) + column
        _put(put, o0, o1, o2, o3, inside)


@jit
def _norm(logit, top, total, PTX: tl.constexpr):
    """What sums under the maximum `top` are multiplied by; a sink logit joins the denominator."""
    logit = logit * 1.4426950408889634
    high = tl.maximum(top, logit)
    fade = _power(top - high, PTX)
    total = total * fade + _power(logit - (high - _HEADROOM), PTX)
    return fade / tl.where(total == 0.0, 1.0, total)


@jit(do_not_specialize=("splits", "n_rows", "n_heads", "has_logits"))
def combine(
    work, logits, output, splits, n_rows, n_heads, has_logits,
    DIM: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Output row (batch·Q + q)·heads + head, from the sums of all splits, always in one order."""
    row = tl.program_id(0).to(tl.int64)
    s, column = tl.arange(0, _SPLITS), tl.arange(0, WIDTH)
    sums = work + splits * n_rows
    parts = sums + splits * n_rows
    high = tl.full([_SPLITS], _NOTHING, tl.float32)
    for start in range(0, splits, _SPLITS):
        tops = tl.load(work + (start + s) * n_rows + row, mask=start + s < splits, other=_NOTHING)
        high = tl.maximum(high, tops)
    top = tl.max(high, 0)
    total = tl.zeros([_SPLITS], tl.float32)
    summed = tl.zeros([_SPLITS, WIDTH], tl.float32)
    for start in range(0, splits, _SPLITS):
        inside = start + s < splits
        place = (start + s) * n_rows + row
        fade = _power(tl.load(work + place, mask=inside, other=_NOTHING) - top, PTX)
        total += fade * tl.load(sums + place, mask=inside, other=0.0)
        part = tl.load(parts + place[:, None] * DIM + column[None, :],
                       mask=inside[:, None] & (column < DIM)[None, :], other=0.0)  # fmt: skip
        summed += fade[:, None] * part
    logit = tl.load(logits + row % n_heads, mask=has_logits != 0, other=-float("inf")).to(
        tl.float32
    )
    value = tl.sum(summed, 0) * _norm(logit, top, tl.sum(total, 0), PTX)
    tl.store(output + row * DIM + column, value.to(output.dtype.element_ty), mask=column < DIM)


def argument_types(dtype: torch.dtype, packed: bool, masked: bool) -> dict[str, str]:
    """Triton's name of the type of each argument of `attend` that is no constant."""
    own, word = pointer(dtype), "*i16" if packed else "*i64"
    parts = ("key_scale", "key_minimum", "value_scale", "value_minimum")
    longs = (
        "table",
        "band_keys",
        "band_values",
        "sink_keys",
        "sink_values",
        "sink_starts",
        "counts",
    )
    known = {"query": own, "output": own, "logits": own, "mask": "*u8" if masked else own}
    known |= {"work": "*fp32", "factor": "fp32", "cap": "fp32"}
    known |= {"key_words": word, "value_words": word}
    known |= dict.fromkeys(parts, "*fp16" if packed else own) | dict.fromkeys(longs, "*i64")
    return {name: known.get(name, "i32") for name in attend.arg_names if not name.isupper()}
