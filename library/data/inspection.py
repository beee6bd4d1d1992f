"""The samples of an epoch as the model would get them, one at a time, for a person to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from torch import Tensor

from library.data.buckets import Size
from library.data.dataset import TrainingData, flipped, framing_of, read_batch, undropped_caption
from library.data.images import Framing
from library.data.plan import MicroBatch, Plan, Sample
from library.data.records import ImageRecord


@dataclass(frozen=True, slots=True)
class SampleView:
    """One visit of one image."""

    record: ImageRecord
    caption: str  # as processed for this visit
    framing: Framing
    flipped: bool
    image: Tensor  # [3, H, W] float32 in -1..1
    mask: Tensor | None  # [1, H, W] float32 in 0..1


@dataclass(frozen=True, slots=True)
class BucketView:
    """The samples of one bucket of one dataset, read one after another."""

    dataset: int
    bucket: Size
    num_samples: int
    samples: Iterator[SampleView]


def first_epoch(data: TrainingData, plan: Plan) -> Iterator[BucketView]:
    """Every sample of the first epoch by dataset and bucket, each bucket in the order of training.

    Each bucket's samples must be used before the next bucket is asked for.
    """
    steps = range(plan.steps_per_epoch)
    units = [(number, unit) for number in steps for unit in plan.step(number).units]
    units.sort(key=lambda item: (item[1].dataset, item[1].bucket))
    for (dataset, bucket), group in groupby(units, key=lambda item: (item[1].dataset, item[1].bucket)):
        visits = [
            MicroBatch(number, 0, dataset, bucket, (sample,), (1.0,))
            for number, unit in group
            for sample in unit.samples
        ]
        yield BucketView(dataset, bucket, len(visits), (_view(data, visit) for visit in visits))


def example(data: TrainingData, record: int) -> SampleView:
    """The first visit of the image at that position in the records. UserError when it cannot be read any more."""
    place = data.placements[record]
    dataset = data.records[record].dataset
    pixels = replace(data, latents=None, text=None)
    return _view(pixels, MicroBatch(0, 0, dataset, place.bucket, (Sample(record, 0),), (1.0,)))


def _view(data: TrainingData, micro: MicroBatch) -> SampleView:
    (sample,) = micro.samples
    batch = read_batch(data, micro)
    assert batch.images is not None, "no cache is read here"
    return SampleView(
        record=data.records[sample.record],
        caption=batch.captions[0],
        framing=framing_of(data, sample),
        flipped=flipped(data, sample),
        image=batch.images[0],
        mask=batch.mask[0] if batch.mask is not None else None,
    )


def first_caption(data: TrainingData, record: ImageRecord) -> str:
    """What an image's first visit would have for a caption after token warm-up, were it not dropped."""
    return undropped_caption(data, record, visit=0, step=data.max_train_steps)
