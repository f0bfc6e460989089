"""`fle4`, `fle3`: bf16 weights at 12.0 and 11.3 bits, without loss, at addresses known beforehand.

A bf16 word is sign s, exponent e and mantissa m; nearly all exponents of a trained weight lie in a few
neighbouring values, the window. Each exponent is stored as a code of b = 4 or 3 bits:

    code 0                  escape: the exponent is in a list
    code 1 … width          e = base + code − 1
    code 2^b − 1            e = 0, where width is 2^b − 2

width is 2^b − 1. If more than 1/64 of the exponents are 0 (pruned or padded rows) it is 2^b − 2, and
the window is chosen among the others. base is the least that makes the window hold most exponents.

Parts, for a weight [.., N, K] that is bf16; Kp = K rounded up to 64; T tiles of 64 x 64, rows of tiles
first, those at the edges smaller; S = `escapes`, the longest list of the matrices
  window         uint8  [.., 2]            base, width
  sign_mantissa  uint8  [.., N, Kp]        bit 7 = s, bits 6..0 = m
  codes          uint8  [.., N, Kp/2]      fle4: byte 32·t + j of a row
                                             bit 7..4 = column 64·t + 32 + j    3..0 = column 64·t + j
                        [.., 3, N, Kp/8]   fle3: plane p holds bit p of each code;
                                             bit i of byte j of a row = column 8·j + i
  offset         int32  [.., T + 1]        tile t has entries offset[t] … offset[t+1] − 1 of the lists;
                                             not negative, so that it is a u32 as well
  position       int16  [.., S]            fle4: 64·row + column within the tile, rising
  exponent       uint8  [.., S]            e of each escape; after offset[T] both lists hold zeros

fle3 needs no positions: its escapes are 60 times as many, and entry i of a tile belongs to its i-th
code 0, counted along rows. Columns that pad a row have code 1 and zero bytes.

S depends on the values, so that it is an option; but it is left out of comparisons and of a family's
name: what is tuned for one layer is for all of its shape. Lists may end with unused zeros, so that a
slice of a weight has the options of the whole.

A weight takes 12 bits (fle4) or 11 (fle3), an escape 24 or 8, a tile 32: on trained and on normal
weights 12.01 and 11.2 bits each, on rows whose scales differ by factors of e 12.05 and 11.8.

These formats round nothing: `fit`, `round` and `candidates` raise. They are what stays in memory
(`to_fle`), and no recipe's target. Deliberately not here: entropy coding, which is for files.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch.nn import functional

from ..errors import FormatError, RecipeError
from ..format import IntegerForm, Parts, PartSpec
from ..packed import PackedTensor, Term
from . import _fle_native
from ._cuts import check_columns, cut_axis, cut_parts
from ._fle_codes import TILE, bytes_of_codes, codes_of_bytes, escapes_of, tile_position, window_of

_MOST_ESCAPES = 2**31 - 1
_EXPONENT = 0x7F80  # its bits in a bf16 word


@dataclass(frozen=True)
class FleOptions:
    """escapes: entries of the longest list of escapes; it follows from the weight, and tells no two
    problems apart. RecipeError unless it is a whole number."""

    escapes: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        whole = isinstance(self.escapes, int) and not isinstance(self.escapes, bool)
        if not whole or not 0 <= self.escapes <= _MOST_ESCAPES:
            raise RecipeError(
                f"fle: escapes must be a whole number 0 to {_MOST_ESCAPES}, got {self.escapes!r}; "
                f"leave it to `to_fle`"
            )


class Fle:
    """The format object of one width of codes; see the module's text for layout and maths."""

    Options = FleOptions
    tile = 1

    def __init__(self, code_bits: int) -> None:
        self.code_bits = code_bits
        self.name = f"fle{code_bits}"
        self.most = (1 << code_bits) - 1  # the largest code

    # ---- sizes ------------------------------------------------------------------------------

    def padded_k(self, k: int, options: FleOptions) -> int:
        """K rounded up to a multiple of 64."""
        return -(-k // TILE) * TILE

    def group_size(self, k: int, options: FleOptions) -> int:
        """The whole row: there are no scales."""
        return self.padded_k(k, options)

    def part_specs(self, shape: tuple[int, ...], options: FleOptions) -> dict[str, PartSpec]:
        """Stored parts of a weight of `shape`; FormatError if it has fewer than two axes."""
        if len(shape) < 2 or min(shape) < 1:
            raise FormatError(
                f"{self.name} stores weights [..., N, K] of positive size, got {tuple(shape)}"
            )
        *stack, n, k = shape
        columns = self.padded_k(k, options)
        of_codes = (n, columns // 2) if self.code_bits == 4 else (3, n, columns // 8)
        n_tiles = -(-n // TILE) * columns // TILE
        specs = {
            "window": PartSpec(torch.uint8, (*stack, 2)),
            "sign_mantissa": PartSpec(torch.uint8, (*stack, n, columns)),
            "codes": PartSpec(torch.uint8, (*stack, *of_codes)),
            "offset": PartSpec(torch.int32, (*stack, n_tiles + 1)),
            "exponent": PartSpec(torch.uint8, (*stack, options.escapes)),
        }
        if self.code_bits == 4:
            specs["position"] = PartSpec(torch.int16, (*stack, options.escapes))
        return specs

    def padded_shape(
        self, part_shapes: Mapping[str, tuple[int, ...]], options: FleOptions
    ) -> tuple[int, ...]:
        """[..., N, Kp], which `sign_mantissa` has."""
        shape = part_shapes.get("sign_mantissa", ())
        if len(shape) < 2:
            raise FormatError(
                f"{self.name}: sign_mantissa must be [..., N, columns], got {list(shape)}"
            )
        return tuple(shape)

    def bits(self, shape: tuple[int, ...], options: FleOptions) -> float:
        """Stored bits per weight, padding, tiles and escapes included."""
        stored = sum(spec.n_bytes for spec in self.part_specs(shape, options).values())
        return 8 * stored / prod(shape)

    # ---- what a rounding format would do ----------------------------------------------------

    def _rounds_nothing(self) -> FormatError:
        return FormatError(
            f"{self.name} keeps bf16 weights as they are and rounds nothing; it is a form of dense "
            f"weights in memory, made when they are loaded: use int_group to round them"
        )

    def fit(
        self, weight: torch.Tensor, options: FleOptions, clip: torch.Tensor | None = None
    ) -> Parts:
        """FormatError: there are no scales."""
        raise self._rounds_nothing()

    def round(
        self,
        columns: torch.Tensor,
        scales: Mapping[str, torch.Tensor],
        start: int | torch.Tensor,
        options: FleOptions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """FormatError: nothing is rounded."""
        raise self._rounds_nothing()

    def candidates(self, weight: torch.Tensor, options: FleOptions) -> Iterator[Parts]:
        """FormatError: there is nothing to choose from."""
        raise self._rounds_nothing()

    def integer_form(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], options: FleOptions
    ) -> IntegerForm | None:
        """None: a float for each weight is no integer under a row's scale."""
        return None

    # ---- in and out -------------------------------------------------------------------------

    def pack(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], options: FleOptions
    ) -> Parts:
        """Parts of a bf16 weight [..., N, K], which stands where other formats take codes; there are
        no scales. FormatError for another dtype, or for more escapes than the options hold."""
        made = self.pack_matrices(codes)
        longest = max(parts["exponent"].numel() for parts in made)
        if longest > options.escapes:
            raise FormatError(
                f"{self.name}: escapes must be {longest} or more for this weight, got "
                f"{options.escapes}; use to_fle"
            )
        return _stacked(made, codes.shape[:-2], options.escapes)

    def pack_matrices(self, weight: torch.Tensor) -> list[Parts]:
        """Parts of each matrix of a bf16 weight [..., N, K], with lists of its own length."""
        if weight.dtype != torch.bfloat16 or weight.dim() < 2 or not weight.numel():
            raise FormatError(
                f"{self.name} stores bfloat16 weights [..., N, K] of positive size, got "
                f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
            )
        words = weight.contiguous().view(torch.int16)
        return [self._pack_matrix(matrix) for matrix in words.view(-1, *weight.shape[-2:])]

    def _pack_matrix(self, words: torch.Tensor) -> Parts:
        if not _fle_native.serves(words):
            return self._pack_in_torch(words)
        counts = _fle_native.count(words)
        base, width = window_of(counts, self.most)
        inside = counts[base : base + width].sum() + (counts[0] if width < self.most else 0)
        specs = self.part_specs(tuple(words.shape), FleOptions(words.numel() - int(inside)))
        parts = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
        parts["window"] = torch.tensor([base, width], dtype=torch.uint8)
        _fle_native.encode(words, parts, self.code_bits)
        return parts

    def _pack_in_torch(self, words: torch.Tensor) -> Parts:
        exponent = ((words & _EXPONENT) >> 7).to(torch.uint8)
        counts = torch.bincount(exponent.flatten(), minlength=256)
        base, width = window_of(counts, self.most)
        codes = exponent - (base - 1) % 256  # wraps: 1 … width is within the window
        codes = torch.where((codes >= 1) & (codes <= width), codes, 0)
        if width < self.most:
            codes = torch.where(exponent == 0, self.most, codes)
        extra, low = (0, -words.shape[1] % TILE), ((words >> 8) & 128) | (words & 127)
        codes = functional.pad(codes.to(torch.uint8), extra, value=1)
        parts = {
            "window": torch.tensor([base, width], dtype=torch.uint8, device=words.device),
            "sign_mantissa": functional.pad(low.to(torch.uint8), extra),
            "codes": bytes_of_codes(codes, self.code_bits),
        }
        return parts | self._lists(codes, functional.pad(exponent, extra))

    def _lists(self, codes: torch.Tensor, exponent: torch.Tensor) -> Parts:
        """offset, exponent and position of the escapes in codes [N, Kp]; exponent has their shape."""
        (row, column), offset = escapes_of(codes)
        lists = {"offset": offset, "exponent": exponent[row, column]}
        if self.code_bits == 4:
            lists["position"] = tile_position(row, column)
        return lists

    def _codes(self, stored: torch.Tensor) -> torch.Tensor:
        return codes_of_bytes(stored, self.code_bits)

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """The weight, bf16 of `shape`, every bit as it was, a NaN's too. Parts must be valid."""
        weight = torch.empty(shape, dtype=torch.bfloat16, device=parts["window"].device)
        for matrix, target in zip(_matrices(parts), weight.view(-1, *shape[-2:]), strict=True):
            self.decode_into(matrix, target)
        return weight

    def decode_into(self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor) -> None:
        """As `decode`, of one matrix into bf16 [N, K]. FormatError for a matrix that is not contiguous,
        for parts of another shape, and for parts that would lead outside of it."""
        if weight.dtype != torch.bfloat16 or not weight.is_contiguous():
            raise FormatError(f"{self.name}: is decoded to contiguous bfloat16, got {weight.dtype} "
                              f"of strides {weight.stride()}")  # fmt: skip
        words = weight.view(torch.int16)
        if not _fle_native.serves(words, *parts.values()):
            words.copy_(self._decode_matrix(parts)[:, : words.shape[1]])
            return
        parts, shape = {name: part.contiguous() for name, part in parts.items()}, tuple(words.shape)
        options = FleOptions(parts["exponent"].numel() if "exponent" in parts else 0)
        self._check_specs(parts, shape, options)
        if not _fle_native.decode(parts, words, self.code_bits):
            self.check(parts, shape, options)  # says what is wrong
            raise FormatError(f"{self.name}: the parts were changed while they were decoded")

    def _decode_matrix(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Words int16 [N, Kp]."""
        base, width = parts["window"]
        codes, low = self._codes(parts["codes"]), parts["sign_mantissa"].short()
        exponent = torch.where(codes > width, 0, codes + (base - 1))  # wraps where base is 0
        (row, column), _ = escapes_of(codes)
        exponent[row, column] = parts["exponent"][: row.numel()]
        return ((low & 128) << 8) | (exponent.short() << 7) | (low & 127)

    def unpack(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], options: FleOptions
    ) -> torch.Tensor:
        """Weight fp32 of `shape`: its upper 16 bits are the bf16 word's, the lower ones zero."""
        words = self.decode(parts, shape).view(torch.int16)
        return (words.int() << 16).view(torch.float32)

    def slice(
        self,
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        options: FleOptions,
        axis: int,
        start: int,
        stop: int,
    ) -> Parts:
        """Parts of any rows or experts [start, stop), or of columns between multiples of 64."""
        axis = cut_axis(self.name, shape, axis, start, stop)
        if axis < len(shape) - 2:
            return cut_parts(parts, axis, start, stop)
        rows, columns = (start, stop), (0, self.padded_k(shape[-1], options))
        if axis == len(shape) - 1:
            check_columns(self.name, shape[-1], start, stop, TILE)
            rows, columns = (0, shape[-2]), (start, self.padded_k(stop, options))
        made = [self._cut(matrix, *rows, *columns) for matrix in _matrices(parts)]
        return _stacked(made, shape[:-2], options.escapes)

    def _cut(
        self, parts: Mapping[str, torch.Tensor], top: int, bottom: int, left: int, right: int
    ) -> Parts:
        """Parts of rows [top, bottom) and columns [left, right), multiples of 64, of one matrix."""
        # Only the rows of tiles that hold the wanted rows are decoded.
        across = parts["sign_mantissa"].shape[1] // TILE
        first, last = top // TILE, -(-bottom // TILE)
        begin, end = parts["offset"][first * across], parts["offset"][last * across]
        around = self._codes(parts["codes"][..., first * TILE : last * TILE, :])
        exponent = torch.zeros_like(around)
        (row, column), _ = escapes_of(around)
        exponent[row, column] = parts["exponent"][begin:end]
        above, per_byte = first * TILE, 2 if self.code_bits == 4 else 8
        lists = self._lists(
            around[top - above : bottom - above, left:right],
            exponent[top - above : bottom - above, left:right],
        )
        return {
            "window": parts["window"],
            "sign_mantissa": parts["sign_mantissa"][top:bottom, left:right],
            "codes": parts["codes"][..., top:bottom, left // per_byte : right // per_byte],
            **lists,
        }

    # ---- damage -----------------------------------------------------------------------------

    def check(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], options: FleOptions
    ) -> None:
        """FormatError, which says what is wrong and where, unless every part has its dtype and shape
        and the parts agree with each other."""
        self._check_specs(parts, shape, options)
        for matrix in _matrices(parts):
            self._check_window(matrix["window"])
            self._check_offset(matrix["offset"], options.escapes)
            self._check_codes(matrix, shape)

    def _check_specs(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], options: FleOptions
    ) -> None:
        specs = self.part_specs(shape, options)
        if set(parts) != set(specs):
            raise FormatError(f"{self.name}: parts must be {sorted(specs)}, got {sorted(parts)}")
        for name, spec in specs.items():
            found = PartSpec(parts[name].dtype, tuple(parts[name].shape))
            if found != spec:
                raise FormatError(
                    f"{self.name}: {name} must be {spec.dtype} {spec.shape}, "
                    f"got {found.dtype} {found.shape}"
                )

    def _check_window(self, window: torch.Tensor) -> None:
        base, width = window.tolist()
        if width not in (self.most, self.most - 1):
            raise FormatError(
                f"{self.name}: width of the window must be {self.most} or {self.most - 1}, got {width}"
            )
        least = self.most - width  # 0 has a code of its own if it is 1
        if not least <= base <= 256 - width:
            raise FormatError(
                f"{self.name}: base must be {least} to {256 - width} for a window of {width} "
                f"exponents, got {base}"
            )

    def _check_offset(self, offset: torch.Tensor, escapes: int) -> None:
        steps = offset.long().diff()
        if int(offset[0]) or bool((steps < 0).any()):
            tile = 0 if int(offset[0]) else int((steps < 0).nonzero()[0]) + 1
            raise FormatError(
                f"{self.name}: offsets must start at 0 and never fall, got {int(offset[tile])} at "
                f"tile {tile}"
            )
        if int(offset[-1]) > escapes:
            raise FormatError(
                f"{self.name}: offsets must end within the lists of {escapes} escapes, got "
                f"{int(offset[-1])}"
            )

    def _check_codes(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> None:
        """Lists, codes and padding agree."""
        codes, end = self._codes(parts["codes"]), int(parts["offset"][-1])
        wanted = self._lists(codes, codes)
        position = parts.get("position", parts["exponent"])
        if "position" in parts and bool(((position < 0) | (position >= TILE * TILE)).any()):
            raise FormatError(
                f"{self.name}: positions must be 0 to {TILE * TILE - 1}, inside the tile, got "
                f"{int(position.min())} to {int(position.max())}"
            )
        if not torch.equal(parts["offset"], wanted["offset"]):
            tile = int((parts["offset"] != wanted["offset"]).nonzero()[0]) - 1
            raise FormatError(
                f"{self.name}: tile {tile} must list as many escapes as it has codes 0, "
                f"{int(wanted['offset'].diff()[tile])}, got {int(parts['offset'].diff()[tile])}"
            )
        if "position" in parts and not torch.equal(position[:end], wanted["position"]):
            entry = int((position[:end] != wanted["position"]).nonzero()[0])
            raise FormatError(
                f"{self.name}: entry {entry} of position must be that of a code 0, "
                f"{int(wanted['position'][entry])}, got {int(position[entry])}"
            )
        if bool(position[end:].any()) or bool(parts["exponent"][end:].any()):
            raise FormatError(f"{self.name}: lists must hold zeros after entry {end}, got others")
        padding = codes[:, shape[-1] :], parts["sign_mantissa"][:, shape[-1] :]
        if bool((padding[0] != 1).any()) or bool(padding[1].any()):
            raise FormatError(
                f"{self.name}: columns from {shape[-1]} on pad the row, with codes 1 and bytes 0; "
                f"got others: the file is damaged"
            )


# ---- stacks ----------------------------------------------------------------------------------


def _matrices(parts: Mapping[str, torch.Tensor]) -> Iterator[Parts]:
    """Parts of each matrix of a stack, or of the one there is."""
    stack = parts["window"].shape[:-1]
    count, axes = prod(stack), len(stack)
    flat = {name: part.reshape(count, *part.shape[axes:]) for name, part in parts.items()}
    for index in range(count):
        yield {name: part[index] for name, part in flat.items()}


def _stacked(made: Sequence[Parts], stack: Sequence[int], escapes: int) -> Parts:
    """Parts of a stack of matrices, their lists filled up to `escapes` with zeros."""

    def of(name: str) -> torch.Tensor:
        found = [parts[name] for parts in made]
        if name in ("position", "exponent"):
            found = [functional.pad(part, (0, escapes - part.numel())) for part in found]
        joined = torch.stack(found) if len(found) > 1 else found[0].unsqueeze(0)
        return joined.reshape(*stack, *joined.shape[1:])

    return {name: of(name) for name in made[0]}


FORMAT = (Fle(4), Fle(3))


def form_of(bits: int) -> Fle:
    """The format with codes of `bits`, 4 or 3; FormatError for another number."""
    for form in FORMAT:
        if form.code_bits == bits:
            return form
    raise FormatError(f"codes of exponents have 4 or 3 bits, got {bits!r}; use fle4")


def to_fle(weight: torch.Tensor, bits: int) -> PackedTensor:
    """A bf16 weight [.., N, K] with codes of `bits`, 4 or 3, on its device, without loss.
    FormatError for another dtype or number of bits."""
    form = form_of(bits)
    made = form.pack_matrices(weight)
    options = FleOptions(max(parts["exponent"].numel() for parts in made))
    parts = _stacked(made, weight.shape[:-2], options.escapes)
    return PackedTensor(tuple(weight.shape), (Term(form.name, options, parts),))
