"""Kernels with made-up times over the reference, and small packed weights to give them."""

import pytest
import torch

from fewbit.quant import dispatch, reference
from fewbit.quant.formats.int_group import FORMAT, IntGroupOptions
from fewbit.quant.kernel import Kernel, Reason
from fewbit.quant.packed import PackedTensor, Term


def pack(weight: torch.Tensor, options: IntGroupOptions) -> PackedTensor:
    extra = FORMAT.padded_k(weight.shape[-1], options) - weight.shape[-1]
    full = torch.nn.functional.pad(weight, (0, extra))
    scales = FORMAT.fit(full, options)
    codes, _ = FORMAT.round(full, scales, 0, options)
    term = Term("int_group", options, FORMAT.pack(codes, scales, options))
    return PackedTensor(tuple(weight.shape), (term,))


def fake(name: str, seconds: float, priority: int = 0, *reasons: Reason) -> Kernel:
    return Kernel(
        name=name,
        refuse=lambda problem: reasons,
        prepare=lambda packed, dtype: packed,
        launch=reference.linear,
        seconds=lambda problem: seconds,
        priority=priority,
    )


def only(monkeypatch: pytest.MonkeyPatch, *known: Kernel) -> None:
    """Make `known` and the reference all the kernels that there are."""
    table = {kernel.name: kernel for kernel in (*known, reference.KERNEL)}
    monkeypatch.setattr(dispatch, "kernels", lambda: table)
