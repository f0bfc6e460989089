"""One product for layers that get the very same x: q, k and v, or gate and up.

    round(x) · [Ŵq; Ŵk; Ŵv]ᵀ = [yq | yk | yv]

x is rounded once and there is one product over the joined integer codes. The first layer that is
called with an x computes the outputs of all; the others take theirs. The module tree, names, parts and
`state_dict` stay as they are: what is shared is the kernel layout, which the group has instead of its
members (they make one of their own only if they are called in a way that cannot be shared).
Measured with int_two_level weights, K = 2048, bf16, one busy core, microseconds alone -> fused (best of
many, alternating):

    N                   M = 1        M = 8          M = 32
    2048 + 512 + 512    360 -> 264   452 -> 362     839 -> 722
    2048 x 3            498 -> 411   690 -> 604    1478 -> 1365
    5632 x 2            742 -> 707  1078 -> 1055   2347 -> 2356   (the fixed cost of one call)

**Never a stale result.** An output is taken only for the same tensor object (held weakly), unchanged
since (version counter, address, shape, strides, dtype), in the same thread and modes (inference,
autocast), while the weight of the layer that takes it is unchanged (identity and version of its parts),
and once: each call gets a tensor of its own. x made in inference mode has no version counter; there a
copy is kept and compared value by value. Everything else is multiplied alone: x that needs a gradient,
subclasses of Tensor, tracing compilers, a group one of whose members is gone.
Not noticed: writing to x or to a stored part through `.data` or numpy, which escapes the version
counter here as in autograd, and writing to stored parts made in inference mode, which have none.

Only integer kernels are shared. They are exact, so results are bit-equal to those of single layers;
a floating-point product may depend on N in its last bit. Where the dispatcher prefers another kernel,
the layers go alone.

A group whose outputs are mostly not taken (siblings that get different inputs) ends itself. Copies
and pickles of layers are not fused; call `fuse` on them.
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from .dispatch import choice, kernels, m_bucket, problem_of
from .errors import FormatError
from .format import find_format
from .linear import QuantLinear
from .online import transformed
from .packed import PackedTensor, Term
from .policy import context_rules
from .runner import Layouts, Plan, bound_launch, integer_launch

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_PATIENCE = 32  # outputs in vain before a group may end itself

_Key = tuple[Any, ...]


@dataclass(frozen=True)
class _Shared:
    """Outputs of the last product that nobody has taken yet, by member; cleared when x dies.
    copy: of x where it has no version counter, else empty; it goes with the last output."""

    x: "weakref.ref[torch.Tensor]"
    key: _Key
    outputs: dict[int, torch.Tensor]
    stamps: tuple[list[int], ...]
    copy: list[torch.Tensor]

    def take(self, index: int) -> torch.Tensor:
        """The output of one member, for once."""
        y = self.outputs.pop(index)
        if not self.outputs:
            self.copy.clear()
        return y


def _forget(outputs: dict[int, torch.Tensor], copy: list[torch.Tensor], _: object) -> None:
    outputs.clear()
    copy.clear()


class Group:
    """Layers that share one product; made by `fuse`. Holds its layers weakly."""

    def __init__(self, layers: Sequence[QuantLinear]) -> None:
        self._layers = tuple(weakref.ref(layer) for layer in layers)
        self._widths = [layer.out_features for layer in layers]
        self._plans: dict[_Key, Plan | None] = {}
        self._layouts = Layouts()
        self._stamps: tuple[list[int], ...] = ()
        self._parts: list[torch.Tensor] = []  # keeps the identities in `_stamps` from being reused
        self._local = threading.local()
        self._offered = self._taken = 0

    @property
    def n_outputs(self) -> int:
        """N of the joined weight."""
        return sum(self._widths)

    def product(self, layer: QuantLinear, x: torch.Tensor) -> torch.Tensor | None:
        """x · Ŵᵀ of one member, [..., N] in the dtype of x; None if it has to multiply alone."""
        layers = [ref() for ref in self._layers]
        members = [found for found in layers if found is not None and found.shared is self]
        if len(members) != len(layers) or not any(found is layer for found in members):
            self.end()
            return None
        if not _shareable(x):
            return None
        index = next(i for i, found in enumerate(members) if found is layer)
        y = self._take(index, layer, x)
        return y if y is not None else self._compute(index, members, x)

    def end(self) -> None:
        """Let the members multiply alone from now on."""
        for ref in self._layers:
            layer = ref()
            if layer is not None and layer.shared is self:
                layer.shared = None
        self._plans, self._layouts, self._parts = {}, Layouts(), []

    def _take(self, index: int, layer: QuantLinear, x: torch.Tensor) -> torch.Tensor | None:
        """The output that an earlier call left for this layer, if it is for this x."""
        last: _Shared | None = getattr(self._local, "last", None)
        if last is None or index not in last.outputs or last.x() is not x or last.key != _key(x):
            return None
        if layer.state_stamp() != last.stamps[index]:
            return None
        if x.is_inference() and not _equal(x, last.copy[0]):
            return None
        self._taken += 1
        return last.take(index)

    def _compute(
        self, index: int, members: Sequence[QuantLinear], x: torch.Tensor
    ) -> torch.Tensor | None:
        """All outputs; this layer's is returned and the others are left to be taken."""
        self._settle()
        if members[0].shared is not self:
            return None
        self._refresh(members)
        key, source = _key(x), x
        copy = [x.clone()] if x.is_inference() else []
        for transform in members[0].inputs:
            x = transformed(transform, x)
        rows = x.reshape(-1, members[0].in_features)
        plan = self._plan(members, rows)
        if plan is None:
            return None
        launch, layout = plan
        parts = launch(rows, layout).split(self._widths, dim=-1)
        lead = x.shape[:-1]
        # Cloned: contiguous, and no member's output is memory of another's.
        outputs = {
            i: part.clone(memory_format=torch.contiguous_format).view(*lead, part.shape[-1])
            for i, part in enumerate(parts)
        }
        y = outputs.pop(index)
        ref = weakref.ref(source, partial(_forget, outputs, copy))
        self._local.last = _Shared(ref, key, outputs, self._stamps, copy)
        self._offered += len(outputs)
        return y

    def _settle(self) -> None:
        """End a group most of whose outputs are computed in vain."""
        in_vain = self._offered - self._taken
        if in_vain > _PATIENCE and in_vain > self._taken:
            self.end()

    def _refresh(self, members: Sequence[QuantLinear]) -> None:
        """Drop layouts if a stored part was replaced, moved or written to."""
        stamps = tuple(layer.state_stamp() for layer in members)
        if stamps != self._stamps:
            self._plans, self._layouts = {}, Layouts()
            self._parts = [part for layer in members for _, part in layer.packed.named_parts()]
            self._stamps = stamps

    def _plan(self, members: Sequence[QuantLinear], rows: torch.Tensor) -> Plan | None:
        m = rows.shape[0]
        if m == 0:
            return None
        key = (m_bucket(m), rows.dtype, rows.device, context_rules())
        if key not in self._plans:
            self._plans[key] = self._choose(members, rows)
        return self._plans[key]

    def _choose(self, members: Sequence[QuantLinear], rows: torch.Tensor) -> Plan | None:
        """The dispatcher's choice for the joined weight, if it is an integer kernel."""
        first = members[0]
        if any(layer.device != rows.device for layer in members):
            return None
        alone = problem_of(
            first.packed, rows.shape[0], rows.dtype, rows.device.type, first.activation
        )
        ready = self._layouts.ready(rows.dtype)
        problem = replace(alone, n=self.n_outputs)
        chosen = choice(problem, ready)
        kernel = kernels()[chosen.kernel]
        if kernel.activation is None:
            return None
        device = rows.device.type

        def joined() -> PackedTensor:
            return join_rows([layer.packed for layer in members]).to(rows.device)

        layout = self._layouts.of(kernel, joined, rows.dtype, device)
        return integer_launch(bound_launch(kernel, chosen.config), device), layout


def fuse(layers: Sequence[QuantLinear]) -> Group:
    """Make `layers` share one product; a group that one of them belonged to ends.

    FormatError unless they are two or more different layers with the same in_features, formats and
    options, activation (there must be one) and inputs.
    """
    if len({id(layer) for layer in layers}) != len(layers) or len(layers) < 2:
        raise FormatError(f"a group needs two or more different layers, got {len(layers)}")
    kinds = [_kind(layer) for layer in layers]
    different = next((kind for kind in kinds if kind != kinds[0]), None)
    if different is not None:
        raise FormatError(
            f"layers that share a product must have the same inputs, formats and activation, "
            f"got {kinds[0]} and {different}; leave them alone"
        )
    if layers[0].activation is None:
        raise FormatError(
            "layers share integer products only, got activation = None; "
            "quantize with [activations], or leave them alone"
        )
    for layer in layers:
        if isinstance(layer.shared, Group):
            layer.shared.end()
    group = Group(layers)
    for layer in layers:
        layer.shared = group
        layer._runners = []  # its layout would be a second copy
    return group


def find_groups(model: nn.Module) -> list[tuple[QuantLinear, ...]]:
    """Siblings called q_proj, k_proj, v_proj or gate_proj, up_proj that `fuse` accepts together, in
    the order of modules. Those of one name set that differ (other bits, say) are left out, and so
    is what is fused already."""
    found: list[tuple[QuantLinear, ...]] = []
    for module in model.modules():
        for names in SIBLINGS:
            found += _alike(module, names)
    return found


def _alike(module: nn.Module, names: Sequence[str]) -> Iterator[tuple[QuantLinear, ...]]:
    by_kind: dict[_Key, list[QuantLinear]] = {}
    for name in names:
        layer = module._modules.get(name)
        if isinstance(layer, QuantLinear) and layer.activation and layer.shared is None:
            by_kind.setdefault(_kind(layer), []).append(layer)
    return (tuple(layers) for layers in by_kind.values() if len(layers) > 1)


def _kind(layer: QuantLinear) -> _Key:
    """What members of a group have in common."""
    return (layer.in_features, layer.terms, layer.activation, layer.inputs)


def _key(x: torch.Tensor) -> _Key:
    """What changes when x is written to (unless it has no version counter), resized or given other
    memory, and the modes that outputs depend on."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    modes = (torch.is_inference_mode_enabled(), autocast)
    version = None if x.is_inference() else x._version
    return (version, x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, modes)


def _equal(x: torch.Tensor, copy: torch.Tensor) -> bool:
    """Are all values the same? Eight bytes at once where possible (measured: seven times faster)."""
    words = 8 // x.element_size()
    if x.is_contiguous() and not (x.shape[-1] % words or x.storage_offset() % words):
        return torch.equal(x.view(torch.int64), copy.view(torch.int64))
    return torch.equal(x, copy)


def _shareable(x: torch.Tensor) -> bool:
    """Can an output computed for x be recognised later, and does nobody want a gradient?"""
    return (
        type(x) in (torch.Tensor, nn.Parameter)
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
    )


def join_rows(weights: Sequence[PackedTensor]) -> PackedTensor:
    """Weights [N_i, K] of one format as one [ΣN, K]. The axis of rows of each part is the one along
    which the format's own sizes grow with N."""
    shape = (sum(weight.shape[0] for weight in weights), weights[0].shape[1])
    terms = []
    for index, term in enumerate(weights[0].terms):
        specs = find_format(term.format).part_specs(shape, term.options)
        parts = {
            name: _join([weight.terms[index].parts[name] for weight in weights], spec.shape)
            for name, spec in specs.items()
        }
        terms.append(Term(term.format, term.options, parts))
    return PackedTensor(shape, tuple(terms))


def _join(parts: Sequence[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    sizes = zip(parts[0].shape, shape, strict=True)
    axis = next((i for i, (one, all_) in enumerate(sizes) if one != all_), None)
    if axis is None or sum(part.shape[axis] for part in parts) != shape[axis]:
        raise FormatError(
            f"parts of shapes {[list(part.shape) for part in parts]} do not join to {list(shape)}; "
            f"this format cannot share products"
        )
    return torch.cat(list(parts), dim=axis)
