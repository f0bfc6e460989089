"""The model graph, block by block: only what runs is in memory.

A skeleton of the model is built by the transformers library with every parameter on the meta
device; buffers (rotary frequencies, embedding scales) are computed for real. A block's parameters
are read from the source when it is their turn and dropped after:

    inputs = graph.start(windows, batch)          embedding, then what every block is called with
    for index in range(len(graph.block_names)):
        graph.materialize(index)
        for item in inputs: item.hidden = graph.run(index, item)
        graph.release(index)
    logits = graph.finish(inputs[0].hidden)

The library's own forward is run each time, with stand-ins for the decoder layers, so masks,
position embeddings, scaling and soft capping are the library's, not ours. Modules outside the
blocks are read at the moment they are called.

Experts run one after the other ("eager"), so that their inputs can be watched. Key-value caches,
padding masks and images are not dealt with here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import nn

from ..quant.errors import CalibrationError, CheckpointError
from ..quant.hadamard import Hadamard
from ..quant.names import NameMap, slot_view
from .skeleton import build_skeleton, find_blocks, put_tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class HasShape(Protocol):
    """Facts of a source tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class TensorSource(Protocol):
    """Where weights come from: decoded source tensors by their name in the file."""

    @property
    def tensors(self) -> Mapping[str, HasShape]: ...

    def read(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class LayerCall:
    """What a decoder layer gets besides the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class BlockInput:
    """One batch on its way through the blocks.

    hidden: [b, T, H] in the graph's dtype; replaced after each block.
    calls: one entry per block; equal tensors are shared between blocks and batches.
    """

    hidden: torch.Tensor
    calls: tuple[LayerCall, ...]


class _Stopped(Exception):
    """Ends a forward pass of the library after its last decoder layer was reached."""


class ModelGraph:
    """A model whose blocks are brought into memory one at a time.

    config: contents of config.json. source: where decoded tensors are read. dtype: of the graph.
    online: source tensor -> transform of the input of the linear layer that it is the weight of.
    CheckpointError if the checkpoint lacks a tensor, or has one of another shape;
    CalibrationError if the architecture is unknown.
    """

    def __init__(
        self,
        config: "PretrainedConfig | Mapping[str, Any]",
        source: TensorSource,
        dtype: torch.dtype,
        device: torch.device,
        online: Mapping[str, Hadamard] | None = None,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self._source = source
        self._model = build_skeleton(config, dtype)
        for name, buffer in list(self._model.named_buffers()):
            put_tensor(self._model, name, buffer.to(device))
        shapes = {name: tuple(fact.shape) for name, fact in source.tensors.items()}
        self.names = NameMap(self._model, shapes)
        self.block_names = find_blocks(self._model)
        self._blocks = [self._model.get_submodule(name) for name in self.block_names]
        # What an unloaded graph holds, under every name that a tied parameter has.
        persistent: dict[str, torch.Tensor] = self._model.state_dict(keep_vars=True)
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        self._empty: dict[str, torch.Tensor] = {**persistent, **parameters}
        self._readable = {name: self._named_source(name) for name in self._empty}
        self._block_of = self._sort_sources()
        self._online: set[str] = set()
        for key, turn in (online or {}).items():
            self._transform_input(key, turn)

    def _transform_input(self, key: str, turn: Hadamard) -> None:
        """Let the linear layer with weight `key` multiply turn.apply(x) instead of x."""
        slot = self.names.slot(key)
        name = slot.parameter.removesuffix(".weight") if slot else ""
        module = self._model.get_submodule(name) if slot else None
        if (
            slot is None
            or slot.rows
            or slot.expert is not None
            or not isinstance(module, nn.Linear)
        ):
            raise CalibrationError(
                f"{key} is not the whole weight of one linear layer, so its input cannot be "
                f"transformed at run time; leave its edge out of the pass rotate"
            )

        def before(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (turn.apply(args[0]), *args[1:])

        module.register_forward_pre_hook(before)
        self._online.add(name)

    def _named_source(self, name: str) -> str | None:
        """The graph name under which the source has `name`: its own, or one that it is tied to.

        None for a buffer that the checkpoint may leave out.
        """
        if self.names.sources(name):
            return name
        tensor = self._empty[name]
        for other, candidate in self._empty.items():
            if candidate is tensor and self.names.sources(other):
                return other
        if isinstance(tensor, nn.Parameter):
            raise CheckpointError(
                f"no tensor of the checkpoint becomes {name}, which the model needs; the "
                "checkpoint is incomplete or its config.json describes another model"
            )
        return None

    def _sort_sources(self) -> dict[str, int]:
        """Source tensor -> its block, or -1 outside; tensors that are not taken are absent."""
        indices = {name: index for index, name in enumerate(self.block_names)}
        depth = self.block_names[0].count(".") + 1
        found: dict[str, int] = {}
        for key in self._source.tensors:
            slot = self.names.slot(key)
            if slot is not None:
                parent = ".".join(slot.parameter.split(".")[:depth])
                found[key] = indices.get(parent, -1)
        return found

    @property
    def config(self) -> "PretrainedConfig":
        """Configuration of the graph."""
        return self._model.config

    @property
    def architecture(self) -> str:
        """Class name of the graph, `LlamaForCausalLM`."""
        return type(self._model).__name__

    @property
    def source_tensors(self) -> Mapping[str, HasShape]:
        """Facts of the source's tensors."""
        return self._source.tensors

    @property
    def attention_implementation(self) -> str:
        """Name under which the library looks up the attention function."""
        return str(self._model.config._attn_implementation)

    def embedding_names(self) -> tuple[str, str | None]:
        """Graph parameters of input and output embedding, the same if tied; None without a head."""
        names = {id(module): name for name, module in self._model.named_modules()}
        first, last = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        embedding = f"{names[id(first)]}.weight"
        if last is None:
            return embedding, None
        return embedding, embedding if last.weight is first.weight else f"{names[id(last)]}.weight"

    def untied_head(self) -> str:
        """Name of the output embedding's own parameter, whether tied or not."""
        names = {id(module): name for name, module in self._model.named_modules()}
        return f"{names[id(self._model.get_output_embeddings())]}.weight"

    @contextmanager
    def outer_module(self, name: str) -> Iterator[nn.Module]:
        """The module called `name`, outside the blocks, with its own parameters loaded."""
        own = [f"{name}.{leaf}" for leaf, _ in self._model.get_submodule(name).named_parameters()]
        for parameter in own:
            self._load(parameter)
        try:
            yield self._model.get_submodule(name)
        finally:
            for parameter in own:
                self._unload(parameter)

    def outer_names(self) -> tuple[str, ...]:
        """Graph parameters and buffers outside the blocks."""
        blocks = tuple(f"{name}." for name in self.block_names)
        return tuple(name for name in self._empty if not name.startswith(blocks))

    def wide_block(self, index: int, source: TensorSource | None = None) -> nn.Module:
        """A float32 copy of block `index`, float64 where the source is. The caller's to keep.

        source: where to read instead; that is the untransformed model, without online transforms.
        """
        prefix = self.block_names[index]
        module = deepcopy(self._blocks[index])
        for name in self._online if source is not None else ():
            if name.startswith(f"{prefix}."):
                module.get_submodule(name.removeprefix(f"{prefix}."))._forward_pre_hooks.clear()
        read = (source or self._source).read
        for name in self._names_under(prefix):
            readable = self._readable[name]
            if readable is None or not self._empty[name].is_floating_point():
                continue
            value = self.names.assemble(readable, read)
            wide = torch.float64 if value.dtype == torch.float64 else torch.float32
            put_tensor(module, name.removeprefix(f"{prefix}."), value.to(self.device, wide))
        return module

    def block_sources(self, index: int) -> tuple[str, ...]:
        """Source tensors of block `index`."""
        return tuple(key for key, block in self._block_of.items() if block == index)

    def outer_sources(self) -> tuple[str, ...]:
        """Source tensors that the graph takes outside its blocks: embedding, final norm, head."""
        return tuple(key for key, block in self._block_of.items() if block < 0)

    def carried_sources(self) -> tuple[str, ...]:
        """Source tensors that the graph does not take (prediction heads, vision towers)."""
        return tuple(key for key in self._source.tensors if key not in self._block_of)

    def block(self, index: int) -> nn.Module:
        """The decoder layer, materialized or not."""
        return self._blocks[index]

    def block_parameters(self, index: int) -> dict[str, torch.Tensor]:
        """Graph name -> parameter of block `index`, as it is now."""
        prefix = self.block_names[index]
        return {f"{prefix}.{name}": item for name, item in self._blocks[index].named_parameters()}

    def materialize(self, index: int) -> nn.Module:
        """Read the parameters of block `index`, in the graph's dtype, onto its device."""
        for name in self._names_under(self.block_names[index]):
            self._load(name)
        return self._blocks[index]

    def release(self, index: int) -> None:
        """Drop the parameters of block `index`."""
        for name in self._names_under(self.block_names[index]):
            self._unload(name)

    def run(self, index: int, inputs: BlockInput, block: nn.Module | None = None) -> torch.Tensor:
        """Hidden state [b, T, H] after materialized block `index`, or after `block` in its place."""
        call = inputs.calls[index]
        with torch.no_grad():
            output = (block or self._blocks[index])(
                inputs.hidden.to(self.device), *call.args, **call.kwargs
            )
        return output[0] if isinstance(output, tuple) else output

    def set_weight(self, source_name: str, value: torch.Tensor, transposed: bool = False) -> None:
        """Write logical `value` [N, K] or [E, N, K] where `source_name` is in the materialized
        graph. transposed: the graph (and the source) holds [.., K, N]."""
        slot = self.names.slot(source_name)
        if slot is None or not slot.quantizable:
            raise CalibrationError(
                f"{source_name} is not placed in the model as it is stored, so no other value can "
                "be put there; leave it out with ignore"
            )
        view = slot_view(self._model.get_parameter(slot.parameter), slot, transposed)
        if view.shape != value.shape:
            raise CalibrationError(
                f"{source_name} must be {tuple(view.shape)} ([.., N, K]), got {tuple(value.shape)}"
            )
        with torch.no_grad():
            view.copy_(value)

    def start(self, windows: torch.Tensor, batch: int) -> list[BlockInput]:
        """Inputs of the first block for token `windows` int64 [n, length], `batch` at a time."""
        inputs: list[BlockInput] = []
        with torch.no_grad(), self._outer_on_demand():
            for chunk in windows.split(batch):
                item = self._capture(chunk.to(self.device))
                if inputs:
                    item.calls = _share(item.calls, inputs[0].calls, {})
                inputs.append(item)
        return inputs

    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [b, T, vocabulary] from the hidden state after the last block."""
        hidden = hidden.to(self.device)

        def give(*args: Any, **kwargs: Any) -> torch.Tensor:
            return hidden

        with torch.no_grad(), self._outer_on_demand(), self._stand_ins(lambda index: give):
            return self._model(inputs_embeds=hidden, use_cache=False).logits

    def _capture(self, tokens: torch.Tensor) -> BlockInput:
        """Run the library's forward up to the last layer, noting what each one is called with."""
        calls: dict[int, LayerCall] = {}
        first: list[torch.Tensor] = []

        def catch(index: int) -> Callable[..., torch.Tensor]:
            def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
                hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
                if not first:
                    first.append(hidden)
                if hidden is not first[0]:
                    _refuse_layers(self._model, "change the hidden state between each other")
                calls[index] = LayerCall(tuple(rest), kwargs)
                if index == len(self._blocks) - 1:
                    raise _Stopped
                return hidden

            return forward

        with self._stand_ins(catch), suppress(_Stopped):
            self._model(input_ids=tokens, use_cache=False)
        if len(calls) != len(self._blocks):
            _refuse_layers(self._model, f"were called {len(calls)} of {len(self._blocks)} times")
        return BlockInput(first[0], tuple(calls[index] for index in range(len(calls))))

    @contextmanager
    def _stand_ins(self, make: Callable[[int], Callable[..., torch.Tensor]]) -> Iterator[None]:
        """Replace each layer's forward; the layers stay where they are, with their attributes."""
        try:
            for index, block in enumerate(self._blocks):
                block.__dict__["forward"] = make(index)
            yield
        finally:
            for block in self._blocks:
                block.__dict__.pop("forward", None)

    @contextmanager
    def _outer_on_demand(self) -> Iterator[None]:
        """Read parameters outside the blocks when their module is called; drop them at the end."""
        loaded: set[str] = set()
        hooks = []

        def load_owned(names: list[str]) -> Callable[..., None]:
            def before(module: nn.Module, args: Any) -> None:
                for name in names:
                    if name not in loaded:
                        self._load(name)
                        loaded.add(name)

            return before

        owned: dict[str, list[str]] = {}
        for name in self._empty:
            if not any(name.startswith(f"{block}.") for block in self.block_names):
                owned.setdefault(name.rpartition(".")[0], []).append(name)
        try:
            for owner, names in owned.items():
                module = self._model.get_submodule(owner)
                hooks.append(module.register_forward_pre_hook(load_owned(names)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name in loaded:
                self._unload(name)

    def _names_under(self, prefix: str) -> list[str]:
        return [name for name in self._empty if name.startswith(f"{prefix}.")]

    def _load(self, name: str) -> None:
        wanted = self._empty[name]
        readable = self._readable[name]
        if readable is None:
            return
        value = self.names.assemble(readable, self._source.read)
        # A single source may be a view of the file: never hand out what is not ours to change.
        copy = len(self.names.sources(readable)) == 1
        put_tensor(self._model, name, value.to(self.device, wanted.dtype, copy=copy))

    def _unload(self, name: str) -> None:
        if isinstance(self._empty[name], nn.Parameter):
            put_tensor(self._model, name, self._empty[name])


def _refuse_layers(model: nn.Module, found: str) -> NoReturn:
    raise CalibrationError(
        f"the layers of {type(model).__name__} {found}; block-by-block calibration needs each to "
        "be called once with the output of the one before; use a recipe without calibration"
    )


def _share(new: Any, old: Any, seen: dict[int, Any]) -> Any:
    """`new` with every tensor that equals its counterpart in `old` replaced by that one."""
    if id(new) in seen:
        return seen[id(new)]
    result = new
    if isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor):
        same = new.shape == old.shape and new.dtype == old.dtype and bool(torch.equal(new, old))
        result = old if same else new
    elif isinstance(new, LayerCall):
        result = LayerCall(_share(new.args, old.args, seen), _share(new.kwargs, old.kwargs, seen))
    elif isinstance(new, dict) and isinstance(old, dict) and new.keys() == old.keys():
        result = {key: _share(value, old[key], seen) for key, value in new.items()}
    elif isinstance(new, (tuple, list)) and isinstance(old, type(new)) and len(new) == len(old):
        result = type(new)(_share(a, b, seen) for a, b in zip(new, old, strict=True))
    seen[id(new)] = result
    return result
