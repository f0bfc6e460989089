"""Quantized weights inside a model graph: linear layers and experts.

QuantLinear    replaces an `nn.Linear`: y = x · Ŵᵀ + bias.
FusedExperts   replaces a 3-D expert parameter [E, N, K] (or [E, K, N]) stored as one tensor.
ExpertView     replaces the same parameter when the source stores one matrix per expert: it looks
               at `QuantLinear` children of the experts module, concatenated along N.

The stored parts are persistent buffers under their checkpoint names (`codes`, `scale_group`,
`term1.codes`, ...), so `state_dict` is the checkpoint. They keep their stored dtype whatever
`.to(dtype)` says; the bias follows the dtype. Kernel layouts are derived at first use, are no part
of the state, and are dropped when a buffer is replaced, moved or written to.

Model code keeps its own forward: `experts.gate_up_proj[e]` gives a `PackedWeight`, which torch's
`linear` and `matmul` hand to the dispatcher, and which any other torch function sees as the decoded
tensor. Code that wants the whole stack at once (grouped products) gets it decoded, which is correct
and costs its full size: choose the eager expert loop instead.

Weights are not trained here; gradients reach the inputs only.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from . import reference
from .dispatch import Runner
from .errors import FormatError
from .format import PartSpec, find_format
from .packed import PackedTensor, Term

Terms = Sequence[tuple[str, Any]]  # (format name, its options) of each summand


class PackedModule(nn.Module):
    """Buffers of one `PackedTensor`, and the rules by which they move. Base of the holders below.

    shape: logical [N, K] or [E, N, K]. transposed: the graph wants [.., K, N].
    dtype: of bias and of the decoded weight. device: "meta" leaves the buffers empty.
    """

    def __init__(
        self,
        shape: Sequence[int],
        terms: Terms,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.logical_shape = tuple(shape)
        self.terms = tuple(terms)
        self.dtype = dtype
        self.transposed = transposed
        self._runners: list[Runner] = []
        self._stamp: list[int] = []
        self._part_names: list[tuple[str, ...]] = []
        for index, (name, options) in enumerate(self.terms):
            holder = self if index == 0 else nn.Module()
            specs = find_format(name).part_specs(self.logical_shape, options)
            self._part_names.append(tuple(specs))
            for part, spec in specs.items():
                empty = torch.empty(spec.shape, dtype=spec.dtype, device=device)
                holder.register_buffer(part, empty)
            if index:
                self.add_module(f"term{index}", holder)

    @property
    def shape(self) -> torch.Size:
        """Shape as the model graph sees it: the last two axes swapped if `transposed`."""
        *lead, n, k = self.logical_shape
        return torch.Size((*lead, k, n) if self.transposed else (*lead, n, k))

    @property
    def device(self) -> torch.device:
        """Device of the stored parts."""
        return next(self._parts())[2].device

    @property
    def packed(self) -> PackedTensor:
        """The weight as stored. FormatError if a buffer was given another dtype or shape."""
        found: list[dict[str, torch.Tensor]] = [{} for _ in self.terms]
        for index, part, tensor in self._parts():
            found[index][part] = tensor
        terms = []
        for (name, options), parts in zip(self.terms, found, strict=True):
            specs = find_format(name).part_specs(self.logical_shape, options)
            for part, spec in specs.items():
                _check_part(f"{name}.{part}", parts[part], spec)
            terms.append(Term(name, options, parts))
        return PackedTensor(self.logical_shape, tuple(terms), self.transposed)

    def fill(self, packed: PackedTensor) -> None:
        """Take the parts of `packed` as buffers, without a copy."""
        for index, term in enumerate(packed.terms):
            holder = self if index == 0 else self.get_submodule(f"term{index}")
            for part, tensor in term.parts.items():
                holder.register_buffer(part, tensor)

    def dense(self) -> torch.Tensor:
        """The decoded weight in `dtype`, as the model graph sees it (see `shape`)."""
        weight = reference.dense(self.packed, self.dtype)
        return weight.transpose(-1, -2) if self.transposed else weight

    def runners(self) -> list[Runner]:
        """One runner, or one for each expert; made anew after a buffer changed."""
        stamp = self._state_stamp()
        if stamp != self._stamp or not self._runners:
            self._runners = [Runner(matrix) for matrix in _matrices(self.packed)]
            self._stamp = stamp
        return self._runners

    def _parts(self) -> Iterator[tuple[int, str, torch.Tensor]]:
        """(term, part, stored tensor)."""
        for index, names in enumerate(self._part_names):
            holder = self if index == 0 else self._modules[f"term{index}"]
            for part in names:
                yield index, part, holder._buffers[part]  # type: ignore[union-attr, misc]

    def _state_stamp(self) -> list[int]:
        """Identity and version of every buffer; runners keep the tensors, so identities last."""
        stamp: list[int] = []
        for _, _, tensor in self._parts():
            stamp += (id(tensor), 0 if tensor.is_inference() else tensor._version)
        return stamp

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """`.to`, `.half`, `.cuda`: stored parts follow the device only."""
        stored = {id(tensor) for _, _, tensor in self._parts()}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if id(tensor) in stored and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self._runners = []
        return super()._apply(move, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Without runners: layouts are derived again where the copy is used."""
        return {**self.__dict__, "_runners": [], "_stamp": []}

    def extra_repr(self) -> str:
        """Shape and formats, for `print(model)`."""
        formats = " + ".join(f"{name}({options})" for name, options in self.terms)
        return f"{list(self.logical_shape)}, {formats}, dtype={self.dtype}"


def _check_part(name: str, tensor: torch.Tensor, spec: PartSpec) -> None:
    found = PartSpec(tensor.dtype, tuple(tensor.shape))
    if found != spec:
        raise FormatError(
            f"{name} must be {spec.dtype} {list(spec.shape)}, got {found.dtype} "
            f"{list(found.shape)}; load stored parts without casting them"
        )


def _matrices(packed: PackedTensor) -> Iterator[PackedTensor]:
    """The weight itself if it is [N, K], else each expert of [E, N, K]."""
    if len(packed.shape) == 2:
        yield packed
        return
    for expert in range(packed.shape[0]):
        terms = tuple(
            Term(term.format, term.options, {part: t[expert] for part, t in term.parts.items()})
            for term in packed.terms
        )
        yield PackedTensor(packed.shape[1:], terms, packed.transposed)


class QuantLinear(PackedModule):
    """y = x · Ŵᵀ + bias with a packed weight [N, K]."""

    bias: nn.Parameter | None

    def __init__(
        self,
        shape: Sequence[int],
        terms: Terms,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        transposed: bool = False,
    ) -> None:
        if len(shape) != 2:
            raise FormatError(f"a linear layer holds a weight [N, K], got {list(shape)}")
        super().__init__(shape, terms, dtype, device, transposed)
        self.out_features, self.in_features = self.logical_shape
        empty = torch.empty(self.out_features, dtype=dtype, device=device) if bias else None
        value = None if empty is None else nn.Parameter(empty, requires_grad=False)
        self.register_parameter("bias", value)

    @classmethod
    def from_packed(
        cls, packed: PackedTensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> "QuantLinear":
        """A layer that holds the parts of `packed` (no copy) and `bias` [N] in `dtype`."""
        terms = [(term.format, term.options) for term in packed.terms]
        layer = cls(packed.shape, terms, bias is not None, dtype, "meta", packed.transposed)
        layer.fill(packed)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        return layer

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight in `dtype`, decoded anew at every access."""
        return self.dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> y [..., N] in the dtype of x."""
        y = self.runners()[0].linear(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


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
    def shape(self) -> torch.Size:
        """[N, K], or [K, N] if transposed."""
        n, k = sum(runner.n for runner in self._runners), self._runners[0].k
        return torch.Size((k, n) if self._transposed else (n, k))

    @property
    def device(self) -> torch.device:
        """Device of the stored parts."""
        return next(self._runners[0].packed.named_parts())[1].device

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
        rows = [reference.dense(runner.packed, self.dtype) for runner in self._runners]
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
        return value.dense() if isinstance(value, PackedWeight | _Experts) else value

    return func(*tree_map(open_up, args), **tree_map(open_up, kwargs))


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

    def __init__(
        self,
        shape: Sequence[int],
        terms: Terms,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        transposed: bool = False,
    ) -> None:
        if len(shape) != 3:
            raise FormatError(f"stacked experts hold a weight [E, N, K], got {list(shape)}")
        super().__init__(shape, terms, dtype, device, transposed)
        self.n_experts = self.logical_shape[0]

    @classmethod
    def from_packed(cls, packed: PackedTensor, dtype: torch.dtype) -> "FusedExperts":
        """Holder of the parts of `packed`, without a copy."""
        terms = [(term.format, term.options) for term in packed.terms]
        experts = cls(packed.shape, terms, dtype, "meta", packed.transposed)
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
    def dtype(self) -> torch.dtype:
        """dtype of the decoded weight."""
        return self.layers(0)[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the stored parts."""
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
