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

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..quant.errors import CalibrationError, CheckpointError
from ..quant.names import NameMap, slot_view

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Keys of config.json that say how the source is stored or was once run.
_NOT_OF_THE_GRAPH = ("quantization_config", "attn_implementation", "_attn_implementation")
_NO_MODEL = "the transformers library builds no text model from model_type {!r}"
_DATA_FREE = "use a recipe without calibration"
_REFUSALS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, OSError)


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


def build_skeleton(
    config: "PretrainedConfig | Mapping[str, Any]", dtype: torch.dtype
) -> "PreTrainedModel":
    """A causal language model with parameters on meta (in `dtype`) and real buffers.

    config: as read from config.json; a `quantization_config` of the source is left out.
    CalibrationError if the library does not know the architecture.
    """
    from transformers import AutoModelForCausalLM as Auto

    config = _clean_config(config)
    hook = register_module_parameter_registration_hook(cast(Any, _meta_parameter))
    with hook, _library_refuses(_NO_MODEL.format(config.model_type), _DATA_FREE):
        model = Auto.from_config(config, dtype=dtype, experts_implementation="eager")
    _keep_in_fp32(model, dtype)
    return model.eval()


def check_architecture(config: Mapping[str, Any]) -> None:
    """CalibrationError unless a block-wise graph can be built from the contents of config.json."""
    find_blocks(build_skeleton(config, torch.bfloat16))


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a checkpoint's folder; CalibrationError if there is none that opens."""
    from transformers import AutoTokenizer

    remedy = f"copy the model's tokenizer files there, or {_DATA_FREE}"
    with _library_refuses(f"no tokenizer opens in {folder}", remedy):
        return AutoTokenizer.from_pretrained(folder)


@contextmanager
def _library_refuses(what: str, remedy: str) -> Iterator[None]:
    """CalibrationError for what the library's constructors raise at files that make no sense."""
    from huggingface_hub.errors import StrictDataclassError as Strict

    try:
        yield
    except (*_REFUSALS, RuntimeError, AssertionError, Strict) as error:
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        raise CalibrationError(f"{what}: {reason}; {remedy}") from error


def _clean_config(config: "PretrainedConfig | Mapping[str, Any]") -> "PretrainedConfig":
    """A copy of the configuration without what tells how the source was stored or run."""
    from transformers import CONFIG_MAPPING

    if not isinstance(config, Mapping):
        copied = deepcopy(config)
        if hasattr(copied, "quantization_config"):
            del copied.quantization_config
        return copied
    keys = {key: value for key, value in config.items() if key not in _NOT_OF_THE_GRAPH}
    model_type = str(keys.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise CalibrationError(
            f"the transformers library does not know model_type {model_type!r}; "
            "use a recipe without calibration, or a newer transformers"
        )
    with _library_refuses(_NO_MODEL.format(model_type), _DATA_FREE):
        return CONFIG_MAPPING[model_type].from_dict(deepcopy(keys))


def _meta_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    """Replacement of a parameter while it is registered; None keeps it (and keeps ties)."""
    if parameter.is_meta:
        return None
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def _keep_in_fp32(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """What the architecture declares too sensitive for 16 bit, as the library does on loading."""
    patterns: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        patterns |= set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        patterns |= set(model._keep_in_fp32_modules or ())
    if not patterns:
        return
    matcher = re.compile("|".join(pattern.replace("*", ".*") for pattern in sorted(patterns)))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if matcher.search(name) and tensor.is_floating_point():
            put_tensor(model, name, tensor.detach().float())


def put_tensor(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace the parameter or buffer called `name`."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(getattr(owner, leaf), nn.Parameter) and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(owner, leaf, value)


def find_blocks(model: "PreTrainedModel") -> tuple[str, ...]:
    """Names of the decoder layers: members of the decoder's longest module list that is in no
    other. (A vision tower beside the decoder may have more layers; experts are lists in a layer.)
    """
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    lists: dict[str, int] = {}
    for name, module in decoder.named_modules(prefix=prefix):
        inside = any(name.startswith(f"{other}.") for other in lists)
        if isinstance(module, nn.ModuleList) and not inside:
            lists[name] = len(module)
    if not lists or max(lists.values()) == 0:
        raise CalibrationError(
            f"{type(model).__name__} has no list of decoder layers; "
            "use a recipe without calibration"
        )
    longest = max(lists, key=lambda name: lists[name])
    return tuple(f"{longest}.{index}" for index in range(lists[longest]))


class ModelGraph:
    """A model whose blocks are brought into memory one at a time.

    config: contents of config.json. source: where decoded tensors are read. dtype: of the graph.
    CheckpointError if the checkpoint lacks a tensor, or has one of another shape;
    CalibrationError if the architecture is unknown.
    """

    def __init__(
        self,
        config: "PretrainedConfig | Mapping[str, Any]",
        source: TensorSource,
        dtype: torch.dtype,
        device: torch.device,
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
