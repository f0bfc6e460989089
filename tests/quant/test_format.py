"""Finding formats, reading their options, and sums of terms."""

import pytest
import torch

from fewbit.quant.errors import RecipeError
from fewbit.quant.format import (
    PartSpec,
    dequantize,
    find_format,
    formats,
    parse_options,
    term_config,
)
from fewbit.quant.formats.int_group import FORMAT, IntGroupOptions
from fewbit.quant.packed import PackedTensor, Term


def term_of(weight: torch.Tensor, options: IntGroupOptions) -> Term:
    scales = FORMAT.fit(weight, options)
    codes, _ = FORMAT.round(weight, scales, 0, options)
    return Term("int_group", options, FORMAT.pack(codes, scales, options))


def test_formats_are_found_by_name() -> None:
    assert formats()["int_group"] is FORMAT
    assert all(name == found.name for name, found in formats().items())
    assert find_format("int_group") is FORMAT


def test_unknown_format_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"unknown format 'int_gruop' \(did you mean 'int_group'"):
        find_format("int_gruop")


def test_options_come_from_recipe_keys() -> None:
    options = parse_options("int_group", IntGroupOptions, {"bits": 3, "group": 64})
    assert options == IntGroupOptions(bits=3, group=64)
    with pytest.raises(RecipeError, match=r"unknown key 'gruop' \(did you mean 'group'"):
        parse_options("int_group", IntGroupOptions, {"gruop": 64})
    with pytest.raises(RecipeError, match="bits must be"):
        parse_options("int_group", IntGroupOptions, {"bits": 11})


def test_term_config_reads_back() -> None:
    term = Term("int_group", IntGroupOptions(3, "row", False, "bf16"), {})
    config = term_config(term)
    assert config == {
        "format": "int_group",
        "bits": 3,
        "group": "row",
        "symmetric": False,
        "scale": "bf16",
    }
    name = config.pop("format")
    assert parse_options(name, find_format(name).Options, config) == term.options


def test_dequantize_sums_terms() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 64)
    first = term_of(weight, IntGroupOptions(3, 32))
    coarse = dequantize(PackedTensor((6, 64), (first,)))
    second = term_of(weight - coarse, IntGroupOptions(4, 16))
    both = dequantize(PackedTensor((6, 64), (first, second)))
    rest = dequantize(PackedTensor((6, 64), (second,)))
    assert torch.equal(both, coarse + rest)
    assert float((both - weight).norm()) < 0.15 * float((coarse - weight).norm())


def test_a_tensor_without_terms_is_refused() -> None:
    with pytest.raises(RecipeError, match="at least one term"):
        dequantize(PackedTensor((2, 2), ()))


def test_part_spec_counts_bytes() -> None:
    assert PartSpec(torch.float16, (3, 5)).n_bytes == 30
    assert PartSpec(torch.uint8, (2, 3, 5)).n_bytes == 30
