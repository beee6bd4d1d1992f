"""Sample pictures: FLUX's time schedule, the Euler loop, and the picture that comes out.

The loop takes the model as a callable, so it knows no module, device placement or precision. Noise is drawn as
ComfyUI draws it and diffusers with a CPU generator: a seed starts from the same noise here, there, and on every
machine (Kohya draws on the device). Encoding prompts and decoding latents is the caller's.

Shape letters: B samples (1, or 2 under classifier-free guidance), h w latent cells, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from library.config.prompts import SamplePrompt
from library.data.records import TextCond
from library.flow.path import num_tokens
from library.flow.timesteps import resolution_mu
from library.randomness import integer

LATENT_CHANNELS = 16
CELL = 8  # pixels along each side of a latent cell

# (latents [B,16,h,w], t [B] in [0, 1], guidance [B], text of B samples) -> velocity [B,16,h,w]
Velocity = Callable[[Tensor, Tensor, Tensor, TextCond], Tensor]


def schedule(steps: int, *, tokens: int, shift: bool = True) -> tuple[float, ...]:
    """`steps` + 1 times from 1 (noise) to 0; with `shift` more lie near noise, the more `tokens` the more.

    FLUX.1 dev is sampled with the shift, schnell without.
    """
    times = [1 - step / steps for step in range(steps + 1)]
    if not shift:
        return tuple(times)
    stretch = math.exp(resolution_mu(tokens))
    return tuple(stretch / (stretch + 1 / time - 1) if time > 0 else 0.0 for time in times)


def schedule_for(prompt: SamplePrompt, *, shift: bool = True) -> tuple[float, ...]:
    """The times of one prompt's steps at its size."""
    tokens = num_tokens(prompt.height // CELL, prompt.width // CELL)
    return schedule(prompt.sample_steps, tokens=tokens, shift=shift)


def initial_noise(prompt: SamplePrompt, *, run_seed: int) -> Tensor:  # [1, 16, h, w] float32, on the CPU
    """The noise a prompt's picture starts from, by its seed."""
    generator = torch.Generator(device="cpu").manual_seed(seed_of(prompt, run_seed=run_seed))
    return torch.randn(1, LATENT_CHANNELS, prompt.height // CELL, prompt.width // CELL, generator=generator)


def seed_of(prompt: SamplePrompt, *, run_seed: int) -> int:
    """The seed of a prompt's picture.

    A prompt without one gets one made of `run_seed` and its index: the same picture at every checkpoint, so that
    what changes is the training. It has 32 bits, since not every program that shows it can hold more.
    """
    return integer(run_seed, "sample", prompt.index, bits=32) if prompt.seed is None else prompt.seed


@torch.no_grad()
def sample_latents(
    predict: Velocity,
    *,
    noise: Tensor,
    times: Sequence[float],
    text: TextCond,
    negative: TextCond | None,
    scale: float,
    guidance: float,
) -> Tensor:  # [1, 16, h, w] -> [1, 16, h, w]
    """Follow the velocity from `noise` through `times` down to 0.

    With `negative` and a `scale` other than 1, classifier-free guidance: both texts in one batch, negative
    first. `guidance` is the strength given to a guidance-distilled model. Runs in the dtype and on the device
    of `noise`.
    """
    latents = noise
    guided = negative is not None and scale != 1
    condition = _join(negative, text) if guided and negative is not None else text
    batch = 2 if guided else 1
    strength = torch.full((batch,), guidance, dtype=noise.dtype, device=noise.device)
    for now, after in pairwise(times):
        t = torch.full((batch,), now, dtype=noise.dtype, device=noise.device)
        velocity = predict(latents.expand(batch, -1, -1, -1), t, strength, condition)
        if guided:
            unwanted, wanted = velocity.chunk(2)
            velocity = unwanted + scale * (wanted - unwanted)
        latents = latents + (after - now) * velocity
    return latents


def _join(first: TextCond, second: TextCond) -> TextCond:
    return TextCond(
        clip_pooled=torch.cat((first.clip_pooled, second.clip_pooled)),
        t5_hidden=torch.cat((first.t5_hidden, second.t5_hidden)),
        t5_mask=torch.cat((first.t5_mask, second.t5_mask)),
    )


def to_image(decoded: Tensor) -> Image.Image:  # [1, 3, H, W] or [3, H, W] in [-1, 1]
    """The decoder's output as an 8-bit picture; what is out of range is clipped, fractions are cut off."""
    pixels = decoded.squeeze(0) if decoded.dim() == 4 else decoded
    scaled = (pixels.float().clamp(-1, 1) + 1) * 127.5
    array = rearrange(scaled, "c h w -> h w c").cpu().numpy().astype(np.uint8)
    return Image.fromarray(array)
