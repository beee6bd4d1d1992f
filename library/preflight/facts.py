"""What a run will do, as plain facts: made by `forecast`, shown by `tables`, `report` and `start`, judged by lints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

Size = tuple[int, int]  # width, height in pixels
VISIBLE_ENLARGEMENT = 1.5  # blur shows beyond it


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderFacts:
    """One folder or metadata file."""

    dataset: int  # from 1
    name: str
    kind: str  # "training" or "regularisation"
    images: int
    repeats: int
    validation: int
    captions: int  # different ones
    empty: int  # images without a word
    longest: int  # letters
    example: str  # the first caption, as it would be encoded without shuffle and dropout


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketFacts:
    """One bucket of one dataset."""

    dataset: int  # from 1
    size: Size
    images: int
    samples: int  # images times repeats
    batches: int
    last_batch: int  # samples in the last of them
    enlarged: int  # images scaled up beyond VISIBLE_ENLARGEMENT
    cropped: float  # largest share of an image that is cut off


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFacts:
    """The order of events in numbers."""

    images: int
    left_out: int  # found, but neither trained on nor validated on
    samples_per_epoch: int
    regularisation_images: int
    validation_images: int
    batch_sizes: tuple[int, ...]  # by dataset
    gpus: int
    batches_per_epoch: int
    batches_per_step: int
    steps_per_epoch: int
    epochs: int
    first_step: int
    total_steps: int
    visits_per_image: float  # of each training image over the run


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleFacts:
    """What happens beside training."""

    prompts: int
    sample_steps: tuple[int, ...]
    validation_batches: int  # of one validation
    validation_steps: tuple[int, ...]  # 0 is before the first step
    log_folder: Path | None  # TensorBoard's


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFacts:
    """One of the two caches."""

    what: str  # "latents" or "text encoder outputs"
    entries: int
    to_encode: int
    bytes_in_memory: int  # on every rank
    bytes_by_folder: tuple[tuple[Path, int], ...]  # to be written
    notices: tuple[str, ...]  # why entries are made anew, or kept in memory

    @property
    def bytes_to_write(self) -> int:
        """Bytes that go to disk."""
        return sum(size for _, size in self.bytes_by_folder)


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """One parameter group of the optimizer."""

    name: str
    learning_rate: float
    parameters: int


@dataclass(frozen=True, slots=True)
class TrainedFacts:
    """What the optimizer updates and how large it is on disk."""

    modules: tuple[tuple[str, int], ...]  # model it sits in -> layers it adds to
    groups: tuple[GroupFacts, ...]
    base_parameters: int  # of the transformer
    network_bytes: int  # of one network file, header left out
    state_bytes: int  # of one state folder; 0 if none is asked for

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return sum(group.parameters for group in self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """One file, or one batch of sample images, that the run will write."""

    path: Path
    # "network", "state", "samples", "workflow" beside a network file; "card", "log" and "report" as written last
    kind: str
    step: int  # optimizer steps done when it is written; 0 is before the first
    epoch: int | None  # the epoch at whose end it is written
    bytes: int  # of samples and the report the most they can take
    removed_at: int | None = None  # step at which a newer one retires it
    exists: bool = False  # something of that name is there now


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """One disk that the run writes to."""

    folder: Path
    needed: int  # bytes, at the fullest moment
    free: int  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run will do."""

    folders: tuple[FolderFacts, ...]
    buckets: tuple[BucketFacts, ...]
    plan: PlanFacts
    caches: tuple[CacheFacts, ...]
    trained: TrainedFacts
    files: tuple[FileFacts, ...]
    disks: tuple[DiskFacts, ...]
    schedule: ScheduleFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What was told before a run, kept for its report."""

    options: tuple[
        Mapping[str, object], ...
    ]  # every option with value, source, state and effect; secrets masked
    forecast: Forecast
    notices: tuple[str, ...]
