"""Frozen weights stored in 8 bits: float8_e4m3fn storage, arithmetic in the activations' dtype.

What `fp8_base` means: the 2-D weights of the transformer blocks' Linear layers take one byte a number and
are cast up for each multiplication, forward and backward. Biases, norms, embedders and the last layer keep
their dtype. The layers stay `nn.Linear` with their own `forward` on the instance, so plug-ins find and wrap
them as ever. There are no scales, as in Kohya's fp8 files; multiplying in fp8 is another matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STORAGE = torch.float8_e4m3fn
_LARGEST = 448.0  # of float8_e4m3fn; a larger number would become NaN

# Weights that may be stored in 8 bits: Linear layers inside the blocks of the transformer and of T5.
_BLOCK_WEIGHT = re.compile(
    r"((double|single)_blocks\.\d+\.(?!.*norm)|encoder\.block\.\d+\.(?!.*(norm|bias))).*\.weight$"
)


def is_block_weight(name: str) -> bool:
    """Whether the parameter `name` is the weight of a Linear layer inside a block."""
    return _BLOCK_WEIGHT.match(name) is not None


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`tensor` in `dtype` (None keeps it); saturated at +-448 when that is float8_e4m3fn."""
    if dtype is None or tensor.dtype == dtype:
        return tensor
    if dtype == STORAGE:
        return tensor.float().clamp(-_LARGEST, _LARGEST).to(dtype)
    return tensor.to(dtype)


def store_blocks_in_fp8(model: nn.Module) -> int:
    """Store the block weights of `model` in 8 bits, in place; returns how many layers that were.

    The weights are frozen by it. Layers that hold 8-bit weights already get the forward that multiplies
    with them.
    """
    number = 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and is_block_weight(f"{name}.weight"):
            layer.weight = nn.Parameter(cast(layer.weight.detach(), STORAGE), requires_grad=False)
            _set_forward(layer, _forward)
            number += 1
    for feed_forward in (m for m in model.modules() if type(m).__name__ == "T5DenseGatedActDense"):
        _set_forward(feed_forward, _gated_forward)
    return number


class _StoredLinear(torch.autograd.Function):
    """A product with a frozen 8-bit weight; for the backward pass it keeps that, not a wider copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (grad,) = grads
        (weight,) = ctx.saved_tensors
        needs_input, _, needs_bias = ctx.needs_input_grad
        return (
            grad @ weight.to(grad.dtype) if needs_input else None,
            None,
            grad.flatten(0, -2).sum(0).to(ctx.bias_dtype) if needs_bias else None,
        )


def _set_forward(module: nn.Module, function: Callable[..., Tensor]) -> None:
    """Give one module another forward; its class, which plug-ins look at, stays."""
    module.__dict__["forward"] = MethodType(function, module)


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    """Forward of a Linear layer with an 8-bit weight, in autocast's dtype if on, else in that of `x`."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    out: Tensor = _StoredLinear.apply(  # type: ignore[no-untyped-call]
        x.to(dtype), self.weight, self.bias
    )
    return out


def _gated_forward(self: Any, hidden: Tensor) -> Tensor:
    """T5's gated feed-forward without its cast of activations to the weight's dtype, here 8 bits."""
    out: Tensor = self.wo(self.dropout(self.act(self.wi_0(hidden)) * self.wi_1(hidden)))
    return out
