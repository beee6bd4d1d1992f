"""Products of few rows with weights in 8 bits, in which only the weight is rounded.

What makes shifts, scales and gates sees one row a sample. Its rounding error hits every token alike and does not
average out, and the product is all reading of weights: so activations are left as they are, and a weight has one
scale for each output and each `GROUP` inputs, which rounds it by about 0.6 %.

Shape letters: B rows, G groups of inputs, the last of which may be shorter.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch import library as operators
from torch.nn import functional as F

from library.models.kernels import trusted
from library.models.rounding import LARGEST, SMALLEST_SCALE, to_8_bits

GROUP = 128  # inputs
_FEW = 32  # rows, as many as the kernel is tried with; more pay for a copy of the weight in their own dtype


def grouped(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [out, in] as int8, and its scales [G, out] float32."""
    inputs = weight.shape[1]
    groups = F.pad(weight.float(), (0, -inputs % GROUP)).view(weight.shape[0], -1, GROUP)
    scale = (groups.abs().amax(dim=2) / LARGEST[torch.int8]).clamp(min=SMALLEST_SCALE)
    rounded = to_8_bits(groups / scale[:, :, None], torch.int8).flatten(1)
    return rounded[:, :inputs].contiguous(), scale.T.contiguous()


def widened(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `grouped` gave, as one matrix [out, in] in `dtype`."""
    by_input = scale.T.repeat_interleave(GROUP, dim=1)[:, : weight.shape[1]]
    return (weight * by_input).to(dtype)


def multiply(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`x` [B, in] times what `grouped` gave, plus `bias` [out], in the dtype of `x`."""
    if x.is_cuda and x.shape[0] <= _FEW and x.dtype in (torch.bfloat16, torch.float16):
        kernel = _kernel(x.device)
        if kernel is not None:
            product: Tensor = kernel.few_rows(x, weight, scale, bias, GROUP)
            return product
    return F.linear(x, widened(weight, scale, x.dtype), bias)


@cache
def _kernel(device: torch.device) -> Any:
    """The kernel, or None where it cannot be trusted."""

    def check(kernel: Any) -> list[tuple[Tensor, Tensor]]:
        inputs, outputs = 3 * GROUP - 40, 100
        plain = torch.linspace(0, 300, inputs * outputs, device=device).sin().view(outputs, inputs)
        weight, scale = grouped(plain * torch.linspace(0.1, 2, inputs, device=device))
        pairs = []
        for rows in (1, 20):
            x = torch.linspace(-3, 5, rows * inputs, device=device).view(rows, -1).to(torch.bfloat16)
            wanted = x.float() @ widened(weight, scale, torch.float32).T
            pairs.append((kernel.few_rows(x, weight, scale, None, GROUP), wanted))
            bias = torch.linspace(-9, 9, outputs, device=device).to(torch.bfloat16)
            pairs.append((kernel.few_rows(x, weight, scale, bias, GROUP), wanted + bias))
        return pairs

    return trusted("library.models.few_rows_kernel", check)


_operator = operators.custom_op(
    "polyrank::few_rows", multiply, mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
)  # fmt: skip


@_operator.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    del scale, bias
    return x.new_empty(x.shape[0], weight.shape[0])
