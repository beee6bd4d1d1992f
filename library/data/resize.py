"""Resizing pictures and masks: area averaging of our own, the other filters from Pillow.

`area` weighs every source pixel by how much of it an output pixel covers (what OpenCV calls INTER_AREA;
Pillow's box filter only samples pixel centres). Pillow's bilinear and bicubic filters widen when they shrink,
OpenCV's do not: asked for by name they come out smoother here than in Kohya.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from library.data.buckets import Size

Pixels = NDArray[np.uint8]  # [H, W] or [H, W, C]
AREA = "area"
PILLOW_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
}
_EDGE = 1e-9  # pixels; a stretch that ends on a pixel's edge up to rounding does not touch the next one


def effective_interpolation(size: Size, resized: Size, interpolation: str | None) -> str:
    """The method used: the one asked for, else `area` when neither side grows and `lanczos` otherwise."""
    if interpolation is not None:
        return interpolation
    return AREA if resized[0] <= size[0] and resized[1] <= size[1] else "lanczos"


def resize(pixels: Pixels, resized: Size, interpolation: str | None) -> Pixels:
    """Scale [H, W] or [H, W, C] to `resized` = (width, height); untouched if it has that size."""
    size = (pixels.shape[1], pixels.shape[0])
    if size == resized:
        return pixels
    method = effective_interpolation(size, resized, interpolation)
    if method == AREA:
        return _area(pixels, resized)
    return np.asarray(Image.fromarray(pixels).resize(resized, PILLOW_FILTERS[method]))


def _area(pixels: Pixels, resized: Size) -> Pixels:
    """Average over the source area of each output pixel, rounded once at the end, half to even."""
    width, height = resized
    planes = pixels if pixels.ndim == 3 else pixels[:, :, None]
    channels = planes.shape[2]
    rows = _average(rearrange(planes, "h w c -> h (w c)"), height)
    columns = _average(rearrange(rows, "h (w c) -> w (h c)", c=channels), width)
    result = rearrange(columns, "w (h c) -> h w c", c=channels)
    rounded = np.clip(np.rint(result), 0, 255).astype(np.uint8)
    return rounded if pixels.ndim == 3 else rounded[:, :, 0]


def _average(values: NDArray[Any], count: int) -> NDArray[np.float32]:
    """[N, M] -> [count, M]: means over `count` equal stretches of the first axis, fractional ends included.

    The rows of a stretch are added one after the other, without BLAS, so the result is the same in every process. All
    stretches add theirs at once: few large operations, in which other threads go on.
    """
    length, columns = values.shape
    scale = length / count
    low = np.arange(count) * scale
    high = (np.arange(count) + 1) * scale
    first = low.astype(np.int64)
    last = np.minimum(np.ceil(high - _EDGE).astype(np.int64), length)
    result = np.zeros((count, columns), dtype=np.float32)
    for number in range(int((last - first).max())):
        row = first + number
        # How much of the row the stretch covers; nothing of it where the stretch has fewer rows.
        covered = np.where(row < last - 1, 1.0, high - row)
        covered = np.where(row == first, np.minimum(high, first + 1) - low, covered)
        covered = np.where(row < last, covered, 0.0).astype(np.float32)
        taken = values[np.minimum(row, length - 1)].astype(np.float32)
        taken *= covered[:, None]
        result += taken
    result *= 1.0 / scale
    return result
