"""Quantized weights inside a model graph: linear layers and experts.

QuantLinear    replaces an `nn.Linear`: y = x · Ŵᵀ + bias.
FusedExperts   replaces a 3-D expert parameter [E, N, K] (or [E, K, N]) stored as one tensor.
ExpertView     replaces the same parameter when the source stores one matrix per expert: it looks
               at `QuantLinear` children of the experts module, concatenated along N.

How stored parts live and move is said in `packed_module.py`; the bias follows the dtype.

Inputs. y = round(x · Q) · Ŵᵀ: `inputs` are transforms Q of x (rotations that are folded into Ŵ), then
x is rounded to the `activation` format. Gradients pass Q as it is and rounding straight through.

Model code keeps its own forward: `experts.gate_up_proj[e]` gives a `PackedWeight`, which torch's
`linear` and `matmul` hand to the dispatcher, and which any other torch function sees as the decoded
tensor. Code that wants the whole stack at once (grouped products) gets it decoded, which is correct
and costs its full size: choose the eager expert loop instead. There inputs are not rounded. Where
they would have to be transformed, the decoded weight is refused instead of multiplied by x as it is.

Compilers (`torch.compile`) see a `QuantLinear` as one operator, `fewbit::quant_linear`, of which they
know the shape of the result. What runs is chosen when it runs, so that the number of rows may vary, and
a changed weight is noticed. Where x needs a gradient they see the decoded product instead.

Weights are not trained here; gradients reach the inputs only.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from . import reference
from .errors import FormatError
from .online import InputTransform
from .packed import PackedTensor
from .packed_module import PackedModule, Terms
from .runner import Runner


class SharedProduct(Protocol):
    """A product that a layer has in common with others; see `fused.py`."""

    def product(self, layer: "QuantLinear", x: torch.Tensor) -> torch.Tensor | None:
        """x · Ŵᵀ of this layer; None if the layer shall do it alone."""
        ...


class QuantLinear(PackedModule):
    """y = round(x · Q) · Ŵᵀ + bias with a packed weight [N, K]; see the module's text.

    shared: a product together with other layers that get the same x, or None.
    """

    kind = ("a linear layer holds a weight [N, K]", 2)
    bias: nn.Parameter | None
    shared: SharedProduct | None = None
    number: int  # by which the operator finds the layer

    def __init__(
        self,
        shape: Sequence[int],
        terms: Terms,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        transposed: bool = False,
        activation: str | None = None,
        inputs: Sequence[InputTransform] = (),
    ) -> None:
        super().__init__(shape, terms, dtype, device, transposed, activation, inputs)
        self.out_features, self.in_features = self.logical_shape
        empty = torch.empty(self.out_features, dtype=dtype, device=device) if bias else None
        value = None if empty is None else nn.Parameter(empty, requires_grad=False)
        self.register_parameter("bias", value)
        self._take_number()

    def _take_number(self) -> None:
        self.number = next(_NUMBERS)
        _LAYERS[self.number] = self

    @classmethod
    def from_packed(
        cls,
        packed: PackedTensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        activation: str | None = None,
        inputs: Sequence[InputTransform] = (),
    ) -> "QuantLinear":
        """A layer that holds the parts of `packed` (no copy) and `bias` [N] in `dtype`."""
        terms = [(term.format, term.options) for term in packed.terms]
        turned, with_bias = packed.transposed, bias is not None
        layer = cls(packed.shape, terms, with_bias, dtype, "meta", turned, activation, inputs)
        layer.fill(packed)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        return layer

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight in `dtype`, decoded anew at every access; see `dense`."""
        return self.dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> y [..., N] in the dtype of x."""
        if torch.compiler.is_compiling() and not (x.requires_grad and torch.is_grad_enabled()):
            y = torch.ops.fewbit.quant_linear(x, self.number, self.out_features)
        else:
            shared = None if self.shared is None else self.shared.product(self, x)
            y = self.runners()[0].linear(x) if shared is None else shared
        bias = self._parameters["bias"]  # a fifth of the time that `self.bias` takes
        return y if bias is None else y + bias.to(y.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Without the shared product: a copy multiplies alone until it is fused again."""
        return {**super().__getstate__(), "shared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is a layer of its own to the operator."""
        super().__setstate__(state)
        self._take_number()


# ---- what compilers see ---------------------------------------------------------------------

_NUMBERS = itertools.count()
_LAYERS: "weakref.WeakValueDictionary[int, QuantLinear]" = weakref.WeakValueDictionary()
_LIBRARY = torch.library.Library("fewbit", "FRAGMENT")
_LIBRARY.define("quant_linear(Tensor x, int layer, int n) -> Tensor")


def _quant_linear(x: torch.Tensor, layer: int, n: int) -> torch.Tensor:
    """y [..., N]. Alone, not shared: compilers write to memory behind the back of version counters."""
    found = _LAYERS.get(layer)
    if found is None:
        raise FormatError(
            f"layer {layer} of a compiled graph is gone; compile the model that holds it again"
        )
    return found.runners()[0].linear(x)


_LIBRARY.impl("quant_linear", _quant_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("fewbit::quant_linear", lib=_LIBRARY)
def _quant_linear_like(x: torch.Tensor, layer: int, n: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], n)


class PackedWeight:
    """Handle of one matrix that stands where model code expects a 2-D weight tensor.

    `linear(x, handle)` and `x @ handle` reach the dispatcher; every other torch function sees the
    decoded tensor. runners: matrices [N_i, K] that are concatenated along N.
    """

    requires_grad = False
    ndim = 2

    def __init__(self, runners: Sequence[Runner], dtype: torch.dtype, transposed: bool) -> None:
        self._runners = runners
        self._transposed = transposed
        self.dtype = dtype

    @property
    def inputs(self) -> tuple[InputTransform, ...]:
        """Transforms of what the matrix is multiplied by."""
        return self._runners[0].inputs

    @property
    def shape(self) -> torch.Size:
        """[N, K], or [K, N] if transposed."""
        n, k = sum(runner.n for runner in self._runners), self._runners[0].k
        return torch.Size((k, n) if self._transposed else (n, k))

    @property
    def device(self) -> torch.device:
        """Where products run."""
        return self._runners[0].device

    @property
    def T(self) -> "PackedWeight":
        """The same matrix seen the other way."""
        return PackedWeight(self._runners, self.dtype, not self._transposed)

    def t(self) -> "PackedWeight":
        """As `T`."""
        return self.T

    def transpose(self, first: int, second: int) -> "PackedWeight":
        """As `T`, unless both axes are the same."""
        return self if first % 2 == second % 2 else self.T

    def dense(self) -> torch.Tensor:
        """The decoded matrix in `dtype`, of `shape`."""
        rows = [reference.dense(r.packed.to(r.device), self.dtype) for r in self._runners]
        weight = rows[0] if len(rows) == 1 else torch.cat(rows)
        return weight.t() if self._transposed else weight

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N] through the dispatcher."""
        parts = [runner.linear(x) for runner in self._runners]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Route products, decode for everything else."""
        product = _PRODUCTS.get(func)
        if product is not None:
            return product(*args, **(kwargs or {}))
        return _decoded(func, args, kwargs or {})


def _decoded(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func` with every packed argument replaced by its decoded tensor."""

    def open_up(value: Any) -> Any:
        if not isinstance(value, PackedWeight | _Experts):
            return value
        _refuse_transformed(value.inputs)
        return value.dense()

    return func(*tree_map(open_up, args), **tree_map(open_up, kwargs))


def _refuse_transformed(inputs: Sequence[InputTransform]) -> None:
    if inputs:
        raise FormatError(
            f"this weight belongs to inputs transformed by {list(inputs)}: only linear(x, W) and "
            f"x @ W of one expert at a time apply it; choose the eager expert loop"
        )


def _linear(input: Any, weight: Any, bias: torch.Tensor | None = None) -> Any:
    if not isinstance(weight, PackedWeight) or weight._transposed or not _is_tensor(input):
        return _decoded(functional.linear, (input, weight, bias), {})
    y = weight.multiply(input)
    return y if bias is None else y + bias


def _matmul(input: Any, other: Any) -> Any:
    if not isinstance(other, PackedWeight) or not other._transposed or not _is_tensor(input):
        return _decoded(torch.matmul, (input, other), {})
    return other.multiply(input)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


_PRODUCTS: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
}


class _Experts:
    """What stands where a model expects a parameter [E, N, K] or [E, K, N]."""

    # A library that initializes missing parameters must leave this one alone.
    _is_hf_initialized = True
    requires_grad = False
    ndim = 3
    n_experts: int
    inputs: tuple[InputTransform, ...]
    expert: Callable[[int], PackedWeight]
    dense: Callable[[], torch.Tensor]

    def __len__(self) -> int:
        return self.n_experts

    def __getitem__(self, index: Any) -> Any:
        """One expert's `PackedWeight` for an int or a 0-d tensor; for a slice or a tensor of
        indices those experts decoded, with their index axes first."""
        if isinstance(index, slice):
            index = torch.arange(self.n_experts)[index]
        if isinstance(index, torch.Tensor) and index.dim():
            _refuse_transformed(self.inputs)
            wanted, place = index.unique(return_inverse=True)
            return torch.stack([self[e].dense() for e in wanted])[place]
        e = int(index)
        if not -self.n_experts <= e < self.n_experts:
            raise IndexError(f"expert {e} of {self.n_experts}")
        return self.expert(e % self.n_experts)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """A torch function on the whole stack sees it decoded."""
        return _decoded(func, args, kwargs or {})


class FusedExperts(PackedModule, _Experts):
    """A stack of expert matrices stored as one packed tensor [E, N, K]."""

    kind = ("stacked experts hold a weight [E, N, K]", 3)

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        """E."""
        return self.logical_shape[0]

    @classmethod
    def from_packed(
        cls,
        packed: PackedTensor,
        dtype: torch.dtype,
        activation: str | None = None,
        inputs: Sequence[InputTransform] = (),
    ) -> "FusedExperts":
        """Holder of the parts of `packed`, without a copy."""
        terms = [(term.format, term.options) for term in packed.terms]
        turned = packed.transposed
        experts = cls(packed.shape, terms, dtype, "meta", turned, activation, inputs)
        experts.fill(packed)
        return experts

    def expert(self, index: int) -> PackedWeight:
        """Matrix of one expert."""
        return PackedWeight(self.runners()[index : index + 1], self.dtype, self.transposed)


class ExpertView(_Experts):
    """Per-expert `QuantLinear`s seen as one stack; owns nothing.

    owner: the experts module, whose child `str(e)` holds expert e; a cycle between the two, which
    copies and pickles with the module. children: names below that child, concatenated along N in
    this order (`("gate_proj", "up_proj")` for a fused gate and up projection).
    """

    def __init__(
        self, owner: nn.Module, n_experts: int, children: Sequence[str], transposed: bool = False
    ) -> None:
        self.owner = owner
        self.n_experts = n_experts
        self.children = tuple(children)
        self.transposed = transposed

    def layers(self, index: int) -> list[QuantLinear]:
        """The layers that make up one expert's matrix."""
        found = [self.owner.get_submodule(f"{index}.{child}") for child in self.children]
        for child, layer in zip(self.children, found, strict=True):
            if not isinstance(layer, QuantLinear):
                raise FormatError(
                    f"expert {index}: {child} must be a QuantLinear, got {type(layer).__name__}; "
                    f"quantize all matrices of an expert, or none"
                )
        return found  # type: ignore[return-value]

    def expert(self, index: int) -> PackedWeight:
        """Matrix of one expert."""
        layers = self.layers(index)
        runners = [layer.runners()[0] for layer in layers]
        return PackedWeight(runners, layers[0].dtype, self.transposed)

    def dense(self) -> torch.Tensor:
        """All experts decoded and stacked."""
        return torch.stack([self.expert(e).dense() for e in range(self.n_experts)])

    @property
    def inputs(self) -> tuple[InputTransform, ...]:  # type: ignore[override]
        """Transforms of what the matrices are multiplied by."""
        return self.layers(0)[0].inputs

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the decoded weight."""
        return self.layers(0)[0].dtype

    @property
    def device(self) -> torch.device:
        """Where products run."""
        return self.layers(0)[0].device

    @property
    def shape(self) -> torch.Size:
        """[E, N, K], or [E, K, N] if transposed."""
        layers = self.layers(0)
        n, k = sum(layer.out_features for layer in layers), layers[0].in_features
        return torch.Size((self.n_experts, *((k, n) if self.transposed else (n, k))))


def replace_parameter(module: nn.Module, name: str, holder: FusedExperts | ExpertView) -> None:
    """Put `holder` where `module` has the parameter `name`."""
    if name in module._parameters:
        delattr(module, name)
    setattr(module, name, holder)
