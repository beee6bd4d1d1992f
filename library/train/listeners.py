"""The listeners of a run, in the order they are told: see, measure, log, save, draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from library.adapters.base import Conditions, ModelAdapter
from library.adapters.flux import FluxTrainModule
from library.adapters.preview import FluxPreviewer
from library.data.dataset import load_batches
from library.data.records import TextCond, TokenIds
from library.flow.objective import Objective
from library.train.build import Job, Trained
from library.train.card import CardListener, card_text
from library.train.metrics import MetricsListener, public_options, secret_values
from library.train.naming import card_path
from library.train.preview import PreviewListener
from library.train.progress import ProgressListener
from library.train.saving import Saver, SavingListener
from library.train.scenes import Scenes
from library.train.trackers import start_trackers, wanted
from library.train.trainer import Listener
from library.train.validate import ValidationListener, Validator, fixed_timesteps


@contextmanager
def build_listeners(
    job: Job, trained: Trained, saver: Saver, scenes: Scenes, *, adapter: ModelAdapter, objective: Objective
) -> Iterator[Sequence[Listener]]:
    """The listeners that the options ask for; bar and trackers are closed on leaving, error or not."""
    config, plan = job.config, job.data.plan
    listeners: list[Listener] = []
    progress = metrics = None
    if job.backend.world.is_main:
        progress = ProgressListener(
            console=job.console, total_steps=plan.total_steps, num_epochs=plan.num_epochs
        )
        listeners.append(progress)
    if job.data.validation is not None:
        validator = _validator(job, trained, adapter, objective)
        listeners.append(ValidationListener(validator, config.validation, trained.optimizer))
    if job.backend.world.is_main and wanted(config.logging):
        metrics = _metrics(job)
        listeners.append(metrics)
    listeners.append(SavingListener(saver, config.saving, num_epochs=plan.num_epochs))
    previews = _previews(job, trained, scenes, metrics) if job.prompts else None
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


def _previews(job: Job, trained: Trained, scenes: Scenes, metrics: MetricsListener | None) -> PreviewListener:
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
    return PreviewListener(
        painter=painter,
        prompts=job.prompts,
        config=job.config,
        optimizer=trained.optimizer,
        backend=job.backend,
        scene=scenes.picture,
        on_image=metrics.on_image if metrics is not None else None,
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
