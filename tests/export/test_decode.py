"""Decoding FP8 and MXFP4: against the transformers library, a naive loop and golden numbers."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from fewbit.export.decode import (
    _round_to_bfloat16,
    decode_fp8,
    decode_mxfp4,
    decode_rows,
    logical_tensors,
)
from fewbit.export.safetensors_file import Entry
from fewbit.quant.errors import CheckpointError

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
E8M0 = getattr(torch, "float8_e8m0fnu", None)


def random_float8(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """Every finite code occurs."""
    finite = torch.arange(256, dtype=torch.uint8)
    finite = finite[finite.view(dtype).float().isfinite()]
    return finite[torch.randint(0, len(finite), shape)].view(dtype)


def entries_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Entry]:
    return {
        name: Entry(name, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)
        for name, tensor in tensors.items()
    }


class Source:
    """Stored tensors in memory, remembering which rows were asked for."""

    def __init__(self, block: tuple[int, int] = (128, 128), **tensors: torch.Tensor) -> None:
        self.tensors = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        self.logical = logical_tensors(entries_of(self.tensors), block)
        self.fetched: dict[str, tuple[int, int]] = {}

    def fetch(self, name: str, start: int, stop: int) -> torch.Tensor:
        self.fetched[name] = (start, stop)
        tensor = self.tensors[name]
        return tensor[start:stop] if tensor.ndim else tensor

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        tensor = self.logical[name]
        return decode_rows(
            tensor, self.fetch, start, tensor.info.shape[0] if stop is None else stop
        )


def naive_fp8(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = (128, 128)
) -> torch.Tensor:
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            factor = scale[row // block[0], column // block[1]].float()
            out[row, column] = (weight[row, column].float() * factor).bfloat16()
    return out


# --- FP8 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_fp8_equals_transformers(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight = random_float8(256, 384, dtype=dtype)
    scale = (torch.rand(2, 3) * 0.01).to(scale_dtype)
    expected = finegrained.Fp8Dequantize(None).convert(
        {"weight": weight, "weight_scale_inv": scale.float()}
    )
    found = Source(w__weight=weight, w__weight_scale_inv=scale).read("w.weight")
    assert torch.equal(found, expected["weight"].bfloat16())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (130, 140), (129, 128), (128, 257)])
def test_fp8_ragged_blocks(shape: tuple[int, int]) -> None:
    block = (16, 32)
    weight = random_float8(*shape)
    scale = torch.randn(math.ceil(shape[0] / 16), math.ceil(shape[1] / 32))
    source = Source(block, w__weight=weight, w__weight_scale_inv=scale)
    assert torch.equal(source.read("w.weight"), naive_fp8(weight, scale, block))


def test_fp8_block_larger_than_any_matrix() -> None:
    weight, scale = random_float8(5, 6), torch.tensor([[0.5]])
    source = Source((2**30, 2**30), w__weight=weight, w__weight_scale_inv=scale)
    assert torch.equal(source.read("w.weight", 1, 4), naive_fp8(weight, scale)[1:4])


def test_fp8_rows_need_no_alignment_and_read_only_their_scales() -> None:
    weight, scale = random_float8(300, 140), torch.randn(3, 2)
    source = Source(w__weight=weight, w__weight_scale_inv=scale)
    whole = naive_fp8(weight, scale)
    for start, stop in [(0, 300), (0, 1), (127, 129), (130, 200), (256, 300), (299, 300), (7, 7)]:
        assert torch.equal(source.read("w.weight", start, stop), whole[start:stop])
    source.read("w.weight", 130, 200)
    assert source.fetched == {"w.weight": (130, 200), "w.weight_scale_inv": (1, 2)}


@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1), (40,), (40, 1)])
def test_fp8_scale_of_a_tensor_or_of_each_row(scale_shape: tuple[int, ...]) -> None:
    weight, scale = random_float8(40, 24), torch.rand(scale_shape) + 0.5
    source = Source(w__weight=weight, w__weight_scale=scale)
    expected = (weight.float() * scale.reshape(-1, 1)).bfloat16()
    assert torch.equal(source.read("w.weight"), expected)
    assert torch.equal(source.read("w.weight", 5, 17), expected[5:17])


@pytest.mark.parametrize("scale_shape", [(3, 2, 2), (3, 1, 1), (3, 1), (3,), (1,), (), (3, 20, 1)])
def test_fp8_fused_experts(scale_shape: tuple[int, ...]) -> None:
    weight, scale = random_float8(3, 20, 24), torch.rand(scale_shape) + 0.5
    source = Source((16, 16), experts__up=weight, experts__up_scale_inv=scale)
    grid = scale.reshape(-1, *(scale_shape[1:] if len(scale_shape) == 3 else (1, 1)))
    rows = grid if grid.shape[-2] in (1, 20) else grid.repeat_interleave(16, -2)[:, :20]
    factors = rows if rows.shape[-1] == 1 else rows.repeat_interleave(16, -1)[..., :24]
    expected = (weight.float() * factors).bfloat16()
    assert torch.equal(source.read("experts.up"), expected)
    assert torch.equal(source.read("experts.up", 1, 3), expected[1:3])


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 8, 8), (2, 0, 8), (2, 8, 0)])
def test_fp8_without_elements(shape: tuple[int, ...]) -> None:
    source = Source(w__weight=random_float8(*shape), w__weight_scale=torch.ones(1))
    found = source.read("w.weight")
    assert (found.shape, found.dtype) == (shape, torch.bfloat16)


def test_fp8_scales_that_are_bare_exponents() -> None:
    weight, bytes_ = random_float8(20, 24), torch.tensor([[120, 127], [130, 254]]).byte()
    expected = naive_fp8(weight, torch.exp2(bytes_.float() - 127), (16, 16))
    source = Source((16, 16), w__weight=weight, w__scale=bytes_)
    assert torch.equal(source.read("w.weight"), expected)
    if E8M0 is not None:
        source = Source((16, 16), w__weight=weight, w__scale=bytes_.view(E8M0))
        assert torch.equal(source.read("w.weight"), expected)


def test_fp8_keeps_nan_and_overflow_visible() -> None:
    weight = torch.full((2, 4), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert decode_fp8(weight, torch.ones(1, 1), (128, 128)).isnan().all()
    long_payload = torch.tensor([[0x7FFFFFFF]], dtype=torch.int32).view(torch.float32)
    ones = torch.ones(2, 4).to(torch.float8_e4m3fn)
    assert decode_fp8(ones, long_payload, (128, 128)).isnan().all()
    assert decode_fp8(ones, torch.tensor([[math.inf]]), (128, 128)).isinf().all()
    large = torch.full((2, 4), 448.0).to(torch.float8_e4m3fn)
    assert decode_fp8(large, torch.full((1, 1), 1e37), (128, 128)).isinf().all()


def test_rounding_to_bfloat16_equals_torch() -> None:
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), dtype=torch.int64).to(torch.int32)
    ties = (bits & -65536) | 0x8000
    for values in (bits.view(torch.float32), ties.view(torch.float32)):
        values = values[values.isfinite()]
        values = values[values.abs() < 1e30]  # so that the sum stays finite
        expected = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(_round_to_bfloat16(values.numpy().copy()), expected)


# --- MXFP4 --------------------------------------------------------------------------------------


def test_mxfp4_equals_transformers() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(90, 150, (3, 10, 2), dtype=torch.uint8)
    source = Source(e__down_proj_blocks=blocks, e__down_proj_scales=scales)
    expected = mxfp4.convert_moe_packed_tensors(blocks, scales)
    assert source.logical["e.down_proj"].info.shape == (3, 64, 10)
    assert torch.equal(source.read("e.down_proj"), expected)
    assert torch.equal(source.read("e.down_proj", 1, 2), expected[1:2])
    assert source.fetched["e.down_proj_blocks"] == (1, 2), "an expert is read alone"
    assert source.read("e.down_proj").is_contiguous()


def test_mxfp4_golden() -> None:
    blocks = torch.zeros(1, 2, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, :8] = torch.arange(8, dtype=torch.uint8) * 0x22 + 0x10
    blocks[0, 1, 0, 15] = 0xF7
    found = decode_mxfp4(blocks, torch.tensor([[[127], [128]]], dtype=torch.uint8))
    assert found.shape == (1, 32, 2)
    # bytes 10 32 54 76 98 BA DC FE: all sixteen numbers in order of their code
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert found[0, :16, 0].tolist() == positive + [-x for x in positive]
    assert found[0, 30:, 1].tolist() == [12.0, -12.0]


def test_mxfp4_extreme_scales() -> None:
    blocks = torch.full((1, 1, 4, 16), 0x21, dtype=torch.uint8)  # ½ and 1
    scales = torch.tensor([[[0, 1, 254, 255]]], dtype=torch.uint8)
    found = decode_mxfp4(blocks, scales)[0, :, 0].double()
    assert found[0].item() == 2.0**-128
    assert found[1].item() == 2.0**-127
    assert found[65].item() == 2.0**127
    assert found[96:].isnan().all(), "byte 255 is NaN"
    assert decode_mxfp4(blocks | 0x77, scales)[0, 64:96].isinf().all(), "6 * 2^127 leaves the range"


def test_mxfp4_in_several_chunks() -> None:
    blocks = torch.randint(0, 256, (1, 300, 64, 16), dtype=torch.uint8)
    scales = torch.randint(100, 130, (1, 300, 64), dtype=torch.uint8)
    whole = decode_mxfp4(blocks, scales)
    for row in (0, 127, 128, 299):
        alone = decode_mxfp4(blocks[:, row : row + 1], scales[:, row : row + 1])
        assert torch.equal(whole[..., row], alone[..., 0])


# --- pairing ------------------------------------------------------------------------------------


def test_companions_vanish_and_are_counted() -> None:
    source = Source(
        a__weight=random_float8(4, 8),
        a__weight_scale_inv=torch.ones(1, 1),
        a__input_scale=torch.ones(1),
        a__bias=torch.ones(4),
        b__weight=torch.ones(4, 8),
        b__input_scale=torch.ones(1),
        e__gate_up_proj_blocks=torch.zeros(2, 6, 1, 16, dtype=torch.uint8),
        e__gate_up_proj_scales=torch.zeros(2, 6, 1, dtype=torch.uint8),
        x_blocks=torch.zeros(3),
    )
    infos = {name: tensor.info for name, tensor in source.logical.items()}
    kept = ["a.weight", "a.bias", "b.weight", "b.input_scale", "e.gate_up_proj", "x_blocks"]
    assert list(infos) == kept
    assert (infos["a.weight"].encoding, infos["a.weight"].n_bytes) == ("fp8_block", 32 + 4 + 4)
    assert (infos["e.gate_up_proj"].encoding, infos["e.gate_up_proj"].n_bytes) == ("mxfp4", 204)
    assert infos["a.weight"].dtype == infos["e.gate_up_proj"].dtype == torch.bfloat16
    stored = sum(tensor.nbytes for tensor in source.tensors.values())
    assert sum(info.n_bytes for info in infos.values()) == stored


F8, U8 = random_float8(40, 40), torch.zeros(2, 6, 1, 16, dtype=torch.uint8)
REFUSED = {
    "no scale": ({"w.weight": F8}, r"'w.weight' is float8_e4m3fn \[40, 40\] without a scale"),
    "two scales": (
        {"w.weight": F8, "w.weight_scale": torch.ones(1), "w.weight_scale_inv": torch.ones(1)},
        "two scales",
    ),
    "grid": ({"w.weight": F8, "w.weight_scale_inv": torch.ones(2, 3)}, r"shape \[2, 3\].*\[1, 1\]"),
    "scale dtype": ({"w.weight": F8, "w.weight_scale": torch.ones(1).int()}, "int32; a scale must"),
    "axes": ({"w": F8.reshape(2, 2, 20, 20), "w_scale": torch.ones(1)}, "2 or 3 axes"),
    "lonely blocks": ({"e.up_blocks": U8}, "has no 'e.up_scales' beside it"),
    "block shape": (
        {"e.up_blocks": U8, "e.up_scales": torch.zeros(2, 6, 2, dtype=torch.uint8)},
        "no MXFP4 weight",
    ),
    "scale kind": ({"e.up_blocks": U8, "e.up_scales": torch.zeros(2, 6, 1)}, "no MXFP4 weight"),
    "twice": (
        {
            "e.up": torch.ones(2),
            "e.up_blocks": U8,
            "e.up_scales": torch.zeros(2, 6, 1, dtype=torch.uint8),
        },
        "stored twice",
    ),
    "gptq": ({"w.qweight": torch.zeros(4, 4).int()}, "encoding that is not read"),
    "nf4": ({"w.weight": U8[0, 0], "w.weight.absmax": torch.ones(4)}, "not read"),
    "packed fp4": ({"w.weight": F8.view(torch.int8), "w.scale": torch.ones(40, 2)}, "not read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_decoded_is_refused_by_name(case: str) -> None:
    tensors, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        logical_tensors(entries_of(tensors))
