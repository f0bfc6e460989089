"""Every bit of every bf16 weight comes back; sizes; damage is named."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import fewbit.quant
from fewbit.quant.errors import FormatError, RecipeError
from fewbit.quant.format import Format, Parts, dequantize, find_format
from fewbit.quant.formats.fle import FORMAT, Fle, FleOptions, form_of, to_fle
from fewbit.quant.packed import PackedTensor, Term

BUNDLED = Path(fewbit.quant.__file__).parent / "data" / "tiny-llama" / "model.safetensors"
BITS = (4, 3)
MOST = {4: 12.05, 3: 11.5}
both = pytest.mark.parametrize("bits", BITS)


def words(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous().view(torch.int16)


def normal(n: int, k: int, spread: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Normal, with rows whose scales are log-normal with standard deviation `spread`."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(spread * torch.randn(n, 1, generator=generator))
    return (0.02 * scale * torch.randn(n, k, generator=generator)).bfloat16()


def every_pattern() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16)


def stored(packed: PackedTensor) -> tuple[Fle, Parts, FleOptions]:
    (term,) = packed.terms
    form = find_format(term.format)
    assert isinstance(form, Fle)
    return form, dict(term.parts), term.options


def check(weight: torch.Tensor, bits: int) -> PackedTensor:
    packed = to_fle(weight, bits)
    form, parts, options = stored(packed)
    form.check(parts, packed.shape, options)
    assert torch.equal(words(form.decode(parts, packed.shape)), words(weight))
    return packed


# ---- every bit ------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_all_patterns(bits: int, order: str) -> None:
    """Both zeros, subnormals, Inf and every NaN among them, through fp32 as well."""
    pattern = every_pattern()
    if order == "shuffled":
        pattern = pattern[torch.randperm(2**16, generator=torch.Generator().manual_seed(1))]
    weight = pattern.view(256, 256).view(torch.bfloat16)
    wide = dequantize(check(weight, bits)).view(torch.int32)
    assert torch.equal((wide >> 16).short(), words(weight)) and not bool((wide & 0xFFFF).any())


@both
def test_one_pattern_only(bits: int) -> None:
    """Constant tensors."""
    patterns = every_pattern()[::37].tolist() + [0, -(2**15), 0x7F80, 0x7FC1, 0xFFC1 - 2**16, 1]
    for pattern in patterns[:: 1 if bits == 4 else 7]:
        check(torch.full((3, 5), pattern, dtype=torch.int16).view(torch.bfloat16), bits)


@both
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 130), k=st.integers(1, 130), seed=st.integers(0, 99), any_bits=st.booleans()
)
def test_any_shape(bits: int, n: int, k: int, seed: int, any_bits: bool) -> None:
    weight = normal(n, k, 1.0, seed)
    if any_bits:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(-(2**15), 2**15, (n, k), generator=generator)
        weight = drawn.short().view(torch.bfloat16)
    check(weight, bits)


@both
@pytest.mark.parametrize("side", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130])
def test_edges_of_tiles(bits: int, side: int) -> None:
    check(normal(side, 66, 2.0), bits)
    check(normal(66, side, 2.0), bits)


@both
def test_stacks_have_windows_and_lists_of_their_own(bits: int) -> None:
    matrices = [
        normal(70, 90, seed=1),
        normal(70, 90, 2.0) * 2.0**40,
        torch.zeros(70, 90).bfloat16(),
    ]
    weight = torch.stack(matrices).view(3, 1, 70, 90)
    packed = check(weight, bits)
    form, parts, options = stored(packed)
    assert len({int(base) for base in parts["window"][:, 0, 0]}) == 3
    for index, matrix in enumerate(matrices):
        one = form.slice(parts, packed.shape, options, 0, index, index + 1)
        assert torch.equal(words(form.decode(one, (1, 1, 70, 90)))[0, 0], words(matrix))


def test_a_view_of_other_strides() -> None:
    weight = normal(90, 70).T
    assert not weight.is_contiguous()
    check(weight, 4)


def test_stored_bytes() -> None:
    """[1, −2, 3e30]: exponents 127, 128 and 228; the third escapes."""
    weight = torch.tensor([[1.0, -2.0, 3e30]]).bfloat16()
    low = bytes([0x00, 0x80, 0x17]) + bytes(61)
    of_fle4 = bytes([0x1E, 0x1F, 0x10]) + bytes([0x11]) * 29
    of_fle3 = b"".join(
        (bytes([0xFA]) + bytes([0xFF]) * 7, bytes([0x03]) + bytes(7), bytes([0x03]) + bytes(7))
    )
    for bits, base, codes in ((4, 114, of_fle4), (3, 122, of_fle3)):
        packed = to_fle(weight, bits)
        found = {name: part.flatten().tolist() for name, part in packed.terms[0].parts.items()}
        assert packed.terms[0].options.escapes == 1
        assert found.pop("window") == [base, 2**bits - 1]
        assert bytes(found.pop("sign_mantissa")) == low
        assert bytes(found.pop("codes")) == codes
        assert found.pop("offset") == [0, 1] and found.pop("exponent") == [228]
        assert found == ({"position": [2]} if bits == 4 else {})


# ---- windows --------------------------------------------------------------------------------


@both
def test_the_window_holds_the_most_exponents(bits: int) -> None:
    weight = normal(128, 128, 1.0)
    counts = torch.bincount(((words(weight) & 0x7F80) >> 7).long().flatten(), minlength=256)
    most = 2**bits - 1
    base, width = stored(to_fle(weight, bits))[1]["window"].tolist()
    covered = [int(counts[b : b + most].sum()) for b in range(257 - most)]
    assert width == most and base == covered.index(max(covered))


@both
def test_many_zeros_have_a_code_of_their_own(bits: int) -> None:
    """Above 1/64 of the weights; at 1/64 they escape."""
    most = 2**bits - 1
    for zeros, width in ((64 * 64 // 64, most), (64 * 64 // 64 + 1, most - 1)):
        weight = 1 + normal(64, 64).abs()
        weight.view(-1)[:zeros] = 0
        weight.view(-1)[:zeros:2] = -0.0
        packed = check(weight, bits)
        assert int(stored(packed)[1]["window"][1]) == width
        assert packed.terms[0].options.escapes == (zeros if width == most else 0)


@both
def test_pruned_weights_are_as_small(bits: int) -> None:
    weight = normal(512, 512)
    weight[::3] = 0
    weight[:, 100:140] *= -0.0
    assert check(weight, bits).bits_per_weight <= MOST[bits]


# ---- sizes ----------------------------------------------------------------------------------


@both
def test_size_of_a_trained_model(bits: int) -> None:
    packed = [to_fle(w, bits) for w in load_file(BUNDLED).values() if w.dim() == 2]
    mean = 8 * sum(p.n_bytes for p in packed) / sum(p.n_weights for p in packed)
    worst = max(p.bits_per_weight for p in packed)
    print(f"fle{bits}, {len(packed)} tensors: {mean:.3f} bits, at most {worst:.3f}")
    assert worst <= MOST[bits]


@both
@pytest.mark.parametrize("spread", [0.0, 0.3, 0.5])
def test_size_of_normal_weights(bits: int, spread: float) -> None:
    packed = to_fle(normal(1024, 1024, spread), bits)
    print(f"fle{bits}, rows spread by {spread}: {packed.bits_per_weight:.3f} bits")
    assert packed.bits_per_weight <= MOST[bits]
    form, _, options = stored(packed)
    assert form.bits(packed.shape, options) == packed.bits_per_weight


# ---- slices ---------------------------------------------------------------------------------


@both
@settings(max_examples=30, deadline=None)
@given(rows=st.tuples(st.integers(0, 199), st.integers(1, 200)), seed=st.integers(0, 9))
def test_rows(bits: int, rows: tuple[int, int], seed: int) -> None:
    start, stop = min(rows), max(max(rows), min(rows) + 1)
    weight = normal(200, 100, 2.0, seed)
    form, parts, options = stored(to_fle(weight, bits))
    cut = form.slice(parts, (200, 100), options, 0, start, stop)
    form.check(cut, (stop - start, 100), options)
    assert torch.equal(words(form.decode(cut, (stop - start, 100))), words(weight[start:stop]))


@both
@pytest.mark.parametrize(("start", "stop"), [(0, 64), (64, 192), (128, 210), (192, 210), (0, 210)])
def test_columns(bits: int, start: int, stop: int) -> None:
    weight = torch.stack([normal(100, 210, 2.0, seed) for seed in range(2)])
    form, parts, options = stored(to_fle(weight, bits))
    cut = form.slice(parts, (2, 100, 210), options, -1, start, stop)
    shape = (2, 100, stop - start)
    form.check(cut, shape, options)
    assert torch.equal(words(form.decode(cut, shape)), words(weight[..., start:stop]))


def test_what_cannot_be_cut() -> None:
    form, parts, options = stored(to_fle(normal(70, 200), 4))
    with pytest.raises(FormatError, match="multiples of 64, got 0 to 100"):
        form.slice(parts, (70, 200), options, 1, 0, 100)
    with pytest.raises(FormatError, match="cannot cut 3 to 71"):
        form.slice(parts, (70, 200), options, 0, 3, 71)


# ---- as a format ----------------------------------------------------------------------------


def test_nothing_is_rounded() -> None:
    for form in FORMAT:
        known: Format = form
        weight = torch.randn(4, 64)
        for call in (
            lambda known=known, weight=weight: known.fit(weight, FleOptions()),
            lambda known=known, weight=weight: known.round(weight, {}, 0, FleOptions()),
            lambda known=known, weight=weight: known.candidates(weight, FleOptions()),
        ):
            with pytest.raises(FormatError, match="rounds nothing; it is a form of dense weights"):
                call()
        assert known.integer_form({}, (4, 64), FleOptions()) is None


def test_packing_a_weight_that_has_more_escapes_than_the_options() -> None:
    weight = normal(64, 64)
    weight[0, 0] = 1e30
    need = to_fle(weight, 4).terms[0].options.escapes
    with pytest.raises(FormatError, match=f"escapes must be {need} or more"):
        form_of(4).pack(weight, {}, FleOptions(need - 1))
    roomy = form_of(4).pack(weight, {}, FleOptions(need + 9))
    form_of(4).check(roomy, (64, 64), FleOptions(need + 9))
    assert torch.equal(words(form_of(4).decode(roomy, (64, 64))), words(weight))


def test_what_is_not_stored() -> None:
    with pytest.raises(FormatError, match=r"stores bfloat16 weights .* got float32"):
        to_fle(torch.zeros(4, 4), 4)
    with pytest.raises(FormatError, match="positive size"):
        to_fle(torch.zeros(0, 4).bfloat16(), 4)
    with pytest.raises(FormatError, match="4 or 3 bits, got 5"):
        to_fle(normal(2, 2), 5)
    with pytest.raises(FormatError, match="positive size"):
        form_of(3).part_specs((4,), FleOptions())
    for wrong in (-1, True, 2**31, "many"):
        with pytest.raises(RecipeError, match="escapes must be a whole number"):
            FleOptions(wrong)  # type: ignore[arg-type]


@both
def test_specs_say_what_is_stored(bits: int) -> None:
    packed = to_fle(torch.stack([normal(70, 200, seed=s) for s in range(2)]), bits)
    form, parts, options = stored(packed)
    specs = form.part_specs(packed.shape, options)
    assert {n: (p.dtype, tuple(p.shape)) for n, p in parts.items()} == {
        n: (s.dtype, s.shape) for n, s in specs.items()
    }
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    assert form.padded_shape(shapes, options) == (2, 70, 256)
    with pytest.raises(FormatError, match="sign_mantissa must be"):
        form.padded_shape({}, options)


# ---- damage ---------------------------------------------------------------------------------


def escaping() -> torch.Tensor:
    """[130, 100]: escapes in every tile, in fle4, too."""
    weight = normal(130, 100)
    weight[::9, ::9] = 2.0**60
    weight[1::9, ::9] = 2.0**-100
    return weight


def damaged(bits: int, name: str, index: object, value: int) -> str:
    """What `check` says of a weight one of whose numbers is another."""
    packed = to_fle(escaping(), bits)
    form, parts, options = stored(packed)
    parts[name] = parts[name].clone()
    parts[name][index] = value  # type: ignore[index]
    with pytest.raises(FormatError) as caught:
        form.check(parts, packed.shape, options)
    return str(caught.value)


@both
def test_windows_out_of_range(bits: int) -> None:
    most = 2**bits - 1
    assert f"base must be 0 to {256 - most}" in damaged(bits, "window", 0, 257 - most)
    assert f"must be {most} or {most - 1}, got 3" in damaged(bits, "window", 1, 3)
    packed = to_fle(torch.zeros(4, 4).bfloat16(), bits)
    form, parts, options = stored(packed)
    parts["window"] = torch.tensor([0, most - 1], dtype=torch.uint8)
    with pytest.raises(FormatError, match="base must be 1 to"):
        form.check(parts, packed.shape, options)


@both
def test_wrong_offsets(bits: int) -> None:
    said = damaged(bits, "offset", 2, 1)
    assert "offsets must start at 0 and never fall, got 1 at tile 2" in said
    assert "start at 0 and never fall, got 5 at tile 0" in damaged(bits, "offset", 0, 5)
    assert "never fall, got -1 at tile 1" in damaged(bits, "offset", 1, -1)
    assert "must end within the lists of" in damaged(bits, "offset", -1, 2**31 - 1)
    right = int(stored(to_fle(escaping(), bits))[1]["offset"][3])
    assert "tile 2 must list as many escapes" in damaged(bits, "offset", 3, right + 1)


def test_wrong_positions() -> None:
    assert "positions must be 0 to 4095, inside the tile" in damaged(4, "position", 7, 4096)
    assert "positions must be 0 to 4095, inside the tile" in damaged(4, "position", 7, -1)
    assert "entry 7 of position must be that of a code 0" in damaged(4, "position", 7, 4095)


@both
def test_wrong_codes_and_padding(bits: int) -> None:
    assert "as it has codes 0" in damaged(bits, "codes", (..., 3, 0), 0)
    assert "columns from 100 on pad the row" in damaged(bits, "sign_mantissa", (5, 110), 1)
    assert "pad the row" in damaged(bits, "codes", (..., 5, slice(-2, None)), 255)
    form, parts, options = stored(to_fle(escaping(), bits))
    with pytest.raises(FormatError, match=r"window must be torch\.uint8"):
        form.check(parts | {"window": parts["window"].int()}, (130, 100), options)
    with pytest.raises(FormatError, match="parts must be"):
        form.check({"window": parts["window"]}, (130, 100), options)


@both
def test_lists_end_with_zeros(bits: int) -> None:
    packed = to_fle(escaping(), bits)
    form, parts, _ = stored(packed)
    roomy = FleOptions(packed.terms[0].options.escapes + 3)
    parts = form.pack(escaping(), {}, roomy)
    form.check(parts, packed.shape, roomy)
    parts["exponent"][-1] = 1
    with pytest.raises(FormatError, match="lists must hold zeros after entry"):
        form.check(parts, packed.shape, roomy)


# ---- in products ----------------------------------------------------------------------------


def test_options_tell_no_two_problems_apart() -> None:
    from fewbit.quant.dispatch import problem_of

    one, other = to_fle(normal(64, 64), 4), to_fle(escaping()[:64, :64], 4)
    assert one.terms[0].options.escapes != other.terms[0].options.escapes
    first, second = (problem_of(p, 1, torch.bfloat16, "cpu") for p in (one, other))
    assert first == second and hash(first) == hash(second)
    assert first.family == second.family == "linear fle4 N=64 K=64 * bfloat16 cpu"


@both
def test_products_on_a_cpu_are_those_of_the_dense_weight(bits: int) -> None:
    from fewbit.quant.linear import QuantLinear
    from fewbit.quant.policy import use_kernels

    weight, x = normal(200, 136, 1.0), torch.randn(5, 136).bfloat16()
    expected = torch.nn.functional.linear(x, weight)
    layer = QuantLinear.from_packed(to_fle(weight, bits), None, torch.bfloat16)
    for kernel in ("fle_scratch", "reference"):
        with use_kernels(kernel):
            assert torch.equal(words(layer(x)), words(expected))
    assert torch.equal(words(layer.weight), words(weight))
    assert isinstance(layer.terms[0][1], FleOptions)


def test_a_term_goes_through_an_empty_module() -> None:
    """Options say the sizes of all parts, so that a module can be made before its parts are read."""
    from fewbit.quant.linear import QuantLinear

    packed = to_fle(escaping(), 3)
    (term,) = packed.terms
    layer = QuantLinear(packed.shape, [(term.format, term.options)], False, torch.bfloat16)
    layer.load_state_dict(dict(term.parts))
    assert torch.equal(words(layer.weight), words(escaping()))
    assert Term(term.format, term.options, layer.packed.terms[0].parts).options == term.options
