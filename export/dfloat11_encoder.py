"""Codes one DFloat11 unit slab by slab, so that its code stream is held and its weights are not.

    reading 1   exponents are counted: the code, the size of every part, and where each slab's codes lie
    reading 2   each slab is coded; its signs and mantissas are handed over at once
    reading 3   each slab is decoded from what was made of it, and compared bit by bit

    slab      |     0      |     1      |     2      |   elements of the unit, in order
    codes     |   0    |    1     |   2   |            start bit = sum of the bits before
              ^ shared words are merged, so slabs may be coded in any order

Three readings of a file that lies in the system's cache cost less than fresh memory for one copy of the
unit. Slabs are taken by as many threads as torch uses, each reading its own.

Not here: which weights make a unit and where slabs come from (`to_dfloat11.py`), the streams themselves
(`dfloat11_native.py`, `dfloat11_numpy.py`), decoding (`dfloat11.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from ..quant.errors import CheckpointError, FormatError
from .dfloat11_code import Bytes, Code, Shorts, Unfit, make_code
from .dfloat11_numpy import (
    BLOCK_BITS,
    BLOCK_BYTES,
    BLOCK_WINDOWS,
    WINDOW_BITS,
    Engine,
    Slice,
    Stream,
    Target,
)

MAX_ELEMENTS = 2**31 - 1  # kernels count elements in int32

Item = TypeVar("Item")
Result = TypeVar("Result")


class UnitEncoder:
    """A unit of slabs with `sizes` elements; `fetch(i)` gives slab i as uint16 and may be called from
    several threads. The constructor reads all slabs; `encode` must be run to its end before `parts`."""

    def __init__(self, sizes: Sequence[int], fetch: Callable[[int], Shorts], using: Engine) -> None:
        """Unfit if the format has no place for the values: no elements, 2³¹ or more, exponents from
        240 on, a code of more than 17 tables."""
        self.n = sum(sizes)
        if not 0 < self.n <= MAX_ELEMENTS:
            raise Unfit(f"it has {self.n} elements, 1 … {MAX_ELEMENTS} are allowed")
        self._fetch, self._using = fetch, using
        self._firsts = np.cumsum([0, *sizes]).tolist()
        self._slabs = [index for index, size in enumerate(sizes) if size]
        found = list(in_threads(self._count, self._slabs))
        self.code: Code = make_code(np.sum([counts for counts, _ in found], axis=0))
        lengths = self.code.length.astype(np.int64)
        bits = [int(counts @ lengths) for counts, _ in found]
        self._starts = dict(zip(self._slabs, np.cumsum([0, *bits]).tolist(), strict=False))
        self._n_bits = sum(bits)
        self._target: Target | None = None
        # If the last code ends with a byte, no window starts behind it in which it does not end.
        ends_inside = self._n_bits % WINDOW_BITS >= lengths[found[-1][1]]
        self._last_window = self._n_bits // WINDOW_BITS
        self._last_has_entry = bool(self._n_bits % 8) or bool(ends_inside)

    def _count(self, index: int) -> tuple[Any, int]:
        slab = self._fetch(index)
        return self._using.count(slab), int(slab[-1]) >> 7 & 255

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the parts but luts and split_positions, known before anything is coded."""
        n_bytes = -(-self._n_bits // 8)
        window = self._last_window - (not self._last_has_entry)
        return {
            "encoded_exponent": n_bytes,
            "sign_mantissa": self.n,
            "output_positions": 4 * (window // BLOCK_WINDOWS + 2),
            "gaps": -(-n_bytes // BLOCK_BYTES) * BLOCK_WINDOWS * 5 // 8,
        }

    def encode(self, put: Callable[[int, Bytes], None]) -> Iterator[int]:
        """Reading 2. put(first, signs and mantissas of a slab): called from several threads, in any
        order. Yields the sizes of slabs that are done."""
        n_blocks = self._n_bits // BLOCK_BITS + 1
        target = self._target = Target(
            np.zeros(self._last_window + 1, ">u8"),
            np.zeros(n_blocks * BLOCK_WINDOWS, np.uint8),
            np.zeros(n_blocks, np.uint32),
        )

        def one(index: int) -> int:
            slab, first = self._fetch(index), self._firsts[index]
            sign_mantissa = np.empty(len(slab), np.uint8)
            part = Slice(slab, first, self._starts[index], sign_mantissa)
            self._using.encode(part, self.code, target)
            put(first, sign_mantissa)
            return len(slab)

        yield from (in_threads if self._using.encodes_together else map)(one, self._slabs)

    def parts(self) -> dict[str, Any]:
        """encoded_exponent, output_positions, gaps, luts as uint8: what `encode` made. FormatError
        before it was run."""
        target, n_bytes = self._target, -(-self._n_bits // 8)
        if target is None:
            raise FormatError("a DFloat11 unit has no parts yet; run encode() to its end first")
        encoded = target.words.view(np.uint8)[:n_bytes]
        window = self._last_window
        if self._n_bits % 8:  # filled once: parts() may be called again
            encoded[-1] |= self.code.eof >> 56 >> self._n_bits % 8
        elif not self._last_has_entry:  # a code ends here, nothing starts
            target.gaps[window] = 0
            window -= 1
        gaps = self._using.pack(target.gaps[: -(-n_bytes // BLOCK_BYTES) * BLOCK_WINDOWS])
        positions = np.append(target.positions[: window // BLOCK_WINDOWS + 1], np.uint32(self.n))
        return {
            "luts": self.code.luts,
            "encoded_exponent": encoded,
            "output_positions": positions.astype("<u4").view(np.uint8),
            "gaps": gaps,
        }

    def compare(self, stream: Stream, decode: Callable[[Stream, int, int], Shorts]) -> None:
        """Reading 3. decode: elements [start, stop) of `stream`. CheckpointError if a bit differs,
        with the first slab in which one does."""

        def one(index: int) -> bool:
            slab, first = self._fetch(index), self._firsts[index]
            return np.array_equal(decode(stream, first, first + len(slab)), slab)

        for index, same in zip(self._slabs, in_threads(one, self._slabs), strict=True):
            if not same:
                first, last = self._firsts[index], self._firsts[index + 1] - 1
                raise CheckpointError(
                    f"decoding did not give the same bits for the unit's elements {first} to {last}; "
                    f"the source changed meanwhile, or memory or disk is faulty: export again"
                )


def in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`work` for each item, results in order, on as many threads as torch uses. Nothing runs any more
    once an exception comes out.

    The threads are its own, unlike those of `over_threads`, which `work` may use in turn (a slab of a
    coded source, or `decode_range`): waiting for each other in one pool, they would wait for ever.
    """
    n_workers = min(len(items), torch.get_num_threads())
    if n_workers <= 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(n_workers) as pool:
        yield from pool.map(work, items)
