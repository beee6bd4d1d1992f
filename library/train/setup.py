"""The composition root: from a checked config to a run, in the order in which things come to be.

Everything cheap comes first, so that what is wrong is said before anything large is read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console
from torch import nn

from library.adapters.base import ModelAdapter
from library.config.loaded import LoadedConfig
from library.config.notices import refuse
from library.config.sections.validation import ValidationConfig
from library.config.show import output_config, resolved_table
from library.config.train_config import TrainConfig
from library.data.dataset import load_batches
from library.data.records import Batch
from library.distributed.base import Backend
from library.distributed.launch import connect, launched_rank
from library.distributed.precision import DTYPES
from library.errors import Interrupted, TrainingDiverged, UserError, WriteFailed
from library.files import comfyui
from library.files.atomic import write_text
from library.flow.objective import Objective
from library.log import quiet, setup_logging
from library.preflight import ranks
from library.preflight.facts import Told
from library.preflight.forecast import forecast
from library.preflight.lints import advice
from library.preflight.start import say_start
from library.report.start import live_report
from library.startup import StartClock
from library.train import graphs, recompute
from library.train.best import has_stalled
from library.train.build import (
    Job,
    Trained,
    build_adapter,
    build_ema,
    build_trained,
    check_schedule,
    loss_by_image,
    sample_losses,
    token_shapes,
    wanted_prompts,
)
from library.train.caching import CachingPhase, prompt_texts
from library.train.describe import show_result
from library.train.ema import Ema
from library.train.exhausted import explained, ran_out
from library.train.facts import MetadataWriter
from library.train.graphs import StepGraphs
from library.train.listeners import build_listeners
from library.train.loading import ModelLoader
from library.train.prepare import read_data
from library.train.recording import recorded
from library.train.rehearsal import check_early, debug_dataset, dry_run, say, with_trigger
from library.train.resume import (
    Rememberer,
    capture,
    choose_seed,
    first_state,
    restore,
    resumed_run,
)
from library.train.run_log import Ended
from library.train.saving import About, Saver, Weights
from library.train.scenes import scenes
from library.train.signals import StopRequest
from library.train.speed import Speed
from library.train.spent import Spent
from library.train.state import TrainState
from library.train.trainer import Limits, Listener, Trainer
from library.train.upload import Uploader, hub_folder, open_repository
from library.train.validate import why_enough

logger = logging.getLogger(__name__)


def run(loaded: LoadedConfig, clock: StartClock) -> None:
    """Do what the options ask for: train, print the plan, or write a config file. `clock` began with the program."""
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
    if config.run.dry_run:
        dry_run(loaded)
        return
    say(loaded.notices)
    if config.dataset.debug_dataset:
        debug_dataset(config)
        return
    with connected(config) as backend, explained(config):
        train(prepare(loaded, backend, console, clock))


def prepare(loaded: LoadedConfig, backend: Backend, console: Console, clock: StartClock | None = None) -> Job:
    """Check everything, find where the run begins, say what it will do, cache what is to be cached."""
    config, clock = loaded.config, clock or StartClock()
    clock.mark("device")
    files, _ = check_early(config)
    Speed(config, backend.world.device).check()
    checked = ranks.check_ranks(config, backend.world)
    saved = resumed_run(config, backend)
    seed = choose_seed(config, saved, backend)
    written = wanted_prompts(config)
    data = read_data(config, seed=seed, world_size=backend.world.size)
    check_schedule(config, data.plan.total_steps)
    state = first_state(config, data.plan, saved, seed=seed, backend=backend)
    loader = ModelLoader(config, files)
    prompts, doubtful = with_trigger(written.prompts, data, loader.any_tokenizers)
    told: Told | None = None
    if backend.world.is_main:
        with quiet(logging.WARNING):  # all of it is said when the network is built to be trained
            expected = forecast(
                config, files, data, prompts=prompts, caches=(), world_size=backend.world.size, first_step=state.step
            )  # fmt: skip
        notices = (*written.notices, *data.notices, *doubtful, *advice(loaded, files, data, expected))
        if config.run.strict_config:
            refuse(notices)
        say(notices)
        say_start(expected, device=backend.world.device.type)
        if checked is not None:
            logger.info(ranks.line(checked, expected.disks))
            say(ranks.shortages(checked, config, files, data))
        options = tuple(row._asdict() for row in resolved_table(loaded))
        told = Told(options=options, forecast=expected, notices=(*loaded.notices, *notices))
        open_repository(config.saving)
    clock.mark("data")
    phase = CachingPhase(config=config, loader=loader, backend=backend, console=console)
    data = phase.latents(data)
    data, conditions = phase.text(data, prompt_texts(prompts))
    clock.mark("caches")
    return Job(
        config=config, backend=backend, console=console, loader=loader, data=data, saved=saved, state=state,
        prompts=prompts, conditions=conditions, clock=clock, told=told,
    )  # fmt: skip


def train(job: Job) -> Trained:
    """Build what is trained, train it to the end, write the final file. Returns what was trained."""
    config, backend = job.config, job.backend
    spent = Spent()
    with recorded(job, live_report, spent) as record:
        objective = Objective(config.objective)
        trained = build_trained(job)
        adapter = build_adapter(job, trained)
        recompute.settle(job, trained, adapter, objective)
        module = wrap(job, trained)
        ema = build_ema(job, trained)
        losses = loss_by_image(job.data.training)
        extras: dict[str, Rememberer | None] = {"ema": ema, "losses": losses}
        parts = trained.resumable(backend, {what: part for what, part in extras.items() if part is not None})
        if job.saved is not None:
            restore(job.saved, parts, step=job.state.step)
            job = replace(job, saved=None)  # its numbers are in place: main memory need not hold them twice
        if ema is not None and not ema.has_begun:
            ema.start()
        folder = hub_folder(config.saving) if backend.world.is_main else None
        drawn = scenes(job, trained)
        saver = Saver(
            config=config.saving,
            weights=Weights(
                trained.network,
                trained.optimizer.evaluating,
                ema,
                judged_by_ema=config.averaging.ema_for_samples,
                keeps_best=config.validation.keep_best,
            ),
            about=About(
                metadata=MetadataWriter(job, trained),
                workflow=None if config.saving.no_workflow else lambda path: comfyui.graph(drawn.file(path)),
            ),
            capture=lambda now: capture(now, parts),
            backend=backend,
            record=record,
            uploader=Uploader(folder, background=config.saving.async_upload) if folder is not None else None,
        )
        stop = StopRequest()
        try:
            with build_listeners(
                job,
                trained,
                saver,
                drawn,
                losses=losses,
                record=record,
                spent=spent,
                adapter=adapter,
                objective=objective,
            ) as listeners:
                trainer = build_trainer(
                    job,
                    trained,
                    module=module,
                    adapter=adapter,
                    objective=objective,
                    listeners=listeners,
                    should_stop=stop,
                    ema=ema,
                )
                stop.install()
                began = time.monotonic()
                with rescued(trainer, saver):
                    finished = trainer.run(batches(job))
            left = None if finished else saver.interrupted(trainer.state)
        except TrainingDiverged as error:
            # Nothing was updated with what is not finite, but the schedule and the average have gone on.
            trained.schedule.load_state_dict(trained.schedule.state_dict(), moved=-trainer.scheduled)
            if ema is not None:
                ema.take_back(trainer.scheduled)
            left = saver.diverged(trainer.state) if trainer.state.step > job.state.step else None
            saver.failed()
            raise TrainingDiverged(
                f"{error}{f'; the state before it is in {left}' if left else ''}"
            ) from None
        except Exception:
            saver.failed()
            raise
        if left is not None:
            saver.finish()
            stopped = f"stopped at step {trainer.state.step} of {job.data.plan.total_steps}"
            if saver.misplaced:
                raise WriteFailed(f"{stopped}; {saver.misplaced}, then --resume auto goes on from there")
            raise Interrupted(f"{stopped}; the state is in {left}, go on with --resume auto")
        saver.finish()
        record(ending(trainer.state, total_steps=job.data.plan.total_steps, config=config.validation))
        show_result(
            saver.written, steps=trainer.state.step - job.state.step, seconds=time.monotonic() - began
        )
        return trained


def ending(state: TrainState, *, total_steps: int, config: ValidationConfig) -> Ended:
    """How a finished run ended."""
    if state.step < total_steps:
        return Ended(step=state.step, why="early stop", message=why_enough(state, config))
    return Ended(step=state.step, why="done", message="")


@contextmanager
def rescued(trainer: Trainer, saver: Saver) -> Iterator[None]:
    """Surround training: where memory runs out or data is gone, the steps that were done are kept."""
    first = trainer.state.step
    try:
        yield
    except Exception as error:
        if ran_out(error) or isinstance(error, UserError):
            state = trainer.landed()
            if state is not None and state.step > first:
                saver.rescue(state)
        raise


def build_trainer(  # noqa: PLR0913 (all that the loop is made of)
    job: Job,
    trained: Trained,
    *,
    module: nn.Module,
    adapter: ModelAdapter,
    objective: Objective,
    listeners: Sequence[Listener],
    should_stop: Callable[[], bool],
    ema: Ema | None = None,
) -> Trainer:
    """The loop over what was built; `module` is the root module as the backend wrapped it."""
    config, backend = job.config, job.backend
    micro_steps = -(-job.data.plan.settings.units_per_step // backend.world.size)
    return Trainer(
        module=module,
        adapter=adapter,
        network=trained.network,
        parameters=trained.parameters,
        objective=objective,
        optimizer=trained.optimizer,
        schedule=trained.schedule,
        backend=backend,
        limits=Limits(
            total_steps=job.data.plan.total_steps,
            micro_steps=micro_steps,
            max_grad_norm=config.optimizer.max_grad_norm,
            scale_weight_norms=config.network.scale_weight_norms,
        ),
        listeners=listeners,
        state=job.state,
        should_stop=should_stop,
        graphs=StepGraphs(trained.parameters, shapes=token_shapes(job)) if backend.keeps_gradients else None,
        has_enough=lambda state: has_stalled(state.validation_losses, config.validation),
        ema=ema,
        sample_losses=sample_losses(
            job.data.training, rows=micro_steps * max(job.data.plan.settings.batch_sizes), world=backend.world
        ),
    )


def wrap(job: Job, trained: Trained) -> nn.Module:
    """The root module as the backend wants it called."""
    compiled = trained.root.transformer.compiled is not None
    recordable = graphs.wanted(job.config, device=job.backend.world.device, compiled=compiled)
    return job.backend.wrap(trained.root, trained.optimizer.optimizer, recordable=recordable)


def batches(job: Job) -> Iterator[Batch]:
    """This rank's micro-batches from the first step to the last."""
    world = job.backend.world
    stream = load_batches(
        job.data.training, job.data.plan, rank=world.rank, world=world.size, start_step=job.state.step,
        num_workers=job.config.dataset.max_data_loader_n_workers,
    )  # fmt: skip
    return iter(stream)


@contextmanager
def connected(config: TrainConfig) -> Iterator[Backend]:
    """The ranks this process was started with; an error of one is told to those that wait.

    What all ranks find together ends them as a finished run does, none before the last: a launcher ends all as soon
    as one has left, and takes its exit code for that of the run.
    """
    backend = connect(
        config.distributed,
        dtype=DTYPES[config.training.mixed_precision],
        leaves_out_modules=any("module_dropout" in item for item in config.network.network_args),
    )
    try:
        yield backend
    except BaseException as error:
        together = getattr(error, "together", False)
        backend.close(failure=None if together else f"{type(error).__name__}: {error}")
        raise
    backend.close()
