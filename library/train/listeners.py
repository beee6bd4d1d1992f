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
from library.train.card import CardListener, card_text
from library.train.image_losses import LossByImage
from library.train.metrics import MetricsListener, public_options, secret_values
from library.train.naming import card_path
from library.train.outliers import OutlierListener
from library.train.preview import PreviewListener
from library.train.progress import ProgressListener
from library.train.recorder import StepRecorder, record_image, record_validation
from library.train.run_log import Write
from library.train.saving import Saver, SavingListener, Weights
from library.train.scenes import Scenes
from library.train.spent import Spent
from library.train.start_line import StartListener
from library.train.state import TrainState
from library.train.trackers import start_trackers, wanted
from library.train.trainer import Listener
from library.train.validate import ValidationListener, Validator, fixed_timesteps


@contextmanager
def build_listeners(  # noqa: PLR0913 (all that listeners are made of)
    job: Job,
    trained: Trained,
    saver: Saver,
    scenes: Scenes,
    *,
    losses: LossByImage | None,
    record: Write,
    spent: Spent,
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
        metrics = _metrics(job, spent)
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
    previews = _previews(job, trained, saver.weights, scenes, record, metrics) if job.prompts else None
    if previews is not None:
        listeners.append(previews)
    if job.backend.world.is_main and not config.saving.no_card:
        listeners.append(
            CardListener(
                path=card_path(config.saving),
                saver=saver,
                pictures=lambda: previews.newest if previews is not None else (),
                text=lambda state, drawn: card_text(job, trained, saver, state, drawn),
            )
        )
    listeners.append(StartListener(job.clock, first=job.state.step + 1))
    failed = True
    try:
        yield listeners
        failed = False
    finally:
        if progress is not None:
            progress.close()
        if metrics is not None:
            metrics.close(failed=failed)


def _metrics(job: Job, spent: Spent) -> MetricsListener:
    config = job.config
    trackers = start_trackers(config.logging, secrets=secret_values(config))
    if config.logging.log_config:
        for tracker in trackers:
            tracker.options(public_options(config))
    return MetricsListener(trackers, spent)


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
    job: Job,
    trained: Trained,
    weights: Weights,
    scenes: Scenes,
    record: Write,
    metrics: MetricsListener | None,
) -> PreviewListener:
    output_dir = job.config.saving.output_dir
    assert output_dir is not None, "checked by the config rules"
    if any(prompt.strength != 1 for prompt in job.prompts):
        trained.network.set_multiplier(1.0)  # a network that cannot is refused here, not at the first picture
    painter = FluxPreviewer(
        module=trained.root,
        autoencoder=job.loader.autoencoder(),
        conditions=_conditions(job, trained.root),
        set_strength=trained.network.set_multiplier,
        device=job.backend.world.device,
        shifted=job.loader.files.is_dev,
        seed=job.state.seed,
    )
    tells = [record_image(record, output_dir=output_dir), *([metrics.on_image] if metrics else [])]

    def on_image(prompt: SamplePrompt, path: Path, image: Image, state: TrainState) -> None:
        for tell in tells:
            tell(prompt, path, image, state)

    return PreviewListener(
        painter=painter,
        prompts=job.prompts,
        config=job.config,
        evaluating=weights.judged,
        backend=job.backend,
        scene=scenes.picture,
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
