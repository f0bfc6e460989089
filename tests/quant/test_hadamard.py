"""Hadamard transforms: exact in integers, frozen by golden values, equal to their dense matrix."""

import hashlib
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.quant import hadamard
from fewbit.quant.errors import FormatError
from fewbit.quant.hadamard import (
    Hadamard,
    hadamard_matrix,
    largest_order,
    sign_bits,
    supported,
    two_factors,
)

HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256)
WIDTHS = (
    768, 896, 1152, 1536, 2048, 2304, 2560, 3072, 3584, 4096, 4864, 5120, 5376, 5632, 6144, 6656,
    6912, 8192, 8960, 9216, 9728, 10240, 11008, 12288, 13824, 14336, 16384, 17408, 18944, 21504,
    24576, 25600, 27648, 28672, 29568, 36864, 53248,
)  # fmt: skip
# the first 16 hex digits of sha256 over the int8 rows: a change here breaks stored checkpoints
GOLDEN = {
    12: "db7478025ce74776",  # paley I
    20: "d04b560308676ee7",
    28: "3ec6c53133760a03",  # over GF(3^3)
    36: "1a7aed2f42a8c71d",  # paley II
    52: "f50db5d0f93762d3",  # over GF(5^2)
    76: "290dc2c593bbcba4",
    92: "d6958291ec775749",  # williamson
    116: "90f1b7da2ccb468d",
    156: "1aac7fad336c39a5",
    344: "37f6f677ac35a517",  # williamson 172, doubled
    4864: "8acb21894779660b",
}
BASES = [base for odd in range(3, 513, 2) if (base := hadamard._base(odd))]


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


def assert_hadamard(matrix: torch.Tensor) -> None:
    order = len(matrix)
    assert matrix.dtype == torch.int8
    assert bool((matrix.abs() == 1).all())
    gram = matrix.float() @ matrix.float().T  # sums below 2^24: exact in fp32
    assert torch.equal(gram, order * torch.eye(order))


# ---- matrices ------------------------------------------------------------------------------------


# every base that models can meet; of the large ones every sixth, to save seconds
@pytest.mark.parametrize("order", [o for i, o in enumerate(BASES) if o <= 700 or i % 6 == 0])
def test_every_base_is_orthogonal_in_integers(order: int) -> None:
    assert_hadamard(hadamard_matrix(order))


@pytest.mark.parametrize("order", [1, 2, 4, 256, 96, 344, 896, 1232])
def test_products_are_orthogonal_in_integers(order: int) -> None:
    assert_hadamard(hadamard_matrix(order))


def test_the_bases_cover_each_construction_and_each_kind_of_field() -> None:
    fields = {order: hadamard._prime_power(order - 1) for order in BASES}
    degrees = {power[1] for power in fields.values() if power}
    second = {hadamard._prime_power(o // 2 - 1) for o in BASES if hadamard._is_paley_two(o)}
    assert degrees >= {1, 3}
    assert {(17, 1), (5, 2), (7, 2), (13, 2)} <= second
    assert {92, 116, 156, 172} <= set(BASES)
    assert [fields[o] for o in (92, 116, 156, 172)] == [None] * 4


@pytest.mark.parametrize("q", [3, 7, 9, 25, 27, 81, 243, 343, 625, 729])
def test_character_is_multiplicative_over_prime_powers(q: int) -> None:
    # Q Qᵀ = q·I − J and row sums of 0 hold for the quadratic character of a field, not of a ring
    table = hadamard._difference_character(q).double()
    ones = torch.ones(q, q, dtype=torch.float64)
    assert torch.equal(table @ table.T, q * torch.eye(q, dtype=torch.float64) - ones)
    assert not table.sum(1).any()
    assert torch.equal(table.T, table if q % 4 == 1 else -table)


def test_order_12_is_the_textbook_matrix() -> None:
    squares = {1, 3, 4, 5, 9}  # modulo 11
    expected = [[1] * 12]
    for i in range(11):
        row = [1 if i == j or (i - j) % 11 in squares else -1 for j in range(11)]
        expected.append([-1, *row])
    assert hadamard_matrix(12).tolist() == expected


@pytest.mark.parametrize("order", GOLDEN)
def test_matrices_never_drift(order: int) -> None:
    rows = hadamard_matrix(order).numpy().tobytes()
    assert hashlib.sha256(rows).hexdigest()[:16] == GOLDEN[order]


@pytest.mark.parametrize(
    ("order", "factors"),
    [
        (1, ()),
        (8, (2, 2, 2)),
        (4864, (76, *[2] * 6)),
        (11008, (172, *[2] * 6)),
        (1152, (36, *[2] * 5)),  # not 12·12: a pass costs more than wider rows
        (29568, (44, 84, 2, 2, 2)),
        (4096, (2,) * 12),
    ],
)
def test_choice_of_factors_never_drifts(order: int, factors: tuple[int, ...]) -> None:
    assert hadamard._factors(order) == factors


# ---- signs ---------------------------------------------------------------------------------------


def words(seed: int, count: int) -> list[int]:
    bits = sign_bits(seed, 64 * count).tolist()
    return [sum(bit << i for i, bit in enumerate(bits[64 * w : 64 * w + 64])) for w in range(count)]


def test_sign_bits_are_splitmix64() -> None:
    # published first outputs of the generator
    assert words(0, 1) == [0xE220A8397B1DCDAF]
    assert words(1234567, 2) == [6457827717110365317, 3203168211198807973]


def test_signs_of_seed_7_never_drift() -> None:
    assert words(7, 1)[0].to_bytes(8, "little").hex() == "d70d3259e4e1cb63"
    # 0xd7 = 0b11010111, lowest bit first, a set bit is −1
    assert Hadamard(12, 7).signs().tolist()[:8] == [-1, -1, -1, 1, -1, 1, -1, -1]
    assert Hadamard(12).signs().tolist() == [1] * 12


def test_signs_of_one_seed_share_their_beginning_and_seeds_differ() -> None:
    long, short = Hadamard(768, 7).signs(), Hadamard(80, 7).signs()
    assert torch.equal(long[:80], short)
    assert 300 < int((long != Hadamard(768, 8).signs()).sum()) < 468


# ---- transforms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 12, *HEAD_DIMS, 344, 768, 1152, 1232])
@pytest.mark.parametrize("seed", [None, 7])
def test_apply_is_the_product_with_the_matrix(order: int, seed: int | None) -> None:
    x = torch.randn(5, order, dtype=torch.float64)
    transform = Hadamard(order, seed)
    q = transform.matrix()
    torch.testing.assert_close(q @ q.T, torch.eye(order, dtype=torch.float64))
    torch.testing.assert_close(transform.apply(x), x @ q, rtol=0, atol=1e-12)
    torch.testing.assert_close(transform.apply_transposed(x), x @ q.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [*HEAD_DIMS, *WIDTHS])
def test_every_real_size_keeps_length_and_inverts(order: int) -> None:
    assert supported(order)
    assert largest_order(order) == order
    x = torch.randn(2, order)
    transform = Hadamard(order, 7)
    y = transform.apply(x)
    torch.testing.assert_close(transform.apply_transposed(y), x, rtol=0, atol=2e-5)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    spike = torch.zeros(order)
    spike[3] = order**0.5  # one outlier spreads evenly
    torch.testing.assert_close(transform.apply(spike).abs(), torch.ones(order))


@settings(max_examples=40, deadline=None)
@given(
    order=st.sampled_from([2, 12, 64, 344, 768]),
    blocks=st.integers(1, 3),
    lead=st.sampled_from([(), (0,), (1,), (3, 2)]),
    seed=st.one_of(st.none(), st.integers(0, 2**63 - 1)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_blocks_shapes_and_dtypes(
    order: int, blocks: int, lead: tuple[int, ...], seed: int | None, dtype: torch.dtype
) -> None:
    x = torch.randn(*lead, blocks * order, dtype=torch.float64).to(dtype)
    kept = x.clone()
    transform = Hadamard(order, seed)
    y = transform.apply(x)
    whole = torch.block_diag(*[transform.matrix()] * blocks)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    half = dtype.itemsize == 2  # one rounding; otherwise the roundings of some hundred summands
    tolerance = (4 if half else 64) * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), x.double() @ whole, rtol=tolerance, atol=tolerance)
    back = transform.apply_transposed(y)
    torch.testing.assert_close(back.double(), x.double(), rtol=tolerance, atol=2 * tolerance)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [128, 896])
def test_half_precision_is_rounded_once(dtype: torch.dtype, order: int) -> None:
    x = torch.randn(16, order).to(dtype)
    transform = Hadamard(order, 7)
    assert torch.equal(transform.apply(x), transform.apply(x.float()).to(dtype))
    back = transform.apply_transposed(x)
    assert torch.equal(back, transform.apply_transposed(x.float()).to(dtype))


def test_strided_input() -> None:
    x = torch.randn(96, 7, dtype=torch.float64)
    transform = Hadamard(96, 1)
    torch.testing.assert_close(transform.apply(x.T), x.T @ transform.matrix())


@pytest.mark.parametrize("order", [12, 768])
def test_gradient_is_the_inverse(order: int) -> None:
    transform = Hadamard(order, 7)
    weight = torch.randn(3, order, dtype=torch.float64)
    for forward, backward in (
        (transform.apply, transform.apply_transposed),
        (transform.apply_transposed, transform.apply),
    ):
        x = torch.randn(3, order, dtype=torch.float64, requires_grad=True)
        (forward(x) * weight).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, backward(weight))


def test_first_use_under_inference_mode_or_another_default_device_does_no_harm() -> None:
    hadamard._operand.cache_clear()
    hadamard._whole_operand.cache_clear()
    hadamard._scaled_signs.cache_clear()
    hadamard._elementary.cache_clear()
    for order in (80, 2560):
        x = torch.randn(2, order)
        with torch.inference_mode(), torch.device("meta"):
            expected = Hadamard(order, 7).apply(x)
        trained = x.clone().requires_grad_()
        y = Hadamard(order, 7).apply(trained)
        y.square().sum().backward()
        assert torch.equal(y, expected)


def test_fewer_than_a_tenth_of_the_dense_products() -> None:
    for order in (4864, 14336, 18944, 53248):
        sizes = [torch.Size(group).numel() for group in hadamard._groups(order)]
        assert torch.Size(sizes).numel() == order
        assert sum(sizes) < order / 10


# ---- refusals and the stored form ----------------------------------------------------------------


@pytest.mark.parametrize("order", [3, 6, 770, 4865])
def test_orders_that_do_not_exist_are_refused_by_name(order: int) -> None:
    assert not supported(order)
    with pytest.raises(FormatError, match=rf"order {order} does not exist.*multiples of 4"):
        Hadamard(order)


def test_unknown_orders_name_the_nearest_and_the_block_size() -> None:
    with pytest.raises(FormatError) as caught:
        Hadamard(13696)  # 107·128; no matrix of order 428 is known to us
    text = str(caught.value)
    assert "order 13696 has no known construction" in text
    near = [order for order in range(13600, 13800) if supported(order)]
    below, above = next((a, b) for a, b in pairwise(near) if a < 13696 < b)
    assert f"nearest are {below} and {above}" in text
    assert "blocks of order 128" in text
    with pytest.raises(FormatError, match="order 428"):
        hadamard_matrix(428)


@pytest.mark.parametrize(
    "n, expected", [(1, 1), (770, 2), (13696, 128), (4864, 4864), (2880, 2880)]
)
def test_largest_order(n: int, expected: int) -> None:
    assert largest_order(n) == expected


@pytest.mark.parametrize("order", [0, -4, True, 12.0, "12", 1 << 40])
def test_bad_orders(order: Any) -> None:
    with pytest.raises(FormatError, match="order"):
        Hadamard(order)


@pytest.mark.parametrize("seed", [-1, 1 << 63, 1.5, True, "7"])
def test_bad_seeds(seed: Any) -> None:
    with pytest.raises(FormatError, match="seed"):
        Hadamard(12, seed)


def test_bad_inputs() -> None:
    with pytest.raises(FormatError, match=r"multiple of 12, got \[2, 13\]"):
        Hadamard(12).apply(torch.zeros(2, 13))
    with pytest.raises(FormatError, match=r"multiple of 12, got \[\]"):
        Hadamard(12).apply(torch.tensor(1.0))
    with pytest.raises(FormatError, match=r"got torch\.int8"):
        Hadamard(12).apply_transposed(torch.zeros(12, dtype=torch.int8))
    with pytest.raises(FormatError, match="got 0"):
        largest_order(0)


@pytest.mark.parametrize("transform", [Hadamard(768, 7), Hadamard(12), Hadamard(80, 0)])
def test_stored_form_round_trips(transform: Hadamard) -> None:
    assert Hadamard.parse(transform.to_json()) == transform


def test_stored_form() -> None:
    assert Hadamard(768, 7).to_json() == {"op": "hadamard", "order": 768, "seed": 7}
    assert Hadamard(768).to_json() == {"op": "hadamard", "order": 768}
    assert Hadamard.parse({"op": "hadamard", "order": 768, "seed": None}) == Hadamard(768)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"op": "hadamard", "order": 12, "sead": 7}, "'sead'.*'seed'"),
        ({"op": "permute", "order": 12}, "'permute'"),
        ({"order": 12}, "op must be"),
        ({"op": "hadamard"}, "order is missing"),
        ({"op": "hadamard", "order": "12"}, "'12'"),
        ({"op": "hadamard", "order": 14}, "order 14 does not exist"),
    ],
)
def test_damaged_stored_forms_are_refused(stored: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Hadamard.parse(stored)


@pytest.mark.parametrize("order", [1, 2, 12, 64, 96, 768, 4864, 8960])
def test_two_factors_multiply_to_the_matrix(order: int) -> None:
    found = two_factors(order, 256)
    assert found is not None and max(len(factor) for factor in found) <= 256
    assert torch.equal(torch.kron(*found), hadamard_matrix(order))


def test_factors_are_even_and_small_or_none() -> None:
    sizes = {
        order: [len(f) for f in two_factors(order, 256) or ()] for order in (4096, 14336, 29568)
    }
    assert sizes == {4096: [64, 64], 14336: [112, 128], 29568: []}
    assert two_factors(172, 128) is None
    with pytest.raises(FormatError, match="6"):
        two_factors(6, 256)
