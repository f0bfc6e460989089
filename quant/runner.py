"""Running the chosen kernels: what a weight remembers of its layouts and plans.

A `Runner` belongs to one weight. The first time that a bucket of M is met, the dispatcher is asked (the
environment is read, kernels answer) and a layout is derived; a later call costs a dictionary lookup.
One layout serves all buckets of a kernel, and of an integer kernel all dtypes. Inside `use_kernels`
other plans hold, which are remembered beside the usual ones.

Inputs rounded to an activation format: a kernel with an `activation` rounds x itself; any other kernel
gets x̂, so that every choice computes the same function. Transforms of the input come before that.

Under autocast, layouts are derived and integers multiplied as without it (it fails to join integers,
and an exact product gains nothing). Other products and the transforms follow autocast.

Deliberately not here: the choice itself, in `dispatch.py`.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from . import dispatch, reference
from .activation import find_activation
from .dispatch import Explanation, problem_of
from .errors import NoKernelError
from .kernel import M_BUCKETS, Config, Kernel
from .online import InputTransform, transformed
from .packed import PackedTensor
from .policy import Rules, context_rules

Launch = Callable[[torch.Tensor, Any], torch.Tensor]
Plan = tuple[Launch, Any]
_INNER_BUCKETS = M_BUCKETS[:-1]


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


class Layouts:
    """What kernels derived from one weight. Kernels with the same `prepare` share a layout; that of an
    integer kernel has no share in the dtype of x, so that it is one for all."""

    def __init__(self) -> None:
        self._held: dict[tuple[Callable[..., Any], torch.dtype | None], Any] = {}

    def __len__(self) -> int:
        return len(self._held)

    def ready(self, dtype: torch.dtype) -> frozenset[str]:
        """Names of the kernels whose layout for `dtype` exists."""
        made = {prepare for prepare, held in self._held if held in (None, dtype)}
        return frozenset(k.name for k in dispatch.kernels().values() if k.prepare in made)

    def of(
        self, kernel: Kernel, weight: Callable[[], PackedTensor], dtype: torch.dtype, device: str
    ) -> Any:
        """The layout of `kernel` for x of `dtype`; derived from weight() at first."""
        key = (kernel.prepare, None if kernel.activation is not None else dtype)
        if key not in self._held:
            with torch.no_grad(), _without_autocast(device):
                self._held[key] = kernel.prepare(weight(), dtype)
        return self._held[key]


def integer_launch(launch: Launch, device: str) -> Launch:
    """The launch without autocast."""
    if not torch.amp.is_autocast_available(device):
        return launch

    def without(x: torch.Tensor, layout: Any) -> torch.Tensor:
        if not torch.is_autocast_enabled(device):
            return launch(x, layout)
        with torch.autocast(device, enabled=False):
            return launch(x, layout)

    return without


class Runner:
    """Multiplies by one weight [N, K]; holds its layouts and its choices. See the module's text.

    activation: name of the format that x is rounded to. inputs: transforms of x before that.
    device: where products run; None is where the parts of `packed` are. Layouts are made where x is.
    """

    def __init__(
        self,
        packed: PackedTensor,
        activation: str | None = None,
        inputs: Sequence[InputTransform] = (),
        device: torch.device | None = None,
    ) -> None:
        if len(packed.shape) != 2:
            raise NoKernelError(
                f"a product needs a weight [N, K], got {list(packed.shape)}; "
                f"take one expert of a stack first"
            )
        self.packed = packed
        self.n, self.k = packed.shape
        self.activation = activation
        self.inputs = tuple(inputs)
        self.device = device or next(packed.named_parts())[1].device
        self._layouts = Layouts()
        self._plans: dict[tuple[int, torch.dtype, torch.device, Rules], Plan] = {}

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> y [..., N] in the dtype of x; differentiable in x (by `reference`)."""
        for transform in self.inputs:
            x = transformed(transform, x)
        if x.requires_grad and torch.is_grad_enabled():
            return reference.linear(x, self.packed.to(x.device), self.activation)
        if x.shape[-1] != self.k:
            raise NoKernelError(f"x must be [..., {self.k}], got {list(x.shape)}")
        m = x.numel() // self.k
        if not m:
            return x.new_empty(*x.shape[:-1], self.n)
        # bisect_left answers the index of the bucket; beyond the last one all are alike
        key = (bisect_left(_INNER_BUCKETS, m), x.dtype, x.device, context_rules())
        plan = self._plans.get(key)
        if plan is None:
            choose = self._plan
            if torch.compiler.is_compiling():
                choose = torch.compiler.disable(choose)  # not part of any graph
            plan = self._plans[key] = choose(m, x)
        launch, layout = plan
        # Most of what a call costs here are the two views (measured), which two axes do not need.
        axes = x.dim()
        if axes == 2:
            return launch(x, layout)
        shape = x.shape
        y = launch(x.reshape(m, self.k), layout)
        return y.view(shape[0], -1, self.n) if axes == 3 else y.view(*shape[:-1], self.n)

    def explain(self, m: int, dtype: torch.dtype, device: str) -> Explanation:
        """What would run for m rows, and why; the environment's choice included."""
        problem = problem_of(self.packed, m, dtype, device, self.activation)
        return dispatch.explain_here(problem, self._layouts.ready(dtype))

    def _plan(self, m: int, x: torch.Tensor) -> Plan:
        device = x.device.type
        problem = problem_of(self.packed, m, x.dtype, device, self.activation)
        chosen = dispatch.choice(problem, self._layouts.ready(x.dtype))
        kernel = dispatch.kernels()[chosen.kernel]
        layout = self._layouts.of(kernel, lambda: self.packed.to(x.device), x.dtype, device)
        launch = launch_of(kernel, chosen.config, self.activation)
        exact = kernel.activation is not None
        return integer_launch(launch, device) if exact else launch, layout


def bound_launch(kernel: Kernel, config: Config) -> Launch:
    """The kernel's launch with its choices made."""
    return partial(kernel.launch, config=config) if config else kernel.launch


def launch_of(kernel: Kernel, config: Config, activation: str | None) -> Launch:
    """What a layer calls: rounds x first, unless the kernel does it."""
    launch = bound_launch(kernel, config)
    if activation is None or kernel.activation is not None:
        return launch
    if kernel.name == "reference":
        return partial(reference.linear, activation=activation)
    rounding = find_activation(activation)

    def rounded(x: torch.Tensor, layout: Any) -> torch.Tensor:
        return launch(rounding.round(x).decode(x.dtype), layout)

    return rounded
