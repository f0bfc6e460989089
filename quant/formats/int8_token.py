"""`int8_token`: inputs as 8-bit integers, one scale for each token, found when the token arrives.

    amax  = max(max_k |x[m, k]|, 2^-100)         all in fp32, each operation rounded to nearest even
    scale = amax / 127
    code  = round(x · (127 / amax))              −127 … 127; −128 is not used
    x̂     = code · scale

The largest code is 127 without a clamp: |x| · (127 / amax) is at most 127·(1 + 2^-23).
A row of zeros gets codes 0 and a small finite scale, so its products are exactly zero; rows whose
largest value is below 2^-108 round to that as well (2^-100: nothing overflows in 127 / amax).
A row with NaN or Inf gets a scale that is not finite, and finite results for none of its outputs.

This module does not decide where inputs are rounded, nor does it store anything.
"""

import torch

from ..activation import RoundedRows
from ..errors import FormatError

_TINY = 2.0**-100
_BLOCK = 1 << 20  # values rounded at once: two temporaries of 4 MB


class Int8Token:
    """The activation format object; see the module's text."""

    name = "int8_token"

    def round(self, x: torch.Tensor) -> RoundedRows:
        """Codes int8 and scales fp32 [..., 1] of x [..., K], of any floating dtype."""
        if not x.is_floating_point():
            raise FormatError(
                f"int8_token rounds floating inputs, got {x.dtype}; cast them to the model's dtype"
            )
        step = max(1, _BLOCK // max(1, x.shape[-1]))
        if x.numel() <= _BLOCK:
            return RoundedRows(*_round(x))
        rows = x.reshape(-1, x.shape[-1])
        codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
        scale = torch.empty(rows.shape[0], 1, dtype=torch.float32, device=x.device)
        for start in range(0, rows.shape[0], step):
            block = slice(start, start + step)
            codes[block], scale[block] = _round(rows[block])
        return RoundedRows(codes.view(x.shape), scale.view(*x.shape[:-1], 1))


def _round(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = x.detach().float()
    amax = values.abs().amax(-1, keepdim=True).clamp_(min=_TINY)
    # Tensors on both sides: with a Python number torch multiplies by a reciprocal, which rounds twice
    # (number / tensor everywhere, tensor / number on GPUs).
    top = torch.full_like(amax, 127)
    codes = torch.mul(values, top / amax).round_()
    return codes.to(torch.int8, memory_format=torch.contiguous_format), amax.div_(top)


ACTIVATION = Int8Token()
