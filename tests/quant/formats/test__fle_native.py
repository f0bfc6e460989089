"""The C form writes what the torch form writes, and stays inside its buffers whatever it reads."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewbit.quant.errors import FormatError
from fewbit.quant.format import Parts
from fewbit.quant.formats import _fle_native
from fewbit.quant.formats.fle import FleOptions, form_of
from fewbit.quant.native import compiler
from fle_weights import any_bits, spread_weight, words

pytestmark = pytest.mark.skipif(compiler.library() is None, reason=str(compiler.why_not()))
both = pytest.mark.parametrize("bits", [4, 3])
SHAPES = [
    (1, 1), (1, 64), (63, 65), (64, 64), (65, 63), (128, 128), (130, 129), (70, 200), (2, 16454)
]  # fmt: skip


@pytest.fixture(params=compiler.ISA_NAMES)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    wanted = compiler.ISA_NAMES.index(request.param)
    library = compiler.library()
    if library is None or library.fewbit_isa(wanted) != wanted:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("FEWBIT_NATIVE_ISA", request.param)
    return str(request.param)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three, however small the weight."""
    monkeypatch.setattr(_fle_native, "_LEAST", 64)
    monkeypatch.setattr(_fle_native, "_COUNTED", 999)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def in_torch(weight: torch.Tensor, bits: int) -> tuple[Parts, torch.Tensor]:
    """(parts, words) by the torch form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fle_native, "serves", lambda *tensors: False)
        (parts,) = form_of(bits).pack_matrices(weight)
        return parts, words(form_of(bits).decode(parts, tuple(weight.shape)))


def compare(weight: torch.Tensor, bits: int) -> None:
    expected, decoded = in_torch(weight, bits)
    assert torch.equal(decoded, words(weight))
    (parts,) = form_of(bits).pack_matrices(weight)
    assert list(parts) == list(form_of(bits).part_specs(tuple(weight.shape), FleOptions()))
    assert set(parts) == set(expected)
    for name, part in parts.items():
        assert part.dtype == expected[name].dtype and torch.equal(part, expected[name]), name
    assert torch.equal(words(form_of(bits).decode(parts, tuple(weight.shape))), words(weight))


@both
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_all_patterns(isa: str, bits: int, order: str) -> None:
    pattern = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    if order == "shuffled":
        pattern = pattern[torch.randperm(2**16, generator=torch.Generator().manual_seed(1))]
    compare(pattern.view(256, 256).view(torch.bfloat16), bits)
    compare(pattern[: 250 * 262].view(250, 262).view(torch.bfloat16), bits)


@both
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_shapes(isa: str, bits: int, n: int, k: int) -> None:
    """Edges of tiles, rows of one column, and more tiles than have cursors at once."""
    compare(spread_weight(n, k), bits)
    compare(any_bits(n, k), bits)


@both
def test_zeros(isa: str, bits: int) -> None:
    """Of both signs: all, every third row, and around the share that gets a code of its own."""
    weight = spread_weight(130, 100, 0.3)
    weight[::3] = 0
    weight[:, 40:60] *= -0.0
    compare(weight, bits)
    compare(torch.zeros(70, 66).bfloat16(), bits)
    compare(-torch.zeros(70, 66).bfloat16(), bits)
    for zeros in (63, 64, 65):
        weight = 1 + spread_weight(64, 64).abs()
        weight.view(-1)[:zeros] = 0
        compare(weight, bits)


@both
def test_windows_at_both_ends(isa: str, bits: int) -> None:
    """Exponents 0 to 3, where base − 1 wraps, and 250 to 255, with one of the other end."""
    generator = torch.Generator().manual_seed(0)
    for low, other in ((0, 255), (250, 0), (255, 1)):
        drawn = torch.randint(low, min(low + 4, 256), (70, 70), generator=generator)
        drawn[5, 5] = other
        compare((drawn << 7).short().view(torch.bfloat16), bits)


@both
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n=st.integers(1, 140), k=st.integers(1, 140), spread=st.floats(0, 5), seed=st.integers(0, 99)
)
def test_any_shape_on_three_threads(
    threads: None, bits: int, n: int, k: int, spread: float, seed: int
) -> None:
    compare(spread_weight(n, k, spread, seed), bits)


def test_counts() -> None:
    for n in (1, 3, 4, 1001):
        weight = words(any_bits(1, n))
        exponent = (weight.int() >> 7 & 255).flatten()
        assert torch.equal(_fle_native.count(weight), torch.bincount(exponent, minlength=256))


@both
def test_without_native_code_the_bytes_are_the_same(bits: int) -> None:
    script = (
        "import hashlib, sys; from fewbit.quant.formats.fle import form_of\n"
        "from fewbit.quant.formats import _fle_native; from fle_weights import spread_weight, words\n"
        "weight = spread_weight(130, 100); (parts,) = form_of(int(sys.argv[1])).pack_matrices(weight)\n"
        "assert form_of(int(sys.argv[1])).decode(parts, (130, 100)).equal(weight)\n"
        "digest = hashlib.sha256()\n"
        "for name in sorted(parts): digest.update(name.encode() + parts[name].numpy().tobytes())\n"
        "print(_fle_native.serves(words(weight)), digest.hexdigest())\n"
    )
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = []
    for value in ("", "off"):
        environment = os.environ | {"FEWBIT_NATIVE": value, "PYTHONPATH": os.pathsep.join(paths)}
        answer = subprocess.run(
            [sys.executable, "-c", script, str(bits)],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.append(answer.stdout.split())
    assert [served for served, _ in found] == ["True", "False"] and found[0][1] == found[1][1]


@both
def test_lists_of_other_words_are_not_filled(bits: int) -> None:
    """C would write behind them: the words have more escapes than there is room for, or fewer."""
    parts = escaping(bits)  # with room for one more than there are
    before = parts["exponent"].clone()
    weight = spread_weight(130, 100, 0.0)
    weight[:40] = 2.0**60
    for other in (weight, spread_weight(130, 100, 0.0)):
        with pytest.raises(FormatError, match=r"room for \[\d+\] escapes, the words have \d+ "):
            _fle_native.encode(words(other), parts, bits)
        assert torch.equal(parts["exponent"], before)


# ---- damage ---------------------------------------------------------------------------------


def escaping(bits: int) -> Parts:
    """Of [130, 100]: escapes in every tile; lists end with a zero that is not used."""
    weight = spread_weight(130, 100, 0.0)
    weight[::9, ::9] = 2.0**60
    weight[1::9, ::9] = 2.0**-100
    weight[[0, 63, 129], 8] = 2.0**60
    weight[129, 70] = 2.0**60
    (parts,) = form_of(bits).pack_matrices(weight)
    for name in {"position", "exponent"} & set(parts):
        parts[name] = torch.nn.functional.pad(parts[name], (0, 1))
    return parts


def decode(parts: Parts, bits: int) -> str:
    """What is wrong with parts of [130, 100]; "" if nothing is. Nothing around is written."""
    around = torch.full((130 * 100 + 2000,), 7.5, dtype=torch.bfloat16)
    try:
        form_of(bits).decode_into(parts, around[1000:-1000].view(130, 100))
    except FormatError as error:
        return str(error)
    finally:
        assert bool((around[:1000] == 7.5).all()) and bool((around[-1000:] == 7.5).all())
    return ""


def damaged(bits: int, name: str, index: object, value: int) -> str:
    parts = escaping(bits)
    assert not decode(parts, bits)
    parts[name][index] = value  # type: ignore[index]
    return decode(parts, bits)


@both
def test_wrong_offsets(isa: str, bits: int) -> None:
    assert "start at 0 and never fall, got 5 at tile 0" in damaged(bits, "offset", 0, 5)
    assert "never fall, got -1 at tile 0" in damaged(bits, "offset", 0, -1)
    assert "never fall, got -9 at tile 3" in damaged(bits, "offset", 3, -9)
    assert "never fall, got 1 at tile 2" in damaged(bits, "offset", 2, 1)
    assert "must end within the lists" in damaged(bits, "offset", -1, 2**31 - 1)


def test_wrong_positions(isa: str) -> None:
    for value in (-1, 4096, -(2**15), 2**15 - 1):
        assert "positions must be 0 to 4095" in damaged(4, "position", 7, value)
    # In the tile, but not in the matrix: column 36 + 64, row 2 + 128.
    offset = escaping(4)["offset"].tolist()
    assert offset[1] < offset[2] and offset[5] < offset[6]
    assert "position must be that of a code 0" in damaged(4, "position", offset[2] - 1, 36)
    assert "position must be that of a code 0" in damaged(4, "position", offset[6] - 1, 2 * 64)


def test_codes_that_have_no_entry(isa: str) -> None:
    """fle3: one more and one less than a tile lists, in its first and its last row."""
    for row in (0, 63, 129):
        for value in (0, 255):
            parts = escaping(3)
            parts["codes"][:, row, 1] = value
            assert "must list as many escapes as it has codes 0" in decode(parts, 3)


@both
def test_parts_of_another_shape(bits: int) -> None:
    for name, part in escaping(bits).items():
        others = [part.double(), part[None], part[..., :-1], torch.cat((part, part), -1)]
        if name == "exponent" and bits == 3:  # of any length that holds what `offset` says
            others = others[:2]
        for other in others:
            assert "must be torch." in decode(escaping(bits) | {name: other}, bits), name
        parts = escaping(bits)
        del parts[name]
        assert "parts must be" in decode(parts, bits)
    short = escaping(3)
    short["exponent"] = short["exponent"][:-2]
    assert "must end within the lists" in decode(short, 3)


@both
def test_any_byte_may_be_wrong(isa: str, bits: int) -> None:
    """Some damage cannot be seen; none leads outside, and none but FormatError is raised."""
    generator = torch.Generator().manual_seed(bits)
    seen = 0
    for _ in range(150):
        parts = escaping(bits)
        name = sorted(parts)[int(torch.randint(len(parts), (), generator=generator))]
        flat = parts[name].view(-1).view(torch.uint8)
        at = torch.randint(flat.numel(), (3,), generator=generator)
        flat[at] = torch.randint(256, (3,), dtype=torch.uint8, generator=generator)
        seen += bool(decode(parts, bits))
    assert seen > 20


@both
def test_where_weights_may_be_put(bits: int) -> None:
    with pytest.raises(FormatError, match=r"contiguous bfloat16, got torch.bfloat16 of strides"):
        form_of(bits).decode_into(escaping(bits), torch.empty(100, 130).bfloat16().T)
    with pytest.raises(FormatError, match=r"contiguous bfloat16, got torch.float16"):
        form_of(bits).decode_into(escaping(bits), torch.empty(130, 100).half())


def test_what_is_served() -> None:
    here, elsewhere = torch.empty(2), torch.empty(2, device="meta")
    assert _fle_native.serves(here, here) and not _fle_native.serves(here, elsewhere)
