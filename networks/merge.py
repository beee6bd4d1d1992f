"""Merging any network into the base weights by measuring what it does.

A network that replaces the `forward` of Linear layers is, in evaluation, a linear map per layer: its weight
is what it gives for the unit vectors. Measuring needs nothing from the plug-in, so strength, alpha and
decompositions are those of training, whatever its own `merge_to` does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ROWS = 1024  # unit vectors at a time: bounds the memory of one layer's measurement


@torch.no_grad()
def effective_weight(linear: nn.Linear, device: torch.device) -> Tensor:
    """The weight [out, in] that `linear` with its adapters, which are on `device`, has: float32, there.

    The base weight is held in float32 and the bias at zero meanwhile, so that nothing is rounded.
    """
    weight, bias = linear.weight.data, None if linear.bias is None else linear.bias.data
    linear.weight.data = weight.to(device, torch.float32)
    if bias is not None:
        linear.bias.data = torch.zeros_like(bias, dtype=torch.float32, device=device)
    try:
        columns = []
        for start in range(0, linear.in_features, _ROWS):
            count = min(_ROWS, linear.in_features - start)
            units = torch.zeros(count, linear.in_features, device=device)
            units[torch.arange(count), start + torch.arange(count)] = 1
            columns.append(linear(units).float())
    finally:
        linear.weight.data = weight
        if bias is not None:
            linear.bias.data = bias
    return torch.cat(columns).T


@torch.no_grad()
def merge_measured(linear: nn.Linear, device: torch.device) -> None:
    """Write the effective weight into the layer, wherever that is, rounded to the weight's own dtype."""
    linear.weight.copy_(effective_weight(linear, device).to(linear.weight.dtype))
