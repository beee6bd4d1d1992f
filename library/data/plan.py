"""Which samples every optimizer step trains on: a pure function of the records, the seed and the sizes of a
step.

Per epoch, dataset and bucket the samples (image x repeat) are put in an order keyed by hash and cut into
*units* of the dataset's batch size: exactly Kohya's batches per epoch, N. A step takes U units (processes
times accumulation). Whole steps of one bucket are formed first, the units left over are pooled, similar
shapes together, so an epoch has ceil(N / U) steps and only one of them can be short. Neither rank nor the
number of processes enters; `deal` hands the units of a step to ranks afterwards. Every sample of an epoch is
visited exactly once per repeat, and weighs the same within its step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from library.data.buckets import Size
from library.errors import ConfigError
from library.randomness import digest


class PlannedImage(NamedTuple):
    """What the plan needs to know about one record."""

    key: str
    dataset: int
    bucket: Size
    num_repeats: int


class Sample(NamedTuple):
    """One visit of one record."""

    record: int  # position in the records
    visit: int  # epoch * num_repeats + repeat


@dataclass(frozen=True, slots=True)
class Unit:
    """One batch of one dataset and bucket, at most `batch_size` samples."""

    dataset: int
    bucket: Size
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """The units of one optimizer step; `epoch` counts from 0."""

    index: int
    epoch: int
    units: tuple[Unit, ...]

    @property
    def num_samples(self) -> int:
        """Samples in the step, over all ranks."""
        return sum(len(unit.samples) for unit in self.units)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one rank trains on in one forward and backward pass."""

    step: int
    epoch: int  # from 0
    dataset: int
    bucket: Size
    samples: tuple[Sample, ...]
    shares: tuple[float, ...]  # of the step's loss: 1 / samples in the step, or 0 for a filler


@dataclass(frozen=True, slots=True)
class BucketCount:
    """One row of the plan's report."""

    dataset: int
    bucket: Size
    images: int
    samples: int  # images times repeats
    batches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """The numbers that shape a plan. Exactly one of `max_train_steps` and `max_train_epochs` is set."""

    seed: int
    batch_sizes: tuple[int, ...]  # by dataset
    units_per_step: int  # U
    max_train_steps: int | None = None
    max_train_epochs: int | None = None


@dataclass(slots=True)
class Plan:
    """All steps of a run, worked out epoch by epoch when asked for."""

    images: tuple[PlannedImage, ...]
    settings: PlanSettings
    _epoch: tuple[int, tuple[tuple[Unit, ...], ...]] | None = field(default=None, init=False)
    _report: tuple[BucketCount, ...] | None = field(default=None, init=False)

    @property
    def batches_per_epoch(self) -> int:
        """N: batches of all datasets in one epoch."""
        return sum(row.batches for row in self.report())

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch, ceil(N / U)."""
        return -(-self.batches_per_epoch // self.settings.units_per_step)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; epochs win over steps, as in Kohya."""
        if self.settings.max_train_epochs is not None:
            return self.settings.max_train_epochs * self.steps_per_epoch
        assert self.settings.max_train_steps is not None
        return self.settings.max_train_steps

    @property
    def num_epochs(self) -> int:
        """Epochs begun in the run."""
        return -(-self.total_steps // self.steps_per_epoch)

    def step(self, index: int) -> Step:
        """The step of this number, from 0; steps past the end of the run exist too."""
        epoch, within = divmod(index, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, epoch_steps(self.images, self.settings, epoch))
        return Step(index, epoch, self._epoch[1][within])

    def micro_batches(self, *, rank: int, world: int, start: int = 0) -> Iterator[MicroBatch]:
        """This rank's micro-batches from step `start` to the end of the run."""
        for index in range(start, self.total_steps):
            yield from deal(
                self.step(index), rank=rank, world=world, units_per_step=self.settings.units_per_step
            )

    def report(self) -> tuple[BucketCount, ...]:
        """Images, samples and batches of every dataset's buckets, in ascending order."""
        if self._report is None:
            self._report = tuple(self._count())
        return self._report

    def fingerprint(self) -> str:
        """Hash of all that decides what a step holds. Not the length of the run, which may be extended on
        resume.
        """
        settings = (self.settings.seed, self.settings.batch_sizes, self.settings.units_per_step)
        return digest(settings, *self.images).hex()

    def _count(self) -> Iterator[BucketCount]:
        grouped: dict[tuple[int, Size], list[int]] = defaultdict(list)
        for image in self.images:
            grouped[(image.dataset, image.bucket)].append(image.num_repeats)
        for (dataset, bucket), repeats in sorted(grouped.items()):
            batches = -(-sum(repeats) // self.settings.batch_sizes[dataset])
            yield BucketCount(dataset, bucket, len(repeats), sum(repeats), batches)


def units_per_step(
    batch_sizes: Sequence[int], *, world: int, accumulation: int, global_batch_size: int | None
) -> int:
    """U: processes times accumulation, or what makes up `global_batch_size`.

    A number of processes that does not divide it leaves some of them a weightless batch in the last pass of a step.
    Raises ConfigError if the global batch size does not divide into batches.
    """
    if global_batch_size is None:
        return world * accumulation
    if len(set(batch_sizes)) != 1:
        raise ConfigError(
            f"global_batch_size={global_batch_size} needs one train_batch_size for all datasets, but they "
            f"have {sorted(set(batch_sizes))}; give them the same or use gradient_accumulation_steps"
        )
    if global_batch_size % batch_sizes[0]:
        raise ConfigError(
            f"global_batch_size={global_batch_size} must be a multiple of train_batch_size={batch_sizes[0]}; "
            "change one of them"
        )
    return global_batch_size // batch_sizes[0]


def epoch_steps(
    images: Sequence[PlannedImage], settings: PlanSettings, epoch: int
) -> tuple[tuple[Unit, ...], ...]:
    """All steps of one epoch, in the order they are trained."""
    size = settings.units_per_step
    steps: list[tuple[Unit, ...]] = []
    pool: list[Unit] = []
    for units in _units_by_bucket(images, settings, epoch):
        full = sum(len(unit.samples) == settings.batch_sizes[unit.dataset] for unit in units)
        whole = full // size * size
        steps += [tuple(units[start : start + size]) for start in range(0, whole, size)]
        pool += units[whole:]
    pool.sort(key=_shape_order)
    steps += [tuple(pool[start : start + size]) for start in range(0, len(pool), size)]
    order = sorted(range(len(steps)), key=lambda number: digest(settings.seed, epoch, "step", number))
    return tuple(steps[number] for number in order)


def _units_by_bucket(
    images: Sequence[PlannedImage], settings: PlanSettings, epoch: int
) -> Iterator[list[Unit]]:
    """Per dataset and bucket, ascending: its samples in keyed order, cut into units, the short one last."""
    grouped: dict[tuple[int, Size], list[tuple[bytes, Sample]]] = defaultdict(list)
    for number, image in enumerate(images):
        for repeat in range(image.num_repeats):
            rank = digest(settings.seed, epoch, image.key, repeat)
            sample = Sample(number, epoch * image.num_repeats + repeat)
            grouped[(image.dataset, image.bucket)].append((rank, sample))
    for (dataset, bucket), ranked in sorted(grouped.items(), key=lambda item: item[0]):
        samples = [sample for _, sample in sorted(ranked)]
        batch = settings.batch_sizes[dataset]
        yield [
            Unit(dataset, bucket, tuple(samples[start : start + batch]))
            for start in range(0, len(samples), batch)
        ]


def _shape_order(unit: Unit) -> tuple[int, float, int, int]:
    """Neighbours in this order cost alike: by area, then aspect ratio, then number of samples."""
    width, height = unit.bucket
    return (width * height, width / height, -len(unit.samples), unit.dataset)


def deal(step: Step, *, rank: int, world: int, units_per_step: int) -> tuple[MicroBatch, ...]:
    """The micro-batches of one rank: unit j goes to rank j % world as its micro-batch j // world.

    Every rank gets ceil(U / world) of them. Where no unit is left it repeats the step's last unit with shares
    of 0.
    """
    share = 1.0 / step.num_samples
    dealt = []
    for micro in range(-(-units_per_step // world)):
        number = micro * world + rank
        real = number < len(step.units)
        unit = step.units[number] if real else step.units[-1]
        shares = (share if real else 0.0,) * len(unit.samples)
        dealt.append(MicroBatch(step.index, step.epoch, unit.dataset, unit.bucket, unit.samples, shares))
    return tuple(dealt)
