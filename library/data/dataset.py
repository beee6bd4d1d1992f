"""From a micro-batch of the plan to tensors: read caches where there are some, else pixels; process captions.

Every item is a pure function of (micro-batch, seed): the number of workers, the order of requests and what
was read before change nothing. One stream of micro-batches runs over all epochs, so workers start once.
Encoding is not done here.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from library import randomness
from library.config.dataset_settings import DatasetSettings, SubsetSettings
from library.data import captions, images
from library.data.buckets import BucketRule, Placement, bucket_info, bucket_rule
from library.data.decode import read_mask, read_picture
from library.data.images import Framing
from library.data.plan import MicroBatch, Plan, PlannedImage, Sample
from library.data.problems import Problems
from library.data.readers import CachedText, LatentReader, TextReader
from library.data.records import Batch, ImageRecord, TextCond
from library.errors import DatasetError, UserError
from library.randomness import Visit


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """Records with their settings and placements: all that reading one of them needs."""

    datasets: tuple[DatasetSettings, ...]
    records: tuple[ImageRecord, ...]
    placements: tuple[Placement, ...]  # by record
    seed: int
    max_train_steps: int = 0  # for token_warmup_step given as a share
    latents: LatentReader | None = None
    text: TextReader | None = None

    def subset(self, record: ImageRecord) -> SubsetSettings:
        """The settings of a record's subset."""
        return self.datasets[record.dataset].subsets[record.subset]

    def interpolation(self, record: ImageRecord) -> str | None:
        """The resize method asked for."""
        return self.subset(record).resize_interpolation

    @property
    def preserves(self) -> bool:
        """Whether any subset has diff_output_preservation."""
        return any(subset.preserves for dataset in self.datasets for subset in dataset.subsets)

    def planned_images(self) -> tuple[PlannedImage, ...]:
        """The records as the plan takes them."""
        return tuple(
            PlannedImage(record.key, record.dataset, placement.bucket, record.num_repeats)
            for record, placement in zip(self.records, self.placements, strict=True)
        )

    def bucket_info(self, dataset: int) -> dict[str, object]:
        """Kohya's ss_bucket_info of one dataset."""
        pairs = zip(self.records, self.placements, strict=True)
        return bucket_info(
            (place, record.num_repeats) for record, place in pairs if record.dataset == dataset
        )


@dataclass(frozen=True, slots=True)
class _Pixels:
    image: Tensor | None  # [3, H, W]
    latents: Tensor | None  # [16, h, w]
    mask: Tensor | None  # [1, H, W]


@dataclass(frozen=True, slots=True)
class Failure:
    """A user's error met in a worker; torch would wrap its sentence in a traceback."""

    error: UserError


def place_records(
    datasets: Sequence[DatasetSettings], records: Sequence[ImageRecord]
) -> tuple[Placement, ...]:
    """A placement for every record. Raises DatasetError naming the images that are too small for their rule."""
    rules = [bucket_rule(settings) for settings in datasets]
    problems = Problems()
    placed = [_place(record, rules[record.dataset], problems) for record in records]
    problems.check()
    return tuple(placement for placement in placed if placement is not None)


def _place(record: ImageRecord, rule: BucketRule, problems: Problems) -> Placement | None:
    try:
        return rule.place(record.size)
    except DatasetError as error:
        problems.add(record.path, str(error))
        return None


class MicroBatchDataset(Dataset[Batch | Failure]):
    """Maps a micro-batch of the plan to a Batch."""

    def __init__(self, data: TrainingData) -> None:
        self.data = data

    def __getitem__(self, micro: MicroBatch) -> Batch | Failure:
        """Read one micro-batch; a user's error comes back as a value, for the stream to raise."""
        try:
            return read_batch(self.data, micro)
        except UserError as error:
            return Failure(error)


def read_batch(data: TrainingData, micro: MicroBatch) -> Batch:
    """All tensors of one micro-batch. Raises DatasetError for a file that cannot be read any more."""
    records = [data.records[sample.record] for sample in micro.samples]
    visits = tuple(
        Visit(record.key, sample.visit) for record, sample in zip(records, micro.samples, strict=True)
    )
    pixels = [_read_pixels(data, sample) for sample in micro.samples]
    texts = [_read_caption(data, sample, micro) for sample in micro.samples]
    weights = [data.datasets[r.dataset].prior_loss_weight if r.is_reg else 1.0 for r in records]
    return Batch(
        visits=visits,
        captions=tuple(caption for caption, _ in texts),
        latents=_stacked([one.latents for one in pixels]),
        images=_stacked([one.image for one in pixels]),
        text=_stacked_text([text for _, text in texts if text is not None]),
        loss_weights=torch.tensor(weights, dtype=torch.float32),
        shares=torch.tensor(micro.shares, dtype=torch.float32),
        mask=_stacked_masks([one.mask for one in pixels], micro),
        preserve=torch.tensor([data.subset(record).preserves for record in records])
        if data.preserves
        else None,
    )


def _read_pixels(data: TrainingData, sample: Sample) -> _Pixels:
    record, placement = data.records[sample.record], data.placements[sample.record]
    subset = data.subset(record)
    visit = Visit(record.key, sample.visit)
    mirrored = flipped(data, sample)
    if data.latents is None:
        image, mask = _decode(data, record, placement, visit)
        latents = None
    else:
        cached = data.latents.read(record, bucket=placement.bucket, flipped=mirrored, mask=subset.alpha_mask)
        image, latents = None, cached.latents
        mask = cached.mask[None] if cached.mask is not None else None
        if record.mask_path is not None:
            mask = _mask_picture(data, record, images.frame(placement))
    if mirrored:
        image = image.flip(-1) if image is not None else None
        mask = mask.flip(-1) if mask is not None else None
    return _Pixels(image, latents, mask)


def flipped(data: TrainingData, sample: Sample) -> bool:
    """Whether this visit of an image is mirrored."""
    record = data.records[sample.record]
    return data.subset(record).flip_aug and images.flips(data.seed, Visit(record.key, sample.visit))


def framing_of(data: TrainingData, sample: Sample) -> Framing:
    """What of the image this visit shows."""
    record = data.records[sample.record]
    return _framing(data, record, data.placements[sample.record], Visit(record.key, sample.visit))


def _decode(
    data: TrainingData, record: ImageRecord, placement: Placement, visit: Visit
) -> tuple[Tensor, Tensor | None]:
    """Image [3, H, W] and mask [1, H, W] of one visit, not mirrored."""
    subset = data.subset(record)
    picture = read_picture(record.path)
    if picture.size != record.size:
        raise DatasetError(
            f"{record.path} changed its size since the run began; leave the data alone meanwhile"
        )
    framing = _framing(data, record, placement, visit)
    interpolation = data.interpolation(record)
    rgb = images.render(picture.rgb, framing, interpolation)
    if subset.color_aug:
        rgb = images.augment_colour(rgb, randomness.generator(data.seed, visit, "colour"))
    mask = None
    if record.mask_path is not None:
        mask = _mask_picture(data, record, framing)
    elif subset.alpha_mask and picture.alpha is not None:
        mask = images.mask_tensor(images.render(picture.alpha, framing, interpolation))
    return images.image_tensor(rgb), mask


def _framing(data: TrainingData, record: ImageRecord, placement: Placement, visit: Visit) -> Framing:
    """The crop of one visit. Without buckets, faces and random crops are cut from the picture at its own
    scale.
    """
    subset = data.subset(record)
    rng = randomness.generator(data.seed, visit, "crop")
    fits = all(have >= need for have, need in zip(record.size, placement.bucket, strict=True))
    if data.datasets[record.dataset].enable_bucket or not fits:
        return images.frame(placement, random_crop=subset.random_crop, rng=rng)
    face = images.face_of(record.path)
    if subset.face_crop_aug_range is not None and face is not None:
        return images.frame_face(
            face,
            size=record.size,
            bucket=placement.bucket,
            face_range=subset.face_crop_aug_range,
            random_crop=subset.random_crop,
            rng=rng,
        )
    if subset.random_crop:
        unscaled = Placement(placement.bucket, record.size, placement.aspect_error)
        return images.frame(unscaled, random_crop=True, rng=rng)
    return images.frame(placement)


def _mask_picture(data: TrainingData, record: ImageRecord, framing: Framing) -> Tensor:
    """[1, H, W] from the red channel of the mask image, framed exactly as its image."""
    assert record.mask_path is not None
    weights = read_mask(record.mask_path)
    return images.mask_tensor(images.render(weights, framing, data.interpolation(record)))


def undropped_caption(data: TrainingData, record: ImageRecord, *, visit: int, step: int) -> str:
    """The caption of one visit, `step` being the optimizer step it falls into, whether it is dropped or not."""
    subset = data.subset(record)
    if subset.plain_captions:
        return record.caption.split("\n", 1)[0]
    return captions.undropped_caption(
        record.caption,
        subset,
        _caption_draws(data, record, visit),
        step=step,
        max_train_steps=data.max_train_steps,
    )


def is_dropped(data: TrainingData, record: ImageRecord, *, visit: int, epoch: int) -> bool:
    """Whether a visit trains with the empty caption. `epoch` counts from 0."""
    return captions.dropped(data.subset(record), _caption_draws(data, record, visit), epoch=epoch + 1)


def _caption_draws(data: TrainingData, record: ImageRecord, visit: int) -> np.random.Generator:
    subset = data.subset(record)
    if not captions.varies(subset) and not captions.may_drop(subset):
        return _never_drawn_from()  # making one for each of many captions takes seconds
    return randomness.generator(data.seed, Visit(record.key, visit), "caption")


@cache
def _never_drawn_from() -> np.random.Generator:
    return np.random.default_rng(0)


def _read_caption(data: TrainingData, sample: Sample, micro: MicroBatch) -> tuple[str, CachedText | None]:
    """The caption of one visit and, if text is cached, its outputs. An encoder that runs beside the cache gets
    the same caption.
    """
    record = data.records[sample.record]
    if data.text is None:
        caption = captions.process_caption(
            record.caption,
            data.subset(record),
            _caption_draws(data, record, sample.visit),
            step=micro.step,
            max_train_steps=data.max_train_steps,
            epoch=micro.epoch + 1,
        )
        return caption, None
    if is_dropped(data, record, visit=sample.visit, epoch=micro.epoch):
        return "", data.text.read(record, None)
    caption = data.text.caption(record, visit=sample.visit, step=micro.step)
    return caption, data.text.read(record, caption)


def _stacked(tensors: list[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


def _stacked_masks(masks: list[Tensor | None], micro: MicroBatch) -> Tensor | None:
    """[B, 1, H, W], samples without a mask count fully; None if none has one."""
    if all(mask is None for mask in masks):
        return None
    width, height = micro.bucket
    return torch.stack([mask if mask is not None else torch.ones(1, height, width) for mask in masks])


def _stacked_text(texts: list[CachedText]) -> TextCond | None:
    """Outputs of a micro-batch; shorter token sequences are filled with zeros."""
    if not texts:
        return None
    return TextCond(
        clip_pooled=torch.stack([text.clip_pooled for text in texts]),
        t5_hidden=torch.nn.utils.rnn.pad_sequence([text.t5_hidden for text in texts], batch_first=True),
        t5_mask=torch.nn.utils.rnn.pad_sequence([text.t5_mask for text in texts], batch_first=True),
    )


class MicroBatchSampler(Sampler[MicroBatch]):
    """One rank's micro-batches from a step to the end of the run."""

    def __init__(self, plan: Plan, *, rank: int, world: int, start_step: int) -> None:
        self.plan, self.rank, self.world, self.start_step = plan, rank, world, start_step

    def __iter__(self) -> Iterator[MicroBatch]:
        return self.plan.micro_batches(rank=self.rank, world=self.world, start=self.start_step)

    def __len__(self) -> int:
        passes = -(-self.plan.settings.units_per_step // self.world)
        return max(0, self.plan.total_steps - self.start_step) * passes


class BatchStream:
    """The loader's batches, with a worker's error raised as the sentence that it is."""

    def __init__(self, loader: DataLoader[Batch | Failure]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Batch]:
        for item in self.loader:
            if isinstance(item, Failure):
                raise item.error
            yield item

    def __len__(self) -> int:
        return len(self.loader)


def load_batches(
    data: TrainingData,
    plan: Plan,
    *,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    num_workers: int = 0,
) -> BatchStream:
    """Stream this rank's batches from `start_step` on. More workers than the machine has cores are not
    started.
    """
    workers = min(num_workers, os.cpu_count() or 1)
    sampler = MicroBatchSampler(plan, rank=rank, world=world, start_step=start_step)
    return BatchStream(
        DataLoader(
            MicroBatchDataset(data),
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_main_process,
            pin_memory=torch.cuda.is_available(),
            # else it draws from the global generator
            generator=torch.Generator().manual_seed(randomness.integer(data.seed, "loader")),
        )
    )


def _leave_signals_to_the_main_process(_worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: workers go on until the main process has done its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _as_it_is(item: Any) -> Any:
    return item
