"""Rotary position embedding of FLUX.1: positions of three axes to rotations of query and key pairs.

The angles are made in float64 and their cosines and sines kept in float32, once per forward pass; the
rotation itself works on adjacent pairs in float32. After Su et al. 2021 (RoFormer), in the form of Black
Forest Labs' flux.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines of every token's angles, [B, 1, L, head_dim / 2] float32; the 1 is for the heads."""

    cos: Tensor
    sin: Tensor


def rotations(ids: Tensor, axes: Sequence[int], theta: float) -> Rotation:
    """Rotations for positions `ids` [B, L, len(axes)]; the even widths `axes` add up to the head's."""
    angles = []
    for axis, width in enumerate(axes):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=ids.device) / width
        angles.append(ids[..., axis].to(torch.float64).unsqueeze(-1) * theta**-exponents)
    joined = torch.cat(angles, dim=-1).unsqueeze(1)
    return Rotation(joined.cos().float(), joined.sin().float())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate adjacent pairs of `x` [B, heads, L, head_dim] in float32; the result has the dtype of `x`."""
    first, second = rearrange(x.float(), "b h l (d pair) -> pair b h l d", pair=2).unbind(0)
    cos, sin = rotation
    turned = torch.stack((cos * first - sin * second, sin * first + cos * second), dim=-1)
    return turned.flatten(-2).to(x.dtype)
