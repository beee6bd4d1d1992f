"""The straight path between a picture's latents and noise, what the model is asked for, and token packing.

sigma runs from 0 (the picture) to 1 (noise); x_t = (1 - sigma) x + sigma noise, and the target is the path's
velocity noise - x. Packing and position ids are those of FLUX: a token is a 2 x 2 patch of latent cells,
channels first.

Shape letters: B samples, C latent channels (16), h w latent cells, N = h/2 * w/2 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from einops import rearrange, repeat
from torch import Tensor

PATCH = 2  # latent cells along each side of a token


def interpolate(
    latents: Tensor, noise: Tensor, sigmas: Tensor
) -> Tensor:  # [B,C,h,w] x2, [B,1,1,1] -> [B,C,h,w]
    """The point of the path at `sigmas`."""
    return (1 - sigmas) * latents + sigmas * noise


def velocity(latents: Tensor, noise: Tensor) -> Tensor:  # [B,C,h,w] x2 -> [B,C,h,w]
    """The path's direction, which every prediction type is trained towards."""
    return noise - latents


def _raw(prediction: Tensor, _x_t: Tensor, _sigmas: Tensor) -> Tensor:
    return prediction


def _additive(prediction: Tensor, x_t: Tensor, _sigmas: Tensor) -> Tensor:
    return prediction + x_t


def _sigma_scaled(prediction: Tensor, x_t: Tensor, sigmas: Tensor) -> Tensor:
    return prediction * -sigmas + x_t


# model_prediction_type -> (model output [B,C,h,w], x_t [B,C,h,w], sigmas [B,1,1,1]) -> what the target is
# compared with
PREDICTION_TYPES: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "raw": _raw,
    "additive": _additive,
    "sigma_scaled": _sigma_scaled,
}


def num_tokens(height: int, width: int) -> int:
    """Transformer tokens of latents of `height` x `width` cells."""
    return (height // PATCH) * (width // PATCH)


def pack(latents: Tensor) -> Tensor:  # [B, C, h, w] -> [B, N, 4C]
    """Latents as the transformer's image tokens, row by row."""
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=PATCH, pw=PATCH)


def unpack(tokens: Tensor, *, height: int, width: int) -> Tensor:  # [B, N, 4C] -> [B, C, h, w]
    """The inverse of `pack` for latents of `height` x `width` cells."""
    return rearrange(tokens, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=height // PATCH, ph=PATCH, pw=PATCH)


def image_ids(
    batch: int, *, height: int, width: int, device: torch.device | None = None
) -> Tensor:  # [B, N, 3] float32
    """Positions (0, row, column) of the tokens of latents of `height` x `width` cells."""
    rows, columns = height // PATCH, width // PATCH
    row = repeat(torch.arange(rows, dtype=torch.float32, device=device), "h -> h w", w=columns)
    column = repeat(torch.arange(columns, dtype=torch.float32, device=device), "w -> h w", h=rows)
    grid = torch.stack((torch.zeros_like(row), row, column), dim=-1)
    return repeat(grid, "h w axes -> b (h w) axes", b=batch)
