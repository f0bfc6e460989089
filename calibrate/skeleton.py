"""The skeleton of a model: the library's graph with every parameter on the meta device.

Buffers (rotary frequencies, embedding scales) are computed for real; a `quantization_config` of the
source is left out, because sources are decoded by whoever reads them. What the library raises at a
configuration that makes no sense comes back as a CalibrationError that names the way around.

Weights are not read here: `model.py` does that, block by block.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..quant.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Keys of config.json that say how the source is stored or was once run.
_NOT_OF_THE_GRAPH = ("quantization_config", "attn_implementation", "_attn_implementation")
_NO_MODEL = "the transformers library builds no text model from model_type {!r}"
_DATA_FREE = "use a recipe without calibration"
_REFUSALS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, OSError)


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
