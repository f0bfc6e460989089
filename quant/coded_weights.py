"""What becomes of entropy-coded parameters while a model is loaded; `resident` says which of

    decoded   decoded once, into ordinary parameters (default)
    coded     those of blocks stay coded and are decoded block by block, ahead of use (`resident.py`)
    fle4      bf16 weights of linear layers get codes of 4 bits for their exponents (`formats/fle.py`):
    fle3      three quarters of the memory, or 70 %; multiplied by whichever kernel is fastest

All give weights of the same bits. `coded` also gives logits of the same bits, and so do `fle4` and
`fle3` where the weight is decoded for the library's product; a fused kernel, which runs only where it
was measured to be faster, sums in another order.

What cannot be held in the wanted way (norms, embeddings, tied weights, tensors that the library
rearranges or casts; for fle also weights beside a bias) is decoded. Parameters that packed weights were
decoded into come here, too. Where nothing at all can be held in the wanted way, a warning says so, and
the model is an ordinary one.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..export.coded_files import DecodedTensors
from .codecs.coded import CodedTensor
from .errors import CheckpointError
from .format import dequantize
from .linear import QuantLinear
from .packed_module import stored_parts_stay
from .placement import Placement, set_tied
from .resident_slots import Coded
from .verify import check_packed, packed_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Filled:
    """kept: coded tensors by their parameters, which are on the meta device yet. resident: how weights
    are really held; "decoded" where none could be held as was wanted."""

    kept: dict[str, CodedTensor]
    resident: str


def fill_decoded(
    model: "PreTrainedModel",
    plan: Placement,
    tensors: DecodedTensors,
    wanted: Mapping[str, torch.dtype],
    resident: str,
) -> Filled:
    """Give every parameter of `plan.decoded` its value, but for those that stay coded: these are
    returned, and are left on the meta device.

    wanted: dtype of each parameter. RuntimeWarning: nothing could be held as `resident` says.
    """
    n_fle = 0
    kept = dict(_staying(model, plan, tensors, wanted)) if resident == "coded" else {}
    for parameter, modules in plan.decoded.items():
        if parameter in kept:
            _put(model, parameter, torch.empty(kept[parameter].shape, dtype=wanted[parameter],
                                               device="meta"))  # fmt: skip
            continue
        if modules:
            warnings.warn(
                f"{parameter}: {', '.join(modules[:3])} are stored quantized, but this model cannot "
                f"multiply by them as they are; kept decoded in memory, and saved so",
                RuntimeWarning,
                stacklevel=2,
            )
        value = _value(model, plan, tensors, parameter, wanted[parameter])
        if resident.startswith("fle") and _hold_as_fle(model, parameter, value, resident):
            n_fle += 1
        else:
            set_tied(model, parameter, value)
    if resident != "decoded" and not kept and not n_fle:
        _warn_none_held(resident, len(plan.decoded), sorted({str(d) for d in wanted.values()}))
        resident = "decoded"
    return Filled(kept, resident)


def _warn_none_held(resident: str, n_decoded: int, dtypes: Sequence[str]) -> None:
    wants = {
        "coded": "a coded tensor of a block, not tied, in the dtype that it is stored in",
        "fle": "a bfloat16 weight of a linear layer without bias, not tied, stored coded",
    }["coded" if resident == "coded" else "fle"]
    warnings.warn(
        f"resident={resident!r}: 0 weights are held so, {n_decoded} are decoded instead; it takes "
        f"{wants}, and this model is of {', '.join(dtypes)}; load it with "
        f"resident='decoded', which gives the same without this warning",
        RuntimeWarning,
        stacklevel=3,
    )


def _value(
    model: nn.Module, plan: Placement, tensors: DecodedTensors, parameter: str, dtype: torch.dtype
) -> torch.Tensor:
    """In memory of its own, on the device where the library put the parameter."""

    def read(key: str) -> torch.Tensor:
        module = plan.owners.get(key)
        if module is None:
            return tensors[key]
        packed = packed_of(module, tensors)
        check_packed(module.name, packed)
        value = dequantize(packed)
        return value.mT if module.spec.transposed else value

    owner, leaf = _owner(model, parameter)
    value = plan.names.assemble(parameter, read).to(getattr(owner, leaf).device, dtype)
    mapped = any(key in plan.held for key in plan.names.sources(parameter))
    return (value.clone() if mapped else value).contiguous()


def _owner(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    owner, _, leaf = parameter.rpartition(".")
    return model.get_submodule(owner), leaf


def _put(model: nn.Module, parameter: str, value: torch.Tensor) -> None:
    owner, leaf = _owner(model, parameter)
    owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _staying(
    model: "PreTrainedModel",
    plan: Placement,
    tensors: DecodedTensors,
    wanted: Mapping[str, torch.dtype],
) -> Iterator[tuple[str, CodedTensor]]:
    """Parameters of blocks that are one coded tensor of the file, as it is."""
    ties = model.all_tied_weights_keys
    tied = {*ties.keys(), *ties.values()}
    lists = tuple(f"{name}." for name, item in model.named_modules()
                  if isinstance(item, nn.ModuleList))  # fmt: skip
    for parameter in plan.decoded:
        sources = plan.names.sources(parameter)
        if len(sources) != 1 or parameter in tied or not parameter.startswith(lists):
            continue
        stored, slot = tensors.stored(sources[0]), plan.names.slot(sources[0])
        whole = slot is not None and slot.quantizable and slot.expert is None and slot.rows is None
        owner, leaf = _owner(model, parameter)
        if stored is None or not whole or leaf not in owner._parameters:
            continue
        if stored.codec == "rans32" and stored.dtype == wanted[parameter]:
            found = tensors.coded(stored.name)
            assert isinstance(found, CodedTensor), f"{stored.name} is coded by another codec"
            yield parameter, found


def _hold_as_fle(
    model: "PreTrainedModel", parameter: str, value: torch.Tensor, resident: str
) -> bool:
    """Put a packed layer in the place of a linear one; False if this is none, or not of bf16."""
    from .formats.fle import to_fle

    owner, leaf = _owner(model, parameter)
    name, _, _ = parameter.rpartition(".")
    ties = model.all_tied_weights_keys
    if type(owner) is not nn.Linear or leaf != "weight" or value.dtype != torch.bfloat16:
        return False
    if owner.bias is not None:  # the library adds it before it rounds, a packed layer behind that
        return False
    if parameter in ties.keys() | set(ties.values()) or not name:
        return False
    packed = to_fle(value, int(resident[-1]))
    layer = QuantLinear.from_packed(packed, None, value.dtype)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    layer.place(value.device)
    return True


def keep(model: nn.Module, kept: Mapping[str, CodedTensor], device: torch.device) -> None:
    """Let the parameters of `kept` live coded on `device`; `model.coded_weights` is the handle.

    All that is not on the meta device is moved there first, but for stored parts of packed weights:
    kernels derive layouts from them there. (Not yet run on a GPU.) CheckpointError: no decoder there.
    """
    from .resident import keep_coded

    with stored_parts_stay():
        model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    model.requires_grad_(False)  # a graph would keep the blocks that it ran through
    coded: Mapping[str, Coded] = kept
    if device.type != "cpu":
        coded = {name: _on_device(tensor, device) for name, tensor in kept.items()}
    handle: Any = keep_coded(model, coded, device)
    model.coded_weights = handle


def _on_device(tensor: CodedTensor, device: torch.device) -> Coded:
    """The planes on a GPU, decoded there; CheckpointError if `device` is none."""
    if device.type != "cuda":
        raise CheckpointError(
            f"{tensor.name}: coded weights are decoded on a CPU or an NVIDIA GPU, got {device}; load "
            f"with resident='decoded'"
        )
    return _uploaded(tensor, device)


def _uploaded(tensor: CodedTensor, device: torch.device) -> Coded:
    """The planes on `device`, decoded by Triton there. (Not yet run on a GPU.)"""
    from ..kernels_triton.decode_rans32 import DeviceTensor, upload

    head = tensor.head
    streams = upload(tensor.group(), head.kind, head.layout(0, head.n_chunks), tensor.freq, device)
    return DeviceTensor(tensor.name, tensor.dtype, tensor.shape, streams)
