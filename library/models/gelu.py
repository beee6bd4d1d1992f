"""GELU by its tanh formula, and the same written with the sigmoid.

0.5 (1 + tanh(u)) = sigmoid(2 u). A GPU computes the sigmoid at the speed of memory, but not the tanh that a compiler
finds, so compiled blocks take the second form; uncompiled ones have torch's kernel of the first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# 2 u = x (LINEAR + CUBIC x^2)
LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR


def gelu(x: Tensor) -> Tensor:
    """`x` times its share, computed in float32."""
    wide = x.float()
    return (wide * torch.sigmoid(wide * (LINEAR + CUBIC * wide.square()))).to(x.dtype)


def slope(x: Tensor) -> Tensor:
    """The derivative of `gelu` at `x`, float32."""
    wide = x.float()
    share = torch.sigmoid(wide * (LINEAR + CUBIC * wide.square()))
    return share + wide * share * (1 - share) * (LINEAR + 3 * CUBIC * wide.square())


class GELU(nn.Module):
    """`nn.GELU(approximate="tanh")`."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x) if torch.compiler.is_compiling() else F.gelu(x, approximate="tanh")
