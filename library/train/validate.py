"""Loss on pictures kept out of training, on a draw that never changes, so that two values can be compared.

Every validation sample is seen at the same four timesteps with the same noise each time: the t that Kohya's
options name (the four inner points of six over the range), which Kohya itself ignores for FLUX.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
from torch import nn

from library.adapters.base import ModelAdapter
from library.config.sections.validation import ValidationConfig
from library.data.records import Batch
from library.distributed.base import Backend
from library.flow.objective import Objective
from library.optim.factory import BuiltOptimizer
from library.train.state import TrainState, falling_ratio
from library.train.trainer import StepReport

logger = logging.getLogger(__name__)


def fixed_timesteps(least: int | None, most: int | None) -> tuple[float, ...]:
    """The four validation timesteps: inner points of six over [least, most] within 0..1000, truncated."""
    low, high = least or 0, 1000 if most is None else most
    return tuple(float(int(low + (high - low) * i / 5)) for i in range(1, 5))


class Validator:
    """Mean loss over this rank's share of the validation batches, summed over ranks."""

    def __init__(
        self,
        *,
        module: nn.Module,
        adapter: ModelAdapter,
        objective: Objective,
        backend: Backend,
        batches: Callable[[], Iterable[Batch]],
        timesteps: tuple[float, ...],
        seed: int,
    ) -> None:
        self._module, self._adapter, self._objective, self._backend = module, adapter, objective, backend
        self._batches, self._timesteps, self._seed = batches, timesteps, seed

    @torch.no_grad()
    def loss(self) -> float:
        """Mean over validation samples and timesteps; the same on every rank."""
        self._module.eval()
        total = torch.zeros(2, device=self._backend.world.device)
        for batch in self._batches():
            inputs = self._adapter.inputs(batch)
            real = (batch.shares > 0).to(total.device)
            for t in self._timesteps:
                times = [t] * len(batch.visits)
                draw = self._objective.draw_fixed(
                    inputs.latents, batch.visits, seed=self._seed, timesteps=times
                )
                prediction = self._module(draw.x_t, draw.t, inputs.cond)
                losses = self._objective.loss(prediction, draw, inputs.mask)  # [B]
                total[0] += (losses * real).sum()
                total[1] += real.sum()
        self._module.train()
        loss_sum, count = self._backend.sum(total).tolist()
        return float(loss_sum / count)


class ValidationListener:
    """Validates at the start, every n steps and at epoch ends; says how far the loss fell."""

    def __init__(self, validator: Validator, config: ValidationConfig, optimizer: BuiltOptimizer) -> None:
        self._validator, self._optimizer = validator, optimizer
        self._every_steps = config.validate_every_n_steps
        self._every_epochs = config.validate_every_n_epochs or 1

    def on_start(self, state: TrainState) -> TrainState:
        return state if state.validation_losses else self._validate(state)

    def on_step(self, state: TrainState, report: StepReport) -> TrainState:
        del report
        return self._validate(state) if self._every_steps and state.step % self._every_steps == 0 else state

    def on_epoch(self, state: TrainState, epoch: int) -> TrainState:
        due = epoch % self._every_epochs == 0 and state.validation_losses[-1][0] != state.step
        return self._validate(state) if due else state

    def on_end(self, state: TrainState) -> TrainState:
        losses = [loss for _, loss in state.validation_losses]
        ratio = falling_ratio(losses)
        if ratio is not None:
            logger.info(
                "validation loss on the fixed draw: %.4f at the start, %.4f at the end; "
                "mean of the last 20 %% / mean of the first 20 %% = %.3f",
                losses[0], losses[-1], ratio,
            )  # fmt: skip
        return state

    def _validate(self, state: TrainState) -> TrainState:
        with self._optimizer.evaluating():
            loss = self._validator.loss()
        logger.info("step %d  validation loss %.4f (fixed draw)", state.step, loss)
        return state.after_validation(loss)
