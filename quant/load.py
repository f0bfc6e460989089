"""`load`: a checkpoint of ours as a transformers model, checked first.

The library's own `from_pretrained` builds the model, through the adapter in `hf.py`, so that both
ways give the same model to the last bit. What is added here happens before: everything that can be
wrong with the files is found by us and named, so that the library only ever sees sound ones.

On a GPU, stored parts stay in the mapped files, in no memory of this process, but for entropy-coded
ones: these are decoded into host memory and stay there. What the chosen kernels derive from them is
all that the GPU holds. (Not yet run on a GPU.)

The dtype of the arithmetic is the configuration's unless `dtype` says otherwise; stored parts keep
theirs.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .device import resolve_device
from .errors import CheckpointError, RecipeError
from .hub import fetch
from .kernel_summary import log_summary
from .packed_module import stored_parts_stay
from .recipe import check_resident
from .stored import StoredCheckpoint, open_stored, read_config
from .verify import verify as verify_stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    path_or_id: str | Path,
    device: str = "auto",
    dtype: torch.dtype | str | None = None,
    verify: bool = True,
    resident: str | None = None,
) -> "PreTrainedModel":
    """The model in a folder or hub id, in evaluation mode, of the class that its configuration names;
    `.generate` works where that class has it.

    device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:i". dtype: of activations and of
    what is not quantized; None is the checkpoint's own. verify: compare every stored byte with its
    checksum. resident: how entropy-coded weights are held (`coded_weights.py`); None as the checkpoint
    says, else decoded, coded, fle4 or fle3.

    CheckpointError: not there, not one of fewbit's, unfinished, newer than this fewbit, or damaged.
    RecipeError: no such device, no such way to hold weights, or `resident` was given and no tensor of
    the checkpoint is coded. RuntimeWarning: coded ones are there, but none can be held so.
    """
    target = resolve_device(device)
    folder = fetch(path_or_id)
    stored = open_stored(folder)
    stored.refuse_foreign()
    if resident is not None:
        check_resident(resident)
        _require_coded(stored, resident)
        stored = replace(stored, resident=resident)
    if verify:
        verify_stored(stored)
    # The loader before the adapter: the import hook takes their locks in this order, too.
    import transformers.modeling_utils  # noqa: F401

    from .hf import already_checked

    with already_checked(stored, target):
        try:
            model = _model_class(read_config(folder)).from_pretrained(
                str(folder), dtype=dtype or "auto", use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path_or_id}: the transformers library cannot build this model: "
                f"{_first_line(error)}; a newer transformers may know it"
            ) from error
    if target.type != "cpu" and not hasattr(model, "coded_weights"):
        with stored_parts_stay():
            model = model.to(target)
    log_summary(model)
    return model


def _require_coded(stored: StoredCheckpoint, resident: str) -> None:
    if resident == "decoded" or any(tensor.coded for tensor in stored.tensors.values()):
        return
    raise RecipeError(
        f"resident={resident!r} holds entropy-coded weights, but none of {stored.folder} is coded: it "
        f"has {len(stored.modules)} quantized weights and {len(stored.dense())} plain tensors; "
        f"quantize again with lossless=true, or leave resident out"
    )


def _model_class(config: Mapping[str, Any]) -> Any:
    """The class that the configuration names, if the library has it; else that of causal models."""
    import transformers

    for name in config.get("architectures") or ():
        found = getattr(transformers, str(name), None)
        if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
            continue
        made_for = getattr(found, "config_class", None)
        if getattr(made_for, "model_type", None) == config.get("model_type"):
            return found
    return transformers.AutoModelForCausalLM


def load_tokenizer(path_or_id: str | Path) -> Any:
    """The tokenizer beside a checkpoint; CheckpointError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path_or_id))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path_or_id} has no usable tokenizer: {_first_line(error)}; put the model's "
            f"tokenizer files there"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
