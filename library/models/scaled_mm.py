"""Products of two matrices in 8 bits, with a scale for each row of the first and each column of the second."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

_INT_MM_ROWS = 32  # cuBLAS multiplies int8 from 17 rows on


def multiply(
    x: Tensor, by_row: Tensor, second: Tensor, by_column: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`x` [T, k] times `second` [k, n], both 8 bits, with scales [T, 1] and [1, n], plus a bias [n].

    The result is bfloat16 or float32. Products add up in float32 (fp8) or int32. Without a GPU fp8 is multiplied as
    float32: the same numbers up to the order of the sum.
    """
    if x.dtype != torch.int8 and x.is_cuda:
        return torch._scaled_mm(
            x, second, scale_a=by_row, out_dtype=torch.bfloat16, use_fast_accum=True,
            scale_b=_ones(second.shape[1], x.device) if by_column is None else by_column,
            bias=None if bias is None else bias.to(torch.bfloat16),
        )  # fmt: skip
    if x.dtype == torch.int8:
        rows = x.shape[0]
        if x.is_cuda and rows < _INT_MM_ROWS:
            x = F.pad(x, (0, 0, 0, _INT_MM_ROWS - rows))
        out = torch._int_mm(x, second)[:rows] * by_row
    else:
        out = (x.float() @ second.float()) * by_row
    if by_column is not None:
        out = out * by_column
    return out if bias is None else out + bias


def _ones(columns: int, device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ones(1, columns, device=device)
    return _kept_ones(columns, device)


@cache
def _kept_ones(columns: int, device: torch.device) -> Tensor:
    return torch.ones(1, columns, device=device)


@cache
def skips_gaps(device: torch.device) -> bool:
    """Whether products of fp8 there take rows that lie apart as if they did not, as some cards' kernels do."""
    numbers = torch.arange(256 * 128, device=device).sin().view(256, 128).to(torch.float8_e4m3fn)
    first, second = numbers[:, :96], numbers[:64, :96]
    apart, together = (
        multiply(one, torch.ones(256, 1, device=device), other.t(), None, None)
        for one, other in ((first, second), (first.contiguous(), second.contiguous()))
    )
    return not bool((apart - together).abs().max() < 0.02 * together.abs().max())
