"""The listeners of a run, in the order they are told: see, record, measure, log, name outliers, save, draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL.Image import Image

from library.adapters.base import Conditions, ModelAdapter
from library.adapters.flux import FluxTrainModule
from library.adapters.preview import FluxPreviewer
from library.config.prompts import SamplePrompt
from library.data.dataset import load_batches
from library.data.records import TextCond, TokenIds
from library.flow.objective import Objective
from library.train.build import Job, Trained
from library.train.image_losses import LossByImage
from library.train.metrics import MetricsListener, public_options, secret_values
from library.train.outliers import OutlierListener
from library.train.preview import PreviewListener
from library.train.progress import ProgressListener
from library.train.recorder import StepRecorder, record_image, record_validation
from library.train.run_log import Write
from library.train.saving import Saver, SavingListener, Weights
from library.train.state import TrainState
from library.train.trackers import start_trackers, wanted
from library.train.trainer import Listener
from library.train.validate import ValidationListener, Validator, fixed_timesteps


@contextmanager
def build_listeners(
    job: Job,
    trained: Trained,
    saver: Saver,
    *,
    losses: LossByImage | None,
    record: Write,
    adapter: ModelAdapter,
    objective: Objective,
) -> Iterator[Sequence[Listener]]:
    """The listeners that the options ask for; bar and trackers are closed on leaving, error or not."""
    config, plan = job.config, job.data.plan
    listeners: list[Listener] = []
    progress = metrics = None
    if job.backend.world.is_main:
        progress = ProgressListener(
            console=job.console, total_steps=plan.total_steps, num_epochs=plan.num_epochs
        )
        listeners += [progress, StepRecorder(record)]
    if job.backend.world.is_main and wanted(config.logging):
        metrics = _metrics(job)
    if job.data.validation is not None:
        listeners.append(
            ValidationListener(
                _validator(job, trained, adapter, objective),
                config.validation,
                evaluating=saver.weights.judged,
                on_measured=[record_validation(record), *([metrics.on_validation] if metrics else [])],
                keep=saver.best if config.validation.keep_best else None,
            )
        )
    if metrics is not None:
        listeners.append(metrics)
    if job.backend.world.is_main and losses is not None:
        listeners.append(OutlierListener(losses, record=record))
    listeners.append(SavingListener(saver, config.saving, num_epochs=plan.num_epochs))
    if job.prompts:
        listeners.append(_previews(job, trained, saver.weights, record, metrics))
    failed = True
    try:
        yield listeners
        failed = False
    finally:
        if progress is not None:
            progress.close()
        if metrics is not None:
            metrics.close(failed=failed)


def _metrics(job: Job) -> MetricsListener:
    config = job.config
    trackers = start_trackers(config.logging, secrets=secret_values(config))
    if config.logging.log_config:
        for tracker in trackers:
            tracker.options(public_options(config))
    return MetricsListener(trackers)


def _validator(job: Job, trained: Trained, adapter: ModelAdapter, objective: Objective) -> Validator:
    data, plan = job.data.validation, job.data.validation_plan
    assert data is not None
    assert plan is not None
    world = job.backend.world
    return Validator(
        module=trained.root,
        network=trained.network,
        adapter=adapter,
        objective=objective,
        backend=job.backend,
        batches=lambda: load_batches(data, plan, rank=world.rank, world=world.size),
        timesteps=fixed_timesteps(job.config.objective.min_timestep, job.config.objective.max_timestep),
        seed=data.seed,
    )


def _previews(
    job: Job, trained: Trained, weights: Weights, record: Write, metrics: MetricsListener | None
) -> PreviewListener:
    output_dir = job.config.saving.output_dir
    assert output_dir is not None, "checked by the config rules"
    # Ranks share the prompts out, unless all of them are needed for each picture.
    world, together = job.backend.world, job.backend.in_lockstep
    previewer = FluxPreviewer(
        module=trained.root,
        autoencoder=job.loader.autoencoder(),
        conditions=_conditions(job, trained.root),
        device=job.backend.world.device,
        shifted=job.loader.files.is_dev,
        seed=job.state.seed,
    )
    tells = [record_image(record, output_dir=output_dir), *([metrics.on_image] if metrics else [])]

    def on_image(prompt: SamplePrompt, path: Path, image: Image, state: TrainState) -> None:
        for tell in tells:
            tell(prompt, path, image, state)

    return PreviewListener(
        draw=previewer,
        prompts=job.prompts if together else job.prompts[world.rank :: world.size],
        config=job.config.sampling,
        folder=output_dir / "sample" if world.is_main or not together else None,
        output_name=job.config.saving.output_name,
        evaluating=weights.judged,
        on_image=on_image,
    )


def _conditions(job: Job, root: FluxTrainModule) -> Callable[[str], TextCond]:
    """Conditions of a prompt: as encoded before training, with what live encoders make of it now."""
    device = job.backend.world.device
    live = root.clip_l is not None or root.t5 is not None

    @torch.no_grad()
    def conditions(prompt: str) -> TextCond:
        kept = job.conditions[prompt]
        text = TextCond(kept.clip_pooled.to(device), kept.t5_hidden.to(device), kept.t5_mask.to(device))
        if not live:
            return text
        clip, t5, t5_mask = (ids.to(device) for ids in job.loader.tokenizers.tokenize([prompt]))
        return root.encode(Conditions(text=text, tokens=TokenIds(clip=clip, t5=t5, t5_mask=t5_mask)))

    return conditions
