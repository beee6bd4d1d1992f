"""Random numbers of the objective, each a function of (seed, sample, visit, purpose) and of nothing else.

A sample's numbers do not depend on the batch, rank or order it comes in; they are drawn on the CPU so that
every machine draws the same, and moved by the caller.

Shape letters: B samples of a micro-batch, C latent channels, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from library.randomness import Visit, generator

# The smallest positive number that keeps 1 - x below 1 in float32: sigma is divided by in the loss weighting.
_SMALLEST = np.float32(2**-25)


def draw_noise(
    seed: int, visits: Sequence[Visit], shape: Sequence[int], *, purpose: str = "noise"
) -> Tensor:  # [B, *shape]
    """Standard normal float32 numbers, `shape` (usually C, h, w) for each visit; on the CPU."""
    draws = [generator(seed, visit, purpose).standard_normal(shape, dtype=np.float32) for visit in visits]
    return torch.from_numpy(np.stack(draws))


def on_device(drawn: Tensor, device: torch.device) -> Tensor:
    """`drawn` on `device`, without waiting for what the device computes meanwhile."""
    if device.type != "cuda" or drawn.is_cuda:
        return drawn.to(device)
    return drawn.pin_memory().to(device, non_blocking=True)


def draw_normal(seed: int, visits: Sequence[Visit], *, purpose: str) -> Tensor:  # [B]
    """One standard normal float32 number for each visit; on the CPU."""
    return draw_noise(seed, visits, (), purpose=purpose)


def draw_uniform(seed: int, visits: Sequence[Visit], *, purpose: str) -> Tensor:  # [B]
    """One float32 number in the open interval (0, 1) for each visit; on the CPU."""
    draws = [generator(seed, visit, purpose).random(dtype=np.float32) for visit in visits]
    return torch.from_numpy(np.maximum(np.asarray(draws, dtype=np.float32), _SMALLEST))
