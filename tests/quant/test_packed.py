"""Facts about packed tensors: names of parts, sizes."""

import torch

from fewbit.quant.formats.int_group import FORMAT, IntGroupOptions
from fewbit.quant.packed import PackedTensor, Term


def empty_term(shape: tuple[int, ...], options: IntGroupOptions) -> Term:
    specs = FORMAT.part_specs(shape, options)
    parts = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    return Term("int_group", options, parts)


def test_parts_of_later_terms_carry_the_term_number() -> None:
    shape = (8, 32)
    first = empty_term(shape, IntGroupOptions(2, 16, symmetric=False))
    second = empty_term(shape, IntGroupOptions(3, "row"))
    names = [name for name, _ in PackedTensor(shape, (first, second)).named_parts()]
    assert names == ["codes", "scale_group", "zero_group", "term1.codes", "term1.scale_group"]


def test_sizes_count_every_part_and_padding() -> None:
    # 40 columns pad to 48: 24 bytes of 4-bit codes, three fp16 scales of 2 bytes, a row
    packed = PackedTensor((6, 40), (empty_term((6, 40), IntGroupOptions(4, 16)),))
    assert packed.n_weights == 240
    assert packed.n_bytes == 6 * (24 + 6)
    assert packed.bits_per_weight == 8 * 180 / 240


def test_experts_multiply_the_sizes() -> None:
    one = PackedTensor((6, 32), (empty_term((6, 32), IntGroupOptions(4, 16)),))
    many = PackedTensor((5, 6, 32), (empty_term((5, 6, 32), IntGroupOptions(4, 16)),))
    assert many.n_weights == 5 * one.n_weights
    assert many.n_bytes == 5 * one.n_bytes
    assert many.bits_per_weight == one.bits_per_weight
