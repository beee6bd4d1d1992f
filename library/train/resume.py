"""Where a run begins: from nothing, from an initial step, or from a saved state."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from library.config.train_config import TrainConfig
from library.data.plan import Plan
from library.distributed.base import Backend
from library.errors import CheckpointError, NothingToDo
from library.files.hub import fetch_folder
from library.optim.factory import BuiltOptimizer
from library.optim.schedules import Schedule
from library.optim.state import ExportedState
from library.train.best import has_stalled
from library.train.checkpoint import SavedRun, load_run, newest_run
from library.train.naming import last_stem, model_path
from library.train.prepare import start_step
from library.train.state import TrainState

logger = logging.getLogger(__name__)

AUTO = Path("auto")


def resumed_run(config: TrainConfig, backend: Backend | None = None) -> SavedRun | None:
    """The state that --resume names, read whole; None for a run that starts afresh.

    With `backend` all ranks read the one that rank 0 found, or none: one that lacks it says so.
    """
    folder = config.saving.resume
    if folder == AUTO:
        assert config.saving.output_dir is not None, "checked by the config rules"
        looks = backend is None or backend.world.is_main
        folder = newest_run(config.saving.output_dir, config.saving.output_name) if looks else None
        if backend is not None:
            folder = backend.agree(folder)
        if folder is None:
            logger.info("--resume auto: %s has no state yet, starting afresh", config.saving.output_dir)
    elif folder is not None and config.saving.resume_from_huggingface:
        folder = fetch_folder(folder.as_posix(), token=config.saving.huggingface_token)
    if folder is None:
        return None
    saved = load_run(folder)
    logger.info("resuming from %s at step %d", folder, saved.state.step)
    return saved


def choose_seed(config: TrainConfig, saved: SavedRun | None, backend: Backend) -> int:
    """The seed of the options, else the saved run's, else a new one; the same on every rank."""
    given = config.training.seed
    if saved is not None:
        if given is not None and given != saved.state.seed:
            logger.warning(
                "seed = %d is not the %d of the saved run: data order and noise change here",
                given,
                saved.state.seed,
            )
        else:
            return saved.state.seed
    return int(backend.agree(random.randint(0, 2**32) if given is None else given))


def first_state(
    config: TrainConfig, plan: Plan, saved: SavedRun | None, *, seed: int, backend: Backend
) -> TrainState:
    """The state before the first step of this process."""
    if saved is None:
        return TrainState(
            step=start_step(config, plan),
            seed=seed,
            steps_per_epoch=plan.steps_per_epoch,
            plan_fingerprint=plan.fingerprint(),
            session_id=int(backend.agree(random.randint(0, 2**32))),
            started_at=float(backend.agree(time.time())),
        )
    return continued_state(config, plan, saved, seed=seed)


def continued_state(config: TrainConfig, plan: Plan, saved: SavedRun, *, seed: int) -> TrainState:
    """The state in which `saved` goes on with `plan`. Raises NothingToDo if it is complete and its file written."""
    state = replace(saved.state, seed=seed)
    if state.plan_fingerprint != plan.fingerprint():
        # Another dataset or batch: the epochs done stay done, the rest of the one in hand is planned anew.
        done = state.step / state.steps_per_epoch
        step = round(done * plan.steps_per_epoch)
        logger.warning(
            "data or batch size are not those of the saved run: going on %.2f epochs in, at step %d",
            done,
            step,
        )
        state = replace(
            state, step=step, steps_per_epoch=plan.steps_per_epoch, plan_fingerprint=plan.fingerprint()
        )
    final = model_path(config.saving, last_stem(config.saving.output_name))
    if state.step == plan.total_steps and not final.exists():
        logger.info(
            "the saved run has done all %d steps, but %s is missing and is written now", state.step, final
        )
    elif state.step >= plan.total_steps:
        raise NothingToDo(
            f"the saved run has done {state.step} steps of {plan.total_steps}, so nothing is left to do; "
            "raise max_train_steps or max_train_epochs to train on"
        )
    elif has_stalled(state.validation_losses, config.validation) and final.exists():
        raise NothingToDo(
            f"the saved run ended at step {state.step} as its validation loss no longer fell, so nothing is left to "
            "do; raise early_stop_patience or leave it out to train on"
        )
    return state


class Rememberer(Protocol):
    """A part of a run that keeps tensors over a resume, beside weights and optimizer."""

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumable:
    """The parts of a run whose numbers a state folder holds."""

    network: nn.Module
    optimizer: BuiltOptimizer
    schedule: Schedule
    backend: Backend
    extras: Mapping[str, Rememberer] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """The network's own, by name."""
        return {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}

    def names(self) -> dict[Tensor, str]:
        """Names of the parameters, by which optimizer state is kept."""
        return {parameter: name for name, parameter in self.network.named_parameters()}


def capture(state: TrainState, parts: Resumable) -> SavedRun:
    """Everything that a resume needs, as of now. Called by all ranks: each may hold a part of it."""
    exported = parts.backend.export_optimizer(parts.optimizer.optimizer, parts.names())
    with parts.backend.whole(parts.network):
        network = {name: tensor.detach().to("cpu", copy=True) for name, tensor in parts.tensors().items()}
    return SavedRun(
        state=replace(state, scaler=tuple(sorted(parts.backend.stepper.state().items()))),
        network=network,
        optimizer_tensors=exported.tensors,
        optimizer_values=exported.values,
        schedule=parts.schedule.state_dict(),
        extras={f"{what}/{key}": t for what, part in parts.extras.items() for key, t in part.state().items()},
    )


def restore(saved: SavedRun, parts: Resumable, *, step: int) -> None:
    """Put a saved run's numbers in place, to go on at `step`.

    Raises CheckpointError when it belongs to another network or optimizer.
    """
    with parts.backend.whole(parts.network, changing=True):
        tensors = parts.tensors()
        different = sorted(tensors.keys() ^ saved.network.keys())
        different += [n for n in tensors if n in saved.network and tensors[n].shape != saved.network[n].shape]
        if different:
            raise CheckpointError(
                f"--resume: the saved network differs in {len(different)} tensors, such as {different[0]}; "
                "resume with the same network_module, network_dim and network_args"
            )
        if {tensor.dtype for tensor in tensors.values()} != {
            tensor.dtype for tensor in saved.network.values()
        }:
            raise CheckpointError(
                "--resume: the saved run trains its weights in another precision; resume with the full_bf16 or "
                "full_fp16 that it had"
            )
        for name, tensor in tensors.items():
            tensor.data.copy_(saved.network[name])
    given = _initial_rates(parts.optimizer)
    exported = ExportedState(dict(saved.optimizer_tensors), dict(saved.optimizer_values))
    parts.backend.import_optimizer(parts.optimizer.optimizer, parts.names(), exported)
    parts.optimizer.train()
    parts.schedule.load_state_dict(saved.schedule, moved=step - saved.state.step)
    parts.backend.stepper.load_state(dict(saved.state.scaler))
    for what, part in parts.extras.items():
        own = {n.partition("/")[2]: t for n, t in saved.extras.items() if n.startswith(f"{what}/")}
        if own:
            part.load_state(own)
    kept = _initial_rates(parts.optimizer)
    if kept != given:
        logger.warning(
            "--resume: the learning rates of the saved run go on (%s), not those given now (%s); other rates need a "
            "run of their own, with network_weights", _listed(kept), _listed(given),
        )  # fmt: skip


def _initial_rates(optimizer: BuiltOptimizer) -> dict[str, float]:
    """The rates that schedules multiply, by parameter group."""
    groups = optimizer.optimizer.param_groups
    return {group["name"]: float(group["initial_lr"]) for group in groups if "initial_lr" in group}


def _listed(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
