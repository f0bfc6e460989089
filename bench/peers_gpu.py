"""What fewbit's linear kernels are timed beside: torch's own products, and other packages.

    torch         bf16 (cuBLAS); `_int_mm` on codes that are there already, alone and with the scales
                  applied after it; `_scaled_mm` on fp8 that is there already
    gemlite       4 bits in groups of 128; 8 bits with inputs rounded to int8
    torchao       int4 in groups of 128 and int8, weights only
    bitsandbytes  nf4; int8 (without its outlier path)

Every side takes the dense bf16 weight [N, K] and answers with a function of x bf16 [M, K]. Packages are
optional: one that is missing, or whose interface is another one by now, is recorded in words and the
bench goes on. They are built by their own public functions, with their own defaults.

Deliberately not here: how well they round, and their tuning modes. Not yet run on a GPU.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Product = Callable[[torch.Tensor], torch.Tensor]

# What building or calling a package of another version raises.
PEER_ERRORS = (
    ImportError, AttributeError, TypeError, ValueError, KeyError, AssertionError, RuntimeError,
    NotImplementedError,
)  # fmt: skip
_GROUP = 128
_LEAST_INT_MM_ROWS = 17  # cuBLASLt's, as torch states it
_FP8_SINCE = (8, 9)


@dataclass(frozen=True)
class Peer:
    """One side. name: in tables. package: its distribution, "torch" for torch's own. bits: of a
    weight as it is read. kind: whose peak limits it. build: see the module's text. least_m, step:
    rows that it needs, and what N and K must be multiples of. since: oldest capability."""

    name: str
    package: str
    bits: int
    kind: str
    build: Callable[[torch.Tensor], Product]
    least_m: int = 1
    step: int = 1
    since: tuple[int, int] = (8, 0)

    def weight_bytes(self, n: int, k: int) -> int:
        """Bytes of the codes, for the number of copies and the limit."""
        return n * k * self.bits // 8

    def refusal(self, m: int, n: int, k: int, capability: tuple[int, int]) -> str | None:
        """Why it cannot take this product, in words; None if it can."""
        if installed(self.package) is None:
            return f"not installed ({self.package})"
        if capability < self.since:
            return f"needs compute capability {self.since[0]}.{self.since[1]}"
        if m < self.least_m:
            return f"needs {self.least_m} rows"
        if n % self.step or k % self.step:
            return f"needs N and K to be multiples of {self.step}"
        return None


def installed(package: str) -> str | None:
    """Its version; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Version of every package of `PEERS`, or "not installed"."""
    packages = dict.fromkeys(peer.package for peer in PEERS)
    return {package: installed(package) or "not installed" for package in packages}


# ---- torch ----------------------------------------------------------------------------------


def row_codes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 codes, fp32 scales [rows, 1]) of rows of a matrix."""
    scale = values.float().abs().amax(1, keepdim=True).clamp_(min=1e-10) / 127
    return torch.round(values.float() / scale).to(torch.int8), scale


class _Held:
    """Remembers what it derived from the newest x, so that graphs hold only the product."""

    def __init__(self, derive: Callable[[torch.Tensor], Any]) -> None:
        self._derive = derive
        self._x: torch.Tensor | None = None
        self._derived: Any = None

    def __call__(self, x: torch.Tensor) -> Any:
        if self._x is not x:
            self._x, self._derived = x, self._derive(x)
        return self._derived


def _bf16(weight: torch.Tensor) -> Product:
    return lambda x: functional.linear(x, weight)


def _int_mm(weight: torch.Tensor) -> Product:
    codes, _ = row_codes(weight)
    rounded = _Held(row_codes)
    return lambda x: torch._int_mm(rounded(x)[0], codes.T)


def _int_mm_scaled(weight: torch.Tensor) -> Product:
    codes, scale = row_codes(weight)
    columns, rounded = scale.view(1, -1), _Held(row_codes)

    def product(x: torch.Tensor) -> torch.Tensor:
        inputs, rows = rounded(x)
        return (torch._int_mm(inputs, codes.T) * columns * rows).to(x.dtype)

    return product


def _scaled_mm(weight: torch.Tensor) -> Product:
    codes = weight.to(torch.float8_e4m3fn)
    one = torch.ones((), device=weight.device)
    rounded = _Held(lambda x: x.to(torch.float8_e4m3fn))

    def product(x: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(
            rounded(x), codes.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        )

    return product


# ---- packages -------------------------------------------------------------------------------


def _dense(weight: torch.Tensor) -> nn.Linear:
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def group_codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(uint8 codes [N, K], scales and zeros [N, K / 128] in bf16): w = (code − zero) · scale."""
    groups = weight.float().unflatten(1, (-1, _GROUP))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = ((high - low) / 15).clamp_(min=1e-10)
    zero = torch.round(-low / scale)
    codes = torch.round(groups / scale + zero).clamp_(0, 15).to(torch.uint8).flatten(1)
    return codes, scale.squeeze(2).to(weight.dtype), zero.squeeze(2).to(weight.dtype)


def _gemlite_4(weight: torch.Tensor) -> Product:
    helper = importlib.import_module("gemlite.helper")
    layer = helper.A16W4_HQQ_INT(device=str(weight.device), dtype=weight.dtype)
    product: Product = layer.from_weights(*group_codes(weight))
    return product


def _gemlite_8(weight: torch.Tensor) -> Product:
    helper = importlib.import_module("gemlite.helper")
    layer = helper.A8W8_INT8_dynamic(device=str(weight.device), dtype=weight.dtype)
    product: Product = layer.from_weights(weight)
    return product


def _torchao(weight: torch.Tensor, name: str, **options: Any) -> Product:
    quantization = importlib.import_module("torchao.quantization")
    holder = nn.Sequential(_dense(weight))
    quantization.quantize_(holder, getattr(quantization, name)(**options))
    return holder


def _torchao_4(weight: torch.Tensor) -> Product:
    # The layout that needs no further package.
    packing = {"int4_packing_format": "tile_packed_to_4d"}
    return _torchao(weight, "Int4WeightOnlyConfig", group_size=_GROUP, **packing)


def _torchao_8(weight: torch.Tensor) -> Product:
    return _torchao(weight, "Int8WeightOnlyConfig")


def _bitsandbytes_4(weight: torch.Tensor) -> Product:
    package = importlib.import_module("bitsandbytes")
    n, k = weight.shape
    layer = package.nn.Linear4bit(
        k, n, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    layer.weight = package.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    product: Product = layer.to(weight.device)
    return product


def _bitsandbytes_8(weight: torch.Tensor) -> Product:
    package = importlib.import_module("bitsandbytes")
    n, k = weight.shape
    layer = package.nn.Linear8bitLt(
        k, n, bias=False, has_fp16_weights=False, threshold=0.0, device="meta"
    )
    layer.weight = package.nn.Int8Params(
        weight.cpu().half(), requires_grad=False, has_fp16_weights=False
    )
    moved = layer.to(weight.device)
    return lambda x: moved(x)


PEERS = (
    Peer("cublas bf16", "torch", 16, "bf16", _bf16),
    Peer("_int_mm", "torch", 8, "int8", _int_mm, _LEAST_INT_MM_ROWS, 8),
    Peer("_int_mm + scales", "torch", 8, "int8", _int_mm_scaled, _LEAST_INT_MM_ROWS, 8),
    Peer("_scaled_mm fp8", "torch", 8, "fp8", _scaled_mm, 1, 16, _FP8_SINCE),
    Peer("gemlite w4", "gemlite", 4, "bf16", _gemlite_4, 1, _GROUP),
    Peer("gemlite w8a8", "gemlite", 8, "int8", _gemlite_8),
    Peer("torchao int4", "torchao", 4, "bf16", _torchao_4, 1, _GROUP),
    Peer("torchao int8", "torchao", 8, "bf16", _torchao_8),
    Peer("bitsandbytes nf4", "bitsandbytes", 4, "bf16", _bitsandbytes_4),
    Peer("bitsandbytes int8", "bitsandbytes", 8, "int8", _bitsandbytes_8),
)
BASELINE = PEERS[0].name
