"""Pictures to latents: for caches, and in a training step whose latents are not cached."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from library.flow.noise import on_device
from library.models.autoencoder import AutoEncoder


def image_encoder(
    autoencoder: AutoEncoder, device: torch.device
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Images [B, 3, H, W] and posterior noise [B, 16, h, w] to scaled latents [B, 16, h, w] float32."""
    autoencoder.to(device)
    dtype = next(autoencoder.parameters()).dtype

    @torch.no_grad()
    def encode(images: Tensor, noise: Tensor | None) -> Tensor:
        drawn = None if noise is None else on_device(noise, device).to(dtype)
        return autoencoder.encode(on_device(images, device).to(dtype), drawn).float()

    return encode
