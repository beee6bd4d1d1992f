"""Which noise levels are trained: from one random number a sample to its noise share sigma.

Every function here is pure: it maps given standard normal or uniform numbers to sigma, so that reference
numbers can be fed in. sigma is in (0, 1], float32, and is at once the share of noise in the input, the time
given to the transformer, and a thousandth of what options call a timestep (0..1000). Unlike the reference it
is never rounded to the training precision, and min_timestep and max_timestep hold: the whole distribution is
squeezed into them.

Shape letter: B samples of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from library.config.sections.objective import ObjectiveConfig

NUM_TIMESTEPS = 1000  # options count the noise levels in thousandths

Density = Callable[[Tensor, ObjectiveConfig, int], Tensor]  # (numbers [B], options, tokens) -> sigma [B]


@dataclass(frozen=True, slots=True)
class Sampler:
    """A distribution of sigma: the law of its numbers ("normal" or "uniform"), and the map from them."""

    law: str
    density: Density


def shift_sigma(sigma: Tensor, factor: float) -> Tensor:
    """Move sigma in (0, 1) towards noise: `factor` 1 changes nothing, 3 maps 0.5 to 0.75."""
    return sigma * factor / (1 + (factor - 1) * sigma)


def resolution_mu(tokens: int) -> float:
    """FLUX's logarithmic shift for a picture of `tokens` transformer tokens: 0.5 at 256, 1.15 at 4096,
    linear.
    """
    return 0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256)


def _uniform(numbers: Tensor, _config: ObjectiveConfig, _tokens: int) -> Tensor:
    return numbers


def _sigmoid(numbers: Tensor, config: ObjectiveConfig, _tokens: int) -> Tensor:
    return torch.sigmoid(numbers * config.sigmoid_scale)


def _shift(numbers: Tensor, config: ObjectiveConfig, tokens: int) -> Tensor:
    return shift_sigma(_sigmoid(numbers, config, tokens), config.discrete_flow_shift)


def _flux_shift(numbers: Tensor, config: ObjectiveConfig, tokens: int) -> Tensor:
    return shift_sigma(_sigmoid(numbers, config, tokens), math.exp(resolution_mu(tokens)))


def _table_entry(position: Tensor, config: ObjectiveConfig) -> Tensor:
    """Entry floor(1000 * position) of the table of 1000 shifted sigmas, which falls from 1."""
    index = (position * NUM_TIMESTEPS).long().clamp(0, NUM_TIMESTEPS - 1)
    return shift_sigma((NUM_TIMESTEPS - index).float() / NUM_TIMESTEPS, config.discrete_flow_shift)


def _sigma_plain(numbers: Tensor, config: ObjectiveConfig, _tokens: int) -> Tensor:
    return _table_entry(numbers, config)


def _sigma_logit_normal(numbers: Tensor, config: ObjectiveConfig, _tokens: int) -> Tensor:
    return _table_entry(torch.sigmoid(config.logit_mean + config.logit_std * numbers), config)


def _sigma_mode(numbers: Tensor, config: ObjectiveConfig, _tokens: int) -> Tensor:
    bend = torch.cos(math.pi / 2 * numbers) ** 2 - 1 + numbers
    return _table_entry(1 - numbers - config.mode_scale * bend, config)


_SIGMA_PLAIN = Sampler("uniform", _sigma_plain)

# `timestep_sampling = "sigma"` takes its density from `weighting_scheme`; the other samplings ignore that
# option.
SIGMA_SAMPLERS: Mapping[str, Sampler] = {
    "logit_normal": Sampler("normal", _sigma_logit_normal),
    "mode": Sampler("uniform", _sigma_mode),
    "sigma_sqrt": _SIGMA_PLAIN,
    "cosmap": _SIGMA_PLAIN,
    "uniform": _SIGMA_PLAIN,
    "none": _SIGMA_PLAIN,
}

SAMPLERS: Mapping[str, Sampler] = {
    "uniform": Sampler("uniform", _uniform),
    "sigmoid": Sampler("normal", _sigmoid),
    "shift": Sampler("normal", _shift),
    "flux_shift": Sampler("normal", _flux_shift),
}


def sampler(config: ObjectiveConfig) -> Sampler:
    """The distribution that the options ask for."""
    if config.timestep_sampling == "sigma":
        return SIGMA_SAMPLERS[config.weighting_scheme]
    return SAMPLERS[config.timestep_sampling]


def sample_sigmas(numbers: Tensor, config: ObjectiveConfig, *, tokens: int) -> Tensor:  # [B] -> [B]
    """sigma in float32 from numbers of the sampler's law, for latents of `tokens` transformer tokens."""
    sigmas = sampler(config).density(numbers.float(), config, tokens)
    lowest = (config.min_timestep or 0) / NUM_TIMESTEPS
    highest = (NUM_TIMESTEPS if config.max_timestep is None else config.max_timestep) / NUM_TIMESTEPS
    if (lowest, highest) == (0.0, 1.0):
        return sigmas
    return lowest + (highest - lowest) * sigmas
