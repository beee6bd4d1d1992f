"""One sample image from the network as it stands: conditions, denoising, decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    """Draws one prompt in two parts. Whatever happens in either, training finds everything as it was."""

    def __init__(
        self,
        *,
        module: FluxTrainModule,
        autoencoder: AutoEncoder,
        conditions: Callable[[str], TextCond],
        set_strength: Callable[[float], None],
        device: torch.device,
        shifted: bool,
        seed: int,
    ) -> None:
        self._module, self._autoencoder, self._conditions = module, autoencoder, conditions
        self._set_strength, self._device, self._shifted, self._seed = set_strength, device, shifted, seed

    @torch.no_grad()
    def latents(self, prompt: SamplePrompt) -> Tensor:  # [1, 16, h, w]
        """Denoise `prompt` with every dropout off and the network at the prompt's strength."""
        with self._drawing(prompt.strength):
            return sample_latents(
                self._velocity,
                noise=initial_noise(prompt, run_seed=self._seed).to(self._device),
                times=schedule_for(prompt, shift=self._shifted),
                text=self._conditions(prompt.prompt),
                negative=self._conditions(prompt.negative_prompt) if prompt.is_guided else None,
                scale=prompt.scale,
                guidance=prompt.guidance_scale,
            )

    @torch.no_grad()
    def picture(self, latents: Tensor) -> Image:
        """Decode. The autoencoder is on the device only meanwhile."""
        weight = next(self._autoencoder.parameters())
        home, dtype = weight.device, weight.dtype
        try:
            self._autoencoder.to(self._device)
            return to_image(self._autoencoder.decode(latents.to(dtype)))
        finally:
            self._autoencoder.to(home)

    @contextmanager
    def _drawing(self, strength: float) -> Iterator[None]:
        self._module.eval()
        try:
            if strength != 1:
                self._set_strength(strength)
            yield
        finally:
            if strength != 1:
                self._set_strength(1.0)
            self._module.train()

    def _velocity(self, x: Tensor, t: Tensor, guidance: Tensor, text: TextCond) -> Tensor:
        strength = guidance if self._module.transformer.params.guidance_embed else None
        velocity: Tensor = self._module(x, t, Conditions(text=text, tokens=None), strength)
        return velocity.float()
