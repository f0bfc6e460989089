"""The adapter to the transformers library: it loads and saves quant_method "fewbit".

Order in which the library calls the quantizer, and what is done at each step:

    configuration read           FewbitConfig keeps the keys as they are
    skeleton on the meta device  before_weight_loading: headers, manifest, checksums; then holders
                                 for packed weights replace linear layers and expert stacks
    names converted              renamings as for dense tensors; parts whose name must differ get it
    tensors loaded               the holders' buffers carry checkpoint names, so parts are plain
                                 tensors to the library: mapped, not copied, never converted
    weights tied, eval           after_weight_loading: decode what no holder fits; check every part
    save_pretrained              the same parts, bit for bit; checksums go into the file headers

Saving needs no manifest: what the configuration had moved there is back in it.

Weights are not trained here, and a model that is not quantized yet is not quantized on the way in:
that is `fewbit quantize`.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..export.metadata import VERSION, read_manifest
from ..export.safetensors_file import map_entries
from .errors import CheckpointError
from .format import dequantize, find_format
from .hub import fetch_manifest
from .linear import PackedModule
from .placement import Placement, packed_modules, place, set_tied
from .stored import METHOD, StoredCheckpoint, describe
from .verify import check_packed, header_checksums, packed_of, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HELD = "fewbit.held."
_CHECKED: ContextVar[bool] = ContextVar("fewbit_checked", default=False)


@contextmanager
def already_checked() -> Iterator[None]:
    """Checkpoints loaded inside are not verified (again)."""
    token = _CHECKED.set(True)
    try:
        yield
    finally:
        _CHECKED.reset(token)


class FewbitConfig(QuantizationConfigMixin):
    """`quantization_config` as the library carries it around: our keys, as attributes.

    Keys of newer versions are kept; they are refused where the checkpoint is opened, by name.
    """

    def __init__(
        self,
        quant_method: str = METHOD,
        version: int = VERSION,
        recipe: str = "",
        default: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Any] | None = None,
        **newer: Any,
    ) -> None:
        self.quant_method = quant_method
        self.version = version
        self.recipe = recipe
        self.default = dict(default) if isinstance(default, Mapping) else default
        self.tensors = dict(tensors) if isinstance(tensors, Mapping) else (tensors or {})
        self.__dict__.update(newer)


class _ExactNames(WeightRenaming):
    """Renames whole names by a table, after all renamings of the library."""

    __slots__ = ("names",)

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__(source_patterns="fewbit^", target_patterns="fewbit")
        self.names = dict(names)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """(new name, None); the name itself if the table does not have it."""
        target = self.names.get(source_key)
        if target is None:
            return source_key, None
        self._was_used = True  # type: ignore[misc]  # a slot of the class above
        return target, None

    def reverse_transform(self) -> "_ExactNames":
        """The table read backwards."""
        return _ExactNames({target: source for source, target in self.names.items()})


class FewbitQuantizer(HfQuantizer):
    """Loads and saves packed weights; see the module's text for the order of calls."""

    requires_calibration = True  # tells the library that it cannot quantize on the way in

    def __init__(self, quantization_config: FewbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._model: PreTrainedModel | None = None  # these three only while a model is loaded
        self._stored: StoredCheckpoint | None = None
        self._plan: Placement | None = None
        self._dtypes: dict[str, torch.dtype] = {}

    # The library's hook; its other keywords (device map, kernels) do not matter here.
    def _process_model_before_weight_loading(
        self,
        model: "PreTrainedModel",
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> "PreTrainedModel":
        with torch.device("cpu"):  # the library's default is the meta device here
            stored = self._open(checkpoint_files)
            if not _CHECKED.get():
                verify(stored)
        self.quantization_config.tensors.update((stored.manifest or {}).get("exceptions", {}))
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        plan = place(model, stored)
        if plan.has_experts:
            model.set_experts_implementation("eager")
        _ignore(model, "_keys_to_ignore_on_load_missing", [re.escape(n) for n in plan.decoded])
        _ignore(model, "_keys_to_ignore_on_load_unexpected", [re.escape(_HELD)])
        self._model, self._stored, self._plan = model, stored, plan
        return model

    def _open(self, checkpoint_files: Sequence[str] | None) -> StoredCheckpoint:
        if not checkpoint_files:
            raise CheckpointError(
                "a fewbit checkpoint is loaded from its safetensors files, got a state dict; "
                "give from_pretrained the folder or hub id"
            )
        files = [Path(name) for name in checkpoint_files]
        fetch_manifest(files[0].parent)
        manifest = read_manifest(files[0].parent)
        return describe(files[0].parent, files, self.quantization_config.to_dict(), manifest)

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: "PreTrainedModel | None" = None
    ) -> list[Any]:
        """The library's conversions, and a table for what must go elsewhere than they say."""
        model = model or self._model  # transformers before 5.18 does not pass it
        if self._stored is None or self._plan is None or model is None:
            return weight_conversions
        table = _exact_names(model, self._stored, self._plan, weight_conversions)
        return [*weight_conversions, _ExactNames(table)] if table else weight_conversions

    def _process_model_after_weight_loading(
        self, model: "PreTrainedModel", **kwargs: Any
    ) -> "PreTrainedModel":
        assert self._stored is not None and self._plan is not None, "loading ended before it began"
        _decode_parameters(model, self._stored, self._plan, self._dtypes)
        _restore_dtypes(model, self._dtypes)
        for name, module in packed_modules(model).items():
            for part, tensor in module.named_buffers():
                if tensor.is_meta or not getattr(tensor, "_is_hf_initialized", False):
                    raise CheckpointError(
                        f"{name}.{part} got no value while loading; give a device map without disk "
                        f"offloading, or use fewbit.quant.load"
                    )
            check_packed(name, module.packed)
        self._model = self._stored = self._plan = None
        return model

    def get_state_dict_and_metadata(
        self, model: "PreTrainedModel"
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """None for the library's own state dict, and checksums of all that it will write.

        A tensor is listed under its name in the graph and in the original layout, because the
        caller's choice between the two is not known here.
        """
        state = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
        original = revert_weight_conversion(model, dict(state))
        sums = header_checksums({**state, **original}, self.quantization_config.to_dict())
        return None, sums

    def is_serializable(self) -> bool:
        """Parts are saved as they were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights take no gradient."""
        return False


def _ignore(model: "PreTrainedModel", attribute: str, patterns: Sequence[str]) -> None:
    """Keep expected differences out of the library's report, for this model only."""
    setattr(model, attribute, set(getattr(model, attribute) or ()) | set(patterns))


def _exact_names(
    model: "PreTrainedModel", stored: StoredCheckpoint, plan: Placement, conversions: Sequence[Any]
) -> dict[str, str]:
    """Names after the library's renamings -> names that the graph knows.

    The library's patterns are made for `.weight`; most serve parts as well. CheckpointError if one
    would convert a part, which only the dense tensor can stand.
    """
    conversions = deepcopy(list(conversions))  # they remember whether they were used
    renamings = [item for item in conversions if isinstance(item, WeightRenaming)]
    converters = [item for item in conversions if isinstance(item, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    table: dict[str, str] = {}
    for key in sorted(stored.tensors, key=dot_natural_key):
        renamed, _ = rename_source_key(key, renamings, [])
        wanted = plan.part_names.get(key)
        if key in plan.held:
            table[renamed] = f"{_HELD}{len(table)}"
        elif wanted is not None:
            found = rename_source_key(renamed, [], converters, prefix, state)
            if found == (wanted, None):
                continue
            table[renamed] = wanted
            found = rename_source_key(wanted, [], converters, prefix, state)
            if found != (wanted, None):
                raise CheckpointError(
                    f"{stored.folder}: {key} belongs at {wanted}, the transformers library would "
                    f"make {found[0]} of it; leave this weight out with weights.ignore"
                )
    return table


def _decode_parameters(
    model: "PreTrainedModel",
    stored: StoredCheckpoint,
    plan: Placement,
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Fill the parameters that no packed holder can stand for."""
    if not plan.decoded:
        return
    tensors = {name: t for header in stored.headers for name, t in map_entries(header).items()}

    def read(key: str) -> torch.Tensor:
        module = plan.owners.get(key)
        if module is None:
            return tensors[key]
        value = dequantize(packed_of(module, tensors))
        return value.mT if module.spec.transposed else value

    for parameter, modules in plan.decoded.items():
        warnings.warn(
            f"{parameter}: {', '.join(modules[:3])} are stored quantized, but this model cannot "
            f"multiply by them as they are; kept decoded in memory, and saved so",
            RuntimeWarning,
            stacklevel=2,
        )
        old = model.get_parameter(parameter)
        value = plan.names.assemble(parameter, read)
        set_tied(model, parameter, value.to(old.device, dtypes[parameter], copy=True).contiguous())


def _restore_dtypes(model: "PreTrainedModel", dtypes: Mapping[str, torch.dtype]) -> None:
    """Undo and redo casts that depend on the library's version.

    Some versions leave a renamed dense tensor of a quantized model in the file's dtype, and cast
    16-bit scales to fp32 in modules that are to be kept in fp32 (which loses nothing).
    """
    for module in packed_modules(model).values():
        _restore_part_dtypes(module)
    policy = model._get_dtype_plan(model.config.dtype)
    patterns, groups, _ = build_glob_alternation(list(policy)) if policy else (None, {}, {})
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in dtypes or not tensor.is_floating_point():
            continue
        found = patterns.search(name) if patterns else None
        wanted = policy[groups[found.lastgroup]] if found and found.lastgroup else dtypes[name]
        if tensor.dtype != wanted:
            tensor.data = tensor.data.to(wanted)


def _restore_part_dtypes(module: PackedModule) -> None:
    for index, (name, options) in enumerate(module.terms):
        holder = module.get_submodule(f"term{index}") if index else module
        for part, spec in find_format(name).part_specs(module.logical_shape, options).items():
            tensor = holder.get_buffer(part)
            if tensor.dtype != spec.dtype:
                tensor.data = tensor.data.to(spec.dtype)


def register() -> None:
    """Make the library know quant_method "fewbit"; doing it again changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(FewbitConfig)
        register_quantizer(METHOD)(FewbitQuantizer)


register()  # importing this module is enough
