"""q, k and v in 8 bits: float8 e4m3, with a scale for every row and head.

Shapes: B rows, H heads, T time, D head.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "float8_e4m3"  # what a capture's configuration and the command line call it
DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
SUFFIX = "_scale"  # of the name of a tensor's scales in a file


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, H, T, D] in float8, and the scales [B, H] in fp32 by which `dequantize` multiplies it."""
    scale = (x.float().abs().amax((2, 3)) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scale[..., None, None]).to(DTYPE), scale


def dequantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor that `quantize` got, up to rounding: [B, H, T, D] in `dtype`."""
    return (x.float() * scale[..., None, None]).to(dtype)
