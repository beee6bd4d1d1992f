"""From decoded pixels to the tensor that the autoencoder takes, and the mask that goes with it.

Every random decision is drawn from generators of one visit of one sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from library import randomness
from library.data.buckets import Placement, Size, centre_offset
from library.data.resize import Pixels, resize
from library.randomness import Visit

COLOUR_PROBABILITY = 0.33
HUE_LIMIT = 8.0  # of 180 around the colour circle
GAMMA_RANGE = (0.95, 1.05)


@dataclass(frozen=True, slots=True)
class Framing:
    """Scale to `resized`, then cut `bucket` out at `offset` = (left, top)."""

    resized: Size
    offset: Size
    bucket: Size


def frame(
    placement: Placement, *, random_crop: bool = False, rng: np.random.Generator | None = None
) -> Framing:
    """The crop of a placement: centred, or anywhere within the excess when `random_crop` is on."""
    if not random_crop or rng is None:
        return Framing(
            placement.resized, centre_offset(placement.resized, placement.bucket), placement.bucket
        )
    excess = [max(0, r - b) for r, b in zip(placement.resized, placement.bucket, strict=True)]
    left, top = (int(rng.integers(0, one, endpoint=True)) for one in excess)
    return Framing(placement.resized, (left, top), placement.bucket)


def face_of(path: Path) -> tuple[int, int, int, int] | None:
    """Centre x, centre y, width, height of a face from a name such as `me_120_80_60_64.png`; None for other
    names.
    """
    parts = path.stem.split("_")
    if len(parts) < 5 or not all(part.isdecimal() for part in parts[-4:]):
        return None
    centre_x, centre_y, width, height = (int(part) for part in parts[-4:])
    return (centre_x, centre_y, width, height) if max(width, height) > 0 else None


def frame_face(
    face: tuple[int, int, int, int],
    *,
    size: Size,
    bucket: Size,
    face_range: tuple[float, float],
    random_crop: bool,
    rng: np.random.Generator,
) -> Framing:
    """Scale so that the face takes one of `face_range`'s shares of the short side, and crop around it.

    The picture must be at least as large as the bucket and is never enlarged. With `random_crop` the crop
    wanders (most often little), else by up to a twentieth of a large face when the range is a real one.
    """
    centre, face_size = face[:2], max(face[2:])
    short = min(bucket)
    least = max(bucket[0] / size[0], bucket[1] / size[1])
    least = min(1.0, max(least, short / (face_size * face_range[1])))
    most = min(1.0, max(least, short / (face_size * face_range[0])))
    scale = float(rng.uniform(least, most)) if least < most else least
    resized = tuple(max(int(side * scale + 0.5), target) for side, target in zip(size, bucket, strict=True))
    offsets = []
    for length, target, where in zip(resized, bucket, centre, strict=True):
        point = int(where * scale + 0.5)
        start = point - target // 2
        if random_crop:
            reach = max(length - point, point)
            start += (
                int(rng.integers(0, reach, endpoint=True) + rng.integers(0, reach, endpoint=True)) - reach
            )
        elif face_range[0] != face_range[1] and face_size > short // 10 and face_size >= 40:
            reach = int(face_size * 0.05)
            start += int(rng.integers(-reach, reach, endpoint=True))
        offsets.append(max(0, min(start, length - target)))
    return Framing((resized[0], resized[1]), (offsets[0], offsets[1]), bucket)


def render(pixels: Pixels, framing: Framing, interpolation: str | None) -> Pixels:
    """Resize and crop [H, W] or [H, W, C]; masks go through the same framing as their image."""
    width, height = framing.bucket
    left, top = framing.offset
    return resize(pixels, framing.resized, interpolation)[top : top + height, left : left + width]


def augment_colour(rgb: Pixels, rng: np.random.Generator) -> Pixels:
    """With probability 0.33 turn the hue by up to 8 of 180, or (evenly) apply a gamma in 0.95..1.05 to [H, W,
    3].

    Kohya shifts the hue of an array read in the wrong channel order and applies its power to 0..255 instead
    of 0..1; here both do what their names say.
    """
    if rng.random() > COLOUR_PROBABILITY:
        return rgb
    if rng.random() > 0.5:
        turn = round(rng.uniform(-HUE_LIMIT, HUE_LIMIT) * 256 / 180)
        hsv = np.array(Image.fromarray(rgb).convert("HSV"))
        hsv[:, :, 0] = (hsv[:, :, 0].astype(np.int16) + turn) % 256
        return np.asarray(Image.fromarray(hsv, mode="HSV").convert("RGB"))
    table = np.rint(255 * (np.arange(256) / 255) ** rng.uniform(*GAMMA_RANGE)).astype(np.uint8)
    return table[rgb]


def flips(seed: int, visit: Visit) -> bool:
    """Whether a visit of a flip_aug subset is mirrored; the same for pixels and for cached latents."""
    return bool(randomness.generator(seed, visit, "flip").random() < 0.5)


def image_tensor(rgb: Pixels) -> Tensor:
    """[H, W, 3] uint8 -> [3, H, W] float32 in -1..1."""
    channels = np.ascontiguousarray(rearrange(rgb, "h w c -> c h w"))
    return torch.from_numpy(channels.astype(np.float32) / 127.5 - 1.0)


def mask_tensor(mask: Pixels) -> Tensor:
    """[H, W] uint8 -> [1, H, W] float32 in 0..1."""
    return torch.from_numpy(mask.astype(np.float32) / 255.0)[None]
