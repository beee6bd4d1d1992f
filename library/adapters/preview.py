"""One sample image from the network as it stands: conditions, denoising, decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL.Image import Image
from torch import Tensor

from library.adapters.base import Conditions
from library.adapters.flux import FluxTrainModule
from library.adapters.sampling import initial_noise, sample_latents, schedule, to_image
from library.config.prompts import SamplePrompt
from library.models.autoencoder import AutoEncoder

DEFAULT_GUIDANCE = 3.5  # of a prompt without --g, as Kohya's sampler


class FluxPreviewer:
    """Draws one prompt. The autoencoder is on the device only while it decodes."""

    def __init__(
        self,
        *,
        module: FluxTrainModule,
        autoencoder: AutoEncoder,
        conditions: Callable[[str], Conditions],
        device: torch.device,
        shifted: bool,
    ) -> None:
        self._module, self._autoencoder, self._conditions = module, autoencoder, conditions
        self._device, self._shifted = device, shifted

    @torch.no_grad()
    def __call__(self, prompt: SamplePrompt) -> Image:
        """Draw `prompt` with every dropout off."""
        was_training = self._module.training
        self._module.eval()
        height, width = prompt.height // 8, prompt.width // 8
        latents = sample_latents(
            self._velocity(prompt),
            initial_noise((1, 16, height, width), seed=prompt.seed).to(self._device),
            schedule(prompt.sample_steps, tokens=height * width // 4, shift=self._shifted),
        )
        self._module.train(was_training)
        return to_image(self._decode(latents)[0])

    def _decode(self, latents: Tensor) -> Tensor:
        weight = next(self._autoencoder.parameters())
        home, dtype = weight.device, weight.dtype
        self._autoencoder.to(self._device)
        images = self._autoencoder.decode(latents.to(dtype))
        self._autoencoder.to(home)
        return images

    def _velocity(self, prompt: SamplePrompt) -> Callable[[Tensor, float], Tensor]:
        guidance = DEFAULT_GUIDANCE if prompt.guidance_scale is None else prompt.guidance_scale
        positive = self._conditions(prompt.prompt)
        negative = self._conditions(prompt.negative_prompt or "")

        def velocity(x: Tensor, t: float) -> Tensor:
            times = torch.full((len(x),), t, device=x.device)
            wanted: Tensor = self._module(x, times, positive, guidance)
            if prompt.scale == 1.0:
                return wanted
            unwanted: Tensor = self._module(x, times, negative, guidance)
            return unwanted + prompt.scale * (wanted - unwanted)

        return velocity
