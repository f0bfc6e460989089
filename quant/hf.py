"""The adapter to the transformers library: it loads and saves quant_method "fewbit".

Order in which the library calls the quantizer, and what is done at each step:

    configuration read           FewbitConfig keeps the keys as they are
    skeleton on the meta device  before_weight_loading: headers, manifest, checksums; then holders
                                 for packed weights replace linear layers and expert stacks
    tensors loaded               dense tensors only: the parts of packed weights are hidden from the
                                 library, which would spend a compiled pattern on each of them
    weights tied, eval           after_weight_loading: parts are mapped from the files into the
                                 holders, not copied, and checked; what no holder fits is decoded;
                                 the KV policy is installed, so that plain `generate()` follows it
    save_pretrained              parts are ordinary buffers by then, and are written bit for bit
                                 under their names in the source; checksums go into the headers

Saving needs no manifest: what the configuration had moved there is back in it.

Weights are not trained here, and a model that is not quantized yet is not quantized on the way in:
that is `fewbit quantize`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from ..export.coded_files import PLANE_NAMES
from ..export.metadata import VERSION, read_manifest
from .coded_weights import fill_decoded, keep
from .errors import CheckpointError
from .fused import find_groups, fuse
from .hub import fetch_manifest
from .kv_install import install
from .kv_policy import parse_kv
from .linear import PackedModule
from .placement import Placement, place, take_ties
from .stored import METHOD, StoredCheckpoint, describe
from .verify import check_packed, header_checksums, packed_of, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HELD = "fewbit.held."
_CHECKED: ContextVar[StoredCheckpoint | None] = ContextVar("fewbit_checked", default=None)
_TARGET: ContextVar[torch.device | None] = ContextVar("fewbit_target", default=None)


@contextmanager
def already_checked(stored: StoredCheckpoint, target: torch.device) -> Iterator[None]:
    """A model loaded inside is `stored`, which is neither read nor verified again.

    target: where weights that stay coded are to be decoded.
    """
    tokens = _CHECKED.set(stored), _TARGET.set(target)
    try:
        yield
    finally:
        _CHECKED.reset(tokens[0])
        _TARGET.reset(tokens[1])


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
        self._stored: StoredCheckpoint | None = None  # this and the next only while loading
        self._plan: Placement | None = None
        self._dtypes: dict[str, torch.dtype] = {}
        self._ties: dict[str, str] = {}
        self._resident = "decoded"

    # The library's hook; its other keywords (device map, kernels) do not matter here.
    def _process_model_before_weight_loading(
        self,
        model: "PreTrainedModel",
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> "PreTrainedModel":
        with torch.device("cpu"):  # the library's default is the meta device here
            stored = _CHECKED.get()
            if stored is None:
                stored = self._open(checkpoint_files)
                stored.refuse_foreign()
                verify(stored)
        self.quantization_config.tensors.update((stored.manifest or {}).get("exceptions", {}))
        self.quantization_config.__dict__.pop("exceptions_in_manifest", None)  # they are inline now
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        plan = place(model, stored)
        if plan.has_experts:
            model.set_experts_implementation("eager")
        self._ties = take_ties(model, plan)
        expected = {*plan.decoded, *self._ties}
        _ignore(model, "_keys_to_ignore_on_load_missing", map(re.escape, expected))
        _ignore(
            model, "_keys_to_ignore_on_load_unexpected", (re.escape(_HELD), _part_pattern(stored))
        )
        _spare_random_numbers(model, expected)
        self._stored, self._plan = stored, plan
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
        """The library's conversions, and a table that keeps it off what is decoded by us."""
        if self._plan is None or not self._plan.held:
            return weight_conversions
        table = {}
        for index, key in enumerate(sorted(self._plan.held)):
            table[_renamed(key, weight_conversions)] = f"{_HELD}{index}"
        return [*weight_conversions, _ExactNames(table)]

    def _process_model_after_weight_loading(
        self, model: "PreTrainedModel", **kwargs: Any
    ) -> "PreTrainedModel":
        assert self._stored is not None and self._plan is not None, "loading ended before it began"
        tensors = self._stored.contents()
        model.all_tied_weights_keys.update(self._ties)
        _fill_holders(model, self._plan, tensors)
        wanted = _wanted_dtypes(model, self._dtypes)
        resident = self._stored.resident
        filled = fill_decoded(model, self._plan, tensors, wanted, resident)
        _restore_dtypes(model, wanted)
        _keep_names(model, self._plan)
        self._stored = self._plan = None
        for group in find_groups(model):
            fuse(group)
        if "kv" in self.quantization_config.__dict__:
            install(model, parse_kv(self.quantization_config.kv, "kv"))
        if filled.kept:
            keep(model, filled.kept, _TARGET.get() or _device_of(model))
        self._resident = filled.resident
        self.quantization_config.__dict__.pop("resident", None)  # no tensor is saved coded
        return model

    def get_state_dict_and_metadata(
        self, model: "PreTrainedModel"
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """None for the library's own state dict, and checksums of all that it will write.

        A tensor is listed under its name in the graph and in the original layout, because the
        caller's choice between the two is not known here.
        """
        if self._resident.startswith("fle"):
            raise CheckpointError(
                f"this model holds its weights as {self._resident}, which is no form to store them in; "
                f"load it with resident='decoded' to save it"
            )
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


def _spare_random_numbers(model: "PreTrainedModel", parameters: Iterable[str]) -> None:
    """Keep the library from initializing what we decode afterwards: it takes longer than decoding.

    Only leaves without buffers are marked, for theirs may not come from the file.
    """
    for parameter in parameters:
        module: Any = model.get_submodule(parameter.rpartition(".")[0])
        if not module._buffers and not module._modules:
            module._is_hf_initialized = True


def _ignore(model: "PreTrainedModel", attribute: str, patterns: Iterable[str]) -> None:
    """Keep expected differences out of the library's report, for this model only."""
    setattr(model, attribute, set(getattr(model, attribute) or ()) | set(patterns))


def _part_pattern(stored: StoredCheckpoint) -> str:
    """Matches the name of every part of a packed weight and every plane of a coded tensor, however
    the library renames modules."""
    parts = {part for module in stored.modules.values() for part in module.parts}
    names = sorted(parts | set(PLANE_NAMES))
    return rf"\.({'|'.join(map(re.escape, names))})$"


def _renamed(key: str, conversions: Sequence[Any]) -> str:
    """`key` after all renamings. They remember whether they were used, so copies are asked."""
    renamings = [item for item in conversions if isinstance(item, WeightRenaming)]
    return str(rename_source_key(key, deepcopy(renamings), [])[0])


def _fill_holders(
    model: "PreTrainedModel", plan: Placement, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Give each holder its parts, for the device where the library put the empty ones. For a GPU they
    stay in the mapped file: kernels make their own layouts there, and nothing is held twice."""
    for name, stored in plan.modules.items():
        packed = packed_of(stored, tensors)
        check_packed(name, packed)
        module = model.get_submodule(name)
        assert isinstance(module, PackedModule), f"{name} was replaced while loading"
        if module.device.type == "meta":
            raise CheckpointError(
                f"{name} got no device while loading; give a device map without disk offloading, "
                f"or use fewbit.quant.load"
            )
        device = module.device
        module.fill(packed if device.type == "cuda" else packed.to(device))
        module.place(device)


def _device_of(model: "PreTrainedModel") -> torch.device:
    """Of the first parameter that is on one."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def _keep_names(model: "PreTrainedModel", plan: Placement) -> None:
    """Let the library save parts under the names that they had in the source.

    The specification of a module is found by that name. The library's patterns are made for
    `.weight`, and drop or add the prefix of a base model; where they do not lead back, a table does.
    """
    conversions = list(getattr(model, "_weight_conversions", None) or ())
    backward = [item.reverse_transform() for item in reversed(conversions)]
    renamings = [item for item in backward if isinstance(item, WeightRenaming)]
    converters = [item for item in backward if isinstance(item, WeightConverter)]
    forward = deepcopy([item for item in conversions if isinstance(item, WeightRenaming)])
    table: dict[str, str] = {}
    for key, name in plan.part_names.items():
        if rename_source_key(name, renamings, converters, reverse=True) == (key, None):
            continue
        middle, _ = rename_source_key(key, forward, [])
        if rename_source_key(middle, renamings, converters, reverse=True) != (key, None):
            raise CheckpointError(
                f"the transformers library cannot be told to save {name} as {key} again; leave "
                f"this weight out with weights.ignore"
            )
        table[middle] = name
    if table:
        names = _ExactNames(table)
        names._was_used = True  # type: ignore[misc]
        model._weight_conversions = [*conversions, names]


def _wanted_dtypes(
    model: "PreTrainedModel", dtypes: Mapping[str, torch.dtype]
) -> dict[str, torch.dtype]:
    """dtype of each floating tensor: the skeleton's, or what the class keeps apart (T5's `wo`)."""
    policy = model._get_dtype_plan(model.config.dtype)
    patterns, groups, _ = build_glob_alternation(list(policy)) if policy else (None, {}, {})
    wanted = {}
    for name, dtype in dtypes.items():
        found = patterns.search(name) if patterns and dtype.is_floating_point else None
        wanted[name] = policy[groups[found.lastgroup]] if found and found.lastgroup else dtype
    return wanted


def _restore_dtypes(model: "PreTrainedModel", wanted: Mapping[str, torch.dtype]) -> None:
    """Cast what some versions of the library leave in the file's dtype: renamed dense tensors."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in wanted and tensor.is_floating_point() and tensor.dtype != wanted[name]:
            tensor.data = tensor.data.to(wanted[name])


def register() -> None:
    """Make the library know quant_method "fewbit"; doing it again changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(FewbitConfig)
        register_quantizer(METHOD)(FewbitQuantizer)


register()  # importing this module is enough
