"""From an estimate and its target to one loss a sample: distance, weighting by noise level, mask, mean.

What is left out on purpose: loss weights of regularisation images and the mean over the batch belong to the
trainer, which knows each sample's share of the optimizer step. A mask multiplies the loss and the mean is
still over every element, as in Kohya, so a small mask means a small gradient.

Shape letters: B samples, C latent channels, h w latent cells, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from einops import reduce
from torch import Tensor
from torch.nn import functional

from library.config.sections.objective import ObjectiveConfig


def _l2(difference: Tensor, _threshold: Tensor) -> Tensor:
    return difference.square()


def _l1(difference: Tensor, _threshold: Tensor) -> Tensor:
    return difference.abs()


def _huber(difference: Tensor, threshold: Tensor) -> Tensor:
    return 2 * threshold * ((difference.square() + threshold.square()).sqrt() - threshold)


def _smooth_l1(difference: Tensor, threshold: Tensor) -> Tensor:
    return 2 * ((difference.square() + threshold.square()).sqrt() - threshold)


# loss_type -> (difference [B,C,h,w], threshold c [B,1,1,1]) -> [B,C,h,w]; pseudo-Huber forms, smooth at zero
DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": _l2,
    "l1": _l1,
    "huber": _huber,
    "smooth_l1": _smooth_l1,
}
ROBUST = ("huber", "smooth_l1")  # the distances that have a threshold


def _constant(sigmas: Tensor, config: ObjectiveConfig) -> Tensor:
    return torch.full_like(sigmas, config.huber_c * config.huber_scale)


def _exponential(sigmas: Tensor, config: ObjectiveConfig) -> Tensor:
    return torch.exp(math.log(config.huber_c) * sigmas) * config.huber_scale


# huber_schedule -> (sigmas, options) -> threshold c. Kohya's third, "snr", is defined for other model
# families only.
HUBER_SCHEDULES: Mapping[str, Callable[[Tensor, ObjectiveConfig], Tensor]] = {
    "constant": _constant,
    "exponential": _exponential,
}


def _sigma_sqrt(sigmas: Tensor) -> Tensor:
    return sigmas**-2


def _cosmap(sigmas: Tensor) -> Tensor:
    return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas.square()))


# weighting_scheme -> w(sigma); the schemes that are missing weigh every noise level alike
WEIGHTINGS: Mapping[str, Callable[[Tensor], Tensor]] = {"sigma_sqrt": _sigma_sqrt, "cosmap": _cosmap}


def threshold(sigmas: Tensor, config: ObjectiveConfig) -> Tensor:  # [B,1,1,1] -> [B,1,1,1]
    """The Huber threshold c at each noise level; unused, and zero, for the distances that have none."""
    if config.loss_type not in ROBUST:
        return torch.zeros_like(sigmas)
    return HUBER_SCHEDULES[config.huber_schedule](sigmas, config)


def weighting(sigmas: Tensor, config: ObjectiveConfig) -> Tensor | None:  # [B,1,1,1] -> [B,1,1,1]
    """w(sigma), or None where all levels weigh alike. Kohya weighs only with model_prediction_type
    sigma_scaled.
    """
    scheme = WEIGHTINGS.get(config.weighting_scheme)
    if scheme is None or config.model_prediction_type != "sigma_scaled":
        return None
    return scheme(sigmas)


def loss_per_sample(
    estimate: Tensor, target: Tensor, *, sigmas: Tensor, config: ObjectiveConfig, mask: Tensor | None = None
) -> Tensor:  # [B,C,h,w] x2, [B,1,1,1], mask [B,1,H,W] -> [B]
    """The mean loss of each sample, in float32. `mask` holds each pixel's weight in [0, 1]; it is averaged
    per cell.
    """
    difference = estimate.float() - target.float()
    loss = DISTANCES[config.loss_type](difference, threshold(sigmas, config))
    weights = weighting(sigmas, config)
    if weights is not None:
        loss = loss * weights
    if mask is not None:
        loss = loss * functional.interpolate(mask.float(), size=loss.shape[-2:], mode="area")
    return reduce(loss, "b c h w -> b", "mean")
