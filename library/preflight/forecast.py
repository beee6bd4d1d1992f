"""The forecast: works out what a run will do from options, headers of model files and data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from library.config.prompts import SamplePrompt
from library.config.train_config import TrainConfig
from library.data.buckets import Size
from library.data.inspection import first_caption
from library.data.records import ImageRecord
from library.preflight.facts import (
    VISIBLE_ENLARGEMENT,
    BucketFacts,
    CacheFacts,
    FolderFacts,
    Forecast,
    PlanFacts,
    ScheduleFacts,
)
from library.preflight.trained import measure
from library.preflight.writes import disks, epoch_ends, files_to_write, multiples, sample_times
from library.train.prepare import Data, ModelFiles


def forecast(
    config: TrainConfig,
    files: ModelFiles,
    data: Data,
    *,
    prompts: Sequence[SamplePrompt],
    caches: tuple[CacheFacts, ...],
    world_size: int,
    first_step: int,
) -> Forecast:
    """Work everything out. Loads no model; builds the network, so what is wrong with it is found."""
    trained = measure(config, files)
    written = files_to_write(config, data.plan, trained, prompts, first_step=first_step)
    assert config.saving.output_dir is not None, "checked by the config rules"
    return Forecast(
        folders=_folders(data),
        buckets=_buckets(data),
        plan=_plan(data, world_size=world_size, first_step=first_step),
        caches=caches,
        trained=trained,
        files=written,
        disks=disks(config.saving.output_dir, written, caches),
        schedule=_schedule(config, data, prompts, first_step),
    )


def _folders(data: Data) -> tuple[FolderFacts, ...]:
    records: dict[tuple[int, int], list[ImageRecord]] = defaultdict(list)
    for record in data.training.records:
        records[(record.dataset, record.subset)].append(record)
    facts = []
    for report in data.discovered.subsets:
        captions = [first_caption(data.training, r) for r in records[(report.dataset, report.subset)]]
        facts.append(
            FolderFacts(
                dataset=report.dataset + 1,
                name=report.name,
                kind="regularisation" if report.is_reg else "training",
                images=report.num_images,
                repeats=report.num_repeats,
                validation=report.num_validation,
                captions=len(set(captions)),
                empty=sum(not caption for caption in captions),
                longest=max(map(len, captions), default=0),
                example=captions[0] if captions else "",
            )
        )
    return tuple(facts)


def _buckets(data: Data) -> tuple[BucketFacts, ...]:
    enlarged: dict[tuple[int, Size], int] = defaultdict(int)
    cropped: dict[tuple[int, Size], float] = defaultdict(float)
    for record, placement in zip(data.training.records, data.training.placements, strict=True):
        place = (record.dataset, placement.bucket)
        enlarged[place] += placement.resized[0] / record.size[0] > VISIBLE_ENLARGEMENT
        kept = placement.bucket[0] * placement.bucket[1] / (placement.resized[0] * placement.resized[1])
        cropped[place] = max(cropped[place], 1 - kept)
    return tuple(
        BucketFacts(
            dataset=row.dataset + 1,
            size=row.bucket,
            images=row.images,
            samples=row.samples,
            batches=row.batches,
            last_batch=row.samples - (row.batches - 1) * data.plan.settings.batch_sizes[row.dataset],
            enlarged=enlarged[(row.dataset, row.bucket)],
            cropped=cropped[(row.dataset, row.bucket)],
        )
        for row in data.plan.report()
    )


def _plan(data: Data, *, world_size: int, first_step: int) -> PlanFacts:
    plan, records = data.plan, data.training.records
    samples = sum(record.num_repeats for record in records)
    training = [record for record in records if not record.is_reg]
    visits = sum(record.num_repeats for record in training) / len(training) if training else 0.0
    return PlanFacts(
        images=len(records),
        left_out=sum(report.num_images for report in data.discovered.subsets) - len(records),
        samples_per_epoch=samples,
        regularisation_images=len(records) - len(training),
        validation_images=len(data.discovered.validation),
        batch_sizes=tuple(dataset.batch_size for dataset in data.datasets),
        gpus=world_size,
        batches_per_epoch=plan.batches_per_epoch,
        batches_per_step=plan.settings.units_per_step,
        steps_per_epoch=plan.steps_per_epoch,
        epochs=plan.num_epochs,
        first_step=first_step,
        total_steps=plan.total_steps,
        visits_per_image=visits * plan.total_steps / plan.steps_per_epoch,
    )


def _schedule(
    config: TrainConfig, data: Data, prompts: Sequence[SamplePrompt], first_step: int
) -> ScheduleFacts:
    times = sample_times(config.sampling, data.plan, first_step) if prompts else ()
    held = data.validation_plan
    return ScheduleFacts(
        prompts=len(prompts),
        sample_steps=tuple(sorted(step for step, _ in times)),
        validation_batches=held.total_steps if held is not None else 0,
        validation_steps=_validation_steps(config, data, first_step) if held is not None else (),
        log_folder=config.logging.logging_dir,
    )


def _validation_steps(config: TrainConfig, data: Data, first_step: int) -> tuple[int, ...]:
    """Before the first step, every n steps, and at the ends of every n-th epoch."""
    validation, plan = config.validation, data.plan
    steps = {first_step} if first_step == 0 else set[int]()
    if validation.validate_every_n_steps:
        steps |= set(multiples(validation.validate_every_n_steps, first_step, plan.total_steps))
    ends = epoch_ends(plan, validation.validate_every_n_epochs or 1)
    steps |= {step for _, step in ends if step > first_step}
    return tuple(sorted(steps))
