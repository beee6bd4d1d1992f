"""The training objective as one value: draw a noisy input for given latents, judge a prediction for it.

A draw depends on (seed, visit) of each sample only, so any split of the data over ranks, batches and resumed
runs draws the same. Latents and numbers stay float32 here; whoever runs the model casts its inputs.

Shape letters: B samples, C latent channels, h w latent cells, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from library.config.sections.objective import ObjectiveConfig
from library.errors import ConfigError
from library.flow.loss import HUBER_SCHEDULES, ROBUST, loss_per_sample
from library.flow.noise import draw_noise, draw_normal, draw_uniform, on_device
from library.flow.path import PREDICTION_TYPES, interpolate, num_tokens, velocity
from library.flow.timesteps import NUM_TIMESTEPS, sample_sigmas, sampler
from library.randomness import Visit


@dataclass(frozen=True, slots=True)
class Draw:
    """One noisy input and what is expected of the model there. Replace `target` to train towards something
    else.
    """

    x_t: Tensor  # [B, C, h, w] float32, the model's input
    t: Tensor  # [B] float32 in [0, 1], the model's time; 1 is pure noise
    noise: Tensor  # [B, C, h, w] float32
    target: Tensor  # [B, C, h, w] float32

    @property
    def sigmas(self) -> Tensor:  # [B, 1, 1, 1]
        """The share of noise in x_t: `t`, shaped to multiply latents."""
        return rearrange(self.t, "b -> b 1 1 1")


@dataclass(frozen=True, slots=True)
class Objective:
    """Flow matching as the options describe it. A Huber loss with schedule snr is a `ConfigError`."""

    config: ObjectiveConfig

    def __post_init__(self) -> None:
        if self.config.loss_type in ROBUST and self.config.huber_schedule not in HUBER_SCHEDULES:
            raise ConfigError(
                f'huber_schedule = "{self.config.huber_schedule}" is not defined for FLUX; '
                f'with loss_type = "{self.config.loss_type}" use {" or ".join(HUBER_SCHEDULES)}'
            )

    def draw(self, latents: Tensor, visits: Sequence[Visit], *, seed: int) -> Draw:
        """Noise and noise level of a training step for latents [B, C, h, w], on their device."""
        noise = on_device(draw_noise(seed, visits, latents.shape[1:]), latents.device)
        draw_numbers = {"normal": draw_normal, "uniform": draw_uniform}[sampler(self.config).law]
        numbers = on_device(draw_numbers(seed, visits, purpose="timestep"), latents.device)
        sigmas = sample_sigmas(numbers, self.config, tokens=num_tokens(*latents.shape[-2:]))
        return self.at(latents, noise, sigmas, extra_noise=self._extra_noise(latents, visits, seed))

    def draw_fixed(
        self, latents: Tensor, visits: Sequence[Visit], *, seed: int, timesteps: Sequence[float]
    ) -> Draw:
        """The draw of a measurement: noise by (seed, visit), given `timesteps` (B numbers in 0..1000).

        Input perturbation (ip_noise_gamma) regularises training and is left out of it.
        """
        noise = on_device(draw_noise(seed, visits, latents.shape[1:]), latents.device)
        sigmas = torch.tensor(timesteps, dtype=torch.float32, device=latents.device) / NUM_TIMESTEPS
        return self.at(latents, noise, sigmas)

    def at(self, latents: Tensor, noise: Tensor, t: Tensor, *, extra_noise: Tensor | None = None) -> Draw:
        """The draw for given noise [B, C, h, w] and times [B] in [0, 1]; `extra_noise` disturbs the input
        only.
        """
        latents, noise, t = latents.float(), noise.float(), t.float()
        disturbed = noise if extra_noise is None else noise + extra_noise
        x_t = interpolate(latents, disturbed, rearrange(t, "b -> b 1 1 1"))
        return Draw(x_t=x_t, t=t, noise=noise, target=velocity(latents, noise))

    def estimate(self, prediction: Tensor, draw: Draw) -> Tensor:  # [B, C, h, w] -> [B, C, h, w]
        """What the target is compared with: the model's output under model_prediction_type, in float32."""
        return PREDICTION_TYPES[self.config.model_prediction_type](prediction.float(), draw.x_t, draw.sigmas)

    def loss(self, prediction: Tensor, draw: Draw, mask: Tensor | None = None) -> Tensor:  # -> [B]
        """Loss of each sample for the model's output [B, C, h, w]; `mask` [B, 1, H, W] weighs pixels in [0,
        1].
        """
        return loss_per_sample(
            self.estimate(prediction, draw), draw.target, sigmas=draw.sigmas, config=self.config, mask=mask
        )

    def _extra_noise(self, latents: Tensor, visits: Sequence[Visit], seed: int) -> Tensor | None:
        """Input perturbation: ip_noise_gamma of further noise, of random strength for each sample where
        asked.
        """
        gamma = self.config.ip_noise_gamma
        if not gamma:
            return None
        further = gamma * draw_noise(seed, visits, latents.shape[1:], purpose="ip_noise")
        if self.config.ip_noise_gamma_random_strength:
            strength = draw_uniform(seed, visits, purpose="ip_noise_strength")
            further = further * rearrange(strength, "b -> b 1 1 1")
        return on_device(further, latents.device)
