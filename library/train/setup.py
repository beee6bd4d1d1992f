"""The composition root: from a checked config to a run, in the order in which things come to be.

Everything cheap comes first, so that what is wrong is said before anything large is read.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from library import randomness
from library.adapters.base import Conditions
from library.adapters.flux import FluxAdapter, FluxTrainModule, ForwardSettings
from library.adapters.preview import FluxPreviewer
from library.config.load import LoadedConfig
from library.config.prompts import SamplePrompt, load_prompts
from library.config.show import output_config
from library.config.train_config import TrainConfig
from library.data.dataset import load_batches
from library.data.records import TextCond, TokenIds
from library.distributed.base import Backend
from library.distributed.ddp import DdpSettings
from library.distributed.launch import connect, launched_rank, launched_world_size
from library.distributed.precision import DTYPES
from library.errors import Interrupted
from library.files.atomic import write_text
from library.flow.objective import Objective
from library.log import setup_logging
from library.optim.factory import BuiltOptimizer, build_optimizer, check_optimizer
from library.optim.schedules import build_schedule
from library.optim.state import export_state, import_state
from library.train.caching import CachingPhase, image_encoder
from library.train.checkpoint import SavedRun, load_run, newest_run
from library.train.describe import show_plan, show_result, show_start
from library.train.facts import MetadataWriter
from library.train.loading import ModelLoader
from library.train.metrics import TensorBoardListener, log_folder
from library.train.prepare import Data, locate_models, read_data, start_step
from library.train.preview import PreviewListener
from library.train.progress import ProgressListener
from library.train.saving import Saver, SavingListener
from library.train.signals import StopRequest
from library.train.state import TrainState
from library.train.trainer import Limits, Listener, Trainer
from library.train.validate import ValidationListener, Validator, fixed_timesteps
from networks.interface import NetworkHandle, create, merge_base_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What is trained, and with what."""

    root: FluxTrainModule
    network: NetworkHandle
    optimizer: BuiltOptimizer
    schedule: torch.optim.lr_scheduler.LRScheduler


def run(loaded: LoadedConfig) -> None:
    """Do what the options ask for: train, or print the plan, or write a config file."""
    config = loaded.config
    if config.run.output_config:
        write_text(*output_config(loaded))
        return
    console = Console(stderr=True)
    setup_logging(
        is_main=launched_rank() == 0,
        console=console,
        level=config.logging.console_log_level or "INFO",
        file=config.logging.console_log_file if launched_rank() == 0 else None,
        simple=config.logging.console_log_simple,
    )
    for notice in loaded.notices:
        logger.warning(notice)
    if config.run.dry_run:
        dry_run(loaded, console)
        return
    backend = connect(
        dtype=DTYPES[config.training.mixed_precision],
        settings=DdpSettings(
            gradient_as_bucket_view=config.distributed.ddp_gradient_as_bucket_view,
            static_graph=config.distributed.ddp_static_graph,
            find_unused_parameters="module_dropout" in " ".join(config.network.network_args),
        ),
        timeout_minutes=config.distributed.ddp_timeout,
    )
    try:
        train(config, backend, console)
    except BaseException as error:
        backend.close(failure=f"{type(error).__name__}: {error}")
        raise
    backend.close()


def dry_run(loaded: LoadedConfig, console: Console) -> None:
    """Check config and data and print the plan; no model is loaded."""
    config = loaded.config
    files = locate_models(config.model)
    check_optimizer(config.optimizer)
    data = read_data(config, seed=config.training.seed or 0, world_size=launched_world_size())
    start_step(config, data.plan)
    if launched_rank() == 0:
        show_plan(loaded, files, data, console)


def train(config: TrainConfig, backend: Backend, console: Console) -> None:
    """A whole run, from files to the final file."""
    saved = resumed_run(config)
    seed = choose_seed(config, saved, backend)
    files = locate_models(config.model)
    check_optimizer(config.optimizer)
    prompts = wanted_prompts(config)
    data = read_data(config, seed=seed, world_size=backend.world.size)
    for notice in data.notices:
        logger.warning(notice)
    loader = ModelLoader(config, files)
    phase = CachingPhase(config=config, loader=loader, backend=backend, console=console)
    data = phase.latents(data)
    data, conditions = phase.text(data, [text for p in prompts for text in (p.prompt, p.negative_prompt or "")])

    state = first_state(config, data, saved, seed, backend)
    trained = build_trained(config, loader, backend, data, seed=seed)
    adapter = build_adapter(config, loader, trained, backend, seed=seed)
    module = backend.wrap(trained.root)
    if saved is not None:
        restore(trained, saved, backend)
    folder = config.saving.output_dir
    assert folder is not None, "checked by the config rules"
    metadata = MetadataWriter(config=config, files=files, data=data, state=state, optimizer=trained.optimizer, world=backend.world)
    saver = Saver(
        config=config.saving,
        folder=folder,
        network=trained.network,
        metadata=metadata,
        capture=lambda now: capture(trained, now, backend),
        world=backend.world,
    )
    objective = Objective(config.objective)
    listeners = build_listeners(config, data, backend, console, saver)
    stop = StopRequest()
    stop.install()
    trainer = Trainer(
        module=module,
        adapter=adapter,
        network=trained.network,
        parameters=[p for group in trained.optimizer.optimizer.param_groups for p in group["params"]],
        objective=objective,
        optimizer=trained.optimizer,
        schedule=trained.schedule,
        backend=backend,
        limits=Limits(
            total_steps=data.plan.total_steps,
            micro_steps=-(-data.plan.settings.units_per_step // backend.world.size),
            max_grad_norm=config.optimizer.max_grad_norm,
            scale_weight_norms=config.network.scale_weight_norms,
        ),
        listeners=listeners,
        state=state,
        should_stop=stop,
    )
    show_start(config, data, backend.world, state)
    batches = load_batches(
        data.training, data.plan, rank=backend.world.rank, world=backend.world.size,
        start_step=state.step, num_workers=config.dataset.max_data_loader_n_workers,
    )  # fmt: skip
    try:
        finished = trainer.run(iter(batches))
    finally:
        for listener in listeners:
            if isinstance(listener, ProgressListener):
                listener.close()
    if not finished:
        where = saver.interrupted(trainer.state)
        raise Interrupted(
            f"stopped at step {trainer.state.step} of {data.plan.total_steps}; the state is in {where}, "
            "go on with --resume auto"
        )
    if backend.world.is_main:
        show_result(saver.written, trainer.state)
