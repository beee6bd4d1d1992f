"""Which resolution an image trains at: Kohya's bucket arithmetic as pure functions of numbers, without any
I/O.

Two rules exist. With `enable_bucket` the image goes to the predefined resolution of nearest aspect ratio and
is scaled to cover it, up or down. With `bucket_no_upscale` it is only ever scaled down, to about the area
asked for, and its bucket is what is left after rounding down to the step. The rounding is Kohya's to the
pixel, so that cache files and batch counts agree. No image is dropped here; cropping happens where pixels are
read. Sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from library.config.dataset_settings import DatasetSettings
from library.errors import ConfigError, DatasetError

Size = tuple[int, int]
PATCH = 16  # pixels of one transformer token: an 8-fold autoencoder and 2 x 2 patches


class Placement(NamedTuple):
    """Where an image goes: scaled to `resized`, which covers `bucket`, then cropped to it."""

    bucket: Size
    resized: Size
    aspect_error: float  # bucket's w/h minus the image's


@dataclass(frozen=True, slots=True)
class Shapes:
    """Predefined resolutions, sorted by aspect ratio so that the nearest one is found at once."""

    sizes: frozenset[Size]
    aspects: tuple[float, ...]  # ascending, each once
    by_aspect: tuple[Size, ...]  # the first size of each

    @classmethod
    def of(cls, sizes: Iterable[Size]) -> Shapes:
        """From the sizes; of those with one aspect ratio the smallest is chosen."""
        first: dict[float, Size] = {}
        for size in sorted(sizes):
            first.setdefault(size[0] / size[1], size)
        aspects = tuple(sorted(first))
        return cls(frozenset(sizes), aspects, tuple(first[aspect] for aspect in aspects))

    def nearest(self, size: Size) -> Size:
        """The size itself if it is one, else that of nearest aspect ratio, the one of lesser width on ties."""
        if size in self.sizes:
            return size
        aspect = size[0] / size[1]
        place = bisect_left(self.aspects, aspect)
        neighbours = range(max(place - 1, 0), min(place + 1, len(self.aspects)))
        return min((abs(self.aspects[i] - aspect), self.by_aspect[i]) for i in neighbours)[1]


@dataclass(frozen=True, slots=True)
class BucketRule:
    """How one dataset places its images."""

    resolution: Size
    shapes: Shapes  # empty under no_upscale
    step: int  # pixels
    no_upscale: bool

    def place(self, size: Size) -> Placement:
        """Placement of an image of this size."""
        if self.no_upscale:
            return place_without_upscaling(size, area=self.resolution[0] * self.resolution[1], step=self.step)
        return place_nearest(size, self.shapes)


def bucket_rule(settings: DatasetSettings) -> BucketRule:
    """The rule of a dataset whose limits and sizes are multiples of the step, as resolved settings are.

    Raises ConfigError if no bucket is possible. Without `enable_bucket` the resolution is the only one.
    """
    resolution = settings.resolution
    if not settings.enable_bucket:
        return BucketRule(resolution, Shapes.of([resolution]), PATCH, no_upscale=False)
    step = settings.bucket_reso_steps
    if settings.bucket_no_upscale:
        return BucketRule(resolution, Shapes.of(()), step, no_upscale=True)
    sizes = predefined_resolutions(
        resolution, smallest=settings.min_bucket_reso, largest=settings.max_bucket_reso, step=step
    )
    if not sizes:
        raise ConfigError(
            f"resolution {resolution[0]}x{resolution[1]} leaves no bucket with bucket_reso_steps={step}; "
            "raise the resolution or lower the step"
        )
    return BucketRule(resolution, Shapes.of(sizes), step, no_upscale=False)


def predefined_resolutions(resolution: Size, *, smallest: int, largest: int, step: int) -> tuple[Size, ...]:
    """All sizes within the limits, multiples of `step`, of at most the area of `resolution`; ascending."""
    area = resolution[0] * resolution[1]
    smallest = max(smallest, step)
    side = int(math.sqrt(area) // step) * step
    found = {(side, side)} if side else set()
    for width in range(smallest, largest + 1, step):
        height = min(largest, int((area // width) // step) * step)
        if height >= smallest:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def place_nearest(size: Size, shapes: Shapes) -> Placement:
    """Scale to cover the nearest of the shapes, up or down."""
    width, height = size
    aspect = width / height
    bucket = shapes.nearest(size)
    bucket_aspect = bucket[0] / bucket[1]
    scale = bucket[1] / height if aspect > bucket_aspect else bucket[0] / width
    resized = (int(width * scale + 0.5), int(height * scale + 0.5))
    return Placement(bucket, resized, bucket_aspect - aspect)


def place_without_upscaling(size: Size, *, area: int, step: int) -> Placement:
    """Scale down to about `area` with one side a multiple of `step`, never up; the bucket is the rounded-down
    rest.

    Raises DatasetError for an image that has less than one step left in an axis.
    """
    width, height = size
    aspect = width / height
    resized = size
    if width * height > area:
        ideal_width = math.sqrt(area * aspect)
        by_width = _rounded(ideal_width, step)
        by_height = _rounded(area / ideal_width, step)
        if min(by_width, by_height) > 0:
            resized = _closer_fit(aspect, by_width=by_width, by_height=by_height, step=step)
        else:
            resized = (int(ideal_width + 0.5), int(area / ideal_width + 0.5))
    bucket = (resized[0] // step * step, resized[1] // step * step)
    if min(bucket) == 0:
        raise DatasetError(
            f"is an image of {width}x{height} pixels, {resized[0]}x{resized[1]} in training, which is smaller in one "
            f"axis than bucket_reso_steps={step}: remove it, lower bucket_reso_steps or turn off bucket_no_upscale"
        )
    return Placement(bucket, resized, bucket[0] / bucket[1] - aspect)


def _rounded(value: float, step: int) -> int:
    return int(value + 0.5) // step * step


def _closer_fit(aspect: float, *, by_width: int, by_height: int, step: int) -> Size:
    """Of the fits that make width or height a multiple of the step, the one whose bucket keeps the aspect
    better.
    """
    height_of_width = _rounded(by_width / aspect, step)
    width_of_height = _rounded(by_height * aspect, step)
    error_width = abs(by_width / height_of_width - aspect) if height_of_width else math.inf
    error_height = abs(width_of_height / by_height - aspect)
    if error_width < error_height:
        return (by_width, int(by_width / aspect + 0.5))
    return (int(by_height * aspect + 0.5), by_height)


def centre_offset(resized: Size, bucket: Size) -> Size:
    """Left and top of the centred crop, in pixels of the resized image."""
    return (max(0, resized[0] - bucket[0]) // 2, max(0, resized[1] - bucket[1]) // 2)


def crop_box(bucket: Size, size: Size) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the whole image fitted inside the bucket; Kohya keeps it in its cache
    files.
    """
    aspect = size[0] / size[1]
    if bucket[0] / bucket[1] > aspect:
        width, height = bucket[1] * aspect, float(bucket[1])
    else:
        width, height = float(bucket[0]), bucket[0] / aspect
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return (left, top, left + width, top + height)


def bucket_info(placements: Iterable[tuple[Placement, int]]) -> dict[str, object]:
    """Kohya's metadata entry from (placement, repeats): counts by bucket and the mean absolute aspect error
    of images.
    """
    counts: Counter[Size] = Counter()
    errors = []
    for placement, repeats in placements:
        counts[placement.bucket] += repeats
        errors.append(abs(placement.aspect_error))
    buckets = {
        str(i): {"resolution": list(size), "count": counts[size]} for i, size in enumerate(sorted(counts))
    }
    return {"buckets": buckets, "mean_img_ar_error": fmean(errors) if errors else 0.0}
