"""One sample image from the network as it stands: conditions, denoising, decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL.Image import Image
from torch import Tensor

from library.adapters.base import Conditions
from library.adapters.flux import FluxTrainModule
from library.adapters.sampling import initial_noise, sample_latents, schedule_for, to_image
from library.config.prompts import SamplePrompt
from library.data.records import TextCond
from library.models.autoencoder import AutoEncoder


class FluxPreviewer:
    """Draws one prompt. The autoencoder is on the device only while it decodes."""

    def __init__(
        self,
        *,
        module: FluxTrainModule,
        autoencoder: AutoEncoder,
        conditions: Callable[[str], TextCond],
        device: torch.device,
        shifted: bool,
        seed: int,
    ) -> None:
        self._module, self._autoencoder, self._conditions = module, autoencoder, conditions
        self._device, self._shifted, self._seed = device, shifted, seed

    @torch.no_grad()
    def __call__(self, prompt: SamplePrompt) -> Image:
        """Draw `prompt` with every dropout off."""
        self._module.eval()
        guided = prompt.scale != 1
        latents = sample_latents(
            self._velocity,
            noise=initial_noise(prompt, run_seed=self._seed).to(self._device),
            times=schedule_for(prompt, shift=self._shifted),
            text=self._conditions(prompt.prompt),
            negative=self._conditions(prompt.negative_prompt) if guided else None,
            scale=prompt.scale,
            guidance=prompt.guidance_scale,
        )
        self._module.train()
        return to_image(self._decode(latents))

    def _velocity(self, x: Tensor, t: Tensor, guidance: Tensor, text: TextCond) -> Tensor:
        strength = guidance if self._module.transformer.params.guidance_embed else None
        velocity: Tensor = self._module(x, t, Conditions(text=text, tokens=None), strength)
        return velocity.float()

    def _decode(self, latents: Tensor) -> Tensor:
        weight = next(self._autoencoder.parameters())
        home, dtype = weight.device, weight.dtype
        self._autoencoder.to(self._device)
        images = self._autoencoder.decode(latents.to(dtype))
        self._autoencoder.to(home)
        return images
