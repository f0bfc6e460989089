"""Which weights multiply which activations, seen while a block runs.

    with WatchWeights(graph.block_parameters(index), on_use):
        graph.run(index, inputs)

A weight is recognised by its address in the operand of a matrix product, whatever module or
function made the call: a parameter, its transpose, or one expert W[e] of a fused stack. The product
is then run unchanged. Orientation is seen too: `x @ W` wants [K, N], `linear(x, W)` wants [N, K].

A cast of a whole weight (a router computed in fp32) counts as the weight. Not recognised: a slice
of rows or columns, a weight as the left operand, einsum, grouped products. Nothing is reported for
those; whoever needs every weight to be seen has to check.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Use:
    """One product with a weight.

    parameter: its graph name. expert: index on the leading axis of a stack, else None.
    transposed: the graph holds [.., K, N].
    """

    parameter: str
    expert: int | None
    transposed: bool


@dataclass(frozen=True)
class _Operands:
    """Where a function takes activation and weight: position and keyword of each."""

    x: int
    x_name: str
    weight: int
    weight_name: str
    weight_is_nk: bool = False

    def find(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = args[self.x] if len(args) > self.x else kwargs[self.x_name]
        weight = args[self.weight] if len(args) > self.weight else kwargs[self.weight_name]
        return x, weight


_MATMUL = _Operands(0, "input", 1, "other")
_MM = _Operands(0, "input", 1, "mat2")
_ADDMM = _Operands(1, "mat1", 2, "mat2")
_BADDBMM = _Operands(1, "batch1", 2, "batch2")
_PRODUCTS: dict[Any, _Operands] = {
    functional.linear: _Operands(0, "input", 1, "weight", weight_is_nk=True),
    torch.matmul: _MATMUL,
    torch.Tensor.matmul: _MATMUL,
    torch.Tensor.__matmul__: _MATMUL,
    torch.Tensor.__rmatmul__: _Operands(1, "other", 0, "self"),
    torch.mm: _MM,
    torch.Tensor.mm: _MM,
    torch.bmm: _MM,
    torch.Tensor.bmm: _MM,
    torch.addmm: _ADDMM,
    torch.Tensor.addmm: _ADDMM,
    torch.baddbmm: _BADDBMM,
    torch.Tensor.baddbmm: _BADDBMM,
}
_CASTS = (torch.Tensor.to, torch.Tensor.type, torch.Tensor.float)


@dataclass(frozen=True)
class _Known:
    """A matrix, or a stack of them, that may show up as an operand."""

    parameter: str
    expert: int | None
    shape: tuple[int, ...]  # last two axes, as the graph holds them
    stride: tuple[int, ...]


class WatchWeights(TorchFunctionMode):
    """Calls `on_use(use, x [.., K])` for each product with one of `parameters`, then runs it.

    parameters: graph name -> materialized tensor; those with two or three axes are watched. They
    must stay where they are while the mode is active.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        on_use: Callable[[Use, torch.Tensor], None],
    ) -> None:
        super().__init__()
        self._on_use = on_use
        self._matrices: dict[int, _Known] = {}
        self._stacks: dict[int, _Known] = {}
        self._casts: list[tuple[weakref.ref[torch.Tensor], _Known]] = []
        for name, tensor in parameters.items():
            if tensor.is_meta or tensor.numel() == 0 or tensor.dim() not in (2, 3):
                continue
            facts = tuple(tensor.shape[-2:]), tuple(tensor.stride()[-2:])
            if tensor.dim() == 2:
                self._matrices[tensor.data_ptr()] = _Known(name, None, *facts)
                continue
            self._stacks[tensor.data_ptr()] = _Known(name, None, *facts)
            for expert in range(tensor.shape[0]):
                self._matrices[tensor[expert].data_ptr()] = _Known(name, expert, *facts)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        operands = _PRODUCTS.get(func)
        if operands is not None:
            x, weight = operands.find(args, kwargs)
            self._note(x, weight, operands.weight_is_nk)
        result = func(*args, **kwargs)
        if func in _CASTS:
            known = self._known(args[0])
            if known is not None and result is not args[0] and result.dim() == 2:
                self._casts.append((weakref.ref(result), known))
        return result

    def _known(self, weight: torch.Tensor) -> _Known | None:
        """The watched weight whose values `weight` begins with."""
        address = weight.data_ptr()
        known = (self._stacks if weight.dim() == 3 else self._matrices).get(address)
        if known is None and self._casts:
            # Only casts that are still alive: a freed address may belong to anything by now.
            self._casts = [item for item in self._casts if item[0]() is not None]
            for copy, original in self._casts:
                alive = copy()
                if alive is not None and alive.data_ptr() == address:
                    return original
        return known

    def _note(self, x: torch.Tensor, weight: torch.Tensor, weight_is_nk: bool) -> None:
        known = self._known(weight)
        if known is None:
            return
        shape, stride = tuple(weight.shape[-2:]), tuple(weight.stride()[-2:])
        if (shape, stride) == (known.shape, known.stride):
            as_held = True
        elif (shape[::-1], stride[::-1]) == (known.shape, known.stride):
            as_held = False
        else:  # a part of the weight, or a reshaped one
            return
        transposed = as_held != weight_is_nk
        if weight.dim() == 2:
            self._on_use(Use(known.parameter, known.expert, transposed), x)
            return
        for expert in range(weight.shape[0]):
            shared = x.dim() < 3 or x.shape[-3] == 1
            own = x.squeeze(-3) if shared and x.dim() >= 3 else x
            own = own if shared else own.select(-3, expert)
            self._on_use(Use(known.parameter, expert, transposed), own)
