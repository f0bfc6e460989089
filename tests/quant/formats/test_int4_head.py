"""`int4_head`: golden bytes, the error bound, and groups that break careless arithmetic."""

import pytest
import torch

from fewbit.quant.errors import FormatError, RecipeError
from fewbit.quant.formats.int4_head import PAGE_FORMAT, Int4HeadOptions

RANGE, SEARCH = Int4HeadOptions("range"), Int4HeadOptions("search")
BOTH = pytest.mark.parametrize("options", [RANGE, SEARCH], ids=["range", "search"])


def round_trip(x: torch.Tensor, options: Int4HeadOptions) -> torch.Tensor:
    return PAGE_FORMAT.decode(PAGE_FORMAT.encode(x, options), torch.float32, options)


def codes_of(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    packed = parts["codes"]
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@BOTH
def test_golden_bytes(options: Int4HeadOptions) -> None:
    x = torch.arange(16.0) / 2 - 3  # exactly on a grid: scale 0.5, minimum -3
    parts = PAGE_FORMAT.encode(x, options)
    assert parts["codes"].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert parts["scale"].tolist() == [0.5] and parts["scale"].dtype == torch.float16
    assert parts["minimum"].tolist() == [-3.0] and parts["minimum"].dtype == torch.float16
    assert torch.equal(PAGE_FORMAT.decode(parts, torch.float32, options), x)


@BOTH
def test_parts_are_as_declared(options: Int4HeadOptions) -> None:
    x = gaussian(3, 2, 5, 24)
    parts = PAGE_FORMAT.encode(x, options)
    specs = PAGE_FORMAT.part_specs(24, torch.bfloat16, options)
    assert parts.keys() == specs.keys()
    for name, spec in specs.items():
        assert parts[name].dtype == spec.dtype
        assert parts[name].shape == (3, 2, 5, *spec.shape)
    assert sum(spec.n_bytes for spec in specs.values()) == 12 + 4


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("dim", [2, 24, 64, 128])
def test_every_error_is_at_most_half_a_step_and_fp16_slack(dim: int, scale: float) -> None:
    x = gaussian(500, dim) * scale + scale
    parts = PAGE_FORMAT.encode(x, RANGE)
    s, low = parts["scale"].float(), parts["minimum"].float()
    # Rounding scale and minimum to fp16 moves the top of the grid by at most this much.
    slack = (15 * s + low.abs()) * 2.0**-11 + 16 * 2.0**-25
    error = (PAGE_FORMAT.decode(parts, torch.float32, RANGE) - x).abs()
    assert bool((error <= s / 2 + slack).all())
    expected = ((x - low) / s).round().clamp(0, 15).to(torch.uint8)
    assert torch.equal(codes_of(parts), expected)


@BOTH
def test_code_sixteen_does_not_exist(options: Int4HeadOptions) -> None:
    """Where fp16 rounds the scale down, the largest value lies beyond 15.5 steps for some x."""
    low = torch.linspace(-1e-6, 1e-6, 2001).unsqueeze(1)
    x = torch.cat([low, low + 2.0**-24 * 15.9, low], dim=1).repeat(1, 2)
    raw = (x.amax(1) - x.amin(1)) / 2.0**-24
    assert float(raw.max()) > 15.5, "the case does not bite: no quotient rounds to 16"
    codes = codes_of(PAGE_FORMAT.encode(x, options))
    assert int(codes.max()) == 15
    assert float((round_trip(x, options) - x).abs().max()) < 2.0**-23


@BOTH
@pytest.mark.parametrize("value", [0.0, 1.0, -1e4, 1e4, 65504.0, -65504.0, 1e-8])
def test_constant_vectors_come_back(value: float, options: Int4HeadOptions) -> None:
    x = torch.full((3, 8), value)
    found = round_trip(x, options)
    assert torch.equal(found, x.half().float()) or float((found - x).abs().max()) < 2.0**-24


@BOTH
def test_extreme_vectors_stay_finite_and_right(options: Int4HeadOptions) -> None:
    x = torch.zeros(4, 64)
    x[0] = torch.linspace(-65504, 65504, 64)
    x[1, 7] = 65504
    x[2] = 1e4
    x[2, 3] = -1e4
    x[3, 5], x[3, 6] = 1e30, -float("inf")
    found = round_trip(x, options)
    bounded = x.clamp(-65504, 65504)
    assert bool(found.isfinite().all())
    step = (bounded.amax(1) - bounded.amin(1)) / 15
    bound = 0.51 if options == RANGE else 1.0  # a search may clip the ends
    assert bool(((found - bounded).abs().amax(1) <= bound * step).all())
    half = PAGE_FORMAT.decode(PAGE_FORMAT.encode(x, options), torch.float16, options)
    assert bool(half.isfinite().all()), "fp16 overflowed where fp32 did not"


@BOTH
def test_damage_is_not_hidden(options: Int4HeadOptions) -> None:
    x = gaussian(2, 8)
    x[1, 3] = float("nan")
    found = round_trip(x, options)
    assert bool(found[0].isfinite().all()) and bool(found[1].isnan().all())


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_search_lowers_the_error_of_every_vector(dim: int) -> None:
    laplace = gaussian(2000, dim, seed=1) * gaussian(2000, dim, seed=2).abs()
    for x in (gaussian(2000, dim), laplace):
        errors = [(round_trip(x, o) - x).square().sum(1) for o in (RANGE, SEARCH)]
        assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())
        assert float(errors[1].sum() / errors[0].sum()) < 0.95**2


def test_vectors_are_independent() -> None:
    x = gaussian(7, 3, 64)
    whole = PAGE_FORMAT.encode(x, SEARCH)
    single = PAGE_FORMAT.encode(x[4, 1], SEARCH)
    for name, part in single.items():
        assert torch.equal(part, whole[name][4, 1])


def test_refusals() -> None:
    with pytest.raises(FormatError, match="must be even, got 25"):
        PAGE_FORMAT.part_specs(25, torch.float32, SEARCH)
    with pytest.raises(RecipeError, match="'range' or 'search', got 'mse'"):
        Int4HeadOptions("mse")
