"""Which files a run will write when, how large, how long they stay, and whether they fit on the disk."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from library.config.prompts import SamplePrompt
from library.config.sections.sampling import SamplingConfig
from library.config.train_config import TrainConfig
from library.data.plan import Plan
from library.preflight.facts import CacheFacts, DiskFacts, FileFacts, TrainedFacts
from library.report.paths import report_path
from library.report.pictures import BUDGET
from library.train.checkpoint import STATE_SUFFIX
from library.train.naming import (
    SavePoint,
    average_stem,
    best_stem,
    card_path,
    epoch_save,
    last_stem,
    model_path,
    picture_start,
    save_every_n_epochs,
    step_save,
    workflow_path,
)
from library.train.run_log import log_path

WORKFLOW_BYTES, CARD_BYTES, LOG_LINE_BYTES = 9_000, 4_000, 300  # about
PAGE_BYTES, THUMB_BYTES = 3_000_000, 80_000  # of a report and of each sample in it, at most


def files_to_write(
    config: TrainConfig,
    plan: Plan,
    trained: TrainedFacts,
    prompts: Sequence[SamplePrompt],
    *,
    first_step: int,
) -> tuple[FileFacts, ...]:
    """Everything that goes to output_dir after `first_step`, in the order it is written."""
    files = _saved(config, plan, trained, first_step)
    times = list(sample_times(config.sampling, plan, first_step)) if prompts else []
    files += [_samples(config, prompts, step, epoch) for step, epoch in times]
    files += _told(config, plan, first_step, pictures=len(times) * len(prompts))
    return tuple(sorted(files, key=lambda file: file.step))


def sample_times(config: SamplingConfig, plan: Plan, first_step: int) -> Iterator[tuple[int, int | None]]:
    """When samples are drawn: (step, epoch), with None where it is not an epoch's end."""
    if config.sample_at_first and first_step == 0:
        yield 0, None
    if config.sample_every_n_epochs:
        for epoch, step in epoch_ends(plan, config.sample_every_n_epochs):
            if step > first_step:
                yield step, epoch
    elif config.sample_every_n_steps:
        yield from (
            (step, None) for step in multiples(config.sample_every_n_steps, first_step, plan.total_steps)
        )


def epoch_ends(plan: Plan, every: int) -> Iterator[tuple[int, int]]:
    """(epoch from 1, step at its end) of every n-th epoch; the last epoch ends with the run."""
    for epoch in range(every, plan.num_epochs + 1, every):
        yield epoch, min(epoch * plan.steps_per_epoch, plan.total_steps)


def multiples(every: int, first_step: int, last: int) -> range:
    """Multiples of `every` after `first_step`, to `last`."""
    return range((first_step // every + 1) * every, last + 1, every)


def peak_bytes(files: Iterable[FileFacts]) -> int:
    """The most that `files` take at one time beside what their names hold now: old ones go after new ones are there."""
    present = peak = 0
    changes = [(file.step, 0, file.bytes) for file in files]
    changes += [(file.removed_at, 1, -file.bytes) for file in files if file.removed_at is not None]
    for _, _, change in sorted(changes):
        present += change
        peak = max(peak, present)
    return peak


def disks(
    output_dir: Path, files: Sequence[FileFacts], caches: Sequence[CacheFacts]
) -> tuple[DiskFacts, ...]:
    """Space needed and free, by disk."""
    needed, folders = Counter[int](), dict[int, Path]()
    amounts = [(output_dir, peak_bytes(files))]
    amounts += [(folder, size) for cache in caches for folder, size in cache.bytes_by_folder]
    for folder, size in amounts:
        place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        device = os.stat(place).st_dev
        folders.setdefault(device, place)
        needed[device] += size
    return tuple(
        DiskFacts(folders[d], size, shutil.disk_usage(folders[d]).free) for d, size in needed.items()
    )


def _saved(config: TrainConfig, plan: Plan, trained: TrainedFacts, first_step: int) -> list[FileFacts]:
    """Network files with their workflows, and states, with the step at which each is retired."""
    saving, files = config.saving, dict[Path, FileFacts]()
    sizes = {"network": trained.network_bytes, "state": trained.state_bytes, "workflow": WORKFLOW_BYTES}
    kinds = ["network"] if saving.no_workflow else ["network", "workflow"]

    def write(kind: str, stem: str, step: int, epoch: int | None, retires: str | None = None) -> None:
        path = _path(config, kind, stem)
        files[path] = FileFacts(
            path=path, kind=kind, step=step, epoch=epoch, bytes=sizes[kind], exists=path.exists()
        )
        if retires and (old := _path(config, kind, retires)) in files:
            files[old] = replace(files[old], removed_at=step)

    def write_network(stem: str, step: int, epoch: int | None, retires: str | None = None) -> None:
        for kind in kinds:
            write(kind, stem, step, epoch, retires)
        for kind in kinds if config.averaging.ema_decay is not None else ():
            write(kind, average_stem(stem), step, epoch, average_stem(retires) if retires else None)

    for step, epoch, point in save_points(config, plan, first_step):
        write_network(point.stem, step, epoch, point.retires_model)
        if saving.save_state:
            write("state", point.stem, step, epoch, point.retires_state)
    last, total, epochs = last_stem(saving.output_name), plan.total_steps, plan.num_epochs
    if saving.save_state or saving.save_state_on_train_end:
        write("state", last, total, epochs)
    for kind in kinds if config.validation.keep_best else ():  # at the latest then
        write(kind, best_stem(saving.output_name), total, epochs)
    write_network(last, total, epochs)
    return list(files.values())


def _told(config: TrainConfig, plan: Plan, first_step: int, *, pictures: int) -> list[FileFacts]:
    """What tells of the run: card, log and report, as they are at its end."""
    saving, logging, total = config.saving, config.logging, plan.total_steps
    assert saving.output_dir is not None
    sizes = dict[str, tuple[Path, int]]()
    if not saving.no_card:
        sizes["card"] = card_path(saving), CARD_BYTES
    if not logging.no_run_log:
        path = log_path(saving.output_dir, saving.output_name)
        sizes["log"] = path, LOG_LINE_BYTES * (total - first_step + pictures)
    if logging.report_every_n_steps:
        path = report_path(saving.output_dir, saving.output_name)
        sizes["report"] = path, PAGE_BYTES + min(BUDGET, THUMB_BYTES * pictures)
    return [
        FileFacts(path=path, kind=kind, step=total, epoch=plan.num_epochs, bytes=size, exists=path.exists())
        for kind, (path, size) in sizes.items()
    ]


def _path(config: TrainConfig, kind: str, stem: str) -> Path:
    network = model_path(config.saving, stem)
    if kind == "state":
        return network.with_name(f"{stem}{STATE_SUFFIX}")
    return workflow_path(network) if kind == "workflow" else network


def save_points(
    config: TrainConfig, plan: Plan, first_step: int
) -> Iterator[tuple[int, int | None, SavePoint]]:
    """(step, epoch, what is saved) of every save before the final one."""
    saving = config.saving
    due: list[tuple[int, int, int | None, SavePoint]] = []
    if saving.save_every_n_steps:
        for step in multiples(saving.save_every_n_steps, first_step, plan.total_steps):
            point = step_save(saving, step=step)
            assert point is not None
            due.append((step, 0, None, point))
    if every := save_every_n_epochs(saving, plan.num_epochs):
        for epoch, step in epoch_ends(plan, every):
            point = epoch_save(saving, epoch=epoch, num_epochs=plan.num_epochs)
            if point and step > first_step:
                due.append((step, 1, epoch, point))
    yield from ((step, epoch, point) for step, _, epoch, point in sorted(due, key=lambda item: item[:2]))


def _samples(config: TrainConfig, prompts: Sequence[SamplePrompt], step: int, epoch: int | None) -> FileFacts:
    assert config.saving.output_dir is not None
    start = picture_start(config.saving.output_name, epoch=epoch, step=step)
    return FileFacts(
        path=config.saving.output_dir / "sample" / f"{start}_*.png", kind="samples", step=step, epoch=epoch,
        bytes=sum(prompt.width * prompt.height * 3 for prompt in prompts),
    )  # fmt: skip
