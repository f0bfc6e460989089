"""Writing into pages in plain torch: rotation as the library does it, places, and its record."""

from typing import Any

import pytest
import torch
from transformers.models.gptj.modeling_gptj import rotate_every_two
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fewbit.quant.errors import FewbitError, NoKernelError
from fewbit.quant.formats.dense_head import DenseHeadOptions
from fewbit.quant.formats.int4_head import PAGE_FORMAT, Int4HeadOptions
from fewbit.quant.kernel import RowsProblem
from fewbit.quant.kv_policy import PageUse
from fewbit.quant.kv_view import Paged
from fewbit.quant.kv_write import KERNEL, AppendOptions, Rope, append, rotate
from fewbit.quant.machine import load_device

INT4 = PageUse("int4_head", Int4HeadOptions())
DENSE = PageUse("dense_head", DenseHeadOptions())


def vectors(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tables(n: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angles = vectors(2, n, size // 2, seed=1) * 3
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_is_the_librarys_rotation_bit_for_bit(dtype: torch.dtype) -> None:
    keys = vectors(2, 3, 5, 16, dtype=dtype)
    cos, sin = tables(5, 16, dtype)
    _, wanted = apply_rotary_pos_emb(keys, keys, cos, sin)
    assert torch.equal(rotate(keys, Rope(cos, sin)), wanted)


def test_pairs_are_the_librarys_rotation_bit_for_bit() -> None:
    keys = vectors(2, 3, 5, 16, dtype=torch.bfloat16)
    cos, sin = (t.repeat_interleave(2, dim=-1)[..., :16] for t in tables(5, 16, torch.bfloat16))
    wide_cos, wide_sin = cos.unsqueeze(1), sin.unsqueeze(1)
    wanted = keys * wide_cos + rotate_every_two(keys) * wide_sin
    assert torch.equal(rotate(keys, Rope(cos, sin, "pairs")), wanted)


@pytest.mark.parametrize("style", ["half", "pairs"])
def test_channels_beyond_the_tables_stay(style: str) -> None:
    keys = vectors(2, 3, 5, 20)
    cos, sin = tables(5, 8, torch.float32)
    found = rotate(keys, Rope(cos, sin, style))
    assert torch.equal(found[..., 8:], keys[..., 8:])
    assert torch.equal(found[..., :8], rotate(keys[..., :8], Rope(cos, sin, style)))


def test_wrong_rotations_are_named() -> None:
    cos, sin = tables(5, 8, torch.float32)
    with pytest.raises(FewbitError, match=r"half.*got 'other'"):
        Rope(cos, sin, "other")
    with pytest.raises(FewbitError, match=r"got \[2, 5, 8\] and \[2, 4, 8\]"):
        Rope(cos, sin[:, :4])


def pages(use: PageUse, heads: int = 2, dim: int = 8) -> Paged:
    shape = (6, heads, 64)
    if use is INT4:
        parts: dict[str, Any] = {
            name: torch.zeros(*shape, *spec.shape, dtype=spec.dtype)
            for name, spec in PAGE_FORMAT.part_specs(dim, torch.float32, use.options).items()
        }
    else:
        parts = {"values": torch.zeros(*shape, dim)}
    table = torch.tensor([[4, 0, 2], [1, 5, 3]])
    copies = {name: part.clone() for name, part in parts.items()}
    return Paged(use, use, parts, copies, table)


@pytest.mark.parametrize("use", [INT4, DENSE], ids=["int4", "dense"])
@pytest.mark.parametrize("first", [0, 62, torch.tensor([62]), torch.tensor([3, 126])])
def test_tokens_land_where_the_table_says(use: PageUse, first: int | torch.Tensor) -> None:
    found = pages(use)
    keys, values = vectors(2, 2, 5, 8), vectors(2, 2, 5, 8, seed=1)
    append(found, keys, values, first)
    starts = first.expand(2).tolist() if isinstance(first, torch.Tensor) else [first] * 2
    for row, start in enumerate(starts):
        for i in range(5):
            page, slot = found.table[row, (start + i) // 64], (start + i) % 64
            for side, parts in ((keys, found.keys), (values, found.values)):
                wanted = side[row, :, i]
                if use is INT4:
                    for name, part in PAGE_FORMAT.encode(wanted, use.options).items():
                        assert torch.equal(parts[name][page, :, slot], part)
                else:
                    assert torch.equal(parts["values"][page, :, slot], wanted)
    written = sum(int((part != 0).any(-1).any(1).sum()) for part in found.keys.values())
    assert written == 10 * len(found.keys), "more slots were written than there are tokens"


def test_keys_are_rotated_and_values_are_not() -> None:
    found, wanted = pages(DENSE), pages(DENSE)
    keys, values = vectors(2, 2, 5, 8), vectors(2, 2, 5, 8, seed=1)
    rope = Rope(*tables(5, 8, torch.float32))
    append(found, keys, values, 7, rope)
    append(wanted, rotate(keys, rope), values, 7)
    assert torch.equal(found.keys["values"], wanted.keys["values"])
    assert torch.equal(found.values["values"], wanted.values["values"])


def test_the_record_takes_everything() -> None:
    options = AppendOptions("int4_head", INT4.options, "dense_head", DENSE.options, 8, 128, 64)
    asked = RowsProblem("append_kv", options, 16, 1536, torch.float64, "cpu", load_device("cpu"))
    assert KERNEL.op == "append_kv" and KERNEL.refuse(asked) == ()
    assert "append_kv" in str(asked) and "key=int4_head" in str(asked)
    gpu = RowsProblem("append_kv", options, 16, 1536, torch.bfloat16, "cuda", load_device("h200"))
    assert 0 < KERNEL.seconds(gpu) < KERNEL.seconds(gpu.at(4096)) < 1
    with pytest.raises(NoKernelError, match="no weight"):
        KERNEL.prepare(None, torch.float32)  # type: ignore[arg-type]
