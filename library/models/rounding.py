"""Rounding to 8 bits with a scale for each row."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch import library as operators

from library.models.kernels import trusted

FP8 = torch.float8_e4m3fn
LARGEST = {FP8: 448.0, torch.int8: 127.0}
SMALLEST_SCALE = 2.0**-100  # of a row of zeros
_LEAST_CAPABILITY = (8, 9)  # of an NVIDIA GPU that has fp8
_CHECKED_ROWS = (80, 4112, 16400)  # numbers: rows that the kernel holds whole, and one that it reads twice


def round_rows(x: Tensor, dtype: torch.dtype, by_column: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`x` [T, n], times `by_column` [1, n], rounded to 8 bits, and the scales [T, 1] float32 to be multiplied with."""
    if dtype == FP8 and x.is_cuda:
        rounded: tuple[Tensor, Tensor] = torch.ops.polyrank.round_rows(x, by_column)
        return rounded
    return _by_formula(x, dtype, by_column)


def _by_formula(x: Tensor, dtype: torch.dtype, by_column: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = x.float()
    if by_column is not None:
        wide = wide * by_column
    scale = (wide.abs().amax(dim=1, keepdim=True) / LARGEST[dtype]).clamp(min=SMALLEST_SCALE)
    return to_8_bits(wide * scale.reciprocal(), dtype), scale


def to_8_bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` float32 within the range of `dtype`, up to the rounding of a division, in that dtype."""
    x = x.clamp(-LARGEST[dtype], LARGEST[dtype])
    return x.round().to(dtype) if dtype == torch.int8 else x.to(dtype)


def has_fp8(device: torch.device) -> bool:
    """Whether an NVIDIA GPU has it."""
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


@cache
def _kernel(device: torch.device) -> Any:
    """The kernel, or None where it cannot be trusted."""
    if not has_fp8(device):
        return None  # no fault to warn of: a product is refused there, and `base_compute = "auto"` takes int8

    def check(kernel: Any) -> list[tuple[Tensor, Tensor]]:
        pairs = []
        for columns in _CHECKED_ROWS:
            x = torch.linspace(-3, 5, 4 * columns, device=device).view(4, -1).to(torch.bfloat16)
            column = torch.linspace(0.5, 2, columns, device=device)[None]
            for weights in (None, column, column.bfloat16()):
                made = kernel.round_rows(x, weights, SMALLEST_SCALE)
                wanted = _by_formula(x, FP8, weights)
                pairs.append((made[0].float() * made[1], wanted[0].float() * wanted[1]))
        return pairs

    return trusted("library.models.rounding_kernel", check)


def _round_rows(x: Tensor, by_column: Tensor | None) -> tuple[Tensor, Tensor]:
    kernel = _kernel(x.device)
    if kernel is None:
        return _by_formula(x, FP8, by_column)
    rounded: tuple[Tensor, Tensor] = kernel.round_rows(x, by_column, SMALLEST_SCALE)
    return rounded


_operator = operators.custom_op(
    "polyrank::round_rows", _round_rows, mutates_args=(),
    schema="(Tensor x, Tensor? by_column) -> (Tensor, Tensor)",
)  # fmt: skip


@_operator.register_fake
def _(x: Tensor, by_column: Tensor | None) -> tuple[Tensor, Tensor]:
    del by_column
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[0], 1, dtype=torch.float32)
