"""Attention of few queries over packed pages, which are read as they are stored (split-K decoding).

A key in a page is k[d] = code[d]·s + m with one scale and minimum for a token and head, so codes can
stay integers in the product, and scale and minimum meet its result (values likewise):

    logit[t, r] = s_t · Σ_d code[t, d]·q[r, d] + m_t · Σ_d q[r, d]
    out[r, d]   = Σ_t (p[t, r]·s_t)·code[t, d] + Σ_t p[t, r]·m_t

A word of 16 bits of a page holds the channels 4j … 4j + 3 of a token. As fp16, a nibble in its lowest
bits is a subnormal number, exact in tensor cores:

    bit   15..12  11..8   7..4   3..0        word & 0x000F        = code[4j]     · 2⁻²⁴
    code   4j+3    4j+2   4j+1    4j         word & 0x00F0        = code[4j + 1] · 2⁻²⁰
                                             word >> 8 & 0x000F   = code[4j + 2] · 2⁻²⁴   …

One AND for two codes makes an operand, nothing is subtracted, shuffled or interleaved: keys and values
are four matrices [tokens, D/4] each, one for each of the channels modulo 4, and q is cut likewise.

    program (split, KV head, row of the batch): queries of all G heads of the group and all Q tokens
    S [tokens, G·Q] = K·qᵀ    tokens are the M side of the product, so that few queries pad to 8 only
    O [D/4, G·Q] ×4 = Vᵀ·P    accumulated in fp32

q is divided by a power of two, so that its largest number lies in [1, 2): fp16 holds a bf16 query.
Softmax is in fp32 with powers of two. Its running maximum is that of logit + ⌈log2 s_t⌉, so that the
weights p·s_t are at most 2¹⁴ in fp16 however large the values are; l and Σ p·m stay fp32 and are summed
over threads once at the end. Scales and minima of a step, and its page, are fetched a step ahead by
hand; pages are copied to shared memory `stages` − 1 steps ahead.

Tokens that are at hand as they were computed (sink, band; see `quant/kv_view.py`) follow in a second
loop, 16 a step, as words of 64 bits that hold four channels. A split's share is a run of all these
steps. With more than one split, each leaves maximum, sum and O in fp32, and a second kernel adds them
in one order. Pages in `dense_head` go through that second loop too; they make a baseline.

`attend_counted` takes the number of tokens of each row from the device: one CUDA graph serves a text as
it grows. Deliberately not here: additive masks, gradients, more than 8 queries, D that 4 does not
divide.
Not yet run on a GPU.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from ..quant.cost_model import Tiling, Work, blocks_per_sm, launch_seconds
from ..quant.errors import NoKernelError
from ..quant.kernel import AttentionProblem, Compiled, Config, Kernel, Reason
from ..quant.kv_view import KVView, Paged, Scoring
from ..quant.packed import PackedTensor
from . import _attend_pages, _triton
from ._compile import Variant, compile_variant, pointer, source_hash
from ._triton import off_gpu

# ---- what may be asked ----------------------------------------------------------------------

_FORMATS = {"triton_attend_int4": "int4_head", "triton_attend_dense": "dense_head"}
_DTYPES = (torch.float16, torch.bfloat16)
_MOST_CHANNELS = 256
_MOST_QUERIES = 8
_MOST_ROWS = 128  # queries of one KV head
_DENSE_TOKENS = 16  # of a step over sink and band beside packed pages
_LOG2E = 1.4426950408889634
_PEAK = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_UNALIGNED = ("mask", "logits", "counts")


def _refuse(name: str, problem: AttentionProblem) -> tuple[Reason, ...]:
    return (*off_gpu(problem), *_unfit(name, problem))


def _unfit(name: str, problem: AttentionProblem) -> Iterator[Reason]:
    wanted = _FORMATS[name]
    if (problem.key, problem.value) != (wanted, wanted):
        yield Reason(
            "FORMAT",
            f"reads keys and values in {wanted}, got {problem.key} and {problem.value}",
            "attend_torch takes every page format",
        )
    if problem.dtype not in _DTYPES:
        told = str(problem.dtype).removeprefix("torch.")
        yield Reason("DTYPE", f"takes float16 and bfloat16 queries, got {told}", "use bfloat16")
    for side, size in (("keys", problem.head_dim), ("values", problem.value_dim)):
        if size % 4 or not 4 <= size <= _MOST_CHANNELS:
            yield Reason(
                "SHAPE_K",
                f"reads {side} of 4 to {_MOST_CHANNELS} channels, a multiple of 4, got {size}",
                "attend_torch takes every head size",
            )
    if problem.n_queries > _MOST_QUERIES:
        yield Reason(
            "SHAPE_M",
            f"takes up to {_MOST_QUERIES} queries a row, got {problem.n_queries}",
            "prompts go to attend_torch",
        )
    if problem.n_queries * problem.group > _MOST_ROWS:
        yield Reason(
            "SHAPE_M",
            f"holds up to {_MOST_ROWS} queries of one KV head, got {problem.n_queries} of "
            f"{problem.group} heads each",
            "attend_torch takes every number of heads",
        )


# ---- configs --------------------------------------------------------------------------------

_CHOICES = ("rows", "splits", "stages", "tokens", "warps")
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_FULL = 1 << 14  # programs beyond which no further split helps any GPU
# Numbers of a warp's tile; larger ones spill on one of five capabilities that were compiled for.
_MOST_NUMBERS = {"triton_attend_int4": 1 << 13, "triton_attend_dense": 1 << 11}
_MOST_REGISTERS = 255  # of a thread; saying so keeps ptxas from spilling a few to fit more blocks


def _padded(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length())


def _configs(name: str, problem: AttentionProblem) -> tuple[Config, ...]:
    """rows: queries of a program. splits: parts of the tokens, each a program. stages: steps in flight.
    tokens: of a step. warps: of a program."""
    most = min(-(-problem.t_bucket // 64), _FULL // (problem.kv_heads * problem.n_rows))
    return tuple(
        tuple(zip(_CHOICES, (rows, splits, stages, tokens, warps), strict=True))
        for rows, tokens, warps in _tiles(name, problem)
        for stages in (2, 3, 4)
        for splits in _SPLITS
        if splits <= max(1, most)
    )


def _tiles(name: str, problem: AttentionProblem) -> Iterator[tuple[int, int, int]]:
    """(rows, tokens, warps) that no capability spills. Warps beyond one for 16 rows of a matrix of
    values make operands twice; twice can pay, four times cannot."""
    width = _padded(max(problem.head_dim, problem.value_dim) // 4, 16)
    for rows in _rows(problem, width):
        for tokens in (32, 64) if name == "triton_attend_int4" else (16, 32):
            for warps in (1, 2, 4, 8):
                numbers = rows * tokens * max(width, 2 * rows)
                numbers *= 2 if rows > 8 and problem.extras else 1
                if numbers <= warps * _MOST_NUMBERS[name] and warps <= width // 8:
                    yield rows, tokens, warps


def _rows(problem: AttentionProblem, width: int) -> tuple[int, ...]:
    """What a product can be wide: 8 or 16, before Triton 3.3 only 16."""
    if (_triton.VERSION or "").startswith("3.2"):
        return (16,)
    return (8, 16) if problem.group * problem.n_queries > 8 and width < 64 else (8,)


# ---- launch ---------------------------------------------------------------------------------


def _prepare(packed: PackedTensor, dtype: torch.dtype) -> None:
    raise NoKernelError("attention reads a cache as it is; there is no weight to prepare")


def attend(view: KVView, query: torch.Tensor, scoring: Scoring, config: Config) -> torch.Tensor:
    """Attention output [B, H, Q, Dv] in the dtype of the query [B, H, Q, D], fp16 or bf16; in memory
    [B, Q, H, Dv]. The view must have pages; a mask must be boolean."""
    assert view.pages is not None, "this kernel reads pages, the view has none"
    assert scoring.mask is None or scoring.mask.dtype == torch.bool, "the mask must be boolean"
    band: list[torch.Tensor] = [] if view.band is None else list(view.band)
    limit = view.first_limit
    sizes = [
        view.n_tokens,
        view.stored,
        view.band_start,
        -(1 << 30) if limit is None else limit,
        int(scoring.causal and scoring.mask is None),
    ]
    return _call(query, view.pages, scoring, band, None, sizes, config)


def attend_counted(
    pages: Paged, query: torch.Tensor, counts: torch.Tensor, scoring: Scoring, config: Config
) -> torch.Tensor:
    """As `attend`, over the first counts[b] stored tokens of row b, the newest Q of which ask.

    counts: int32 or int64 [B] on the device, read when the kernel runs; every row's pages must be in
    the table up to there. There is no band: a residual window needs a length on the host.
    """
    sizes = [0, 0, 0, -(1 << 30), int(scoring.causal and scoring.mask is None)]
    return _call(query, pages, scoring, [], counts, sizes, config)


def _call(
    query: torch.Tensor,
    pages: Paged,
    scoring: Scoring,
    band: list[torch.Tensor],
    counts: torch.Tensor | None,
    sizes: list[int],
    config: Config,
) -> torch.Tensor:
    found: torch.Tensor = torch.ops.fewbit.triton_attend(
        query,
        pages.table,
        list(pages.keys.values()),
        list(pages.values.values()),
        band,
        [] if pages.sink is None else [*pages.sink, pages.starts],
        scoring.mask,
        scoring.sinks,
        counts,
        sizes,
        scoring.scaling,
        scoring.softcap,
        [value for _, value in config],
    )
    return found


def _words(vectors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Four channels of 16 bits as one int64, int64 [..., D/4]; copied only if they do not lie so."""
    vectors = vectors.to(dtype)
    starts = (*vectors.stride()[:-1], vectors.storage_offset())
    if vectors.stride(-1) != 1 or any(start % 4 for start in starts):
        vectors = vectors.contiguous()
    return vectors.view(torch.int64)


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of all axes but the last; 0 for an axis of one."""
    pairs = zip(tensor.shape[:-1], tensor.stride(), strict=False)
    return tuple(0 if size == 1 else stride for size, stride in pairs)


def _run(
    query: torch.Tensor,
    table: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    band: Sequence[torch.Tensor],
    sink: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    logits: torch.Tensor | None,
    counts: torch.Tensor | None,
    sizes: Sequence[int],
    scaling: float,
    softcap: float | None,
    config: Sequence[int],
) -> torch.Tensor:
    """The op: allocates, launches one kernel, or two if there are several splits. What is not there is
    stood in for by a tensor that is never read."""
    packed = len(keys) == 3
    n_rows, n_heads, n_queries, _ = query.shape
    heads, group = keys[0].shape[1], n_heads // keys[0].shape[1]
    output = _empty(query, values)
    if output.numel() == 0:
        return output
    query = query if query.stride(-1) == 1 else query.contiguous()
    rows, splits, stages, tokens, warps = config
    quarter, value_quarter = query.shape[-1] // 4, output.shape[-1] // 4
    outputs = n_rows * n_queries * n_heads
    work = output if splits == 1 else query.new_empty(
        splits * outputs * (4 * value_quarter + 2), dtype=torch.float32
    )  # fmt: skip
    key_parts, value_parts = (
        [_view(parts[0]), *(parts[1:] or (query, query))] for parts in (keys, values)
    )
    band = [_words(vectors, query.dtype) for vectors in band] or [table[None, None]] * 2
    sink_words = [_words(vectors, query.dtype) for vectors in sink[:2]] or [table] * 2
    shown = (0,) * 4 if mask is None else (*_strides(mask)[:2], *mask.stride()[2:])
    logit_args = (query if logits is None else logits, int(logits is not None))
    factor = scaling * _LOG2E * (1.0 if softcap is None else 2.0 / softcap)
    ptx = not _triton.interpreted()
    _attend_pages.attend[(splits, heads * -(-group * n_queries // rows), n_rows)](
        query, table, *key_parts, *value_parts, *band, *sink_words, sink[2] if sink else table,
        query if mask is None else mask.view(torch.uint8), logit_args[0],
        table if counts is None else counts.contiguous(), work, output,
        *query.stride()[:3], table.stride(0), *_strides(band[0]), *_strides(band[1]),
        sink[0].shape[2] if sink else 0, *shown,
        n_queries, group, *sizes, logit_args[1], splits, factor, (softcap or 0.0) * _LOG2E,
        quarter, _padded(quarter, 16), value_quarter, _padded(value_quarter, 16),
        rows, tokens, packed, mask is not None, softcap is not None,
        counts is not None, ptx, min(tokens, 16 * warps), _DENSE_TOKENS if packed else tokens,
        1 if packed else stages,
        num_warps=warps, num_stages=stages, enable_fp_fusion=True, maxnreg=_MOST_REGISTERS,
    )  # fmt: skip
    if splits > 1:
        _attend_pages.combine[(outputs,)](
            work, logit_args[0], output, splits, outputs, n_heads, logit_args[1],
            4 * value_quarter, _padded(4 * value_quarter, 16), ptx, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return output


def _view(part: torch.Tensor) -> torch.Tensor:
    """Words that hold four channels each: 16 bits of codes, or 64."""
    return part.view(torch.int16 if part.dtype == torch.uint8 else torch.int64)


def _empty(query: torch.Tensor, values: Sequence[torch.Tensor]) -> torch.Tensor:
    """[B, H, Q, Dv], [B, Q, H, Dv] in memory."""
    n_rows, n_heads, n_queries, _ = query.shape
    value_dim = values[0].shape[-1] * (2 if values[0].dtype == torch.uint8 else 1)
    return query.new_empty(n_rows, n_queries, n_heads, value_dim).transpose(1, 2)


_LIBRARY = torch.library.Library("fewbit", "FRAGMENT")
_LIBRARY.define(
    "triton_attend(Tensor query, Tensor table, Tensor[] keys, Tensor[] values, Tensor[] band, "
    "Tensor[] sink, Tensor? mask, Tensor? logits, Tensor? counts, int[] sizes, float scaling, "
    "float? softcap, int[] config) -> Tensor"
)
_LIBRARY.impl("triton_attend", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("fewbit::triton_attend", lib=_LIBRARY)
def _fake(
    query: torch.Tensor,
    table: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    band: Sequence[torch.Tensor],
    sink: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    logits: torch.Tensor | None,
    counts: torch.Tensor | None,
    sizes: Sequence[int],
    scaling: float,
    softcap: float | None,
    config: Sequence[int],
) -> torch.Tensor:
    return _empty(query, values)


# ---- estimates ------------------------------------------------------------------------------

_COMBINE_SECONDS = 2.5e-6  # launch and tail of the second kernel in a graph (a guess)
# Half of all lane instructions (two issue where one integer instruction does), fitted to what Triton
# 3.6 makes for capability 9.0 of D = 128, 8 rows, 32 and 64 tokens, 1 to 4 warps; within 12 %.
_PER_CODE, _PER_SCORE, _PER_THREAD = 0.6, 7.0, 55.0
_BUSY_WARPS = 10  # that keep the units of a multiprocessor busy (a guess)


def _seconds(
    name: str, problem: AttentionProblem, config: Config, compiled: Compiled | None = None
) -> float:
    """By `cost_model`; 1 s for an unknown machine."""
    machine = problem.machine
    if machine is None:
        return 1.0
    choice, packed = dict(config), name == "triton_attend_int4"
    threads, splits, tokens = 32 * choice["warps"], choice["splits"], choice["tokens"]
    blocks = -(-problem.group * problem.n_queries // choice["rows"])
    vectors = problem.n_rows * problem.kv_heads * problem.t_bucket
    channels = problem.head_dim + problem.value_dim
    token_bytes = channels / 2 + 8 if packed else 2.0 * channels
    outputs = problem.n_rows * problem.n_queries * problem.kv_heads * problem.group
    shares = 0 if splits == 1 else 8 * splits * outputs * (problem.value_dim + 2)
    # Warps beyond the rows of O make the same operands again.
    copies = max(1.0, choice["warps"] * 16 / max(16, problem.value_dim // 4))
    codes = problem.head_dim + copies * problem.value_dim
    scores = choice["rows"] * _PER_SCORE + threads / tokens * _PER_THREAD
    ahead = (choice["stages"] - 1) * tokens * token_bytes
    held = channels * choice["rows"] + 0.35 * tokens * channels
    tiling = Tiling(
        blocks=splits * problem.kv_heads * problem.n_rows * blocks,
        threads=threads,
        in_flight_bytes=ahead,
        registers=min(255, 60 + int(held / threads)),
        smem_bytes=int(ahead) + 3072,
    )
    resident = min(blocks_per_sm(tiling, machine, compiled), -(-tiling.blocks // machine.sms))
    idle = max(1.0, _BUSY_WARPS / max(1, resident * choice["warps"]))
    work = Work(
        bytes=vectors * token_bytes + 2 * outputs * channels,
        ops=2.0 * vectors * blocks * choice["rows"] * codes,
        kind="fp16" if packed else _PEAK[problem.dtype],
        alu=vectors * blocks * (codes * _PER_CODE + scores) * idle,
        extra_seconds=0.0
        if splits == 1
        else _COMBINE_SECONDS + shares / (machine.bandwidth_bytes_per_second or 1e12),
    )
    return launch_seconds(work, tiling, machine, compiled)


# ---- compilation without a GPU --------------------------------------------------------------


def _compile(
    name: str, problem: AttentionProblem, config: Config, cc: tuple[int, int]
) -> tuple[Compiled, ...]:
    choice = dict(config)
    packed = name == "triton_attend_int4"
    types = _attend_pages.argument_types(problem.dtype, packed, "mask" in problem.extras)
    quarter, value_quarter = problem.head_dim // 4, problem.value_dim // 4
    constants = {
        "QUARTER": quarter,
        "CHANNELS": _padded(quarter, 16),
        "VALUE_QUARTER": value_quarter,
        "VALUE_CHANNELS": _padded(value_quarter, 16),
        "ROWS": choice["rows"],
        "TOKENS": choice["tokens"],
        "PACKED": packed,
        "MASKED": "mask" in problem.extras,
        "CAPPED": "softcap" in problem.extras,
        "COUNTED": False,
        "PTX": True,
        "PART": min(choice["tokens"], 16 * choice["warps"]),
        "DENSE": _DENSE_TOKENS if packed else choice["tokens"],
        "STAGES": 1 if packed else choice["stages"],
    }
    aligned = tuple(n for n in types if types[n].startswith("*") and n not in _UNALIGNED)
    main = Variant(
        _attend_pages.attend, types, constants, aligned, choice["warps"], choice["stages"],
        max_registers=_MOST_REGISTERS,
    )  # fmt: skip
    dim = problem.value_dim
    dtype = pointer(problem.dtype)
    numbers = ("splits", "n_rows", "n_heads", "has_logits")
    second = Variant(
        _attend_pages.combine,
        {"work": "*fp32", "logits": dtype, "output": dtype} | dict.fromkeys(numbers, "i32"),
        {"DIM": dim, "WIDTH": _padded(dim, 16), "PTX": True},
        ("work", "output"),
        1,
        2,
    )
    return compile_variant(main, cc), compile_variant(second, cc)


# ---- records --------------------------------------------------------------------------------


def _kernel(name: str, priority: int) -> Kernel:
    return Kernel(
        name=name,
        refuse=partial(_refuse, name),
        prepare=_prepare,
        launch=attend,
        seconds=partial(_seconds, name),
        priority=priority,
        op="attend",
        configs=partial(_configs, name),
        compile=partial(_compile, name),
        source=source_hash(_attend_pages, sys.modules[__name__]),
    )


KERNELS = tuple(_kernel(name, 1) for name in _FORMATS)
