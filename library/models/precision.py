"""Frozen weights stored in 8 bits: float8_e4m3fn storage, arithmetic in the activations' dtype.

What `fp8_base` means: the 2-D weights of the transformer blocks' Linear layers take one byte a number and
are cast up for each multiplication, forward and backward. Biases, norms, embedders and the last layer keep
their dtype. There are no scales, as in Kohya's fp8 files. How such weights are multiplied, and how weights
with scales are, is `library.models.frozen`.
"""

from __future__ import annotations

import re
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from library.models import frozen

STORAGE = frozen.NARROW
_LARGEST = 448.0  # of float8_e4m3fn; a larger number would become NaN

# Weights that may be stored in 8 bits: Linear layers inside the blocks of the transformer and of T5.
_BLOCK_WEIGHT = re.compile(
    r"((double|single)_blocks\.\d+\.(?!.*norm)|encoder\.block\.\d+\.(?!.*(norm|bias))).*\.weight$"
)
# Of them, those that see one row a sample.
_MODULATION_WEIGHT = re.compile(r"(double|single)_blocks\.\d+\.(img_mod|txt_mod|modulation)\.lin\.weight$")


def is_block_weight(name: str) -> bool:
    """Whether the parameter `name` is the weight of a Linear layer inside a block."""
    return _BLOCK_WEIGHT.match(name) is not None


def is_modulation_weight(name: str) -> bool:
    """Whether the parameter `name` makes a block's shifts, scales and gates of the conditioning vector."""
    return _MODULATION_WEIGHT.match(name) is not None


def block_weights(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linear layers whose weights `is_block_weight` names, by that name."""
    linears = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: linear for name, linear in linears.items() if is_block_weight(name)}


def block_linears(model: nn.Module) -> list[nn.Linear]:
    """The Linear layers whose weights `is_block_weight` names."""
    return list(block_weights(model).values())


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
    layers = block_linears(model)
    for layer in layers:
        layer.weight = nn.Parameter(cast(layer.weight.detach(), STORAGE), requires_grad=False)
        frozen.install(layer)
    for feed_forward in (m for m in model.modules() if type(m).__name__ == "T5DenseGatedActDense"):
        feed_forward.__dict__["forward"] = MethodType(_gated_forward, feed_forward)
    return len(layers)


def _gated_forward(self: Any, hidden: Tensor) -> Tensor:
    """T5's gated feed-forward without its cast of activations to the weight's dtype, here 8 bits."""
    out: Tensor = self.wo(self.dropout(self.act(self.wi_0(hidden)) * self.wi_1(hidden)))
    return out
